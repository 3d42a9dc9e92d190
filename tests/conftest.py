"""What all tests share: one thread, no telemetry, no colours, and how they are dealt out to two processes."""

import multiprocessing as mp
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from diffex.config import Assay
from diffex.data import ImageStore
from diffex.ingest import Summary, ingest
from diffex.profiles import write_profiles
from diffex.screen import Intensity, Screen
from diffex.simulate import write_screen

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.pop("RAY_ADDRESS", None)


settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

FILL_THE_MACHINE = {"test_nodes", "test_sweep"}  # a Ray of as many workers as there are cores


class ByFile(LoadScopeScheduling):
    """Two processes share the tests: a file stays together, and what fills the machine runs one after the other."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "fills the machine" if Path(file).stem in FILL_THE_MACHINE else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What fills the machine comes first, for it takes longest."""
    items.sort(key=lambda item: item.path.stem not in FILL_THE_MACHINE)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small tensors gain nothing from more, and other processes of a test need the cores."""
    torch.set_num_threads(1)


@pytest.fixture
def spawn() -> Iterator[Any]:
    """Starts processes, and sees to it that none outlives the test."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["diffex.store"])  # imported once, not by every child
    children: list[Any] = []

    class Spawner:
        event, barrier = staticmethod(context.Event), staticmethod(context.Barrier)

        def __call__(self, target: Callable[..., None], *args: object) -> Any:
            child = context.Process(target=target, args=args, daemon=True)
            child.start()
            children.append(child)
            return child

    yield Spawner()
    for child in children:
        child.kill()
        child.join(120)


@pytest.fixture(scope="session")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated screen in BBBC021's layout: two plates, three wells a class on each, two fields a well."""
    out = tmp_path_factory.mktemp("simulated") / "screen"
    write_screen(
        Assay(num_plates=2, wells_per_class=3), ("DNA", "tubulin", "actin"), out, layout="bbbc021",
        field_size=(384, 384), cells_per_field=14, fields_per_well=2, out_of_focus=0.08, saturated=0.03,
    )  # fmt: skip
    return out


@pytest.fixture(scope="session")
def fields(screen: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageStore, Summary]:
    """The store of that screen, scaled by its DMSO wells, and what came of the ingest."""
    out = tmp_path_factory.mktemp("ingested") / "store"
    summary = ingest(screen, Screen(intensity=Intensity(reference="Metadata_Compound == 'DMSO'")), out)
    return ImageStore(out), summary


@pytest.fixture(scope="session")
def profiles_table(fields: tuple[ImageStore, Summary], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The feature table of that store."""
    path = tmp_path_factory.mktemp("profiles") / "features.parquet"
    write_profiles(fields[0], path)
    return path
