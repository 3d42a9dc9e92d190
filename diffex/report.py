"""The report: one HTML file with everything in it, for a biologist first and an engineer second."""

from __future__ import annotations

import base64
import csv
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from diffex.audit import VERDICTS
from diffex.config import Experiment
from diffex.measures import METRICS, OBJECTIVES, pareto_front
from diffex.phenotypes import headline as headline_feature
from diffex.phenotypes import plain
from diffex.settings import describe
from diffex.signatures import RULES, recognise
from diffex.splits import PARTS, unit_noun
from diffex.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from diffex.data import ImageStore
    from diffex.inspection import Inspection
    from diffex.pipeline import Outcome

DOTS = 110  # per inch


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS, facecolor="white")
    return path


def write_trial_figures(folder: Path, outcome: Outcome) -> list[Path]:
    """Pictures of one trial, and its table of phenotypes: traversals and ways of its top directions, what they change
    in cells, ranking, reconstructions.
    """
    from diffex import figures

    info = outcome["data"].facts
    channels, class_names = info["channels"], info["class_names"]
    written = []
    index = json.loads((outcome["pictures"].path / "traversals.json").read_text(encoding="utf-8"))
    pictures = load_file(outcome["pictures"].path / "traversals.safetensors")
    pairs = outcome["effects"].facts["pairs"]
    words = {(r["source"], r["target"], r["direction"]): r["words"] for r in outcome["scoreboard"].facts["top"]}
    for number, r in enumerate(index["rows"]):
        said = words.get((r["source"], r["target"], r["direction"]), "")
        figure = figures.traversal(
            pictures[f"images.{number}"], pictures[f"probs.{number}"], index["alphas"], channels, source=r["source"],
            target=r["target"], target_index=class_names.index(r["target"]),
            title=f"{r['rank']}. direction {r['direction']}{_plus(r)}" + (f": {said}" if said else ""),
        )  # fmt: skip
        suffix = "" if len(pairs) == 1 else f"-{number}"
        written.append(save_figure(figure, folder / f"traversal-{r['rank']}{suffix}.png"))
    row = json.loads((outcome["scoreboard"].path / "row.json").read_text(encoding="utf-8"))
    ranks = pq.read_table(outcome["scoreboard"].path / "ranking.parquet").to_pylist()
    first = [r for r in ranks if [r["source"], r["target"]] == pairs[0]]
    beside = None
    if "class_mean.flip_rate" in row:
        beside = {"flip_rate": row["class_mean.flip_rate"], "effect": row["class_mean.mean_shift"]}
    written.append(save_figure(figures.ranking(first, beside), folder / "ranking.png"))
    shutil.copy(outcome["scoreboard"].path / "phenotypes.parquet", folder / "phenotypes.parquet")
    features = pq.read_table(folder / "phenotypes.parquet").to_pylist()
    features = [{**r, "verdict": VERDICTS.get(r["verdict"], r["verdict"]).partition(":")[0]} for r in features]
    written.append(
        save_figure(figures.phenotypes(features, words=plain, show=headline_feature), folder / "phenotypes.png")
    )
    trajectories = pq.read_table(outcome["evidence"].path / "trajectories.parquet")
    written.append(save_figure(figures.ways(trajectories.to_pylist()), folder / "ways.png"))
    images = load_file(outcome["reconstruction"].path / "images.safetensors")
    rows = {label: images[name] for name, label in RECONSTRUCTION_ROWS.items()}
    grid = figures.image_grid(rows, channels, "What the autoencoder makes of test images")
    return [*written, save_figure(grid, folder / "reconstruction.png")]


RECONSTRUCTION_ROWS = {
    "original": "image",
    "reconstruction": "reconstruction",
    "swapped": "z of another class,\nown x_T",
    "random": "own z,\nrandom x_T",
}


# ----------------------------------------------------------------------------------------------------------------------
# The page


@dataclass(frozen=True)
class Check:
    """One line of 'can it be trusted': what was measured, what would be good, and whether it is."""

    question: str
    measured: str
    wanted: str
    good: bool


CHECKS = (
    ("Does the classifier work on cells it has not seen?", "classifier.accuracy", 0.8),
    ("Does the classifier judge reconstructions as it judges images?", "agreement", 0.97),
    ("Does the image follow the code z when x_T comes from another class?", "gate.swapped", 0.9),
    ("… and when x_T is random?", "gate.random", 0.9),
    ("Does the first direction flip the classifier?", "flip_rate", 0.9),
)
"""Question, key of a share in the row, and the least share that is good."""


def checks(row: Mapping[str, Any]) -> list[Check]:
    """The questions that a careful reader asks, answered by the row."""
    found = []
    for question, key, least in CHECKS:
        low, high = row[f"{key}_low"], row[f"{key}_high"]
        measured = f"{100 * row[key]:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
        found.append(Check(question, measured, f"≥ {100 * least:.0f} %", row[key] >= least))
    followed = _share(row, "oracle.agreement")
    similar = f"SSIM {row['ssim']:.3f} [{row['ssim_low']:.3f}, {row['ssim_high']:.3f}]"
    null = f"{100 * row['null.flip_rate']:.0f} % (best of them {100 * row['null.flip_max']:.0f} %)"
    cosine, overlap = row["directions.consistency_min"], row["directions.overlap"]
    found += [
        Check("Are images reconstructed?", similar, "≥ 0.95", row["ssim"] >= 0.95),
        Check(
            "Does an independent classifier follow the first direction's flips?",
            followed,
            "≥ 50 %",
            row["oracle.agreement"] >= 0.5,
        ),
        Check(
            "Do real cells of both classes differ in what it changes?",
            f"agreement {row['audit.agreement']:.2f}",
            "≥ 0.5",
            row["audit.agreement"] >= 0.5,
        ),
        Check("Do random directions of the same length flip it?", null, "≤ 10 %", row["null.flip_rate"] <= 0.1),
        Check("Does a direction push all cells the same way?", f"mean cosine ≥ {cosine:.2f}", "≥ 0.7", cosine >= 0.7),
        Check("Do the top directions change different things?", f"overlap {overlap:.2f}", "≤ 0.6", overlap <= 0.6),
    ]
    if row.get("recovery.planted"):
        wanted = min(3, row["recovery.planted"])
        measured = (
            f"{row['recovery.moved']} of {row['recovery.planted']} moved more than any decoy "
            f"({row['recovery.moved_names'] or 'none'}); {row['recovery.recovered']} by a direction of their own; "
            f"decoys hit {row['recovery.decoy_hits']}"
        )
        question = "Are the planted phenotypes found (simulated assay)?"
        found.append(Check(question, measured, f"≥ {wanted}", row["recovery.moved"] >= wanted))
    return found


def _share(row: Mapping[str, Any], key: str) -> str:
    if math.isnan(row[key]):
        return "nothing flips"
    return f"{100 * row[key]:.0f} % [{100 * row[f'{key}_low']:.0f}, {100 * row[f'{key}_high']:.0f}]"


def headline(top: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each top direction."""
    truth = {
        "planted": "on the simulated assay this is a planted phenotype",
        "decoy": "on the simulated assay this is a decoy",
    }
    lines = []
    for r in top:
        interval = f"[{100 * r['flip_low']:.0f}, {100 * r['flip_high']:.0f}]"
        text = (
            f"Direction {r['direction']}{_plus(r)}: {r['words']}; flips {100 * r['flip_rate']:.0f} % {interval} of "
            f"{r['flip_n']} cells of {r['source']} to {r['target']}, null {100 * r['null_flip_rate']:.0f} %"
        )
        if r.get("verdict"):
            real = "real cells of both classes differ in what it changes" if r["verdict"] == "supported" else ""
            text += f"; supported: {real}" if real else f"; not supported ({VERDICTS[r['verdict']]})"
        lines.append(f"{text}; {truth[r['truth']]}." if r.get("truth") in truth else f"{text}.")
    return lines


def _plus(ranked: Mapping[str, Any]) -> str:
    return "+" if ranked["sign"] > 0 else "−"


def unit_words(facts: Mapping[str, Any]) -> str:
    """What is kept together in one part and resampled as a whole: 'plate and well'; 'image' where nothing is."""
    return " and ".join(name.removeprefix("Metadata_").lower() for name in facts["split_by"]) or "image"


TESTS = {
    "moves": "moves the classifier", "witness": "another classifier follows", "robust": "a robust one follows",
    "populations": "real cells differ so", "cycle": "survives encoding", "plates": "not plates",
    "seeds": "found again", "reconstruction": "more than rendering",
}  # fmt: skip
"""Columns of the audit's table: name of the test -> heading."""

SEED_COLUMNS = (
    "flip_rate", "disentanglement", "ssim", "score", "agreement", "gate.swapped", "gate.random", "null.flip_rate",
    "oracle.agreement", "audit.agreement", "audit.supported", "directions.effective_rank", "recovery.recall",
    "recovery.precision",
)  # fmt: skip

COLUMNS = (
    "flip_rate", "disentanglement", "ssim", "score", "agreement", "gate.swapped", "gate.random", "null.flip_rate",
    "class_mean.flip_rate", "oracle.agreement", "audit.supported", "directions.effective_rank", "stability.image",
    "recovery.moved", "recovery.recovered", "signatures", "cost.seconds_paid",
)  # fmt: skip


def write_report(
    path: Path, *, title: str, experiment: Experiment, rows: Sequence[Mapping[str, Any]], settings: Sequence[str],
    trials: Path, best: str, top: Sequence[Mapping[str, Any]], figures_of_all: Mapping[str, Path], command: str,
    facts: Mapping[str, Any], seeds: Sequence[Mapping[str, Any]] = (),
) -> Path:  # fmt: skip
    """Write the self-contained page.

    Args:
        path: where.
        title: of the page.
        experiment: settings that all trials share.
        rows: scoreboard rows of finished trials.
        settings: dotted settings that the sweep varied.
        trials: folder of the trials' own folders.
        best: name of the trial whose explanation is shown.
        top: its top directions, with words.
        figures_of_all: caption -> picture of all trials.
        command: what was typed.
        facts: of the data and of the classifier: ``images``, ``class_names``, ``channels``, ``split_by``, ``source``.
        seeds: rows brought together over seeds, see ``measures.over_seeds``.
    """
    ordered = sorted(rows, key=lambda r: -r.get("score", 0.0))
    front = pareto_front(ordered, OBJECTIVES)
    row = next(r for r in ordered if r["trial"] == best)
    folder = trials / best
    columns = [c for c in COLUMNS if c in row]
    page = page_template("report").render(
        title=title, version=__version__, command=command, row=row, best=best, headline=headline(top),
        checks=checks(row), top=[{**r, "sign_mark": _plus(r)} for r in top], signatures=recognise(row),
        rules=RULES, verdicts=VERDICTS, tests=TESTS, seeds=seeds, seed_columns=[c for c in SEED_COLUMNS if c in row],
        phenotypes=embed_image(folder / "phenotypes.png"), ways=embed_image(folder / "ways.png"),
        traversals=[embed_image(p) for p in sorted(folder.glob("traversal-*.png"), key=_number)],
        ranking=embed_image(folder / "ranking.png"), reconstruction=embed_image(folder / "reconstruction.png"),
        overview={caption: embed_image(p) for caption, p in figures_of_all.items()}, rows=ordered, front=front,
        units=unit_words(facts),
        settings=settings, columns=columns, metrics=METRICS, experiment=describe(experiment), facts=facts,
    )  # fmt: skip
    path.write_text(page, encoding="utf-8")
    return path


def write_inspection(folder: Path, store: ImageStore, found: Inspection) -> Path:
    """Write ``inspection.html``, self-contained, with its pictures and ``counts.csv`` beside it.

    Args:
        folder: where; made if it is not there.
        store: what was inspected.
        found: what was found.
    """
    from diffex import figures

    info, counts = store.info, found.counts
    unit = unit_noun(info.split_by)
    drawn = {
        "sheet": figures.image_grid(found.sheet, info.channels, "Images of each class"),
        "histograms": figures.plate_histograms(found.levels, found.histograms, info.channels),
    }
    if counts.plates:
        drawn["plates"] = figures.class_by_plate(counts.wells_by_plate, info.class_names, counts.plates, unit)
    maps = figures.plate_maps(counts.wells, info.class_names)
    if maps is not None:
        drawn["maps"] = maps
    pictures = {key: embed_image(save_figure(figure, folder / f"{key}.png")) for key, figure in drawn.items()}
    rows = [
        {
            "name": name,
            "parts": list(zip(counts.images[c].tolist(), counts.units[c].tolist(), strict=True)),
            "rejected": ", ".join(f"{n:,} {why}" for (who, why), n in sorted(found.rejected.items()) if who == name),
        }
        for c, name in enumerate(info.class_names)
    ]
    with (folder / "counts.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["class", "plate", "well", "images"])
        if counts.wells:
            table.writerows([who, plate, well, n] for (plate, well), (who, n) in sorted(counts.wells.items()))
        else:
            table.writerows(
                [name, plate, "", int(counts.by_plate[c, p])]
                for c, name in enumerate(info.class_names)
                for p, plate in enumerate(counts.plates or ("",))
            )
    page = page_template("inspection").render(
        title=f"Image store {store.path.name}", version=__version__, info=info, units=unit, parts=PARTS,
        unit=unit_noun(info.split_by, 1), findings=found.findings, counts=rows, pictures=pictures,
        shown=len(found.sheet),
    )  # fmt: skip
    path = folder / "inspection.html"
    path.write_text(page, encoding="utf-8")
    return path


def page_template(name: str) -> jinja2.Template:
    """A page's template; all extend ``page.html.j2``."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda file: (resources.files("diffex") / file).read_text(encoding="utf-8")),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(f"{name}.html.j2")


def _number(path: Path) -> list[int]:
    return [int(n) for n in path.stem.removeprefix("traversal-").split("-")]


def embed_image(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
