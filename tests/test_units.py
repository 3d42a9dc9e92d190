"""Bytes and times as people write and read them."""

import argparse

import pytest

from diffex.units import human_age, human_size, size, span


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("20GB", 2e10),
        ("1.5 TiB", 1.5 * 2**40),
        ("500m", 5e8),
        ("7", 7),
        ("3 kB", 3000),
        ("0b", 0),
        ("1000", 1000),
        ("64MiB", 2**26),
        ("1.5 GB", 1_500_000_000),
        ("2kb", 2000),
    ],
)
def test_sizes_are_read(text: str, count: float) -> None:
    assert size(text) == count


@pytest.mark.parametrize(("text", "seconds"), [("90m", 5400), ("12h", 43200), ("30d", 2592000), ("2w", 1209600)])
def test_times_are_read(text: str, seconds: float) -> None:
    assert span(text) == seconds


@pytest.mark.parametrize("text", ["", "GB", "1.2.3GB", "5 miles", "-1GB", "1i", "many", "inf"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        size(text)


@pytest.mark.parametrize("text", ["", "30", "d", "1.2.3d", "-3d", "4 years"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        span(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_499, "999 kB"), (999_600, "1.0 MB"), (2.5e12, "2.5 TB")],
)
def test_sizes_are_told_for_people(count: float, text: str) -> None:
    assert human_size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0 s"), (59, "59 s"), (600, "10 min"), (7200, "2 h"), (3e6, "35 d")]
)
def test_ages_are_told_for_people(seconds: float, text: str) -> None:
    assert human_age(seconds) == text
