"""The classifier to be explained, frozen: a user's file, a user's factory, or the network trained here.

Frozen means: evaluation mode for ever, no gradient into parameters, buffers never written; gradients do pass through
to the images.  Whatever range, size or class order the network wants is adapted here, by settings.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffex.config import Classifier
from diffex.errors import UserError
from diffex.networks import ResidualClassifier


class FrozenClassifier(nn.Module):
    """Images in [-1, 1] to logits over the data's classes; never trained, never in training mode.

    Args:
        network: any module (or callable) from images (B, C, H, W) to (B, n) numbers; one number means the log odds of
            the second of two classes.
        class_names: the data's classes, sorted.
        order: the classes in the order of the network's outputs (default: ``class_names``).
        low, high: the input range that the network expects.
        size: the side that it expects (default: that of the images).
        output: 'logits' or 'probabilities'.
    """

    def __init__(
        self, network: Callable[[Tensor], Tensor], class_names: Sequence[str], *, order: Sequence[str] = (),
        low: float = -1.0, high: float = 1.0, size: int | None = None, output: str = "logits",
    ) -> None:  # fmt: skip
        super().__init__()
        order = tuple(order) or tuple(class_names)
        if sorted(order) != sorted(class_names):
            raise UserError(f"classifier.class_names = {list(order)}, but the data's classes are {list(class_names)}")
        self.class_names = tuple(class_names)
        self.columns = [order.index(name) for name in class_names]
        self.low, self.high, self.size, self.output = low, high, size, output
        self.network = network
        if isinstance(network, nn.Module):
            for parameter in network.parameters():  # TorchScript modules have no requires_grad_ of their own
                parameter.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenClassifier:
        """Stay in evaluation mode, whatever is asked."""
        self.training = False
        if isinstance(self.network, nn.Module):
            with suppress(NotImplementedError):  # exported programs have no modes: they are as they were exported
                self.network.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, n_classes) float32 of images x (B, C, H, W) in [-1, 1], with gradient to x."""
        x = x.float()
        if self.size is not None and self.size != x.shape[-1]:
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=self.size < x.shape[-1])
        if (self.low, self.high) != (-1.0, 1.0):
            x = (x + 1.0) * (0.5 * (self.high - self.low)) + self.low
        out = self.network(x).float()
        if self.output == "probabilities":
            out = out.clamp(1e-7, 1 - 1e-7)
            out = torch.logit(out) if out.shape[-1] == 1 else out.log()
        if out.shape[-1] == 1:
            out = torch.cat([torch.zeros_like(out), out], dim=1)
        return out[:, self.columns]

    @torch.no_grad()
    def probabilities(self, x: Tensor, batch_size: int = 256) -> Tensor:
        """Class probabilities (N, n_classes) float32 of images x (N, C, H, W) in [-1, 1]."""
        return torch.cat([self(part).softmax(dim=1) for part in x.split(batch_size)])


def load_classifier(
    settings: Classifier, class_names: Sequence[str], channels: int, size: int, trained: Path | None = None
) -> FrozenClassifier:
    """The classifier that the settings name, frozen and tried on two small batches.

    Args:
        settings: section ``classifier``.
        class_names: the data's classes, sorted.
        channels, size: of the data's images.
        trained: safetensors file of the network trained here, used where the settings give none.

    Raises:
        UserError: a file that can't be loaded, wrong input or output shapes, or a network that changes its buffers.
    """
    network: nn.Module
    order: tuple[str, ...] = settings.class_names
    if settings.path:
        network = _load_file(Path(settings.path))
    elif settings.factory and settings.weights:
        network = _load_factory(settings.factory, Path(settings.weights))
    else:
        if trained is None:
            raise UserError("no classifier is given: set classifier.path, or train one with 'diffex fit'")
        network = ResidualClassifier(channels, len(class_names), width=settings.width)
        network.load_state_dict(load_file(trained))
        return FrozenClassifier(network, class_names)
    frozen = FrozenClassifier(
        network, class_names, order=order, low=settings.input_low, high=settings.input_high, size=settings.input_size,
        output=settings.output,
    )  # fmt: skip
    _try(frozen, len(class_names), channels, size)
    return frozen


def is_given(settings: Classifier) -> bool:
    """Whether the settings name a classifier, so that none is trained."""
    return bool(settings.path or settings.factory)


def _load_file(path: Path) -> nn.Module:
    if not path.is_file():
        raise UserError(f"there is no classifier file {str(path)!r} (classifier.path)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path.suffix == ".pt2":
                return torch.export.load(path).module()
            return torch.jit.load(str(path), map_location="cpu")
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{str(path)!r} is neither a TorchScript file nor, as .pt2, a torch.export file ({reason[:120]}); "
            "a bare state_dict needs classifier.factory and classifier.weights"
        ) from None


def _load_factory(factory: str, weights: Path) -> nn.Module:
    module, _, name = factory.partition(":")
    if not name:
        raise UserError(f"classifier.factory = {factory!r} must read package.module:callable")
    try:
        network = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise UserError(f"classifier.factory = {factory!r} can't be imported: {error}") from None
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(
            f"classifier.factory = {factory!r} fails when it is called without arguments: {reason}"
        ) from None
    if not isinstance(network, nn.Module):
        raise UserError(f"classifier.factory = {factory!r} returned {type(network).__name__}, not a torch module")
    if not weights.is_file():
        raise UserError(f"there is no weights file {str(weights)!r} (classifier.weights)")
    try:
        network.load_state_dict(load_file(weights))
    except SafetensorError:
        raise UserError(f"{str(weights)!r} is not a safetensors file (classifier.weights)") from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{str(weights)!r} does not fit the network of {factory!r}: {reason}") from None
    return network


def _try(classifier: FrozenClassifier, num_classes: int, channels: int, size: int) -> None:
    """Run two batches of different length; complain in words if shapes don't fit or anything was written."""
    state = classifier.network.state_dict() if isinstance(classifier.network, nn.Module) else {}
    before = {name: value.clone() for name, value in state.items()}
    shape = (channels, size, size)
    try:
        with torch.no_grad():
            outputs = [classifier.network(torch.zeros(n, *_adapted(classifier, shape))) for n in (2, 3)]
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:160]  # TorchScript's cause comes last
        raise UserError(
            f"the classifier can't take images of {channels} channels and {classifier.size or size} pixels: {reason}. "
            "Set classifier.input_size or data.channels; export with a dynamic batch dimension"
        ) from None
    for n, out in zip((2, 3), outputs, strict=True):
        allowed = {num_classes, 1} if num_classes == 2 else {num_classes}
        if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != n or out.shape[1] not in allowed:
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise UserError(
                f"the classifier returns {got} for {n} images, but {num_classes} classes need [{n}, {num_classes}]"
            )
    after = classifier.network.state_dict() if isinstance(classifier.network, nn.Module) else {}
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    if changed:
        raise UserError(f"the classifier changes its own buffer {changed[0]!r} when used: export it in evaluation mode")


def _adapted(classifier: FrozenClassifier, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    side = classifier.size or shape[1]
    return (shape[0], side, side)


def classification_report(
    probabilities: NDArray, labels: NDArray, groups: NDArray, class_names: Sequence[str], *, seed: int = 0
) -> dict[str, object]:
    """How good a classifier is on held-out images.

    Args:
        probabilities: (N, n_classes).
        labels: (N,) true classes.
        groups: (N,) statistical unit of each image (well, donor, ...); intervals resample units.
        class_names: names of the classes.

    Returns:
        n, units, accuracy and balanced accuracy with 95 % intervals, recall and AUC (one against the rest) of each
        class, confusion matrix (true by row), expected calibration error in 10 bins.
    """
    from scipy.stats import rankdata

    from diffex.statistics import bootstrap_interval

    predicted = probabilities.argmax(axis=1)
    right = (predicted == labels).astype(float)
    confusion = np.zeros((len(class_names), len(class_names)), int)
    np.add.at(confusion, (labels, predicted), 1)
    recall = confusion.diagonal() / np.maximum(confusion.sum(axis=1), 1)
    auc = {}
    for c, name in enumerate(class_names):
        positive = labels == c
        m, n = positive.sum(), (~positive).sum()
        rank_sum = rankdata(probabilities[:, c])[positive].sum()
        auc[name] = float((rank_sum - m * (m + 1) / 2) / (m * n)) if m and n else float("nan")
    confidence = probabilities.max(axis=1)
    bins = np.minimum((confidence * 10).astype(int), 9)
    error = sum(
        abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in set(bins.tolist())
    )
    low, high = bootstrap_interval(right, groups, seed=seed)
    return {
        "n": len(labels), "units": len(np.unique(groups)), "accuracy": float(right.mean()),
        "accuracy_interval": [low, high], "balanced_accuracy": float(recall.mean()),
        "recall": dict(zip(class_names, recall.tolist(), strict=True)), "auc": auc,
        "confusion": confusion.tolist(), "calibration_error": float(error),
    }  # fmt: skip
