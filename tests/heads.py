"""Real heads of Ray on this machine, for tests: on ports of their own, ended by process id."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.request import urlopen

import pytest
from ray.cluster_utils import Cluster

TOKEN = "a-token-of-this-test-only"
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


class Head:
    """A head of Ray in a session of its own, on loopback; ends with all its children."""

    def __init__(self, mode: str, num_cpus: int = 1) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="dxh-", dir="/tmp"))  # Ray's sockets need a short path
        port, dashboard = free_port(), free_port()
        self.address, self.url = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        environ = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environ |= {"RAY_AUTH_MODE": mode, "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(self.place)}
        environ |= {"PATH": f"{Path(RAY).parent}:{os.environ['PATH']}"} | (
            {"RAY_AUTH_TOKEN": TOKEN} if mode == "token" else {}
        )
        command = [
            RAY, "start", "--head", "--block", f"--num-cpus={num_cpus}", "--node-ip-address=127.0.0.1",
            f"--port={port}",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={self.place / 'ray'}",
            "--object-store-memory=100000000", "--include-dashboard=true", f"--ray-client-server-port={free_port()}",
            f"--dashboard-agent-listen-port={free_port()}",
        ]  # fmt: skip
        self.log = self.place / "head.log"
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                command, env=environ, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def wait(self) -> None:
        for _ in range(240):
            if self.process.poll() is not None:
                break
            try:
                with urlopen(f"{self.url}/api/authentication_mode", timeout=2):
                    return
            except OSError:
                time.sleep(0.25)
        pytest.fail(f"the head did not start:\n{self.log.read_text()[-2000:]}")

    def members(self) -> list[int]:
        """Living processes of the head: of its session, or at work in its folder (a job has a session of its own)."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # ended meanwhile
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                mine = int(fields[3]) == self.process.pid or (process / "cwd").readlink().is_relative_to(self.place)
                if mine and fields[0] != "Z":
                    found.append(int(process.name))
        return found

    def kill(self) -> None:
        """As a machine that is switched off."""
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)

    def end(self) -> None:
        self.process.terminate()  # Ray ends its children itself, if it is let
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(8)
        self.kill()
        shutil.rmtree(self.place, ignore_errors=True)


def several_nodes(**head: Any) -> Cluster:
    """The head of a cluster to which nodes are added; ``ray.init()`` in other processes does not find, and join, it."""
    with patch("ray._private.utils.write_ray_address"):
        return Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **head})


def heads(mode: str, num_cpus: int = 1) -> Iterator[Head]:
    """A head that answers, for the time of a fixture."""
    head = Head(mode, num_cpus)
    try:
        head.wait()
        yield head
    finally:
        head.end()
        time.sleep(0.2)  # for the killed to be gone
        assert head.members() == []
