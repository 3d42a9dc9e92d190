"""Meters: bars on a terminal, plain lines in a log, files where another process draws.

Stages only know ``progress(what, done, total)``.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm


class Bars:
    """One bar a stage on a terminal; elsewhere a line every ``every`` seconds and at each stage's end."""

    def __init__(self, out: TextIO | None = None, every: float = 15.0) -> None:
        self.out, self.every = out or sys.stderr, every
        self.live = self.out.isatty()
        self.bar: tqdm[Any] | None = None
        self.what, self.said = "", 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.live:
            if what != self.what:
                self.close()
                self.bar = tqdm(total=total, desc=f"{what:<16}", file=self.out, dynamic_ncols=True, leave=True)
            assert self.bar is not None
            self.bar.total = total
            self.bar.update(done - self.bar.n)
        elif what != self.what or done >= total or time.monotonic() - self.said > self.every:
            self.said = time.monotonic()
            print(f"{what}: {done:,} of {total:,}", file=self.out, flush=True)
        self.what = what

    def close(self) -> None:
        """Finish the open bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class FileMeter:
    """Writes what is going on to a small file that a ``Board`` in another process reads."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.said, self.what = folder / f"{name}.json", 0.0, ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if what == self.what and done < total and time.monotonic() - self.said < 0.5:
            return
        self.said, self.what = time.monotonic(), what
        waiting = self.path.with_suffix(".tmp")
        waiting.write_text(json.dumps({"what": what, "done": done, "total": total}), encoding="utf-8")
        waiting.replace(self.path)

    def close(self) -> None:
        """Say that nothing goes on here any more."""
        self.path.unlink(missing_ok=True)


class Board:
    """Draws the meters of all workers while the driver waits: one line for all trials, one for each that runs.

    Use as a context; ``finished`` is called by the driver when a trial ends.
    """

    def __init__(
        self, folder: Path, total: int, done: int = 0, *, unit: str = "trials", out: TextIO | None = None
    ) -> None:
        self.folder, self.total, self.done, self.unit = folder, total, done, unit
        self.out = out or sys.stderr
        self.live = self.out.isatty()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._draw, daemon=True)
        self._bars: dict[str, tqdm[Any]] = {}

    def __enter__(self) -> Board:
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob("*.json"):
            stale.unlink()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        if "" in self._bars:
            self._bars[""].update(self.done - self._bars[""].n)
        for bar in self._bars.values():
            bar.close()

    def finished(self, message: str = "") -> None:
        """One trial more is done."""
        self.done += 1
        if message:
            tqdm.write(message, file=self.out)

    def _read(self) -> dict[str, dict[str, Any]]:
        states = {}
        for file in sorted(self.folder.glob("*.json")):
            try:
                states[file.stem] = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
        return states

    def _draw(self) -> None:
        said: dict[str, str] = {}
        while not self._stop.wait(0.5 if self.live else 10.0):
            states = self._read()
            if not self.live:
                lines = {name: f"{s['what']} {100 * s['done'] // max(s['total'], 1)} %" for name, s in states.items()}
                if lines != said:
                    running = "; ".join(f"{name}: {text}" for name, text in lines.items())
                    print(f"{self.done} of {self.total} {self.unit} done; {running}", file=self.out, flush=True)
                said = lines
                continue
            if "" not in self._bars:
                self._bars[""] = tqdm(
                    total=self.total, desc=f"{self.unit:<28}", file=self.out, dynamic_ncols=True, position=0
                )
            self._bars[""].update(self.done - self._bars[""].n)
            for name in [n for n in self._bars if n and n not in states]:
                self._bars.pop(name).close()
            for name, state in states.items():
                if name not in self._bars:
                    self._bars[name] = tqdm(total=state["total"], file=self.out, dynamic_ncols=True, leave=False)
                bar = self._bars[name]
                bar.set_description(f"{name[:12]:<12} {state['what'][:15]:<15}", refresh=False)
                bar.total, bar.n = state["total"], state["done"]
                bar.refresh()
