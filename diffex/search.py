"""Sweeps: Ray Tune with Optuna over dotted settings, resumable by running the same command again.

What a sweep has finished stands in its output folder (one ``row.json`` a trial) and in its Optuna study, which is named
after the sweep's digest; what a trial had begun stands in the store.  A second run of the same command therefore
repeats nothing: it tells the study what ended, puts interrupted settings first in the queue, and runs the rest.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search.optuna import OptunaSearch

from diffex import tracking
from diffex.cluster import Meter, Meters, Resources, Share, connected, share_out, use_threads
from diffex.config import Experiment
from diffex.errors import UserError
from diffex.measures import OBJECTIVES, overall_score
from diffex.pipeline import absent, ensure, stage_digests
from diffex.progress import Board
from diffex.scoreboard import partial_scores
from diffex.settings import digest, flat
from diffex.space import Constraint, Levels, Range
from diffex.store import Store
from diffex.trainer import compute_all, crew_of, missing_of, open_store
from diffex.trials import (
    Slot,
    collect_trial,
    describe_trial,
    finished_row,
    histories,
    keep_trial,
    load_rows,
    numbers,
    pairs_so_far,
    trial_files,
    trial_name,
    trial_note,
    write_row,
)
from diffex.work import EFFECTS_SO_FAR, POINT, Observe

SHARED = ("warmup", "robust", "real_cells", "ruler")
"""What trials with equal data have in common (and all that it rests on), computed before they start."""

SAMPLERS = ("tpe", "gp", "random", "grid")


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
        sampler: 'tpe', 'gp' (Gaussian processes), 'random', or 'grid' (every combination of levels, once).
        constraints: bounds that trials are penalised for missing.
        kind: of MLflow's parent run.
    """

    name: str
    base: Experiment
    space: Mapping[str, Levels | Range]
    first: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    objective: str = "pareto"
    sampler: str = "tpe"
    constraints: Sequence[Constraint] = ()
    kind: str = "sweep"

    def __post_init__(self) -> None:
        for name in self.space:
            for value in self._ends(name):
                self.base.with_settings({name: value})  # complains before anything is started
        if self.objective not in ("pareto", "score"):
            raise UserError(f"--objective {self.objective!r} is not one of pareto, score")
        if self.sampler not in SAMPLERS:
            raise UserError(f"--sampler {self.sampler!r} is not one of {', '.join(SAMPLERS)}")
        ranges = [name for name, choice in self.space.items() if isinstance(choice, Range)]
        if self.sampler == "grid" and ranges:
            raise UserError(f"--sampler grid needs levels: give them, e.g. --vary '{ranges[0]}=[0.1, 1, 10]'")

    @property
    def digest(self) -> str:
        """Names the sweep: settings, space, data and code, but not the number of trials, which can be raised later."""
        space = {name: [type(c).__name__, list(vars(c).values())] for name, c in self.space.items()}
        how = [self.objective, self.sampler, [[c.measure, c.least] for c in self.constraints]]
        asked = [self.name, digest(self.base), space, how, [dict(f) for f in self.first]]
        return digest([*asked, stage_digests(self.base)["pictures"]])

    @property
    def metrics(self) -> tuple[str, ...]:
        return OBJECTIVES if self.objective == "pareto" else ("score",)

    def goals(self, row: Mapping[str, Any], *, early: bool = False) -> dict[str, float]:
        """What the sampler is to raise: each metric, less the penalty for bounds that the row misses.

        ``early`` leaves out bounds on measures that only a finished trial has.
        """
        bounds = [c for c in self.constraints if not early or c.measure.removeprefix("-") in row]
        penalty = Constraint.PENALTY * sum(c.shortfall(row) for c in bounds)
        return {f"goal.{name}": float(row[name]) - penalty for name in self.metrics}

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of levels; what decides early stages varies fastest, so that the first trials, which run
        side by side, train different autoencoders instead of waiting for the same one."""
        names = sorted(self.space, key=self._first_stage, reverse=True)
        choices = [c.values for name in names if isinstance(c := self.space[name], Levels)]
        return [dict(zip(names, values, strict=True)) for values in itertools.product(*choices)]

    def _first_stage(self, name: str) -> int:
        """Number, in the order of computing, of the first stage that a setting decides."""
        variants = [list(stage_digests(self.base.with_settings({name: v})).values()) for v in self._ends(name)]
        return next((i for i, found in enumerate(zip(*variants, strict=False)) if len(set(found)) > 1), 99)

    def shared(self, trials: int) -> list[tuple[Experiment, str]]:
        """(experiment, stage) of what is worth computing before the trials start: where a stage is decided by levels
        alone, and by no more combinations of them than there are trials."""
        jobs = []
        for stage in SHARED:
            choices = {name: choice for name, choice in self.space.items() if self._decides(name, stage)}
            levels = {name: c.values for name, c in choices.items() if isinstance(c, Levels)}
            if levels.keys() == choices.keys() and math.prod(map(len, levels.values())) <= trials:
                points = (dict(zip(levels, values, strict=True)) for values in itertools.product(*levels.values()))
                jobs += [(self.base.with_settings(point), stage) for point in points]
        return [(e, stage) for e, stage in jobs if stage not in absent(e)]

    def _decides(self, name: str, stage: str) -> bool:
        """Whether a setting of the space decides a stage."""
        found = {stage_digests(self.base.with_settings({name: v}), stage)[stage] for v in self._ends(name)}
        return len(found) > 1

    def _ends(self, name: str) -> tuple[Any, ...]:
        choice = self.space[name]
        return choice.values if isinstance(choice, Levels) else (choice.low, choice.high)


@dataclass(frozen=True)
class SweepResult:
    """Rows of all finished trials: settings of the space, scoreboard, ``trial``, ``status``, ``paid``, ``reused``."""

    rows: list[dict[str, Any]]
    failed: list[str]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Session:
    """One call of ``run_sweep``."""

    sweep: Sweep
    output: Path
    store: Store
    target: tracking.Target | None
    study: optuna.Study
    storage: optuna.storages.BaseStorage
    at_a_time: int | None

    @property
    def unlogged(self) -> Path:
        """Where that is kept which MLflow did not take."""
        return self.output / "unlogged"

    def deliver(self, say: Callable[[str], None]) -> None:
        """Log what MLflow did not take before, and end the runs of trials that are no more."""
        if self.target is not None:
            for name in tracking.deliver(self.target, self.unlogged):
                say(f"MLflow still does not take {name}: run the same command again to log it")
            tracking.end_orphans(self.target)

    def slot(self, name: str) -> Slot:
        return Slot(self.sweep.digest, name)


def run_sweep(
    sweep: Sweep, *, output: Path, store: str | Path, trials: int, target: tracking.Target | None,
    say: Callable[[str], None] = print, at_a_time: int | None = None, study: str | None = None,
) -> SweepResult:  # fmt: skip
    """Run, or go on with, a sweep until ``trials`` have ended.

    Args:
        sweep: what is asked.
        output: its folder, on the driver's machine.
        store: the stage store, visible to every node: a folder, or a URI.
        trials: how many trials in all; raise it later to go on.
        target: MLflow run to log under, or None.
        say: prints a line for people.
        at_a_time: trials at a time (default: as many as the cluster has room for now).
        study: Optuna storage: a database's URL, or ``journal:FILE`` (default: SQLite in ``output``).
    """
    began = time.monotonic()
    opened = Store(store)
    storage = _storage(output, study)
    session = _Session(
        sweep=sweep, output=output, store=opened, target=target, study=_open_study(sweep, output, opened, storage),
        storage=storage, at_a_time=at_a_time,
    )  # fmt: skip
    found = session.study.trials
    finished = [t for t in found if t.state.is_finished() and t.state != optuna.trial.TrialState.FAIL]
    remaining = max(0, trials - len(finished))
    if finished:
        say(f"{len(finished)} of {trials} trials were finished before; {remaining} to go")
    failed: list[str] = []
    if remaining:
        with connected() as offered:
            meters = Meters()
            _compute_shared(session, offered, meters, remaining, say)
            failed = _run_trials(session, offered, meters, remaining, len(finished), trials)
    session.deliver(say)
    return SweepResult(load_rows(output), failed, time.monotonic() - began)


def _compute_shared(
    session: _Session, offered: Resources, meters: Meters, remaining: int, say: Callable[[str], None]
) -> None:
    missing = missing_of(session.sweep.shared(remaining), session.store)
    if not missing:
        return
    names = [stage for stage in SHARED if any(stage == s for _, s in missing)]
    say(f"computing what trials share: {len(missing)} stages ({', '.join(names)} of each data setting), once")
    with Board(meters.read, len(missing), unit="shared stages") as board:
        compute_all(
            missing, session.store, offered=offered, meters=meters, at_a_time=session.at_a_time,
            done=lambda name: board.finished(),
        )  # fmt: skip


def _run_trials(
    session: _Session, offered: Resources, meters: Meters, remaining: int, finished: int, trials: int
) -> list[str]:
    sweep, study = session.sweep, session.study
    share = share_out(sweep.base.run, offered, session.at_a_time)
    goals = [f"goal.{name}" for name in sweep.metrics]
    metric: Any = goals if sweep.objective == "pareto" else goals[0]
    mode: Any = ["max"] * len(goals) if sweep.objective == "pareto" else "max"
    search = OptunaSearch(
        {name: choice.distribution() for name, choice in sweep.space.items()}, metric=metric, mode=mode,
        sampler=_sampler(sweep, study, trials), storage=session.storage, study_name=study.study_name,
    )  # fmt: skip
    scheduler: Any = FIFOScheduler()
    if sweep.objective == "score":
        most = sweep.base.ranking.num_images * 100
        scheduler = ASHAScheduler(
            time_attr="images", metric=metric, mode=mode, grace_period=16, reduction_factor=2, max_t=most
        )
    trainable = tune.with_parameters(
        _trial, sweep=sweep, store=session.store.address, target=session.target, share=share, board=meters.meter("")
    )
    with Board(meters.read, trials, finished) as board:
        tuner = tune.Tuner(
            tune.with_resources(trainable, share.trial),
            tune_config=tune.TuneConfig(
                search_alg=search, scheduler=scheduler, num_samples=remaining, max_concurrent_trials=share.at_a_time,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                storage_path=str(session.output / "ray"), name=f"session-{finished}", verbose=0,
                callbacks=[_Tell(board, session)],
                failure_config=tune.FailureConfig(max_failures=sweep.base.run.failures),
            ),
        )  # fmt: skip
        _quiet()
        with contextlib.redirect_stdout(io.StringIO()):  # verbose=0 still prints a banner; our bars use stderr
            results = tuner.fit()
    return [_reason(error) for error in results.errors]


def _sampler(sweep: Sweep, study: optuna.Study, trials: int) -> optuna.samplers.BaseSampler:
    # Random numbers depend on how many trials there are, so a resumed sweep does not repeat its proposals.
    seed = int(digest([sweep.base.run.seed, len(study.trials)]), 16) % 2**31
    starts = max(4, trials // 4)
    if sweep.sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=starts)
    if sweep.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=starts)
    return optuna.samplers.RandomSampler(seed=seed)  # a grid's points are queued


class _Tell(tune.Callback):
    """Brings a trial's folder home when it ends, and moves the bar."""

    def __init__(self, board: Board, session: _Session) -> None:
        self.board, self.session = board, session

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its callbacks to disk; a board has a thread, and belongs to this process alone

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result or {}
        name = last.get("trial", "")
        row = collect_trial(self.session.store, self.session.slot(name), self.session.output) if name else None
        if row is None and name:  # stopped by the scheduler
            row = dict(last["row"])
            write_row(self.session.output / "trials" / name, row)
        home = self.session.output / "trials" / name
        for record in last.get("unlogged", ()):  # MLflow did not answer; its files lie here now
            files = [str(home / Path(file).name) for file in record["files"]]
            tracking.keep(self.session.unlogged, {**record, "files": files})
        self.board.finished(describe_trial(row) if row else f"trial {trial.trial_id} ended without a result")

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


def _storage(output: Path, asked: str | None) -> optuna.storages.BaseStorage:
    """Optuna's storage: SQLite beside the results, or what was asked for."""
    if asked is not None and asked.startswith("journal:"):
        file = Path(asked.removeprefix("journal:")).absolute()
        file.parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.JournalStorage(JournalFileBackend(str(file)))
    url = asked or f"sqlite:///{(output / 'optuna.db').absolute()}"
    patience = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    try:
        return optuna.storages.RDBStorage(url, engine_kwargs=patience)
    except Exception as error:  # SQLAlchemy and each driver raise their own kinds
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"can't open the Optuna storage {url!r} (--study): {reason}") from None


def _open_study(sweep: Sweep, output: Path, store: Store, storage: optuna.storages.BaseStorage) -> optuna.Study:
    """The sweep's study, with interrupted trials settled; points that were asked for and did not end yet are queued."""
    _quiet()
    study = optuna.create_study(
        storage=storage, study_name=f"{sweep.name}-{sweep.digest}",
        directions=["maximize"] * len(sweep.metrics), load_if_exists=True,
    )  # fmt: skip
    for trial in study.trials:
        if trial.state != optuna.trial.TrialState.RUNNING:
            continue
        whole = trial.params.keys() == sweep.space.keys()  # killed while it was proposed, a trial has but a part
        row = None
        if whole:
            name = trial_name(sweep.base, trial.params)
            row = finished_row(output, name) or collect_trial(store, Slot(sweep.digest, name), output)
        if row is not None and all(isinstance(row.get(m), float) for m in sweep.metrics):
            study.tell(trial.number, list(sweep.goals(row).values()))
        else:  # interrupted: first in the queue, and its finished stages are in the store
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            if whole:
                study.enqueue_trial(trial.params)
    base, failed = flat(sweep.base), optuna.trial.TrialState.FAIL
    tried = [t.system_attrs.get("fixed_params", t.params) for t in study.trials if t.state != failed]
    for settings in [*sweep.first, *(sweep.grid() if sweep.sampler == "grid" else ())]:
        start = {name: settings.get(name, _as_choice(base[name], choice)) for name, choice in sweep.space.items()}
        if start not in tried:
            tried.append(start)
            study.enqueue_trial(start)
    return study


def _as_choice(value: Any, choice: Levels | Range) -> Any:
    """The base's value as one of the choices (lists are written as 'a,b' there)."""
    if isinstance(choice, Levels) and value not in choice.values:
        joined = ",".join(map(str, value)) if isinstance(value, list) else value
        return joined if joined in choice.values else choice.values[0]
    return value


# ----------------------------------------------------------------------------------------------------------------------
# One trial, in a worker


def _trial(
    config: dict[str, Any], sweep: Sweep, store: str, target: tracking.Target | None, share: Share, board: Meter
) -> None:
    """Compute every stage of one trial, keep its folder in the store, and report."""
    use_threads(share.threads)
    experiment, name = sweep.base.with_settings(config), trial_name(sweep.base, config)
    meter = board.named(name)
    meter.raise_known_mistake()
    opened = open_store(store)
    early = _report_early(sweep, experiment, config, name) if sweep.objective == "score" else None
    unlogged: list[dict[str, Any]] = []
    with tracking.TrialRun(target, f"trial-{name}", name, flat(experiment), leave=unlogged.append) as run:

        def observe(stage: str, facts: Mapping[str, Any]) -> None:
            if stage == POINT:
                run.point(facts["stage"], facts["point"])
            elif early is not None:
                early(stage, facts)

        try:
            crew = crew_of(experiment.run, share, meter)
            outcome = ensure(opened, experiment, progress=meter, observe=observe, crew=crew)
            row, folder = keep_trial(opened, Slot(sweep.digest, name), experiment, outcome, config)
            tags = {"paid": row["paid"], "reused": row["reused"]}
            run.log(row, histories(outcome), trial_files(folder), tags, note=trial_note(outcome))
        except UserError as error:
            meter.note_mistake(str(error))
            raise
        finally:
            meter.close()
    shown = {k: v for k, v in numbers(row).items() if k not in config}
    tune.report({**shown, **sweep.goals(row), "trial": name, "unlogged": unlogged})


def _report_early(sweep: Sweep, experiment: Experiment, config: Mapping[str, Any], name: str) -> Observe:
    """Report the scores on the images rendered so far, so that ASHA can stop a bad trial."""
    ssim = 0.0

    def observe(stage: str, facts: Mapping[str, Any]) -> None:
        nonlocal ssim
        if stage == "reconstruction":
            ssim = facts["ssim"]["mean"]
        if stage != EFFECTS_SO_FAR:
            return
        table = facts["table"]
        scores = {**partial_scores(experiment, pairs_so_far(experiment, table), table), "ssim": ssim}
        scores["score"] = overall_score(scores)
        progress = {"trial": name, "images": len(set(table["row"].to_pylist()))}
        row = {**config, **scores, **progress, "status": "stopped"}
        tune.report({**scores, **sweep.goals(row, early=True), **progress, "row": row})

    return observe
