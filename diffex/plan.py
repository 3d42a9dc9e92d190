"""A sweep's budget before it starts, and the sizes of its networks.

A sweep costs the sum of what its *distinct* digests cost (``diffex.costs``): what trials share is counted once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffex.classifier import is_given
from diffex.config import Experiment
from diffex.costs import Case, Cost, Images, stage_costs
from diffex.errors import UserError
from diffex.pipeline import GRAPH, absent, stage_digests
from diffex.units import human_size

# ----------------------------------------------------------------------------------------------------------------------
# Floating-point operations, parameters and memory of the networks


@dataclass(frozen=True)
class Networks:
    """Sizes of an experiment's networks.

    Attributes:
        flops: operation -> floating-point operations of an image, two for a multiplication with addition.
        parameters: network -> parameters.
        activations: bytes in float32 that backpropagation through the autoencoder keeps of an image.
    """

    flops: dict[str, float]
    parameters: dict[str, int]
    activations: int

    def training_memory(self, batch: int) -> int:
        """Bytes, all in float32: weights, average, gradients and two moments of the autoencoder, and a batch."""
        return 20 * (self.parameters["unet"] + self.parameters["encoder"]) + batch * self.activations


def networks(e: Experiment, images: Images) -> Networks:
    """Count operations and parameters of an experiment's networks, on torch's device of shapes without numbers.

    A classifier that is given as a file is left out: only its owner knows it.
    """
    case = Case(e, images)
    channels, size, _ = case.shape
    x = torch.empty(2, channels, size, size, device="meta")
    model = case.model
    t, z = torch.empty(2, device="meta", dtype=torch.long), torch.empty(2, e.autoencoder.code_dim, device="meta")
    found: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
        "unet": (model.unet, lambda x: model.unet(x, t, z)), "encoder": (model.encoder, model.encoder),
    }  # fmt: skip
    names = ["witness", "robust", *(["ruler"] if e.data.path is None else [])]
    for name in names if is_given(e.classifier) else ["classifier", *names]:
        network = case.supervised(name)
        found[name] = (network, network)
    flops: dict[str, float] = {}
    kept: dict[str, int] = {}
    module: nn.Module
    for name, (module, function) in found.items():
        with torch.no_grad():
            flops[f"{name}.forward"] = _count(lambda f=function: f(x)) / 2  # type: ignore[misc]
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        own = sum(p.numel() * 4 for p in module.parameters())
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            flops[f"{name}.training"] = _count(lambda f=function: f(x).sum().backward()) / 2  # type: ignore[misc]
        kept[name] = max(sum(saved.values()) - own, 0) // 2
        module.requires_grad_(False)
        asked = x.clone().requires_grad_()
        flops[f"{name}.gradient"] = _count(lambda f=function, a=asked: f(a).sum().backward()) / 2  # type: ignore[misc]
        module.requires_grad_(True)
        module.zero_grad()
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, (module, _) in found.items()}
    return Networks(flops, parameters, kept["unet"] + kept["encoder"])


def _count(run: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


# ----------------------------------------------------------------------------------------------------------------------
# A sweep


@dataclass(frozen=True)
class Instance:
    """A stage with its digest, the digests that it needs, and what computing it costs."""

    stage: str
    digest: str
    needs: tuple[str, ...]
    cost: Cost


@dataclass(frozen=True)
class Budget:
    """What several experiments need together.

    Attributes:
        trials: for each experiment the digests of its stages, in an order in which they can be computed.
        instances: digest -> stage: each distinct one once.
        there: digests that the store holds already.
    """

    trials: list[list[str]]
    instances: dict[str, Instance]
    there: frozenset[str] = frozenset()

    def number(self, stage: str) -> int:
        """Instances of a stage that have to be computed."""
        return sum(i.stage == stage for d, i in self.instances.items() if d not in self.there)

    @property
    def cost(self) -> Cost:
        """Of all that has to be computed, each once."""
        return sum((i.cost for d, i in self.instances.items() if d not in self.there), Cost())

    @property
    def alone(self) -> Cost:
        """What the trials would cost if none shared anything."""
        return sum((self.instances[d].cost for trial in self.trials for d in trial), Cost())


def budget(
    points: Iterable[Experiment], *, images: Images | None = None, rank: int | None = None,
    has: Callable[[str, str], bool] | None = None,
) -> Budget:  # fmt: skip
    """Count the distinct stages of several experiments by their digests.

    Args:
        points: the experiments, one a trial.
        images: of all of them (default: counted, once for each data stage).
        rank: dimensions of the directions' subspace, where known.
        has: ``Store.has``: whether the entry (stage, digest) is there.
    """
    counted: dict[str, Images] = {}
    trials, instances = [], {}
    for e in points:
        digests, skip = stage_digests(e), absent(e)
        data = digests["data"]
        if data not in counted:
            counted[data] = images or Images.of(e)
        new = {name: d for name, d in digests.items() if d not in instances}
        costs = stage_costs(e, counted[data], rank=rank) if new else {}
        for name, d in new.items():
            needs = tuple(digests[n] for n in GRAPH[name].needs if n not in skip)
            instances[d] = Instance(name, d, needs, costs[name])
        trials.append(list(digests.values()))
    there = frozenset(d for d, i in instances.items() if has is not None and has(i.stage, d))
    return Budget(trials, instances, there)


def drawn(
    base: Experiment, space: Mapping[str, Any], trials: int, first: Sequence[Mapping[str, Any]] = (), *, seed: int = 0
) -> list[Experiment]:
    """Experiments as a search might try them, for a budget before it starts: first those named, then random ones.

    Args:
        base: settings that all share.
        space: dotted setting -> choice with ``values``, or with ``low``, ``high`` and ``log``.
        trials: how many.
        first: settings to try first.
        seed: of the draws.
    """
    rng = np.random.default_rng([seed, 31])

    def one(choice: Any) -> Any:
        if hasattr(choice, "values"):
            return choice.values[int(rng.integers(len(choice.values)))]
        if isinstance(choice.low, int) and isinstance(choice.high, int):
            return int(rng.integers(choice.low, choice.high + 1))
        low, high = np.log((choice.low, choice.high)) if choice.log else (choice.low, choice.high)
        value = float(rng.uniform(low, high))
        return float(np.exp(value)) if choice.log else value

    settings = [dict(f) for f in first[:trials]]
    settings += [{name: one(choice) for name, choice in space.items()} for _ in range(trials - len(settings))]
    return [base.with_settings(s) for s in settings]


NOUNS = {
    "data": "image set", "warmup": "warm-up", "autoencoder": "autoencoder", "directions": "direction set",
}  # fmt: skip


def say_budget(plan: Budget, *, free: int | None = None, concurrent: int = 1) -> list[str]:
    """A budget in words: bytes in the store, what is computed, what is shared.

    Args:
        plan: the budget.
        free: bytes free where the store lies.
        concurrent: trials at the same time: each keeps its checkpoints.
    """
    cost, alone = plan.cost, plan.alone
    numbers = {name: plan.number(name) for name in NOUNS}
    made = ", ".join(f"{n} {NOUNS[name]}{'s' if n != 1 else ''}" for name, n in numbers.items() if n)
    store = f"store: about {human_size(cost.bytes)} ({len(plan.trials)} trials: {made or 'nothing to compute'})"
    needed = cost.bytes + concurrent * cost.scratch
    if free is not None:
        more = f", but {human_size(needed)} needed on the way" if needed > free else ""
        store += f"; {human_size(free)} free{more}"
    share = cost.unet_passes / max(alone.unet_passes, 1)
    trained = cost.work["unet.training"]
    work = f"work: at most {cost.unet_evaluations:,} U-Net evaluations, {trained:,} of them in training"
    return [store, f"{work}; {share:.2f} of what the trials would cost apart"]


def check_budget(plan: Budget, free: int, concurrent: int = 1) -> None:
    """Complain before anything starts where the disk is too small.

    Raises:
        UserError: it is.
    """
    cost = plan.cost
    needed = cost.bytes + concurrent * cost.scratch
    if needed > free:
        raise UserError(
            f"the store needs about {human_size(needed)}, {human_size(free)} are free: make room ('diffex store gc'), "
            "choose another --store, or fewer --trials"
        )
