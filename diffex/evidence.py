"""What a trained model and its directions are judged by: reconstructions, directions trained again, and the ways of the
top directions, followed step by step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from diffex import assay, disentanglement, metrics, statistics, train
from diffex.audit import feature_names, matrix
from diffex.classifier import FrozenClassifier
from diffex.data import ImageStore
from diffex.directions import DirectionSet
from diffex.explain import Distance, choose_rows, evenly, render_trajectory
from diffex.instruments import FactorRegression, factor_values, feature_table, measured
from diffex.model import Code, DiffusionAutoencoder, classifier_divergence
from diffex.networks import ResidualClassifier
from diffex.perceptual import embed
from diffex.ranking import rank
from diffex.realism import distance_with_interval
from diffex.stages import training_responses
from diffex.trajectories import trajectory_table
from diffex.work import Work, balanced

TRUTH_IMAGES = 800  # enough for regressions of a dozen codes

REALISM = {"frechet": "frechet", "kid": "kernel"}  # key in the row -> kind of distance


@torch.no_grad()
def run_reconstruction(w: Work) -> dict[str, Any]:
    """Reconstruction, realism, and the conditioning gate: does the image follow z, or does x_T carry it?"""
    store, e = w.images(), w.experiment
    model, classifier, witness = w.autoencoder(), w.classifier(store), w.judge("witness", store)
    probs_all = w.probabilities()
    test = store.rows("test")
    rows = balanced(store, test, e.evaluation.num_images, e.run.seed)
    x, probs = store.batch(rows, w.compute.device).x, probs_all[rows].to(w.compute.device)
    said = probs.argmax(dim=1).cpu()
    groups = store.groups()[rows]
    generator = torch.Generator().manual_seed(train.hash_seed(e.run.seed, 5))
    partner = _partners(said, generator)
    noise = torch.randn(x.shape, generator=generator).to(x)
    parts: dict[str, list[Tensor]] = {"reconstruction": [], "swapped": [], "random": []}
    z = torch.cat([model.semantic(a, b) for a, b in zip(x.split(64), probs.split(64), strict=True)])
    pieces = torch.arange(len(x)).split(64)
    for done, i in enumerate(pieces):
        x_T = model.invert(x[i], z[i])
        parts["reconstruction"].append(model.decode(z[i], x_T))
        parts["swapped"].append(model.decode(z[partner[i]], x_T))
        parts["random"].append(model.decode(z[i], noise[i]))
        w.progress("reconstruction", done + 1, len(pieces))
    images = {name: torch.cat(part) for name, part in parts.items()}
    p = {name: classifier.probabilities(image).cpu() for name, image in images.items()}
    follows = {
        "agreement": p["reconstruction"].argmax(1) == said, "swapped": p["swapped"].argmax(1) == said[partner],
        "random": p["random"].argmax(1) == said,
    }  # fmt: skip
    values = {
        "ssim": metrics.ssim(images["reconstruction"], x), "mse": metrics.mse(images["reconstruction"], x),
        "psnr": metrics.psnr(images["reconstruction"], x),
        "kl": classifier_divergence(probs.cpu(), p["reconstruction"].clamp_min(1e-12).log()), **follows,
    }  # fmt: skip
    distances = w.distances(witness)
    values |= {name: distance(images["reconstruction"], x) for name, distance in distances.items()}
    facts: dict[str, Any] = {"n": len(rows), "units": len(np.unique(groups))}
    for name, value in values.items():
        array = value.cpu().double().numpy()
        low, high = statistics.bootstrap_interval(array, groups, seed=e.run.seed)
        facts[name] = {"mean": float(array.mean()), "low": low, "high": high}
    # How far apart two images are that have nothing to do with each other: what the distances above are to be read by.
    strangers = (torch.arange(len(x)) + 1) % len(x)
    facts["strangers"] = {name: float(distance(x, x[strangers]).mean()) for name, distance in distances.items()}
    others = balanced(store, np.setdiff1d(test, rows), e.evaluation.num_images, e.run.seed + 1)
    judged = {"real": x, "reconstruction": images["reconstruction"], "random": images["random"]}
    facts["realism"] = _realism(w, store, witness, judged, groups, others if len(others) > 8 else rows)
    show = torch.arange(min(12, len(x)))
    shown = {"original": x, **images}
    save_file(
        {name: ((image[show].cpu() + 1) * 127.5).round().byte() for name, image in shown.items()},
        w.out / "images.safetensors",
    )
    facts["unet_evaluations"] = len(rows) * (model.encode_evaluations + 3 * model.render_evaluations)
    return facts


def _realism(
    w: Work, store: ImageStore, witness: FrozenClassifier, images: Mapping[str, Tensor], groups: NDArray,
    others: NDArray[np.int64],
) -> dict[str, Any]:  # fmt: skip
    """Fréchet and kernel distances of sets of images to other real test images, in the witness's features."""
    network = cast(ResidualClassifier, witness.network)
    real = embed(network, store.batch(others, w.compute.device).x).cpu().numpy()
    facts: dict[str, Any] = {"n": len(groups), "m": len(others)}
    for name, x in images.items():
        features = embed(network, x).cpu().numpy()
        facts[name] = {}
        for key, kind in REALISM.items():
            d = distance_with_interval(
                features, real, groups, store.groups()[others], kind=kind, seed=w.experiment.run.seed
            )
            facts[name][key] = {"mean": d.value, "low": d.low, "high": d.high}
    return facts


def _partners(said: Tensor, generator: torch.Generator) -> Tensor:
    """For each image another one that the classifier puts into another class; any other where all are of one class."""
    partner = torch.empty_like(said)
    for i, c in enumerate(said):
        other = torch.nonzero(said != c)[:, 0]
        if len(other) == 0:
            other = torch.tensor([j for j in range(len(said)) if j != i])
        partner[i] = other[torch.randint(len(other), (), generator=generator)]
    return partner


# ----------------------------------------------------------------------------------------------------------------------
# Directions trained again


def run_replicas(w: Work) -> dict[str, Any]:
    """Train the directions again from other seeds on the same latents; keep what each set does, not the sets.

    Profiles are a direction's mean unit shift over test cells, and the change of the expected image that it brings.
    """
    store, e = w.images(), w.experiment
    z = w.codes()
    learned = DirectionSet.load(w.inputs["directions"])
    subspace = learned.subspace
    rows, responses = training_responses(w, store)
    coordinates = subspace.coordinates(z[rows]).to(w.compute.device)
    test = z[store.rows("test")]
    sets = [learned]
    for number in range(1, e.evaluation.replicas + 1):
        seed = train.hash_seed(e.run.seed, 21, number) % 2**31
        task = train.DirectionsTask(e.directions, coordinates, responses, seed=seed)
        folder = w.out / f"replica-{number}"
        folder.mkdir(exist_ok=True)
        train.fit(task, folder, seed=seed, progress=w.progress)
        sets.append(DirectionSet(task.models.cpu(), subspace))
        (folder / train.CHECKPOINT).unlink()
        folder.rmdir()
    profiles = {"code": torch.stack([s.unit(test).mean(dim=1) for s in sets])}
    if responses is not None:
        profiles["image"] = torch.einsum("pr,skr->skp", responses.image.mean(dim=0).cpu(), profiles["code"])
    save_file({name: p.contiguous() for name, p in profiles.items()}, w.out / "profiles.safetensors")
    return {"replicas": e.evaluation.replicas}


# ----------------------------------------------------------------------------------------------------------------------
# The ways of the top directions


def audited(w: Work, effects: pa.Table, pairs: list[list[str]]) -> list[dict[str, Any]]:
    """The ranked directions to follow: the first of every pair, then the second ones, ..., as many as asked for."""
    e = w.experiment
    r = e.ranking
    ranked = [
        rank(effects, s, t, order=r.order, top=r.top, explained_at=r.explained_at, draws=50, seed=e.run.seed)
        .slice(0, e.evaluation.audited).to_pylist()
        for s, t in pairs
    ]  # fmt: skip
    turns = [rows[turn] for turn in range(e.evaluation.audited) for rows in ranked if turn < len(rows)]
    return turns[: max(e.evaluation.audited, len(pairs))]


class Start(NamedTuple):
    """Cells whose ways are followed: rows of the store, codes, reconstructions, and those encoded again, (B, r)."""

    rows: NDArray[np.int64]
    code: Code
    image: Tensor
    again: Tensor


@dataclass(frozen=True, kw_only=True)
class Follower:
    """Follows directions from cells to their counterfactuals.

    Attributes:
        model, directions: what is explained with.
        judges: name -> classifier, the explained one under 'p'.
        perceptual: distance of images.
        steps: on each way.
    """

    model: DiffusionAutoencoder
    directions: DirectionSet
    judges: Mapping[str, FrozenClassifier]
    perceptual: Distance
    steps: int

    @torch.no_grad()
    def start(self, rows: NDArray[np.int64], x: Tensor, probs: Tensor) -> Start:
        """Encode images x (B, C, H, W) with the classifier's verdict probs (B, n_classes)."""
        code = self.model.encode(x, probs)
        image = self.model.decode(code.z, code.x_T)
        return Start(rows, code, image, self._coordinates(image, probs))

    def _coordinates(self, x: Tensor, probs: Tensor) -> Tensor:
        return self.directions.subspace.coordinates(self.model.semantic(x, probs))

    @torch.no_grad()
    def follow(self, start: Start, direction: int, length: float) -> tuple[Tensor, pa.Table, pa.Table]:
        """Go along a direction, and encode what comes out again.

        Args:
            length: signed, in standard deviations.

        Returns:
            The edits (B, C, H, W); the trajectory table; and the cycle's table: what is left of an edit that is encoded
            with the *unedited* cell's verdict and rendered from its x_T, so that only what is visible in it counts:
            ``row, cosine`` (of the code's change to the one that was asked for) and ``p:<class>``.
        """
        alphas = np.linspace(0.0, length, self.steps + 1).tolist()
        rendered = render_trajectory(self.model, self.directions, start.code, direction, alphas[1:])
        images = torch.cat([start.image[None], rendered])
        rows = torch.from_numpy(start.rows)
        trajectory = trajectory_table(images, alphas, rows, self.judges, self.perceptual)
        z = self.model.semantic(images[-1], start.code.probs)
        moved = self.directions.subspace.coordinates(z) - start.again
        wanted = self.directions.unit(start.code.z)[direction] * math.copysign(1.0, length)
        classifier = self.judges["p"]
        said = classifier.probabilities(self.model.decode(z, start.code.x_T)).cpu().numpy()
        cycle = pa.table({
            "row": start.rows, "cosine": torch.cosine_similarity(moved, wanted, dim=1).cpu().numpy(),
            **{f"p:{name}": said[:, j] for j, name in enumerate(classifier.class_names)},
        })  # fmt: skip
        return images[-1], trajectory, cycle


def run_evidence(w: Work) -> dict[str, Any]:
    """Follow the top directions from each cell to its counterfactual, and measure the cells at both ends.

    Writes ``trajectories.parquet``, ``cycle.parquet`` (see ``Follower.follow``) and ``cells.parquet``: classical
    features of images, reconstructions and edits.
    """
    store, e = w.images(), w.experiment
    names, groups = store.info.class_names, store.groups()
    witness = w.judge("witness", store)
    judges = {"p": w.classifier(store), "witness": witness, "robust": w.judge("robust", store)}
    follower = Follower(
        model=w.autoencoder(), directions=DirectionSet.load(w.inputs["directions"], w.compute.device), judges=judges,
        perceptual=w.distances(witness)["perceptual"], steps=e.evaluation.steps,
    )  # fmt: skip
    record = w.facts("effects")
    chosen = audited(w, pq.read_table(w.inputs["effects"] / "effects.parquet"), record["pairs"])
    probs, test = w.probabilities(), store.rows("test")
    number = min(e.evaluation.followed_images, e.ranking.num_images)
    paths, cells, cycles, realism = [], [], [], []

    def measure(x: Tensor, rows: NDArray[np.int64], kind: str, target: str = "", direction: int = -1) -> None:
        table = feature_table(store, rows, measured(w, store, x))
        cells.append(_tagged(table, kind=kind, target=target, direction=direction))

    def seen(x: Tensor) -> NDArray:
        return embed(cast(ResidualClassifier, witness.network), x).cpu().numpy()

    @cache
    def real_of(target: str) -> tuple[NDArray[np.int64], NDArray]:
        rows = balanced(store, test[store.labels[test] == names.index(target)], e.evaluation.num_images, e.run.seed)
        return rows, seen(store.batch(rows, w.compute.device).x)

    for source in dict.fromkeys(r["source"] for r in chosen):
        c = names.index(source)
        rows = choose_rows(store.labels, probs.argmax(dim=1).numpy(), groups, test, c, number, e.run.seed)
        x = store.batch(rows, w.compute.device).x
        start = follower.start(rows, x, probs[rows].to(w.compute.device))
        measure(x, rows, "image")
        measure(start.image, rows, "reconstruction")
        for r in (r for r in chosen if r["source"] == source):
            about = {name: r[name] for name in ("source", "target", "direction", "sign", "rank")}
            length = r["sign"] * record["reference_length"][source]
            edit, trajectory, cycle = follower.follow(start, r["direction"], length)
            paths.append(_tagged(trajectory, **about))
            cycles.append(_tagged(cycle, **about))
            measure(edit, rows, "edit", r["target"], r["direction"])
            real, seen_real = real_of(r["target"])
            for kind, image in (("reconstruction", start.image), ("edit", edit)):
                d = distance_with_interval(
                    seen(image), seen_real, groups[rows], groups[real], kind="kernel", seed=e.run.seed
                )
                realism.append(
                    {**about, "kind": kind, "kid": d.value, "low": d.low, "high": d.high, "n": d.n, "m": d.m}
                )
            w.progress("evidence", len(paths), len(chosen))
    pq.write_table(_with_groups(pa.concat_tables(paths), groups), w.out / "trajectories.parquet")
    pq.write_table(pa.concat_tables(cells), w.out / "cells.parquet")
    pq.write_table(_with_groups(pa.concat_tables(cycles), groups), w.out / "cycle.parquet")
    model = follower.model
    begun = sum(number for _ in dict.fromkeys(r["source"] for r in chosen))
    evaluations = begun * (model.encode_evaluations + model.render_evaluations)
    evaluations += number * len(chosen) * (e.evaluation.steps + 1) * model.render_evaluations
    followed = [{name: r[name] for name in ("source", "target", "direction", "sign", "rank")} for r in chosen]
    return {"audited": followed, "kid": realism, "unet_evaluations": evaluations}


def _tagged(table: pa.Table, **about: Any) -> pa.Table:
    for name, value in about.items():
        table = table.append_column(name, pa.array([value] * len(table)))
    return table


def _with_groups(table: pa.Table, groups: NDArray) -> pa.Table:
    return table.append_column("group", pa.array(groups[table["row"].to_numpy()]))


# ----------------------------------------------------------------------------------------------------------------------
# Against the truth of the simulated assay


def run_truth(w: Work) -> dict[str, Any]:
    """Hold codes and edits to the true factors: MIG, DCI and SAP, and the factors' shifts read from classical features.

    An image's code on direction k is the coordinate of its z along the direction's mean unit shift.
    """
    store, e = w.images(), w.experiment
    factors = assay.visible_factors(store.info.channels)
    values, groups = factor_values(store, factors), store.groups()
    learned = DirectionSet.load(w.inputs["directions"])
    rows = np.sort(evenly(store.rows("test"), groups, TRUTH_IMAGES, [e.run.seed, 23]))
    z = w.codes()[rows]
    unit = learned.unit(z).mean(dim=1)
    codes = (learned.subspace.coordinates(z) @ unit.T).numpy()
    found = disentanglement.dci(codes, values[rows], groups=groups[rows], seed=e.run.seed)
    facts: dict[str, Any] = {
        "n": len(rows), "units": len(np.unique(groups[rows])), "factors": list(factors),
        "mig": disentanglement.mutual_information_gap(codes, values[rows])[0],
        "sap": disentanglement.sap(codes, values[rows])[0], "dci.disentanglement": found.disentanglement,
        "dci.completeness": found.completeness, "dci.informativeness": found.informativeness,
    }  # fmt: skip
    real = pq.read_table(w.inputs["real_cells"] / "features.parquet")
    cells = pq.read_table(w.inputs["evidence"] / "cells.parquet")
    measured_rows, names = real["row"].to_numpy(), feature_names(real)
    ruler = FactorRegression.fit(
        matrix(real, names), values[measured_rows], store.labels[measured_rows], real["group"].to_numpy(), factors
    )
    shifts, x = [], matrix(cells, names)
    kind, direction = (cells[name].to_numpy(zero_copy_only=False) for name in ("kind", "direction"))
    source, target = (cells[name].to_numpy(zero_copy_only=False) for name in ("class_name", "target"))
    followed = w.facts("evidence")["audited"]
    for r in followed:
        edit = (kind == "edit") & (direction == r["direction"]) & (source == r["source"]) & (target == r["target"])
        base = (kind == "reconstruction") & (source == r["source"])
        shifts.append((ruler(x[edit]) - ruler(x[base])).mean(axis=0).tolist())
    facts["classical"] = {"factors": list(ruler.factors), "r2": ruler.r2, "shifts": shifts}
    return facts
