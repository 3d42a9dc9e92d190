"""Feature tables: a row for each cell in the store's order, named and typed as pycytominer takes them."""

import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pycytominer
import pytest
from pycytominer.cyto_utils import infer_cp_features, load_profiles

from diffex import profiles
from diffex.cli import main
from diffex.data import ImageStore
from diffex.errors import UserError
from diffex.features import measure
from diffex.ingest import Summary
from diffex.profiles import write_profiles


@pytest.fixture
def table(profiles_table: Path) -> Path:
    return profiles_table


def test_pycytominer_reads_the_table_and_tells_features_from_metadata(
    table: Path, fields: tuple[ImageStore, Summary]
) -> None:
    loaded = load_profiles(table)
    assert len(loaded) == len(fields[0])
    features = infer_cp_features(loaded)
    metadata = infer_cp_features(loaded, metadata=True)
    assert sorted([*features, *metadata]) == sorted(loaded.columns)
    assert {name.split("_")[0] for name in features} == {"Nuclei", "Cells", "Cytoplasm"}
    assert {"Metadata_Plate", "Metadata_Well", "Metadata_Compound", "Metadata_Class", "Metadata_Part"} <= set(metadata)
    assert all(pd.api.types.is_numeric_dtype(loaded[name]) for name in features)


def test_pycytominer_aggregates_normalises_and_selects(table: Path) -> None:
    loaded = load_profiles(table)
    wells = pycytominer.aggregate(loaded, strata=["Metadata_Plate", "Metadata_Well", "Metadata_Compound"])
    assert len(wells) == 12
    normal = pycytominer.normalize(wells, samples="Metadata_Compound == 'DMSO'", method="standardize")
    area = normal[normal.Metadata_Compound == "DMSO"]["Nuclei_AreaShape_Area"]
    assert area.mean() == pytest.approx(0.0, abs=1e-6)
    assert area.std(ddof=0) == pytest.approx(1.0, abs=1e-6)
    chosen = pycytominer.feature_select(
        normal, operation=["variance_threshold", "correlation_threshold", "drop_na_columns"]
    )
    assert 5 < len(infer_cp_features(chosen)) < len(infer_cp_features(normal))


def test_the_planted_phenotype_is_in_the_table(table: Path) -> None:
    """The simulated compound enlarges the nucleus and shrinks the cell; wells of a class agree on it."""
    wells = (
        load_profiles(table).groupby(["Metadata_Compound", "Metadata_Plate", "Metadata_Well"]).median(numeric_only=True)
    )
    nucleus = wells.Nuclei_AreaShape_Area
    compound = next(name for name in nucleus.index.levels[0] if name != "DMSO")
    assert nucleus[compound].median() > 1.05 * nucleus["DMSO"].median()


def test_rows_are_those_of_the_store_in_its_order(table: Path, fields: tuple[ImageStore, Summary]) -> None:
    store = fields[0]
    loaded = pd.read_parquet(table)
    assert loaded.Metadata_Row.tolist() == list(range(len(store)))
    assert (loaded.Metadata_Part.to_numpy() == store.parts).all()
    assert (loaded.Metadata_Class.to_numpy() == np.array(store.info.class_names)[store.labels]).all()
    for row in (0, len(store) // 2, len(store) - 1):
        image = (store.batch([row]).x[0].numpy() + 1) / 2
        for name, value in measure(image, store.info.channels, background=0.0).items():
            assert loaded[name][row] == pytest.approx(value, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("ending", ["csv", "csv.gz"])
def test_every_form_of_the_table_holds_the_same_whatever_order_tasks_end_in(
    table: Path, fields: tuple[ImageStore, Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(profiles, "ROWS", 48)
    tasks = []

    def backwards(task: Any, job: Any, spans: Sequence[Any]) -> Iterator[Any]:
        tasks.extend(spans)
        return (task(job, span) for span in reversed(spans))

    cells, features = write_profiles(fields[0], tmp_path / f"features.{ending}", run=backwards)
    assert len(tasks) > 2
    assert (cells, features) == (len(fields[0]), len(infer_cp_features(load_profiles(table))))
    content = (tmp_path / f"features.{ending}").read_bytes()
    assert (gzip.decompress(content) if ending.endswith("gz") else content).startswith(b'"Metadata_Class"')
    loaded, expected = load_profiles(tmp_path / f"features.{ending}"), load_profiles(table)
    assert loaded.columns.tolist() == expected.columns.tolist()
    assert loaded.Metadata_Row.tolist() == expected.Metadata_Row.tolist()
    numbers = infer_cp_features(expected)
    assert np.allclose(loaded[numbers], expected[numbers], rtol=1e-9, equal_nan=True)


def test_a_table_that_is_there_stays_and_an_unknown_ending_is_refused(
    table: Path, fields: tuple[ImageStore, Summary], tmp_path: Path
) -> None:
    before = table.read_bytes()
    with pytest.raises(UserError, match="is there already; choose another --output"):
        write_profiles(fields[0], table)
    assert table.read_bytes() == before
    with pytest.raises(UserError, match=r"ends with \.parquet, \.csv, \.csv\.gz"):
        write_profiles(fields[0], tmp_path / "features.xlsx")
    with pytest.raises(UserError, match="can't write"):
        write_profiles(fields[0], tmp_path / "missing" / "features.csv")
    assert not list(tmp_path.iterdir())


def test_a_channel_that_is_not_there_names_the_nearest(
    fields: tuple[ImageStore, Summary], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["data", "features", str(fields[0].path), "--output", str(tmp_path / "f.csv"), "--workers", "1"]
    assert main([*told, "--nucleus-channel", "DNS"]) == 2
    shown = capsys.readouterr().err
    assert "there is no channel 'DNS'" in shown and "DNA" in shown
    assert not list(tmp_path.iterdir())
