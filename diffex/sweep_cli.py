"""The command line that sweeps share, and what a sweep leaves: table, figures, report."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffex.config import Experiment
from diffex.errors import UserError
from diffex.options import (
    HOME,
    add_experiment_options,
    add_place_options,
    claim_output,
    command_line,
    experiment_of,
    guarded,
    places,
    store_address,
)
from diffex.remote import is_uri
from diffex.settings import describe, flat, parse_settings
from diffex.version import __version__

if TYPE_CHECKING:
    from diffex.search import Sweep


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
        "--trials", type=int, help=f"trials in all; raise it later to go on (default: {trials}; grid: all combinations)"
    )
    vary = "vary a setting over these values, instead of or besides the script's own; repeatable"
    parser.add_argument("--vary", action="append", default=[], metavar="a.b=[v, w]", help=vary)
    goal = "pareto: flip rate, disentanglement and SSIM; score: their geometric mean, with ASHA"
    parser.add_argument("--objective", choices=("pareto", "score"), default="pareto", help=goal)
    how = "tpe, gp (Gaussian processes), random, or grid: every combination of levels"
    parser.add_argument("--sampler", choices=("tpe", "gp", "random", "grid"), default="tpe", help=how)
    bound = "penalise trials beyond a bound of a measure, e.g. 'ssim>=0.6', 'null.flip_rate<=0.1'; repeatable"
    parser.add_argument("--constraint", action="append", default=[], metavar="MEASURE>=N", help=bound)
    add_search_options(parser)
    add_place_options(parser, name)
    options = parser.parse_args(argv)
    return guarded(lambda: _run_sweep(name, space, assay_space or {}, first, trials, options))


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Options that say how trials are run, not which: --concurrent, --study."""
    parser.add_argument(
        "--concurrent",
        type=int,
        metavar="N",
        help="trials at a time (default: as many as there is room for now)",
    )
    parser.add_argument(
        "--study",
        metavar="URL",
        help="Optuna storage: a database's URL or journal:FILE (default: an SQLite file)",
    )


def _varied(pairs: Sequence[str]) -> dict[str, Any]:
    """The choices of --vary."""
    from diffex.space import Levels

    levels = {}
    for name, values in parse_settings(list(pairs)).items():
        if not isinstance(values, list) or not values:
            raise UserError(f"--vary {name} takes a list of values, e.g. --vary '{name}=[1, 2]'")
        levels[name] = Levels(tuple(",".join(map(str, v)) if isinstance(v, list) else v for v in values))
    return levels


def _run_sweep(
    name: str, space: Mapping[str, Any], assay_space: Mapping[str, Any], first: Sequence[Mapping[str, Any]],
    trials: int, options: argparse.Namespace,
) -> int:  # fmt: skip
    from diffex.search import Sweep
    from diffex.space import Constraint, Levels

    if options.trials is not None and options.trials < 1:
        raise UserError(f"--trials must be at least 1, got {options.trials}")
    if options.concurrent is not None and options.concurrent < 1:
        raise UserError(f"--concurrent must be at least 1, got {options.concurrent}")
    base = experiment_of(options)
    of_recipe = {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in flat(base).items()}
    space = {name: c.including(of_recipe[name]) if isinstance(c, Levels) else c for name, c in space.items()}
    space = {**space, **(assay_space if base.data.path is None else {}), **_varied(options.vary)}
    first = [{k: v for k, v in settings.items() if k in space} for settings in first]
    sweep = Sweep(
        name=name, base=base, space=space, first=() if options.sampler == "grid" else first,
        objective=options.objective, sampler=options.sampler,
        constraints=[Constraint.parse(text) for text in options.constraint],
    )  # fmt: skip
    if options.sampler == "grid":
        trials = len(sweep.grid())
        if options.trials is not None:
            trials = min(trials, options.trials)
    elif options.trials is not None:
        trials = options.trials
    return go(sweep, options, trials, name.replace("_", " ").capitalize())


def go(sweep: Sweep, options: argparse.Namespace, trials: int, title: str) -> int:
    """Run a sweep, or show what it would do, and write its report."""
    from diffex.search import run_sweep
    from diffex.tracking import how_to_look, open_sweep

    name, base, space = sweep.name, sweep.base, sweep.space
    folder = f"{name}-{sweep.digest[:8]}"
    if options.dry_run:
        return _plan_sweep(sweep, trials, store_address(options, options.output or HOME))
    output, store, uri = places(options, folder)
    claim_output(output, {"digest": sweep.digest, "settings": flat(base), "kind": "sweep"})
    print(f"results: {output}    MLflow: {how_to_look(uri)}", flush=True)
    shown = {**flat(base), "trials": trials, "objective": sweep.objective,
             **{f"space.{k}": str(v) for k, v in space.items()}}  # fmt: skip
    target = open_sweep(
        uri, name, sweep.digest, artifacts=output / "mlartifacts", params=shown, tags={"diffex.version": __version__}
    )
    for line in budget_lines(sweep, trials, store):
        print(line, flush=True)
    result = run_sweep(
        sweep, output=output.absolute(), store=store, trials=trials, target=target,
        at_a_time=getattr(options, "concurrent", None), study=getattr(options, "study", None),
        say=lambda line: print(line, flush=True),
    )  # fmt: skip
    for reason in result.failed:
        print(f"a trial failed: {reason}", file=sys.stderr)
    if not any(r["status"] == "finished" for r in result.rows):
        raise UserError("no trial finished; the reasons stand above")
    conclude(title, base, space, output, result, target, uri)
    return 1 if result.failed else 0


def _plan_sweep(sweep: Sweep, trials: int, store: str) -> int:
    print(describe(sweep.base), end="")
    print(f"# sweep {sweep.name} {sweep.digest}: {trials} trials, objectives {', '.join(sweep.metrics)}")
    for setting, choice in sweep.space.items():
        print(f"#   {setting:<30} {choice}")
    shared = Counter(stage for _, stage in sweep.shared(trials))
    counted = ", ".join(f"{n} x {stage}" for stage, n in shared.items()) or "nothing"
    print(f"# before the trials, once for all of them: {counted}")
    for line in budget_lines(sweep, trials, store):
        print(f"# {line}")
    return 0


def budget_lines(sweep: Sweep, trials: int, store: str) -> list[str]:
    """What the sweep will cost, in words; complains where the disk is too small."""
    from diffex.plan import budget, check_budget, drawn, say_budget
    from diffex.store import Store

    known = Store.existing(store)
    first = [*sweep.first, *(sweep.grid() if sweep.sampler == "grid" else ())]
    points = drawn(sweep.base, sweep.space, trials, first, seed=sweep.base.run.seed)
    plan = budget(points, has=known.has if known else None)
    if is_uri(store):
        return say_budget(plan)
    folder = Path(store)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    check_budget(plan, free)
    return say_budget(plan, free=free)


def conclude(
    title: str, base: Experiment, space: Mapping[str, Any], output: Path, result: Any, target: Any, uri: str
) -> None:
    """Table on the terminal, scoreboard.parquet, figures, report.html; the same as artifacts of the parent run."""
    import pyarrow.parquet as pq

    from diffex import figures, tracking
    from diffex.measures import OBJECTIVES, over_seeds, pareto_front
    from diffex.pipeline import entry_at
    from diffex.report import save_figure, write_report
    from diffex.tables import from_rows
    from diffex.trials import cost_of_all

    pq.write_table(from_rows(result.rows), output / "scoreboard.parquet")
    rows = [r for r in result.rows if r["status"] == "finished"]
    best = max(rows, key=lambda r: r["score"])
    front = pareto_front(rows, OBJECTIVES)
    seeds = [{**group, **_retrained(output, group["trials"])} for group in over_seeds(rows, list(space))]
    if seeds:
        pq.write_table(from_rows(seeds), output / "seeds.parquet")
    of_best = _kept(output, best["trial"], "stages")
    facts = {stage: entry_at(of_best[stage]).facts for stage in ("data", "scoreboard")}
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
        for stage, history in _kept(output, r["trial"], "curves").items():
            curves.setdefault(stage, {})[r["trial"]] = history
    pictures["Training curves."] = save_figure(figures.curves(curves), output / "figures" / "curves.png")
    report = write_report(
        output / "report.html", title=title, experiment=base, rows=rows, settings=list(space), trials=output / "trials",
        best=best["trial"], top=facts["scoreboard"]["top"], figures_of_all=pictures, command=command_line(),
        facts={**facts["data"], "source": base.data.path or "the simulated assay"}, seeds=seeds,
    )  # fmt: skip
    print_table(rows, list(space), front)
    cost = cost_of_all(output)
    if len(rows) > 1:
        together, alone = cost["seconds.together"], cost["seconds.alone"]
        times = alone / max(together, 1e-9)
        print(f"\n{len(rows)} trials took {together:,.0f} s of computing together; one by one, nothing shared, they "
              f"would have taken {alone:,.0f} s ({times:.1f} times as much)")  # fmt: skip
    print(f"\nreport: {report}    MLflow: {tracking.how_to_look(uri)}", flush=True)
    if target is not None:
        summary = {f"best.{name}": best[name] for name in ("score", *OBJECTIVES)}
        summary |= {"trials.finished": len(rows), "seconds": result.seconds, **cost}
        if len(seeds) == 1:
            summary |= {f"seeds.{name}": value for name, value in seeds[0].items() if name != "seeds"}
        tables = [p for p in (output / "scoreboard.parquet", output / "seeds.parquet") if p.is_file()]
        files = [*tables, report, *sorted((output / "figures").glob("*.png"))]
        compared = tracking.close_sweep(
            target, metrics=summary, folder=output, files=files, status="FAILED" if result.failed else "FINISHED"
        )
        if compared:
            print(f"compare the trials: {compared}")


def _kept(output: Path, trial: str, file: str) -> Any:
    """What a JSON file of a trial's folder holds."""
    return json.loads((output / "trials" / trial / f"{file}.json").read_text(encoding="utf-8"))


def _retrained(output: Path, trials: Sequence[str]) -> dict[str, float]:
    """Do whole trainings from other seeds find the same directions?  Matched by the mean change maps of their edits."""
    import pyarrow.parquet as pq

    from diffex.pipeline import entry_at
    from diffex.ranking import arrays
    from diffex.stability import agreement

    maps = []
    for trial in trials:
        effects = entry_at(_kept(output, trial, "stages")["effects"])
        source, target = effects.facts["pairs"][0]
        change = arrays(pq.read_table(effects.path / "effects.parquet"), "learned", source, target).change
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
