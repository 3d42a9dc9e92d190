"""The command: every verb explains itself by a working example, prints settings that read back, and plans for free."""

import shlex
from pathlib import Path

import pytest
import yaml

from diffex.cli import VERBS, main
from diffex.config import from_dict, load, recipes
from diffex.pipeline import GRAPH, stage_digests
from diffex.store import Store
from diffex.version import __version__

Captured = pytest.CaptureFixture[str]

TINY = str(Path(__file__).with_name("tiny.yaml"))


def printed(capsys: Captured, *argv: str) -> str:
    """Standard output of a command that must succeed; words, each separated by one space."""
    try:
        status = main(argv)
    except SystemExit as stop:  # argparse ends --help and --version this way
        status = int(stop.code or 0)
    assert status == 0
    return capsys.readouterr().out


def words(text: str) -> str:
    return " ".join(text.split())


# ----------------------------------------------------------------------------------------------------------------------
# Help


def test_help_lists_every_verb_with_what_it_does(capsys: Captured) -> None:
    shown = words(printed(capsys, "--help"))
    for verb, (does, _) in VERBS.items():
        assert f"{verb} {does}" in shown


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_has_an_example_of_it(capsys: Captured, verb: str) -> None:
    assert f"Example: diffex {verb} " in words(printed(capsys, verb, "--help"))


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_lists_its_options_and_the_recipes(capsys: Captured, verb: str) -> None:
    shown = words(printed(capsys, verb, "--help"))
    assert all(option in shown for option in ("--recipe", "--data", "--set", "--dry-run"))
    assert ("--output" in shown) == (verb != "config")
    assert all(name in shown for name in recipes())


@pytest.mark.parametrize(("verb", "example"), [(verb, example) for verb, (_, example) in VERBS.items()])
def test_every_example_is_a_command_that_works(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, example: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells.parquet").write_bytes(b"")
    program, *argv = shlex.split(example)
    assert (program, argv[0]) == ("diffex", verb)
    assert printed(capsys, *argv, "--dry-run")


def test_the_version_is_the_packages(capsys: Captured) -> None:
    assert printed(capsys, "--version").strip() == f"diffex {__version__}"


@pytest.mark.parametrize("argv", [[], ["explode"], ["data", "--nonsense"], ["data", "--output"]])
def test_a_command_line_that_is_none_exits_with_status_2_and_tells_the_usage(capsys: Captured, argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: diffex" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# config


@pytest.mark.parametrize("recipe", recipes())
def test_config_prints_yaml_that_loads_to_the_same_experiment(capsys: Captured, recipe: str) -> None:
    assert from_dict(yaml.safe_load(printed(capsys, "config", "--recipe", recipe))) == load(recipe)


def test_what_config_prints_is_a_recipe(capsys: Captured, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(printed(capsys, "config", "--recipe", TINY, "--set", "directions.tau=0.7"))
    assert load(file) == load(TINY, {"directions.tau": 0.7})


def test_config_shows_what_set_and_data_replace(capsys: Captured, tmp_path: Path) -> None:
    argv = ["config", "--data", str(tmp_path), "--set", "autoencoder.lambda1=0.25", "--set", "data.channels=0,1"]
    shown = yaml.safe_load(printed(capsys, *argv))
    assert shown["autoencoder"]["lambda1"] == 0.25
    assert shown["data"]["path"] == str(tmp_path)
    assert shown["data"]["channels"] == ["0", "1"]


def test_warnings_go_to_standard_error_and_leave_the_yaml_clean(capsys: Captured) -> None:
    assert main(["config", "--set", "rendering.encode_steps=7"]) == 0
    told = capsys.readouterr()
    assert told.err.startswith("warning: rendering.encode_steps = 7 has no effect")
    assert len(told.err.splitlines()) == 1
    assert from_dict(yaml.safe_load(told.out)).rendering.encode_steps == 7


# ----------------------------------------------------------------------------------------------------------------------
# --dry-run


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "config"])
def test_a_dry_run_prints_the_settings_and_the_stages_and_writes_nothing(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = printed(capsys, verb, "--recipe", TINY, "--dry-run")
    assert from_dict(yaml.safe_load(shown)) == load(TINY)
    stages = [line.split()[2] for line in shown.splitlines() if line.startswith("# stage ")]
    assert stages[0] == "data"
    assert set(stages) <= set(GRAPH)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_with_an_output_folder_does_not_make_it(capsys: Captured, tmp_path: Path) -> None:
    printed(capsys, "run", "--recipe", TINY, "--output", str(tmp_path / "out"), "--dry-run")
    assert list(tmp_path.iterdir()) == []


def test_later_verbs_need_the_stages_of_earlier_ones(capsys: Captured) -> None:
    def stages(verb: str) -> set[str]:
        shown = printed(capsys, verb, "--recipe", TINY, "--dry-run")
        return {line.split()[2] for line in shown.splitlines() if line.startswith("# stage ")}

    assert stages("data") < stages("fit") < stages("run")
    assert stages("directions") < stages("explain") < stages("run")


def test_a_dry_run_tells_what_is_there_already(capsys: Captured, tmp_path: Path) -> None:
    store = tmp_path / "store"
    digests = stage_digests(load(TINY), "data")
    argv = ["data", "--recipe", TINY, "--store", str(store), "--dry-run"]
    assert "to be computed" in printed(capsys, *argv)
    assert not store.exists()
    Store(store).compute("data", digests["data"], lambda folder: {})
    assert "is there" in printed(capsys, *argv)


# ----------------------------------------------------------------------------------------------------------------------
# data, which is quick enough to run


def test_data_draws_a_contact_sheet_counts_parts_and_is_reused(capsys: Captured, tmp_path: Path) -> None:
    argv = ["data", "--recipe", TINY, "--output", str(tmp_path / "out")]
    shown = printed(capsys, *argv)
    assert "computed: data; reused: nothing" in shown
    counts = {line.split()[0]: line for line in shown.splitlines() if line.startswith(("train", "valid", "test"))}
    assert set(counts) == {"train", "valid", "test"}
    assert all("DMSO: " in line and "compound: " in line for line in counts.values())
    assert (tmp_path / "out" / "contact-sheet.png").read_bytes().startswith(b"\x89PNG")
    assert "computed: nothing; reused: data" in printed(capsys, *argv)


def test_without_an_output_folder_results_lie_below_the_working_directory(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed(capsys, "data", "--recipe", TINY)
    assert [p.name for p in tmp_path.iterdir()] == ["diffex-output"]
    assert len(list(tmp_path.glob("diffex-output/run-*/contact-sheet.png"))) == 1
