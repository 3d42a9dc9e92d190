"""What each stage computes: files in its folder, and facts for the record.

Which stage needs which, and what decides its digest, stands in ``diffex.pipeline``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from diffex import baselines, metrics, train
from diffex.audit import phenotype_table
from diffex.classifier import FrozenClassifier, classification_report, is_given, load_classifier
from diffex.config import Experiment
from diffex.data import ImageStore
from diffex.directions import DirectionSet, Responses, Subspace, measure_responses
from diffex.errors import UserError
from diffex.explain import Edit, Explainer, Measure, choose_rows, effects_table, plan_edits, traversal
from diffex.model import Code, DiffusionAutoencoder
from diffex.networks import ResidualClassifier
from diffex.prepare import build_store
from diffex.scoreboard import Tables, score
from diffex.team import Team
from diffex.work import EFFECTS_SO_FAR, Work, balanced, over_images, sharded, write_history

SHARD = 16  # images whose effects are rendered, and saved, together
ENCODED = 8192  # images whose latents are computed, and saved, together

# ----------------------------------------------------------------------------------------------------------------------
# Images, and the classifier


def run_data(w: Work) -> dict[str, Any]:
    info = build_store(w.experiment.data, w.experiment.assay, w.out, w.progress)
    store = ImageStore(w.out, origin=w.experiment.data.path)
    counts = {
        part: np.bincount(store.labels[store.rows(part)], minlength=len(info.class_names)).tolist()
        for part in ("train", "valid", "test")
    }
    return {"images": info.count, "channels": list(info.channels), "class_names": list(info.class_names),
            "split_by": list(info.split_by), "counts": counts}  # fmt: skip


def classifier_task(w: Work, team: Team) -> train.SupervisedTask:
    store, e = w.images(), w.experiment
    torch.manual_seed(train.hash_seed(e.run.seed, 1))
    network = ResidualClassifier(len(store.info.channels), len(store.info.class_names), width=e.classifier.width)
    return train.SupervisedTask(
        "classifier", network, store, train.classification_loss(torch.tensor(store.labels)), e.classifier,
        images=e.classifier.images, compute=w.compute, seed=e.run.seed, team=team, accumulate=e.run.accumulate,
    )  # fmt: skip


def run_classifier(w: Work) -> dict[str, Any]:
    store, e = w.images(), w.experiment
    info = store.info
    if not is_given(e.classifier):
        task, history = w.fit(classifier_task)
        write_history(w.out, history)
        save_file({k: v.contiguous().cpu() for k, v in task.network.state_dict().items()}, w.out / "model.safetensors")
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


# ----------------------------------------------------------------------------------------------------------------------
# Stage 1: the autoencoder


def _autoencoder_task(w: Work, team: Team, lambda1: float) -> train.AutoencoderTask:
    store = w.images()
    torch.manual_seed(train.hash_seed(w.experiment.run.seed, 4))
    return train.AutoencoderTask(
        w.new_autoencoder(store), w.new_autoencoder(store), store, w.probabilities(), w.classifier(store),
        lambda1=lambda1, seed=w.experiment.run.seed, team=team, accumulate=w.experiment.run.accumulate,
    )  # fmt: skip


def warmup_task(w: Work, team: Team) -> train.AutoencoderTask:
    return _autoencoder_task(w, team, 0.0)


def autoencoder_task(w: Work, team: Team) -> train.AutoencoderTask:
    return _autoencoder_task(w, team, w.experiment.autoencoder.lambda1)


def run_warmup(w: Work) -> dict[str, Any]:
    task, history = w.fit(warmup_task, until=w.experiment.autoencoder.warmup_images)
    return {"images": task.warmup_images, "unet_evaluations": task.warmup_images,
            "parameters": sum(p.numel() for p in task.model.parameters()),
            "simple": history[-1]["simple"] if history else None}  # fmt: skip


def run_autoencoder(w: Work) -> dict[str, Any]:
    e = w.experiment.autoencoder
    task, history = w.fit(autoencoder_task, base="warmup")  # branch off the shared warm-up
    write_history(w.out, history)
    task.average.save(w.out)
    (w.out / train.CHECKPOINT).unlink()
    branch = task.images - task.warmup_images
    per_image = 1 + (e.truncated_steps if e.classifier_term == "truncated" and e.lambda1 > 0 else 0)
    return {"images": branch, "unet_evaluations": branch * per_image, "losses": history[-1]}


@dataclass
class _Encoder:
    store: ImageStore
    model: DiffusionAutoencoder
    probs: torch.Tensor
    device: torch.device

    @classmethod
    def of(cls, w: Work) -> _Encoder:
        return cls(w.images(), w.autoencoder(), w.probabilities().to(w.compute.device), w.compute.device)


@torch.no_grad()
def _encode(encoder: _Encoder, shard: NDArray[np.int64]) -> pa.Table:
    z = torch.cat([
        encoder.model.semantic(encoder.store.batch(rows, encoder.device).x, encoder.probs[rows]).cpu()
        for rows in np.array_split(shard, max(1, len(shard) // 256))
    ])  # fmt: skip
    return pa.table({"z": _lists(z)})


def _lists(x: torch.Tensor) -> pa.FixedSizeListArray:
    flat = x.flatten(1).cpu().numpy()
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])


def _tensor(column: pa.ChunkedArray) -> torch.Tensor:
    column = column.combine_chunks()
    return torch.from_numpy(column.flatten().to_numpy().reshape(len(column), -1).copy())


def run_latents(w: Work) -> dict[str, Any]:
    store = w.images()
    shards = [np.arange(start, min(start + ENCODED, len(store))) for start in range(0, len(store), ENCODED)]
    files = sharded(w, _Encoder.of, _encode, shards, what="latents")
    z = torch.cat([_tensor(pq.read_table(file)["z"]) for file in files])
    save_file({"z": z}, w.out / "latents.safetensors")
    for file in files:
        file.unlink()
    variance = torch.linalg.eigvalsh(torch.cov(z[store.rows("train")].T.double())).flip(0).clamp_min(0)
    share = variance / variance.sum()
    rank = float(torch.exp(-(share[share > 0] * share[share > 0].log()).sum()))
    return {"effective_rank": rank, "explained": [round(float(v), 5) for v in share.cumsum(0)[:32]]}


# ----------------------------------------------------------------------------------------------------------------------
# Stage 2: the directions


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


def directions_task(w: Work, team: Team) -> train.DirectionsTask:
    store, e = w.images(), w.experiment
    z = w.codes()
    subspace = Subspace.of(z[store.rows("train")], e.directions.space, e.directions.explained_variance)
    rows, responses = training_responses(w, store)
    coordinates = subspace.coordinates(z[rows]).to(w.compute.device)
    return train.DirectionsTask(e.directions, coordinates, responses, seed=e.run.seed, team=team)


def run_directions(w: Work) -> dict[str, Any]:
    store, s, z = w.images(), w.experiment.directions, w.codes()
    subspace = Subspace.of(z[store.rows("train")], s.space, s.explained_variance)
    task, history = w.fit(directions_task)
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


# ----------------------------------------------------------------------------------------------------------------------
# Stage 3: effects, ranking, pictures


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


def run_codes(w: Work) -> dict[str, Any]:
    """Choose the images to explain, and encode them: z and x_T, which all edits of them start from."""
    store, e = w.images(), w.experiment
    names = store.info.class_names
    pairs = class_pairs(e, names)
    predicted, groups = w.probabilities().argmax(dim=1).numpy(), store.groups()
    chosen = {}
    for s in dict.fromkeys(s for s, _ in pairs):
        rows = choose_rows(store.labels, predicted, groups, store.rows("test"), s, e.ranking.num_images, e.run.seed)
        if len(rows) < 2:
            raise UserError(
                f"only {len(rows)} test images of class {names[s]!r} are classified rightly. "
                "Look at the classifier's report; give it more training, or more images"
            )
        chosen[s] = rows
    shards = [(s, rows[i : i + SHARD]) for s, rows in chosen.items() for i in range(0, len(rows), SHARD)]
    # Class by class in turn, so that a scheduler's first look sees every class.
    shards.sort(key=lambda item: np.flatnonzero(chosen[item[0]] == item[1][0])[0])
    files = sharded(w, _Encoder.of, _encode_both, shards, what="codes")
    _join(files, w.out / "codes.parquet")
    model, images = w.autoencoder(), sum(map(len, chosen.values()))
    return {
        "images": images, "pairs": [[names[s], names[t]] for s, t in pairs],
        "shown": {names[s]: rows[:4].tolist() for s, rows in chosen.items()},
        "unet_evaluations": images * model.encode_evaluations, "render_evaluations": model.render_evaluations,
    }  # fmt: skip


def _encode_both(encoder: _Encoder, shard: tuple[int, NDArray[np.int64]]) -> pa.Table:
    source, rows = shard
    code = encoder.model.encode(encoder.store.batch(rows, encoder.device).x, encoder.probs[rows])
    return pa.table({"source": np.full(len(rows), source), "row": rows, "z": _lists(code.z), "x_T": _lists(code.x_T)})


@dataclass
class Renderer:
    """All that rendering effects takes, loaded once in each process that takes part."""

    work: Work
    store: ImageStore
    model: DiffusionAutoencoder
    classifier: FrozenClassifier
    judges: dict[str, FrozenClassifier]
    measure: Measure | None
    codes: pa.Table
    sets: dict[str, DirectionSet]
    edits: list[Edit]
    length: dict[int, float]

    @classmethod
    def of(cls, w: Work, sets: dict[str, DirectionSet], edits: list[Edit], length: dict[int, float]) -> Renderer:
        store = w.images()
        for group in sets.values():
            group.to(w.compute.device)
        channels = len(store.info.channels)
        return cls(
            w, store, w.autoencoder(), w.classifier(store), {name: w.judge(name, store) for name in JUDGES},
            load_measure(w.inputs["ruler"], channels, w.compute.device) if "ruler" in w.inputs else None,
            pq.read_table(w.inputs["codes"] / "codes.parquet"), sets, edits, length,
        )  # fmt: skip

    def table(self, shard: tuple[int, int]) -> pa.Table:
        """Effects on a slice of the chosen images, all of one class, with what is known of each image."""
        part = self.codes.slice(*shard)
        source, rows, device = part["source"][0].as_py(), part["row"].to_numpy().copy(), self.work.compute.device
        batch = self.store.batch(rows, device)
        probs = self.classifier.probabilities(batch.x)
        x_T = _tensor(part["x_T"]).view(batch.x.shape)
        table = effects_table(
            self.model, self.classifier, self.sets, self.edits, batch.x, batch.rows, reference=self.length[source],
            measure=self.measure, judges=self.judges, distances=self.work.distances(self.judges["witness"]),
            cells=self.work.masks(batch.x, self.store.info.channels),
            code=Code(_tensor(part["z"]).to(device), probs, x_T.to(device)),
        )  # fmt: skip
        table = table.append_column("class_name", pa.array([self.store.info.class_names[source]] * len(table)))
        of_image = table["row"].to_numpy()
        table = table.append_column("group", pa.array(self.store.groups()[of_image]))
        for name in self.store.metadata():
            table = table.append_column(name, self.store.table[name].take(pa.array(of_image)))
        return table


JUDGES = ("witness", "robust")


def _render(renderer: Renderer, shard: tuple[int, int]) -> pa.Table:
    return renderer.table(shard)


def _slices(codes: Path) -> list[tuple[int, int]]:
    """(start, length) of runs of up to SHARD images of one class."""
    sources = pq.read_table(codes / "codes.parquet", columns=["source"])["source"].to_numpy()
    found, start = [], 0
    while start < len(sources):
        same = int(np.argmax(np.append(sources[start:] != sources[start], True)))
        found.append((start, min(same, SHARD)))
        start += min(same, SHARD)
    return found


def _reference_lengths(means: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> dict[int, float]:
    """Reference length of each source class: the shortest of its class-mean differences."""
    return {s: min(float((means[t] - means[s]).norm()) for a, t in pairs if a == s) for s, _ in pairs}


def _reference_edits(w: Work) -> tuple[dict[str, DirectionSet], list[Edit], dict[int, float]]:
    """Random directions and baselines, the edits along them, and the reference length of each source class."""
    store, e, z = w.images(), w.experiment, w.codes()
    training = store.rows("train")
    subspace = Subspace.of(z[training], e.directions.space, e.directions.explained_variance)
    v, labels = subspace.coordinates(z[training]), torch.from_numpy(store.labels[training])
    pairs = class_pairs(e, store.info.class_names)
    means = baselines.class_means(v, labels, len(store.info.class_names))
    makers = {
        "class_mean": lambda: baselines.class_mean_difference(v, labels, pairs, subspace),
        "linear": lambda: baselines.linear_classifier(v, labels, pairs, subspace),
        "principal": lambda: baselines.principal(subspace, e.directions.num_directions),
    }
    sets = {"random": baselines.random(subspace, e.evaluation.random_directions, e.run.seed)}
    sets |= {name: makers[name]() for name in e.evaluation.baselines}
    edits = plan_edits(0, (), len(sets["random"]), {n: len(sets[n]) for n in e.evaluation.baselines})
    return sets, edits, _reference_lengths(means, pairs)


def _reference_renderer(w: Work) -> Renderer:
    return Renderer.of(w, *_reference_edits(w))


def run_references(w: Work) -> dict[str, Any]:
    """Effects of random directions (the null) and of the baselines: the same for all direction sets of a latent."""
    _, edits, length = _reference_edits(w)
    files = sharded(w, _reference_renderer, _render, _slices(w.inputs["codes"]), what="references")
    _join(files, w.out / "references.parquet")
    names, codes = w.images().info.class_names, w.facts("codes")
    return {
        "edits": len(edits), "reference_length": {names[s]: value for s, value in length.items()},
        "unet_evaluations": codes["images"] * (1 + len(edits)) * codes["render_evaluations"],
    }  # fmt: skip


def _learned_renderer(w: Work) -> Renderer:
    learned = DirectionSet.load(w.inputs["directions"])
    names = w.images().info.class_names
    length = {names.index(name): value for name, value in w.facts("references")["reference_length"].items()}
    edits = plan_edits(len(learned), w.experiment.ranking.alphas, 0, {})
    return Renderer.of(w, {"learned": learned}, edits, length)


def run_effects(w: Work) -> dict[str, Any]:
    """The effects table: what the learned directions do to every chosen image, beside random ones and baselines."""
    references = pq.read_table(w.inputs["references"] / "references.parquet")
    so_far: list[pa.Table] = []

    def tell(file: Path) -> None:
        table = pq.read_table(file)
        seen = np.isin(references["row"].to_numpy(), np.unique(table["row"].to_numpy()))
        so_far.extend([table, references.filter(pa.array(seen))])
        w.observe(EFFECTS_SO_FAR, {"table": pa.concat_tables(so_far)})

    files = sharded(w, _learned_renderer, _render, _slices(w.inputs["codes"]), what="effects", done=tell)
    _join(files, w.out / "effects.parquet", references)
    codes, of_references = w.facts("codes"), w.facts("references")
    learned = len(plan_edits(len(DirectionSet.load(w.inputs["directions"])), w.experiment.ranking.alphas, 0, {}))
    return {
        **{name: codes[name] for name in ("images", "pairs", "shown")},
        "edits": learned + of_references["edits"], "reference_length": of_references["reference_length"],
        "unet_evaluations": codes["images"] * (1 + learned) * codes["render_evaluations"],
    }  # fmt: skip


def _join(files: Sequence[Path], out: Path, more: pa.Table | None = None) -> None:
    tables = [pq.read_table(file) for file in files]
    pq.write_table(pa.concat_tables([*tables, *([more] if more is not None else [])]), out)
    for file in files:
        file.unlink()


def run_scoreboard(w: Work) -> dict[str, Any]:
    """Rank the directions and write the scoreboard's row: nothing is rendered here."""
    facts = {name: w.facts(name) for name in w.inputs}
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
    shown = w.facts("effects")["shown"]
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
