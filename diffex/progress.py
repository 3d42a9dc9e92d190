"""Meters: bars on a terminal, plain lines in a log.

Stages only know ``progress(what, done, total)``.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
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


class Board:
    """Draws the meters of all workers while the driver waits: one line for all trials, one for each that runs.

    Use as a context; ``finished`` is called by the driver when a trial ends.

    Args:
        read: what goes on: name -> ``what``, ``done``, ``total``.
        total, done: trials in all, and behind us.
        unit: what is counted.
    """

    def __init__(
        self, read: Callable[[], Mapping[str, Mapping[str, Any]]], total: int, done: int = 0, *, unit: str = "trials",
        out: TextIO | None = None,
    ) -> None:  # fmt: skip
        self.read, self.total, self.done, self.unit = read, total, done, unit
        self.out = out or sys.stderr
        self.live = self.out.isatty()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._draw, daemon=True)
        self._bars: dict[str, tqdm[Any]] = {}

    def __enter__(self) -> Board:
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

    def _draw(self) -> None:
        said: dict[str, str] = {}
        while not self._stop.wait(0.5 if self.live else 10.0):
            states = self.read()
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
