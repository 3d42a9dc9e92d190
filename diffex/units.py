"""Bytes and times as people write and read them."""

from __future__ import annotations

import argparse
import re

SIZES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
SPANS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def size(text: str) -> float:
    """Bytes of "20GB", "1.5 TiB", "1000".

    Raises:
        argparse.ArgumentTypeError: it is no size.
    """
    found = re.fullmatch(r"([0-9.]+)\s*([kmgt]?i?)b?", text.strip().lower())
    if not found or found[2] not in SIZES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write e.g. 500MB, 20GB or 1.5TB")
    return _positive(found[1], text) * SIZES[found[2]]


def span(text: str) -> float:
    """Seconds of "90m", "12h", "30d", "2w".

    Raises:
        argparse.ArgumentTypeError: it is no time.
    """
    found = re.fullmatch(r"([0-9.]+)\s*([smhdw])", text.strip().lower())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: write e.g. 90m, 12h, 30d or 2w")
    return _positive(found[1], text) * SPANS[found[2]]


def _positive(number: str, text: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} begins with no number") from None


def human_size(count: float) -> str:
    """Bytes for people: "1.2 GB"."""
    unit = "B"
    for following in ("kB", "MB", "GB", "TB", "PB"):
        if count < 999.5:
            break
        count, unit = count / 1000, following
    return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"


def human_age(seconds: float) -> str:
    """Seconds for people: "3 h", "12 d"."""
    for unit in ("d", "h", "m"):
        if seconds >= SPANS[unit]:
            return f"{seconds / SPANS[unit]:.0f} {'min' if unit == 'm' else unit}"
    return f"{max(seconds, 0):.0f} s"
