"""How a sweep runs on a cluster, simulated (``scheduler.py``) from the cost model and measured seconds.

    python benchmarks/campaign.py --units benchmarks/results/NAME.json --recipe bbbc021 --gpus 64 --losses 0.1
    python benchmarks/campaign.py --replay OUTPUT STORE --workers 2        a real sweep, by its own seconds

Stage seconds are the cost model's counts (diffex/costs.py) times the seconds that an operation takes, as stage_costs.py
has measured them.  Needs simpy (pip install 'diffex[test]').
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from scheduler import HOUR, Fleet, Simulation, Task, summary

from diffex.config import Experiment, load
from diffex.costs import Case, Images
from diffex.plan import Budget, budget
from diffex.store import RECORD

PREPARED = ("warmup", "robust", "real_cells", "ruler")
"""Stages that a sweep computes, with all they rest on, before its trials start."""
SHARDS = {"codes": 16, "references": 16, "effects": 16, "latents": 8192}
"""Images of a shard, after which such a stage is saved."""
TRAINED = ("classifier", "ruler", "witness", "robust", "warmup", "autoencoder", "directions", "replicas")
STRETCHES = 100  # checkpoints of a training lie between stretches of its curve

# ----------------------------------------------------------------------------------------------------------------------
# From the cost model and measured units


def units(measured: Mapping[str, Any], recipe: str, *, rank: int = 64) -> dict[str, float]:
    """Seconds of each operation of the cost model, from the rows of stage_costs.py.

    Args:
        measured: its JSON.
        recipe: whose networks; NAME@SIZE at another size than its own.
        rank: of the subspace; the nearest that was measured is taken.

    At the batch sizes that the platform uses, in the precision that it chooses on that device.  A step of stage 1 is
    divided between U-Net and encoder: the encoder's share of a training pass is taken for three forward passes.
    """
    rows = [row for row in measured["rows"] if "seconds" in row]
    mine = [row for row in rows if row.get("recipe") == recipe]
    if not mine:
        raise SystemExit(f"no figures of recipe {recipe!r} in these measurements")
    name, _, size_of = recipe.partition("@")  # bbbc021@64: at another size
    size = int(size_of or load(name).data.size)
    precision = mine[0]["precision"]
    found: dict[str, float] = {}
    for row in mine:  # the first row of an operation is the platform's own batch size
        if row["precision"] == precision and "rank" not in row:
            found.setdefault(row["operation"], row["seconds"])
    ranked = [row for row in mine if row["operation"] == "directions.training"]
    if ranked:
        found["directions.training"] = min(ranked, key=lambda row: abs(row["rank"] - rank))["seconds"]
    sized = [row for row in rows if "size" in row]
    for name in ("image.read", "image.draw", "cell.measure", "cell.mask"):
        fitting = [row for row in sized if row["operation"] == name]
        if fitting:
            found[name] = min(fitting, key=lambda row: abs(row["size"] - size))["seconds"]
    encoder = found.get("encoder.forward", 0.0)
    if "autoencoder.step" in found:
        found["encoder.training"] = 3 * encoder
        found["unet.training"] = max(found.pop("autoencoder.step") - 3 * encoder, 0.0)
    for name in ("forward", "gradient", "training"):
        for network, like in (("robust", "classifier"), ("ruler", "witness")):
            if f"{like}.{name}" in found:
                found.setdefault(f"{network}.{name}", found[f"{like}.{name}"])
    return found


def tasks_of(
    plan: Budget, e: Experiment, images: Images, seconds_of: Mapping[str, float], *, rate: float, speed: float = 1.0
) -> dict[str, Task]:
    """The plan's stages as tasks.

    Args:
        plan: the budget of a sweep.
        e: one of its experiments, for what does not vary.
        images: its images.
        seconds_of: operation -> seconds.
        rate: bytes a second at which checkpoints are written.
        speed: how much faster a slot is than what was measured: several GPUs, or a part of one.
    """
    found = {}
    for digest, i in plan.instances.items():
        seconds, every = i.cost.seconds(seconds_of) / speed, math.inf
        if i.stage in TRAINED:
            every = max(e.run.checkpoint_seconds, seconds / STRETCHES)
        elif i.stage in SHARDS:
            number = images.number() if i.stage == "latents" else Case(e, images).edited
            every = seconds / max(1, math.ceil(number / SHARDS[i.stage]))
        write = i.cost.scratch / rate if i.stage in TRAINED else 0.0
        found[digest] = Task(digest, seconds, every or math.inf, write, i.cost.bytes, i.stage)
    return found


def ordered(trials: list[list[str]], order: str) -> list[list[str]]:
    """Trials in the order of a 'grid', as it is listed; 'together', those that share most beside each other; or in a
    'random' order, as a sampler's."""
    if order == "grid":
        return trials
    if order == "together":
        first: dict[str, int] = {}
        for digest in (d for trial in trials for d in trial):
            first.setdefault(digest, len(first))
        return sorted(trials, key=lambda trial: [first[d] for d in trial])
    return [trials[int(i)] for i in np.random.default_rng(0).permutation(len(trials))]


def prepared_of(plan: Budget, stages: Iterable[str] = PREPARED) -> list[list[str]]:
    """What is computed ahead: each distinct shared stage after all that it needs."""
    found = []
    for digest, i in plan.instances.items():
        if i.stage in stages:
            order: list[str] = []

            def visit(d: str, order: list[str] = order) -> None:
                if d not in order:
                    for need in plan.instances[d].needs:
                        visit(need)
                    order.append(d)

            visit(digest)
            found.append(order)
    return found


def grid(base: Experiment, weights: int = 4, settings: int = 6) -> list[Experiment]:
    """Trials of a sweep with a shared prefix: so many lambda_1, each with so many settings of the directions.

    In ``Sweep.grid``'s order: lambda_1, which decides the earlier stage, varies fastest.
    """
    return [
        base.with_settings({"autoencoder.lambda1": float(a), "directions.lambda2": float(b)})
        for b in np.geomspace(0.1, 10.0, settings).round(6) for a in np.geomspace(0.03, 3.0, weights).round(6)
    ]  # fmt: skip


def plan_of(
    recipe: str, number: int, channels: int, *, weights: int = 4, settings: int = 6, rank: int | None = None
) -> tuple[Experiment, Images, Budget]:
    """A sweep of a recipe on so many ingested images of two classes, which need not be there."""
    with tempfile.TemporaryDirectory() as folder:  # its fingerprint is part of the digests
        e = load(recipe, {"data.path": folder})
        images = replace(Images.even(e, number, channels, ("control", "treated")), copied=False)
        return e, images, budget(grid(e, weights, settings), images=images, rank=rank)


# ----------------------------------------------------------------------------------------------------------------------
# A real sweep again


@dataclass(frozen=True)
class Replay:
    """What a real sweep did: its stages with the seconds they took, and its trials in the order of their starts."""

    tasks: dict[str, Task]
    trials: list[list[str]]
    prepared: list[list[str]]
    seconds: float


def read_replay(output: Path, store: Path, stages: Iterable[str] = PREPARED) -> Replay:
    """Read a sweep's trials and its entries in the store.

    Args:
        output: the sweep's folder.
        store: root of the store that it filled; of entries made earlier the real time knows nothing.
        stages: what was computed before the trials.
    """
    records: dict[str, dict[str, Any]] = {}
    trials: list[tuple[float, list[str]]] = []
    last = 0.0
    for row in sorted(output.glob("trials/*/row.json")):
        places = json.loads(row.with_name("stages.json").read_text(encoding="utf-8"))
        digests = []
        for stage, place in places.items():
            digest = Path(place).name
            if digest not in records:
                records[digest] = json.loads((store / stage / digest / RECORD).read_text(encoding="utf-8"))
            digests.append(digest)
        paid = json.loads(row.read_text(encoding="utf-8")).get("paid", "")
        began = [_began(records[d]) for d in digests if records[d]["stage"] in paid.split(", ")]
        trials.append((min(began, default=row.stat().st_mtime), digests))
        last = max(last, row.stat().st_mtime)
    if not trials:
        raise SystemExit(f"{str(output)!r} holds no finished trial")
    tasks = {d: Task(d, float(r["seconds"]), stage=r["stage"]) for d, r in records.items()}
    order = [digests for _, digests in sorted(trials)]
    prepared: list[list[str]] = []
    for d, r in records.items():
        if r["stage"] in stages:
            needs, wanted = [], [d]
            while wanted:
                needs.append(one := wanted.pop())
                wanted += records[one]["about"].get("needs", {}).values()
            prepared.append(list(dict.fromkeys(reversed(needs))))
    return Replay(tasks, order, prepared, last - min(map(_began, records.values())))


def _began(record: Mapping[str, Any]) -> float:
    made = datetime.strptime(record["made"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
    return made - float(record["seconds"])


def show_replay(options: argparse.Namespace) -> None:
    r = read_replay(*map(Path, options.replay), options.prepared.split(","))
    print(f"{len(r.trials)} trials, {len(r.tasks)} stages, {sum(t.seconds for t in r.tasks.values()):.0f} s of work")
    print(f"real sweep, from its first stage to its last row: {r.seconds:.0f} s")
    for overhead in sorted({0.0, options.trial}):
        fleet = Fleet(nodes=options.workers or 2, trial=overhead)
        got = Simulation(r.tasks, r.trials, fleet, r.prepared).run()
        print(f"simulated on {fleet.nodes} workers, {overhead:g} s a trial for Ray: {got.makespan:.0f} s "
              f"({got.makespan / r.seconds:.2f} of the real one); slots waited {got.waited:.0f} s")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------


def simulate(options: argparse.Namespace) -> dict[str, Any]:
    """The sweep that the options describe."""
    measured = json.loads(Path(options.units).read_text(encoding="utf-8"))
    weights, settings = map(int, options.grid.split("x"))
    e, images, plan = plan_of(options.recipe, int(options.images), options.channels, weights=weights,
                              settings=settings, rank=options.rank)  # fmt: skip
    seconds_of = units(measured, options.recipe, rank=options.rank)
    missing = sorted({o for o, n in plan.cost.work.items() if n and o not in seconds_of})
    tasks = tasks_of(plan, e, images, seconds_of, rate=options.rate, speed=options.workers * options.ddp)
    fleet = Fleet(
        nodes=max(1, options.gpus // options.workers), loss=options.losses * options.workers, delay=options.delay,
        trial=options.trial, entry=options.entry, rate=options.rate,
    )  # fmt: skip
    got = summary(
        tasks,
        ordered(plan.trials, options.order),
        fleet,
        prepared_of(plan),
        runs=options.runs,
        gpus_per_node=options.workers,
    )
    alone = sum(tasks[d].seconds for trial in plan.trials for d in trial) * options.workers / HOUR
    shared = sum(t.seconds for t in tasks.values()) * options.workers / HOUR
    return {
        "device": measured["machine"]["name"], "recipe": options.recipe, "trials": len(plan.trials),
        "gpus": fleet.nodes * options.workers, "workers": options.workers, "losses": options.losses,
        **{name: round(value, 4) for name, value in vars(got).items()},
        "gpu_hours_of_work": round(shared, 3), "gpu_hours_without_sharing": round(alone, 3),
        "bytes": plan.cost.bytes, "unmeasured": missing,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--units", help="JSON that stage_costs.py wrote")
    add("--recipe", default="bbbc021")
    add("--images", type=float, default=1e5, help="cells in the screen")
    add("--channels", type=int, default=3)
    add("--grid", default="4x6", help="values of lambda1 x settings of the directions")
    add("--order", default="random", choices=("random", "grid", "together"), help="of the trials")
    add("--rank", type=int, default=64, help="dimensions of the code's subspace")
    add("--gpus", type=int, default=8)
    add("--workers", type=int, default=1, help="GPUs that train one model together (replay: trials at a time)")
    add("--ddp", type=float, default=1.0, help="efficiency of training on several GPUs")
    add("--losses", type=float, default=0.0, help="losses an hour of each GPU")
    add("--delay", type=float, default=300.0, help="seconds until a lost one is replaced")
    add("--trial", type=float, default=2.0, help="Ray's own seconds a trial")
    add("--entry", type=float, default=0.1, help="seconds to begin and end an entry of the store")
    add("--rate", type=float, default=2e8, help="bytes a second to and from the store")
    add("--runs", type=int, default=20)
    add("--out", type=Path)
    add("--replay", nargs=2, metavar=("OUTPUT", "STORE"))
    add("--prepared", default=",".join(PREPARED), help="stages computed before the trials (replay)")
    options = parser.parse_args()
    if options.replay:
        show_replay(options)
        return
    if not options.units:
        parser.error("--units or --replay is needed")
    result = simulate(options)
    for name, value in result.items():
        print(f"{name:<28}{value}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
