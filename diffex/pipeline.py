"""The stage graph, and the one way to compute anything: ``ensure(store, experiment, stage)``.

    data -> classifier -> warmup -> autoencoder -> latents -> responses -> directions -> effects -> evidence
                                       |                        `-> references -^  `-> replicas       `-> truth (assay)
                                       |-> codes, reconstruction
    data -> ruler (assay), witness, robust, real_cells: the instruments;   all of it -> scoreboard -> pictures

A stage's digest is made of its own settings, the digests of the stages it needs, and the code that it runs; so two
trials that agree on a prefix share it.  lambda_1 enters only after the warm-up; lambda_2, lambda_3, K and tau only need
the latents; ranking settings only the table.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from diffex import assay, evidence, instruments, stages, work
from diffex.classifier import is_given
from diffex.compute import Compute
from diffex.config import Experiment, from_dict
from diffex.data import Progress
from diffex.directions import DirectionSet, needs_responses
from diffex.errors import UserError, did_you_mean
from diffex.explain import Explainer
from diffex.records import sha256
from diffex.settings import digest, to_dict
from diffex.store import Entry, Store
from diffex.version import __version__


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A node of the graph.

    Attributes:
        run: computes the stage, writes its files, returns facts (JSON) for the record and for the scoreboard.
        needs: names of the stages it reads, where the experiment has them (see ``absent``).
        uses: the part of the settings that decides its output.
        code: modules whose code decides its output.
    """

    run: Callable[[work.Work], dict[str, Any]]
    needs: tuple[str, ...] = ()
    uses: Callable[[Experiment], Any]
    code: tuple[str, ...]


def absent(e: Experiment) -> set[str]:
    """Stages that an experiment has no use for: the truth of real images, responses that no loss looks at."""
    simulated = e.data.path is None
    wanted = {"ruler": simulated, "truth": simulated, "responses": needs_responses(e.directions)}
    return {name for name, there in wanted.items() if not there}


def _pick(section: Any, *names: str) -> dict[str, Any]:
    values = to_dict(section)
    return {name: values[name] for name in names}


def _leave(section: Any, *names: str) -> dict[str, Any]:
    return {name: value for name, value in to_dict(section).items() if name not in names}


def _seeded(e: Experiment, *settings: Any) -> dict[str, Any]:
    return {"settings": settings, "seed": e.run.seed, "precision": e.run.precision}


def _uses_data(e: Experiment) -> Any:
    if e.data.path is None:
        channels = e.data.channels or assay.DEFAULT_CHANNELS  # asking for the default by name is the same data
        return [to_dict(e.data) | {"channels": channels}, to_dict(e.assay)]
    return [_leave(e.data, "path"), fingerprint(Path(e.data.path))]


def _uses_classifier(e: Experiment) -> Any:
    if is_given(e.classifier):
        files = [Path(p) for p in (e.classifier.path, e.classifier.weights) if p]
        return [to_dict(e.classifier), [fingerprint(p) for p in [*files, *factory_source(e.classifier.factory)]]]
    return _seeded(e, to_dict(e.classifier), e.run.accumulate)


_TRAINING = ("batch_size", "learning_rate", "weight_decay", "noise")


def _uses_instrument(*names: str) -> Callable[[Experiment], Any]:
    return lambda e: _seeded(e, _pick(e.evaluation, *names), _pick(e.classifier, *_TRAINING))


def _uses_warmup(e: Experiment) -> Any:
    """Everything but what enters after it: this is why trials of different lambda1 share one warm-up."""
    return _seeded(e, _leave(e.autoencoder, "lambda1", "classifier_term", "truncated_steps"), e.run.accumulate)


def _uses_autoencoder(e: Experiment) -> Any:
    renders = e.autoencoder.classifier_term == "truncated" and e.autoencoder.lambda1 > 0
    return _seeded(e, to_dict(e.autoencoder), to_dict(e.rendering) if renders else None)


def _uses_references(e: Experiment) -> Any:
    subspace = _pick(e.directions, "space", "explained_variance")
    number = e.directions.num_directions if "principal" in e.evaluation.baselines else None
    measured = _pick(e.evaluation, "random_directions", "baselines", *_CHANNELS)
    return _seeded(e, subspace, number, measured, _lpips(e))


def _lpips(e: Experiment) -> str | None:
    """The package's name, or what the weights file holds: so a path that leads nowhere is told before any training."""
    name = e.evaluation.lpips
    if name is None or name == "lpips":
        return name
    if not Path(name).is_file():
        raise UserError(f"there is no weights file {name!r} (evaluation.lpips)")
    return fingerprint(Path(name))


def _uses_evidence(e: Experiment) -> Any:
    followed = _pick(e.evaluation, "audited", "followed_images", "steps", "num_images", "cell_features", *_CHANNELS)
    ranked = _pick(e.ranking, "num_images", *(("order", "top", "explained_at") if e.ranking.order == "greedy" else ()))
    return _seeded(e, followed, ranked, to_dict(e.rendering))


def _uses_scoreboard(e: Experiment) -> Any:
    return _seeded(e, to_dict(e.ranking), to_dict(e.assay), e.evaluation.baselines)


_CHANNELS = ("nucleus_channel", "cell_channel")


_NETWORK = ("networks", "diffusion", "model")

_RENDERING = (*_NETWORK, "directions", "explain", "metrics", "perceptual", "cells")

_MEASURING = ("cells", "features", "cellprofiler")

_READING = ("paths", "tables", "sources", "arrays", "ome", "listings", "patterns", "layouts")

GRAPH: dict[str, Stage] = {
    "data": Stage(
        run=stages.run_data, uses=_uses_data,
        code=("assay", "readers", *_READING, "splits", "data", "prepare"),
    ),
    "classifier": Stage(
        run=stages.run_classifier, needs=("data",), code=("networks", "classifier", "train", "metrics"),
        uses=_uses_classifier,
    ),
    "ruler": Stage(
        run=instruments.run_ruler, needs=("data",), code=("assay", "networks", "train"),
        uses=_uses_instrument("ruler_images"),
    ),
    "witness": Stage(
        run=instruments.run_witness, needs=("data",), code=("networks", "classifier", "train", "statistics"),
        uses=_uses_instrument("witness_images", "witness_width"),
    ),
    "robust": Stage(
        run=instruments.run_robust, needs=("data", "classifier", "witness"),
        code=("networks", "classifier", "train", "robustness", "statistics"),
        uses=_uses_instrument("robust_images", "epsilon"),
    ),
    "real_cells": Stage(
        run=instruments.run_real_cells, needs=("data",), code=(*_MEASURING, "explain"),
        uses=lambda e: _seeded(e, _pick(e.evaluation, "real_images", "cell_features", *_CHANNELS)),
    ),
    "warmup": Stage(run=stages.run_warmup, needs=("data", "classifier"), code=(*_NETWORK, "train"), uses=_uses_warmup),
    "autoencoder": Stage(
        run=stages.run_autoencoder, needs=("data", "classifier", "warmup"), code=(*_NETWORK, "train"),
        uses=_uses_autoencoder,
    ),
    "reconstruction": Stage(
        run=evidence.run_reconstruction, needs=("data", "classifier", "witness", "autoencoder"),
        code=(*_NETWORK, "classifier", "metrics", "perceptual", "realism", "statistics"),
        uses=lambda e: _seeded(e, e.evaluation.num_images, _lpips(e), to_dict(e.rendering)),
    ),
    "latents": Stage(
        run=stages.run_latents, needs=("data", "classifier", "autoencoder"), code=("networks", "model"), uses=_seeded,
    ),
    "responses": Stage(
        run=stages.run_responses, needs=("data", "classifier", "autoencoder", "latents"),
        code=(*_NETWORK, "directions"),
        uses=lambda e: _seeded(e, _pick(e.directions, "space", "explained_variance", "alpha", "response_images")),
    ),
    "directions": Stage(
        run=stages.run_directions, needs=("data", "latents", "responses"), code=("directions", "train"),
        uses=lambda e: _seeded(e, to_dict(e.directions)),
    ),
    "replicas": Stage(
        run=evidence.run_replicas, needs=("data", "latents", "responses", "directions"), code=("directions", "train"),
        uses=lambda e: _seeded(e, to_dict(e.directions), e.evaluation.replicas),
    ),
    "codes": Stage(
        run=stages.run_codes, needs=("data", "classifier", "autoencoder"), code=(*_NETWORK, "explain"),
        uses=lambda e: _seeded(e, _pick(e.ranking, "source", "target", "num_images"), to_dict(e.rendering)),
    ),
    "references": Stage(
        run=stages.run_references, uses=_uses_references,
        needs=("data", "classifier", "witness", "robust", "autoencoder", "latents", "codes", "ruler"),
        code=(*_RENDERING, "baselines"),
    ),
    "effects": Stage(
        run=stages.run_effects, uses=lambda e: _seeded(e, e.ranking.alphas),
        needs=(
            "data", "classifier", "witness", "robust", "autoencoder", "directions", "codes", "references", "ruler",
        ),
        code=_RENDERING,
    ),
    "evidence": Stage(
        run=evidence.run_evidence, uses=_uses_evidence,
        needs=("data", "classifier", "witness", "robust", "autoencoder", "directions", "effects"),
        code=(
            *_NETWORK, "directions", "explain", "ranking", "trajectories", *_MEASURING, "instruments", "perceptual",
            "realism", "statistics",
        ),
    ),
    "truth": Stage(
        run=evidence.run_truth, needs=("data", "latents", "directions", "real_cells", "evidence"), uses=_seeded,
        code=("assay", "directions", "disentanglement", "instruments"),
    ),
    "scoreboard": Stage(
        run=stages.run_scoreboard, uses=_uses_scoreboard,
        code=(
            "assay", "ranking", "scoreboard", "audit", "signatures", "phenotypes", "metrics", "measures", "statistics",
            "disentanglement", "stability", "trajectories",
        ),
        needs=(
            "data", "classifier", "ruler", "witness", "robust", "real_cells", "warmup", "autoencoder", "reconstruction",
            "latents", "responses", "directions", "replicas", "codes", "references", "effects", "evidence", "truth",
        ),
    ),
    "pictures": Stage(
        run=stages.run_pictures, needs=("scoreboard", "data", "classifier", "autoencoder", "directions", "effects"),
        code=(*_NETWORK, "directions", "explain"), uses=lambda e: _seeded(e, e.ranking.top),
    ),
}  # fmt: skip


STAGE_1 = ("warmup", "autoencoder")
INSTRUMENTS = ("ruler", "witness", "robust", "real_cells")
"""What all trials on the same images share for their evaluation."""
EVALUATION = (*INSTRUMENTS, "reconstruction", "replicas", "evidence", "truth", "scoreboard")


@cache
def code_digest(module: str, function: str, modules: tuple[str, ...]) -> str:
    """Digest of a stage's function, of the helpers beside it and of the modules that it runs.

    Syntax trees without docstrings are compared, so comments and formatting don't count.
    """
    folder = Path(__file__).parent
    trees = []
    for name in dict.fromkeys(("work", "stages", module, *modules)):
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        if name in ("stages", "instruments", "evidence"):
            other = [n for n in tree.body if _is_stage(n) and (name, getattr(n, "name", "")) != (module, function)]
            tree.body = [n for n in tree.body if n not in other]
        trees.append(tree)
    return digest([ast.dump(_without_docstrings(tree)) for tree in trees])


def _is_stage(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name.startswith("run_")


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    return tree


def fingerprint(path: Path) -> str:
    """What a user's file or folder holds, cheaply: a small file's SHA-256, else names, sizes and times."""
    if not path.exists():
        raise UserError(f"there is no file or folder {str(path)!r}")
    if path.is_file() and path.stat().st_size <= 256 * 2**20:
        return _content(path.absolute(), path.stat().st_size, path.stat().st_mtime_ns)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return digest([[str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns] for p in files])


@cache
def _content(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, read once for as long as it stays as it is: a sweep asks for it over and over."""
    return sha256(path)


def factory_source(factory: str | None) -> list[Path]:
    """The file that defines a ``package.module:callable``, where it can be found: its code decides the verdicts."""
    try:
        spec = importlib.util.find_spec(factory.partition(":")[0]) if factory else None
    except (ImportError, ValueError):
        return []  # load_classifier complains
    return [Path(spec.origin)] if spec and spec.origin and Path(spec.origin).is_file() else []


def stage_digests(e: Experiment, last: str = "pictures") -> dict[str, str]:
    """Digest of every stage that ``last`` rests on, itself included, in an order in which they can be computed."""
    found: dict[str, str] = {}
    skip = absent(e)

    def visit(name: str) -> str:
        if name not in found:
            stage = GRAPH[name]
            needs = {n: visit(n) for n in stage.needs if n not in skip}
            code = code_digest(stage.run.__module__.rpartition(".")[2], stage.run.__name__, stage.code)
            found[name] = digest([name, code, __version__, stage.uses(e), needs])
        return found[name]

    visit(last)
    return found


@dataclass(frozen=True)
class Outcome:
    """The entries that a call of ``ensure`` has made sure of, by stage."""

    entries: dict[str, Entry]

    def __getitem__(self, stage: str) -> Entry:
        return self.entries[stage]

    @property
    def paid(self) -> list[str]:
        """Stages computed by this call."""
        return [name for name, entry in self.entries.items() if entry.computed]

    @property
    def reused(self) -> list[str]:
        """Stages that were there."""
        return [name for name, entry in self.entries.items() if not entry.computed]

    def seconds(self, stages: Iterable[str] | None = None, *, computed: bool | None = None) -> float:
        """Seconds that all stages, or those named, took; or only those computed (reused) here."""
        names = self.entries.keys() if stages is None else self.entries.keys() & set(stages)
        chosen = [self.entries[name] for name in names]
        return sum(e.seconds for e in chosen if computed is None or e.computed == computed)


def silent(what: str, done: int, total: int) -> None:
    """A meter that shows nothing."""


def nobody(stage: str, facts: Mapping[str, Any]) -> None:
    """An observer that does nothing."""


def ensure(
    store: Store, e: Experiment, last: str = "pictures", *, progress: Progress = silent,
    observe: work.Observe = nobody, crew: work.Crew | None = None,
) -> Outcome:  # fmt: skip
    """Compute a stage and all it rests on, reusing what the store holds.

    Args:
        store: where results lie.
        e: the experiment.
        last: name of the stage.
        progress: told of every stage's progress.
        observe: told of each stage's facts, of effects so far, and of training curves.
        crew: who trains and renders; None: this process alone.

    Raises:
        UserError: whatever the user must mend.  Nothing half-made is left: a later call resumes.
    """
    digests = stage_digests(e, last)
    compute = Compute.resolve(e.run)
    entries: dict[str, Entry] = {}
    for name, address in digests.items():
        needs = tuple(n for n in GRAPH[name].needs if n not in absent(e))

        def run(out: Path, name: str = name, address: str = address, needs: Any = needs) -> dict[str, Any]:
            order = work.order_of(e, store, name, address, {n: digests[n] for n in needs})
            w = work.Work(
                experiment=e, inputs={n: entries[n].path for n in needs}, out=out, compute=compute, progress=progress,
                observe=observe, crew=crew or work.Alone(), order=order,
                saved=lambda: store.save_partial(name, address),
            )  # fmt: skip
            return GRAPH[name].run(w)

        entries[name] = store.compute(
            name,
            address,
            run,
            about={"needs": {n: digests[n] for n in needs}},
            waiting=lambda name=name: progress(f"waiting for {name}", 0, 1),  # type: ignore[misc]
        )
        observe(name, entries[name].facts)
        if name == "data":
            stages.class_pairs(e, tuple(entries[name].facts["class_names"]))  # complains before anything is trained
    return Outcome(entries)


def entry_at(place: str) -> Entry:
    """The finished entry at ``<store>/<stage>/<digest>``, as ``stages.json`` of a trial notes it.

    Raises:
        UserError: it is gone, or damaged.
    """
    root, stage, address = place.rsplit("/", 2)
    store = Store.existing(root)
    entry = store.get(stage, address) if store else None
    if entry is None:
        raise UserError(f"stage {stage} of this explanation is gone from the store ({place}); run the command again")
    return entry


def load_explainer(folder: str | Path, *, trial: str | None = None, device: str = "auto") -> Explainer:
    """Load the explanation that ``diffex run`` or a sweep left in its output folder.

    Args:
        folder: the output folder.
        trial: name of the trial (default: the one with the highest score).
        device: where to put it.

    Raises:
        UserError: no finished trial there, or its stages are gone from the store.
    """
    trials = {
        file.parent.name: json.loads(file.read_text(encoding="utf-8"))
        for file in Path(folder).glob("trials/*/row.json")
    }
    finished = {name: row for name, row in trials.items() if row["status"] == "finished"}
    if not finished:
        raise UserError(f"{str(folder)!r} holds no finished trial")
    if trial is not None and trial not in finished:
        raise UserError(f"{str(folder)!r} has no finished trial {trial!r}: {did_you_mean(trial, finished)}")
    chosen = Path(folder) / "trials" / (trial or max(finished, key=lambda name: float(finished[name]["score"])))
    e = from_dict(json.loads((chosen / "experiment.json").read_text(encoding="utf-8")))
    e = e.with_settings({"run.device": device})
    kept = json.loads((chosen / "stages.json").read_text(encoding="utf-8"))
    places = {name: entry_at(kept[name]).path for name in ("data", "classifier", "autoencoder", "directions")}
    w = work.Work(experiment=e, inputs=places, out=chosen, compute=Compute.resolve(e.run))
    directions = DirectionSet.load(places["directions"], w.compute.device)
    return Explainer(w.autoencoder(), directions, w.classifier(w.images()))
