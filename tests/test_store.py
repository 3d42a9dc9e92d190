"""The stage store: an entry is computed once, by one process; it is whole or absent, and never served damaged."""

import json
import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import pytest

from diffex.errors import UserError
from diffex.store import Store

PATIENCE = 60.0  # seconds after which a test gives up on another process

Run = Callable[[Path], dict[str, Any]]


def writer(counter: list[int] | None = None, text: str = "result") -> Run:
    """A stage that writes two files, and counts how often it ran."""

    def run(out: Path) -> dict[str, Any]:
        if counter is not None:
            counter.append(1)
        (out / "deep").mkdir(exist_ok=True)
        (out / "result.txt").write_text(text)
        (out / "deep" / "numbers.bin").write_bytes(bytes(range(256)))
        return {"score": 0.5, "names": ["a", "b"]}

    return run


def failing(out: Path) -> dict[str, Any]:
    """A stage that dies of an exception half-way."""
    (out / "checkpoint").write_text("half")
    raise RuntimeError("no luck")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ----------------------------------------------------------------------------------------------------------------------
# One process


def test_an_entry_is_computed_once(tmp_path: Path) -> None:
    runs: list[int] = []
    first = Store(tmp_path).compute("stage", "abc", writer(runs))
    second = Store(tmp_path).compute("stage", "abc", writer(runs))
    assert len(runs) == 1
    assert (first.computed, second.computed) == (True, False)
    assert first.path == second.path


def test_facts_and_seconds_are_the_same_when_read_again(tmp_path: Path) -> None:
    first = Store(tmp_path).compute("stage", "abc", writer())
    second = Store(tmp_path).compute("stage", "abc", writer())
    assert second.facts == first.facts == {"score": 0.5, "names": ["a", "b"]}
    assert second.seconds == first.seconds >= 0


def test_other_digests_and_stages_are_other_entries(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for stage, digest in (("one", "abc"), ("one", "abd"), ("two", "abc")):
        store.compute(stage, digest, writer(text=stage + digest))
    for stage, digest in (("one", "abc"), ("one", "abd"), ("two", "abc")):
        entry = store.get(stage, digest)
        assert entry is not None
        assert (entry.path / "result.txt").read_text() == stage + digest


def test_an_absent_entry_is_not_there(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.get("stage", "abc") is None
    assert not store.has("stage", "abc")


def test_a_computed_entry_is_there(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.compute("stage", "abc", writer())
    assert store.has("stage", "abc")
    assert store.get("stage", "abc") is not None


def test_a_finished_entry_leaves_no_work_in_progress(tmp_path: Path) -> None:
    Store(tmp_path).compute("stage", "abc", writer())
    assert [p.name for p in (tmp_path / "stage").iterdir() if p.is_dir()] == ["abc"]


def test_what_is_known_about_an_entry_is_recorded(tmp_path: Path) -> None:
    entry = Store(tmp_path).compute("stage", "abc", writer(), about={"needs": {"data": "d1"}})
    record = json.loads((entry.path / "entry.json").read_text())
    assert record["about"] == {"needs": {"data": "d1"}}
    assert set(record["files"]) == {"result.txt", "deep/numbers.bin"}


def test_nobody_sees_an_entry_before_it_is_whole(tmp_path: Path) -> None:
    seen = []

    def run(out: Path) -> dict[str, Any]:
        seen.append(Store(tmp_path).has("stage", "abc"))
        seen.append((tmp_path / "stage" / "abc").exists())
        return writer()(out)

    Store(tmp_path).compute("stage", "abc", run)
    assert seen == [False, False]


def test_a_store_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="can't make the store"):
        Store(tmp_path / "file" / "store")


# ----------------------------------------------------------------------------------------------------------------------
# Failures


def test_an_exception_leaves_its_checkpoint_and_no_entry(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(RuntimeError, match="no luck"):
        store.compute("stage", "abc", failing)
    assert store.get("stage", "abc") is None
    assert not (tmp_path / "stage" / "abc").exists()
    assert (tmp_path / "stage" / "abc.partial" / "checkpoint").read_text() == "half"


def test_after_an_exception_the_next_attempt_is_given_the_checkpoint(tmp_path: Path) -> None:
    found = []

    def resume(out: Path) -> dict[str, Any]:
        found.append((out / "checkpoint").read_text())
        (out / "checkpoint").unlink()
        return writer()(out)

    with pytest.raises(RuntimeError):
        Store(tmp_path).compute("stage", "abc", failing)
    entry = Store(tmp_path).compute("stage", "abc", resume)
    assert found == ["half"]
    assert set(tree(entry.path)) == {"entry.json", "result.txt", "deep/numbers.bin"}


def test_an_exception_frees_the_lock(tmp_path: Path) -> None:
    waited: list[int] = []
    store = Store(tmp_path)
    with pytest.raises(RuntimeError):
        store.compute("stage", "abc", failing)
    store.compute("stage", "abc", writer(), waiting=lambda: waited.append(1))
    assert waited == []


def test_the_seconds_of_a_failed_attempt_are_not_forgotten(tmp_path: Path) -> None:
    def slow(out: Path) -> dict[str, Any]:
        end = time.perf_counter() + 0.2
        while time.perf_counter() < end:
            pass
        raise RuntimeError

    with pytest.raises(RuntimeError):
        Store(tmp_path).compute("stage", "abc", slow)
    assert Store(tmp_path).compute("stage", "abc", writer()).seconds >= 0.2


def test_facts_that_are_not_json_make_no_entry(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Store(tmp_path).compute("stage", "abc", lambda out: {"path": out})
    assert Store(tmp_path).get("stage", "abc") is None


# ----------------------------------------------------------------------------------------------------------------------
# Damage


def flip_a_byte(entry: Path) -> None:
    content = bytearray((entry / "deep" / "numbers.bin").read_bytes())
    content[100] ^= 1
    (entry / "deep" / "numbers.bin").write_bytes(content)


def cut_a_file(entry: Path) -> None:
    (entry / "result.txt").write_text("")


def lose_a_file(entry: Path) -> None:
    (entry / "result.txt").unlink()


def lose_the_record(entry: Path) -> None:
    (entry / "entry.json").unlink()


def cut_the_record(entry: Path) -> None:
    content = (entry / "entry.json").read_text()
    (entry / "entry.json").write_text(content[: len(content) // 2])


def empty_the_record(entry: Path) -> None:
    (entry / "entry.json").write_text("{}")


DAMAGE = [flip_a_byte, cut_a_file, lose_a_file, lose_the_record, cut_the_record, empty_the_record]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_never_served(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    damage(Store(tmp_path).compute("stage", "abc", writer()).path)
    assert Store(tmp_path).get("stage", "abc") is None


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_computed_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    whole = Store(tmp_path).compute("stage", "abc", writer()).path
    before = {name: content for name, content in tree(whole).items() if name != "entry.json"}
    damage(whole)
    runs: list[int] = []
    entry = Store(tmp_path).compute("stage", "abc", writer(runs))
    assert entry.computed
    assert len(runs) == 1
    assert {name: content for name, content in tree(entry.path).items() if name != "entry.json"} == before
    assert Store(tmp_path).get("stage", "abc") is not None


def test_an_attempt_killed_just_before_it_became_an_entry_is_finished(tmp_path: Path) -> None:
    """All is written, the record too, but the folder has not been renamed: the next attempt's entry is sound."""
    whole = Store(tmp_path).compute("stage", "abc", writer()).path
    whole.rename(whole.with_name("abc.partial"))
    assert Store(tmp_path).compute("stage", "abc", writer(text="another result")).computed
    again = Store(tmp_path).get("stage", "abc")
    assert again is not None
    assert (again.path / "result.txt").read_text() == "another result"


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


@pytest.fixture
def spawn() -> Iterator[Any]:
    """Starts processes, and sees to it that none outlives the test."""
    context = mp.get_context("spawn")
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
        child.join(PATIENCE)


def compute_while_others_wait(root: Path, number: int, together: Barrier, waiting: list[Event]) -> None:
    """Ask for an entry at the same moment as others; the one who computes it holds on until all others wait."""

    def run(out: Path) -> dict[str, Any]:
        for other, event in enumerate(waiting):
            assert other == number or event.wait(PATIENCE)
        (root / f"ran-{number}").write_text("")
        return writer()(out)

    together.wait(PATIENCE)
    entry = Store(root / "store").compute("stage", "abc", run, waiting=waiting[number].set)
    assert (entry.path / "result.txt").read_text() == "result"
    (root / f"got-{number}").write_text(str(entry.computed))


def test_processes_that_want_the_same_entry_compute_it_once(tmp_path: Path, spawn: Any) -> None:
    count = 3
    together, waiting = spawn.barrier(count), [spawn.event() for _ in range(count)]
    children = [spawn(compute_while_others_wait, tmp_path, i, together, waiting) for i in range(count)]
    for child in children:
        child.join(PATIENCE)
    assert [child.exitcode for child in children] == [0] * count
    assert len(list(tmp_path.glob("ran-*"))) == 1
    assert sorted((tmp_path / f"got-{i}").read_text() for i in range(count)) == ["False", "False", "True"]


def hold_for_ever(root: Path, holding: Event, never: Event) -> None:
    """Write a checkpoint, then hold the entry until killed."""

    def run(out: Path) -> dict[str, Any]:
        (out / "checkpoint").write_text(f"by {os.getpid()}")
        holding.set()
        never.wait()
        return {}

    Store(root).compute("stage", "abc", run)


def test_the_next_takes_over_from_a_killed_process_where_it_was(tmp_path: Path, spawn: Any) -> None:
    holding, never = spawn.event(), spawn.event()
    child = spawn(hold_for_ever, tmp_path, holding, never)
    assert holding.wait(PATIENCE)
    found: list[str] = []
    polls: list[int] = []

    def kill_at_the_second_poll() -> None:
        """We wait as long as the other lives; its death, and nothing else, lets us in."""
        polls.append(1)
        assert not Store(tmp_path).has("stage", "abc")
        if len(polls) == 2:
            os.kill(child.pid, signal.SIGKILL)
            child.join(PATIENCE)

    def resume(out: Path) -> dict[str, Any]:
        found.append((out / "checkpoint").read_text())
        (out / "checkpoint").unlink()
        return writer()(out)

    entry = Store(tmp_path).compute("stage", "abc", resume, waiting=kill_at_the_second_poll)
    assert child.exitcode == -signal.SIGKILL
    assert len(polls) >= 2
    assert found == [f"by {child.pid}"]
    assert entry.computed
    assert Store(tmp_path).get("stage", "abc") is not None
