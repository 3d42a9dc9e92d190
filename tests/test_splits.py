"""Splits: whole units only, every class in every part, in the shares asked for of images and of units."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffex.splits import PARTS, group_ids, split, split_columns, unit_name, unit_noun, unsplit_class

SHARES = {"valid_fraction": 0.15, "test_fraction": 0.20}


@given(sizes=st.lists(st.integers(1, 400), min_size=6, max_size=60), classes=st.integers(1, 4), seed=st.integers(0, 99))
def test_no_unit_lies_in_two_parts_whatever_their_sizes(sizes: list[int], classes: int, seed: int) -> None:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    parts = split(groups, groups % classes, seed=seed, **SHARES)
    assert all(len(np.unique(parts[groups == g])) == 1 for g in range(len(sizes)))
    assert set(parts.tolist()) <= set(range(len(PARTS)))


@given(sizes=st.lists(st.integers(1, 400), min_size=9, max_size=60), seed=st.integers(0, 99))
def test_a_class_of_three_units_or_more_is_in_every_part(sizes: list[int], seed: int) -> None:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    classes = groups % 3
    assert unsplit_class(split(groups, classes, seed=seed, **SHARES), groups, classes) is None


@pytest.mark.parametrize("seed", range(5))
def test_one_huge_unit_does_not_stand_for_a_whole_part(seed: int) -> None:
    # As in a public screen: one well holds a fifth of all cells, more than validation and test are to get.
    sizes = np.array([900, *[60] * 49])
    groups = np.repeat(np.arange(50), sizes)
    parts = split(groups, np.zeros(len(groups), np.int64), seed=seed, **SHARES)
    units = np.bincount(parts[np.unique(groups, return_index=True)[1]], minlength=3)
    images = np.bincount(parts, minlength=3) / len(parts)
    assert (units[1:] >= 5).all()
    assert np.abs(images - [0.65, 0.15, 0.20]).max() < 0.08


def test_units_that_hold_several_classes_leave_no_class_out_of_a_part() -> None:
    # As in a movie of many phenotypes: rare classes lie in few units, beside common ones.
    rng = np.random.default_rng(0)
    groups, classes = [], []
    for g in range(60):
        for c, share in enumerate((1.0, 0.5, 0.2, 0.08)):
            if rng.random() < share or g < 3:
                count = int(rng.integers(1, 40))
                groups += [g] * count
                classes += [c] * count
    found, named = np.array(groups), np.array(classes)
    for seed in range(20):
        assert unsplit_class(split(found, named, seed=seed, **SHARES), found, named) is None


def test_a_split_is_the_same_again_and_another_with_another_seed() -> None:
    groups = np.repeat(np.arange(40), 5)
    same = [split(groups, groups % 2, seed=s, **SHARES).tolist() for s in (1, 1, 2)]
    assert same[0] == same[1] != same[2]


def test_rows_that_agree_in_every_column_are_one_group() -> None:
    plate, well = np.array(["a", "a", "b", "b"]), np.array(["C1", "C1", "C1", "C2"])
    assert group_ids({"Metadata_Plate": plate, "Metadata_Well": well}).tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (("Metadata_Plate", "Metadata_Well", "Metadata_Site"), ("Metadata_Plate", "Metadata_Well")),
        (("Metadata_Site", "Metadata_Donor"), ("Metadata_Donor",)),
        (("Metadata_plate", "Metadata_well"), ("Metadata_plate", "Metadata_well")),
        (("Metadata_Dose",), ()),
    ],
)
def test_auto_takes_the_unit_that_a_statistician_would(columns: tuple[str, ...], found: tuple[str, ...]) -> None:
    assert split_columns(("auto",), columns, "screen", "split.by") == found


def test_a_unit_is_called_by_its_column() -> None:
    both = ("Metadata_Plate", "Metadata_Well")
    assert (unit_name(both), unit_noun(both), unit_noun(both, 1)) == ("Plate and Well", "wells", "well")
    assert (unit_name(()), unit_noun(())) == ("image", "images")
