"""The one exception that stands for a user's mistake, and the hint that goes with a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave can't be used; the message is one line: what was given, what is allowed, what mends it.

    The command line prints it without a stack trace and exits with status 2.
    """


class ImageError(UserError):
    """One image of many can't be used; an ingest can leave it out (``--skip-bad``)."""


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """A hint naming the nearest allowed name, or all of them when none is near."""
    names = sorted(allowed)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(map(repr, names))}"
