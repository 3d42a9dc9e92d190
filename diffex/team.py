"""Workers that train one model together: who takes which part of a batch, and what they tell each other.

Every worker draws the *whole* batch's rows and random numbers alike and takes its share of them, so what is learnt
does not depend on their number, up to the order in which floats are added:

    L = 1/n sum_i l_i = 1/size sum_r (size n_r / n) L_r      rank r has n_r of n images, L_r is its own mean loss

DistributedDataParallel takes the mean of gradients over ranks.  A tensor that ranks exchange *inside* the loss (by
``sum`` or ``gather``) therefore gets, on its way back, the sum over ranks of the gradients that arrive at it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """``size`` workers, of which this is number ``rank``; one alone exchanges nothing and needs no process group.

    All but ``slice``, ``share`` and ``weight`` are collective: every rank must call them, in the same order.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Team:
        """The team of this process: torch.distributed's default group, or one worker alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    # ------------------------------------------------------------------------------------------------------------------
    # Shares

    def slice(self, count: int, part: int = 0, parts: int = 1) -> slice:
        """Where this rank's share of ``count`` items lies, and of that share part ``part`` of ``parts``.

        Shares are contiguous, differ by one item at most, and are empty where there are fewer items than ranks.
        """
        first, last = count * self.rank // self.size, count * (self.rank + 1) // self.size
        return slice(first + (last - first) * part // parts, first + (last - first) * (part + 1) // parts)

    def share(self, items: T, part: int = 0, parts: int = 1) -> T:
        """This rank's share of a tensor, an array or a list, along its first axis; see ``slice``."""
        return items[self.slice(len(items), part, parts)]  # type: ignore[index,arg-type]

    def weight(self, count: int, part: int = 0, parts: int = 1) -> float:
        """``size * n / count``, n the items of the share: sums over parts and means over ranks of means, so weighted,
        are means over all ``count`` items."""
        where = self.slice(count, part, parts)
        return self.size * (where.stop - where.start) / count

    # ------------------------------------------------------------------------------------------------------------------
    # Exchange

    def sum(self, x: Tensor) -> Tensor:
        """Sum of a tensor over ranks, bit-identical on all of them; with gradient."""
        return x if self.size == 1 else _Sum.apply(x)  # type: ignore[no-untyped-call]

    def gather(self, x: Tensor, count: int, dim: int = 0) -> Tensor:
        """Put the shares together again: from x with this rank's ``share(count)`` along ``dim`` to all ``count``.

        Shares may be uneven.  Adding zeros is exact, so what comes out are the very numbers that went in.
        """
        if self.size == 1:
            return x
        where = self.slice(count)
        before, after = list(x.shape), list(x.shape)
        before[dim], after[dim] = where.start, count - where.stop
        return self.sum(torch.cat([x.new_zeros(before), x, x.new_zeros(after)], dim))

    def means(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Means over ranks of named scalars, equal on all ranks; without gradient."""
        if self.size == 1 or not values:
            return {name: float(value) for name, value in values.items()}
        both = torch.stack([value.detach().float() for value in values.values()])
        return dict(zip(values, (self.sum(both) / self.size).tolist(), strict=True))

    def broadcast(self, tensors: Iterable[Tensor], value: T) -> T:
        """Write rank 0's tensors into everybody's, and return rank 0's ``value`` (numbers, text, lists of them)."""
        if self.size == 1:
            return value
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, 0)
            if whole.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(whole)
        box: list[Any] = [value]
        nccl = dist.get_backend() == dist.Backend.NCCL
        dist.broadcast_object_list(box, 0, device=torch.device("cuda") if nccl else torch.device("cpu"))
        return box[0]

    # ------------------------------------------------------------------------------------------------------------------
    # Training

    def wrap(self, loss: Callable[..., Any], *trained: nn.Module) -> nn.Module:
        """A loss as a module, whose ``backward`` leaves the mean of the ranks' gradients in the parameters.

        Args:
            loss: its forward; it must use every parameter at every step.
            trained: the modules whose parameters it trains, equal on all ranks.

        DistributedDataParallel puts gradients into buckets in the order in which they come at its first step, and the
        place in a bucket decides in which order an all-reduce adds.  So that a resumed training adds as an
        uninterrupted one does, whatever its first loss looks like, the first step is a rehearsal in a fixed order.
        """
        module = _Loss(loss, *trained)
        if self.size == 1:
            return module
        old = "forward_sync_buffers" not in inspect.signature(DistributedDataParallel).parameters  # before torch 2.13
        options: dict[str, Any] = {"broadcast_buffers" if old else "forward_sync_buffers": False}
        wrapped = DistributedDataParallel(module, **options)
        wrapped().backward()
        wrapped.zero_grad(set_to_none=True)
        return wrapped

    def local(self, loss: nn.Module, yes: bool = True) -> AbstractContextManager[None]:
        """Context in which ``backward`` only adds to this rank's gradient: for all but the last part of a share."""
        return loss.no_sync() if yes and isinstance(loss, DistributedDataParallel) else nullcontext()

    def part_ways(self) -> None:
        """From here on every rank draws random numbers of its own (dropout); what came before was drawn alike."""
        if self.size > 1:
            torch.manual_seed(int(torch.randint(2**62, ())) + self.rank)


ALONE = Team()


class _Loss(nn.Module):
    """A loss as the forward of a module that holds what it trains; without arguments, a rehearsal."""

    def __init__(self, loss: Callable[..., Any], *trained: nn.Module) -> None:
        super().__init__()
        self.trained, self.loss = nn.ModuleList(trained), loss

    def forward(self, *args: Any) -> Any:
        return self.loss(*args) if args else torch.stack([p.sum() for p in self.parameters()]).sum()


class _Sum(torch.autograd.Function):
    """All-reduce, both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total
