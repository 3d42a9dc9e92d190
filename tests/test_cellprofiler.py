"""The full feature set: named as CellProfiler names it, equal to the core set and to formulas, unbreakable."""

import sys
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pycytominer
import pytest
from numpy.typing import NDArray
from pycytominer.cyto_utils import infer_cp_features, load_profiles
from scipy import ndimage
from skimage import feature

from diffex import cellprofiler
from diffex.assay import draw, plan
from diffex.cellprofiler import measure_full
from diffex.cells import compartments
from diffex.cli import main
from diffex.config import Assay, Data
from diffex.data import ImageStore
from diffex.errors import UserError
from diffex.features import measure, measure_many
from diffex.prepare import build_store
from diffex.profiles import write_profiles

CHANNELS = ("DNA", "tubulin", "actin")
NUCLEI = "Cells_Children_Nuclei_Count"


@pytest.fixture
def full() -> Iterator[Callable[..., dict[str, float]]]:
    """The function under test where its library is; no warning may leave it."""
    pytest.importorskip("cp_measure", reason="the full feature set needs diffex[cells]")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield measure_full


@lru_cache(maxsize=1)
def cells() -> NDArray[np.float32]:
    """Simulated cells (12, 3, 48, 48) from 0 to 1, some with two nuclei, some cut off by the border."""
    treated = {"binucleate": {"nucleus_count": 3.0}}
    screen = plan(treatments=treated, channels=CHANNELS, num_images=12, num_plates=1)
    return np.concatenate(list(draw(screen, 48))).astype(np.float32) / 255


def masks(image: NDArray) -> dict[str, NDArray[np.bool_]]:
    return compartments(image, CHANNELS, None, None, 0.0)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Names


def test_every_family_of_cellprofiler_is_there_under_its_name(full: Callable[..., dict[str, float]]) -> None:
    names = set(full(cells()[0], CHANNELS, background=0.0))
    for part in ("Nuclei", "Cells", "Cytoplasm"):
        assert {
            f"{part}_{name}"
            for name in (
                "AreaShape_Area", "AreaShape_Zernike_9_9", "AreaShape_MinFeretDiameter", "AreaShape_HuMoment_6",
                "AreaShape_NormalizedMoment_3_3", "Intensity_MassDisplacement_actin", "Intensity_MaxIntensityEdge_DNA",
                "Location_CenterMassIntensity_X_DNA", "Location_MaxIntensity_Y_actin",
                "Texture_Contrast_actin_3_00_256", "Texture_InfoMeas2_DNA_3_03_256", "Granularity_16_tubulin",
                "RadialDistribution_FracAtD_actin_4of4", "RadialDistribution_ZernikePhase_DNA_9_1",
                "Correlation_Correlation_DNA_actin", "Correlation_Slope_DNA_tubulin", "Correlation_Overlap_DNA_actin",
                "Correlation_K_actin_DNA", "Correlation_Manders_actin_tubulin", "Correlation_RWC_tubulin_actin",
                "Correlation_Costes_DNA_actin",
            )
        } <= names, part  # fmt: skip
    assert "Cells_Correlation_Correlation_actin_DNA" not in names  # symmetric ones once, in the channels' order
    assert not [name for name in names if "Pearson" in name or (name.endswith(("_1", "_2")) and "Correlation_" in name)]
    shares = {part: sum(name.startswith(f"{part}_") for name in names) for part in ("Nuclei", "Cells", "Cytoplasm")}
    assert shares["Nuclei"] == shares["Cytoplasm"] == shares["Cells"] - 1  # the number of nuclei


def test_every_image_of_the_same_channels_has_the_same_names(full: Callable[..., dict[str, float]]) -> None:
    images = [*cells()[:2], np.zeros((3, 48, 48)), np.ones((3, 48, 48))]
    assert len({tuple(full(image, CHANNELS)) for image in images}) == 1


def test_names_follow_the_channels(full: Callable[..., dict[str, float]]) -> None:
    named = full(cells()[0], CHANNELS, background=0.0)
    told = full(cells()[0], ("DNA", "b", "w3"), background=0.0)
    assert list(told.values()) == pytest.approx(list(named.values()), nan_ok=True)
    assert list(told) == [name.replace("tubulin", "b").replace("actin", "w3") for name in named]


# ----------------------------------------------------------------------------------------------------------------------
# Values

EQUAL = (
    "Children", "Correlation_Correlation", "Intensity", *(f"AreaShape_{name}" for name in (
        "Area", "Perimeter", "Eccentricity", "Solidity", "Extent", "MajorAxisLength", "MinorAxisLength",
        "EquivalentDiameter", "FormFactor",
    )),
)  # fmt: skip
SIMILAR = ("AreaShape_MaxFeretDiameter", "AreaShape_MaximumRadius", "AreaShape_MeanRadius")
OWN = ("Granularity", "RadialDistribution")  # of the core set: other definitions under the same names


def test_both_sets_agree_on_what_they_define_alike(full: Callable[..., dict[str, float]]) -> None:
    core, whole = (measure_many(cells(), CHANNELS, background=0.0, full=f) for f in (False, True))
    shared = core.keys() & whole.keys()
    kinds = {name: name.partition("_")[2] for name in shared}
    equal = {name for name in shared if kinds[name].startswith(EQUAL)}
    assert len(equal) == 1 + 3 * (9 + 11 * 3 + 3)
    for name in sorted(equal):
        assert np.allclose(core[name], whole[name], rtol=1e-9, atol=1e-12, equal_nan=True), name
    assert {name for name in shared if not kinds[name].startswith((*EQUAL, *SIMILAR, *OWN))} == set()


def test_diameters_and_radii_differ_only_by_the_outline_and_the_border(full: Callable[..., dict[str, float]]) -> None:
    """The core set measures from pixels' edges, CellProfiler from their centres; and to it, the border ends a cell."""
    inside = 0
    for image in cells():
        core, whole, parts = (
            measure(image, CHANNELS, background=0.0),
            full(image, CHANNELS, background=0.0),
            masks(image),
        )
        for part, mask in parts.items():
            gap = core[f"{part}_AreaShape_MaxFeretDiameter"] - whole[f"{part}_AreaShape_MaxFeretDiameter"]
            assert 0 <= gap <= 2
            for radius in (f"{part}_AreaShape_MaximumRadius", f"{part}_AreaShape_MeanRadius"):
                if np.pad(mask[1:-1, 1:-1], 1).sum() == mask.sum():
                    assert core[radius] == pytest.approx(whole[radius], rel=1e-6)
                    inside += 1
                else:
                    assert core[radius] >= whole[radius] - 1e-6
    assert inside > 12


def test_texture_is_haralicks_of_neighbours_in_the_named_direction(full: Callable[..., dict[str, float]]) -> None:
    image = cells()[1]
    found, mask = full(image, CHANNELS, background=0.0), masks(image)["Cells"]
    grey = np.where(mask, np.rint(image[2] * 255), 0).astype(np.uint8)
    # Right, lower right, down, lower left; scikit-image's distances are lengths, CellProfiler's count pixels.
    straight = feature.graycomatrix(grey, [3], [0, np.pi / 2], symmetric=True)[1:, 1:]
    oblique = feature.graycomatrix(grey, [3 * np.sqrt(2)], [np.pi / 4, 3 * np.pi / 4], symmetric=True)[1:, 1:]
    pairs = np.concatenate([straight, oblique], axis=3)[..., [0, 2, 1, 3]]
    for kind, name in (("Contrast", "contrast"), ("AngularSecondMoment", "ASM"), ("Correlation", "correlation"),
                       ("InverseDifferenceMoment", "homogeneity")):  # fmt: skip
        expected = feature.graycoprops(pairs, name)[0]
        named = [found[f"Cells_Texture_{kind}_actin_3_{direction:02}_256"] for direction in range(4)]
        assert named == pytest.approx(expected, rel=1e-6), kind
        assert np.ptp(expected) > 0  # so that directions could be mixed up


def test_colocalisation_names_the_channel_it_is_a_share_of_first(full: Callable[..., dict[str, float]]) -> None:
    image = cells()[1].astype(np.float64)
    found, mask = full(image, CHANNELS, background=0.0), masks(image.astype(np.float32))["Cells"]
    a, b = image[1][mask], image[2][mask]
    bright_a, bright_b = a >= 0.15 * a.max(), b >= 0.15 * b.max()
    both = bright_a & bright_b
    expected = {
        "Manders_tubulin_actin": a[both].sum() / a[bright_a].sum(),
        "Manders_actin_tubulin": b[both].sum() / b[bright_b].sum(),
        "K_tubulin_actin": (a * b)[both].sum() / (a * a)[both].sum(),
        "K_actin_tubulin": (a * b)[both].sum() / (b * b)[both].sum(),
        "Overlap_tubulin_actin": (a * b)[both].sum() / np.sqrt((a * a)[both].sum() * (b * b)[both].sum()),
        "Slope_tubulin_actin": np.polyfit(a, b, 1)[0],
    }
    for name, value in expected.items():
        assert found[f"Cells_Correlation_{name}"] == pytest.approx(value, rel=1e-5), name
    assert expected["Manders_tubulin_actin"] != pytest.approx(expected["Manders_actin_tubulin"], rel=1e-3)


def test_places_moments_and_fractions_are_those_of_the_formulas(full: Callable[..., dict[str, float]]) -> None:
    image = cells()[1]
    found, mask = full(image, CHANNELS, background=0.0), masks(image)["Cells"]
    y, x = ndimage.center_of_mass(image[2].astype(np.float64), mask, 1)
    assert found["Cells_Location_CenterMassIntensity_X_actin"] == pytest.approx(x, rel=1e-6)
    assert found["Cells_Location_CenterMassIntensity_Y_actin"] == pytest.approx(y, rel=1e-6)
    middle = ndimage.center_of_mass(mask)
    assert found["Cells_Intensity_MassDisplacement_actin"] == pytest.approx(np.hypot(y - middle[0], x - middle[1]))
    mean = found["Cells_Intensity_MeanIntensity_actin"]  # the moment of order 0 is the mean
    assert found["Cells_RadialDistribution_ZernikeMagnitude_actin_0_0"] == pytest.approx(mean, rel=1e-6)
    rings = [found[f"Cells_RadialDistribution_FracAtD_actin_{k}of4"] for k in range(1, 5)]
    assert sum(rings) == pytest.approx(1.0, abs=1e-6)


def test_fine_grains_are_granular_at_a_small_scale(full: Callable[..., dict[str, float]]) -> None:
    y, x = np.indices((48, 48)) - 23.5
    nucleus, body = np.hypot(y, x) < 6, np.hypot(y, x) < 18
    grains = [(0.2 + 0.6 * (np.maximum(y % step, x % step) < step / 2)) * body for step in (4, 10)]
    found = [full(np.stack([0.8 * nucleus, g]), ("DNA", "actin"), background=0.0, cell_channel="actin") for g in grains]
    scale = np.arange(1, 17)
    shares = [[f[f"Cells_Granularity_{k}_actin"] for k in scale] for f in found]  # percent of the light
    fine, coarse = (float(np.average(scale, weights=share)) for share in shares)
    assert fine < coarse - 0.5
    assert all(0 < sum(share) <= 100.1 for share in shares)


def test_nuclei_of_one_cell_are_one_object(full: Callable[..., dict[str, float]]) -> None:
    counts = []
    for image in cells():
        found = full(image, CHANNELS, background=0.0)
        counts.append(found[NUCLEI])
        assert found["Nuclei_AreaShape_Area"] == masks(image)["Nuclei"].sum()
        assert found["Nuclei_AreaShape_EulerNumber"] <= found[NUCLEI]
    assert {1.0, 2.0} <= set(counts)


# ----------------------------------------------------------------------------------------------------------------------
# What isn't there


def test_without_a_nucleus_its_features_are_missing_and_the_cell_is_measured(
    full: Callable[..., dict[str, float]],
) -> None:
    image = cells()[1].copy()
    image[0] = 0.0
    found = full(image, CHANNELS, background=0.0)
    assert found[NUCLEI] == 0
    assert all(np.isnan(v) for n, v in found.items() if n.startswith(("Nuclei_", "Cytoplasm_")))
    assert found["Cells_AreaShape_Area"] > 100
    assert np.isfinite(found["Cells_Correlation_Manders_tubulin_actin"])
    assert np.isnan(found["Cells_Correlation_Manders_DNA_actin"])  # a black channel overlaps with nothing
    assert {n.split("_")[0] for n in full(image[1:], CHANNELS[1:])} == {"Cells"}


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_an_empty_image_has_no_feature_at_all(full: Callable[..., dict[str, float]], value: float) -> None:
    found = full(np.full((3, 32, 32), value, np.float32), CHANNELS)
    assert found.pop(NUCLEI) == 0
    assert np.isnan(list(found.values())).all()


TINY = {
    "a row": np.s_[5, 5:8],
    "a column": np.s_[5:8, 5],
    "a diagonal": ([4, 5, 6], [4, 5, 6]),
    "scattered pixels": ([0, 10, 20], [3, 14, 7]),
    "the border": np.s_[0, :],
    "a corner": np.s_[:2, :2],
    "everything": np.s_[:, :],
}


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("light", ["noise", "constant", "black", "one pixel"])
def test_no_mask_and_no_light_breaks_a_measurement(
    full: Callable[..., dict[str, float]], monkeypatch: pytest.MonkeyPatch, kind: str, light: str
) -> None:
    mask = np.zeros((32, 32), bool)
    mask[TINY[kind]] = True
    image = np.random.default_rng(0).random((2, 32, 32))
    image[1] = {"noise": image[1], "constant": 0.5, "black": 0.0, "one pixel": np.arange(1024).reshape(32, 32) == 165}[
        light
    ]
    monkeypatch.setattr(cellprofiler, "compartments", lambda *_: ({"Cells": mask}, None))
    found = full(image, ("a", "b"))
    assert found["Cells_AreaShape_Area"] == mask.sum()
    assert found["Cells_Intensity_MeanIntensity_b"] == pytest.approx(image[1][mask].mean(), abs=1e-6)
    assert not np.isinf(list(found.values())).any()


@pytest.mark.parametrize("pixels", [0, 1, 2])
def test_fewer_than_three_pixels_are_no_object(
    full: Callable[..., dict[str, float]], monkeypatch: pytest.MonkeyPatch, pixels: int
) -> None:
    mask = np.zeros((32, 32), bool)
    mask[5, 5 : 5 + pixels] = True
    monkeypatch.setattr(cellprofiler, "compartments", lambda *_: ({"Cells": mask}, None))
    assert np.isnan(list(full(np.full((2, 32, 32), 0.5), ("a", "b")).values())).all()


# ----------------------------------------------------------------------------------------------------------------------
# Users


@pytest.mark.parametrize("image", [cells()[0] * 255, cells()[0] * 2 - 1, np.full((3, 32, 32), np.nan)])
def test_intensities_of_another_scale_are_refused(full: Callable[..., dict[str, float]], image: NDArray) -> None:
    with pytest.raises(UserError, match="intensities from 0 to 1, got .*; scale the image first"):
        full(image, CHANNELS)


def test_a_channel_that_is_not_there_names_the_nearest(full: Callable[..., dict[str, float]]) -> None:
    with pytest.raises(UserError, match="no channel 'actn': did you mean 'actin'"):
        full(cells()[0], CHANNELS, cell_channel="actn")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    """Sixteen simulated cells in eight wells."""
    out = tmp_path_factory.mktemp("store")
    build_store(Data(size=32, channels=CHANNELS), Assay(num_images=16, num_plates=1, wells_per_class=4), out)
    return ImageStore(out)


def test_without_its_library_the_command_says_what_to_install_and_writes_nothing(
    store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "cp_measure"] + ["cp_measure"]:
        monkeypatch.setitem(sys.modules, name, None)
    told = ["data", "features", str(store.path), "--output", str(tmp_path / "f.parquet"), "--workers", "1"]
    assert main([*told, "--full"]) == 2
    assert "pip install 'diffex[cells]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main(told) == 0  # the core set needs none


def test_pycytominer_reads_and_normalises_the_full_table(
    full: Callable[..., dict[str, float]], store: ImageStore, tmp_path: Path
) -> None:
    path = tmp_path / "features.parquet"
    assert main(["data", "features", str(store.path), "--output", str(path), "--full", "--workers", "1"]) == 0
    loaded = load_profiles(path)
    features = infer_cp_features(loaded)
    image = (store.batch([3]).x[0].numpy() + 1) / 2
    expected = full(image, store.info.channels)
    assert features == list(expected)
    assert loaded.loc[3, features].astype(float).tolist() == pytest.approx(list(expected.values()), nan_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pycytominer's, of columns that are nowhere defined
        normal = pycytominer.normalize(loaded, features=features, samples="Metadata_Class == 'DMSO'")
        operation = ["variance_threshold", "drop_na_columns"]
        chosen = pycytominer.feature_select(normal, features=features, operation=operation)
    texture = normal.loc[normal.Metadata_Class == "DMSO", "Cells_Texture_Contrast_actin_3_00_256"]
    assert len(texture) == 8
    assert texture.mean() == pytest.approx(0.0, abs=1e-6)
    assert texture.std(ddof=0) == pytest.approx(1.0, abs=1e-6)
    assert 500 < len(infer_cp_features(chosen)) < len(features)


def test_the_core_set_stays_the_default(store: ImageStore, tmp_path: Path) -> None:
    count = write_profiles(store, tmp_path / "core.csv")[1]
    assert count == len(measure(cells()[0], CHANNELS))
