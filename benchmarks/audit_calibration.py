"""How often does the audit support what is not there, and how often what is?

Null runs: cells of a screen whose treatment does nothing; whole wells get their class by chance, a classifier and a
witness learn it, directions are trained, rendered, ranked and audited.  Planted runs: the same on screens whose
treatment moves four factors, at full and at half dose, with classifier, witness and directions from other seeds each
time.  All runs on one screen share its autoencoder and latents, which is what makes them cheap.

    python benchmarks/audit_calibration.py [--null 24] [--planted 8] [--store FOLDER]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from diffex import assay, baselines, train
from diffex.audit import Evidence, Finding, audit, logit_change
from diffex.classifier import FrozenClassifier
from diffex.compute import Compute
from diffex.config import Experiment, load
from diffex.data import ImageStore
from diffex.directions import DirectionSet, Subspace, measure_responses
from diffex.evidence import Follower
from diffex.explain import choose_rows, effects_table, evenly, plan_edits
from diffex.instruments import feature_table, measured
from diffex.networks import ResidualClassifier
from diffex.perceptual import critic_distance
from diffex.pipeline import ensure
from diffex.ranking import arrays, rank
from diffex.stages import load_measure
from diffex.statistics import best_of_sphere_p_value, wilson_interval
from diffex.store import Store
from diffex.work import Work, balanced

IMAGES, FOLLOWED, TOP, RANDOM = 24, 16, 3, 24
SETTINGS = {
    "assay.num_images": 8192, "classifier.images": 10_000, "autoencoder.images": 16_000, "directions.num_directions": 6,
    "directions.response_images": 96, "directions.images": 8_000, "evaluation.real_images": 160,
}  # fmt: skip


@dataclass
class Screen:
    """One screen with its autoencoder: what all runs on it share."""

    work: Work
    store: ImageStore
    real: pa.Table

    @classmethod
    def of(cls, root: Path, settings: dict[str, object]) -> Screen:
        e = load("assay", {**SETTINGS, **settings})
        outcome = ensure(Store(root), e, "latents")
        ruler = ensure(Store(root), e, "ruler")
        inputs = {name: entry.path for name, entry in {**outcome.entries, **ruler.entries}.items()}
        work = Work(experiment=e, inputs=inputs, out=root, compute=Compute.resolve(e.run))
        store = work.images()
        held_out = np.concatenate([store.rows("valid"), store.rows("test")])
        rows = np.sort(evenly(held_out, store.groups(), 2 * e.evaluation.real_images, 3))
        parts = [measured(work, store, store.batch(part).x) for part in np.array_split(rows, 8)]
        features = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        return cls(work, store, feature_table(store, rows, features))


def chance_labels(store: ImageStore, seed: int) -> NDArray[np.int64]:
    """Each well's class drawn by chance, in equal shares within every plate and part; (N,)."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(len(store), np.int64)
    plates, groups = store.metadata()["Metadata_Plate"], store.groups()
    for plate in np.unique(plates):
        for part in np.unique(store.part_numbers):
            wells = rng.permutation(np.unique(groups[(plates == plate) & (store.part_numbers == part)]))
            labels[np.isin(groups, wells[: len(wells) // 2 + int(rng.integers(2)) * (len(wells) % 2)])] = 1
    return labels


def run(screen: Screen, labels: NDArray[np.int64], seed: int) -> tuple[list[Finding], pa.Table, int]:
    """Classifier, witness, directions, effects, evidence and audit for one assignment of classes to cells."""
    w, store = screen.work, screen.store
    e: Experiment = w.experiment
    names, device = store.info.class_names, w.compute.device

    def trained(width: int, number: int, images: int) -> FrozenClassifier:
        torch.manual_seed(train.hash_seed(seed, number))
        network = ResidualClassifier(len(store.info.channels), len(names), width=width)
        loss = train.classification_loss(torch.from_numpy(labels))
        task = train.SupervisedTask(
            "classifier", network, store, loss, e.classifier, images=images, compute=w.compute, seed=seed * 10 + number
        )
        for seen in range(0, images - images % task.batch_size, task.batch_size):
            torch.manual_seed(train.hash_seed(seed, number, seen))
            task.step(seen)
        return FrozenClassifier(network, names)

    classifier, witness = trained(24, 1, 6_000), trained(16, 2, 6_000)
    model, conditioned_on, z = w.autoencoder(), w.classifier(store), w.codes()
    subspace = Subspace.of(z[store.rows("train")], "whitened", e.directions.explained_variance)
    rows = balanced(store, store.rows("train"), e.directions.response_images, seed)
    responses = measure_responses(z[rows], subspace, model.expected_image, classifier, step=e.directions.alpha)
    task = train.DirectionsTask(e.directions, subspace.coordinates(z[rows]), responses, seed=seed)
    for seen in range(0, task.images, task.batch_size):
        torch.manual_seed(train.hash_seed(seed, 3, seen))
        task.step(seen)
    learned = DirectionSet(task.models, subspace)
    sets = {"learned": learned, "random": baselines.random(subspace, RANDOM, seed)}

    x_test = store.rows("test")
    predicted = np.zeros(len(store), np.int64)
    predicted[x_test] = torch.cat([classifier(store.batch(p).x).argmax(1) for p in np.array_split(x_test, 8)]).numpy()
    groups = store.groups()
    chosen = choose_rows(labels, predicted, groups, x_test, 0, IMAGES, seed)
    v = subspace.coordinates(z[store.rows("train")])
    means = baselines.class_means(v, torch.from_numpy(labels[store.rows("train")]), len(names))
    length = max(float((means[1] - means[0]).norm()), 1.5)  # chance classes hardly differ: ask for a visible shift
    batch = store.batch(chosen, device)
    measure = load_measure(w.inputs["ruler"], len(store.info.channels), device)
    table = effects_table(
        model, classifier, sets, plan_edits(len(learned), (), RANDOM, {}), batch.x, batch.rows, reference=length,
        judges={"witness": witness, "robust": witness}, conditioned_on=conditioned_on, measure=measure,
    )  # fmt: skip
    table = table.append_column("class_name", pa.array([names[0]] * len(table)))
    table = table.append_column("group", pa.array(groups[table["row"].to_numpy()]))
    top = rank(table, names[0], names[1], order="effect", draws=50).slice(0, TOP).to_pylist()

    follower = Follower(
        model=model, directions=learned, judges={"p": classifier, "witness": witness}, steps=2,
        perceptual=lambda a, b: critic_distance(witness.network, a, b),  # type: ignore[arg-type]
    )  # fmt: skip
    own = chosen[:FOLLOWED]
    x = store.batch(own, device).x
    start = follower.start(own, x, conditioned_on.probabilities(x))
    about = {"class_name": names[0], "source": names[0], "target": names[1]}
    cells, cycles = [_cells(w, store, own, start.image, about, "reconstruction", -1)], []
    for r in top:
        edit, _, cycle = follower.follow(start, r["direction"], r["sign"] * length)
        cells.append(_cells(w, store, own, edit, about, "edit", r["direction"]))
        for name, value in {"source": names[0], "target": names[1], "direction": r["direction"]}.items():
            cycle = cycle.append_column(name, pa.array([value] * len(cycle)))
        cycles.append(cycle)
    real = screen.real
    of_row = [names[k] for k in labels[real["row"].to_numpy()]]
    real = real.set_column(real.column_names.index("class_name"), "class_name", pa.array(of_row))
    evidence = Evidence(
        effects=table,
        real=real,
        cells=pa.concat_tables(cells),
        cycle=pa.concat_tables(cycles),
        dimensions=subspace.rank,
    )
    return audit(evidence, top), table, subspace.rank


def _cells(
    w: Work,
    store: ImageStore,
    rows: NDArray[np.int64],
    x: torch.Tensor,
    about: dict[str, str],
    kind: str,
    direction: int,
) -> pa.Table:
    table = feature_table(store, rows, measured(w, store, x))
    table = table.set_column(
        table.column_names.index("class_name"), "class_name", pa.array([about["class_name"]] * len(rows))
    )
    extra = {"kind": kind, "target": about["target"], "direction": direction}
    for name, value in extra.items():
        table = table.append_column(name, pa.array([value] * len(rows)))
    return table


def ranking_of_random(table: pa.Table, names: tuple[str, ...], rank_: int, num: int) -> bool:
    """Is the best of ``num`` random directions, ranked as if it were learned, called significant?"""
    pull = logit_change(arrays(table, "random", names[0], names[1]))[:, 0]
    return bool(best_of_sphere_p_value(np.abs(pull[:num]), pull[num:], rank_).min() <= 0.05)


def truth_of(table: pa.Table, f: Finding, planted: tuple[str, ...]) -> str:
    """'planted', 'decoy' or 'nothing': the largest change of a direction, measured by the ruler."""
    a = arrays(table, "learned", f.source, f.target)
    shift = np.abs(a.shifts[:, f.direction, 0 if f.sign > 0 else 1].mean(axis=0))
    if shift.max(initial=0.0) < 0.5:
        return "nothing"
    return "planted" if a.factors[int(shift.argmax())] in planted else "decoy"


def share(found: list[bool]) -> str:
    low, high = wilson_interval(float(np.mean(found)), len(found)) if found else (float("nan"), float("nan"))
    return f"{sum(found)} of {len(found)} = {np.mean(found) if found else float('nan'):.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--null", type=int, default=24, help="null runs")
    parser.add_argument("--planted", type=int, default=8, help="planted runs at each dose")
    parser.add_argument("--store", type=Path, default=Path("diffex-output/store"), help="folder of the stage store")
    options = parser.parse_args()
    screen = Screen.of(options.store, {"assay.design": "null"})
    supported_runs, supported, agreed, significant, of_random = [], [], [], [], []
    for i in range(options.null):
        began = time.monotonic()
        labels = screen.store.labels if i == 0 else chance_labels(screen.store, i)
        findings, table, r = run(screen, labels, i)
        supported_runs.append(any(f.supported for f in findings))
        supported += [f.supported for f in findings]
        agreed += [bool(f["populations"].passed) for f in findings]
        significant.append(any(f["moves"].passed for f in findings))
        names = screen.store.info.class_names
        of_random.append(ranking_of_random(table, names, r, screen.work.experiment.directions.num_directions))
        seconds = round(time.monotonic() - began, 1)
        print(json.dumps({"null": i, "verdicts": [f.verdict for f in findings], "seconds": seconds}), flush=True)
    if options.null:
        print(f"null runs with a supported direction: {share(supported_runs)}; directions: {share(supported)}")
        print(f"  of them directions that real cells are said to differ along: {share(agreed)}")
        print(f"random directions ranked as if learned, the best called significant: {share(of_random)}")
        print(f"learned directions that move the (meaningless) classifier more than random ones: {share(significant)}")
    for dose in (1.0, 0.5):
        if not options.planted:
            break
        screen = Screen.of(options.store, {"assay.doses": [dose]})
        planted = assay.planted_factors(assay.DESIGNS["binary"], screen.store.info.channels)
        by_truth: dict[str, list[bool]] = {"planted": [], "decoy": [], "nothing": []}
        first, moves, of_random = [], [], []
        for i in range(options.planted):
            findings, table, r = run(screen, screen.store.labels, 100 + i)
            for f in findings:
                by_truth[truth_of(table, f, planted)].append(f.supported)
            first.append(next(f for f in findings if f.rank == 1).supported)
            moves.append(bool(next(f for f in findings if f.rank == 1)["moves"].passed))
            names = screen.store.info.class_names
            of_random.append(ranking_of_random(table, names, r, screen.work.experiment.directions.num_directions))
            print(json.dumps({"planted": i, "dose": dose, "verdicts": [f.verdict for f in findings]}), flush=True)
        print(f"dose {dose}: first direction supported: {share(first)}; significantly ranked: {share(moves)}")
        for name, found in by_truth.items():
            print(f"  directions whose largest change is {name}: supported {share(found)}")
        print(f"  random directions ranked as if learned, the best called significant: {share(of_random)}")


if __name__ == "__main__":
    main()
