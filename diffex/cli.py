"""The ``diffex`` command."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffex import data_cli, store_cli, submit
from diffex.config import Experiment
from diffex.errors import UserError
from diffex.options import (
    HOME,
    add_experiment_options,
    add_place_options,
    claim_output,
    experiment_of,
    guarded,
    places,
    store_address,
)
from diffex.settings import describe, digest, flat
from diffex.version import __version__

VERBS = {
    "data": (
        "ingest, inspect, measure or simulate a screen; alone: read and split an experiment's images",
        "diffex data --data cells/ --set data.size=64",
    ),
    "fit": ("train (or load) the classifier, and train the autoencoder", "diffex fit --set autoencoder.lambda1=0.3"),
    "directions": ("learn the directions", "diffex directions --set directions.num_directions=8"),
    "explain": (
        "measure and rank the directions' effects on the classifier",
        "diffex explain --set ranking.target=compound",
    ),
    "report": ("write report.html and its pictures", "diffex report --output my-run"),
    "run": ("all of it, from images to report.html", "diffex run --data cells.parquet --output my-run"),
    "config": ("print every setting with its meaning and value", "diffex config --recipe bbbc021"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``diffex``; returns the exit status: 2 for a user's mistake, told in one line."""
    parser = argparse.ArgumentParser(
        prog="diffex", description="Learn why an image classifier decides as it does, and prove it.",
        epilog="Every verb computes what it needs and reuses what is there.  Example: diffex run --output my-run",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"diffex {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (help_, example) in VERBS.items():
        verb = verbs.add_parser(
            name, help=help_, description=help_[0].upper() + help_[1:] + ".", epilog=f"Example: {example}"
        )
        add_experiment_options(verb)
        if name != "config":
            add_place_options(verb, "run")
        if name == "run":
            verb.add_argument(
                "--seeds", type=int, default=1, metavar="N",
                help="train all of it N times, from seeds run.seed, run.seed + 1, ..., and report mean and interval",
            )  # fmt: skip
        if name == "data":
            data_cli.add_verbs(verb)
    store_cli.add_verbs(verbs.add_parser("store", help="list, check or clean up a store of stage results"))
    submit.add_options(
        verbs.add_parser(
            "submit",
            help="run a script as a job on a Ray cluster, and follow it",
            epilog="Example: diffex submit sweeps/lambda_sweep.py -- --store s3://bucket/diffex",
        )
    )
    options = parser.parse_args(argv)
    if options.verb == "store":
        return guarded(lambda: store_cli.run_store_verb(options))
    if options.verb == "submit":
        named = (os.environ.get(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"))
        options.address = options.address or next(filter(None, named), None)
        return guarded(lambda: submit.submit_main(options))
    if options.verb == "data" and options.data_verb is not None:
        return guarded(lambda: data_cli.run_data_verb(options))
    return guarded(lambda: _config(options) if options.verb == "config" else _run_verb(options))


# ----------------------------------------------------------------------------------------------------------------------
# Verbs


def _config(options: argparse.Namespace) -> int:
    print(describe(experiment_of(options)), end="")
    return 0


LAST_STAGE = {"data": "data", "fit": "reconstruction", "directions": "directions", "explain": "scoreboard"}


def _run_verb(options: argparse.Namespace) -> int:
    from diffex.pipeline import ensure, stage_digests
    from diffex.progress import Bars
    from diffex.store import Store
    from diffex.trainer import local_crew

    experiment = experiment_of(options)
    if getattr(options, "seeds", 1) != 1:
        return _run_seeds(experiment, options)
    last = LAST_STAGE.get(options.verb, "pictures")
    name = f"run-{digest(experiment)[:8]}"
    output = options.output or HOME / name
    if options.dry_run:
        print(describe(experiment), end="")
        store = store_address(options, output if options.output else HOME)
        known = Store.existing(store)
        for stage, address in stage_digests(experiment, last).items():
            there = known is not None and known.has(stage, address)
            print(f"# stage {stage:<15} {address}  {'is there' if there else 'to be computed'}")
        return 0
    output, store_path, uri = places(options, name)
    claim_output(output, {"digest": digest(experiment), "settings": flat(experiment), "kind": "run"})
    bars = Bars()
    with local_crew(experiment.run, bars) as crew:
        outcome = ensure(Store(store_path), experiment, last, progress=bars, crew=crew)
    bars.close()
    print(f"computed: {', '.join(outcome.paid) or 'nothing'}; reused: {', '.join(outcome.reused) or 'nothing'}")
    if options.verb == "data":
        _show_data(experiment, outcome, output)
    elif options.verb == "fit":
        _show_fit(outcome)
    elif options.verb == "directions":
        facts = outcome["directions"].facts
        print(f"{len(facts['consistency'])} directions in {facts['rank']} dimensions; consistency over images:",
              ", ".join(f"{c:.2f}" for c in facts["consistency"]))  # fmt: skip
    elif options.verb == "explain":
        _show_ranking(outcome)
    else:
        _finish_run(experiment, outcome, output, store_path, uri)
    return 0


def _run_seeds(base: Experiment, options: argparse.Namespace) -> int:
    """The same experiment from several seeds: a sweep over ``run.seed`` that tries every one of them once."""
    from diffex.search import Sweep
    from diffex.space import Levels
    from diffex.sweep_cli import go

    if options.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {options.seeds}")
    seeds = tuple(range(base.run.seed, base.run.seed + options.seeds))
    first = [{"run.seed": seed} for seed in seeds]
    sweep = Sweep(name="run", base=base, space={"run.seed": Levels(seeds)}, first=first)
    return go(sweep, options, options.seeds, "Why the classifier decides")


def _show_data(experiment: Experiment, outcome: Any, output: Path) -> None:
    from diffex.data import ImageStore
    from diffex.figures import image_grid
    from diffex.report import save_figure, unit_words

    store, facts = ImageStore(outcome["data"].path, origin=experiment.data.path), outcome["data"].facts
    for part, counts in facts["counts"].items():
        print(f"{part:<6} " + "  ".join(f"{name}: {n}" for name, n in zip(facts["class_names"], counts, strict=True)))
    rows = {name: store.pixels((store.labels == i).nonzero()[0][:12]) for i, name in enumerate(store.info.class_names)}
    if store.info.dtype != "uint8":
        rows = {name: ((store.batch((store.labels == i).nonzero()[0][:12]).x + 1) * 127.5).byte().numpy()
                for i, name in enumerate(store.info.class_names)}  # fmt: skip
    picture = save_figure(image_grid(rows, store.info.channels, "Images of each class"), output / "contact-sheet.png")
    print(f"split by {unit_words(facts)}; contact sheet: {picture}")


def _show_fit(outcome: Any) -> None:
    report, quality = outcome["classifier"].facts["report"], outcome["reconstruction"].facts
    low, high = report["accuracy_interval"]
    print(f"classifier: accuracy {report['accuracy']:.3f} [{low:.3f}, {high:.3f}] on {report['n']} test images")
    for key, text in (
        ("ssim", "SSIM"),
        ("agreement", "agreement"),
        ("swapped", "follows z, x_T of another class"),
        ("random", "follows z, random x_T"),
    ):
        v = quality[key]
        print(f"{text}: {v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}]")


def _show_ranking(outcome: Any) -> None:
    from diffex.report import headline

    for line in headline(outcome["scoreboard"].facts["top"]):
        print(line)
    row = json.loads((outcome["scoreboard"].path / "row.json").read_text(encoding="utf-8"))
    print(f"failure signatures: {row['signatures']}")


def _finish_run(experiment: Experiment, outcome: Any, output: Path, store: str, uri: str) -> None:
    """A run is a sweep of one trial: same folder, same report, same MLflow layout."""
    from diffex.search import SweepResult
    from diffex.store import Store
    from diffex.sweep_cli import conclude
    from diffex.tracking import TrialRun, open_sweep
    from diffex.trials import histories, trial_files, trial_name, trial_note, write_row, write_trial

    name = trial_name(experiment, {})
    params, folder = flat(experiment), output / "trials" / name
    target = open_sweep(uri, "run", digest(experiment), artifacts=output / "mlartifacts", params=params, tags={})
    with TrialRun(target, f"trial-{name}", name, params) as run:
        row = write_trial(folder, Store(store), experiment, outcome, {}, name)
        run.log(row, histories(outcome), trial_files(folder), {}, note=trial_note(outcome))
    write_row(folder, row)
    _show_ranking(outcome)
    result = SweepResult([row], [], outcome.seconds(computed=True))
    conclude("Why the classifier decides", experiment, {}, output, result, target, uri)


if __name__ == "__main__":
    sys.exit(main())
