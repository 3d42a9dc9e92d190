"""The stage store: an entry is computed once, by one process; it is whole or absent, and never served damaged."""

import fcntl
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import pytest

from diffex.errors import UserError
from diffex.garbage import DAY, collect, protected, verify
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


@pytest.mark.parametrize("junk", ["", "nan", "-inf", "-5", "a minute", "\0", "inf"])
def test_junk_in_place_of_the_seconds_does_no_harm(tmp_path: Path, junk: str) -> None:
    with pytest.raises(RuntimeError):
        Store(tmp_path).compute("stage", "abc", failing)
    (tmp_path / "stage" / "abc.partial" / "seconds").write_text(junk)
    entry = Store(tmp_path).compute("stage", "abc", writer())
    assert 0 <= entry.seconds < PATIENCE
    json.loads((entry.path / "entry.json").read_text(), parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("name", ["abc", "abc.partial", "abc.partial/seconds", "abc.partial/entry.json"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_junk_where_the_store_writes_does_no_harm(tmp_path: Path, name: str, kind: str) -> None:
    junk = tmp_path / "stage" / name
    junk.parent.mkdir(parents=True)
    if kind == "file":
        junk.write_bytes(b"\xff\0")
    else:
        junk.mkdir()
    entry = Store(tmp_path).compute("stage", "abc", writer())
    assert set(tree(entry.path)) == {"entry.json", "result.txt", "deep/numbers.bin"}
    assert Store(tmp_path).get("stage", "abc") is not None


def test_work_in_progress_has_a_folder_of_its_own(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = store.partial("stage", "abc")
    (folder / "checkpoint").write_text("1")
    store.save_partial("stage", "abc")
    assert (Store(store.address).partial("stage", "abc") / "checkpoint").read_text() == "1"
    found = []
    store.compute("stage", "abc", lambda out: found.append(out) or {})
    assert found == [folder]


# ----------------------------------------------------------------------------------------------------------------------
# Housekeeping

DIGESTS = {"old": 40 * DAY, "middle": 20 * DAY, "new": 2 * DAY}


@pytest.fixture
def aged(tmp_path: Path) -> Store:
    """A store whose entries were last used some days ago, by their digest."""
    store = Store(tmp_path / "store")
    for digest, age in DIGESTS.items():
        store.compute("stage", digest, writer())
        age_entry(store, digest, age)
    return store


def age_entry(store: Store, digest: str, age: float) -> None:
    then = time.time() - age
    for file in [p for p in (store.root / "stage").glob(f"{digest}/**/*") if p.is_file()]:
        os.utime(file, (then, then))


def left(store: Store) -> set[str]:
    return {info.digest for info in store.entries()}


def test_all_that_takes_room_is_told(aged: Store) -> None:
    with pytest.raises(RuntimeError):
        aged.compute("stage", "begun", failing)
    (aged.root / "stage" / "middle" / "entry.json").write_text("{")
    found = {i.digest: i for i in aged.entries()}
    assert {d: i.state for d, i in found.items()} == {
        "old": "finished", "middle": "damaged-record", "new": "finished", "begun": "partial",
    }  # fmt: skip
    for digest, info in found.items():
        folder = aged.root / "stage" / (digest + ".partial" * (digest == "begun"))
        assert info.bytes == sum(len(content) for content in tree(folder).values())
    assert time.time() - found["old"].used == pytest.approx(40 * DAY, abs=PATIENCE)
    assert time.time() - found["old"].made < PATIENCE


def test_an_entry_that_is_asked_for_counts_as_used(aged: Store) -> None:
    assert aged.get("stage", "old") is not None
    assert max(aged.entries(), key=lambda i: i.used).digest == "old"


def test_an_entry_that_was_removed_is_computed_again(aged: Store) -> None:
    assert aged.remove(next(i for i in aged.entries() if i.digest == "old"))
    assert left(aged) == {"middle", "new"}
    assert Store(aged.root).compute("stage", "old", writer()).computed


def test_a_collection_takes_what_was_not_used_for_long(aged: Store) -> None:
    result = collect(aged, dry_run=False)
    assert [i.digest for i in result.taken] == ["old"]
    assert left(aged) == {"middle", "new"}


def test_a_dry_run_takes_nothing_and_tells_what_a_real_one_takes(aged: Store) -> None:
    told = collect(aged, older_than=10 * DAY)
    assert left(aged) == DIGESTS.keys()
    done = collect(aged, older_than=10 * DAY, dry_run=False)
    assert told == done
    assert [i.digest for i in done.taken] == ["old", "middle"]
    assert done.left == sum(i.bytes for i in aged.entries())


def test_a_budget_is_met_by_the_longest_unused_first(aged: Store) -> None:
    sizes = {i.digest: i.bytes for i in aged.entries()}
    budget = sizes["middle"] + sizes["new"]
    result = collect(aged, older_than=1000 * DAY, max_bytes=budget, dry_run=False)
    assert left(aged) == {"middle", "new"}
    assert result.left == budget
    assert collect(aged, older_than=1000 * DAY, max_bytes=budget, dry_run=False).taken == []


def test_what_was_just_used_stays_whatever_the_budget(aged: Store) -> None:
    aged.get("stage", "old")
    result = collect(aged, max_bytes=0, dry_run=False)
    assert left(aged) == {"old"}
    assert result.recent == result.left > 0


def test_what_is_kept_stays_with_all_it_is_made_from(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.compute("data", "d", writer())
    store.compute("data", "other", writer())
    store.compute("train", "t", writer(), about={"needs": {"data": "d"}})
    store.compute("score", "s", writer(), about={"needs": {"train": "t"}})
    collect(store, keep={("score", "s")}, older_than=0, max_bytes=0, recent=0, dry_run=False)
    assert {i.key for i in store.entries()} == {("data", "d"), ("train", "t"), ("score", "s")}


def test_a_checkpoint_stays_until_it_is_old_and_a_damaged_entry_goes_at_once(aged: Store) -> None:
    with pytest.raises(RuntimeError):
        aged.compute("stage", "begun", failing)
    (aged.root / "stage" / "new" / "entry.json").write_text("{")
    assert {i.digest for i in collect(aged, max_bytes=0, older_than=100 * DAY).taken} == {"old", "middle", "new"}
    assert "begun" in {i.digest for i in collect(aged, older_than=0).taken}


def test_a_collection_never_takes_what_is_locked(aged: Store) -> None:
    with pytest.raises(RuntimeError):
        aged.compute("stage", "begun", failing)
    (aged.root / "stage" / "middle" / "entry.json").write_text("{")
    with ExitStack() as held:
        for digest in ("old", "middle", "begun"):
            file = held.enter_context((aged.root / "stage" / f"{digest}.lock").open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)
        collect(aged, older_than=0, max_bytes=0, recent=0, dry_run=False)
        assert left(aged) == {"old", "middle", "begun"}
        assert collect(aged, older_than=0, max_bytes=0, recent=0).taken == []
        assert not any(aged.remove(info) for info in aged.entries())
    collect(aged, older_than=0, recent=0, dry_run=False)
    assert left(aged) == set()


def test_what_a_running_computation_is_made_from_stays(aged: Store) -> None:
    def run(out: Path) -> dict[str, Any]:
        assert Store(aged.root).running() == {("next", "n"): (("stage", "old"),)}
        collect(Store(aged.root), older_than=0, max_bytes=0, recent=0, dry_run=False)
        assert left(aged) == {"old", "n"}
        return {}

    aged.compute("next", "n", run, about={"needs": {"stage": "old"}})
    assert aged.running() == {}


def test_verification_finds_the_damaged_entry(aged: Store) -> None:
    assert all(problem == "" for _, problem in verify(aged))
    flip_a_byte(aged.root / "stage" / "old")
    lose_a_file(aged.root / "stage" / "middle")
    problems = {info.digest: problem for info, problem in verify(aged)}
    assert "numbers.bin" in problems["old"]
    assert "result.txt is missing" in problems["middle"]
    assert problems["new"] == ""


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """An output folder of seven trials, each with a directions stage of its own."""
    rows = {  # score, flip_rate, disentanglement, ssim
        "best": (0.9, 0.9, 0.9, 0.9), "second": (0.8, 0.8, 0.8, 0.8), "third": (0.7, 0.7, 0.7, 0.7),
        "sharp": (0.2, 0.1, 0.1, 1.0), "last": (0.1, 0.1, 0.1, 0.1), "nan": (float("nan"),) * 4,
    }  # fmt: skip
    for age, (name, row) in enumerate(rows.items()):
        folder = tmp_path / "out" / "trials" / name
        folder.mkdir(parents=True)
        stages = {"data": str(tmp_path / "store" / "data" / "d"), "directions": f"/elsewhere/directions/{name}"}
        (folder / "stages.json").write_text(json.dumps(stages))
        names = ("score", "flip_rate", "disentanglement", "ssim")
        (folder / "row.json").write_text(json.dumps({"status": "finished", **dict(zip(names, row, strict=True))}))
        os.utime(folder / "row.json", (1000 + age, 1000 + age + 100 * (name == "last")))
    running = tmp_path / "out" / "trials" / "running"
    running.mkdir()
    (running / "stages.json").write_text(json.dumps({"directions": "/elsewhere/directions/running"}))
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("best", "names"),
    [
        (None, {"best", "second", "third", "sharp", "last", "nan", "running"}),
        (0, {"best", "sharp", "last", "running"}),  # the Pareto front, the last, and what has not finished
        (2, {"best", "second", "sharp", "last", "running"}),
        (3, {"best", "second", "third", "sharp", "last", "running"}),
    ],
)
def test_what_the_trials_of_an_output_rest_on_is_protected(sweep: Path, best: int | None, names: set[str]) -> None:
    assert protected([sweep], best) == {("data", "d"), *(("directions", n) for n in names)}


@pytest.mark.parametrize("harm", ["no folder", "no trials", "damaged stages", "damaged row"])
def test_an_output_that_can_not_be_read_protects_nothing_silently(sweep: Path, harm: str) -> None:
    """A misspelt folder must not end in the removal of what it was to protect."""
    if harm == "damaged stages":
        (sweep / "trials" / "best" / "stages.json").write_text("{")
    elif harm == "damaged row":
        (sweep / "trials" / "best" / "row.json").write_text("[]")
    folder = {"no folder": sweep / "absent", "no trials": sweep / "trials"}.get(harm, sweep)
    with pytest.raises(UserError, match="holds no trials|can't be read"):
        protected([folder], 1)


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


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
