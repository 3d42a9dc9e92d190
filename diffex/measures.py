"""What a row of the scoreboard holds, and how rows are compared and brought together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

OBJECTIVES = ("flip_rate", "disentanglement", "ssim")
"""What a sweep raises, and its Pareto front weighs."""

METRICS = {
    "flip_rate": "share of held-out source images that the first-ranked direction flips to the target, at a shift no "
    "longer than the class-mean difference; 0 where no reconstruction is left to flip",
    "disentanglement": "1 - mean overlap of the change maps of the top directions: 1 where no two change the same "
    "pixels and channels",
    "ssim": "structural similarity of image and reconstruction (inversion, then rendering)",
    "score": "geometric mean of flip_rate, disentanglement and ssim",
    "mean_shift": "mean change of p(target) by the first-ranked direction, against the reconstruction",
    "null.flip_rate": "mean flip rate of random directions of the same length",
    "null.flip_max": "flip rate of the best random direction",
    "null.p_value": "permutation p-value of the first direction's effect over the random ones (one-sided, by unit)",
    "class_mean.flip_rate": "flip rate of the class-mean difference itself",
    "class_mean.mean_shift": "its mean change of p(target)",
    "class_mean.moved": "planted factors that it moves more than any decoy",
    "classifier.accuracy": "accuracy on test images",
    "mse": "mean squared reconstruction error, images in [0, 1]",
    "psnr": "peak signal-to-noise ratio of reconstructions, dB",
    "perceptual": "distance of image and reconstruction in the witness's feature maps (LPIPS's formula, equal weights)",
    "perceptual.strangers": "the same distance between different test images: what distances are to be read by",
    "lpips": "real LPIPS of image and reconstruction (AlexNet, shift-tolerant), where its weights are given",
    "kl": "KL(p(image) || p(reconstruction)), nats",
    "agreement": "share of reconstructions that the classifier puts where it puts the image",
    "frechet": "Fréchet distance of reconstructions to other real test images, in the witness's features",
    "frechet.random": "the same of images rendered with own z from random x_T",
    "frechet.real": "the same of the real images themselves: the floor at this number of images",
    "kid": "kernel distance (unbiased, cubic kernel) of reconstructions to other real test images, same features",
    "kid.random": "the same of images rendered with own z from random x_T",
    "kid.real": "the same of the real images themselves",
    "witness.accuracy": "accuracy on test images of the witness, a classifier trained on its own",
    "robust.accuracy": "accuracy on test images of the adversarially trained counterpart",
    "attack.accuracy": "accuracy of the explained classifier under PGD of evaluation.epsilon",
    "attack.robust_accuracy": "accuracy of the counterpart under the same attack",
    "gate.swapped": "share of images rendered with the z of an image of another class that follow z, not x_T",
    "gate.random": "share of images rendered from random x_T that follow z",
    "latent.effective_rank": "effective rank of the codes' covariance",
    "latent.dimensions": "dimensions of the subspace that directions live in",
    "directions.consistency": "mean cosine of a direction's unit shifts over images, mean over the top directions",
    "directions.consistency_min": "the same, of the least consistent top direction",
    "directions.largest_cosine": "largest |cosine| between the mean shifts of two directions",
    "directions.overlap": "mean overlap of the change maps of the top directions",
    "directions.effective_rank": "effective rank of all directions' change maps: how many different effects there are",
    "recovery.planted": "planted factors that the channels show and the ruler measures",
    "recovery.moved": "planted factors that a top direction moves more than any decoy",
    "recovery.recovered": "planted factors that are the largest change of a top direction",
    "recovery.once": "planted factors that are the largest change of exactly one top direction",
    "recovery.decoy_hits": "top directions whose largest change is a decoy",
    "recovery.precision": "share of top directions with a clear change whose largest change is a planted factor",
    "recovery.recall": "share of planted factors that are the largest change of a top direction",
    "recovery.rulers_agree": "correlation of the directions' factor shifts by ruler and by classical features",
    "effects.disentanglement": "DCI disentanglement of the matrix of top directions with a clear change and factor "
    "shifts by the ruler: 1 where each direction moves one factor; weighted by size",
    "effects.selectivity": "mean over those directions, however large, of 1 - entropy of their squared factor shifts: "
    "1 where each moves one factor",
    "effects.completeness": "DCI completeness of that matrix: 1 where each factor is moved by one direction",
    "truth.mig": "mutual information gap of codes along the directions and true factors, test images",
    "truth.sap": "separated attribute predictability of the same",
    "truth.dci_disentanglement": "DCI disentanglement of the same",
    "truth.dci_completeness": "DCI completeness of the same",
    "truth.dci_informativeness": "DCI informativeness (R2, units held out) of the same",
    "directions.number": "K",
    "directions.effect_correlation": "mean |correlation| over images of two directions' effects on the classifier",
    "directions.feature_overlap": "mean |cosine| of two top directions' shifts of classical features",
    "stability.code": "mean |cosine| of directions matched over trainings from other seeds, in the code",
    "stability.code_chance": "what random directions reach after matching",
    "stability.image": "the same, of the changes of the expected image that directions bring",
    "edit.ssim": "structural similarity of reconstruction and edit, first direction",
    "edit.l1": "mean absolute change of a pixel in [0, 1], first direction",
    "edit.l1_cell": "the same inside the cell in the middle",
    "edit.l1_outside": "the same outside it",
    "edit.perceptual": "distance of reconstruction and edit in the witness's feature maps, first direction",
    "edit.lpips": "real LPIPS of reconstruction and edit, where its weights are given",
    "edit.sparsity": "share of pixels that change by less than 5 % of the range, first direction",
    "edit.implausible": "share of an edit's classical features outside the range of all real cells measured, less that "
    "of its reconstruction",
    "edit.kid": "kernel distance of first-direction edits to real target images, in the witness's features",
    "edit.kid_before": "the same of the reconstructions that they start from",
    "flip.area": "area under the flip curve over alpha up to the reference length, first direction: 1 flips at once",
    "flip.alpha": "median smallest alpha that flips, of cells that flip, standard deviations, first direction",
    "flip.alpha_share": "the same as a share of the reference length",
    "path.evenness": "mean over largest perceptual step on the way of the first direction",
    "path.detour": "sum of its perceptual steps over the distance of start and end: 1 is straight",
    "path.monotonic": "share of its steps at which p(target) does not fall",
    "path.curvature": "mean absolute second difference of p(target) over its steps",
    "oracle.agreement": "share of the first direction's flips that the witness makes too",
    "oracle.flip_rate": "share of cells that the first direction flips for the witness",
    "robust.agreement": "share of the first direction's flips that the adversarially trained counterpart makes too",
    "real.features": "classical features that tell the real classes apart in held-out wells (false discovery rate 5 %)",
    "real.tested": "classical features compared",
    "audit.audited": "directions audited",
    "audit.supported": "of them supported: they change what the treatment really changes",
    "audit.agreement": "share of the first direction's feature shift that real cells differ in, same sign",
    "cost.unet_evaluations": "U-Net forward evaluations of all stages, shared ones included",
}


def overall_score(row: Mapping[str, float]) -> float:
    """Geometric mean of flip rate, disentanglement and SSIM."""
    return float(max(row["flip_rate"] * row["disentanglement"] * row["ssim"], 0.0) ** (1 / 3))


def pareto_front(rows: Sequence[Mapping[str, Any]], objectives: Sequence[str]) -> list[bool]:
    """Which rows no other row beats: none is at least as good in every objective and better in one."""
    values = np.array([[float(r[o]) for o in objectives] for r in rows]).reshape(len(rows), len(objectives))
    better = (values[:, None] >= values[None]).all(axis=-1) & (values[:, None] > values[None]).any(axis=-1)
    beaten = np.any(better, axis=0) | np.isnan(values).any(axis=1)
    return [not b for b in beaten.tolist()]


def over_seeds(
    rows: Sequence[Mapping[str, Any]], settings: Sequence[str], confidence: float = 0.95
) -> list[dict[str, Any]]:
    """Rows that differ in ``run.seed`` only, brought together: one row for each choice of the other settings.

    Args:
        rows: scoreboard rows with their settings.
        settings: dotted settings that vary; all but ``run.seed`` must agree within a group.
        confidence: of the intervals (Student's t over seeds).

    Returns:
        For each group of two or more: the settings, ``seeds`` (their number), and for each measure its mean, ``_low``
        and ``_high``, ``_sd``; a measure that some seed lacks is left out.  ``trials``: names of the members.
    """
    fixed = [s for s in settings if s != "run.seed"]
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row.get(s)) for s in fixed), []).append(row)
    found = []
    for members in groups.values():
        n = len(members)
        if n < 2:
            continue
        out: dict[str, Any] = {s: members[0].get(s) for s in fixed} | {"seeds": n}
        out["trials"] = [str(r.get("trial", "")) for r in members]
        for name in METRICS:
            values = np.array([float(v) for r in members if isinstance(v := r.get(name), int | float)])
            if len(values) < n or np.isnan(values).any():
                continue
            sd = float(values.std(ddof=1))
            half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * sd / n**0.5
            mean = float(values.mean())
            out |= {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half, f"{name}_sd": sd}
        found.append(out)
    return found
