"""One trial: computed in a worker on any node, kept in the store, collected by the driver.

A worker leaves a trial's whole folder (row, settings, curves, pictures) as an entry of the store, under the sweep's
digest and the trial's name; the driver brings it home.  So nothing but the store has to be seen by all nodes, and a
trial that ended while nobody listened is not lost.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffex.config import Experiment
from diffex.measures import OBJECTIVES
from diffex.pipeline import EVALUATION, STAGE_1, Outcome, stage_digests
from diffex.ranking import classes_of
from diffex.settings import digest, to_dict
from diffex.stages import class_pairs
from diffex.store import Store

STAGE = "trial"


def trial_name(base: Experiment, settings: Mapping[str, Any]) -> str:
    """Eight digits that name a trial: of everything that decides its result."""
    return stage_digests(base.with_settings(settings))["pictures"][:8]


@dataclass(frozen=True)
class Slot:
    """Where in the store a sweep keeps a trial."""

    sweep: str
    trial: str

    @property
    def address(self) -> str:
        """Digest of the entry."""
        return digest([self.sweep, self.trial])


def keep_trial(
    store: Store, slot: Slot, experiment: Experiment, outcome: Outcome, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], Path]:
    """Write a finished trial's folder into the store, once; returns its row and the folder (on this machine)."""

    def run(folder: Path) -> dict[str, Any]:
        return {"row": write_trial(folder, store, experiment, outcome, settings, slot.trial)}

    entry = store.compute(STAGE, slot.address, run, about={"sweep": slot.sweep, "trial": slot.trial})
    return entry.facts["row"], entry.path


def write_trial(
    folder: Path, store: Store, experiment: Experiment, outcome: Outcome, settings: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """Write a trial's folder and return its row: settings, scoreboard, cost, what it paid for and what it reused."""
    from diffex.report import write_trial_figures

    row = json.loads((outcome["scoreboard"].path / "row.json").read_text(encoding="utf-8"))
    row = {
        **settings, **row, "trial": name, "status": "finished", "paid": ", ".join(outcome.paid),
        "reused": ", ".join(outcome.reused), "cost.seconds": outcome.seconds(),
        "cost.seconds_paid": outcome.seconds(computed=True), "images": outcome["effects"].facts["images"],
        "cost.stage_1_seconds": outcome.seconds(STAGE_1), "cost.evaluation_seconds": outcome.seconds(EVALUATION),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    places = {stage: f"{store.address}/{stage}/{address}" for stage, address in stage_digests(experiment).items()}
    for file, content in (
        ("experiment", to_dict(experiment)),
        ("stages", places),
        ("seconds", {places[stage]: entry.seconds for stage, entry in outcome.entries.items()}),
        ("curves", histories(outcome)),
    ):
        (folder / f"{file}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    write_trial_figures(folder, outcome)
    return row


def collect_trial(store: Store, slot: Slot, output: Path) -> dict[str, Any] | None:
    """Bring a finished trial into the output folder; None where the store does not hold it."""
    entry = store.get(STAGE, slot.address)
    if entry is None:
        return None
    folder = output / "trials" / slot.trial
    folder.mkdir(parents=True, exist_ok=True)
    for file in entry.path.iterdir():
        if file.is_file() and file.name != "entry.json":
            shutil.copy(file, folder)
    row: dict[str, Any] = entry.facts["row"]
    write_row(folder, row)
    return row


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
    shown = (".json", ".png", ".parquet")
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in shown and p.name != "entry.json")


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """What of a row is a number."""
    return {k: v for k, v in row.items() if isinstance(v, int | float)}


def write_row(folder: Path, row: Mapping[str, Any]) -> None:
    """Write ``row.json``: from then on the trial counts as ended, so everything else must be there by then."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting = folder / f"row.{os.getpid()}.tmp"
    waiting.write_text(json.dumps(row, indent=1), encoding="utf-8")
    waiting.replace(folder / "row.json")


def finished_row(output: Path, name: str) -> dict[str, Any] | None:
    """The row of a finished trial; None where there is none."""
    file = output / "trials" / name / "row.json"
    if not file.is_file():
        return None
    row: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return row if row["status"] == "finished" else None


def load_rows(output: Path) -> list[dict[str, Any]]:
    """Rows of all trials of an output folder, finished or stopped early, best flip rate first."""
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((output / "trials").glob("*/row.json"))]
    return sorted(rows, key=lambda r: -r.get("flip_rate", 0.0))


def describe_trial(row: Mapping[str, Any]) -> str:
    """A line for the terminal: scores, what the trial paid for and what it found there."""
    scores = "  ".join(f"{m} {row[m]:.3f}" for m in OBJECTIVES if isinstance(row.get(m), float))
    if "cost.seconds" not in row:
        return f"trial {row['trial']}: {scores}  stopped early"
    paid, reused = row["cost.seconds_paid"], row["cost.seconds"] - row["cost.seconds_paid"]
    return f"trial {row['trial']}: {scores}  paid {paid:.0f} s, reused {reused:.0f} s"


def cost_of_all(output: Path) -> dict[str, float]:
    """Seconds that all finished trials took together, and what they would have cost one by one, nothing shared."""
    spent: dict[str, float] = {}
    alone = 0.0
    for file in (output / "trials").glob("*/seconds.json"):
        seconds = json.loads(file.read_text(encoding="utf-8"))
        alone += sum(seconds.values())
        spent |= seconds
    return {"seconds.together": sum(spent.values()), "seconds.alone": alone}


def pairs_so_far(experiment: Experiment, table: Any) -> list[tuple[str, str]]:
    """The (source, target) pairs of which an unfinished effects table already holds images."""
    names = classes_of(table)
    present = set(table["class_name"].to_pylist())
    return [(names[s], names[t]) for s, t in class_pairs(experiment, names) if names[s] in present]
