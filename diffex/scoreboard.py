"""One row per trial: every number by which explanations are compared, with n and interval; and words for directions.

Reads the effects table and the facts of the other stages; renders nothing.  Keys are dotted; ``<name>_low`` and
``<name>_high`` bound the interval of ``<name>``.  With several (source, target) pairs, direction figures are means over
pairs.  METRICS says what each key means; a test holds the row to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from diffex import assay, metrics
from diffex.audit import Evidence, Finding, audit, column, feature_names, matrix, populations
from diffex.config import Experiment
from diffex.disentanglement import (
    completeness_of,
    disentanglement_of,
    effect_correlation,
    profile_overlap,
    recovery,
    selectivity,
)
from diffex.measures import overall_score
from diffex.phenotypes import Population, implausible
from diffex.ranking import EffectArrays, arrays, baseline, rank
from diffex.signatures import recognise
from diffex.stability import agreement, chance
from diffex.statistics import bootstrap_interval
from diffex.trajectories import flip_area, smallest_flip, smoothness


@dataclass(frozen=True)
class Tables:
    """What is scored: the effects table, features of real cells, and the tables of the evidence.

    Attributes:
        effects: metadata joined.
        real: features of held-out cells.
        cells: features of images, reconstructions and edits.
        trajectories, cycle: of the followed directions.
        profiles: name -> (seeds, K, P) of directions trained again.
    """

    effects: pa.Table
    real: pa.Table
    cells: pa.Table
    trajectories: pa.Table
    cycle: pa.Table
    profiles: Mapping[str, NDArray[np.floating]]


@dataclass(frozen=True)
class Scored:
    """The row, the ranking of all pairs, what the audit found, and what the report tells of the top directions of the
    first pair.
    """

    row: dict[str, Any]
    ranking: pa.Table
    top: list[dict[str, Any]]
    findings: list[Finding]


def partial_scores(e: Experiment, pairs: Sequence[Sequence[str]], table: pa.Table) -> dict[str, float]:
    """The objectives that an unfinished effects table already gives (ssim is known before it)."""
    rows = [_explain_pair(e, table, s, t)[0] for s, t in pairs]
    return {name: float(np.mean([r[name] for r in rows])) for name in ("flip_rate", "disentanglement")}


def score(e: Experiment, facts: Mapping[str, Mapping[str, Any]], tables: Tables) -> Scored:
    """Assemble the row.

    Args:
        e: the experiment.
        facts: stage -> facts of its record.
        tables: of the stages.
    """
    table = tables.effects
    row: dict[str, Any] = _images_and_judges(facts)
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
    row |= _stability(facts, tables.profiles)
    stable = row.pop("stability.of_each")
    findings = audit(
        Evidence(effects=table, real=tables.real, cells=tables.cells, cycle=tables.cycle,
                 dimensions=facts["directions"]["rank"], stability=stable),
        facts["evidence"]["audited"],
    )  # fmt: skip
    row |= _ways(facts, tables.trajectories) | _audited(findings, populations(tables.real, *pairs[0]))
    row |= _plausible(tables.cells, tables.real, facts["evidence"]["audited"])
    row["score"] = overall_score(row)
    row["cost.unet_evaluations"] = sum(int(f.get("unet_evaluations", 0)) for f in facts.values())
    row["signatures"] = ", ".join(s.name for s in recognise(row)) or "none"
    learned = arrays(table, "learned", *pairs[0])
    planted = _planted(e, facts) if "ruler" in facts else ()
    for r in top:
        found = next((f for f in findings if (f.source, f.target, f.direction) == (*pairs[0], r["direction"])), None)
        r["words"] = describe(learned, r["direction"], _sign(r), tuple(facts["data"]["channels"]))
        r["truth"] = _truth(learned, r["direction"], _sign(r), planted) if "ruler" in facts else ""
        r["verdict"] = found.verdict if found else ""
        r["phenotype"] = list(found.words) if found else []
        r["tests"] = [vars(t) for t in found.tests] if found else []
    return Scored(row, pa.concat_tables(rankings), top, findings)


def _with_interval(key: str, value: Mapping[str, float]) -> dict[str, float]:
    return {key: value["mean"], f"{key}_low": value["low"], f"{key}_high": value["high"]}


def _images_and_judges(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Reconstruction, realism and gate; the classifier and who else judges."""
    quality = facts["reconstruction"]
    row: dict[str, Any] = {}
    for name in ("ssim", "mse", "psnr", "kl", "agreement", "perceptual", "lpips", "swapped", "random"):
        if name in quality:
            row |= _with_interval(f"gate.{name}" if name in ("swapped", "random") else name, quality[name])
    row["perceptual.strangers"] = quality["strangers"]["perceptual"]
    for name, suffix in (("reconstruction", ""), ("random", ".random"), ("real", ".real")):
        for kind, value in quality["realism"][name].items():
            row |= _with_interval(kind + suffix, value)
    row["reconstruction.n"], row["reconstruction.units"] = quality["n"], quality["units"]
    for judge in ("classifier", "witness", "robust"):
        report = facts[judge]["report"]
        low, high = report["accuracy_interval"]
        row |= _with_interval(f"{judge}.accuracy", {"mean": report["accuracy"], "low": low, "high": high})
    row["classifier.n"] = facts["classifier"]["report"]["n"]
    for judge, key in (("classifier", "attack.accuracy"), ("robust", "attack.robust_accuracy")):
        under = facts["robust"]["attacks"][judge]["attacks"][0]
        low, high = (math.nan if v is None else v for v in under["pgd_accuracy_interval"])
        row |= _with_interval(key, {"mean": under["pgd_accuracy"], "low": low, "high": high})
    return row


def _stability(facts: Mapping[str, Mapping[str, Any]], profiles: Mapping[str, NDArray]) -> dict[str, Any]:
    """Agreement of directions trained again; of each direction by its image, where that is known, else by its code."""
    row: dict[str, Any] = {}
    for name, seeds in profiles.items():
        found = agreement(list(seeds))
        row |= _with_interval(f"stability.{name}", {"mean": found.mean, "low": found.low, "high": found.high})
        if name == "image" or "image" not in profiles:
            row["stability.of_each"] = found.per_direction.tolist()
    codes = profiles["code"]
    row["stability.code_chance"] = chance([codes.shape[1]] * len(codes), facts["directions"]["rank"], draws=200).mean
    row["stability.seeds"] = len(codes)
    return row


def _ways(facts: Mapping[str, Mapping[str, Any]], table: pa.Table) -> dict[str, Any]:
    """How the first direction of each pair gets there; means over pairs, intervals over all their images."""
    columns = {n: column(table, n) for n in ("source", "target", "rank", "row", "step", "alpha", "group")}
    first = columns["rank"] == 1
    values: dict[str, list[NDArray]] = {}
    groups = []
    for source, target in dict.fromkeys(zip(columns["source"][first], columns["target"][first], strict=True)):
        part = first & (columns["source"] == source) & (columns["target"] == target)
        way = _dense(table.filter(pa.array(part)), target)
        can, shape = ~way.flipped[:, 0], smoothness(way.p, way.step_distance[:, 1:], way.distance[:, -1])
        alpha = np.where(can, smallest_flip(way.p, way.flipped, way.alphas), np.nan)
        area = np.where(can, flip_area(way.flipped, way.alphas), np.nan)
        found = {"path." + n: np.asarray(v) for n, v in vars(shape).items()}
        found |= {"flip.area": area, "flip.alpha": alpha, "flip.alpha_share": alpha / np.abs(way.alphas[-1])}
        for name, value in found.items():
            values.setdefault(name, []).append(value)
        groups.append(way.groups)
    unit = np.concatenate(groups)
    row: dict[str, Any] = {"path.n": len(unit), "path.units": len(np.unique(unit))}
    for name, parts in values.items():
        array = np.concatenate(parts)
        there = np.isfinite(array)
        low, high = bootstrap_interval(array[there], unit[there])
        middle = np.median if name.startswith("flip.alpha") else np.mean
        row[name] = float(middle(array[there])) if there.any() else float("nan")
        if middle is np.mean:
            row |= {f"{name}_low": low, f"{name}_high": high}
    of_first = [r for r in facts["evidence"]["kid"] if r["rank"] == 1]
    for key, kind in (("edit.kid", "edit"), ("edit.kid_before", "reconstruction")):
        mine = [r for r in of_first if r["kind"] == kind]
        row |= _with_interval(key, {name: float(np.mean([r[at] for r in mine]))
                                    for name, at in (("mean", "kid"), ("low", "low"), ("high", "high"))})  # fmt: skip
    return row


@dataclass(frozen=True)
class _Way:
    """A trajectory table of one direction as arrays over (n images, A steps)."""

    p: NDArray
    flipped: NDArray[np.bool_]
    step_distance: NDArray
    distance: NDArray
    alphas: NDArray
    groups: NDArray


def _dense(table: pa.Table, target: str) -> _Way:
    names = [n.removeprefix("p:") for n in table.column_names if n.startswith("p:")]
    order = np.lexsort((column(table, "step"), column(table, "row")))
    steps = int(column(table, "step").max()) + 1

    def dense(values: NDArray) -> NDArray:
        return values[order].reshape(-1, steps)

    p = matrix(table, [f"p:{n}" for n in names])
    t = names.index(target)
    return _Way(
        dense(p[:, t]), dense(p.argmax(axis=1) == t), dense(column(table, "step_distance")),
        dense(column(table, "distance")), dense(column(table, "alpha"))[0], dense(column(table, "group"))[:, 0],
    )  # fmt: skip


def _plausible(cells: pa.Table, real: pa.Table, followed: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Features that no real cell has: of the first directions' edits, beyond those of the reconstructions."""
    names, kind, of = feature_names(real), column(cells, "kind"), column(cells, "class_name")
    excess, groups = [], []
    for r in (r for r in followed if r["rank"] == 1):
        target = (column(cells, "direction") == r["direction"]) & (column(cells, "target") == r["target"])
        edit, base = (
            cells.filter(pa.array((of == r["source"]) & chosen)).sort_by("row")
            for chosen in ((kind == "edit") & target, kind == "reconstruction")
        )
        known = matrix(real, names)[np.isin(column(real, "class_name"), (r["source"], r["target"]))]
        excess.append(implausible(matrix(edit, names), known) - implausible(matrix(base, names), known))
        groups.append(column(edit, "group"))
    share = np.concatenate(excess)
    low, high = bootstrap_interval(share, np.concatenate(groups))
    return _with_interval("edit.implausible", {"mean": float(share.mean()), "low": low, "high": high})


def _feature_overlap(findings: Sequence[Finding]) -> float:
    """Overlap of the feature shifts of each pair's directions, mean over pairs that have two or more."""
    pairs = [[f.shift.difference for f in findings if (f.source, f.target) == pair]
             for pair in dict.fromkeys((f.source, f.target) for f in findings)]  # fmt: skip
    found = [profile_overlap(np.stack(shifts)) for shifts in pairs if len(shifts) > 1]
    return float(np.mean(found)) if found else float("nan")


def _audited(findings: Sequence[Finding], real: Population) -> dict[str, Any]:
    first = [f for f in findings if f.rank == 1]
    row: dict[str, Any] = {
        "audit.audited": len(findings), "audit.supported": sum(f.supported for f in findings),
        "audit.agreement": float(np.mean([f.shift.agreement for f in first])),
        "real.features": int(real.differs.sum()), "real.tested": len(real.names),
        "directions.feature_overlap": _feature_overlap(findings),
    }  # fmt: skip
    return row


def _explain_pair(
    e: Experiment, table: pa.Table, source: str, target: str
) -> tuple[dict[str, float], pa.Table, EffectArrays]:
    r = e.ranking
    options: dict[str, Any] = {"confidence": r.confidence, "draws": r.bootstrap, "seed": e.run.seed}
    ranking = rank(table, source, target, order=r.order, top=r.top, explained_at=r.explained_at, **options)
    a = arrays(table, "learned", source, target)
    first = ranking.slice(0, 1).to_pylist()[0]
    top = ranking.slice(0, r.top).to_pylist()
    k, s = first["direction"], _sign(first)
    maps = np.stack([a.change[:, t["direction"], _sign(t)] for t in top])
    overlap = metrics.mean_overlap(maps)
    every = a.change[:, :, 0].transpose(1, 0, 2).reshape(a.change.shape[1], -1)
    row = {
        "flip_rate": first["flip_rate"] if first["flip_n"] else 0.0,  # a sampler can't learn from "unknown"
        "flip_rate_low": first["flip_low"], "flip_rate_high": first["flip_high"],
        "disentanglement": 1.0 - overlap, "mean_shift": first["effect"], "mean_shift_low": first["effect_low"],
        "mean_shift_high": first["effect_high"], "null.flip_rate": first["null_flip_rate"],
        "null.flip_max": first["null_flip_max"], "null.p_value": first["p_value"], "directions.overlap": overlap,
        "directions.effective_rank": metrics.effective_rank(every), "directions.number": a.effect.shape[1],
        "directions.effect_correlation": effect_correlation(a.effect[:, :, 0])[0],
        "edit.sparsity": 1.0 - first["changed"],
    }  # fmt: skip
    for name in ("ssim", "l1", "l1_cell", "l1_outside", "perceptual", "lpips"):
        if name in first:
            row[f"edit.{name}"] = float(np.nanmean(a.extra[name][:, k, s]))
    for judge, names in {"witness": ("oracle.agreement", "oracle.flip_rate"), "robust": ("robust.agreement",)}.items():
        other = a.judges[judge]
        flips = other.flips[:, k, s].astype(float)
        both = a.eligible & other.eligible & a.flips[:, k, s]
        for name, among in zip(names, (both, other.eligible), strict=False):
            low, high = bootstrap_interval(flips[among], a.groups[among], confidence=r.confidence, seed=e.run.seed)
            mean = float(flips[among].mean()) if among.any() else float("nan")
            row |= _with_interval(name, {"mean": mean, "low": low, "high": high})
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
    """Planted factors found, for the simulated assay: measured by the ruler, where it can, else by classical features
    (of directions that were followed); factors that neither measures don't count.
    """
    visible = _planted(e, facts)
    shifts, baseline_shifts = [], []
    classical = facts["truth"]["classical"]
    ruler = arrays(table, "learned", *pairs[0]).factors
    extra = [j for j, name in enumerate(classical["factors"]) if name not in ruler]
    factors = (*ruler, *(classical["factors"][j] for j in extra))
    by_features = {
        (r["source"], r["target"], r["direction"]): np.array(row)[extra]
        for r, row in zip(facts["evidence"]["audited"], classical["shifts"], strict=True)
    }
    for (source, target), ranking in zip(pairs, rankings, strict=True):
        a = arrays(table, "learned", source, target)
        for t in ranking.slice(0, e.ranking.top).to_pylist():
            rest = by_features.get((source, target, t["direction"]), np.full(len(extra), np.nan))
            shifts.append(np.concatenate([a.shifts[:, t["direction"], _sign(t)].mean(axis=0), rest]))
        if "class_mean" in e.evaluation.baselines:
            b = arrays(table, "class_mean", source, target)
            k = int(b.effect[:, :, 0].mean(axis=0).argmax())
            baseline_shifts.append(b.shifts[:, k, 0].mean(axis=0))
    planted = [f for f in visible if f in factors]
    effects = np.nan_to_num(np.stack(shifts))
    found = recovery(effects, factors, planted)
    seen = np.abs(effects[:, : len(ruler)])  # classical features confuse factors that move together
    strong = seen[seen.max(axis=1, initial=0.0) >= 0.5]
    row: dict[str, Any] = {
        "recovery.planted": len(planted), "recovery.moved": len(found.moved),
        "recovery.recovered": len(found.recovered), "recovery.once": len(found.recovered_once),
        "recovery.decoy_hits": found.decoy_hits, "recovery.precision": found.precision, "recovery.recall": found.recall,
        "recovery.moved_names": ", ".join(found.moved), "recovery.recovered_names": ", ".join(found.recovered),
        "effects.disentanglement": disentanglement_of(strong) if len(strong) else float("nan"),
        "effects.completeness": completeness_of(strong) if len(strong) else float("nan"),
        "effects.selectivity": selectivity(strong),
        "recovery.rulers_agree": _rulers_agree(facts, table),
    }  # fmt: skip
    truth = facts["truth"]
    names = ("mig", "sap", "dci.disentanglement", "dci.completeness", "dci.informativeness")
    row |= {f"truth.{name.replace('.', '_')}": truth[name] for name in names}
    row["truth.n"] = truth["n"]
    if baseline_shifts:
        seen = [f for f in planted if f in ruler]
        row["class_mean.moved"] = len(recovery(np.stack(baseline_shifts), ruler, seen).moved)
    return row


def _rulers_agree(facts: Mapping[str, Mapping[str, Any]], table: pa.Table) -> float:
    """Correlation of both effect matrices, over directions followed and factors that both rulers measure."""
    classical = facts["truth"]["classical"]
    pairs: list[tuple[float, float]] = []
    for r, shifts in zip(facts["evidence"]["audited"], classical["shifts"], strict=True):
        a = arrays(table, "learned", r["source"], r["target"])
        mine = a.shifts[:, r["direction"], _sign(r)].mean(axis=0)
        both = [(f, v) for f, v in zip(classical["factors"], shifts, strict=True) if f in a.factors]
        pairs += [(float(mine[a.factors.index(f)]), v) for f, v in both]
    x, y = np.array(pairs).reshape(-1, 2).T
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 2 and x.std() > 0 and y.std() > 0 else float("nan")


def _planted(e: Experiment, facts: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Factors that the simulated treatments move and the channels show."""
    return assay.planted_factors(e.assay.treatments or assay.DESIGNS[e.assay.design], facts["data"]["channels"])


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
