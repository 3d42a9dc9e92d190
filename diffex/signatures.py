"""Failure signatures: what goes wrong with explanations, recognised by name in a row of the scoreboard.

Each has a measure, a bound, and what to do.  They are computed for every trial and shown in the report and as MLflow
tags; a healthy model raises none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """A way to fail.

    Attributes:
        name: in words that fit a tag.
        meaning: what it looks like.
        raised: whether a row shows it; False where the row can't tell.
        measured: the numbers that it rests on.
        remedy: what to do, naming settings.
    """

    name: str
    meaning: str
    raised: Callable[[Row], bool]
    measured: Callable[[Row], str]
    remedy: str


@dataclass(frozen=True)
class Signature:
    """A failure that a row shows."""

    name: str
    meaning: str
    measured: str
    remedy: str


def _number(row: Row, key: str) -> float:
    """A value of the row; NaN, which no bound holds for, where it is missing."""
    value = row.get(key)
    return math.nan if value is None else float(value)


def _relative_edit(row: Row) -> float:
    """How far an edit lies from its cell, in distances of two cells that have nothing to do with each other."""
    strangers = _number(row, "perceptual.strangers")
    return _number(row, "edit.perceptual") / strangers if strangers > 0 else math.nan


def _dead(row: Row) -> bool:
    return abs(_number(row, "mean_shift")) < 0.02 and _relative_edit(row) < 0.02


def _collapsed(row: Row) -> bool:
    if _dead(row):  # no change at all has no rank
        return False
    return _number(row, "directions.number") >= 3 and _number(row, "directions.effective_rank") < 1.5


def _entangled(row: Row) -> bool:
    if _collapsed(row) or _dead(row):  # those have names of their own
        return False
    if not math.isnan(_number(row, "effects.selectivity")):
        return _number(row, "effects.selectivity") < 0.25
    return _number(row, "directions.feature_overlap") > 0.85 or _number(row, "directions.overlap") > 0.85


RULES = (
    Rule(
        "mode collapse", "all directions do the same to the cells", _collapsed,
        lambda r: (
            f"{_number(r, 'directions.number'):.0f} directions, {_number(r, 'directions.effective_rank'):.1f} effects"
        ),
        "raise directions.lambda2; use directions.covariance = image; lower directions.lambda3; ask for fewer "
        "directions (directions.num_directions) where the code has few dimensions",
    ),
    Rule(
        "attribute entanglement", "directions differ, but each changes many properties of the cell at once", _entangled,
        lambda r: (
            f"selectivity of effects {_number(r, 'effects.selectivity'):.2f}"
            if not math.isnan(_number(r, "effects.selectivity"))
            else f"overlap of feature shifts {_number(r, 'directions.feature_overlap'):.2f}, of change maps "
            f"{_number(r, 'directions.overlap'):.2f}"
        ),
        "raise directions.lambda2; set directions.covariance = image; a larger directions.num_directions gives each "
        "property a direction of its own",
    ),
    Rule(
        "zero shift", "directions change neither the image nor the verdict", _dead,
        lambda r: f"p(target) {_number(r, 'mean_shift'):+.3f}; {_relative_edit(r):.1%} of the way to another cell",
        "use directions.space = whitened and raise directions.alpha; raise directions.lambda3; see whether the code is "
        "ignored",
    ),
    Rule(
        "code ignored", "x_T carries the image and the classifier does not follow z",
        lambda r: _number(r, "gate.swapped") < 0.7 or _number(r, "gate.random") < 0.7,
        lambda r: (
            f"z is followed by {100 * _number(r, 'gate.swapped'):.0f} % with the x_T of another class, by "
            f"{100 * _number(r, 'gate.random'):.0f} % with a random one"
        ),
        "train longer (autoencoder.images); keep autoencoder.weighting = v and autoencoder.standardise = true; narrow "
        "the U-Net (autoencoder.widths) or widen the code (autoencoder.code_dim)",
    ),
    Rule(
        "classifier fidelity lost", "the classifier judges reconstructions otherwise than the images",
        lambda r: _number(r, "agreement") < 0.9 or _number(r, "kl") > 0.3,
        lambda r: f"agreement {100 * _number(r, 'agreement'):.0f} %, KL {_number(r, 'kl'):.2f} nats",
        "raise autoencoder.lambda1; train longer; use rendering.inversion = fixed_point and more rendering.steps",
    ),
    Rule(
        "saturated alpha", "cells flip long before the shift ends, and the rest only exaggerates",
        lambda r: _number(r, "flip_rate") >= 0.8 and _number(r, "flip.alpha_share") < 0.3,
        lambda r: f"half of the flips come by {100 * _number(r, 'flip.alpha_share'):.0f} % of the length",
        "read counterfactuals at flip.alpha; lower directions.alpha and the lengths in ranking.alphas",
    ),
    Rule(
        "over-edit", "the edit is no cell any more: its features lie where no real cell of either class has them",
        lambda r: _number(r, "edit.implausible") > 0.1,
        lambda r: f"{_number(r, 'edit.implausible'):.0%} of an edit's features lie beyond those of all real cells",
        "shorten the shift: lower directions.alpha, read counterfactuals at flip.alpha; raise directions.lambda2",
    ),
)  # fmt: skip


def recognise(row: Row) -> list[Signature]:
    """The failures that a row shows, in the order of RULES; empty for a healthy model."""
    return [Signature(r.name, r.meaning, r.measured(row), r.remedy) for r in RULES if r.raised(row)]
