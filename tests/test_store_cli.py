"""``diffex store``: what it prints, what it removes, and what it refuses."""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from diffex.errors import UserError
from diffex.store import Store
from diffex.store_cli import add_verbs, run_store_verb


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_verbs(parser)
    return run_store_verb(parser.parse_args(words))


def entry(store: Store, stage: str, digest: str, size: int, age: float = 0.0) -> Path:
    """An entry of so many bytes, last used so many seconds ago."""

    def write(out: Path) -> dict[str, Any]:
        (out / "file").write_bytes(bytes(size))
        return {}

    path = store.compute(stage, digest, write).path
    os.utime(path / "entry.json", (time.time() - age,) * 2)
    return path


@pytest.fixture(params=["folder", "uri"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("DIFFEX_CACHE", str(tmp_path / "cache"))
    made = Store(tmp_path / "store" if request.param == "folder" else f"file://{tmp_path}/store")
    entry(made, "data", "d1", 2_000_000)
    entry(made, "autoencoder", "a1", 5_000)
    return made


def test_a_listing_is_aligned_and_sums_up(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ls", "--store", store.address) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    state = lines[0].index("STATE")
    assert [line[state:] for line in lines[1:3]] == ["finished", "finished"]
    assert all(line[state - 2 : state] == "  " for line in lines[:3])
    assert "2.0 MB" in lines[2] and "data" in lines[2] and "d1" in lines[2]
    assert "2 finished, 2.0 MB" in lines[3]


def test_a_listing_can_be_read_by_a_program(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ls", "--store", store.address, "--stage", "data", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["stage"], found["digest"], found["state"]) == ("data", "d1", "finished")
    assert found["bytes"] == next(i.bytes for i in store.entries() if i.stage == "data") > 2_000_000


def test_an_empty_store_lists_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ls", "--store", str(Store(tmp_path).root)) == 0
    assert "nothing" in capsys.readouterr().out


def test_without_yes_nothing_goes_and_what_would_is_told(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    gc = ("gc", "--store", store.address, "--older-than", "0s", "--recent", "0s")
    assert run(*gc) == 0
    told = capsys.readouterr().out
    assert "would remove 2 things, 2.0 MB" in told and "--yes" in told
    assert len(list(store.entries())) == 2
    assert run(*gc, "--yes") == 0
    assert "removed 2 things, 2.0 MB; 0 B stay" in capsys.readouterr().out
    assert list(store.entries()) == []


def test_by_default_what_is_in_use_stays(store: Store) -> None:
    assert run("gc", "--store", store.address, "--max-size", "1kB", "--yes") == 0
    assert len(list(store.entries())) == 2


def test_a_budget_that_can_not_be_met_is_explained(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    run("gc", "--store", store.address, "--max-size", "1kB", "--yes")
    assert "more than 1.0 kB: 0 B are kept for results" in (told := capsys.readouterr().out)
    assert "2.0 MB were used in the last 1 d (--recent)" in told


def test_what_an_output_rests_on_stays(store: Store, tmp_path: Path) -> None:
    trial = tmp_path / "out" / "trials" / "t1"
    trial.mkdir(parents=True)
    (trial / "stages.json").write_text(json.dumps({"data": str(store.root / "data" / "d1")}))
    run("gc", "--store", store.address, "--keep-output", str(tmp_path / "out"), "--older-than", "0s", "--recent", "0s",
        "--yes")  # fmt: skip
    assert [i.key for i in store.entries()] == [("data", "d1")]


def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for digest, age in (("new", 3e5), ("old", 5e5), ("middle", 4e5)):
        entry(store, "data", digest, 100_000, age)
    run("gc", "--store", str(tmp_path), "--max-size", "150 kB", "--yes")
    assert [i.digest for i in store.entries()] == ["new"]


def damage(store: Store, folder: Path) -> None:
    """Flip a byte of the entry data/d1."""
    file = next(p for p in folder.glob("data/d1/**/file"))
    content = bytearray(file.read_bytes())
    content[1234] ^= 1
    file.write_bytes(content)


def test_a_whole_store_verifies(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", "--store", store.address) == 0
    assert "2 finished and whole, 0 damaged" in capsys.readouterr().out


def test_damage_is_found_and_repair_has_it_computed_again(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(store, tmp_path / "store")
    assert run("verify", "--store", store.address) == 1
    told = capsys.readouterr().out
    assert "data/d1: file is not what was written" in told and "--repair" in told
    assert len(list(store.entries())) == 2
    assert run("verify", "--store", store.address, "--repair") == 0
    assert [i.key for i in store.entries()] == [("autoencoder", "a1")]
    assert run("verify", "--store", store.address) == 0
    ran = []
    Store(store.address).compute("data", "d1", lambda out: ran.append(1) or {})
    assert ran == [1]


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no store .*--store"):
        run("ls", "--store", str(tmp_path / "absent"))
    assert not (tmp_path / "absent").exists()


def test_best_without_an_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--keep-output"):
        run("gc", "--store", str(tmp_path), "--best", "2")
