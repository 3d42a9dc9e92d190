"""Sweeps: Ray Tune with Optuna over dotted settings, resumable by running the same command again.

What a sweep has finished stands in its output folder (one ``row.json`` a trial) and in its Optuna study, which is named
after the sweep's digest; what a trial had begun stands in the store.  A second run of the same command therefore
repeats nothing: it tells the study what ended, puts interrupted settings first in the queue, and runs the rest.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search.optuna import OptunaSearch

from diffex import tracking
from diffex.cluster import Resources, compute_all, connected, use_threads
from diffex.config import Experiment, from_dict
from diffex.errors import UserError
from diffex.measures import OBJECTIVES, overall_score
from diffex.pipeline import EVALUATION, STAGE_1, Outcome, ensure, nobody, stage_digests
from diffex.progress import Board, FileMeter
from diffex.scoreboard import partial_scores
from diffex.settings import digest, flat, to_dict
from diffex.stages import EFFECTS_SO_FAR, Observe
from diffex.store import Store

SHARED = ("warmup", "robust", "real_cells", "ruler")
"""What trials with equal data have in common (and all that it rests on), computed before they start."""


@dataclass(frozen=True)
class Levels:
    """A setting that takes one of a few values; trials at equal levels share the stages that these decide."""

    values: tuple[Any, ...]

    def including(self, value: Any) -> Levels:
        """The same levels and, where it is not among them, ``value``: so that a sweep can try its recipe as it is."""
        return self if value in self.values else Levels((value, *self.values))

    def distribution(self) -> optuna.distributions.BaseDistribution:
        return optuna.distributions.CategoricalDistribution(self.values)


@dataclass(frozen=True)
class Range:
    """A number between ``low`` and ``high``, both included; whole where both are ints."""

    low: float
    high: float
    log: bool = False

    def distribution(self) -> optuna.distributions.BaseDistribution:
        if isinstance(self.low, int) and isinstance(self.high, int):
            return optuna.distributions.IntDistribution(self.low, self.high, log=self.log)
        return optuna.distributions.FloatDistribution(self.low, self.high, log=self.log)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is asked: a base experiment and the settings that vary.

    Attributes:
        name: also the name of the MLflow experiment.
        base: settings that all trials share.
        space: dotted setting -> levels or range.
        first: settings to try before the sampler takes over (those not named keep the base's value).
        objective: 'pareto' (flip rate, disentanglement and SSIM, all to be raised) or 'score' (their geometric mean;
            trials that look bad on their first images are stopped by ASHA).
    """

    name: str
    base: Experiment
    space: Mapping[str, Levels | Range]
    first: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    objective: str = "pareto"

    def __post_init__(self) -> None:
        for name, choice in self.space.items():
            ends = choice.values if isinstance(choice, Levels) else (choice.low, choice.high)
            for value in ends:
                self.base.with_settings({name: value})  # complains before anything is started
        if self.objective not in ("pareto", "score"):
            raise UserError(f"--objective {self.objective!r} is not one of pareto, score")

    @property
    def digest(self) -> str:
        """Names the sweep: settings, space, data and code, but not the number of trials, which can be raised later."""
        space = {name: [type(c).__name__, list(vars(c).values())] for name, c in self.space.items()}
        asked = [self.name, digest(self.base), space, self.objective, [dict(f) for f in self.first]]
        return digest([*asked, stage_digests(self.base)["pictures"]])

    @property
    def metrics(self) -> tuple[str, ...]:
        return OBJECTIVES if self.objective == "pareto" else ("score",)

    def shared(self) -> list[Experiment]:
        """The experiments, one for each choice of those settings that decide the shared stages."""
        grids: list[dict[str, Any]] = [{}]
        for name, choice in self.space.items():
            if isinstance(choice, Levels) and self._decides_shared(name, choice):
                grids = [{**g, name: value} for g in grids for value in choice.values]
        return [self.base.with_settings(g) for g in grids]

    def _decides_shared(self, name: str, choice: Levels) -> bool:
        variants = [self.base.with_settings({name: value}) for value in choice.values]
        return len({stage_digests(e, "warmup")["warmup"] for e in variants}) > 1


@dataclass(frozen=True)
class SweepResult:
    """Rows of all finished trials: settings of the space, scoreboard, ``trial``, ``status``, ``paid``, ``reused``."""

    rows: list[dict[str, Any]]
    failed: list[str]
    seconds: float


def run_sweep(
    sweep: Sweep, *, output: Path, store: Path, trials: int, target: tracking.Target | None,
    say: Callable[[str], None] = print,
) -> SweepResult:  # fmt: skip
    """Run, or go on with, a sweep until ``trials`` have ended.

    Args:
        sweep: what is asked.
        output: its folder.
        store: root of the stage store, visible to every node.
        trials: how many trials in all; raise it later to go on.
        target: MLflow run to log under, or None.
        say: prints a line for people.
    """
    began = time.monotonic()
    study, storage = _open_study(sweep, output)
    finished = [t for t in study.trials if t.state.is_finished() and t.state != optuna.trial.TrialState.FAIL]
    remaining = max(0, trials - len(finished))
    if finished:
        say(f"{len(finished)} of {trials} trials were finished before; {remaining} to go")
    failed: list[str] = []
    if remaining:
        with connected() as resources:
            _compute_shared(sweep, output, store, resources, say)
            failed = _run_trials(
                sweep, output, store, target, resources, study, storage, remaining, len(finished), trials
            )
    return SweepResult(load_rows(output), failed, time.monotonic() - began)


def _compute_shared(sweep: Sweep, output: Path, store: Path, resources: Resources, say: Callable[[str], None]) -> None:
    jobs = [(e, last) for e in sweep.shared() for last in SHARED if last != "ruler" or e.data.path is None]
    missing = {
        stage_digests(e, last)[last] for e, last in jobs if not Store(store).has(last, stage_digests(e, last)[last])
    }
    if not missing:
        return
    say(f"computing what trials share: {len(missing)} stages ({', '.join(SHARED)} of each data setting), once")
    with Board(output / "progress", len(missing), unit="shared stages") as board:
        compute_all(
            jobs, store, resources=resources, gpus=_gpus(resources), meters=output / "progress",
            done=lambda name: board.finished(),
        )  # fmt: skip


def _gpus(resources: Resources) -> float:
    return 1.0 if resources.gpus else 0.0


def _run_trials(
    sweep: Sweep, output: Path, store: Path, target: tracking.Target | None, resources: Resources,
    study: optuna.Study, storage: optuna.storages.BaseStorage, remaining: int, finished: int, trials: int,
) -> list[str]:  # fmt: skip
    gpus = _gpus(resources)
    slots = max(1, resources.gpus if gpus else resources.cpus)
    cpus = max(1, resources.cpus // slots)
    # The sampler's random numbers depend on how many trials there are, so a resumed sweep does not repeat proposals.
    sampler = optuna.samplers.TPESampler(
        seed=int(digest([sweep.base.run.seed, len(study.trials)]), 16) % 2**31, n_startup_trials=max(4, trials // 4)
    )
    metric: Any = list(sweep.metrics) if sweep.objective == "pareto" else sweep.metrics[0]
    mode: Any = ["max"] * len(sweep.metrics) if sweep.objective == "pareto" else "max"
    search = OptunaSearch(
        {name: choice.distribution() for name, choice in sweep.space.items()}, metric=metric, mode=mode,
        sampler=sampler, storage=storage, study_name=study.study_name,
    )  # fmt: skip
    scheduler: Any = FIFOScheduler()
    if sweep.objective == "score":
        most = sweep.base.ranking.num_images * 100
        scheduler = ASHAScheduler(
            time_attr="images", metric=metric, mode=mode, grace_period=16, reduction_factor=2, max_t=most
        )
    trainable = tune.with_parameters(
        _trial, base=to_dict(sweep.base), store=str(store), output=str(output), target=target, cpus=cpus,
        objective=sweep.objective,
    )  # fmt: skip
    with Board(output / "progress", trials, finished) as board:
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": cpus, "gpu": gpus}),
            tune_config=tune.TuneConfig(
                search_alg=search, scheduler=scheduler, num_samples=remaining, max_concurrent_trials=slots,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                storage_path=str(output / "ray"), name=f"session-{finished}", verbose=0, callbacks=[_Tell(board)],
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )  # fmt: skip
        _quiet()
        with contextlib.redirect_stdout(io.StringIO()):  # verbose=0 still prints a banner; our bars use stderr
            results = tuner.fit()
    if target is not None:
        tracking.end_orphans(target)
    return [_reason(error) for error in results.errors]


class _Tell(tune.Callback):
    """Moves the bar when a trial ends."""

    def __init__(self, board: Board) -> None:
        self.board = board

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its callbacks to disk; a board has a thread, and belongs to this process alone

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        r = trial.last_result or {}
        shown = "  ".join(f"{m} {r[m]:.3f}" for m in OBJECTIVES if isinstance(r.get(m), float))
        self.board.finished(f"trial {r.get('trial', trial.trial_id)}: {shown}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.board.finished(f"trial {trial.trial_id} failed")


def _quiet() -> None:
    """Ray's and Optuna's own chatter would tear the bars."""
    for name in ("ray", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


# ----------------------------------------------------------------------------------------------------------------------
# The study


def _open_study(sweep: Sweep, output: Path) -> tuple[optuna.Study, optuna.storages.BaseStorage]:
    """The sweep's study: new with ``first`` queued, or found again with interrupted trials settled."""
    _quiet()
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{(output / 'optuna.db').absolute()}", engine_kwargs={"connect_args": {"timeout": 60}}
    )
    study = optuna.create_study(
        storage=storage,
        study_name=f"{sweep.name}-{sweep.digest}",
        directions=["maximize"] * len(sweep.metrics),
        load_if_exists=True,
    )
    for trial in study.trials:
        if trial.state != optuna.trial.TrialState.RUNNING:
            continue
        whole = trial.params.keys() == sweep.space.keys()  # killed while it was proposed, a trial has but a part
        row = _row_of(output, trial_name(sweep.base, trial.params)) if whole else None
        if row is not None and all(isinstance(row.get(m), float) for m in sweep.metrics):
            study.tell(trial.number, [row[m] for m in sweep.metrics])
        else:  # interrupted: first in the queue, and its finished stages are in the store
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            if whole:
                study.enqueue_trial(trial.params)
    if not study.trials:
        base, queued = flat(sweep.base), []
        for settings in sweep.first:
            start = {name: settings.get(name, _as_choice(base[name], choice)) for name, choice in sweep.space.items()}
            if start not in queued:
                queued.append(start)
                study.enqueue_trial(start)
    return study, storage


def _as_choice(value: Any, choice: Levels | Range) -> Any:
    """The base's value as one of the choices (lists are written as 'a,b' there)."""
    if isinstance(choice, Levels) and value not in choice.values:
        joined = ",".join(map(str, value)) if isinstance(value, list) else value
        return joined if joined in choice.values else choice.values[0]
    return value


# ----------------------------------------------------------------------------------------------------------------------
# One trial, in a worker


def trial_name(base: Experiment, settings: Mapping[str, Any]) -> str:
    """Eight digits that name a trial: of everything that decides its result."""
    return stage_digests(base.with_settings(settings))["pictures"][:8]


def _trial(
    config: dict[str, Any], base: dict[str, Any], store: str, output: str, target: tracking.Target | None, cpus: int,
    objective: str,
) -> None:  # fmt: skip
    """Compute every stage of one trial, report, and leave its row in the output folder."""
    use_threads(cpus)
    experiment = from_dict(base).with_settings(config)
    name = trial_name(from_dict(base), config)
    meter = FileMeter(Path(output) / "progress", name)
    folder = Path(output) / "trials" / name
    watch = _report_early(experiment, folder, config, name) if objective == "score" else nobody
    with tracking.TrialRun(target, f"trial-{name}", name, flat(experiment)) as run:
        try:
            outcome = ensure(Store(store), experiment, progress=meter, observe=watch)
            row = finish_trial(folder, experiment, outcome, config, name)
            tags = {"paid": row["paid"], "reused": row["reused"]}
            run.log(row, histories(outcome), trial_files(folder), tags, note=trial_note(outcome))
        finally:
            meter.close()
    write_row(folder, row)
    numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k not in config}
    tune.report({**numbers, "trial": name})


def _report_early(experiment: Experiment, folder: Path, config: Mapping[str, Any], name: str) -> Observe:
    """Report the scores on the images rendered so far, so that ASHA can stop a bad trial."""
    ssim = 0.0

    def observe(stage: str, facts: Mapping[str, Any]) -> None:
        nonlocal ssim
        if stage == "reconstruction":
            ssim = facts["ssim"]["mean"]
        if stage != EFFECTS_SO_FAR:
            return
        table = facts["table"]
        scores = {**partial_scores(experiment, _pairs_so_far(experiment, table), table), "ssim": ssim}
        scores["score"] = overall_score(scores)
        progress = {"trial": name, "images": len(set(table["row"].to_pylist()))}
        write_row(folder, {**config, **scores, **progress, "status": "stopped"})
        tune.report({**scores, **progress})

    return observe


def _pairs_so_far(experiment: Experiment, table: Any) -> list[tuple[str, str]]:
    """The (source, target) pairs of which an unfinished effects table already holds images."""
    from diffex.ranking import classes_of
    from diffex.stages import class_pairs

    names = classes_of(table)
    present = set(table["class_name"].to_pylist())
    return [(names[s], names[t]) for s, t in class_pairs(experiment, names) if names[s] in present]


def finish_trial(
    folder: Path, experiment: Experiment, outcome: Outcome, config: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """Write a trial's folder: settings, where its stages lie, pictures; returns the row, to be written last."""
    from diffex.report import write_trial_figures

    row = json.loads((outcome["scoreboard"].path / "row.json").read_text(encoding="utf-8"))
    row = {
        **config, **row, "trial": name, "status": "finished", "paid": ", ".join(outcome.paid),
        "reused": ", ".join(outcome.reused), "cost.seconds": outcome.seconds(),
        "cost.seconds_paid": outcome.seconds(computed=True), "images": outcome["effects"].facts["images"],
        "cost.stage_1_seconds": outcome.seconds(STAGE_1), "cost.evaluation_seconds": outcome.seconds(EVALUATION),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_run_record(folder, experiment, outcome)
    write_trial_figures(folder, outcome)
    return row


def write_run_record(folder: Path, experiment: Experiment, outcome: Outcome) -> None:
    """What ``load_explainer`` needs to find an explanation again: all settings, and where each stage lies."""
    (folder / "experiment.json").write_text(json.dumps(to_dict(experiment), indent=1), encoding="utf-8")
    stages = {stage: str(entry.path) for stage, entry in outcome.entries.items()}
    (folder / "stages.json").write_text(json.dumps(stages, indent=1), encoding="utf-8")


def histories(outcome: Outcome) -> dict[str, list[dict[str, float]]]:
    """Training curves of the stages that have one."""
    found = {}
    for stage in ("classifier", "autoencoder", "directions"):
        file = outcome[stage].path / "history.json"
        if file.is_file():
            found[stage] = json.loads(file.read_text(encoding="utf-8"))
    return found


def trial_note(outcome: Outcome) -> str:
    """What MLflow shows as a run's description: a sentence for each top direction."""
    from diffex.report import headline

    return "\n".join(f"- {line}" for line in headline(outcome["scoreboard"].facts["top"]))


def trial_files(folder: Path) -> list[Path]:
    """Files of a trial's folder that go to MLflow."""
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in (".json", ".png", ".parquet"))


def write_row(folder: Path, row: Mapping[str, Any]) -> None:
    """Write ``row.json``: from then on the trial counts as ended, so everything else must be there by then."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting = folder / f"row.{os.getpid()}.tmp"
    waiting.write_text(json.dumps(row, indent=1), encoding="utf-8")
    waiting.replace(folder / "row.json")


def _row_of(output: Path, name: str) -> dict[str, Any] | None:
    file = output / "trials" / name / "row.json"
    if not file.is_file():
        return None
    row: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return row if row["status"] == "finished" else None


def load_rows(output: Path) -> list[dict[str, Any]]:
    """Rows of all trials of an output folder, finished or stopped early, best flip rate first."""
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((output / "trials").glob("*/row.json"))]
    return sorted(rows, key=lambda r: -r.get("flip_rate", 0.0))
