"""``diffex submit``: what travels, what is refused, and jobs on a real head with and without a token."""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from heads import RAY, TOKEN, Head, free_port, heads

from diffex import submit
from diffex.errors import UserError

Captured = pytest.CaptureFixture[str]


def run(*argv: str) -> int:
    """The verb as the command line runs it."""
    parser = argparse.ArgumentParser()
    submit.add_options(parser)
    return submit.submit_main(parser.parse_args(argv))


def project(folder: Path, **files: str) -> Path:
    """A folder with a package, a script in a folder of its own, and what a session leaves lying about."""
    texts = {
        "diffex/__init__.py": "",
        "diffex/marker.py": "WORD = 'the uploaded code'\n",
        "jobs/hello.py": (
            "import os, sys\nfrom pathlib import Path\nfrom diffex.marker import WORD\n"
            "print('says', WORD, 'to', *sys.argv[1:], os.environ.get('COLOUR'))\n"
            "print('sees', *sorted(p.as_posix() for p in Path().rglob('*') if p.is_file() and p.suffix != '.pyc'))\n"
        ),
        "jobs/fails.py": "import sys\nprint('about to fail')\nsys.exit(3)\n",
        "diffex-output/store/weights.bin": "w" * 1000,
        "results.db": "d" * 1000,
        ".venv/lib/huge.py": "h" * 1000,
        "jobs/__pycache__/hello.cpython-311.pyc": "c",
        **files,
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def git(folder: Path, *argv: str) -> None:
    subprocess.run(["git", "-C", str(folder), *argv], check=True, capture_output=True)


def names(upload: submit.Upload) -> set[str]:
    return {name for name, _ in upload.files}


CODE = {"diffex/__init__.py", "diffex/marker.py", "jobs/hello.py", "jobs/fails.py"}

# ----------------------------------------------------------------------------------------------------------------------
# What travels


def test_history_environments_caches_and_results_never_travel(tmp_path: Path) -> None:
    folder = project(tmp_path, **{".git/objects/pack": "g" * 1000})
    assert names(submit.collect(folder)) == CODE


def test_in_a_repository_what_git_ignores_stays_and_what_it_does_not_know_yet_travels(tmp_path: Path) -> None:
    folder = project(tmp_path, **{".gitignore": "data/\n*.npz\n", "data/cells.parquet": "x", "jobs/a.npz": "x"})
    git(folder, "init")
    git(folder, "add", "diffex")
    upload = submit.collect(folder)
    assert upload.by_git
    assert names(upload) == {*CODE, ".gitignore"}


def test_a_folder_inside_a_repository_obeys_the_ignore_file_above_it(tmp_path: Path) -> None:
    git(tmp_path, "init")
    (tmp_path / ".gitignore").write_text("*.secret\n")
    folder = project(tmp_path / "inner", **{"jobs/key.secret": "x"})
    assert names(submit.collect(folder)) == CODE


def test_a_folder_that_a_repository_ignores_as_a_whole_still_travels(tmp_path: Path) -> None:
    git(tmp_path, "init")
    (tmp_path / ".gitignore").write_text("inner/\n")
    assert names(submit.collect(project(tmp_path / "inner"))) == CODE


@pytest.mark.parametrize("pattern", ["data", "data/", "/data", "data/*", "*.parquet", "data/deep/cells.parquet"])
def test_exclude_takes_names_folders_and_paths(tmp_path: Path, pattern: str) -> None:
    folder = project(tmp_path, **{"data/deep/cells.parquet": "x"})
    assert "data/deep/cells.parquet" in names(submit.collect(folder))
    assert names(submit.collect(folder, [pattern])) == CODE


def test_links_that_lead_out_of_the_folder_do_not_travel_and_are_told(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "key").write_text("secret")
    folder = project(tmp_path / "inner")
    (folder / "data").symlink_to(tmp_path / "outside")
    (folder / "key").symlink_to(tmp_path / "outside" / "key")
    for repository in (False, True):
        if repository:
            git(folder, "init")
        upload = submit.collect(folder)
        assert names(upload) == CODE
        assert upload.left_out == ("data", "key")
        assert "data, key" in upload.describe()


def test_the_archive_holds_the_listed_files_and_is_equal_for_equal_files(tmp_path: Path) -> None:
    folder = project(tmp_path / "a")
    upload = submit.collect(folder)
    upload.pack(tmp_path / "1.zip")
    os.utime(folder / "jobs" / "hello.py", (0, 0))
    upload.pack(tmp_path / "2.zip")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        assert set(archive.namelist()) == CODE
        assert archive.read("jobs/fails.py") == (folder / "jobs" / "fails.py").read_bytes()


def test_the_size_and_the_largest_files_are_told_largest_first(tmp_path: Path) -> None:
    folder = project(tmp_path, **{f"file{i}.txt": "x" * 1000 * i for i in range(1, 8)})
    told = submit.collect(folder).describe().splitlines()
    assert "11 files, 28." in told[0]
    assert [line.split()[-1] for line in told[1:]] == [f"file{i}.txt" for i in (7, 6, 5, 4, 3)]


def test_the_sizes_of_a_listing_are_those_on_the_disk(tmp_path: Path) -> None:
    upload = submit.collect(project(tmp_path))
    assert dict(upload.files) == {name: (tmp_path / name).stat().st_size for name in CODE}
    assert upload.size == sum((tmp_path / name).stat().st_size for name in CODE)


def test_a_limit_that_is_no_size_is_told_with_what_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    submit.add_options(parser)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--max-upload", "many", "jobs/hello.py"])
    assert stopped.value.code == 2
    assert "--max-upload: 'many' is not a size: write e.g. 500MB" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes, each told before anything is sent


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):  # a Ray of another test may have set them
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max-upload", "100B", "jobs/hello.py"], r"more than --max-upload 100 B; the largest are jobs/hello.py"),
        (["--max-upload", "0MB", "jobs/hello.py"], "more than --max-upload 0 B"),
        (["--env", "COLOUR", "jobs/hello.py"], "--env takes NAME=VALUE, got 'COLOUR'"),
        (["--pip", "absent.txt", "jobs/hello.py"], "can't read the requirements 'absent.txt'"),
        (["jobs/helo.py"], "there is no script 'jobs/helo.py'"),
        (["../outside.py"], "there is no script '../outside.py'"),
        (["--exclude", "jobs", "jobs/hello.py"], "'jobs/hello.py' does not travel"),
        (["--exclude", "*", "jobs/hello.py"], "nothing in '.' is left to send"),
        (["--working-dir", "absent", "jobs/hello.py"], "there is no folder 'absent'"),
        (["--address", "ray://127.0.0.1:10001", "jobs/hello.py"], "jobs go to the dashboard"),
    ],
)
def test_a_mistake_is_told_in_one_line(here: Path, argv: list[str], words: str) -> None:
    (here.parent / "outside.py").write_text("")
    with pytest.raises(UserError, match=words) as caught:
        run(*argv)
    assert "\n" not in str(caught.value)


def test_an_address_where_nobody_answers_names_the_tunnel(here: Path) -> None:
    with pytest.raises(UserError, match="no dashboard of Ray answers .*ray dashboard cluster.yaml"):
        run("--address", f"127.0.0.1:{free_port()}", "jobs/hello.py")


def test_a_token_is_looked_for_where_ray_looks(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("default\n")
    (tmp_path / "file").write_text("named\n")
    named = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "file")}
    assert submit.find_token({}, tmp_path)[0] == "default"
    assert submit.find_token(named, tmp_path)[0] == "named"
    assert submit.find_token({**named, "RAY_AUTH_TOKEN": "given"}, tmp_path)[0] == "given"


def test_a_token_file_that_is_named_but_absent_is_not_replaced_by_another(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("default\n")
    with pytest.raises(UserError, match="RAY_AUTH_TOKEN_PATH"):
        submit.find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "absent")}, tmp_path)


@pytest.mark.parametrize("argv", [["x.py", "--", "--store", "s"], ["x.py", "--store", "s"]])
def test_what_follows_the_script_belongs_to_it_with_or_without_dashes(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    submit.add_options(parser.add_subparsers().add_parser("submit"))
    options = parser.parse_args(["submit", "--no-wait", *argv])
    given = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    assert (options.script, given, options.no_wait) == ("x.py", ["--store", "s"], True)


# ----------------------------------------------------------------------------------------------------------------------
# The log, over a connection that breaks


class Broken:
    """A job server whose connections break: each tells the log from its beginning, some pieces further."""

    def __init__(self, pieces: list[str], breaks: int) -> None:
        self.pieces, self.breaks, self.calls = pieces, breaks, 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.calls += 1
        last = self.calls > self.breaks
        for piece in self.pieces if last else self.pieces[: self.calls]:
            yield piece
        if not last:
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(status=SimpleNamespace(value="SUCCEEDED"), driver_exit_code=0, message="")


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_sleep(seconds: float) -> None:
        pass

    monkeypatch.setattr(submit.asyncio, "sleep", no_sleep)


def test_a_log_is_shown_once_although_the_connection_broke_three_times(hurried: None) -> None:
    client, shown = Broken(["a\n", "b\n", "c\n", "d\n", "e\n"], breaks=3), []
    info = asyncio.run(submit.follow(client, "job", shown.append))
    assert "".join(shown) == "a\nb\nc\nd\ne\n"
    assert client.calls == 4
    assert info.status.value == "SUCCEEDED"


def test_a_cluster_that_stays_away_is_given_up(hurried: None) -> None:
    client = Broken([], breaks=10**9)
    with pytest.raises(ConnectionError, match="lost the connection"):
        asyncio.run(submit.follow(client, "job", lambda text: None))
    assert client.calls == submit.PATIENCE


@pytest.mark.parametrize(
    ("status", "code", "returned"),
    [
        ("SUCCEEDED", 0, 0), ("STOPPED", None, 130), ("STOPPED", -15, 130), ("FAILED", 3, 3), ("FAILED", -9, 137),
        ("FAILED", None, 1), ("FAILED", 0, 1),
    ],
)  # fmt: skip
def test_the_exit_code_tells_how_the_job_ended(status: str, code: int | None, returned: int) -> None:
    info = SimpleNamespace(status=SimpleNamespace(value=status), driver_exit_code=code, message="first\nsecond")
    assert submit._verdict("job", info) == returned


# ----------------------------------------------------------------------------------------------------------------------
# A real head


@pytest.fixture(scope="module")
def open_head() -> Iterator[Head]:
    yield from heads("disabled")


@pytest.fixture(scope="module")
def token_head() -> Iterator[Head]:
    yield from heads("token")


def test_a_script_runs_on_the_uploaded_code_with_its_arguments_and_environment(
    open_head: Head, here: Path, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # the address given must win over Ray's own variable
    status = run("--address", open_head.url, "--env", "COLOUR=blue", "jobs/hello.py", "--", "you", "and me")
    out, err = capfd.readouterr()
    assert status == 0, out + err
    assert "says the uploaded code to you and me blue\n" in out
    assert set(out.partition("sees ")[2].splitlines()[0].split()) == CODE  # what was told to travel, and no more
    assert f"upload of {here}: 4 files" in out
    assert "succeeded" in err


def test_the_first_ablation_is_submitted_from_this_repository_itself(
    open_head: Head, here: Path, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    status = run("--address", open_head.url, "ablations/channels.py", "--", "--dry-run", "--seeds", "2")
    out, err = capfd.readouterr()
    assert status == 0, out + err
    assert f"upload of {Path.cwd()}" in out
    assert "2 seeds" in out  # the plan, told by the job
    assert "succeeded" in err


def test_a_script_that_fails_gives_its_exit_code_and_the_same_name_then_makes_a_new_job(
    open_head: Head, here: Path, capfd: Captured
) -> None:
    assert run("--address", open_head.url, "--name", "sweep", "jobs/fails.py") == 3
    out, err = capfd.readouterr()
    assert "about to fail" in out
    assert "job sweep failed: exit code 3" in err
    assert run("--address", open_head.url, "--name", "sweep", "--no-wait", "jobs/fails.py") == 0
    assert "job sweep-2 submitted" in capfd.readouterr().out


def test_a_named_job_that_runs_is_followed_and_outlives_ctrl_c(open_head: Head, here: Path, capfd: Captured) -> None:
    from ray.job_submission import JobSubmissionClient

    (here / "jobs" / "waits.py").write_text("import time\nprint('begun')\ntime.sleep(300)\n")
    assert run("--address", open_head.url, "--name", "long", "--no-wait", "jobs/waits.py") == 0
    out, _ = capfd.readouterr()
    assert f"ray job stop --address {open_head.url} long" in out
    with pytest.raises(UserError, match="job long runs something else .python jobs/waits.py."):
        run("--address", open_head.url, "--name", "long", "jobs/hello.py")
    # The command itself in a process of its own, as Ctrl-C reaches it.
    code = (
        "import argparse, sys; from diffex import submit; p = argparse.ArgumentParser(); submit.add_options(p); "
        "sys.exit(submit.submit_main(p.parse_args()))"
    )
    argv = ["--working-dir", str(here), "--address", open_head.url, "--name", "long", "jobs/waits.py"]
    source = str(Path(submit.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", code, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=source
    ) as follower:
        assert follower.stdout is not None
        told = ""
        while "begun" not in told and (line := follower.stdout.readline()):
            told += line
        follower.send_signal(signal.SIGINT)
        told += follower.stdout.read()
    assert "job long runs already: following it" in told
    assert follower.returncode == 130
    assert "goes on without you" in told
    assert "Traceback" not in told
    assert JobSubmissionClient(open_head.url).get_job_status("long") == "RUNNING"


def test_a_cluster_with_a_token_takes_the_right_one_and_refuses_others_in_one_line(
    token_head: Head, here: Path, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ("--address", token_head.url, "jobs/hello.py")
    with pytest.raises(UserError, match="asks for a token, and .*auth_token holds none: set RAY_AUTH_TOKEN"):
        run(*argv)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    with pytest.raises(UserError, match="refuses the token of RAY_AUTH_TOKEN: set") as caught:
        run(*argv)
    assert "\n" not in str(caught.value)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (here / "token").write_text(TOKEN)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(here / "token"))
    capfd.readouterr()
    assert run("--exclude", "token", *argv) == 0
    assert "says the uploaded code" in capfd.readouterr().out


def test_rays_own_command_submits_the_folder_as_well(token_head: Head, here: Path) -> None:
    environ = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    done = subprocess.run(
        [RAY, "job", "submit", "--address", token_head.url, "--working-dir", ".", "--", "python", "jobs/hello.py"],
        cwd=here, env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "says the uploaded code" in done.stdout
