"""The survey of a plate: what its reference wells say, and nothing that other wells could shift."""

import json
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from diffex.errors import UserError
from diffex.fields import PlateSurvey
from diffex.layouts import open_screen
from diffex.plates import crop_side, survey_images, survey_plate, typical_diameter, unknown_survey
from diffex.screen import Cells, Illumination, Intensity, Read, Screen

CHANNELS = ("DNA", "tubulin", "actin")
Pairs = list[tuple[bool, NDArray]]


@pytest.fixture(scope="module")
def plate(screen: Path) -> Pairs:
    """Eight fields of one plate, those of DMSO as reference."""
    source = open_screen(screen, Read())
    here = source.metadata["Metadata_Plate"] == source.metadata["Metadata_Plate"][0]
    rows = np.flatnonzero(here)[:8].tolist()
    is_reference = source.metadata["Metadata_Compound"][rows] == "DMSO"
    return [(bool(r), image) for r, (_, image) in zip(is_reference, source.images(rows, 0), strict=True)]


def again(pairs: Pairs) -> Callable[[], Iterator[tuple[bool, NDArray]]]:
    return lambda: iter(pairs)


@pytest.fixture(scope="module")
def survey(plate: Pairs) -> PlateSurvey:
    return survey_plate(again(plate), CHANNELS, Screen())


def test_a_survey_survives_json(survey: PlateSurvey) -> None:
    assert PlateSurvey.from_dict(json.loads(json.dumps(survey.to_dict(), allow_nan=False))) == survey


def test_what_is_not_known_survives_json_too() -> None:
    blank = unknown_survey(CHANNELS)
    back = PlateSurvey.from_dict(json.loads(json.dumps(blank.to_dict(), allow_nan=False)))
    assert math.isnan(back.nucleus_diameter) and back.ceiling == math.inf
    assert np.isnan(back.window).all() and np.shape(back.window) == (3, 2)
    assert replace(back, nucleus_diameter=0.0).flat == blank.flat


def test_the_nuclei_of_the_simulated_screen_have_their_size(survey: PlateSurvey) -> None:
    # Cells of 64 px are 2.4 nuclei wide; the compound enlarges them somewhat.
    assert survey.nucleus_diameter == pytest.approx(64 / 2.4, rel=0.15)
    assert survey.nucleus_area == pytest.approx(math.pi * (survey.nucleus_diameter / 2) ** 2, rel=0.2)
    assert survey.fields == 8 and survey.reference_cells > 10
    assert crop_side([survey], Screen()) == 16 * math.ceil(2.5 * survey.nucleus_diameter / 16)


def test_the_window_follows_the_reference_fields_alone(plate: Pairs, survey: PlateSurvey) -> None:
    flat = Screen(illumination=Illumination(method="none"), cells=Cells(nucleus_diameter=26.0, crop=64))
    windows = []
    for gain in (1.0, 2.0):
        brighter = [(r, image if r else (np.minimum(image * gain, 60000)).astype(np.uint16)) for r, image in plate]
        windows.append(np.array(survey_plate(again(brighter), CHANNELS, flat).window))
    assert np.allclose(*windows, rtol=0.03, atol=30)
    reference = [(r, np.minimum(image * 2.0, 60000).astype(np.uint16)) for r, image in plate]
    doubled = np.array(survey_plate(again(reference), CHANNELS, flat).window)
    assert doubled[:, 1] == pytest.approx(2 * windows[0][:, 1], rel=0.05)


def test_few_reference_nuclei_say_nothing_of_a_plate(plate: Pairs, survey: PlateSurvey) -> None:
    """The typical nucleus is that of the reference wells where these show enough, that of all wells otherwise."""
    sizes = {}
    for references in (0, 1, len(plate)):
        where = [i < references for i in range(len(plate))]
        known = [(w, image) for w, (_, image) in zip(where, plate, strict=True)]
        how = Screen(cells=Cells(nucleus_diameter=survey.nucleus_diameter), intensity=Intensity(scale="none"))
        sizes[references] = survey_plate(again(known), CHANNELS, how).nucleus_area
    assert sizes[0] == sizes[1] == sizes[len(plate)]
    assert survey.nucleus_area != sizes[0]


def test_the_fields_of_a_plate_are_read_twice_and_one_at_a_time(plate: Pairs) -> None:
    rounds, alive = 0, []

    def fields() -> Iterator[tuple[bool, NDArray]]:
        nonlocal rounds
        rounds += 1
        for reference, image in plate[:3]:
            field = image.copy()
            alive.append(weakref.ref(field))
            assert sum(ref() is not None for ref in alive) <= 2  # the last one may still be named
            yield reference, field

    survey_plate(fields, CHANNELS, Screen(intensity=Intensity(scale="none")))
    assert rounds == 2


def test_debris_in_a_few_reference_cells_does_not_move_the_window(plate: Pairs, survey: PlateSurvey) -> None:
    dirty = []
    for i, (r, image) in enumerate(plate):
        image = image.copy()
        if i < 2:
            image[200:206, 200:206] = 50000  # a bright speck
        dirty.append((r, image))
    found = np.array(survey_plate(again(dirty), CHANNELS, Screen()).window)
    assert found[:, 1] == pytest.approx(np.array(survey.window)[:, 1], rel=0.15)


def test_a_plate_without_nuclei_is_known_by_its_nan(plate: Pairs) -> None:
    rng = np.random.default_rng(0)
    noise = [(True, rng.normal(300, 10, (128, 128, 3)).astype(np.uint16)) for _ in range(3)]
    found = survey_plate(again(noise), CHANNELS, Screen())
    assert math.isnan(found.nucleus_diameter) and found.nuclei == 0
    with pytest.raises(UserError, match=r"no nucleus was found on any plate: check cells\.nucleus_channel"):
        typical_diameter([found])


def test_nuclei_but_no_reference_cell_is_an_error_that_says_so(plate: Pairs) -> None:
    with pytest.raises(UserError, match=r"this plate: none of its 0 reference fields \(of 8 surveyed\) shows a cell"):
        survey_plate(again([(False, image) for _, image in plate]), CHANNELS, Screen(), "this plate")
    bare = survey_plate(again([(False, i) for _, i in plate]), CHANNELS, Screen(intensity=Intensity(scale="none")))
    assert np.isnan(bare.window).all() and bare.nuclei > 0


def test_no_field_and_no_channel_of_nuclei_are_told() -> None:
    with pytest.raises(UserError, match="plate 7: no field to survey"):
        survey_plate(again([]), CHANNELS, Screen(), "plate 7")
    with pytest.raises(UserError, match=r"none of the channels a, b is called DNA, .*cells\.nucleus_channel"):
        survey_plate(again([]), ("a", "b"), Screen())
    with pytest.raises(UserError, match=r"no channel 'DNS': did you mean 'DNA'\? \(cells\.nucleus_channel\)"):
        survey_plate(again([]), CHANNELS, Screen(cells=Cells(nucleus_channel="DNS")))


def test_single_cells_give_a_window_alone() -> None:
    rng = np.random.default_rng(0)
    images = [
        (i % 2 == 0, (rng.random((16, 16, 2)) * (100 if i % 2 == 0 else 900)).astype(np.float32)) for i in range(20)
    ]
    found = survey_images(images, ("DNA", "actin"), Screen(intensity=Intensity(low=0.0, high=100.0)))
    assert np.array(found.window)[:, 1] == pytest.approx(100.0, rel=0.02)
    assert np.array(found.window)[:, 0] == pytest.approx(0.0, abs=1.0)
    assert (found.fields, found.reference_fields) == (20, 10)
    with pytest.raises(UserError, match="none of the 20 images surveyed is a reference image"):
        survey_images([(False, i) for _, i in images], ("DNA", "actin"), Screen())
    with pytest.raises(UserError, match="channel 'actin' is constant in reference images"):
        survey_images([(True, i * np.array([1, 0])) for _, i in images], ("DNA", "actin"), Screen())
