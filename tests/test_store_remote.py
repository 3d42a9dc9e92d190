"""A store that machines share: the same promises over a folder, a file:// URI and a real S3 server on loopback.

A "machine" is a Store with a cache of its own.
"""

import json
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import pytest

from diffex import remote as remote_module
from diffex.errors import UserError
from diffex.garbage import collect, verify
from diffex.remote import Remote
from diffex.store import Store

PATIENCE = 120.0  # seconds after which a test gives up on another process
LEASE = 4.0  # seconds
SETTLE = 1.2  # seconds; the S3 server's time stamps are whole seconds

Run = Callable[[Path], dict[str, Any]]
CONTENT = {
    "result.txt": b"result", "deep/er/numbers.bin": bytes(range(256)) * 64, "empty": b"",
    "not-packed.gz": b"plain text", "name with spaces, ü & 100%.txt": b"x",
}  # fmt: skip


def writer(counter: list[int] | None = None, text: bytes = b"result") -> Run:
    """A stage that writes several files, and counts how often it ran."""

    def run(out: Path) -> dict[str, Any]:
        if counter is not None:
            counter.append(1)
        for name, content in {**CONTENT, "result.txt": text}.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(content)
        return {"score": 0.5}

    return run


def forbidden(out: Path) -> dict[str, Any]:
    """A stage that must not run."""
    raise AssertionError("computed again")


def tree(folder: Path) -> dict[str, bytes]:
    """All files of an entry but its record."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    found.pop("entry.json", None)
    return found


@dataclass
class Place:
    """A place that machines share."""

    root: str
    folder: Path

    def machine(self, name: str, settle: float = 0.0, lease: float = LEASE) -> Store:
        return Store(self.root, cache=self.folder / name, settle=settle, lease=lease)

    @property
    def objects(self) -> Remote:
        return Remote(self.root)

    def attempt(self) -> str:
        """Where the files of the entry stage/abc lie."""
        record = self.objects.read_json("stage/abc/entry.json")
        assert record is not None
        return f"stage/abc/{record['attempt']}"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Host and port of an S3 server with a bucket called bucket."""
    server_module = pytest.importorskip("moto.server", reason="pip install 'diffex[test]' for an S3 server")
    from pyarrow import fs

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    query = f"region=us-east-1&endpoint_override={host}:{port}&scheme=http"
    fs.FileSystem.from_uri(f"s3://key:secret@bucket/x?{query}&allow_bucket_creation=true")[0].create_dir("bucket")
    yield f"{host}:{port}"
    server.stop()


def place_of(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    if kind == "folder":
        return Place(str(tmp_path / "shared"), tmp_path)
    if kind == "file":
        return Place(f"file://{tmp_path}/shared", tmp_path)
    endpoint = request.getfixturevalue("s3")
    return Place(
        f"s3://key:secret@bucket/{tmp_path.name}?region=us-east-1&endpoint_override={endpoint}&scheme=http", tmp_path
    )


@pytest.fixture(params=["folder", "file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Any place."""
    return place_of(request.param, tmp_path, request)


@pytest.fixture(params=["file", "s3"])
def distant(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A place that a URI names."""
    return place_of(request.param, tmp_path, request)


# ----------------------------------------------------------------------------------------------------------------------
# Finished entries


def test_what_one_machine_has_computed_another_is_served(place: Place) -> None:
    first = place.machine("one").compute("stage", "abc", writer(), about={"needs": {"data": "d1"}})
    two = place.machine("two")
    assert two.has("stage", "abc")
    second = two.compute("stage", "abc", forbidden)
    assert (first.computed, second.computed) == (True, False)
    assert tree(first.path) == tree(second.path) == CONTENT
    assert (second.facts, second.seconds) == (first.facts, first.seconds)
    assert second.path.parts[-2:] == ("stage", "abc")
    assert json.loads((second.path / "entry.json").read_text())["about"] == {"needs": {"data": "d1"}}


def test_what_nobody_has_computed_is_not_there(place: Place) -> None:
    assert not place.machine("one").has("stage", "abc")
    assert place.machine("one").get("stage", "abc") is None


def test_another_machine_sees_no_entry_before_it_is_whole(place: Place) -> None:
    seen = []

    def run(out: Path) -> dict[str, Any]:
        facts = writer()(out)
        seen.append((place.machine("two").has("stage", "abc"), place.machine("two").get("stage", "abc")))
        return facts

    place.machine("one").compute("stage", "abc", run)
    assert seen == [(False, None)]


def test_the_address_opens_the_same_store(place: Place) -> None:
    place.machine("one").compute("stage", "abc", writer())
    assert Store(place.machine("one").address, cache=place.folder / "other").get("stage", "abc") is not None


def test_an_entry_on_this_machine_is_not_fetched_again(distant: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    distant.machine("one").compute("stage", "abc", writer())
    assert distant.machine("two").get("stage", "abc") is not None
    monkeypatch.setattr(Remote, "download", lambda *given: pytest.fail("fetched again"))
    assert distant.machine("two").get("stage", "abc") is not None


def test_a_finished_entry_leaves_neither_claims_nor_progress(distant: Place) -> None:
    one = distant.machine("one")

    def run(out: Path) -> dict[str, Any]:
        (out / "checkpoint").write_text("1")
        one.save_partial("stage", "abc")
        (out / "checkpoint").unlink()
        return writer()(out)

    one.compute("stage", "abc", run)
    assert set(distant.objects.files()) == {"stage/abc/entry.json", *(f"{distant.attempt()}/{n}" for n in CONTENT)}
    assert [p.name for p in (one.root / "stage").iterdir() if p.is_dir()] == ["abc"]


def test_facts_that_are_not_json_make_no_entry(place: Place) -> None:
    with pytest.raises(TypeError):
        place.machine("one").compute("stage", "abc", lambda out: {"path": out})
    assert place.machine("two").get("stage", "abc") is None


# ----------------------------------------------------------------------------------------------------------------------
# Damage


def flip_a_byte(place: Place) -> None:
    name = f"{place.attempt()}/deep/er/numbers.bin"
    content = bytearray(place.objects.read(name) or b"")
    content[1000] ^= 1
    place.objects.write(name, bytes(content))


def cut_a_file(place: Place) -> None:
    place.objects.write(f"{place.attempt()}/result.txt", b"res")


def lose_a_file(place: Place) -> None:
    place.objects.delete([f"{place.attempt()}/result.txt"])


def lose_the_record(place: Place) -> None:
    """As if the writer had been killed before the last step."""
    place.objects.delete(["stage/abc/entry.json"])


def cut_the_record(place: Place) -> None:
    content = place.objects.read("stage/abc/entry.json") or b""
    place.objects.write("stage/abc/entry.json", content[: len(content) // 2])


def point_outside(place: Place) -> None:
    """A record that names a file outside its folder."""
    record = place.objects.read_json("stage/abc/entry.json") or {}
    record["files"]["../../escaped"] = next(iter(record["files"].values()))
    place.objects.write("stage/abc/entry.json", json.dumps(record).encode())


DAMAGE = [flip_a_byte, cut_a_file, lose_a_file, lose_the_record, cut_the_record, point_outside]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_remote_entry_is_never_served_but_computed_again(
    distant: Place, damage: Callable[[Place], None]
) -> None:
    distant.machine("one").compute("stage", "abc", writer())
    damage(distant)
    two = distant.machine("two")
    assert two.get("stage", "abc") is None
    runs: list[int] = []
    assert two.compute("stage", "abc", writer(runs)).computed
    assert len(runs) == 1
    third = distant.machine("three").compute("stage", "abc", forbidden)
    assert tree(third.path) == CONTENT
    assert not list(distant.folder.rglob("escaped"))


def test_a_damaged_copy_on_this_machine_is_fetched_again(distant: Place) -> None:
    path = distant.machine("one").compute("stage", "abc", writer()).path
    (path / "result.txt").write_bytes(b"resulT")
    again = distant.machine("one").compute("stage", "abc", forbidden)
    assert tree(again.path) == CONTENT


def test_two_attempts_that_both_finish_never_mix(distant: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims let one work at a time but for rare accidents; then the last to finish is believed, and both are whole."""
    monkeypatch.setattr(Remote, "claimed", lambda self, folder, note, **given: warnings.catch_warnings())
    paths = {}

    def while_another_does(out: Path) -> dict[str, Any]:
        facts = writer(text=b"slow")(out)
        (out / "only-slow").write_text("")
        paths["fast"] = distant.machine("fast").compute("stage", "abc", writer(text=b"fast")).path
        return facts

    paths["slow"] = distant.machine("slow").compute("stage", "abc", while_another_does).path
    paths["third"] = distant.machine("third").compute("stage", "abc", forbidden).path
    assert (paths["fast"] / "result.txt").read_bytes() == b"fast"
    assert tree(paths["slow"]) == tree(paths["third"]) == {**CONTENT, "result.txt": b"slow", "only-slow": b""}


def test_an_attempt_that_is_killed_before_its_record_harms_no_finished_one(
    distant: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Remote, "claimed", lambda self, folder, note, **given: warnings.catch_warnings())

    def killed(self: Remote, path: str, content: bytes) -> None:
        raise UserError("killed")

    def while_another_finishes(out: Path) -> dict[str, Any]:
        distant.machine("fast").compute("stage", "abc", writer(text=b"fast"))
        monkeypatch.setattr(Remote, "write", killed)
        return writer(text=b"slow")(out)

    with pytest.raises(UserError, match="killed"):
        distant.machine("slow").compute("stage", "abc", while_another_finishes)
    assert sum(n.endswith("result.txt") for n in distant.objects.files()) == 2
    third = distant.machine("third").compute("stage", "abc", forbidden)
    assert tree(third.path) == {**CONTENT, "result.txt": b"fast"}


# ----------------------------------------------------------------------------------------------------------------------
# Work in progress


def stopped(store: Store, step: int, **files: str) -> None:
    """A stage that saves checkpoints and then dies of an exception."""

    def run(out: Path) -> dict[str, Any]:
        for name, content in {"checkpoint": str(step), **files}.items():
            (out / name).write_text(content)
        store.save_partial("stage", "abc")
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        store.compute("stage", "abc", run)


def test_progress_goes_on_where_another_machine_saved_it(place: Place) -> None:
    stopped(place.machine("one"), 7, history="h")
    found = []

    def resume(out: Path) -> dict[str, Any]:
        found.append({n: c for n, c in tree(out).items() if n != "seconds"})
        for name in ("checkpoint", "history"):
            (out / name).unlink()
        return writer()(out)

    entry = place.machine("two").compute("stage", "abc", resume)
    assert found == [{"checkpoint": b"7", "history": b"h"}]
    assert tree(entry.path) == CONTENT


def test_the_seconds_of_another_machine_are_not_forgotten(place: Place) -> None:
    one = place.machine("one")

    def slow(out: Path) -> dict[str, Any]:
        time.sleep(0.3)
        one.save_partial("stage", "abc")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        one.compute("stage", "abc", slow)
    assert place.machine("two").compute("stage", "abc", writer()).seconds >= 0.3


def test_a_half_saved_set_is_ignored_and_the_one_before_is_used(
    distant: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = distant.machine("one")
    stopped(one, 1)
    (one.partial("stage", "abc") / "checkpoint").write_text("2")
    whole = Remote.write

    def killed(self: Remote, path: str, content: bytes) -> None:
        if path.endswith("partial.json"):
            raise UserError("killed")
        whole(self, path, content)

    monkeypatch.setattr(Remote, "write", killed)
    with pytest.warns(UserWarning, match="was not saved"):
        one.save_partial("stage", "abc")
    monkeypatch.undo()
    assert (distant.machine("two").partial("stage", "abc") / "checkpoint").read_text() == "1"
    one.save_partial("stage", "abc")
    assert (distant.machine("three").partial("stage", "abc") / "checkpoint").read_text() == "2"


def test_damaged_progress_is_not_used(distant: Place) -> None:
    stopped(distant.machine("one"), 1)
    name = next(n for n in distant.objects.files() if n.endswith("checkpoint"))
    distant.objects.write(name, b"x")
    assert tree(distant.machine("two").partial("stage", "abc")) == {}


def test_only_what_changed_is_sent(distant: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    one = distant.machine("one")
    folder = one.partial("stage", "abc")
    (folder / "large").write_bytes(bytes(1000))
    (folder / "checkpoint").write_text("1")
    one.save_partial("stage", "abc")
    sent = []
    upload = Remote.upload
    monkeypatch.setattr(Remote, "upload", lambda self, f, names, to: sent.append(names) or upload(self, f, names, to))
    (folder / "checkpoint").write_text("2")
    one.save_partial("stage", "abc")
    assert sent == [["checkpoint"]]
    two = distant.machine("two").partial("stage", "abc")
    assert tree(two) == {"large": bytes(1000), "checkpoint": b"2"}
    assert len([n for n in distant.objects.files() if "checkpoint" in n]) == 1  # the one before is gone


def test_files_that_are_gone_are_gone_on_the_other_machine(distant: Place) -> None:
    one = distant.machine("one")
    folder = one.partial("stage", "abc")
    (folder / "old").write_text("1")
    one.save_partial("stage", "abc")
    two = distant.machine("two")
    assert tree(two.partial("stage", "abc")) == {"old": b"1"}
    (folder / "old").unlink()
    (folder / "new").write_text("2")
    one.save_partial("stage", "abc")
    assert tree(two.partial("stage", "abc")) == {"new": b"2"}


def test_own_newer_files_are_kept_until_another_machine_has_saved(distant: Place) -> None:
    one, two = distant.machine("one"), distant.machine("two")
    folder = one.partial("stage", "abc")
    (folder / "checkpoint").write_text("1")
    one.save_partial("stage", "abc")
    (folder / "checkpoint").write_text("2")
    assert (one.partial("stage", "abc") / "checkpoint").read_text() == "2"
    (two.partial("stage", "abc") / "checkpoint").write_text("3")
    two.save_partial("stage", "abc")
    assert (one.partial("stage", "abc") / "checkpoint").read_text() == "3"


# ----------------------------------------------------------------------------------------------------------------------
# Several processes on several machines


def race(place: Place, number: int, machine: str, together: Barrier, waiting: list[Event]) -> None:
    """Ask for an entry at the same moment as others; the one who computes it holds on until all others wait."""

    def run(out: Path) -> dict[str, Any]:
        for other, event in enumerate(waiting):
            assert other == number or event.wait(PATIENCE)
        (place.folder / f"ran-{number}").write_text("")
        return writer()(out)

    store = place.machine(machine, settle=SETTLE)
    together.wait(PATIENCE)
    entry = store.compute("stage", "abc", run, waiting=waiting[number].set)
    assert tree(entry.path) == CONTENT
    (place.folder / f"got-{number}").write_text(str(entry.computed))


def test_machines_that_want_the_same_entry_compute_it_once(place: Place, spawn: Any) -> None:
    """Three processes, two of them on one machine."""
    machines = ["one", "one", "two"]
    together, waiting = spawn.barrier(len(machines)), [spawn.event() for _ in machines]
    children = [spawn(race, place, i, name, together, waiting) for i, name in enumerate(machines)]
    for child in children:
        child.join(PATIENCE)
    assert [child.exitcode for child in children] == [0] * len(machines)
    assert len(list(place.folder.glob("ran-*"))) == 1
    assert sorted(f.read_text() for f in place.folder.glob("got-*")) == ["False", "False", "True"]


def hold_for_ever(place: Place, holding: Event, never: Event) -> None:
    """Save a checkpoint, begin to write the next, then hold the entry until killed."""
    store = place.machine("one", settle=SETTLE)

    def run(out: Path) -> dict[str, Any]:
        (out / "checkpoint").write_text(f"by {os.getpid()}")
        store.save_partial("stage", "abc")
        holding.set()
        never.wait()
        return {}

    store.compute("stage", "abc", run, about={"needs": {"data": "d1"}})


def test_another_machine_takes_over_from_a_killed_process_where_it_was(place: Place, spawn: Any) -> None:
    holding, never = spawn.event(), spawn.event()
    child = spawn(hold_for_ever, place, holding, never)
    assert holding.wait(PATIENCE)
    found: list[str] = []
    polls: list[float] = []
    two = place.machine("two")

    def kill_after_more_than_a_lease() -> None:
        """We wait as long as the other lives; its death, and nothing else, lets us in."""
        polls.append(time.monotonic())
        assert not two.has("stage", "abc")
        assert polls[-1] - polls[0] < PATIENCE
        if child.is_alive() and polls[-1] - polls[0] > (LEASE + 1 if "://" in place.root else 1):
            os.kill(child.pid, signal.SIGKILL)
            child.join(PATIENCE)

    def resume(out: Path) -> dict[str, Any]:
        assert not child.is_alive()
        found.append((out / "checkpoint").read_text())
        (out / "checkpoint").unlink()
        return writer()(out)

    entry = two.compute("stage", "abc", resume, waiting=kill_after_more_than_a_lease)
    assert child.exitcode == -signal.SIGKILL
    assert found == [f"by {child.pid}"]
    assert entry.computed
    assert tree(place.machine("three").compute("stage", "abc", forbidden).path) == CONTENT


def test_a_collection_takes_nothing_that_another_machine_computes_or_computes_from(place: Place, spawn: Any) -> None:
    other = place.machine("other")
    for stage, digest in (("data", "d1"), ("data", "d2"), ("stage", "xyz")):
        other.compute(stage, digest, writer())
    holding, never = spawn.event(), spawn.event()
    child = spawn(hold_for_ever, place, holding, never)
    assert holding.wait(PATIENCE)
    assert other.running() == {("stage", "abc"): (("data", "d1"),)}
    taken = collect(other, older_than=0, max_bytes=0, recent=0, dry_run=False).taken
    assert {i.key for i in taken} == {("data", "d2"), ("stage", "xyz")}
    assert {i.key for i in other.entries()} == {("data", "d1"), ("stage", "abc")}
    partial = next(i for i in other.entries() if i.state == "partial")
    assert not other.remove(partial)
    os.kill(child.pid, signal.SIGKILL)
    child.join(PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while other.running() and time.monotonic() < deadline:
        time.sleep(0.2)
    taken = collect(other, older_than=0, recent=0, dry_run=False).taken
    assert {(i.key, i.state) for i in taken} == {(("data", "d1"), "finished"), (("stage", "abc"), "partial")}


def test_the_clock_of_a_machine_does_not_matter(distant: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine a day ahead neither takes a live claim nor waits for a dead one."""
    day, clock = 86400.0, time.time
    monkeypatch.setattr(time, "time", lambda: clock() + day)
    objects = Remote(distant.root, lease=LEASE, settle=SETTLE)
    answers = []
    with objects.claimed("stage/abc.claims", {}, done=lambda: False, waiting=None):
        other = Remote(distant.root, lease=LEASE, settle=0)
        with other.claimed("stage/abc.claims", {}, done=lambda: bool(answers), waiting=lambda: answers.append("waits")):
            pass
    assert answers == ["waits"]


def test_the_oldest_live_claim_has_the_work(distant: Place) -> None:
    objects = Remote(distant.root, lease=LEASE)
    for owner in ("b", "a", "dead"):
        objects.write(f"f/{owner}.beat", b"")
        objects.write(f"f/{owner}", b"{}")
        time.sleep(1.1)
    now = max(mtime for _, mtime in objects.files("f").values())
    assert objects.living("f", now) == ["b", "a", "dead"]
    time.sleep(LEASE)
    for owner in ("a", "b"):
        objects.write(f"f/{owner}.beat", b"")
    assert objects.living("f", now) == ["b", "a"]
    assert set(objects.files("f")) == {"a", "a.beat", "b", "b.beat"}


# ----------------------------------------------------------------------------------------------------------------------
# Housekeeping


def test_files_of_a_killed_attempt_are_collected_when_they_are_old(distant: Place) -> None:
    one = distant.machine("one")
    one.compute("stage", "abc", writer())
    distant.objects.write("stage/abc/0123/result.txt", b"half")
    distant.objects.write("stage/new/4567/result.txt", b"half")
    assert collect(one, dry_run=False).taken == []
    taken = collect(one, keep={("stage", "abc")}, older_than=0, recent=0, dry_run=False).taken
    assert {(i.digest, i.name, i.state) for i in taken} == {("abc", "0123", "leftover"), ("new", "4567", "leftover")}
    assert tree(distant.machine("two").compute("stage", "abc", forbidden).path) == CONTENT


def test_entries_tells_of_all_that_takes_room(distant: Place) -> None:
    one = distant.machine("one")
    one.compute("stage", "abc", writer(), about={"needs": {"data": "d1"}})
    (one.partial("other", "def") / "checkpoint").write_text("1234")
    one.save_partial("other", "def")
    found = {i.key: i for i in one.entries()}
    assert {k: i.state for k, i in found.items()} == {("stage", "abc"): "finished", ("other", "def"): "partial"}
    assert found["stage", "abc"].needs == (("data", "d1"),)
    files = distant.objects.files()
    assert sum(i.bytes for i in found.values()) == sum(size for size, _ in files.values())
    cut_the_record(distant)
    assert {i.state for i in one.entries()} == {"damaged-record", "leftover", "partial"}


def test_an_entry_that_was_removed_is_computed_again(distant: Place) -> None:
    one = distant.machine("one")
    one.compute("stage", "abc", writer())
    assert one.remove(next(iter(one.entries())))
    assert distant.objects.files() == {}
    runs: list[int] = []
    assert distant.machine("one").compute("stage", "abc", writer(runs)).computed
    assert runs == [1]


@pytest.mark.parametrize("damage", [flip_a_byte, lose_a_file, cut_the_record])
def test_verification_finds_damage(distant: Place, damage: Callable[[Place], None]) -> None:
    one = distant.machine("one")
    one.compute("stage", "abc", writer())
    one.compute("stage", "def", writer())
    assert [problem for _, problem in verify(one)] == ["", ""]
    damage(distant)
    assert [i.digest for i, problem in verify(one) if problem] == ["abc"]


# ----------------------------------------------------------------------------------------------------------------------
# Addresses and mistakes


def test_a_uri_that_went_through_a_path_is_the_same_store(distant: Place) -> None:
    assert Store(Path(distant.root), cache=distant.folder / "one").address == distant.root


def test_the_cache_can_be_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFEX_CACHE", str(tmp_path / "caches"))
    one, other = Store(f"file://{tmp_path}/one"), Store(f"file://{tmp_path}/other")
    assert one.root.parent == other.root.parent == tmp_path / "caches"
    assert one.root != other.root


def test_keys_are_told_to_nobody() -> None:
    with pytest.raises(UserError) as caught:
        Store("s3://key:secret@bucket/prefix?region=us-east-1&endpoint_override=127.0.0.1:9&scheme=http")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "word"),
    [
        ("ftp://host/folder", "scheme must be one of"),
        ("s3:///prefix", "names no bucket"),
        ("s3://key:secret@bucket/prefix?regoin=x", "address can't be read"),
        ("s3://key:secret@bucket/x?region=us-east-1&endpoint_override=127.0.0.1:9&scheme=http", "check the network"),
        ("gs://anonymous@b/x?retry_limit_seconds=1&endpoint_override=127.0.0.1:9&scheme=http", "check the network"),
    ],
)
def test_an_address_that_can_not_be_used_is_refused_in_one_line(uri: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=word) as caught:
        Store(uri, cache=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_bucket_that_is_not_there_is_refused(s3: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bucket is not there"):
        Store(f"s3://key:secret@nobody/x?region=us-east-1&endpoint_override={s3}&scheme=http", cache=tmp_path)


def test_a_bucket_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    class Refusal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(403)
            self.send_header("Content-Type", "application/xml")
            self.end_headers()
            self.wfile.write(b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")

        def log_message(self, *given: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusal)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(UserError, match="check the keys"):
            Store(
                f"s3://key:secret@b/x?region=us-east-1&endpoint_override=127.0.0.1:{server.server_port}&scheme=http",
                cache=tmp_path,
            )
    finally:
        server.shutdown()
        server.server_close()


def test_a_large_file_goes_in_pieces(distant: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "CHUNK", 1 << 20)
    content = os.urandom(1 << 20) * 12 + b"end"

    def run(out: Path) -> dict[str, Any]:
        (out / "large").write_bytes(content)
        return {}

    distant.machine("one").compute("stage", "abc", run)
    assert tree(distant.machine("two").compute("stage", "abc", forbidden).path) == {"large": content}
