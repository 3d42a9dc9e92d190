"""The recipes that come with diffex."""

from pathlib import Path

import pytest

from diffex.config import Experiment, load, recipes
from diffex.pipeline import stage_digests
from diffex.settings import flat

ROOT = Path(__file__).parents[1]


def test_the_default_recipe_is_the_defaults() -> None:
    assert flat(load("assay")) == flat(Experiment())


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_loads_and_its_stages_can_be_addressed(name: str) -> None:
    assert stage_digests(load(name))["pictures"]


@pytest.mark.parametrize("name", recipes())
def test_every_number_of_a_recipe_is_argued(name: str) -> None:
    """A line with a number has a comment, or follows one that argues for the block (golgi points to bbbc021)."""
    text = (ROOT / "diffex" / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("#")
    values = [line for line in text.splitlines() if line.startswith("  ") and not line.strip().startswith("#")]
    argued = [line for line in values if "#" in line]
    assert len(argued) >= len(values) / 3


def test_the_paper_scale_recipe_has_the_published_numbers() -> None:
    e = load("bbbc021")
    assert e.data.size == 128
    assert e.autoencoder.code_dim == 512
    assert e.directions.num_directions == 10
    assert e.rendering.steps == 20


def test_the_ci_script_runs_exactly_the_readmes_test_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [line for line in readme.splitlines() if line.startswith("python3.11 -m venv") and "pytest" in line]
    assert len(commands) == 1
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1] == commands[0]
