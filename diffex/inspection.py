"""What is in an image store, and what a statistician would say before anybody trains on it.

    counts -> is the class bound to the plate?  -> can plates be told apart from untreated cells alone?
           -> duplicates, units in two parts, imbalance, too few wells, quality control that leans on one class

Everything here works on the index and on a sample of the images.  The unit of every count that a conclusion rests on
is the well (plate, donor, ...), not the cell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from diffex.data import ImageStore
from diffex.splits import PARTS, unit_noun
from diffex.statistics import wilson_interval

Severity = Literal["serious", "caution", "good"]

SAMPLE = 4096  # images that intensities are read from, at most
BYTES = 256 << 20  # that they may take in memory
FEW_UNITS = 3  # test wells of a class under which no interval can be given
SOME_UNITS = 6  # under which an interval is too narrow
IMBALANCE = 10.0  # largest class over smallest
MOST_CLASSES = 24  # of the contact sheet
LEANING = 0.15  # difference between the shares of two classes that quality control leaves out


@dataclass(frozen=True)
class Finding:
    """One thing to know: how bad it is, what was found, and what to do."""

    severity: Severity
    text: str


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Images and units by class and part, and by class and plate.

    Attributes:
        images, units: (classes, 3) int64, in the order of ``PARTS``.
        plates: names of the plates; empty where none are known.
        by_plate: (classes, plates) images.
        wells_by_plate: (classes, plates) units.
        wells: (plate, well) -> (class name, images), for the plate maps; empty where wells are unknown.
    """

    images: NDArray[np.int64]
    units: NDArray[np.int64]
    plates: tuple[str, ...]
    by_plate: NDArray[np.int64]
    wells_by_plate: NDArray[np.int64]
    wells: dict[tuple[str, str], tuple[str, int]]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All that ``diffex data inspect`` shows.

    Attributes:
        counts: see ``Counts``.
        findings: the worst first.
        levels: (256,) edges - 1 in the stored values mapped to 0..1; centres of the histograms' bins.
        histograms: plate -> (C, bins) shares of pixels; one entry "" where no plates are known.
        sheet: class name -> images (n, C, H, W) uint8, drawn evenly over units; of the largest classes, if many.
        rejected: (class, reason) -> number.
    """

    counts: Counts
    findings: list[Finding]
    levels: NDArray[np.float64]
    histograms: dict[str, NDArray[np.float64]]
    sheet: dict[str, NDArray[np.uint8]]
    rejected: dict[tuple[str, str], int]


def inspect(store: ImageStore, *, per_class: int = 12, seed: int = 0) -> Inspection:
    """Count, look at a sample, and judge.

    Args:
        store: any image store.
        per_class: images of each class on the contact sheet.
        seed: of the samples.
    """
    rng = np.random.default_rng(seed)
    plates = _column(store, "Plate")
    most = max(64, min(SAMPLE, BYTES // (4 * len(store.info.channels) * store.info.size**2)))
    rows = np.sort(rng.permutation(len(store))[:most])
    images = _unit_range(store, rows)
    counts = _count(store, plates)
    rejected = _rejected(store)
    findings = [
        *_confounded(store, counts),
        *_plates_differ(store, plates, rows, images),
        *_leaks(store),
        *_duplicates(store),
        *_sizes(store, counts),
        *_leaning(store, rejected),
        *_channels(store, images),
    ]
    order = ("serious", "caution", "good")
    findings.sort(key=lambda f: order.index(f.severity))
    edges = np.linspace(0, 1, 65)
    largest = np.argsort(-counts.images.sum(axis=1), kind="stable")[:MOST_CLASSES]
    shown = [store.info.class_names[c] for c in sorted(largest)]
    return Inspection(
        counts=counts, findings=findings, levels=(edges[1:] + edges[:-1]) / 2,
        histograms={
            plate: np.stack([np.histogram(images[plates[rows] == plate, c], edges)[0] for c in range(images.shape[1])])
            / max(1, images[plates[rows] == plate, 0].size)
            for plate in np.unique(plates[rows]).tolist()
        },
        sheet={name: _contact(store, store.info.class_names.index(name), per_class, rng) for name in shown},
        rejected=rejected,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Looking


def _column(store: ImageStore, name: str) -> NDArray[np.str_]:
    """A metadata column as words, whatever its case; all empty where it is not there."""
    found = next((n for n in store.table.column_names if n.lower() == f"metadata_{name.lower()}"), None)
    return np.array([str(v) for v in store.table[found].to_pylist()]) if found else np.full(len(store), "")


def _unit_range(store: ImageStore, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Images of the rows, (n, C, H, W) float32 in [0, 1]."""
    return np.asarray((store.batch(rows).x.numpy() + 1) / 2, np.float32)


def _contact(store: ImageStore, label: int, count: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Images of a class, one from each unit before a second from any."""
    rows = rng.permutation(np.flatnonzero(store.labels == label))
    groups = store.groups()[rows] if store.info.split_by else rows
    turn = np.zeros(len(rows), np.int64)
    seen: Counter[int] = Counter()
    for i, group in enumerate(groups.tolist()):
        turn[i] = seen[group]
        seen[group] += 1
    chosen = rows[np.argsort(turn, kind="stable")][:count]
    return np.rint(_unit_range(store, chosen) * 255).astype(np.uint8)


def _count(store: ImageStore, plates: NDArray[np.str_]) -> Counts:
    classes, groups = len(store.info.class_names), store.groups()
    images = np.zeros((classes, len(PARTS)), np.int64)
    np.add.at(images, (store.labels, store.part_numbers), 1)
    units = np.zeros_like(images)
    once = np.unique(np.stack([store.labels, store.part_numbers, groups]), axis=1)
    np.add.at(units, (once[0], once[1]), 1)
    names, plate_of = np.unique(plates, return_inverse=True)
    by_plate = np.zeros((classes, len(names)), np.int64)
    np.add.at(by_plate, (store.labels, plate_of), 1)
    wells_by_plate = np.zeros_like(by_plate)
    once = np.unique(np.stack([store.labels, plate_of, groups]), axis=1)
    np.add.at(wells_by_plate, (once[0], once[1]), 1)
    wells: dict[tuple[str, str], tuple[str, int]] = {}
    well = _column(store, "Well")
    if well.any() and plates.any():
        tally = Counter(zip(plates.tolist(), well.tolist(), store.labels.tolist(), strict=True))
        for (plate, place, label), n in sorted(tally.items(), key=lambda item: item[1]):
            wells[plate, place] = (store.info.class_names[label], n)
    known = names.tolist() != [""]
    return Counts(
        images=images, units=units, plates=tuple(names.tolist()) if known else (), by_plate=by_plate,
        wells_by_plate=wells_by_plate, wells=wells,
    )  # fmt: skip


def _rejected(store: ImageStore) -> dict[tuple[str, str], int]:
    file = store.path / "rejected.parquet"
    if not file.is_file():
        return {}
    table = pq.read_table(file, columns=["Class", "Reason"])
    return dict(Counter(zip(table["Class"].to_pylist(), table["Reason"].to_pylist(), strict=True)))


# ----------------------------------------------------------------------------------------------------------------------
# Judging


def _confounded(store: ImageStore, counts: Counts) -> list[Finding]:
    """Classes that share no plate, and how well the plate alone tells the class."""
    names, plates = store.info.class_names, counts.wells_by_plate > 0
    if len(counts.plates) < 2 or len(names) < 2:
        return []
    apart = [(a, b) for a in range(len(names)) for b in range(a) if not (plates[a] & plates[b]).any()]
    pairs = len(names) * (len(names) - 1) // 2
    alone = counts.by_plate.max(axis=0).sum() / counts.by_plate.sum()
    largest = counts.by_plate.sum(axis=1).max() / counts.by_plate.sum()
    found = []
    if apart:
        shown = ", ".join(f"{names[b]} and {names[a]}" for a, b in apart[:3]) + (", ..." if len(apart) > 3 else "")
        found.append(
            Finding(
                "serious",
                f"{len(apart)} of {pairs} pairs of classes share no plate ({shown}): whatever tells them apart may be "
                "the plate, not the treatment. Compare classes that lie on the same plates (data.classes), or image "
                "them together.",
            )
        )
    if alone > largest + 0.1 and alone > 0.6:
        found.append(
            Finding(
                "serious" if alone > 0.9 else "caution",
                f"the plate alone tells the class of {alone:.0%} of the images (the largest class alone: "
                f"{largest:.0%}), so a classifier can score well by recognising plates. Keep to plates that hold all "
                "classes, or balance them.",
            )
        )
    if not found:
        found.append(
            Finding(
                "good", f"classes are spread over the {len(counts.plates)} plates: class and plate are not confounded."
            )
        )
    return found


def _plates_differ(
    store: ImageStore, plates: NDArray[np.str_], rows: NDArray[np.int64], images: NDArray[np.float32]
) -> list[Finding]:
    """Can a simple classifier tell the plate from cells of one class?  Judged on wells that it has not seen."""
    label = int(np.bincount(store.labels).argmax())
    controls = [i for i, n in enumerate(store.info.class_names) if n.lower() in ("dmso", "control", "untreated")]
    label = controls[0] if controls else label
    mine = store.labels[rows] == label
    names, plate = np.unique(plates[rows][mine], return_inverse=True)
    groups = store.groups()[rows][mine]
    wells = [np.unique(groups[plate == p]) for p in range(len(names))]
    enough = [p for p in range(len(names)) if len(wells[p]) >= 2]
    if len(enough) < 2 or not store.info.split_by:
        return []
    keep = np.isin(plate, enough)
    x = _intensity_features(images[mine][keep])
    plate, groups = plate[keep], groups[keep]
    order = {int(g): i for p in enough for i, g in enumerate(wells[p])}
    fold = np.array([order[int(g)] for g in groups]) % 2
    right, total = 0, 0
    for held in (0, 1):
        said = _discriminant(x[fold != held], plate[fold != held], x[fold == held])
        for g in np.unique(groups[fold == held]):  # a well's cells vote: the well is the unit
            votes = np.bincount(said[groups[fold == held] == g], minlength=len(names))
            right += int(votes.argmax() == plate[groups == g][0])
            total += 1
    chance = max(len(wells[p]) for p in enough) / sum(len(wells[p]) for p in enough)
    low, high = wilson_interval(right / total, total)
    told = f"{right} of {total} held-out wells ({right / total:.0%} [{low:.0%}, {high:.0%}]; chance {chance:.0%})"
    name = store.info.class_names[label]
    if low > chance:
        mend = "Scale each plate by its control wells (intensity.scale=plate, intensity.reference), and do"
        todo = "Each is scaled by its control wells already; do" if store.ingest_record().get("surveys") else mend
        return [
            Finding(
                "caution",
                f"plates look different: simple intensities of {name} cells tell the plate of {told}. {todo} not trust "
                "a direction that moves along this difference.",
            )
        ]
    return [Finding("good", f"plates look alike: intensities of {name} cells tell the plate of {told}.")]


def _intensity_features(images: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean, spread and quantiles of each channel, (n, 5 C)."""
    flat = images.reshape(*images.shape[:2], -1)
    parts = [flat.mean(2), flat.std(2), *np.quantile(flat, (0.05, 0.5, 0.95), axis=2)]
    return np.concatenate(parts, axis=1).astype(np.float64)


def _discriminant(x: NDArray, y: NDArray[np.int64], new: NDArray) -> NDArray[np.int64]:
    """Linear discriminant analysis with a little shrinkage: class numbers of ``new``."""
    centre, spread = x.mean(0), x.std(0) + 1e-9
    x, new = (x - centre) / spread, (new - centre) / spread
    labels = np.unique(y)
    means = np.stack([x[y == c].mean(0) for c in labels])
    within = x - means[np.searchsorted(labels, y)]
    inverse = np.linalg.inv(within.T @ within / len(x) + 0.05 * np.eye(x.shape[1]))
    score = new @ inverse @ means.T - 0.5 * np.einsum("cd,de,ce->c", means, inverse, means)
    return labels[score.argmax(1)]


def _leaks(store: ImageStore) -> list[Finding]:
    """Units in two parts, and units that nobody knows."""
    if not store.info.split_by:
        return [
            Finding(
                "caution",
                "no well, plate or donor is known, so images are split one by one: cells of one well may lie in two "
                "parts, and all results look better than they are. Name a column with split.by, or give read.table "
                "or read.pattern.",
            )
        ]
    pairs = np.unique(np.stack([store.groups(), store.part_numbers.astype(np.int64)]), axis=1)
    torn = int((np.bincount(pairs[0]) > 1).sum())
    unit = unit_noun(store.info.split_by)
    if torn:
        return [Finding("serious", f"{torn} {unit} lie in more than one part: split again (split.by).")]
    return [Finding("good", f"none of the {unit} lies in two parts.")]


def _duplicates(store: ImageStore) -> list[Finding]:
    """Images with the very same pixels, across parts and within them."""
    if "hash" not in store.table.column_names:
        return []
    values, inverse, count = np.unique(store.table["hash"].to_numpy(), return_inverse=True, return_counts=True)
    if (count == 1).all():
        return [Finding("good", "no image is there twice.")]
    first = np.full((len(values), 2), [len(PARTS), -1])
    np.minimum.at(first[:, 0], inverse, store.part_numbers)
    np.maximum.at(first[:, 1], inverse, store.part_numbers)
    across = int(((first[:, 0] != first[:, 1]) & (count > 1)).sum())
    twice = int((count - 1).sum())
    if across:
        return [
            Finding(
                "serious",
                f"{across} images are in two parts (the very same pixels): the test is not independent. Remove the "
                "copies from the source, or split by a column that keeps them together.",
            )
        ]
    return [Finding("caution", f"{twice} images are copies of others (the very same pixels), within one part.")]


def _sizes(store: ImageStore, counts: Counts) -> list[Finding]:
    """Imbalance, and classes with too few units."""
    names, images = store.info.class_names, counts.images.sum(axis=1)
    found = []
    if len(names) < 2:
        found.append(Finding("caution", f"there is one class only ({names[0]}): a classifier needs two."))
    elif images.max() > IMBALANCE * images.min():
        found.append(
            Finding(
                "caution",
                f"classes are uneven: {names[images.argmax()]} has {images.max():,} images, {names[images.argmin()]} "
                f"{images.min():,}. Limit the large ones with data.max_per_class, or choose classes.",
            )
        )
    unit = unit_noun(store.info.split_by)
    test = counts.units[:, PARTS.index("test")]
    absent = [names[c] for c in range(len(names)) if (counts.units[c] == 0).any()]
    few = [f"{names[c]} ({test[c]})" for c in range(len(names)) if 0 < test[c] < FEW_UNITS and names[c] not in absent]
    some = [f"{names[c]} ({test[c]})" for c in range(len(names)) if FEW_UNITS <= test[c] < SOME_UNITS]
    if absent:
        found.append(
            Finding(
                "serious",
                f"{_listed(absent)}: too few {unit} for training, validation and test. Leave these classes "
                f"out (data.classes) or add {unit}.",
            )
        )
    if few:
        found.append(
            Finding("serious", f"fewer than {FEW_UNITS} test {unit}: {_listed(few)}. No interval can be given.")
        )
    if some:
        found.append(
            Finding(
                "caution",
                f"few test {unit}: {_listed(some)}. Intervals over so few are too narrow; add {unit}.",
            )
        )
    return found


def _leaning(store: ImageStore, rejected: dict[tuple[str, str], int]) -> list[Finding]:
    """Does quality control leave out more of one class than of another?  Then it may remove the phenotype."""
    kept = np.bincount(store.labels, minlength=len(store.info.class_names))
    shares = {}
    for c, name in enumerate(store.info.class_names):
        out = sum(n for (who, why), n in rejected.items() if who == name and why != "border")
        shares[name] = out / max(1, out + int(kept[c]))
    if len(shares) < 2 or max(shares.values()) - min(shares.values()) <= LEANING:
        return []
    most, least = max(shares, key=lambda n: shares[n]), min(shares, key=lambda n: shares[n])
    return [
        Finding(
            "caution",
            f"quality control leaves out {shares[most]:.0%} of {most}, but {shares[least]:.0%} of {least}: it may "
            "remove the phenotype itself. Look at rejected.parquet, and loosen quality.*.",
        )
    ]


def _channels(store: ImageStore, images: NDArray[np.float32]) -> list[Finding]:
    """Channels that show nothing, or are cut off."""
    found = []
    for c, name in enumerate(store.info.channels):
        values = images[:, c]
        if values.std() < 1e-3:
            found.append(
                Finding("serious", f"channel {name} shows nothing (all pixels alike): leave it out with data.channels.")
            )
        elif (cut := float((values > 1 - 1e-6).mean())) > 0.02:
            found.append(
                Finding(
                    "caution",
                    f"{cut:.0%} of the pixels of channel {name} are cut off at the bright end: raise "
                    "intensity.headroom or data.window.",
                )
            )
    return found


def _listed(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
