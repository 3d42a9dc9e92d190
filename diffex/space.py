"""What a sweep may vary, and bounds that it must keep: the words of a search."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from diffex.errors import UserError


@dataclass(frozen=True)
class Levels:
    """A setting that takes one of a few values; trials at equal levels share the stages that these decide."""

    values: tuple[Any, ...]

    def including(self, value: Any) -> Levels:
        """The same levels and, where it is not among them, ``value``: so that a sweep can try its recipe as it is."""
        return self if value in self.values else Levels((value, *self.values))

    def distribution(self) -> BaseDistribution:
        return CategoricalDistribution(self.values)


@dataclass(frozen=True)
class Range:
    """A number between ``low`` and ``high``, both included; whole where both are ints."""

    low: float
    high: float
    log: bool = False

    def distribution(self) -> BaseDistribution:
        if isinstance(self.low, int) and isinstance(self.high, int):
            return IntDistribution(self.low, self.high, log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Constraint:
    """A bound on a measure of the scoreboard: trials beyond it lose PENALTY times the relative shortfall.

    Penalties, not a sampler's own constraints: they work for every sampler and scheduler alike.
    """

    measure: str
    least: float

    PENALTY = 2.0

    @classmethod
    def parse(cls, text: str) -> Constraint:
        """Read ``ssim>=0.6``, or ``null.flip_rate<=0.1`` (kept as the measure's negative).

        Raises:
            UserError: it reads otherwise.
        """
        for sign, factor in ((">=", 1.0), ("<=", -1.0)):
            name, found, bound = text.partition(sign)
            if found:
                with contextlib.suppress(ValueError):
                    return cls(("-" if factor < 0 else "") + name.strip(), factor * float(bound))
        raise UserError(f"--constraint {text!r} must read MEASURE>=NUMBER or MEASURE<=NUMBER, e.g. ssim>=0.6")

    def shortfall(self, row: Mapping[str, Any]) -> float:
        """By how much a row misses the bound, as a share of the bound (absolute for bounds near 0); 0: it holds."""
        name = self.measure.removeprefix("-")
        if name not in row:
            raise UserError(f"--constraint: the scoreboard has no measure {name!r}; docs/evaluation.md lists them")
        value = float(row[name]) * (-1.0 if self.measure.startswith("-") else 1.0)
        return max(0.0, self.least - value) / max(abs(self.least), 0.1)
