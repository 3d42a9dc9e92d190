"""The image store: mapped into memory, batches in [-1, 1], splits that keep groups whole and classes in proportion."""

import io
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image

from diffex.assay import FACTORS
from diffex.config import Assay, Data
from diffex.data import ROWS, ImageStore, sample_rows
from diffex.errors import UserError
from diffex.prepare import build_store
from diffex.splits import PARTS

SMALL_ASSAY = Assay(num_images=128, num_plates=2, wells_per_class=4)


def encode(image: NDArray) -> bytes:
    """(C, H, W) as a TIFF."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, image, photometric="minisblack")
    return buffer.getvalue()


def png(value: int, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


class Maker:
    """Writes Parquet files and builds stores of them in one temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, 0

    def parquet(self, images: Iterable[bytes], names: Sequence[str], **columns: Sequence[Any]) -> str:
        self.made += 1
        path = self.folder / f"{self.made}.parquet"
        pq.write_table(pa.table({"image": list(images), "class_name": list(names), **columns}), path)
        return str(path)

    def store(self, data: Data, assay: Assay = SMALL_ASSAY) -> ImageStore:
        self.made += 1
        out = self.folder / f"store {self.made}"
        out.mkdir()
        build_store(data, assay, out)
        return ImageStore(out)

    def plain(
        self, names: Sequence[str], settings: dict[str, Any] | None = None, **columns: Sequence[Any]
    ) -> ImageStore:
        """A store of tiny grey images whose brightness is their row."""
        path = self.parquet([png(row % 256) for row in range(len(names))], names, **columns)
        return self.store(Data(path=path, size=8, **settings or {}))


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    """A store of the simulated assay."""
    return Maker(tmp_path_factory.mktemp("simulated")).store(Data())


# ----------------------------------------------------------------------------------------------------------------------
# Batches


def test_a_batch_is_float32_in_minus_one_to_one_with_labels_and_rows(simulated: ImageStore) -> None:
    rows = np.array([5, 100, 5, 0])
    batch = simulated.batch(rows)
    assert batch.x.shape == (4, 3, 32, 32)
    assert batch.x.dtype == torch.float32
    assert batch.x.min() >= -1
    assert batch.x.max() <= 1
    assert batch.y.tolist() == simulated.labels[rows].tolist()
    assert batch.rows.tolist() == rows.tolist()
    assert (batch.x[0] == batch.x[2]).all()
    assert (batch.x[0] != batch.x[1]).any()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_any_number_of_channels_up_to_five_makes_a_store(make: Maker, count: int, kind: type) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, np.iinfo(kind).max, (count, 16, 16), kind, endpoint=True) for _ in range(24)]
    store = make.store(Data(path=make.parquet(map(encode, images), list("ab") * 12), size=16))
    x = store.batch(range(24)).x
    assert x.shape == (24, count, 16, 16)
    assert x.min() == -1
    assert 1 - 1e-6 < x.max() <= 1
    assert len(store.info.channels) == count
    assert store.info.dtype == np.dtype(kind).name
    assert (store.pixels([7, 3]) == np.stack([images[7], images[3]])).all()


def test_bytes_map_linearly_from_black_to_white(make: Maker) -> None:
    store = make.plain(list("ab") * 128)
    x = store.batch(range(256)).x[:, 0, 0, 0]
    assert torch.allclose(x, torch.arange(256) / 127.5 - 1, atol=1e-6)


def test_a_window_maps_its_ends_and_cuts_beyond(make: Maker) -> None:
    store = make.plain(list("ab") * 128, {"window": (50.0, 150.0)})
    x = store.batch(range(256)).x[:, 0, 0, 0]
    assert (x[:51] == -1).all()
    assert ((x[150:] > 1 - 1e-6) & (x[150:] <= 1)).all()
    assert x[100] == pytest.approx(0, abs=1e-6)


def test_without_a_window_16_bit_channels_are_spread_each_by_its_training_images(make: Maker) -> None:
    """A channel 100 times darker than another fills [-1, 1] all the same; a hot test pixel changes nothing."""
    rng = np.random.default_rng(0)
    scale = np.array([40_000, 400])[:, None, None]
    images = [(rng.uniform(0.1, 1.0, (2, 16, 16)) * scale).astype(np.uint16) for _ in range(40)]
    first = make.store(Data(path=make.parquet(map(encode, images), list("ab") * 20), size=16))
    x = first.batch(first.rows("train")).x
    for channel in (0, 1):
        low, high = torch.quantile(x[:, channel], torch.tensor([0.05, 0.95]))
        assert -1 <= low < -0.8
        assert 0.8 < high <= 1
    images[int(first.rows("test")[0])][:] = 65535
    path = make.parquet(map(encode, images), list("ab") * 20)
    assert make.store(Data(path=path, size=16)).info.window == first.info.window


def test_float_images_fill_the_range_too(make: Maker) -> None:
    rng = np.random.default_rng(0)
    images = [rng.normal(5.0, 1e-3, (1, 16, 16)).astype(np.float32) for _ in range(24)]
    x = make.store(Data(path=make.parquet(map(encode, images), list("ab") * 12), size=16)).batch(range(24)).x
    assert (x.min(), x.max()) == (-1, 1)
    assert abs(x.mean()) < 0.1


def test_a_constant_channel_without_a_window_is_named(make: Maker) -> None:
    path = make.parquet([encode(np.full((1, 8, 8), 700, np.uint16))] * 24, list("ab") * 12)
    with pytest.raises(UserError, match=r"channel 'grey' is constant.*data\.channels"):
        make.store(Data(path=path, size=8))


@pytest.mark.parametrize("size", [8, 16, 40])
def test_images_get_the_size_asked_for(make: Maker, size: int) -> None:
    path = make.parquet([png(row, side=16 + row) for row in range(24)], list("ab") * 12)
    assert make.store(Data(path=path, size=size)).batch([0, 23]).x.shape == (2, 1, size, size)


def test_images_that_are_not_square_are_cropped(make: Maker) -> None:
    wide = np.zeros((1, 8, 20), np.uint8)
    wide[:, :, 6:14] = 200
    store = make.store(Data(path=make.parquet([encode(wide)] * 24, list("ab") * 12), size=8))
    assert (store.pixels([0]) == 200).all()


# ----------------------------------------------------------------------------------------------------------------------
# The file


def test_pixels_are_mapped_into_memory_not_read(simulated: ImageStore) -> None:
    """The arrays lie inside the mapping of the file: Arrow allocates nothing for them, and they can't be written."""
    before = pa.total_allocated_bytes()
    again = ImageStore(simulated.path)
    assert pa.total_allocated_bytes() - before < again.pixels(range(len(again))).nbytes / 10
    with pytest.raises(TypeError, match="read-only"):
        again._bytes[0][0] = 0


def test_two_stores_of_one_folder_hold_the_same(simulated: ImageStore) -> None:
    again = ImageStore(simulated.path)
    assert (again.pixels(range(128)) == simulated.pixels(range(128))).all()
    assert again.info == simulated.info


def test_rows_beyond_one_record_batch_keep_their_pixels(make: Maker) -> None:
    store = make.plain(list("ab") * (ROWS // 2 + 5))
    rows = np.array([ROWS + 3, 0, ROWS - 1, ROWS, 7])
    assert store.pixels(rows)[:, 0, 0, 0].tolist() == (rows % 256).tolist()
    assert len(store) == ROWS + 10


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an image store"):
        ImageStore(tmp_path)


def test_the_same_settings_write_the_same_bytes(make: Maker) -> None:
    one, two = (make.store(Data(seed=3)) for _ in range(2))
    for name in ("images.arrow", "index.arrow", "store.json"):
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes()


def test_progress_ends_at_the_number_of_images(make: Maker, tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    path = make.parquet([png(1)] * 40, list("ab") * 20)
    (tmp_path / "out").mkdir()
    build_store(Data(path=path, size=8), SMALL_ASSAY, tmp_path / "out", lambda *x: said.append(x))
    assert said[-1] == ("data", 40, 40)


def test_what_a_store_says_of_itself_survives_pickling(simulated: ImageStore) -> None:
    assert pickle.loads(pickle.dumps(simulated.info)) == simulated.info


# ----------------------------------------------------------------------------------------------------------------------
# Classes and channels


def test_class_indices_follow_the_sorted_names(make: Maker) -> None:
    names = ["zebra", "ape", "mouse"] * 10
    store = make.plain(names)
    assert store.info.class_names == ("ape", "mouse", "zebra")
    assert [store.info.class_names[label] for label in store.labels] == names


def test_chosen_classes_are_kept_in_sorted_order_and_others_left_out(make: Maker) -> None:
    store = make.plain(["zebra", "ape", "mouse"] * 10, {"classes": ("zebra", "ape")})
    assert store.info.class_names == ("ape", "zebra")
    assert len(store) == 20
    assert store.pixels([0, 1, 2])[:, 0, 0, 0].tolist() == [0, 1, 3]  # rows of the file, in its order


def test_a_folder_of_classes_makes_a_store(tmp_path: Path, make: Maker) -> None:
    for name in ("zebra", "ape"):
        (tmp_path / "cells" / name).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "cells" / name / f"{i}.png").write_bytes(png(200 if name == "ape" else 100))
    store = make.store(Data(path=str(tmp_path / "cells"), size=8))
    assert store.info.class_names == ("ape", "zebra")
    assert [200 if label == 0 else 100 for label in store.labels] == store.pixels(range(20))[:, 0, 0, 0].tolist()


def test_no_more_images_of_a_class_than_asked_for(make: Maker) -> None:
    store = make.plain(["a"] * 40 + ["b"] * 15, {"max_per_class": 20})
    assert np.bincount(store.labels).tolist() == [20, 15]
    drawn = store.pixels(range(20))[:, 0, 0, 0].tolist()
    assert drawn == sorted(set(drawn))
    assert drawn != list(range(20))


@pytest.mark.parametrize(
    ("settings", "names", "columns"),
    [
        ({}, ("red", "green", "blue"), [0, 1, 2]),
        ({"channels": ("blue", "red")}, ("blue", "red"), [2, 0]),
        ({"channels": ("1",)}, ("green",), [1]),
        ({"channel_names": ("x", "y", "z"), "channels": ("z",)}, ("z",), [2]),
    ],
)
def test_channels_are_chosen_by_name_or_number(
    make: Maker, settings: dict[str, Any], names: tuple[str, ...], columns: list[int]
) -> None:
    image = np.stack([np.full((8, 8), 50 * (c + 1), np.uint8) for c in range(3)])
    store = make.store(Data(path=make.parquet([encode(image)] * 24, list("ab") * 12), size=8, **settings))
    assert store.info.channels == names
    assert store.pixels([0])[0, :, 0, 0].tolist() == [50 * (c + 1) for c in columns]


def test_channels_of_the_assay_are_drawn_in_the_order_asked_for(make: Maker) -> None:
    store = make.store(Data(channels=("actin", "DNA")))
    assert store.info.channels == ("actin", "DNA")
    both = make.store(Data(channels=("DNA", "actin")))
    alike = [np.corrcoef(store.pixels([0])[0, i].ravel(), both.pixels([0])[0, 1 - i].ravel())[0, 1] for i in (0, 1)]
    assert min(alike) > 0.95


def test_settings_said_to_have_no_effect_on_the_assay_have_none(make: Maker, simulated: ImageStore) -> None:
    store = make.store(Data(window=(3.0, 9.0), channel_names=("x", "y", "z")))
    assert store.info == simulated.info


def test_the_assays_store_keeps_metadata_and_true_factors(simulated: ImageStore) -> None:
    assert {"Metadata_Plate", "Metadata_Well", "Metadata_Dose"} <= set(simulated.metadata())
    assert set(simulated.metadata("Factor_")) == {f"Factor_{name}" for name in FACTORS}
    assert simulated.info.simulated


# ----------------------------------------------------------------------------------------------------------------------
# Splits


def shares(store: ImageStore, label: int) -> list[float]:
    """Shares of a class in the three parts."""
    mine = store.labels == label
    return [float((mine & (store.parts == part)).sum() / mine.sum()) for part in PARTS]


def parts_of_groups(store: ImageStore) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for group, part in zip(store.groups(), store.parts, strict=True):
        found.setdefault(int(group), set()).add(str(part))
    return found


def test_every_image_lies_in_one_part(simulated: ImageStore) -> None:
    rows = np.concatenate([simulated.rows(part) for part in PARTS])
    assert sorted(rows.tolist()) == list(range(len(simulated)))


def test_a_well_never_lies_in_two_parts(simulated: ImageStore) -> None:
    assert simulated.info.split_by == ("Metadata_Plate", "Metadata_Well")
    groups = parts_of_groups(simulated)
    assert len(groups) == 2 * 2 * 4
    assert all(len(parts) == 1 for parts in groups.values())


@pytest.mark.parametrize("seed", range(5))
def test_groups_of_any_size_stay_whole(make: Maker, seed: int) -> None:
    rng = np.random.default_rng(seed)
    donors = [f"d{d}" for d in rng.integers(0, 30, 300)]
    classes = [str(c) for c in rng.integers(0, 3, 300)]  # a donor has images of several classes
    store = make.plain(classes, {"seed": seed}, donor=donors)
    groups = parts_of_groups(store)
    assert len(groups) == len(set(donors))
    assert all(len(parts) == 1 for parts in groups.values())


def test_without_groups_every_class_is_split_in_the_shares_asked_for(make: Maker) -> None:
    store = make.plain(["a"] * 200 + ["b"] * 40, {"valid_fraction": 0.25, "test_fraction": 0.25})
    for label in (0, 1):
        assert shares(store, label) == pytest.approx([0.5, 0.25, 0.25], abs=0.03)


def test_with_groups_every_class_is_split_nearly_in_the_shares_asked_for(make: Maker) -> None:
    """A class with few wells beside one with many gets its share of test wells too."""
    wells = [f"a{i // 10}" for i in range(400)] + [f"b{i // 10}" for i in range(100)]
    store = make.plain(["a"] * 400 + ["b"] * 100, {"valid_fraction": 0.2, "test_fraction": 0.2}, well=wells)
    assert shares(store, 0) == pytest.approx([0.6, 0.2, 0.2], abs=0.03)
    assert shares(store, 1) == pytest.approx([0.6, 0.2, 0.2], abs=0.11)  # ten wells: one more or less


def test_a_split_is_the_same_again_and_another_with_another_seed(make: Maker) -> None:
    path = make.parquet([png(row) for row in range(200)], list("ab") * 100)
    one, two, other = (make.store(Data(path=path, size=8, seed=seed)).parts.tolist() for seed in (4, 4, 5))
    assert one == two
    assert one != other


def test_a_split_does_not_depend_on_size_or_channels(make: Maker, simulated: ImageStore) -> None:
    assert make.store(Data(size=64, channels=("DNA",))).parts.tolist() == simulated.parts.tolist()


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (("Plate", "Well"), ("Metadata_Plate", "Metadata_Well")),
        (("plate", "well", "donor"), ("Metadata_Plate", "Metadata_Well")),
        (("Metadata_Well", "Metadata_Plate"), ("Metadata_Plate", "Metadata_Well")),
        (("well",), ("Metadata_Well",)),
        (("plate", "donor"), ("Metadata_Donor",)),  # a plate alone is no statistical unit
        (("patient", "slide"), ("Metadata_Patient",)),
        (("colour",), ()),
        ((), ()),
    ],
)
def test_auto_finds_the_statistical_unit(make: Maker, columns: tuple[str, ...], found: tuple[str, ...]) -> None:
    values = [f"g{i // 4}" for i in range(80)]
    store = make.plain(list("ab") * 40, None, **dict.fromkeys(columns, values))
    assert store.info.split_by == found


def test_named_columns_split_whatever_their_case_or_prefix(make: Maker) -> None:
    values = [f"g{i // 4}" for i in range(80)]
    for name in ("Batch", "batch", "Metadata_Batch"):
        store = make.plain(list("ab") * 40, {"split_by": (name,)}, Batch=values)
        assert store.info.split_by == ("Metadata_Batch",)
        assert len(set(store.groups())) == 20


def test_an_empty_split_by_takes_every_image_for_itself(make: Maker) -> None:
    store = make.plain(list("ab") * 40, {"split_by": ()}, well=["w"] * 80)
    assert store.info.split_by == ()
    assert store.groups().tolist() == list(range(80))


def test_an_unknown_column_names_the_nearest(make: Maker) -> None:
    with pytest.raises(UserError, match=r"data\.split_by.*'doner'.*did you mean 'donor'"):
        make.plain(list("ab") * 40, {"split_by": ("doner",)}, donor=[str(i % 20) for i in range(80)])


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_groups_for_three_parts_are_counted(make: Maker, count: int) -> None:
    wells = [f"w{i % 12}" for i in range(60)] + [f"x{i % count}" for i in range(60)]
    with pytest.raises(UserError, match=f"class 'b' has only {count} different Well"):
        make.plain(["a"] * 60 + ["b"] * 60, None, well=wells)


def test_three_groups_are_enough_for_three_parts(make: Maker) -> None:
    store = make.plain(list("ab") * 30, None, well=[f"{'ab'[i % 2]}{i // 2 % 3}" for i in range(60)])
    assert [set(store.labels[store.rows(part)]) for part in PARTS] == [{0, 1}] * 3


# ----------------------------------------------------------------------------------------------------------------------
# Order of training


def test_an_epoch_sees_every_row_once() -> None:
    rows = np.arange(100, 125)
    seen = np.concatenate([sample_rows(rows, 5, at, seed=1) for at in range(0, 25, 5)])
    assert sorted(seen) == rows.tolist()
    assert seen.tolist() != rows.tolist()


def test_epochs_are_shuffled_anew() -> None:
    rows = np.arange(25)
    assert sample_rows(rows, 25, 0, seed=1).tolist() != sample_rows(rows, 25, 25, seed=1).tolist()


@pytest.mark.parametrize("batch", [1, 7, 25, 60])
def test_the_stream_of_rows_does_not_depend_on_where_it_is_taken_up(batch: int) -> None:
    rows = np.arange(25)
    stream = sample_rows(rows, 240, 0, seed=2)
    for seen in (0, 3, 24, 25, 49, 110):
        assert sample_rows(rows, batch, seen, seed=2).tolist() == stream[seen : seen + batch].tolist()


def test_another_seed_gives_another_order() -> None:
    rows = np.arange(25)
    assert sample_rows(rows, 25, 0, seed=1).tolist() != sample_rows(rows, 25, 0, seed=2).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Images that don't go together


def differing(change: Callable[[NDArray], NDArray]) -> list[bytes]:
    image = np.zeros((2, 8, 8), np.uint8)
    return [encode(image)] * 20 + [encode(change(image))] * 4


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda image: image[:1], "row 20 has 1 channels, but .* row 0 has 2"),
        (lambda image: image.astype(np.uint16), "row 20 has uint16 pixels, but .* row 0 has uint8"),
    ],
)
def test_images_that_differ_in_kind_are_named(make: Maker, change: Callable[[NDArray], NDArray], told: str) -> None:
    path = make.parquet(differing(change), list("ab") * 12)
    with pytest.raises(UserError, match=told):
        make.store(Data(path=path, size=8))


def test_more_channel_names_than_channels_are_refused(make: Maker) -> None:
    data = Data(path=make.parquet([png(1)] * 24, list("ab") * 12), size=8)
    with pytest.raises(UserError, match="names 2 channels, but the images have 1"):
        make.store(replace(data, channel_names=("x", "y")))
