"""What each stage computes: files in its folder, and facts for the record.

Which stage needs which, and what decides its digest, stands in ``diffex.pipeline``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffex import baselines, metrics, train
from diffex.audit import phenotype_table
from diffex.cells import compartments
from diffex.classifier import FrozenClassifier, classification_report, is_given, load_classifier
from diffex.compute import Compute
from diffex.config import Experiment
from diffex.data import ImageStore, Progress, ingest_record
from diffex.directions import DirectionSet, Responses, Subspace, measure_responses
from diffex.errors import UserError
from diffex.explain import Distance, Explainer, Measure, choose_rows, effects_table, plan_edits, traversal
from diffex.model import DiffusionAutoencoder
from diffex.networks import ResidualClassifier
from diffex.perceptual import critic_distance, load_lpips
from diffex.prepare import build_store
from diffex.scoreboard import Tables, score
from diffex.store import RECORD

SHARD = 16  # images whose effects are rendered, and saved, together

EFFECTS_SO_FAR = "effects so far"

Observe = Callable[[str, Mapping[str, Any]], None]
"""``observe(stage, facts)``: told of each stage that is there, and with EFFECTS_SO_FAR of the ``table`` rendered until
then, so that a scheduler can stop a bad trial."""


@dataclass(kw_only=True)
class Work:
    """What a stage is given: settings, the folders of the stages it needs, and where to write."""

    experiment: Experiment
    inputs: dict[str, Path]
    out: Path
    compute: Compute
    progress: Progress
    observe: Observe

    def images(self) -> ImageStore:
        return ImageStore(self.inputs["data"], origin=self.experiment.data.path)

    def classifier(self, store: ImageStore) -> FrozenClassifier:
        trained = self.inputs["classifier"] / "model.safetensors"
        info = store.info
        frozen = load_classifier(
            self.experiment.classifier, info.class_names, len(info.channels), info.size,
            trained if trained.is_file() else None,
        )  # fmt: skip
        return frozen.to(self.compute.device)

    def autoencoder(self) -> DiffusionAutoencoder:
        return DiffusionAutoencoder.load(self.inputs["autoencoder"], self.experiment.rendering, self.compute)

    def new_autoencoder(self, store: ImageStore) -> DiffusionAutoencoder:
        info = store.info
        return DiffusionAutoencoder(
            self.experiment.autoencoder, self.experiment.rendering, channels=len(info.channels), size=info.size,
            num_classes=len(info.class_names), compute=self.compute,
        )  # fmt: skip

    def judge(self, stage: str, store: ImageStore) -> FrozenClassifier:
        """The witness or the robust counterpart."""
        e, info = self.experiment, store.info
        own = stage == "robust" and not is_given(e.classifier)
        width = e.classifier.width if own else e.evaluation.witness_width
        network = ResidualClassifier(len(info.channels), len(info.class_names), width=width)
        network.load_state_dict(load_file(self.inputs[stage] / "model.safetensors"))
        return FrozenClassifier(network, info.class_names).to(self.compute.device)

    def distances(self, witness: FrozenClassifier) -> dict[str, Distance]:
        """Perceptual distances: in the witness's feature maps, and real LPIPS where its weights are given."""
        network = cast(ResidualClassifier, witness.network)
        found: dict[str, Distance] = {"perceptual": lambda a, b: critic_distance(network, a, b)}
        if self.experiment.evaluation.lpips is not None:
            found["lpips"] = load_lpips(self.experiment.evaluation.lpips)
        return found

    def black(self) -> float | None:
        """Level outside cells: 0 in images cut out of fields, whose background is subtracted; None: unknown."""
        path = self.experiment.data.path
        return 0.0 if path is not None and ingest_record(Path(path)).get("crop") else None

    def masks(self, x: Tensor, channels: Sequence[str]) -> Tensor:
        """Where the cell in the middle of each image (B, C, H, W) lies, (B, H, W)."""
        s = self.experiment.evaluation
        named = (channels, s.nucleus_channel, s.cell_channel, self.black())
        cells = [compartments(image, *named)[0]["Cells"] for image in ((x.cpu() + 1) / 2).numpy()]
        return torch.from_numpy(np.stack(cells))

    def probabilities(self) -> Tensor:
        return load_file(self.inputs["classifier"] / "probabilities.safetensors")["probs"]

    def codes(self) -> Tensor:
        return load_file(self.inputs["latents"] / "latents.safetensors")["z"]


# ----------------------------------------------------------------------------------------------------------------------
# The stages


def run_data(w: Work) -> dict[str, Any]:
    info = build_store(w.experiment.data, w.experiment.assay, w.out, w.progress)
    store = ImageStore(w.out, origin=w.experiment.data.path)
    counts = {
        part: np.bincount(store.labels[store.rows(part)], minlength=len(info.class_names)).tolist()
        for part in ("train", "valid", "test")
    }
    return {"images": info.count, "channels": list(info.channels), "class_names": list(info.class_names),
            "split_by": list(info.split_by), "counts": counts}  # fmt: skip


def run_classifier(w: Work) -> dict[str, Any]:
    store, e = w.images(), w.experiment
    info = store.info
    if not is_given(e.classifier):
        torch.manual_seed(train.hash_seed(e.run.seed, 1))
        network = ResidualClassifier(len(info.channels), len(info.class_names), width=e.classifier.width)
        task = train.SupervisedTask(
            "classifier", network, store, train.classification_loss(torch.tensor(store.labels)), e.classifier,
            images=e.classifier.images, compute=w.compute, seed=e.run.seed,
        )  # fmt: skip
        write_history(w.out, train.fit(task, w.out, seed=e.run.seed, progress=w.progress))
        save_file({k: v.contiguous().cpu() for k, v in network.state_dict().items()}, w.out / "model.safetensors")
        (w.out / train.CHECKPOINT).unlink()
    trained = w.out / "model.safetensors"
    classifier = load_classifier(
        e.classifier, info.class_names, len(info.channels), info.size, trained if trained.is_file() else None
    ).to(w.compute.device)
    probs = over_images(store, lambda x: classifier.probabilities(x), w)
    save_file({"probs": probs}, w.out / "probabilities.safetensors")
    test = store.rows("test")
    report = classification_report(probs[test].numpy(), store.labels[test], store.groups()[test], info.class_names)
    (w.out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return {"report": report, "trained_here": not is_given(e.classifier)}


def _autoencoder_task(w: Work, lambda1: float) -> train.AutoencoderTask:
    store = w.images()
    torch.manual_seed(train.hash_seed(w.experiment.run.seed, 4))
    return train.AutoencoderTask(
        w.new_autoencoder(store), w.new_autoencoder(store), store, w.probabilities(), w.classifier(store),
        lambda1=lambda1, seed=w.experiment.run.seed,
    )  # fmt: skip


def run_warmup(w: Work) -> dict[str, Any]:
    task = _autoencoder_task(w, 0.0)
    history = train.fit(task, w.out, until=task.warmup_images, seed=w.experiment.run.seed, progress=w.progress)
    return {"images": task.warmup_images, "unet_evaluations": task.warmup_images,
            "parameters": sum(p.numel() for p in task.model.parameters()),
            "simple": history[-1]["simple"] if history else None}  # fmt: skip


def run_autoencoder(w: Work) -> dict[str, Any]:
    e = w.experiment.autoencoder
    task = _autoencoder_task(w, e.lambda1)
    if not (w.out / train.CHECKPOINT).is_file():  # branch off the shared warm-up
        seen, history = train.load_checkpoint(task, w.inputs["warmup"] / train.CHECKPOINT)
        train.save_checkpoint(task, w.out / train.CHECKPOINT, seen, history)
    history = train.fit(task, w.out, seed=w.experiment.run.seed, progress=w.progress)
    write_history(w.out, history)
    task.average.save(w.out)
    (w.out / train.CHECKPOINT).unlink()
    branch = task.images - task.warmup_images
    per_image = 1 + (e.truncated_steps if e.classifier_term == "truncated" and e.lambda1 > 0 else 0)
    return {"images": branch, "unet_evaluations": branch * per_image, "losses": history[-1]}


@torch.no_grad()
def run_latents(w: Work) -> dict[str, Any]:
    store = w.images()
    model, probs = w.autoencoder(), w.probabilities().to(w.compute.device)
    z = torch.cat([
        model.semantic(store.batch(rows, w.compute.device).x, probs[rows]).cpu()
        for rows in np.array_split(np.arange(len(store)), max(1, len(store) // 256))
    ])  # fmt: skip
    save_file({"z": z}, w.out / "latents.safetensors")
    variance = torch.linalg.eigvalsh(torch.cov(z[store.rows("train")].T.double())).flip(0).clamp_min(0)
    share = variance / variance.sum()
    rank = float(torch.exp(-(share[share > 0] * share[share > 0].log()).sum()))
    return {"effective_rank": rank, "explained": [round(float(v), 5) for v in share.cumsum(0)[:32]]}


def run_responses(w: Work) -> dict[str, Any]:
    store, s = w.images(), w.experiment.directions
    model, classifier, z = w.autoencoder(), w.classifier(store), w.codes()
    rows = balanced(store, store.rows("train"), s.response_images, w.experiment.run.seed)
    subspace = Subspace.of(z[store.rows("train")], s.space, s.explained_variance).to(w.compute.device)
    responses = measure_responses(
        z[rows].to(w.compute.device), subspace, model.expected_image, classifier, step=s.alpha,
        progress=lambda done, total: w.progress("responses", done, total),
    )  # fmt: skip
    save_file({"rows": torch.from_numpy(rows), "image": responses.image.cpu().contiguous(),
               "verdict": responses.verdict.cpu().contiguous()}, w.out / "responses.safetensors")  # fmt: skip
    return {"rank": subspace.rank, "unet_evaluations": 2 * subspace.rank * len(rows)}


def run_directions(w: Work) -> dict[str, Any]:
    store, e = w.images(), w.experiment
    s, z = e.directions, w.codes()
    subspace = Subspace.of(z[store.rows("train")], s.space, s.explained_variance)
    rows, responses = training_responses(w, store)
    coordinates = subspace.coordinates(z[rows]).to(w.compute.device)
    task = train.DirectionsTask(s, coordinates, responses, seed=e.run.seed)
    history = train.fit(task, w.out, seed=e.run.seed, progress=w.progress)
    write_history(w.out, history)
    (w.out / train.CHECKPOINT).unlink()
    directions = DirectionSet(task.models.cpu(), subspace)
    directions.save(w.out)
    unit = directions.unit(z[store.rows("test")])
    mean = torch.nn.functional.normalize(unit.mean(dim=1), dim=-1)
    cosine = mean @ mean.T
    off = cosine[~torch.eye(len(cosine), dtype=torch.bool)].abs()
    return {
        "rank": subspace.rank, "consistency": metrics.consistency(unit).tolist(),
        "largest_cosine": float(off.max()) if len(off) else 0.0, "mean_cosine": float(off.mean()) if len(off) else 0.0,
        "losses": history[-1],
    }  # fmt: skip


def training_responses(w: Work, store: ImageStore) -> tuple[NDArray[np.int64], Responses | None]:
    """Training images of the directions: those with measured responses, where the objective looks at any, else all."""
    if "responses" not in w.inputs:
        return store.rows("train"), None
    saved = load_file(w.inputs["responses"] / "responses.safetensors")
    responses = Responses(saved["image"].to(w.compute.device), saved["verdict"].to(w.compute.device))
    return saved["rows"].numpy(), responses


def class_pairs(e: Experiment, class_names: tuple[str, ...]) -> list[tuple[int, int]]:
    """The (source, target) pairs to explain, as class indices: named ones, else control to treated, else every pair."""
    for key, name in (("source", e.ranking.source), ("target", e.ranking.target)):
        if name is not None and name not in class_names:
            raise UserError(f"ranking.{key} = {name!r} is not a class; the classes are {', '.join(class_names)}")
    sources = [class_names.index(e.ranking.source)] if e.ranking.source else list(range(len(class_names)))
    if e.ranking.source is None and e.ranking.target is None and len(class_names) == 2:
        sources = [_control(class_names)]
    targets = [class_names.index(e.ranking.target)] if e.ranking.target else list(range(len(class_names)))
    return [(s, t) for s in sources for t in targets if s != t]


USUAL_CONTROLS = (
    "dmso", "control", "ctrl", "untreated", "uninfected", "negative", "healthy", "normal", "wildtype", "wt", "mock",
    "vehicle",
)  # fmt: skip


def _control(class_names: tuple[str, ...]) -> int:
    """The class that is most likely the untreated one: a usual name of it, else the first."""
    return next((i for i, name in enumerate(class_names) if name.lower() in USUAL_CONTROLS), 0)


def load_measure(folder: Path, channels: int, device: torch.device) -> Measure:
    """The ruler, calibrated, restricted to the factors that it measures well (R2 of at least 0.5 on test cells)."""
    facts = json.loads((folder / "ruler.json").read_text(encoding="utf-8"))
    network = ResidualClassifier(channels, len(facts["factors"]), width=facts["width"])
    network.load_state_dict(load_file(folder / "model.safetensors"))
    network.to(device).eval().requires_grad_(False)
    good = [j for j, name in enumerate(facts["factors"]) if facts["r2"][name] >= 0.5]
    slopes = torch.tensor([facts["slope"][j] for j in good], device=device)
    return Measure(tuple(facts["factors"][j] for j in good), lambda x: network(x)[:, good] / slopes)


def run_effects(w: Work) -> dict[str, Any]:
    store, e = w.images(), w.experiment
    model, classifier, z_all = w.autoencoder(), w.classifier(store), w.codes()
    device = w.compute.device
    learned = DirectionSet.load(w.inputs["directions"])
    subspace, training = learned.subspace, store.rows("train")
    v, labels = subspace.coordinates(z_all[training]), torch.from_numpy(store.labels[training])
    pairs = class_pairs(e, store.info.class_names)
    means = baselines.class_means(v, labels, len(store.info.class_names))
    # The reference length of a source class: the shortest of its class-mean differences.
    length = {s: min(float((means[t] - means[s]).norm()) for a, t in pairs if a == s) for s, _ in pairs}
    sets = {"learned": learned, "random": baselines.random(subspace, e.evaluation.random_directions, e.run.seed)}
    makers = {
        "class_mean": lambda: baselines.class_mean_difference(v, labels, pairs, subspace),
        "linear": lambda: baselines.linear_classifier(v, labels, pairs, subspace),
        "principal": lambda: baselines.principal(subspace, len(learned)),
    }
    sets |= {name: makers[name]() for name in e.evaluation.baselines}
    for group in sets.values():
        group.to(device)
    measure = load_measure(w.inputs["ruler"], len(store.info.channels), device) if "ruler" in w.inputs else None
    judges = {name: w.judge(name, store) for name in ("witness", "robust")}
    distances = w.distances(judges["witness"])
    predicted, groups = w.probabilities().argmax(dim=1).numpy(), store.groups()
    chosen = {
        s: choose_rows(store.labels, predicted, groups, store.rows("test"), s, e.ranking.num_images, e.run.seed)
        for s in length
    }
    for s, rows in chosen.items():
        if len(rows) < 2:
            raise UserError(
                f"only {len(rows)} test images of class {store.info.class_names[s]!r} are classified rightly. "
                "Look at the classifier's report; give it more training, or more images"
            )
    shards = [(s, rows[i : i + SHARD]) for s, rows in chosen.items() for i in range(0, len(rows), SHARD)]
    # Class by class in turn, so that a scheduler's first look sees every class.
    shards.sort(key=lambda item: np.flatnonzero(chosen[item[0]] == item[1][0])[0])
    edits = plan_edits(
        len(learned),
        e.ranking.alphas,
        e.evaluation.random_directions,
        {n: len(sets[n]) for n in e.evaluation.baselines},
    )
    tables = []
    for number, (s, rows) in enumerate(shards):
        file = w.out / f"shard-{number:05d}.parquet"
        if not file.is_file():
            batch = store.batch(rows, device)
            table = effects_table(
                model, classifier, sets, edits, batch.x, batch.rows, reference=length[s], measure=measure,
                judges=judges, distances=distances, cells=w.masks(batch.x, store.info.channels),
            )  # fmt: skip
            pq.write_table(table, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").rename(file)
        tables.append(_join_metadata(pq.read_table(file), store, groups))
        w.progress("effects", number + 1, len(shards))
        w.observe(EFFECTS_SO_FAR, {"table": pa.concat_tables(tables)})
    pq.write_table(pa.concat_tables(tables), w.out / "effects.parquet")
    for file in w.out.glob("shard-*"):
        file.unlink()
    images = sum(map(len, chosen.values()))
    names = store.info.class_names
    return {
        "images": images, "edits": len(edits), "pairs": [[names[s], names[t]] for s, t in pairs],
        "reference_length": {names[s]: value for s, value in length.items()},
        "shown": {names[s]: rows[:4].tolist() for s, rows in chosen.items()},
        "unet_evaluations": images * (model.encode_evaluations + (1 + len(edits)) * model.render_evaluations),
    }  # fmt: skip


def _join_metadata(table: pa.Table, store: ImageStore, groups: NDArray) -> pa.Table:
    """Add class name, statistical unit and Metadata_* of each row's image."""
    rows = table["row"].to_numpy()
    table = table.append_column("class_name", pa.array([store.info.class_names[k] for k in store.labels[rows]]))
    table = table.append_column("group", pa.array(groups[rows]))
    for name in store.metadata():
        table = table.append_column(name, store.table[name].take(pa.array(rows)))
    return table


def run_scoreboard(w: Work) -> dict[str, Any]:
    """Rank the directions and write the scoreboard's row: nothing is rendered here."""
    facts = {
        name: json.loads((folder / RECORD).read_text(encoding="utf-8"))["facts"] for name, folder in w.inputs.items()
    }
    evidence = w.inputs["evidence"]
    tables = Tables(
        effects=pq.read_table(w.inputs["effects"] / "effects.parquet"),
        real=pq.read_table(w.inputs["real_cells"] / "features.parquet"),
        cells=pq.read_table(evidence / "cells.parquet"),
        trajectories=pq.read_table(evidence / "trajectories.parquet"), cycle=pq.read_table(evidence / "cycle.parquet"),
        profiles={k: v.numpy() for k, v in load_file(w.inputs["replicas"] / "profiles.safetensors").items()},
    )  # fmt: skip
    result = score(w.experiment, facts, tables)
    pq.write_table(result.ranking, w.out / "ranking.parquet")
    pq.write_table(phenotype_table(result.findings, tables.real), w.out / "phenotypes.parquet")
    (w.out / "row.json").write_text(json.dumps(result.row, indent=1), encoding="utf-8")
    return {"top": result.top}


@torch.no_grad()
def run_pictures(w: Work) -> dict[str, Any]:
    """Traversals of the top directions from -3 to +3 standard deviations, towards the target on the right."""
    store, e = w.images(), w.experiment
    explainer = Explainer(
        w.autoencoder(), DirectionSet.load(w.inputs["directions"], w.compute.device), w.classifier(store)
    )
    ranking = pq.read_table(w.inputs["scoreboard"] / "ranking.parquet").to_pylist()
    shown = json.loads((w.inputs["effects"] / RECORD).read_text(encoding="utf-8"))["facts"]["shown"]
    alphas = [float(a) for a in range(-3, 4)]
    pictures, index = {}, []
    wanted = [r for r in ranking if r["rank"] <= e.ranking.top]
    for number, r in enumerate(wanted):
        x = store.batch(shown[r["source"]], w.compute.device).x
        images, probs = traversal(explainer, x, r["direction"], [r["sign"] * a for a in alphas])
        pictures[f"images.{number}"] = ((images + 1) * 127.5).round().byte()
        pictures[f"probs.{number}"] = probs
        index.append({name: r[name] for name in ("source", "target", "rank", "direction", "sign")})
        w.progress("pictures", number + 1, len(wanted))
    save_file(pictures, w.out / "traversals.safetensors")
    (w.out / "traversals.json").write_text(json.dumps({"alphas": alphas, "rows": index}, indent=1), encoding="utf-8")
    return {}


# ----------------------------------------------------------------------------------------------------------------------
# Small things that several stages need


def write_history(folder: Path, history: train.History) -> None:
    (folder / "history.json").write_text(json.dumps(history), encoding="utf-8")


@torch.no_grad()
def over_images(
    store: ImageStore, function: Callable[[Tensor], Tensor], w: Work, rows: NDArray[np.int64] | None = None
) -> Tensor:
    rows = np.arange(len(store)) if rows is None else rows
    parts = np.array_split(rows, max(1, len(rows) // 256))
    return torch.cat([function(store.batch(part, w.compute.device).x).cpu() for part in parts])


def balanced(store: ImageStore, candidates: NDArray[np.int64], num: int, seed: int) -> NDArray[np.int64]:
    """Up to ``num`` of the candidates, drawn at random, the classes in equal shares as far as they reach."""
    rng = np.random.default_rng([seed, 7])
    by_class = [rng.permutation(candidates[store.labels[candidates] == c]) for c in range(len(store.info.class_names))]
    turn = np.concatenate([np.arange(len(rows)) for rows in by_class])
    rows = np.concatenate(by_class)
    return np.sort(rows[np.argsort(turn, kind="stable")][:num])
