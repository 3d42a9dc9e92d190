"""One row per trial: every number by which explanations are compared, with n and interval; and words for directions.

Reads the effects table and the facts of the other stages; renders nothing.  Keys are dotted; ``<name>_low`` and
``<name>_high`` bound the interval of ``<name>``.  With several (source, target) pairs, direction figures are means over
pairs.  METRICS says what each key means; a test holds the row to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from diffex import assay, metrics
from diffex.config import Experiment
from diffex.ranking import EffectArrays, arrays, baseline, rank

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
    "kl": "KL(p(image) || p(reconstruction)), nats",
    "agreement": "share of reconstructions that the classifier puts where it puts the image",
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
    "recovery.decoy_hits": "top directions whose largest change is a decoy",
    "edit.ssim": "structural similarity of reconstruction and edit, first direction",
    "edit.l1": "mean absolute change of a pixel in [0, 1], first direction",
    "cost.unet_evaluations": "U-Net forward evaluations of all stages, shared ones included",
}


@dataclass(frozen=True)
class Scored:
    """The row, the ranking of all pairs, and what the report tells of the top directions of the first pair."""

    row: dict[str, Any]
    ranking: pa.Table
    top: list[dict[str, Any]]


def overall_score(row: Mapping[str, float]) -> float:
    """Geometric mean of flip rate, disentanglement and SSIM."""
    return float(max(row["flip_rate"] * row["disentanglement"] * row["ssim"], 0.0) ** (1 / 3))


def partial_scores(e: Experiment, pairs: Sequence[Sequence[str]], table: pa.Table) -> dict[str, float]:
    """The objectives that an unfinished effects table already gives (ssim is known before it)."""
    rows = [_explain_pair(e, table, s, t)[0] for s, t in pairs]
    return {name: float(np.mean([r[name] for r in rows])) for name in ("flip_rate", "disentanglement")}


def score(e: Experiment, facts: Mapping[str, Mapping[str, Any]], table: pa.Table) -> Scored:
    """Assemble the row.

    Args:
        e: the experiment.
        facts: stage -> facts of its record.
        table: effects table, metadata joined.
    """
    row: dict[str, Any] = {}
    quality = facts["reconstruction"]
    names = {"ssim": "ssim", "mse": "mse", "psnr": "psnr", "kl": "kl", "agreement": "agreement",
             "gate.swapped": "swapped", "gate.random": "random"}  # fmt: skip
    for key, name in names.items():
        row |= {key: quality[name]["mean"], f"{key}_low": quality[name]["low"], f"{key}_high": quality[name]["high"]}
    row["reconstruction.n"], row["reconstruction.units"] = quality["n"], quality["units"]
    report = facts["classifier"]["report"]
    row["classifier.accuracy"], row["classifier.n"] = report["accuracy"], report["n"]
    row["classifier.accuracy_low"], row["classifier.accuracy_high"] = report["accuracy_interval"]
    row["latent.effective_rank"] = facts["latents"]["effective_rank"]
    row["latent.dimensions"] = facts["directions"]["rank"]

    pairs = [tuple(pair) for pair in facts["effects"]["pairs"]]
    explained = [_explain_pair(e, table, s, t) for s, t in pairs]
    for key in explained[0][0]:
        row[key] = float(np.mean([part[key] for part, _, _ in explained]))
    rankings = [ranking for _, ranking, _ in explained]
    top = rankings[0].slice(0, e.ranking.top).to_pylist()
    row["top_n"], row["top_units"] = top[0]["flip_n"], top[0]["units"]
    chosen = sorted({r["direction"] for ranking in rankings for r in ranking.slice(0, e.ranking.top).to_pylist()})
    consistent = np.array(facts["directions"]["consistency"])[chosen]
    row["directions.consistency"], row["directions.consistency_min"] = float(consistent.mean()), float(consistent.min())
    row["directions.largest_cosine"] = facts["directions"]["largest_cosine"]
    for r in top:
        for name in (
            "flip_rate",
            "flip_low",
            "flip_high",
            "effect",
            "effect_low",
            "effect_high",
            "excess_low",
            "p_value",
        ):
            row[f"direction_{r['rank']}.{name}"] = r[name]

    if "ruler" in facts:
        row |= _recovery(e, facts, table, pairs, rankings)
    row["score"] = overall_score(row)
    row["cost.unet_evaluations"] = sum(int(f.get("unet_evaluations", 0)) for f in facts.values())
    learned = arrays(table, "learned", *pairs[0])
    planted = _planted(e, facts) if "ruler" in facts else ()
    for r in top:
        r["words"] = describe(learned, r["direction"], _sign(r), tuple(facts["data"]["channels"]))
        r["truth"] = _truth(learned, r["direction"], _sign(r), planted) if "ruler" in facts else ""
    return Scored(row, pa.concat_tables(rankings), top)


def _explain_pair(
    e: Experiment, table: pa.Table, source: str, target: str
) -> tuple[dict[str, float], pa.Table, EffectArrays]:
    r = e.ranking
    options: dict[str, Any] = {"confidence": r.confidence, "draws": r.bootstrap, "seed": e.run.seed}
    ranking = rank(table, source, target, order=r.order, top=r.top, explained_at=r.explained_at, **options)
    a = arrays(table, "learned", source, target)
    first = ranking.slice(0, 1).to_pylist()[0]
    top = ranking.slice(0, r.top).to_pylist()
    maps = np.stack([a.change[:, t["direction"], _sign(t)] for t in top])
    overlap = metrics.mean_overlap(maps)
    every = a.change[:, :, 0].transpose(1, 0, 2).reshape(a.change.shape[1], -1)
    row = {
        "flip_rate": first["flip_rate"] if first["flip_n"] else 0.0,  # a sampler can't learn from "unknown"
        "flip_rate_low": first["flip_low"], "flip_rate_high": first["flip_high"],
        "disentanglement": 1.0 - overlap, "mean_shift": first["effect"], "mean_shift_low": first["effect_low"],
        "mean_shift_high": first["effect_high"], "null.flip_rate": first["null_flip_rate"],
        "null.flip_max": first["null_flip_max"], "null.p_value": first["p_value"], "directions.overlap": overlap,
        "directions.effective_rank": metrics.effective_rank(every), "edit.ssim": first["ssim"], "edit.l1": first["l1"],
    }  # fmt: skip
    for kind in e.evaluation.baselines:
        b = baseline(table, kind, source, target, **options)
        row |= {f"{kind}.flip_rate": b["flip_rate"], f"{kind}.flip_rate_low": b["flip_low"],
                f"{kind}.flip_rate_high": b["flip_high"], f"{kind}.mean_shift": b["effect"]}  # fmt: skip
    return row, ranking, a


def _sign(ranked: Mapping[str, Any]) -> int:
    return 0 if ranked["sign"] > 0 else 1


def _recovery(
    e: Experiment, facts: Mapping[str, Mapping[str, Any]], table: pa.Table, pairs: Sequence[tuple[str, ...]],
    rankings: Sequence[pa.Table],
) -> dict[str, Any]:  # fmt: skip
    """Planted factors found, for the simulated assay: factors that the ruler measures count, others can't."""
    visible = _planted(e, facts)
    shifts, baseline_shifts = [], []
    factors: tuple[str, ...] = ()
    for (source, target), ranking in zip(pairs, rankings, strict=True):
        a = arrays(table, "learned", source, target)
        factors = a.factors
        shifts += [
            a.shifts[:, t["direction"], _sign(t)].mean(axis=0) for t in ranking.slice(0, e.ranking.top).to_pylist()
        ]
        if "class_mean" in e.evaluation.baselines:
            b = arrays(table, "class_mean", source, target)
            k = int(b.effect[:, :, 0].mean(axis=0).argmax())
            baseline_shifts.append(b.shifts[:, k, 0].mean(axis=0))
    planted = [f for f in visible if f in factors]
    found = metrics.factor_recovery(np.stack(shifts), factors, planted)
    row: dict[str, Any] = {
        "recovery.planted": len(planted), "recovery.moved": len(found.moved),
        "recovery.recovered": len(found.recovered), "recovery.decoy_hits": found.decoy_hits,
        "recovery.moved_names": ", ".join(found.moved), "recovery.recovered_names": ", ".join(found.recovered),
    }  # fmt: skip
    if baseline_shifts:
        row["class_mean.moved"] = len(metrics.factor_recovery(np.stack(baseline_shifts), factors, planted).moved)
    return row


def _planted(e: Experiment, facts: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Factors that the simulated treatments move and the channels show."""
    return assay.planted_factors(e.assay.treatments or assay.DESIGNS[e.assay.design], facts["data"]["channels"])


def pareto_front(rows: Sequence[Mapping[str, Any]], objectives: Sequence[str]) -> list[bool]:
    """Which rows no other row beats: none is at least as good in every objective and better in one."""
    values = np.array([[float(r[o]) for o in objectives] for r in rows]).reshape(len(rows), len(objectives))
    better = (values[:, None] >= values[None]).all(axis=-1) & (values[:, None] > values[None]).any(axis=-1)
    beaten = np.any(better, axis=0) | np.isnan(values).any(axis=1)
    return [not b for b in beaten.tolist()]


# ----------------------------------------------------------------------------------------------------------------------
# Words


def _truth(a: EffectArrays, direction: int, s: int, planted: Sequence[str]) -> str:
    """'planted', 'decoy' or 'nothing': what the largest measured change of a direction is on the simulated assay."""
    shift = np.abs(a.shifts[:, direction, s].mean(axis=0))
    if not len(shift) or shift.max() < 0.5:
        return "nothing"
    return "planted" if a.factors[int(shift.argmax())] in planted else "decoy"


def describe(a: EffectArrays, direction: int, s: int, channels: tuple[str, ...]) -> str:
    """What a direction does to the cells, in words: by measured factors where there are any, else by its change map.

    ``s`` is the index of its sign.
    """
    if a.factors:
        shift = a.shifts[:, direction, s].mean(axis=0)
        order = [j for j in np.argsort(-np.abs(shift)) if abs(shift[j]) >= 0.5][:3]
        if not order:
            return "no measured factor changes"
        phrase = [
            assay.FACTORS[a.factors[j]].rises if shift[j] > 0 else assay.FACTORS[a.factors[j]].falls for j in order
        ]
        return "; ".join(f"{p} ({shift[j]:+.1f} sd)" for p, j in zip(phrase, order, strict=True))
    return describe_change(a.change[:, direction, s].mean(axis=0), channels)


def describe_change(change: NDArray[np.floating], channels: tuple[str, ...]) -> str:
    """Words for a mean signed change map, (C * side * side,) in units of the full intensity range."""
    side = round((change.size / len(channels)) ** 0.5)
    maps = change.reshape(len(channels), side, side)
    at = np.linspace(-1, 1, side)
    centre = np.hypot(at[:, None], at[None, :]) < 0.6
    words = []
    for c in np.argsort(-np.abs(maps).mean(axis=(1, 2))):
        inner, outer = maps[c][centre].mean(), maps[c][~centre].mean()
        if max(abs(inner), abs(outer)) < 0.01:
            continue
        where, value = ("in the centre", inner) if abs(inner) > abs(outer) else ("around it", outer)
        words.append(f"{channels[c]} {'brightens' if value > 0 else 'darkens'} {where} ({100 * value:+.0f} %)")
    return "; ".join(words[:3]) or "hardly any change of mean intensity"
