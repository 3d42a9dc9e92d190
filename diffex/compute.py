"""Where tensors live and in which precision: the one place that asks what the machine can do."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

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
        if device.type == "cuda":
            able = torch.cuda.is_bf16_supported()
        else:  # without the instructions, bfloat16 convolutions are emulated and slower than float32
            able = device.type == "cpu" and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
        return cls(device, able if run.precision == "auto" else run.precision == "bf16")

    def autocast(self) -> AbstractContextManager[object]:
        """Context in which networks run in the chosen precision."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()
