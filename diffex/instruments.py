"""What explanations are judged with, trained or measured once for a set of images and shared by all its trials.

The *ruler* regresses the true factors (simulated assay only); the *witness* is a classifier trained on its own, of
another width and from another seed, that says whether an edit convinces anybody else; the *robust counterpart* is the
explained classifier (or the witness, where that one is given) trained on against attacks; the *real cells* are the
classical features of held-out control and treated cells.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from diffex import assay, train
from diffex.classifier import FrozenClassifier, classification_report, is_given
from diffex.data import ImageStore
from diffex.explain import evenly
from diffex.features import measure_many
from diffex.networks import ResidualClassifier
from diffex.robustness import AdversarialTask, attack_report
from diffex.work import Work, balanced, over_images, write_history

WEIGHTS = "model.safetensors"
ATTACKED = 32  # test images
RULER_WIDTH = 16  # channels of the first level


def run_ruler(w: Work) -> dict[str, Any]:
    """A regressor of the true factors, to measure edits with; its own quality on test cells is part of the result."""
    store, e = w.images(), w.experiment
    visible = assay.visible_factors(store.info.channels)
    values = factor_values(store, visible)
    rows = store.rows("train")
    within = [values[rows][store.labels[rows] == c].var(axis=0) for c in np.unique(store.labels)]
    centre, unit = values[rows].mean(axis=0), np.sqrt(np.mean(within, axis=0)).clip(1e-6)
    targets = torch.from_numpy((values - centre) / unit)
    torch.manual_seed(train.hash_seed(e.run.seed, 3))
    network = ResidualClassifier(len(store.info.channels), len(visible), width=RULER_WIDTH)
    task = train.SupervisedTask(
        "ruler", network, store, train.regression_loss(targets), e.classifier, images=e.evaluation.ruler_images,
        compute=w.compute, seed=e.run.seed + 1,
    )  # fmt: skip
    _fit(w, task)
    network.eval()
    test, valid = store.rows("test"), store.rows("valid")
    found, true = over_images(store, network, w, test).numpy(), targets[test].numpy()
    r2 = 1 - ((found - true) ** 2).mean(axis=0) / true.var(axis=0)
    # Over all classes: edits go from one to the other, and far out a factor may hardly show any more.
    answers = over_images(store, network, w, valid).numpy()
    slopes = calibration(answers, targets[valid].numpy(), np.zeros(len(valid)))
    facts = {"factors": list(visible), "r2": dict(zip(visible, map(float, r2), strict=True)), "n": len(test),
             "slope": slopes.tolist(), "width": RULER_WIDTH}  # fmt: skip
    (w.out / "ruler.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return facts


def calibration(measured: NDArray, true: NDArray, labels: NDArray) -> NDArray[np.float64]:
    """How much a regressor's answer (n, F) changes for each unit of the true factor within classes: (F,), 0.1 or more.

    Regression shrinks towards the mean where a factor is hard to see; shifts are divided by this.
    """
    x, y = np.array(true, float), np.array(measured, float)
    for c in np.unique(labels):
        x[labels == c] -= x[labels == c].mean(axis=0)
        y[labels == c] -= y[labels == c].mean(axis=0)
    return np.maximum((x * y).sum(axis=0) / np.maximum((x * x).sum(axis=0), 1e-9), 0.1)


def factor_values(store: ImageStore, factors: tuple[str, ...]) -> NDArray[np.float32]:
    """True values of the simulated assay's factors, (N, F)."""
    truth = store.metadata("Factor_")
    return np.stack([truth[f"Factor_{name}"] for name in factors], axis=1).astype(np.float32)


def run_witness(w: Work) -> dict[str, Any]:
    """Train the witness on the training images and their labels; it never hears of the explained classifier."""
    store, e = w.images(), w.experiment
    torch.manual_seed(train.hash_seed(e.run.seed, 11))
    network = _witness(store, e.evaluation.witness_width)
    task = train.SupervisedTask(
        "witness", network, store, train.classification_loss(torch.tensor(store.labels)), e.classifier,
        images=e.evaluation.witness_images, compute=w.compute, seed=train.hash_seed(e.run.seed, 12) % 2**31,
    )  # fmt: skip
    _fit(w, task)
    return _judged(w, store, FrozenClassifier(network, store.info.class_names))


def run_robust(w: Work) -> dict[str, Any]:
    """Train a counterpart on attacked images, and attack it and the explained classifier."""
    store, e = w.images(), w.experiment
    names = store.info.class_names
    if is_given(e.classifier):
        network = _witness(store, e.evaluation.witness_width)
        network.load_state_dict(load_file(w.inputs["witness"] / WEIGHTS))
    else:
        network = ResidualClassifier(len(store.info.channels), len(names), width=e.classifier.width)
        network.load_state_dict(load_file(w.inputs["classifier"] / WEIGHTS))
    torch.manual_seed(train.hash_seed(e.run.seed, 13))
    task = AdversarialTask(
        "robust", network, store, train.classification_loss(torch.tensor(store.labels)), e.classifier,
        images=e.evaluation.robust_images, compute=w.compute, seed=train.hash_seed(e.run.seed, 14) % 2**31,
        epsilon=e.evaluation.epsilon,
    )  # fmt: skip
    _fit(w, task)
    counterpart = FrozenClassifier(network, names)
    facts = _judged(w, store, counterpart)
    rows = balanced(store, store.rows("test"), ATTACKED, e.run.seed)
    x, labels = store.batch(rows, w.compute.device).x, torch.from_numpy(store.labels[rows])
    attacked = {
        "classifier": w.classifier(store), "robust": counterpart,
    }  # fmt: skip
    epsilon = e.evaluation.epsilon
    facts["attacks"] = {
        name: attack_report(
            judge, x, labels, store.groups()[rows], epsilons=[epsilon], grid=[epsilon / 2, epsilon, 2 * epsilon],
            steps=5, seed=e.run.seed,
        )
        for name, judge in attacked.items()
    }  # fmt: skip
    return facts


def _witness(store: ImageStore, width: int) -> ResidualClassifier:
    return ResidualClassifier(len(store.info.channels), len(store.info.class_names), width=width)


def _fit(w: Work, task: train.SupervisedTask) -> None:
    write_history(w.out, train.fit(task, w.out, seed=w.experiment.run.seed, progress=w.progress))
    save_file({k: v.contiguous().cpu() for k, v in task.network.state_dict().items()}, w.out / WEIGHTS)
    (w.out / train.CHECKPOINT).unlink()


def _judged(w: Work, store: ImageStore, judge: FrozenClassifier) -> dict[str, Any]:
    test = store.rows("test")
    probs = over_images(store, judge.probabilities, w, test).numpy()
    return {"report": classification_report(probs, store.labels[test], store.groups()[test], store.info.class_names)}


# ----------------------------------------------------------------------------------------------------------------------
# Real cells


def run_real_cells(w: Work) -> dict[str, Any]:
    """Classical features of held-out cells of every class, drawn evenly over their wells."""
    store, e = w.images(), w.experiment
    held_out, groups = np.concatenate([store.rows("valid"), store.rows("test")]), store.groups()
    rows = np.concatenate([
        np.sort(evenly(held_out[store.labels[held_out] == c], groups, e.evaluation.real_images, [e.run.seed, c, 17]))
        for c in range(len(store.info.class_names))
    ])  # fmt: skip
    pieces = np.array_split(rows, max(1, len(rows) // 32))
    parts = []
    for done, part in enumerate(pieces):
        parts.append(measured(w, store, store.batch(part).x))
        w.progress("real cells", done + 1, len(pieces))
    features = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    pq.write_table(feature_table(store, rows, features), w.out / "features.parquet")
    return {"n": len(rows), "units": len(np.unique(groups[rows])), "features": len(features)}


def measured(w: Work, store: ImageStore, x: torch.Tensor) -> dict[str, NDArray[np.float64]]:
    """Classical features of images (B, C, H, W) in [-1, 1], by name."""
    s = w.experiment.evaluation
    return measure_many(
        (x.cpu().numpy() + 1) / 2, store.info.channels, nucleus_channel=s.nucleus_channel,
        cell_channel=s.cell_channel, background=w.black(), full=s.cell_features == "full",
    )  # fmt: skip


def feature_table(store: ImageStore, rows: NDArray[np.int64], features: dict[str, NDArray[np.float64]]) -> pa.Table:
    """Features of images, with ``row, class_name, group, Metadata_*``."""
    own = {
        "row": rows, "class_name": [store.info.class_names[k] for k in store.labels[rows]],
        "group": store.groups()[rows],
    }  # fmt: skip
    known = {name: store.table[name].take(pa.array(rows)) for name in store.metadata()}
    return pa.table({**own, **known, **features})


@dataclass(frozen=True)
class FactorRegression:
    """Factors of the simulated assay read from classical features, as a second ruler beside the network.

    Ridge regression on standardised features.  Features and factors are centred within classes before the fit: a
    treatment moves many factors at once, and a fit across classes would credit each with the others' features.  Answers
    are calibrated as the network's are.

    Attributes:
        factors: those with a cross-validated R2 (units held out) of at least 0.5.
        r2: of every factor.
    """

    factors: tuple[str, ...]
    r2: dict[str, float]
    centre: NDArray[np.float64]
    weight: NDArray[np.float64]

    @classmethod
    def fit(
        cls, features: NDArray, values: NDArray, labels: NDArray, groups: NDArray, factors: Sequence[str]
    ) -> FactorRegression:
        """Fit to real cells.

        Args:
            features: (N, P), NaN where a feature isn't there.
            values: (N, F) true factors.
            labels, groups: (N,) class and unit of each cell.
            factors: names of the F factors.
        """
        from sklearn.linear_model import RidgeCV
        from sklearn.model_selection import GroupKFold, cross_val_predict

        def within(x: NDArray) -> NDArray:
            out = np.array(x, float)
            for c in np.unique(labels):
                out[labels == c] -= _mean(out[labels == c])
            return out

        centre = _mean(features)
        spread = np.sqrt(_mean((features - centre) ** 2))
        scale = np.where(spread > 1e-9, 1.0 / np.maximum(spread, 1e-9), 0.0)
        x, y = np.nan_to_num(within((features - centre) * scale)), within(values)
        y /= np.maximum(y.std(axis=0), 1e-9)
        ridge = RidgeCV(alphas=np.geomspace(1.0, 1e4, 13), alpha_per_target=True)
        folds = GroupKFold(min(5, len(np.unique(groups))))
        predicted = cross_val_predict(ridge, x, y, groups=groups, cv=folds)
        r2 = 1 - ((predicted - y) ** 2).sum(axis=0) / np.maximum((y**2).sum(axis=0), 1e-9)
        good = np.flatnonzero(r2 >= 0.5).tolist()
        slopes = calibration(predicted, y, np.zeros(len(y)))[good]
        weight = np.atleast_2d(ridge.fit(x, y).coef_)[good].T * scale[:, None] / slopes
        return cls(tuple(factors[j] for j in good), dict(zip(factors, map(float, r2), strict=True)), centre, weight)

    def __call__(self, features: NDArray) -> NDArray[np.float64]:
        """Factors (n, F) in their within-class standard deviations, up to a constant, of features (n, P)."""
        return np.nan_to_num(features - self.centre) @ self.weight


def _mean(x: NDArray) -> NDArray[np.float64]:
    """Mean of the columns of x, NaN left out; 0 of columns of nothing else."""
    return np.asarray(np.nansum(x, axis=0) / np.maximum((~np.isnan(x)).sum(axis=0), 1), np.float64)
