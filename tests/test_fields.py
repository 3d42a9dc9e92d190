"""From raw fields to crops, against a simulated screen whose nuclei, factors, light and specks of dirt are known."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tifffile
from numpy.typing import NDArray
from scipy.stats import spearmanr

from diffex.cells import segment_nuclei
from diffex.data import ImageStore
from diffex.errors import UserError
from diffex.fields import PlateSurvey, check_field, correct, cut_cells, scaled
from diffex.illumination import EVEN, surface
from diffex.ingest import Summary
from diffex.layouts import open_screen
from diffex.screen import Intensity, Quality, Read, Screen

CHANNELS = ("DNA", "tubulin", "actin")
WELL = ["Metadata_Plate", "Metadata_Well", "Metadata_Site"]


@pytest.fixture(scope="module")
def truth(screen: Path) -> pd.DataFrame:
    """A row for each field: its pixels, its nuclei's true labels, and whether it is out of focus."""
    source = open_screen(screen, Read())
    table = pq.read_table(screen / "truth_fields.parquet").to_pandas()
    at = {
        (p, w, int(s)): row
        for row, (p, w, s) in enumerate(zip(*(source.metadata[n].tolist() for n in WELL), strict=True))
    }
    rows = [at[key] for key in table[WELL].itertuples(index=False, name=None)]
    table["pixels"] = [image for _, image in source.images(rows, 0)]
    table["labels"] = [tifffile.imread(screen / "truth" / f"{name}.tif") for name in table.Field]
    return table


@pytest.fixture(scope="module")
def surveys(fields: tuple[ImageStore, Summary]) -> dict[str, PlateSurvey]:
    record = fields[0].ingest_record()
    return {s["plate"]: PlateSurvey.from_dict({k: v for k, v in s.items() if k != "plate"}) for s in record["surveys"]}


@pytest.fixture(scope="module")
def matched(fields: tuple[ImageStore, Summary], profiles_table: Path, screen: Path) -> pd.DataFrame:
    """The crops with their features, each beside the truth of the cell that it is centred on."""
    crops = pd.read_parquet(profiles_table)
    crops["Metadata_Site"] = crops.Metadata_Site.astype(int)
    cells = pq.read_table(screen / "truth.parquet").to_pandas()
    pairs = crops.reset_index().merge(cells, on=WELL, suffixes=("", "_true"))
    y, x = pairs.y - pairs.Metadata_Nuclei_Location_Center_Y, pairs.x - pairs.Metadata_Nuclei_Location_Center_X
    pairs["distance"] = np.hypot(y, x)
    near = pairs.loc[pairs.groupby("index").distance.idxmin()]
    assert len(near) == len(crops)
    return near[near.distance < 6]


def overlap(a: NDArray, b: NDArray) -> NDArray[np.float64]:
    """Intersection over union of every label of a with every label of b; background left out."""
    names_a, a = np.unique(a, return_inverse=True)
    names_b, b = np.unique(b, return_inverse=True)
    both = np.zeros((len(names_a), len(names_b)))
    np.add.at(both, (a.ravel(), b.ravel()), 1)
    union = both.sum(axis=1)[:, None] + both.sum(axis=0)[None] - both
    return (both / union)[1:, 1:]


# ----------------------------------------------------------------------------------------------------------------------
# Against the truth


def test_nine_of_ten_nuclei_are_found_and_nine_of_ten_found_are_nuclei(
    truth: pd.DataFrame, surveys: dict[str, PlateSurvey]
) -> None:
    hits = planted = found = 0
    for field in truth[~truth.Out_of_focus].itertuples():
        survey = surveys[field.Metadata_Plate]
        labels = segment_nuclei(correct(field.pixels, survey, Screen())[0], survey.nucleus_diameter)
        match = overlap(field.labels, labels) >= 0.5
        hits += int(match.any(axis=1).sum())
        planted, found = planted + match.shape[0], found + match.shape[1]
    assert planted > 250
    assert hits / planted >= 0.9  # measured: 0.96
    assert hits / found >= 0.9  # measured: 0.97


def test_the_light_of_each_plate_is_found(screen: Path, surveys: dict[str, PlateSurvey]) -> None:
    for plate, survey in surveys.items():
        light = np.load(screen / "truth" / f"light_{plate}.npy")
        for c in range(len(CHANNELS)):
            true = light[c] / light[c].mean()
            left = surface(survey.flat[c], true.shape) / true
            assert np.std(left) < 0.04 and np.std(left) < 0.5 * np.std(true)


@pytest.mark.parametrize(
    ("true", "measured"),
    [
        ("Area", "Metadata_Nuclei_AreaShape_Area"),
        ("Nuclei", "Metadata_Cells_Children_Nuclei_Count"),
        ("Factor_nucleus_area", "Metadata_Nuclei_AreaShape_Area"),  # of cells with one nucleus; two share the area
        ("Factor_cytoplasm_area", "Cells_AreaShape_EquivalentDiameter"),
        ("Factor_microtubule_density", "Nuclei_Intensity_UpperQuartileIntensity_tubulin"),
        ("Factor_actin_rim", "Cells_RadialDistribution_MeanFrac_actin_4of4"),
    ],
)
def test_what_was_planted_can_be_measured_again(matched: pd.DataFrame, true: str, measured: str) -> None:
    cells = matched.assign(Area=(matched.Area_1.astype(float) + matched.Area_2) / matched.Nuclei)
    cells = cells[cells.Nuclei == 1] if true == "Factor_nucleus_area" else cells
    assert spearmanr(cells[true], cells[measured]).statistic >= 0.9


def test_crops_are_centred_on_cells(matched: pd.DataFrame, fields: tuple[ImageStore, Summary]) -> None:
    assert len(matched) / len(fields[0]) > 0.95
    assert matched.distance.median() < 1.0


def test_fields_out_of_focus_are_left_out_and_hardly_any_other(
    fields: tuple[ImageStore, Summary], truth: pd.DataFrame
) -> None:
    rejected = pq.read_table(fields[0].path / "rejected.parquet").to_pandas()
    blurred = {(p, w, int(s)) for p, w, s in rejected[rejected.Reason == "blurred field"][WELL].itertuples(index=False)}
    planted = set(truth[truth.Out_of_focus][WELL].itertuples(index=False, name=None))
    assert planted and planted <= blurred
    assert len(blurred - planted) <= 1


def test_saturated_cells_are_left_out_and_whole_clean_ones_are_kept(
    fields: tuple[ImageStore, Summary], screen: Path, matched: pd.DataFrame
) -> None:
    cells = pq.read_table(screen / "truth.parquet").to_pandas()
    cells = cells[~cells.Out_of_focus]
    kept = set(matched[[*WELL, "Cell"]].itertuples(index=False, name=None))
    is_kept = np.array([key in kept for key in cells[[*WELL, "Cell"]].itertuples(index=False, name=None)])
    assert is_kept[(cells.Saturated_share > 0.06).to_numpy()].mean() <= 0.1
    size = fields[0].info.size
    inside = (cells[["y", "x"]].min(axis=1) > size / 2 + 2) & (cells[["y", "x"]].max(axis=1) < 384 - size / 2 - 2)
    clean = inside & (cells.Saturated_share == 0) & (cells.Debris_share == 0)
    assert clean.sum() > 100
    assert is_kept[clean.to_numpy()].mean() >= 0.9


def test_debris_is_not_taken_for_cells(fields: tuple[ImageStore, Summary], truth: pd.DataFrame) -> None:
    rejected = pq.read_table(fields[0].path / "rejected.parquet").to_pandas()
    bright = rejected[rejected.Reason == "too bright: debris"]
    assert len(bright) >= 0.5 * truth.Debris.sum() > 0  # the rest lies on cells, or at the border


# ----------------------------------------------------------------------------------------------------------------------
# One field


def plain_survey(**known: Any) -> PlateSurvey:
    n = 2
    return PlateSurvey(**{
        "channels": ("DNA", "actin"), "dark": (0.0,) * n, "flat": (EVEN,) * n, "background": (np.nan,) * n,
        "background_spread": (np.nan,) * n, "ceiling": np.inf, "window": ((0.0, 100.0),) * n, "nucleus_diameter": 20.0,
        "nucleus_area": 314.0, "nucleus_brightness": 1000.0, "field_sharpness": 0.2, "cell_sharpness": 0.2,
        "fields": 1, "reference_fields": 1, "nuclei": 1, "reference_cells": 1, **known,
    })  # fmt: skip


def test_a_window_maps_its_ends_and_leaves_room_above() -> None:
    survey = plain_survey(window=((10.0, 110.0), (0.0, 50.0)))
    values = np.array([[10.0, 110.0, 160.0, 999.0, -5.0]] * 2, np.float32).reshape(1, 2, 1, 5)
    out = scaled(values, survey, Screen(intensity=Intensity(headroom=1.5)))
    assert out.dtype == np.uint16
    assert out[0, 0, 0].tolist() == [0, round(65535 / 1.5), 65535, 65535, 0]
    eight = scaled(values, survey, Screen(intensity=Intensity(headroom=1.5, dtype="uint8", transform="sqrt")))
    assert eight.dtype == np.uint8
    assert eight[0, 0, 0].tolist() == [0, round(255 * np.sqrt(1 / 1.5)), 255, 255, 0]


def test_dark_level_light_and_background_are_undone() -> None:
    planted = ((1.0, 0.2), (0.1, 0.0))
    rng = np.random.default_rng(0)
    cells = np.zeros((128, 128), np.float32)
    cells[40:60, 40:60] = cells[90:110, 20:40] = 1000.0
    light = surface(planted, (128, 128))
    raw = (100 + light * (cells + 50) + rng.normal(0, 1, cells.shape))[..., None].repeat(2, axis=2)
    survey = plain_survey(
        dark=(100.0, 100.0), flat=(planted, planted), background=(50.0, 50.0), background_spread=(1.0, 1.0)
    )
    out = correct(raw.astype(np.uint16), survey, Screen())
    assert np.abs(out[0] - cells).mean() < 3.0
    assert out[0][45:55, 45:55].mean() == pytest.approx(out[0][95:105, 25:35].mean(), rel=0.01)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_without_scaling_crops_keep_the_type_of_the_camera(truth: pd.DataFrame, kind: type) -> None:
    field = truth[~truth.Out_of_focus].iloc[0].pixels[..., :2]
    field = (field / 256 if kind is np.uint8 else field).astype(kind)
    survey = plain_survey(nucleus_diameter=26.0, nucleus_area=520.0)
    off = Quality(border=False, blur=0, saturation=0, debris=0, min_area=0, max_area=0, solidity=0)
    how = Screen(intensity=Intensity(scale="none"), quality=off)
    found = cut_cells(field, ("DNA", "actin"), survey, how, 64)
    assert found.images.dtype == kind
    assert found.images.shape == (len(found.columns["Nuclei_AreaShape_Area"]), 2, 64, 64)
    assert len(found.images) >= 8


def test_switching_the_rules_off_keeps_every_cell(truth: pd.DataFrame, surveys: dict[str, PlateSurvey]) -> None:
    field = truth[~truth.Out_of_focus].iloc[0]
    survey = surveys[field.Metadata_Plate]
    off = Quality(border=False, blur=0, saturation=0, debris=0, min_area=0, max_area=0, solidity=0)
    strict, lax = (cut_cells(field.pixels, CHANNELS, survey, Screen(quality=q), 64) for q in (Quality(), off))
    assert len(lax.rejected["Reason"]) == 0
    assert len(lax.images) == len(strict.images) + len(strict.rejected["Reason"]) > len(strict.images)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda f: f[..., :2], "384 x 384 x 2 pixels, but 3 channels are expected: DNA, tubulin, actin"),
        (lambda f: np.where(f == f.max(), np.nan, f.astype(np.float32)), "NaN or infinite pixels"),
        (lambda f: f * np.array([1, 0, 1], np.uint16), r"channel 'tubulin' is constant \(all pixels 0\)"),
        (lambda f: f[:0], "no pixels"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(truth: pd.DataFrame, change: Any, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        check_field(change(truth.iloc[0].pixels), CHANNELS, "this field")
    assert str(error.value).startswith("this field: ")


def test_a_field_smaller_than_a_crop_or_of_a_plate_without_a_window_is_named(
    truth: pd.DataFrame, surveys: dict[str, PlateSurvey]
) -> None:
    field = truth[~truth.Out_of_focus].iloc[0]
    survey = surveys[field.Metadata_Plate]
    with pytest.raises(UserError, match=r"a field of 384 x 384 pixels is smaller than one crop of 512 \(cells.crop\)"):
        cut_cells(field.pixels, CHANNELS, survey, Screen(), 512)
    blind = replace(survey, window=((np.nan, np.nan),) * 3)
    with pytest.raises(UserError, match="its plate shows no reference cell"):
        cut_cells(field.pixels, CHANNELS, blind, Screen(), 64)
