"""``diffex submit``: run a script of this folder as a Ray job on a cluster, follow its log, return its exit code.

The folder travels as one archive that is made here, so that what is printed is what is sent: the files that git would
commit, without data.  A cluster that asks for a token gets the one that Ray itself would use; no other ever sees it.
"""

from __future__ import annotations

import argparse
import asyncio
import fnmatch
import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from diffex.errors import UserError
from diffex.units import human_size, size

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DASHBOARD = "http://127.0.0.1:8265"
"""Ray's dashboard on this machine, or the near end of a tunnel to a head's."""

NEVER = (
    ".git", ".venv", "venv", "__pycache__", "*.pyc", "*.egg-info", ".*_cache", ".hypothesis",
    "diffex-output", "mlruns", "mlartifacts", "*.db",
)  # fmt: skip
"""Patterns of what never travels: history, environments, caches, results."""

ARCHIVE_LIMIT = 100 * 2**20
"""Bytes of an archive that Ray's dashboard takes (``DASHBOARD_CLIENT_MAX_SIZE`` of Ray 2.60)."""

PATIENCE = 20
"""Tries, some seconds apart, to find a lost connection again before the job is left alone."""

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``diffex submit``; all of them come before SCRIPT, what follows it belongs to the script."""
    parser.add_argument("--address", metavar="URL", help=f"the cluster's dashboard (default: {DASHBOARD})")
    parser.add_argument(
        "--working-dir", type=Path, default=Path(), metavar="DIR", help="folder that travels (default: this one)"
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN",
        help="leave out files or folders of this name or path, e.g. 'data' or 'docs/*.png'; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--max-upload",
        type=size,
        default="100MB",
        metavar="SIZE",
        help="refuse to send more than this (default: 100MB)",
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="K=V", help="environment variable of the job; repeatable"
    )
    parser.add_argument(
        "--pip", action="append", default=[], metavar="REQUIREMENT",
        help="package, or requirements file, that the job needs besides what the nodes have; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--name", help="name of the job: while one of this name runs it is followed; later it runs again as NAME-2, ..."
    )
    parser.add_argument("--no-wait", action="store_true", help="submit, and don't follow the log")
    parser.add_argument("script", metavar="SCRIPT", help="Python script in the folder, e.g. sweeps/lambda_sweep.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- ARGS", help="arguments of the script")


def submit_main(options: argparse.Namespace) -> int:
    """Submit the script as a job and follow it to its end.

    Args:
        options: as ``add_options`` defines them; ``address`` None means the dashboard on this machine.

    Returns:
        0 where the job succeeded (or was only submitted), 130 where it was stopped or Ctrl-C left it alone, else the
        exit code of the script, 128 + n for signal n, or 1 where it never ran.

    Raises:
        UserError: a setting, the upload, the cluster or its token is not as it should be.
    """
    upload = collect(options.working_dir, options.exclude)
    script = _script(upload, options.script)
    env = _environment(options.env)
    packages = _requirements(options.pip)
    arguments = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    print(upload.describe(), flush=True)
    if upload.size > options.max_upload:
        raise UserError(
            f"{human_size(upload.size)} to send is more than --max-upload {human_size(options.max_upload)}; "
            f"the largest are {', '.join(f'{name} ({human_size(count)})' for name, count in upload.largest(3))}: "
            "leave them out (.gitignore, or --exclude), or raise --max-upload"
        )
    client, login = connect(options.address or DASHBOARD)
    command = shlex.join(["python", script, *arguments])
    name, running = _identity(client, options.name, command)
    if name is not None and running:
        job = name
        print(f"job {job} runs already: following it", flush=True)
    else:
        runtime = {"env_vars": env} | ({"pip": packages} if packages else {})
        job = _send(client, upload, name, command, runtime)
        print(f"job {job} submitted: {command}", flush=True)
    hints = _hints(client, job, login)
    if options.no_wait:
        print(hints)
        return 0
    try:
        info = asyncio.run(follow(client, job, lambda text: print(text, end="", flush=True)))
    except KeyboardInterrupt:
        print(f"\njob {job} goes on without you\n{hints}", file=sys.stderr)
        return 130
    except ConnectionError as error:
        raise UserError(f"{error}; the job goes on.  {' '.join(hints.split())}") from None
    return _verdict(job, info)


# ----------------------------------------------------------------------------------------------------------------------
# What travels


@dataclass(frozen=True)
class Upload:
    """Files of a folder that travel.

    Attributes:
        root: the folder.
        files: (path below the root with slashes, bytes), by path.
        left_out: links and nested repositories that don't travel although nobody excluded them.
        by_git: whether git told which files there are.
    """

    root: Path
    files: tuple[tuple[str, int], ...]
    left_out: tuple[str, ...]
    by_git: bool

    @property
    def size(self) -> int:
        """Bytes of all files, before compression."""
        return sum(size for _, size in self.files)

    def largest(self, num: int) -> list[tuple[str, int]]:
        """The largest files, largest first."""
        return sorted(self.files, key=lambda file: -file[1])[:num]

    def describe(self) -> str:
        """How much is sent, the five largest files, and what is left out unasked."""
        source = "those that git does not ignore" if self.by_git else "not a git repository: all but caches and results"
        lines = [f"upload of {self.root}: {len(self.files)} files, {human_size(self.size)} ({source})"]
        lines += [f"{human_size(size):>12}  {name}" for name, size in self.largest(5)]
        if self.left_out:
            more = f" and {len(self.left_out) - 3} more" if len(self.left_out) > 3 else ""
            lines.append(f"left out (links, nested repositories): {', '.join(self.left_out[:3])}{more}")
        return "\n".join(lines)

    def pack(self, archive: Path) -> None:
        """Write the files to a ZIP archive; equal files give an equal archive, which Ray then sends only once."""
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
            for name, _ in self.files:
                file = self.root / name
                entry = zipfile.ZipInfo(name)  # of 1980, the same at every submission
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = (file.stat().st_mode & 0o777) << 16
                out.writestr(entry, file.read_bytes())


def collect(folder: Path, exclude: Sequence[str] = ()) -> Upload:
    """The files of a folder that travel: what git does not ignore, less ``NEVER`` and ``exclude``.

    Args:
        folder: a folder; where git knows nothing of it all its files are taken.
        exclude: patterns (``fnmatch``) of names, of folders, or of paths below the folder.

    Raises:
        UserError: no folder, or nothing left to send.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {str(folder)!r} (--working-dir)")
    root = folder.resolve()
    patterns = (*NEVER, *(pattern.strip("/") for pattern in exclude))
    listed = _listed_by_git(root)
    files, left_out = [], []
    for name in sorted(listed if listed is not None else _walk(root, patterns)):
        path = root / name
        if excluded(name, patterns):
            continue
        if path.is_file() and path.resolve().is_relative_to(root):
            files.append((name, path.stat().st_size))
        elif path.is_symlink() or path.is_dir():
            left_out.append(name.rstrip("/"))
    if not files:
        raise UserError(f"nothing in {str(folder)!r} is left to send (--working-dir, --exclude)")
    return Upload(root, tuple(files), tuple(left_out), listed is not None)


def excluded(name: str, patterns: Sequence[str]) -> bool:
    """Whether a path, or a folder that it lies in, matches a pattern by its name or by its whole path."""
    path = PurePosixPath(name)
    return any(
        fnmatch.fnmatchcase(part.name, pattern) or fnmatch.fnmatchcase(str(part), pattern)
        for part in (path, *path.parents[:-1])
        for pattern in patterns
    )


def _listed_by_git(root: Path) -> list[str] | None:
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError:  # no git here
        return None
    # A folder that a repository around it ignores as a whole has no files for git.
    names = {os.fsdecode(name) for name in done.stdout.split(b"\0") if name} if done.returncode == 0 else None
    return sorted(names) if names else None


def _walk(root: Path, patterns: Sequence[str]) -> Iterator[str]:
    for place, folders, names in os.walk(root):
        below = PurePosixPath(Path(place).relative_to(root).as_posix())
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        folders[:] = [n for n in folders if n not in links and not excluded(str(below / n), patterns)]
        yield from (str(below / name) for name in (*names, *links))


def _script(upload: Upload, given: str) -> str:
    """The script's path below the folder that travels, whether it was given from there or from here."""
    sent = {name for name, _ in upload.files}
    choices = [upload.root / given, Path(given).resolve()]
    for path in choices:
        if path.is_file() and path.resolve().is_relative_to(upload.root):
            name = path.resolve().relative_to(upload.root).as_posix()
            if name not in sent:
                raise UserError(f"{given!r} does not travel: git ignores it, or --exclude leaves it out")
            return name
    raise UserError(f"there is no script {given!r} in {str(upload.root)!r} (SCRIPT, --working-dir)")


def _environment(pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--env takes NAME=VALUE, got {pair!r}")
        found[name] = value
    return found


def _requirements(given: Sequence[str]) -> list[str]:
    found = []
    for item in given:
        if item.endswith(".txt"):
            try:
                lines = Path(item).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"can't read the requirements {item!r} (--pip): {error}") from None
            found += [line for line in map(str.strip, lines) if line and not line.startswith("#")]
        else:
            found.append(item)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The cluster


def connect(address: str) -> tuple[JobSubmissionClient, bool]:
    """A client of the cluster's job server, logged in where it asks for a token.

    Args:
        address: URL of the dashboard; HOST:PORT means http.

    Returns:
        The client, and whether it had to log in.

    Raises:
        UserError: nothing of Ray answers there, or the token is missing or wrong.
    """
    if address.startswith("ray://"):
        raise UserError(f"--address {address!r} is of a Ray client; jobs go to the dashboard, e.g. {DASHBOARD}")
    address = DASHBOARD if address == "auto" else address if "://" in address else f"http://{address}"
    address = address.rstrip("/")
    headers, source = {}, ""
    if _asks_for_token(address):
        token, source = find_token(os.environ, Path.home())
        headers = {"Authorization": f"Bearer {token}"}

    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for module in ("dashboard_sdk", "job.sdk"):  # they tell of every package and closed connection
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
    try:
        with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray would let them override the address given
            return JobSubmissionClient(address, headers=headers), bool(headers)
    except AuthenticationError:
        raise UserError(
            f"the cluster at {address} refuses the token of {source}: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to "
            "the one it was started with"
        ) from None
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"can't talk to the job server at {address}: {_line(error)}") from None


def _asks_for_token(address: str) -> bool:
    """Whether the cluster wants a token; asked without one, at an endpoint that is open to all."""
    try:
        with urllib.request.urlopen(f"{address}/api/authentication_mode", timeout=15) as answer:
            mode = json.loads(answer.read())["authentication_mode"]
    except urllib.error.HTTPError as error:
        if error.code == 404:  # Ray before 2.52
            return False
        raise UserError(f"{address} answers {error.code} {error.reason}: is it Ray's dashboard? (--address)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"no dashboard of Ray answers at {address} ({_line(reason)}): set --address or RAY_ADDRESS to it, e.g. "
            f"{DASHBOARD}; to a cluster of `ray up`, open the tunnel first: ray dashboard cluster.yaml"
        ) from None
    return bool(mode != "disabled")


def find_token(environ: Mapping[str, str], home: Path) -> tuple[str, str]:
    """The token that Ray itself would use, and where it came from.

    Source: Ray 2.60, "Token authentication": RAY_AUTH_TOKEN, then RAY_AUTH_TOKEN_PATH, then ~/.ray/auth_token.

    Raises:
        UserError: there is none, or the file that should hold it can't be read or is empty.
    """
    if token := environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    named = environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named).expanduser() if named else home / ".ray" / "auth_token"
    source = f"{file} (RAY_AUTH_TOKEN_PATH)" if named else str(file)
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        token = ""
    if not token:
        raise UserError(
            f"the cluster asks for a token, and {source} holds none: set RAY_AUTH_TOKEN, or put the cluster's token "
            "in a file and set RAY_AUTH_TOKEN_PATH to it"
        )
    return token, source


@contextmanager
def _without(*names: str) -> Iterator[None]:
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def _identity(client: Any, name: str | None, command: str) -> tuple[str | None, bool]:
    """Name of the job to start, None for one of Ray's; or of the one that runs already, and True."""
    if name is None:
        return None, False
    if not name or set(name) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."):
        raise UserError(f"--name takes letters, digits, '-', '_' and '.', got {name!r}")
    known = {info.submission_id: info for info in client.list_jobs() if info.submission_id}
    count, last = 1, None
    while (candidate := name if count == 1 else f"{name}-{count}") in known:
        count, last = count + 1, known[candidate]
    if last is None or str(last.status.value) in ENDED:
        return candidate, False
    if last.entrypoint != command:
        raise UserError(
            f"job {last.submission_id} runs something else ({last.entrypoint}): choose another --name, or end it with "
            f"`ray job stop {last.submission_id}`"
        )
    return str(last.submission_id), True


def _send(client: Any, upload: Upload, job: str | None, command: str, runtime: dict[str, Any]) -> str:
    with tempfile.TemporaryDirectory(prefix="diffex-") as place:
        archive = Path(place) / "upload.zip"
        upload.pack(archive)
        size = archive.stat().st_size
        if size > ARCHIVE_LIMIT:
            raise UserError(
                f"the archive has {human_size(size)}, and Ray takes {human_size(ARCHIVE_LIMIT)}; the largest files are "
                f"{', '.join(name for name, _ in upload.largest(3))}: put data where the nodes can read it"
            )
        try:
            # Ray unpacks it on every node that works for the job, makes it the working directory there, and puts it
            # first in PYTHONPATH: `import diffex` finds the uploaded code before any that is installed.
            return str(
                client.submit_job(
                    entrypoint=command, submission_id=job, runtime_env={"working_dir": str(archive), **runtime}
                )
            )
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"the cluster did not take the job: {_line(error)}") from None


async def follow(client: Any, job: str, show: Callable[[str], None]) -> Any:
    """Show a job's log as it grows, over lost connections, until the job has ended.

    Args:
        client: of the cluster.
        job: its submission id.
        show: takes pieces of the log, each once, in order.

    Returns:
        Ray's last word on the job.

    Raises:
        ConnectionError: the cluster could not be reached for a minute and a half.
    """
    shown, lost = 0, 0
    while True:
        seen = 0
        try:
            async for piece in client.tail_job_logs(job):  # every connection starts at the log's beginning
                fresh = piece[max(0, shown - seen) :]
                seen += len(piece)
                if fresh:
                    show(fresh)
                    shown, lost = seen, 0
            info = client.get_job_info(job)
            if str(info.status.value) in ENDED:
                return info
        except Exception as error:  # aiohttp, requests and Ray raise their own kinds
            lost += 1
            if lost >= PATIENCE:
                raise ConnectionError(f"lost the connection to the cluster: {_line(error)}") from None
        await asyncio.sleep(0.5 if not lost else min(5.0, lost))


def _verdict(job: str, info: Any) -> int:
    status, code = str(info.status.value), info.driver_exit_code
    if status == "SUCCEEDED":
        print(f"job {job} succeeded", file=sys.stderr)
        return 0
    if status == "STOPPED":
        print(f"job {job} was stopped", file=sys.stderr)
        return 130
    reason = f"exit code {code}" if code else _line(info.message or "no reason given")
    print(f"job {job} failed: {reason}", file=sys.stderr)
    return 1 if not code else int(code) if code > 0 else 128 - int(code)


def _hints(client: Any, job: str, login: bool) -> str:
    ray = f"{'RAY_AUTH_MODE=token ' if login else ''}ray job"
    where = f"--address {client.get_address()}"
    return f"look again:  {ray} logs --follow {where} {job}\nend it:      {ray} stop {where} {job}"


def _line(error: object) -> str:
    """An error's words in one line of readable length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."
