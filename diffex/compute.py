"""Where tensors live and in which precision: the one place that asks what the machine can do."""

from __future__ import annotations

import ctypes
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch

from diffex.config import Run
from diffex.errors import UserError


@dataclass(frozen=True)
class Compute:
    """A device, and whether networks run in bfloat16 there."""

    device: torch.device
    bf16: bool

    @classmethod
    def resolve(cls, run: Run) -> Compute:
        """What ``run.device`` and ``run.precision`` mean on this machine.

        Raises:
            UserError: a device that is not there.
        """
        name = run.device if run.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(name)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"run.device = {run.device!r} can't be used here: {str(error).splitlines()[0]}") from None
        if device.type == "cpu":
            keep_freed_memory()
        if device.type == "cuda":
            able = torch.cuda.is_bf16_supported()
        else:  # without the instructions, bfloat16 convolutions are emulated and slower than float32
            able = device.type == "cpu" and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
        return cls(device, able if run.precision == "auto" else run.precision == "bf16")

    def autocast(self) -> AbstractContextManager[object]:
        """Context in which networks run in the chosen precision."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()


@cache
def keep_freed_memory() -> None:
    """Have the C library keep up to 512 MB of what this process frees, for its next tensors.

    By itself glibc gives every large block back to the kernel, which then fills the pages of each new activation with
    zeros: a sixth of a rendering's time on a CPU (benchmarks/allocator.py).  Other C libraries are left alone.

    A thread, which is where Ray runs trials and trainings, has heaps of 64 MB of its own, and glibc gives an empty one
    back whatever the threshold, unless less than ``top_pad`` would be left.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # numbers of malloc.h
        library.mallopt(mmap_threshold, 32 * 2**20)  # the most that glibc takes everywhere
        library.mallopt(trim_threshold, 512 * 2**20)
        library.mallopt(top_pad, 64 * 2**20)
