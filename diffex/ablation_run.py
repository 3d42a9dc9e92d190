"""Running an ablation, and the command line that ablation scripts share.

An ablation is a sweep of given points: its trials, their stages and their MLflow runs are those of any sweep.  A second
run of the same command tries what has no row yet, failed trials among it, and writes the result afresh.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffex.ablation import Ablation, explained, findings, rule, verdict
from diffex.config import Experiment
from diffex.errors import UserError
from diffex.options import (
    add_experiment_options,
    add_place_options,
    claim_output,
    command_line,
    experiment_of,
    guarded,
    places,
)
from diffex.pipeline import absent, stage_digests
from diffex.search import SHARED, Sweep, run_sweep
from diffex.settings import flat
from diffex.space import Levels
from diffex.sweep_cli import add_search_options
from diffex.tracking import Target, close_sweep, how_to_look, open_sweep
from diffex.trials import load_rows
from diffex.version import __version__


@dataclass(frozen=True, kw_only=True)
class GivenPoints(Sweep):
    """A sweep whose trials are its ``first`` points and no others."""

    def shared(self, trials: int) -> list[tuple[Experiment, str]]:
        """Of points, not of all combinations of levels; only what several of them share."""
        experiments = [self.base.with_settings(point) for point in self.first]
        wanted = [(e, s, stage_digests(e, s)[s]) for e in experiments for s in SHARED if s not in absent(e)]
        count = Counter(address for _, _, address in wanted)
        return list({address: (e, s) for e, s, address in wanted if count[address] > 1}.values())


def sweep_of(ablation: Ablation, points: Sequence[Mapping[str, Any]], name: str) -> Sweep:
    """The sweep that tries these points, in their order, once each."""
    space = {s: Levels(tuple(dict.fromkeys(p[s] for p in points))) for s in ablation.settings}
    return GivenPoints(name=name, base=ablation.base, space=space, first=[dict(p) for p in points])


def run_ablation(
    ablation: Ablation, count: int, *, output: Path, store: str | Path, target: Target | None,
    say: Callable[[str], None] = print, at_a_time: int | None = None, study: str | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:  # fmt: skip
    """Run, or go on with, an ablation until every cell has ended from every seed.

    Args:
        ablation: what is asked.
        count: number of seeds.
        output: its folder.
        store: the stage store, visible to every node: a folder, or a URI.
        target: MLflow run to log under, or None.
        say: prints a line for people.
        at_a_time: trials at a time (default: as many as the cluster has room for now).
        study: Optuna storage (default: SQLite in ``output``).

    Returns:
        The ablation's table, and why trials failed.
    """
    points = ablation.points(count)
    done = {(r["cell"], r["seed"]) for r in ablation.table(load_rows(output), count)}
    missing = [point for key, point in points.items() if key not in done]
    if done:
        say(f"{len(done)} of {len(points)} trials were finished before; {len(missing)} to go")
    failed: list[str] = []
    if missing:
        # A study of this session's own: the last session's would count its failed trials as tried, and sample others.
        sweep = sweep_of(ablation, missing, f"{ablation.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        failed = run_sweep(
            sweep, output=output, store=store, trials=len(missing), target=target, say=say, at_a_time=at_a_time,
            study=study,
        ).failed  # fmt: skip
    return ablation.table(load_rows(output), count), failed


def ablation_main(
    name: str, build: Callable[[Experiment], Ablation], *, doc: str | None, seeds: int = 3,
    argv: Sequence[str] | None = None,
) -> int:  # fmt: skip
    """Command line of an ablation script; returns the exit status: 0, 1 if a trial failed, 2 for a user's mistake.

    Args:
        name: of the ablation.
        build: makes it of the experiment that the options describe.
        doc: the script's docstring, for --help.
        seeds: default number of seeds.
        argv: words of the command line; default: the process's.
    """
    parser = argparse.ArgumentParser(
        prog=f"python ablations/{name}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_experiment_options(parser)
    parser.add_argument(
        "--seeds", type=int, default=seeds, metavar="N",
        help=f"run every cell from N seeds; raise it later to go on (default: {seeds}; 1 gives no verdict)",
    )  # fmt: skip
    add_search_options(parser)
    add_place_options(parser, name)
    options = parser.parse_args(argv)
    return guarded(lambda: _main(build, options))


def _main(build: Callable[[Experiment], Ablation], options: argparse.Namespace) -> int:
    ablation = build(experiment_of(options))
    points = ablation.points(options.seeds)
    sweep_of(ablation, list(points.values()), ablation.name)  # complains of an impossible value before anything starts
    if options.dry_run:
        print(plan_of(ablation, options.seeds))
        return 0
    from diffex.ablation_report import parent_metrics, print_ablation, write_ablation

    output, store, uri = places(options, f"{ablation.name}-{ablation.digest[:8]}")
    claim_output(output, {"digest": ablation.digest, "settings": flat(ablation.base), "kind": "ablation"})
    print(f"results: {output}    MLflow: {how_to_look(uri)}", flush=True)
    cells = {f"cell.{k}": " ".join(f"{s}={v}" for s, v in c.settings.items()) for k, c in ablation.cells.items()}
    about = {"question": ablation.question, "hypothesis": ablation.hypothesis, "primary": ablation.primary}
    target = open_sweep(
        uri, ablation.name, ablation.digest, artifacts=output / "mlartifacts", kind="ablation",
        params={**flat(ablation.base), **about, **cells}, tags={"diffex.version": __version__},
    )  # fmt: skip
    table, failed = run_ablation(
        ablation, options.seeds, output=output.absolute(), store=store, target=target, at_a_time=options.concurrent,
        study=options.study, say=lambda line: print(line, flush=True),
    )  # fmt: skip
    for reason in failed:
        print(f"a trial failed: {reason}", file=sys.stderr)
    if not table:
        close_sweep(target, metrics={}, folder=output, files=[], status="FAILED")
        raise UserError("no trial finished; the reasons stand above")
    files = write_ablation(ablation, table, output, command=command_line(), failed=failed)
    found = findings(ablation, table)
    said = "\n".join(f"- {line}" for line in explained(found))
    target.client.set_tag(target.parent, "diffex.verdict", verdict(found))
    note = f"{ablation.question}\n\n{ablation.hypothesis}\n\n**{verdict(found).capitalize()}**\n{said}"
    target.client.set_tag(target.parent, "mlflow.note.content", note)
    metrics = {**parent_metrics(ablation, table), "seeds": float(options.seeds)}
    close_sweep(target, metrics=metrics, folder=output, files=files, status="FAILED" if failed else "FINISHED")
    print_ablation(ablation, table)
    print(f"\nreport: {files[-1]}    MLflow: {how_to_look(uri)}")
    return 1 if failed else 0


def plan_of(ablation: Ablation, count: int) -> str:
    """What would be done: question, decision rule, cells, seeds, and what trials share."""
    points = ablation.points(count)
    lines = [f"# ablation {ablation.name} {ablation.digest}", f"question:   {ablation.question}",
             f"hypothesis: {ablation.hypothesis}", f"decision:   {rule(ablation)}",
             f"primary:    {ablation.primary} ({ablation.measures[ablation.primary]})", ""]  # fmt: skip
    width = max(len(name) for name in ablation.cells)
    for name, cell in ablation.cells.items():
        x = ", ".join(f"{k} {v:g}" for k, v in cell.x.items())
        settings = " ".join(f"{s}={v}" for s, v in cell.settings.items())
        lines.append(f"  {name:<{width}}  {settings:<44} {x}{'; ' if x and cell.why else ''}{cell.why}")
    lines += ["", *ablation.notes]
    moved = ", ".join(f"{s} {points[next(iter(ablation.cells)), ablation.base.run.seed][s]}" for s in ablation.varied)
    lines.append(f"{len(ablation.cells)} cells x {count} seeds (from {moved}) = {len(points)} trials")
    addresses = [stage_digests(ablation.base.with_settings(point)) for point in points.values()]
    stages = list(dict.fromkeys(stage for a in addresses for stage in a))
    computed = {s: len({a[s] for a in addresses if s in a}) for s in stages}
    trainings = [s for s in ("classifier", "autoencoder", "directions") if s in computed]
    lines.append("trainings:  " + ", ".join(f"{computed[s]} x {s}" for s in trainings))
    shared = [f"{s} ({computed[s]})" for s in stages if computed[s] < sum(s in a for a in addresses)]
    lines.append(f"shared:     {', '.join(shared) if shared else 'nothing: no two trials see the same images'}")
    return "\n".join(lines)
