"""Stage 2: K directions in the semantic code, trained on cached codes, all K models in one batched product.

    z_k    = z + alpha * u_k(z),      u_k = D_k(z) / ||D_k(z)||
    f_k,i  = normalise(P(z_k,i) - P(z_i))                                            features 'code', the published ones
    L_con  = mean_a -log( mean_{b same k, b != a} s_ab / mean_{b other k} s_ab ),  s_ab = exp(tau * |f_a . f_b|)
    L      = L_con + lambda_2 * L_cov - lambda_3 * L_move

On the raw code these losses may use dimensions that the decoder ignores (published directions flip 9 % of the cells
where the class-mean difference flips 88 %).  Ours therefore

* live in the whitened principal subspace of z, so alpha counts standard deviations of the data;
* see what a shift does to the *image*: responses J_i, the change of the expected image along each axis of the
  subspace, are measured once with the trained decoder; then f_k,i = normalise(P(J_i u_k,i)), and L_cov is the overlap
  of the directions' change maps |J_i u_k,i|: different directions must change different pixels or channels;
* may be asked to move the classifier: s_k is the share of the attainable change of its logits that direction k brings,
  measured in the same pass, and L_move = max_k s_k + mean_k s_k.  The maximum makes one direction the whole of what the
  classifier sees; the mean, against L_cov, makes the others its parts.

Source: Bourou et al., "DiffEx", arXiv 2502.09663, section 3.2; Yuksel et al., "LatentCLR", ICCV 2021 (L_con); Bardes et
al., "VICReg", ICLR 2022 (feature covariance).  Responses, overlap and L_move are ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffex.config import Directions
from diffex.errors import UserError
from diffex.team import ALONE, Team

# ----------------------------------------------------------------------------------------------------------------------
# The space that directions live in


class Subspace(nn.Module):
    """Coordinates v (., r) of codes z (., d): ``v = (z - mean) basis / scale``.

    'whitened': the leading principal components that hold the asked-for variance, each divided by its standard
    deviation.  'standardised': every dimension divided by its standard deviation.  'raw': z itself.
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, basis: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("basis", basis)
        self.register_buffer("scale", scale)

    @classmethod
    def of(cls, z: Tensor, space: str, explained_variance: float = 0.99) -> Subspace:
        """Measure the subspace on codes z (N, d)."""
        d = z.shape[1]
        if space == "raw":
            return cls(torch.zeros(d), torch.eye(d), torch.ones(d))
        mean, centred = z.mean(dim=0), z - z.mean(dim=0)
        if space == "standardised":
            return cls(mean, torch.eye(d), centred.std(dim=0).clamp_min(1e-8))
        if space != "whitened":
            raise UserError(f"directions.space = {space!r} is not one of whitened, standardised, raw")
        variance, axes = torch.linalg.eigh(centred.T.double() @ centred.double() / len(z))
        variance, axes = variance.flip(0).clamp_min(0), axes.flip(1)
        held = variance.cumsum(0) / variance.sum()
        rank = min(int((held < explained_variance).sum()) + 1, d)
        return cls(mean, axes[:, :rank].float().contiguous(), variance[:rank].sqrt().float().clamp_min(1e-8))

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    def coordinates(self, z: Tensor) -> Tensor:
        """Codes (..., d) to coordinates (..., r)."""
        return (z - self.mean) @ self.basis / self.scale

    def shift(self, dv: Tensor) -> Tensor:
        """A change of coordinates (..., r) as a change of code (..., d)."""
        return (dv * self.scale) @ self.basis.T


# ----------------------------------------------------------------------------------------------------------------------
# The direction models


class DirectionModels(nn.Module):
    """K models ``D_k``, evaluated together: coordinates v (B, r) to shifts (K, B, r), not yet of unit length.

    Args:
        num: K.
        dim: r.
        kind: 'mlp' (linear, batch normalisation, ReLU; last layer linear without bias), 'linear', 'fixed' (the same
            shift for every image), or 'anchored' (a shift for every image, and an mlp that bends it).
        depth: layers of the mlp.
    """

    def __init__(self, num: int, dim: int, *, kind: str = "mlp", depth: int = 3) -> None:
        super().__init__()
        self.kind, self.num, self.dim = kind, num, dim
        layers = {"mlp": depth, "anchored": depth, "linear": 1, "fixed": 0}[kind]
        bound = dim**-0.5

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

        self.weights = nn.ParameterList([uniform(num, dim, dim) for _ in range(layers)])
        biased = 1 if kind == "linear" else max(layers - 1, 0)
        self.biases = nn.ParameterList([uniform(num, dim) for _ in range(biased)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(num * dim) for _ in range(layers - 1)])
        self.anchor = nn.Parameter(torch.randn(num, dim)) if kind in ("fixed", "anchored") else None

    def forward(self, v: Tensor) -> Tensor:
        if self.anchor is not None and self.kind == "fixed":
            return self.anchor[:, None].expand(-1, len(v), -1)
        h = v[None].expand(self.num, -1, -1)
        for layer, weight in enumerate(self.weights):
            h = torch.einsum("kbi,koi->kbo", h, weight)
            if layer < len(self.biases):
                h = h + self.biases[layer][:, None]
            if layer < len(self.norms):
                # One normalisation for each direction and feature: fold K into the features.
                h = self.norms[layer](h.transpose(0, 1).flatten(1)).unflatten(1, (self.num, self.dim)).transpose(0, 1)
                h = F.relu(h)
        return h if self.anchor is None else h + self.anchor[:, None]

    def unit(self, v: Tensor) -> Tensor:
        """Unit shifts u (K, B, r) at coordinates v (B, r)."""
        return F.normalize(self(v), dim=-1)


def projector(dim: int, out: int | None = None, hidden: int | None = None) -> nn.Sequential:
    """The projector P: three layers dim -> hidden -> hidden -> out (default d/2, d/4), batch normalisation, ReLU."""
    hidden = hidden or max(dim // 2, 8)
    out = out or max(dim // 4, 4)
    return nn.Sequential(
        nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
        nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
        nn.Linear(hidden, out, bias=False),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The losses


def contrastive_loss(features: Tensor, tau: float = 0.5, *, signed: bool = False) -> Tensor:
    """LatentCLR's loss on unit features (K, B, e): the same direction on different images attracts, others repel.

    Perfect separation gives -tau.  Source: Yuksel et al. 2021, section 3; the modulus is DiffEx's.

    Args:
        signed: whether opposite features of the same direction repel; with the published modulus they attract, so a
            direction may push half of the images the other way.
    """
    k, b, _ = features.shape
    f = features.reshape(k * b, -1)
    label = torch.arange(k, device=f.device).repeat_interleave(b)
    same = label[:, None] == label[None, :]
    cosine = f @ f.T
    similarity = torch.exp(tau * (torch.where(same, cosine, cosine.abs()) if signed else cosine.abs()))
    itself = torch.eye(k * b, dtype=torch.bool, device=f.device)
    attract = similarity.masked_fill(~same | itself, 0).sum(1) / (b - 1)
    if k == 1:
        return -attract.log().mean()
    repel = similarity.masked_fill(same, 0).sum(1) / ((k - 1) * b)
    return -(attract / repel).log().mean()


def pairwise_overlap(x: Tensor, team: Team = ALONE, count: int = 0) -> Tensor:
    """Mean over images of ``sum_{k != l} cos(x_k,i, x_l,i)^2 / (K (K - 1))``, in [0, 1].

    Args:
        x: (K, B, e): unit shifts, or change maps (magnitudes, so that only common pixels and channels count).
        team, count: workers, of which each holds its share of ``count`` images in x.
    """
    k = len(x)
    if k == 1:
        return x.new_zeros(())
    unit = F.normalize(x, dim=-1)
    squared = torch.einsum("kbe,lbe->bkl", unit, unit).square()
    of_images = squared.sum((1, 2)) - squared.diagonal(dim1=1, dim2=2).sum(1)
    return team.gather(of_images, count).mean() / (k * (k - 1))


def feature_covariance(features: Tensor) -> Tensor:
    """VICReg's covariance of projected features (K, B, e): squared off-diagonals of their e x e covariance, over e."""
    x = features.reshape(-1, features.shape[-1])
    x = x - x.mean(dim=0)
    cov = x.T @ x / (len(x) - 1)
    return (cov.square().sum() - cov.diagonal().square().sum()) / x.shape[1]


def published_covariance(shifts: Tensor) -> Tensor:
    """The reference code's term: summed squares of off-diagonal covariances between directions, image by image.

    Args:
        shifts: alpha * u, (K, B, d).  With alpha = 0.1 the value is so small that lambda_2 does nothing.
    """
    x = shifts - shifts.mean(dim=-1, keepdim=True)
    cov = torch.einsum("kbd,lbd->bkl", x, x) / (x.shape[-1] - 1)
    return cov.square().sum() - cov.diagonal(dim1=1, dim2=2).square().sum()


# ----------------------------------------------------------------------------------------------------------------------
# What the decoder and the classifier make of a shift


class Responses(NamedTuple):
    """Secant changes along each axis of the subspace, per unit of v, around n images.

    image: (n, P, r), change of the expected image, pooled to P numbers.
    verdict: (n, n_classes, r), change of the classifier's centred logits on it.
    """

    image: Tensor
    verdict: Tensor


@torch.no_grad()
def measure_responses(
    z: Tensor, subspace: Subspace, expected_image: Callable[[Tensor], Tensor], classifier: Callable[[Tensor], Tensor],
    *, step: float, pool: int = 16, batch_size: int = 256, progress: Callable[[int, int], None] | None = None,
) -> Responses:  # fmt: skip
    """Measure both responses by central differences of +- ``step`` along every axis.

    Args:
        z: codes (n, d).
        expected_image: decoder, codes (b, d) to images (b, C, H, W); costs one evaluation each.
        classifier: images to logits.
        step: half-width of the difference, in units of v: the shift length that directions are meant for.
        pool: image changes are averaged to pool x pool pixels.
    """
    images, verdicts = [], []

    def look(codes: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([expected_image(part) for part in codes.split(batch_size)])
        logits = torch.cat([classifier(part.clamp(-1, 1)) for part in x.split(batch_size)])
        x = F.adaptive_avg_pool2d(x, min(pool, x.shape[-1])).flatten(1)
        return x, logits - logits.mean(dim=1, keepdim=True)

    for axis in range(subspace.rank):
        shift = subspace.shift(step * F.one_hot(torch.tensor(axis), subspace.rank).to(z))
        (above, c_above), (below, c_below) = look(z + shift), look(z - shift)
        images.append((above - below) / (2 * step))
        verdicts.append((c_above - c_below) / (2 * step))
        if progress:
            progress(axis + 1, subspace.rank)
    return Responses(torch.stack(images, dim=-1), torch.stack(verdicts, dim=-1))


# ----------------------------------------------------------------------------------------------------------------------
# Training objective


@dataclass
class Objective:
    """Total loss of a batch of codes: ``L_con + lambda_2 L_cov - lambda_3 L_move``.

    Args:
        settings: section ``directions``.
        models, projector: what is trained.
        responses: needed by features or covariance 'image' and by lambda3 > 0, else None.
        team: workers among which a batch is shared.  The losses compare all its codes, so unit shifts and features
            are computed by share and gathered, and each worker has the loss of the whole batch.
    """

    settings: Directions
    models: DirectionModels
    projector: nn.Module
    responses: Responses | None
    team: Team = ALONE

    def __call__(self, v: Tensor, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss for coordinates v (B, r), whose responses are at ``rows`` (B,); and its parts, detached."""
        s, team, count = self.settings, self.team, len(v)
        v = team.share(v)
        u = self.models.unit(v)
        k, b, _ = u.shape
        change = None
        if self.responses is not None:
            change = torch.einsum("bpr,kbr->kbp", self.responses.image[team.share(rows)], u)
        if s.features == "image":
            assert change is not None
            scale = self.responses.image.square().sum((1, 2)).mean().sqrt()  # type: ignore[union-attr]
            f = self.projector(change.flatten(0, 1) * (10.0 / scale)).unflatten(0, (k, b))
        else:
            with torch.no_grad():
                still = self.projector(v)
            f = self.projector((v + s.alpha * u).flatten(0, 1)).unflatten(0, (k, b)) - still
        f, u = (team.gather(x, count, dim=1) for x in (F.normalize(f, dim=-1), u))
        contrastive = contrastive_loss(f, s.tau, signed=s.signed)
        if s.covariance == "image":
            assert change is not None
            covariance = pairwise_overlap(change.abs(), team, count)
        elif s.covariance == "shifts":
            covariance = pairwise_overlap(u)
        elif s.covariance == "features":
            covariance = feature_covariance(f)
        else:
            covariance = published_covariance(s.alpha * u)
        loss = contrastive + s.lambda2 * covariance
        parts = {"contrastive": contrastive.detach(), "covariance": covariance.detach()}
        if s.lambda3 > 0 and self.responses is not None:
            share = share_of_verdict(self.responses.verdict[rows], u)
            loss = loss - s.lambda3 * (share.max() + share.mean())
            parts["moved"], parts["moved_mean"] = share.max().detach(), share.mean().detach()
        return loss, parts


def needs_responses(s: Directions) -> bool:
    """Whether these settings look at images or at the classifier."""
    return s.features == "image" or s.covariance == "image" or s.lambda3 > 0


def share_of_verdict(verdict: Tensor, u: Tensor) -> Tensor:
    """How much of the attainable change of the classifier each direction brings, (K,), in [0, 1].

    Args:
        verdict: responses (B, n_classes, r).
        u: unit shifts (K, B, r).

    The mean change over images (a direction must push all of them the same way), over the mean largest change that any
    unit shift could bring.
    """
    change = torch.einsum("bcr,kbr->kbc", verdict, u).mean(dim=1).norm(dim=-1)
    return change / torch.linalg.matrix_norm(verdict, ord=2).mean().clamp_min(1e-8)


# ----------------------------------------------------------------------------------------------------------------------
# The result


class DirectionSet(nn.Module):
    """Trained directions with their subspace: what stage 3 and every baseline hand to ``explain``.

    Args:
        models: direction models over the subspace's coordinates.
        subspace: where they live.
    """

    def __init__(self, models: DirectionModels, subspace: Subspace) -> None:
        super().__init__()
        self.models, self.subspace = models, subspace
        self.eval()
        self.requires_grad_(False)

    @classmethod
    def fixed(cls, vectors: Tensor, subspace: Subspace) -> DirectionSet:
        """Directions that are the same for every image: vectors (K, r) in coordinates of the subspace."""
        models = DirectionModels(len(vectors), subspace.rank, kind="fixed")
        assert models.anchor is not None
        models.anchor.data.copy_(vectors)
        return cls(models, subspace)

    def __len__(self) -> int:
        return self.models.num

    @torch.no_grad()
    def unit(self, z: Tensor) -> Tensor:
        """Unit shifts u_k(z) in coordinates, (K, B, r)."""
        return self.models.unit(self.subspace.coordinates(z))

    @torch.no_grad()
    def shift(self, z: Tensor, k: int, alpha: float | Tensor) -> Tensor:
        """Codes (B, d) moved from z (B, d) along direction k by alpha (a number or (B,)) standard deviations."""
        if not 0 <= k < len(self):
            raise UserError(f"there is no direction {k}: this set has 0 to {len(self) - 1}")
        step = torch.as_tensor(alpha, dtype=z.dtype, device=z.device).reshape(-1, 1)
        return z + self.subspace.shift(step * self.unit(z)[k])

    def save(self, folder: Path) -> None:
        """Write ``directions.json`` and ``directions.safetensors``."""
        m = self.models
        config = {"num": m.num, "dim": m.dim, "kind": m.kind, "depth": len(m.weights), "d": len(self.subspace.mean)}
        (folder / "directions.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        save_file({k: v.contiguous().cpu() for k, v in self.state_dict().items()}, folder / "directions.safetensors")

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> DirectionSet:
        """Read what ``save`` wrote."""
        try:
            c = json.loads((folder / "directions.json").read_text(encoding="utf-8"))
            models = DirectionModels(c["num"], c["dim"], kind=c["kind"], depth=max(c["depth"], 1))
            subspace = Subspace(torch.zeros(c["d"]), torch.zeros(c["d"], c["dim"]), torch.ones(c["dim"]))
            result = cls(models, subspace)
            result.load_state_dict(load_file(folder / "directions.safetensors"))
        except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{str(folder)!r} holds no readable directions: {error}") from None
        return result.to(device)
