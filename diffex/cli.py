"""The ``diffex`` command, and the command line that sweeps share."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffex import data_cli
from diffex.config import Experiment, idle_settings, load, recipes
from diffex.errors import UserError
from diffex.settings import describe, digest, flat, parse_settings
from diffex.version import __version__

if TYPE_CHECKING:
    from diffex.search import Sweep

HOME = Path("diffex-output")

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
    options = parser.parse_args(argv)
    if options.verb == "data" and options.data_verb is not None:
        return guarded(lambda: data_cli.run_data_verb(options))
    return guarded(lambda: _config(options) if options.verb == "config" else _run_verb(options))


def guarded(action: Callable[[], int]) -> int:
    """Run it; a user's mistake becomes one line on standard error and status 2, Ctrl-C status 130."""
    try:
        return action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


def add_experiment_options(parser: argparse.ArgumentParser) -> None:
    """Options that decide the experiment: --recipe, --data, --set, --dry-run."""
    parser.add_argument(
        "--recipe", default="assay", help=f"recipe: {', '.join(recipes())}, or a YAML file (default: assay)"
    )
    parser.add_argument(
        "--data", help="ingested store, folder of classes, Parquet file, ... (default: simulated assay)"
    )
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="a.b=v", help="replace a setting; repeatable"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")


def add_place_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Options that decide where results lie: --output, --store, --tracking-uri."""
    parser.add_argument("--output", type=Path, help=f"folder for results (default: diffex-output/{name}-<digest>)")
    parser.add_argument("--store", type=Path, help="folder of the stage store (default: beside the results)")
    parser.add_argument(
        "--tracking-uri", help="MLflow: sqlite:///FILE.db or http://HOST:PORT (default: SQLite file beside the results)"
    )


def experiment_of(options: argparse.Namespace) -> Experiment:
    """The experiment that the options describe; warns about settings without effect."""
    settings = parse_settings(options.settings)
    if options.data is not None:
        settings["data.path"] = options.data
    experiment = load(options.recipe, settings)
    if experiment.data.path is not None and not Path(experiment.data.path).exists():
        raise UserError(f"there is no file or folder {experiment.data.path!r} (--data)")
    for warning in idle_settings(experiment):
        print(f"warning: {warning}", file=sys.stderr)
    return experiment


def claim_output(output: Path, identity: Mapping[str, Any]) -> None:
    """Make the output folder, or check that it belongs to this very configuration.

    Raises:
        UserError: the folder holds results of another configuration, or something else; nothing is touched then.
    """
    record = output / "identity.json"
    if record.is_file():
        try:
            other = dict(json.loads(record.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise UserError(f"{str(record)!r} is damaged: remove it, or choose another --output") from None
        if other.get("digest") != identity["digest"]:
            mine, theirs = identity["settings"], other.get("settings", {})
            changed = [k for k in mine if mine.get(k) != theirs.get(k)] or ["the search space, the data or the code"]
            shown = ", ".join(
                f"{k} ({theirs.get(k)} there, {mine.get(k)} here)" if k in mine else k for k in changed[:3]
            )
            raise UserError(f"{str(output)!r} holds results of another configuration: {shown}; choose another --output")
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{str(output)!r} exists and is not a diffex output folder; choose another --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(identity, indent=1), encoding="utf-8")
    except OSError as error:
        raise UserError(f"can't write to {str(output)!r}: {error.strerror}") from None


def _places(options: argparse.Namespace, name: str) -> tuple[Path, Path, str]:
    """Output folder, store and tracking URI: beside each other."""
    from diffex.tracking import absolute_uri

    output = options.output or HOME / name
    shared = output if options.output else HOME
    try:
        uri = absolute_uri(options.tracking_uri or f"sqlite:///{shared / 'mlflow.db'}")
    except OSError as error:  # a file where a folder must be, or no permission
        raise UserError(f"can't make the folder {error.filename!r}: {error.strerror}; choose another place") from None
    return output, options.store or shared / "store", uri


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

    experiment = experiment_of(options)
    if getattr(options, "seeds", 1) != 1:
        return _run_seeds(experiment, options)
    last = LAST_STAGE.get(options.verb, "pictures")
    name = f"run-{digest(experiment)[:8]}"
    output = options.output or HOME / name
    if options.dry_run:
        print(describe(experiment), end="")
        store = options.store or (output if options.output else HOME) / "store"
        for stage, address in stage_digests(experiment, last).items():
            there = (store / stage / address).is_dir()
            print(f"# stage {stage:<15} {address}  {'is there' if there else 'to be computed'}")
        return 0
    output, store_path, uri = _places(options, name)
    claim_output(output, {"digest": digest(experiment), "settings": flat(experiment), "kind": "run"})
    bars = Bars()
    outcome = ensure(Store(store_path), experiment, last, progress=bars)
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
        _finish_run(options, experiment, outcome, output, uri)
    return 0


def _run_seeds(base: Experiment, options: argparse.Namespace) -> int:
    """The same experiment from several seeds: a sweep over ``run.seed`` that tries every one of them once."""
    from diffex.search import Levels, Sweep

    if options.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {options.seeds}")
    seeds = tuple(range(base.run.seed, base.run.seed + options.seeds))
    first = [{"run.seed": seed} for seed in seeds]
    sweep = Sweep(name="run", base=base, space={"run.seed": Levels(seeds)}, first=first)
    options.trials = options.seeds
    return _go(sweep, options, "Why the classifier decides")


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


def _finish_run(options: argparse.Namespace, experiment: Experiment, outcome: Any, output: Path, uri: str) -> None:
    """A run is a sweep of one trial: same folder, same report, same MLflow layout."""
    from diffex.search import (
        SweepResult,
        finish_trial,
        histories,
        trial_files,
        trial_name,
        trial_note,
        write_row,
    )
    from diffex.tracking import TrialRun, open_sweep

    name = trial_name(experiment, {})
    params = flat(experiment)
    target = open_sweep(uri, "run", digest(experiment), artifacts=output / "mlartifacts", params=params, tags={})
    with TrialRun(target, f"trial-{name}", name, params) as run:
        row = finish_trial(output / "trials" / name, experiment, outcome, {}, name)
        run.log(row, histories(outcome), trial_files(output / "trials" / name), {}, note=trial_note(outcome))
    write_row(output / "trials" / name, row)
    _show_ranking(outcome)
    result = SweepResult([row], [], outcome.seconds(computed=True))
    conclude("Why the classifier decides", experiment, {}, output, result, target, uri)


# ----------------------------------------------------------------------------------------------------------------------
# Sweeps


def sweep_main(
    name: str, space: Mapping[str, Any], *, assay_space: Mapping[str, Any] | None = None,
    first: Sequence[Mapping[str, Any]] = (), trials: int, doc: str | None, argv: Sequence[str] | None = None,
) -> int:  # fmt: skip
    """Command line of a sweep script.

    Args:
        name: of the sweep.
        space: dotted setting -> ``Levels`` or ``Range``.
        assay_space: settings that vary as well where the images are simulated (they name the assay's channels).
        first: settings to try first.
        trials: default number of trials.
        doc: the script's docstring, for --help.
    """
    parser = argparse.ArgumentParser(
        prog=f"python sweeps/{name}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_experiment_options(parser)
    parser.add_argument(
        "--trials", type=int, default=trials, help=f"trials in all; raise it later to go on (default: {trials})"
    )
    vary = "vary a setting over these values, instead of or besides the script's own; repeatable"
    parser.add_argument("--vary", action="append", default=[], metavar="a.b=[v, w]", help=vary)
    goal = "pareto: flip rate, disentanglement and SSIM; score: their geometric mean, with ASHA"
    parser.add_argument("--objective", choices=("pareto", "score"), default="pareto", help=goal)
    add_place_options(parser, name)
    options = parser.parse_args(argv)
    return guarded(lambda: _run_sweep(name, space, assay_space or {}, first, options))


def _varied(pairs: Sequence[str]) -> dict[str, Any]:
    """The choices of --vary."""
    from diffex.search import Levels

    levels = {}
    for name, values in parse_settings(list(pairs)).items():
        if not isinstance(values, list) or not values:
            raise UserError(f"--vary {name} takes a list of values, e.g. --vary '{name}=[1, 2]'")
        levels[name] = Levels(tuple(",".join(map(str, v)) if isinstance(v, list) else v for v in values))
    return levels


def _run_sweep(
    name: str, space: Mapping[str, Any], assay_space: Mapping[str, Any], first: Sequence[Mapping[str, Any]],
    options: argparse.Namespace,
) -> int:  # fmt: skip
    from diffex.search import Levels, Sweep

    if options.trials < 1:
        raise UserError(f"--trials must be at least 1, got {options.trials}")
    base = experiment_of(options)
    of_recipe = flat(base)
    space = {name: c.including(of_recipe[name]) if isinstance(c, Levels) else c for name, c in space.items()}
    space = {**space, **(assay_space if base.data.path is None else {}), **_varied(options.vary)}
    first = [{k: v for k, v in settings.items() if k in space} for settings in first]
    sweep = Sweep(name=name, base=base, space=space, first=first, objective=options.objective)
    return _go(sweep, options, name.replace("_", " ").capitalize())


def _go(sweep: Sweep, options: argparse.Namespace, title: str) -> int:
    """Run a sweep, or show what it would do, and write its report."""
    from diffex.search import run_sweep
    from diffex.tracking import open_sweep

    name, base, space = sweep.name, sweep.base, sweep.space
    folder = f"{name}-{sweep.digest[:8]}"
    if options.dry_run:
        return _plan_sweep(sweep, options.trials)
    output, store, uri = _places(options, folder)
    claim_output(output, {"digest": sweep.digest, "settings": flat(base), "kind": "sweep"})
    print(f"results: {output}    MLflow: mlflow ui --backend-store-uri {uri}", flush=True)
    shown = {**flat(base), "trials": options.trials, "objective": sweep.objective,
             **{f"space.{k}": str(v) for k, v in space.items()}}  # fmt: skip
    target = open_sweep(
        uri, name, sweep.digest, artifacts=output / "mlartifacts", params=shown, tags={"diffex.version": __version__}
    )
    result = run_sweep(sweep, output=output.absolute(), store=store.absolute(), trials=options.trials, target=target,
                       say=lambda line: print(line, flush=True))  # fmt: skip
    for reason in result.failed:
        print(f"a trial failed: {reason}", file=sys.stderr)
    if not any(r["status"] == "finished" for r in result.rows):
        raise UserError("no trial finished; the reasons stand above")
    conclude(title, base, space, output, result, target, uri)
    return 1 if result.failed else 0


def _plan_sweep(sweep: Any, trials: int) -> int:
    from diffex.pipeline import stage_digests

    print(describe(sweep.base), end="")
    print(f"# sweep {sweep.name} {sweep.digest}: {trials} trials, objectives {', '.join(sweep.metrics)}")
    for setting, choice in sweep.space.items():
        print(f"#   {setting:<30} {choice}")
    shared = {stage_digests(e, "warmup")["warmup"] for e in sweep.shared()}
    print(f"# {len(shared)} warm-up(s) are trained once and shared; every distinct autoencoder.lambda1 adds one branch")
    return 0


def conclude(
    title: str, base: Experiment, space: Mapping[str, Any], output: Path, result: Any, target: Any, uri: str
) -> None:
    """Table on the terminal, scoreboard.parquet, figures, report.html; the same as artifacts of the parent run."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from diffex import figures, tracking
    from diffex.measures import OBJECTIVES, over_seeds, pareto_front
    from diffex.report import save_figure, write_report

    pq.write_table(pa.Table.from_pylist(result.rows), output / "scoreboard.parquet")
    rows = [r for r in result.rows if r["status"] == "finished"]
    best = max(rows, key=lambda r: r["score"])
    front = pareto_front(rows, OBJECTIVES)
    seeds = [{**group, **_retrained(output, group["trials"])} for group in over_seeds(rows, list(space))]
    if seeds:
        pq.write_table(pa.Table.from_pylist(seeds), output / "seeds.parquet")
    stages = json.loads((output / "trials" / best["trial"] / "stages.json").read_text(encoding="utf-8"))
    facts = {s: json.loads((Path(p) / "entry.json").read_text(encoding="utf-8"))["facts"] for s, p in stages.items()}
    pictures = {}
    if len(rows) > 1:
        pictures["Each point is a trial; up and to the right is better."] = save_figure(
            figures.pareto(rows, front), output / "figures" / "pareto.png"
        )
        pictures["What each setting does."] = save_figure(
            figures.settings_effect(rows, list(space), OBJECTIVES),
            output / "figures" / "settings.png",
        )
    curves: dict[str, dict[str, Any]] = {}
    for r in rows:
        places = json.loads((output / "trials" / r["trial"] / "stages.json").read_text(encoding="utf-8"))
        for stage in ("classifier", "autoencoder", "directions"):
            file = Path(places[stage]) / "history.json"
            if file.is_file():
                curves.setdefault(stage, {})[r["trial"]] = json.loads(file.read_text(encoding="utf-8"))
    pictures["Training curves."] = save_figure(figures.curves(curves), output / "figures" / "curves.png")
    is_script = sys.argv[0].endswith(".py")
    words = ["python", *sys.argv] if is_script else [Path(sys.argv[0]).name, *sys.argv[1:]]
    report = write_report(
        output / "report.html", title=title, experiment=base, rows=rows, settings=list(space), trials=output / "trials",
        best=best["trial"], top=facts["scoreboard"]["top"], figures_of_all=pictures, command=shlex.join(words),
        facts={**facts["data"], "source": base.data.path or "the simulated assay"}, seeds=seeds,
    )  # fmt: skip
    if target is not None:
        summary = {f"best.{name}": best[name] for name in ("score", *OBJECTIVES)}
        summary |= {"trials.finished": len(rows), "seconds": result.seconds}
        if len(seeds) == 1:
            summary |= {f"seeds.{name}": value for name, value in seeds[0].items() if name != "seeds"}
        tables = [p for p in (output / "scoreboard.parquet", output / "seeds.parquet") if p.is_file()]
        files = [*tables, report, *sorted((output / "figures").glob("*.png"))]
        tracking.close_sweep(
            target, metrics=summary, folder=output, files=files, status="FAILED" if result.failed else "FINISHED"
        )
    print_table(rows, list(space), front)
    print(f"\nreport: {report}    MLflow: mlflow ui --backend-store-uri {uri}")


def _retrained(output: Path, trials: Sequence[str]) -> dict[str, float]:
    """Do whole trainings from other seeds find the same directions?  Matched by the mean change maps of their edits."""
    import pyarrow.parquet as pq

    from diffex.ranking import arrays
    from diffex.stability import agreement

    maps = []
    for trial in trials:
        places = json.loads((output / "trials" / trial / "stages.json").read_text(encoding="utf-8"))
        effects = Path(places["effects"])
        source, target = json.loads((effects / "entry.json").read_text(encoding="utf-8"))["facts"]["pairs"][0]
        change = arrays(pq.read_table(effects / "effects.parquet"), "learned", source, target).change
        maps.append(change[:, :, 0].mean(axis=0))
    found = agreement(maps)
    name = "stability.retrained"
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


MEASURES = {
    "score": "score", "flip_rate": "flips", "disentanglement": "disentangled", "ssim": "SSIM", "agreement": "agreement",
    "gate.swapped": "swapped", "gate.random": "random", "null.flip_rate": "null", "class_mean.flip_rate": "class mean",
    "recovery.moved": "factors found",
}  # fmt: skip
"""Columns of the terminal's table: name in the row -> heading."""


def print_table(rows: Sequence[Mapping[str, Any]], settings: Sequence[str], front: Sequence[bool]) -> None:
    """The trials, best first by score, a star for the Pareto front."""
    measures = [name for name in MEASURES if rows and name in rows[0]]
    short = [*(name.split(".")[-1] for name in settings), *(MEASURES[name] for name in measures)]
    table = [["", "trial", *short]]
    for r, chosen in sorted(zip(rows, front, strict=True), key=lambda item: -item[0]["score"]):
        cells = [f"{r[n]:.3g}" if isinstance(r[n], int | float) else str(r[n]) for n in (*settings, *measures)]
        table.append(["*" if chosen else "", r["trial"], *cells])
    widths = [max(len(row[c]) for row in table) for c in range(len(table[0]))]
    print()
    for row in table:
        print(
            "  ".join(
                cell.rjust(width) if c > 1 else cell.ljust(width)
                for c, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )
    print("* on the Pareto front of flip_rate, disentanglement and ssim")


if __name__ == "__main__":
    sys.exit(main())
