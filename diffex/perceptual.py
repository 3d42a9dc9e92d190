"""Perceptual distances of images: in the features of an independent classifier, and LPIPS on an AlexNet.

    d(a, b) = sum_l mean_hw sum_c w_lc (f_lchw(a) - f_lchw(b))^2,     f unit-normalised over channels at each position

``critic_distance`` takes the stages of a ``ResidualClassifier`` that had no part in making the images, and w = 1.
``AlexLPIPS`` is the published metric, with weights learnt from people's judgements of photographs.  Images are
(N, C, H, W) in [-1, 1].

Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018, eq. 1;
Ghildyal & Liu, "Shift-tolerant Perceptual Similarity Metric", ECCV 2022.
"""

from __future__ import annotations

import importlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffex.errors import UserError
from diffex.networks import ResidualClassifier

# ----------------------------------------------------------------------------------------------------------------------
# Features of a classifier


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradient, for a while: the modes are put back as they were."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def feature_maps(network: ResidualClassifier, x: Tensor) -> list[Tensor]:
    """What the stem and every stage make of images x (N, C, H, W): tensors (N, c_l, h_l, w_l), the finest first."""
    with _frozen(network):
        maps = [network.stem(x.float())]
        for stage in network.stages:
            maps.append(stage(maps[-1]))
    return maps


def embed(network: ResidualClassifier, x: Tensor, *, batch_size: int = 256) -> Tensor:
    """Features (N, D) that the head of the classifier sees: the last stage's, averaged over pixels."""
    return torch.cat([feature_maps(network, part)[-1].mean(dim=(2, 3)) for part in x.split(batch_size)])


def critic_distance(network: ResidualClassifier, a: Tensor, b: Tensor, *, batch_size: int = 256) -> Tensor:
    """LPIPS's formula in the features of a classifier, every feature weighing the same.

    Layers are summed, as in LPIPS; each lies in [0, 4], and in [0, 2] after a ReLU (all but the stem).

    Args:
        network: trained independently of whatever made the images; it stays as it is.
        a, b: (N, C, H, W) images in [-1, 1].
        batch_size: pairs at a time.

    Returns:
        (N,) distances, 0 for equal images; comparable within one network only.

    Raises:
        ValueError: shapes that differ.

    Source: Zhang et al., CVPR 2018, eq. 1, with w = 1.
    """

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return _distance(feature_maps(network, a), feature_maps(network, b))

    return _in_batches(distance, a, b, batch_size)


def _distance(a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[Tensor] | None = None) -> Tensor:
    """Equation 1 on feature maps (N, c_l, h_l, w_l) and weights (1, c_l, 1, 1)."""
    layers = []
    for i, (p, q) in enumerate(zip(a, b, strict=True)):
        # 1e-10 is LPIPS's: where nothing responds, the features stay 0 instead of turning into rounding errors.
        p, q = (f / (f.square().sum(dim=1, keepdim=True).sqrt() + 1e-10) for f in (p, q))
        square = (p - q).square()
        layers.append((square if weights is None else square * weights[i]).sum(dim=1).mean(dim=(1, 2)))
    return torch.stack(layers).sum(dim=0)


def _in_batches(distance: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, batch_size: int) -> Tensor:
    if a.shape != b.shape:
        raise ValueError(f"images of shapes {tuple(a.shape)} and {tuple(b.shape)} can't be compared one by one")
    return torch.cat([distance(*pair) for pair in zip(a.split(batch_size), b.split(batch_size), strict=True)])


# ----------------------------------------------------------------------------------------------------------------------
# LPIPS


class _Blur(nn.Module):
    """Binomial filter of 3 pixels, then every second pixel; reflection by 2, so that no border pixel is lost."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("filt", (row[:, None] * row).repeat(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=x.shape[1])


class _Scale(nn.Module):
    """From [-1, 1] to ImageNet's colours, mean 0 and standard deviation 1."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


def _numbered(first: int, *layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict((str(first + i), layer) for i, layer in enumerate(layers)))


class AlexLPIPS(nn.Module):
    """Shift-tolerant LPIPS: an AlexNet whose strides are blurred first, and learnt weights of its five ReLU layers.

    Random until it is loaded.  The names of its parameters are those of the authors' file.  Images of three channels
    are taken for red, green and blue.  With any other number each channel is compared as a grey picture, and distances
    are averaged over channels.  Images below 64 pixels are enlarged to 64 (bilinearly): the network needs them.

    Source: Ghildyal & Liu, ECCV 2022; their ``alex_shift_tolerant.pth``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scaling_layer = _Scale()
        stages: OrderedDict[str, nn.Module] = OrderedDict(
            slice1=_numbered(0, nn.Conv2d(3, 64, 11, padding=2), _Blur(64), nn.ReLU()),
            slice2=_numbered(3, nn.MaxPool2d(3, 1), _Blur(64), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()),
            slice3=_numbered(7, nn.MaxPool2d(3, 1), _Blur(192), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
            slice4=_numbered(11, nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            slice5=_numbered(13, nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
        )
        self.net = nn.Sequential(stages)
        heads = [nn.Conv2d(channels, 1, 1, bias=False) for channels in (64, 192, 384, 256, 256)]
        for i, head in enumerate(heads):
            nn.init.uniform_(head.weight)  # a distance has weights of at least 0
            # The authors' dropout stands at 0; it does nothing outside training.
            self.add_module(f"lin{i}", nn.Sequential(OrderedDict(model=_numbered(0, nn.Identity(), head))))
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: str | Path) -> AlexLPIPS:
        """Read the authors' weights.

        Args:
            path: ``alex_shift_tolerant.pth``, from their package ``stlpips-pytorch``; read as tensors only, no code in
                it is run.

        Raises:
            UserError: no such file, not such a file, or other names or shapes in it.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"there is no file {str(path)!r} of LPIPS weights (evaluation.lpips)")
        wanted = "evaluation.lpips needs alex_shift_tolerant.pth of the package stlpips-pytorch"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # what torch raises on a foreign file depends on the file's first bytes
            raise UserError(f"{str(path)!r} is not a file of tensors that torch can read; {wanted}") from None
        network = cls()
        expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise UserError(f"{str(path)!r} holds no table of tensors; {wanted}")
        odd = sorted(expected.keys() ^ state.keys(), key=str)
        if odd:
            says = "lacks" if odd[0] in expected else "has an unknown"
            raise UserError(f"{str(path)!r} {says} {odd[0]!r}; {wanted}")
        for name, shape in expected.items():
            if tuple(state[name].shape) != shape:
                raise UserError(f"{name!r} in {str(path)!r} is {tuple(state[name].shape)}, not {shape}; {wanted}")
        network.load_state_dict(state)
        return network

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (N,) of images a, b (N, C, H, W) in [-1, 1]; 0 for equal images."""
        weights = [self.get_parameter(f"lin{i}.model.1.weight") for i in range(len(self.net))]
        return _of_pictures(lambda p, q: _distance(self._maps(p), self._maps(q), weights), a, b)

    def _maps(self, x: Tensor) -> list[Tensor]:
        maps = [self.scaling_layer(x)]
        for stage in self.net:
            maps.append(stage(maps[-1]))
        return maps[1:]


def _of_pictures(distance: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, least: int = 64) -> Tensor:
    """Bring images into the form a network of photographs takes: three channels, ``least`` pixels a side or more."""
    n, channels = a.shape[:2]

    def picture(x: Tensor) -> Tensor:
        x = x.float()
        if channels != 3:
            x = x.flatten(0, 1)[:, None].expand(-1, 3, -1, -1)
        side = min(x.shape[2:])
        if side < least:
            size = [round(length * least / side) for length in x.shape[2:]]
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return x

    found = distance(picture(a), picture(b)).flatten()
    return found if channels == 3 else found.view(n, channels).mean(dim=1)


def load_lpips(name: str, *, batch_size: int = 32) -> Callable[[Tensor, Tensor], Tensor]:
    """A perceptual distance by name, ready to be called with images a, b (N, C, H, W) in [-1, 1]; it returns (N,).

    Args:
        name: path of the shift-tolerant weights (see ``AlexLPIPS.load``), or 'lpips' for the package of that name
            (extra ``lpips``), which fetches the weights of its AlexNet when it is first used.
        batch_size: pairs at a time.

    Returns:
        The distance, without gradient; its network follows the images to their device.

    Raises:
        UserError: a file that can't be used, or a package that can't be imported or finds no weights.
    """
    if name == "lpips":
        network = _package()
        distance: Callable[[Tensor, Tensor], Tensor] = lambda a, b: _of_pictures(network, a, b)
    else:
        network = distance = AlexLPIPS.load(name)

    @torch.no_grad()
    def measure(a: Tensor, b: Tensor) -> Tensor:
        network.to(a.device)
        return _in_batches(distance, a, b, batch_size)

    return measure


def _package() -> nn.Module:
    mends = "or set evaluation.lpips to the path of alex_shift_tolerant.pth"
    try:
        lpips = importlib.import_module("lpips")
    except ImportError as error:
        raise UserError(
            f"evaluation.lpips = 'lpips' needs a package that can't be imported ({error}): "
            f"pip install 'diffex[lpips]', {mends}"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return lpips.LPIPS(net="alex", verbose=False).requires_grad_(False).eval()
    except Exception as error:  # no network, no cache, a torchvision that doesn't fit
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(
            f"evaluation.lpips = 'lpips': its weights can't be had ({reason}); fetch them, {mends}"
        ) from None
