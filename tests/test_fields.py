"""From raw fields to crops, against a simulated screen whose nuclei, factors, light and specks of dirt are known."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tifffile
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter, minimum_filter
from scipy.stats import spearmanr

from diffex.cells import segment_nuclei
from diffex.config import Assay
from diffex.data import ImageStore
from diffex.errors import UserError
from diffex.fields import (
    CENTRE,
    PlateSurvey,
    check_field,
    correct,
    corrected_levels,
    cut_cells,
    cut_out,
    field_verdict,
    object_verdicts,
    scaled,
)
from diffex.illumination import EVEN, surface
from diffex.ingest import Summary
from diffex.layouts import open_screen
from diffex.plates import survey_plate
from diffex.screen import Illumination, Intensity, Quality, Read, Screen
from diffex.simulate import write_screen

CHANNELS = ("DNA", "tubulin", "actin")
WELL = ["Metadata_Plate", "Metadata_Well", "Metadata_Site"]


@pytest.fixture(scope="module")
def truth(screen: Path) -> pd.DataFrame:
    return fields_of(screen)


def fields_of(screen: Path) -> pd.DataFrame:
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


@pytest.mark.parametrize(
    ("factor", "measured", "least"),
    [
        # A cell's shape, where no neighbour lies on its outline (measured: 0.95; 0.73 among all cells).
        ("cell_elongation", "Cells_AreaShape_AspectRatio", 0.9),
        # A nucleus shows few of the random grains and stripes whose contrast these set (measured: 0.89 and 0.73).
        ("chromatin_texture", "Nuclei_Texture_Entropy_DNA_3", 0.8),
        ("actin_fibres", "Cells_RadialDistribution_RadialCV_actin_2of4", 0.6),
    ],
)
def test_what_pixels_tell_of_the_other_factors_is_measured_in_cells_that_stand_alone(
    matched: pd.DataFrame, factor: str, measured: str, least: float
) -> None:
    alone = matched[~matched.Touches]
    assert len(alone) > 60
    assert spearmanr(alone[f"Factor_{factor}"], alone[measured]).statistic >= least


def test_nuclei_are_counted_on_crops_as_in_their_fields(matched: pd.DataFrame) -> None:
    """Neighbours' nuclei, which crops cut off, are not the cell's."""
    assert set(matched.Nuclei) == {1, 2}
    for counted in ("Cells_Children_Nuclei_Count", "Metadata_Cells_Children_Nuclei_Count"):
        assert (matched[counted] == matched.Nuclei).mean() >= 0.97  # measured: 1.00 and 0.99


def test_nuclei_that_all_but_touch_are_found_one_by_one(truth: pd.DataFrame, surveys: dict[str, PlateSurvey]) -> None:
    near = found = 0
    for field in truth[~truth.Out_of_focus].itertuples():
        survey = surveys[field.Metadata_Plate]
        labels = segment_nuclei(correct(field.pixels, survey, Screen())[0], survey.nucleus_diameter)
        owner = (field.labels.astype(int) + 1) // 2
        beside = maximum_filter(owner, 7), minimum_filter(np.where(owner, owner, owner.max() + 1), 7)
        meets = np.unique(field.labels[(owner > 0) & ((beside[0] != owner) | (beside[1] != owner))])
        hit = (overlap(field.labels, labels) >= 0.5).any(axis=1)
        near += len(meets)
        found += int(hit[np.searchsorted(np.unique(field.labels)[1:], meets)].sum())
    assert near > 30
    assert found / near >= 0.85  # measured: 48 of 50


@pytest.mark.parametrize(
    ("turn", "back"),
    [
        (lambda p: np.rot90(p), lambda p: np.rot90(p, -1)), (lambda p: p[:, ::-1], lambda p: p[:, ::-1]),
        (lambda p: p[::-1], lambda p: p[::-1]), (lambda p: 2.5 * p + 700, lambda p: p),
    ],
    ids=["turned", "left to right", "upside down", "gain and offset"],
)  # fmt: skip
def test_a_field_has_the_same_nuclei_whichever_way_it_is_imaged(
    truth: pd.DataFrame, surveys: dict[str, PlateSurvey], turn: Callable[..., NDArray], back: Callable[..., NDArray]
) -> None:
    for field in truth[~truth.Out_of_focus].iloc[::7].itertuples():
        survey = surveys[field.Metadata_Plate]
        dna = correct(field.pixels, survey, Screen())[0]
        labels = segment_nuclei(dna, survey.nucleus_diameter)
        other = back(segment_nuclei(np.ascontiguousarray(turn(dna)), survey.nucleus_diameter))
        match = overlap(labels, other)
        assert match.shape[0] == match.shape[1] == labels.max() > 5
        assert match.max(axis=1).min() > 0.97


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


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A plate full of defects: its planted cells, its specks in fields in focus, and what became of each.

    ``Reason`` is "" for what was kept and "nothing" where no object was found.
    """
    folder = tmp_path_factory.mktemp("spoiled") / "screen"
    write_screen(
        Assay(design="null", num_plates=1, wells_per_class=4, seed=5), CHANNELS, folder, field_size=(384, 384),
        cells_per_field=14, fields_per_well=2, out_of_focus=0.25, saturated=0.15, debris_per_field=2.0,
    )  # fmt: skip
    truth, cells = fields_of(folder), pq.read_table(folder / "truth.parquet").to_pandas()
    survey = survey_plate(lambda: ((True, image) for image in truth.pixels), CHANNELS, Screen())
    specks = []
    for field in truth.itertuples():
        found = cut_cells(field.pixels, CHANNELS, survey, Screen(), 64)
        kept = pd.DataFrame({c: found.columns[c] for c in CENTRE}).assign(Reason="")
        objects = pd.concat([kept, pd.DataFrame(found.rejected)], ignore_index=True)

        def became(y: float, x: float, reach: float, objects: pd.DataFrame = objects) -> str:
            away = np.hypot(objects[CENTRE[0]] - y, objects[CENTRE[1]] - x)
            return str(objects.Reason[away.argmin()]) if away.min() < reach else "nothing"

        here = cells.Field == field.Field
        if field.Out_of_focus:
            cells.loc[here, "Reason"] = str(objects.Reason[0])
            continue
        cells.loc[here, "Reason"] = [became(y, x, 6.0) for y, x in cells.loc[here, ["y", "x"]].values]
        dirt = zip(field.Debris_y, field.Debris_x, field.Debris_radius, strict=True)
        specks += [(y, x, became(y, x, radius)) for y, x, radius in dirt]
    return cells, pd.DataFrame(specks, columns=["y", "x", "Reason"])


def test_every_defect_is_left_out_for_its_own_reason(spoiled: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    cells, _ = spoiled
    assert cells.Out_of_focus.sum() >= 28
    assert set(cells.Reason[cells.Out_of_focus]) == {"blurred field"}
    sharp = cells[~cells.Out_of_focus]
    assert set(sharp.Reason[sharp.Border]) == {"border", "nothing"}  # nothing: hardly any of it is to be seen
    full = sharp.Reason[~sharp.Border & (sharp.Saturated_share > 0.02)]
    assert len(full) > 20 and "" not in set(full)
    assert (full == "saturated").mean() > 0.8


def test_good_cells_are_hardly_ever_left_out(spoiled: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    cells, _ = spoiled
    good = ~cells.Out_of_focus & ~cells.Border & (cells.Saturated_share == 0) & (cells.Debris_share == 0)
    assert good.sum() > 50
    assert (cells.Reason[good] != "").mean() <= 0.06


def test_no_speck_of_dirt_is_taken_for_a_cell(spoiled: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    _, specks = spoiled
    inside = specks[(specks[["y", "x"]].min(axis=1) > 36) & (specks[["y", "x"]].max(axis=1) < 384 - 36)]
    reasons = Counter(inside.Reason)
    assert len(inside) > 10
    assert "" not in set(specks.Reason)
    assert reasons["too bright: debris"] > 0.6 * len(inside), reasons  # others lie on burnt cells


# ----------------------------------------------------------------------------------------------------------------------
# Rules, one by one

FINE = {
    "Nuclei_AreaShape_Area": 314.0, "Nuclei_AreaShape_Solidity": 0.95, "Nuclei_Intensity_Brightness": 1000.0,
    "Nuclei_Quality_Sharpness": 0.2, "Cells_Quality_Saturated": 0.0, "Cells_Quality_Outside": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("column", "value", "reason", "measured", "limit", "off"),
    [
        ("Cells_Quality_Outside", 3.0, "border", 3.0, 0.0, {"border": False}),
        ("Cells_Quality_Saturated", 0.05, "saturated", 0.05, 0.02, {"saturation": 0.0}),
        ("Nuclei_Intensity_Brightness", 3500.0, "too bright: debris", 3.5, 3.0, {"debris": 0.0}),
        ("Nuclei_AreaShape_Area", 31.4, "too small", 0.1, 0.3, {"min_area": 0.0}),
        ("Nuclei_AreaShape_Area", 1570.0, "too large", 5.0, 4.0, {"max_area": 0.0}),
        ("Nuclei_AreaShape_Solidity", 0.7, "irregular", 0.7, 0.8, {"solidity": 0.0}),
        ("Nuclei_Quality_Sharpness", 0.02, "blurred", 0.1, 0.3, {"blur": 0.0}),
    ],
)
def test_a_broken_rule_is_told_with_value_and_limit_and_can_be_switched_off(
    column: str, value: float, reason: str, measured: float, limit: float, off: dict[str, Any]
) -> None:
    objects = {name: np.array([fine, value if name == column else fine]) for name, fine in FINE.items()}
    reasons, values, limits = object_verdicts(objects, plain_survey(), Quality())
    assert reasons.tolist() == ["", reason]
    assert (values[1], limits[1]) == pytest.approx((measured, limit))
    assert np.isnan(values[0]) and np.isnan(limits[0])
    assert object_verdicts(objects, plain_survey(), Quality(**off))[0].tolist() == ["", ""]


def test_the_first_rule_that_is_broken_gives_the_reason() -> None:
    worst = {"Nuclei_Quality_Sharpness": 0.0, "Cells_Quality_Saturated": 1.0, "Cells_Quality_Outside": 9.0}
    objects = {name: np.array([worst.get(name, fine)]) for name, fine in FINE.items()}
    rules = ({}, {"border": False}, {"border": False, "saturation": 0.0})
    reasons = [object_verdicts(objects, plain_survey(), Quality(**rule))[0][0] for rule in rules]
    assert reasons == ["border", "saturated", "blurred"]


def test_a_field_is_blurred_by_its_median_cell_and_empty_without_any() -> None:
    def verdict(sharpness: list[float], **quality: float) -> Any:
        return field_verdict({"Nuclei_Quality_Sharpness": np.array(sharpness)}, plain_survey(), Quality(**quality))

    assert verdict([0.2, 0.2, 0.01]) is None
    assert verdict([0.02, 0.02, 0.2]) == ("blurred field", pytest.approx(0.1), 0.3)
    assert verdict([0.02], blur=0.0) is None
    assert verdict([])[0] == "empty field"


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


def test_a_nucleus_that_the_border_cuts_is_left_out_however_small_the_crop(
    truth: pd.DataFrame, surveys: dict[str, PlateSurvey]
) -> None:
    alone = Quality(blur=0, saturation=0, debris=0, min_area=0, max_area=0, solidity=0)
    cut = 0
    for field in truth[~truth.Out_of_focus].iloc[:6].itertuples():
        found = cut_cells(field.pixels, CHANNELS, surveys[field.Metadata_Plate], Screen(quality=alone), 8)
        labels = field.labels
        border = set(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]).tolist()) - {0}
        rows, columns = (np.rint(found.columns[c]).astype(int) for c in CENTRE)
        assert not border & set(labels[rows, columns].tolist())
        assert set(found.rejected["Reason"]) <= {"border"}
        away = [np.minimum(c, 383 - c) for c in (found.rejected[name] for name in CENTRE)]
        cut += int((np.minimum(*away) >= 4).sum())  # whose crops themselves lie in the field
    assert cut > 3


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


@pytest.mark.parametrize("how", ["none", "field", "local"])
def test_the_background_is_subtracted_as_asked(how: str) -> None:
    rng = np.random.default_rng(0)
    slope = np.linspace(0, 100, 512)[None, :, None] * np.ones((512, 1, 2))
    raw = (200 + slope + rng.normal(0, 2, slope.shape)).astype(np.float32)
    raw[100:118, 100:118] += 1000
    survey = plain_survey(nucleus_diameter=18.0, background=(225.0, 225.0), background_spread=(100.0, 100.0))
    out, levels = corrected_levels(raw, survey, Screen(illumination=Illumination(background=how)))
    ground = out[0, 200:, 20:-20].mean(axis=0)
    if how == "none":
        assert ground.min() > 190 and levels[0] == pytest.approx(205, abs=5)
    else:
        assert np.ptp(ground) == pytest.approx(92, abs=8) if how == "field" else np.ptp(ground) < 25
        assert abs(np.percentile(ground, 5)) < 8


def test_where_cells_cover_a_field_the_background_of_the_plate_stands_in() -> None:
    covered = np.full((128, 128, 2), 900.0, np.float32)
    survey = plain_survey(background=(100.0, np.nan), background_spread=(10.0, np.nan))
    out = correct(covered, survey, Screen())
    assert np.allclose(out[0], 900 - 130)  # three spreads above the plate's own
    assert np.allclose(out[1], 0)  # nothing is known: the field's own level


def test_crops_are_cut_around_their_centres_with_background_beyond_the_field() -> None:
    plane = np.arange(40 * 50, dtype=np.float32).reshape(1, 40, 50) + 1
    at = {CENTRE[0]: np.array([20.0, 19.4, 0.0, 39.0]), CENTRE[1]: np.array([30.0, 30.4, 0.0, 49.0])}
    crops = cut_out(plane, at, 8)
    assert crops.shape == (4, 1, 8, 8)
    assert (crops[0, 0] == plane[0, 16:24, 26:34]).all()
    assert (crops[1, 0] == plane[0, 15:23, 26:34]).all()  # the nearest pixel is in the middle
    assert not crops[2, 0, :4].any() and not crops[2, 0, :, :4].any()
    assert (crops[2, 0, 4:, 4:] == plane[0, :4, :4]).all()
    assert (crops[3, 0, :5, :5] == plane[0, 35:, 45:]).all() and not crops[3, 0, 5:].any()
    assert cut_out(plane, {c: np.zeros(0) for c in CENTRE}, 8).shape == (0, 1, 8, 8)
