"""Why are the directions of a two-channel set all alike: few channels, or few things to see in them?

python ablations/channels.py                                         the simulated assay: both explanations apart
python ablations/channels.py --data cells.parquet                    own images: all subsets of their channels
python ablations/channels.py --dry-run                               cells, seeds, decision rule, number of trainings
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np

from diffex import assay
from diffex.ablation import Ablation, Cell, Claim, Rows, correlation, slopes
from diffex.ablation_run import ablation_main
from diffex.config import Experiment
from diffex.data import RECORD, ImageStore
from diffex.errors import UserError
from diffex.layouts import open_source

QUESTION = (
    "On a set of two channels (Golgi, DNA) all directions of the published method showed the same phenotype. Because "
    "there are few channels, or because those channels show few of the things that the treatment changes?"
)
RANK = "directions.effective_rank"
CHANNELS, FACTORS = "channels", "planted factors shown"

SETS = (
    # The default design moves nucleus, cytoplasm, microtubules and actin rim.  Which channel shows what is taken from
    # the renderer (`shown`): tubulin also shows the nucleus, as a hole, and Golgi also shows how large the cell is.
    # 1 channel: as few as there can be, with one planted factor, and with three.
    ("DNA",),
    ("tubulin",),
    # 2 channels, as in the paper: with two, three and four planted factors.  If channels alone counted, these three
    # would be alike.  The first is the paper's pair; the second adds a channel to tubulin and no planted factor.
    ("DNA", "Golgi"),
    ("tubulin", "Golgi"),
    ("tubulin", "actin"),
    # 3 channels, with exactly the planted factors of the three sets above: if factors alone counted, each would be like
    # its smaller twin.  The last is the assay's default, and BBBC021's stains.
    ("DNA", "Golgi", "mitochondria"),
    ("DNA", "tubulin", "Golgi"),
    ("DNA", "tubulin", "actin"),
)
SEEN = 3.0  # of one standard deviation of a factor, in standard deviations of the camera's noise over a whole image


def build(base: Experiment) -> Ablation:
    """The ablation of an experiment: on the assay it sets two explanations against each other."""
    return of_assay(base) if base.data.path is None else of_images(base)


# ----------------------------------------------------------------------------------------------------------------------
# The simulated assay


def of_assay(base: Experiment) -> Ablation:
    """Channel sets in which the number of channels and of planted factors shown differ."""
    treatments = base.assay.treatments or assay.DESIGNS[base.assay.design]
    moved = {f for shifts in treatments.values() for f, shift in shifts.items() if shift != 0}
    seen = shown(base.data.size)
    cells: dict[str, Cell] = {}
    without: list[str] = []
    first: dict[tuple[str, ...], str] = {}  # planted factors -> the cell that shows them in the fewest channels
    for channels in SETS:
        name = "+".join(channels)
        visible = [f for f in assay.FACTORS if any(f in seen[c] for c in channels)]
        planted = tuple(f for f in visible if f in moved)
        if not planted:
            without.append(name)
            continue
        decoys = f"and {len(visible) - len(planted)} decoys"
        if first.setdefault(planted, name) == name:
            why = f"shows {', '.join(planted).replace('_', ' ')}, {decoys}"
        else:
            why = f"the planted factors of {first[planted]} in more channels, {decoys}"
        x = {CHANNELS: len(channels), FACTORS: len(planted)}
        cells[name] = Cell(settings={"data.channels": ",".join(channels)}, x=x, why=why)
    alike = correlation(cells, CHANNELS, FACTORS) if len(cells) > 2 else float("nan")
    if not abs(alike) < 0.8:
        raise UserError(
            f"with these treatments the channel sets can't tell channels and factors apart (correlation {alike:.2f}): "
            "choose another assay.design, or treatments that move more factors"
        )
    note = (
        "A factor is a property of the simulated cells; those that the treatment moves are planted, all others decoys. "
        f"Over the cells, the numbers of channels and of planted factors have a correlation of {alike:.2f}."
    )
    return Ablation(
        name="channels", question=QUESTION, base=base, cells=cells,
        hypothesis="Directions are alike where the channels show few of the factors that the treatment moves; the "
        "number of channels matters less.",
        claims=(
            Claim(
                words="one more planted factor makes directions more different, at equal channels",
                unit="effective rank per factor", statistic=lambda rows: separate(rows)[FACTORS],
            ),
            Claim(
                words="one more planted factor does more than one more channel",
                unit="effective rank per factor less that per channel",
                statistic=lambda rows: separate(rows)[FACTORS] - separate(rows)[CHANNELS],
            ),
        ),
        measures={
            RANK: "how many different effects the directions have (effective rank)",
            "recovery.recall": "share of planted factors found (recall of the top directions)",
        },
        notes=(note, *(f"{name} shows nothing that the treatment moves, and is left out." for name in without)),
    )  # fmt: skip


def separate(rows: Rows) -> Mapping[str, float]:
    """What one more channel, and one more factor, adds to the effective rank while the other stays."""
    return slopes(rows, RANK, (CHANNELS, FACTORS))


def shown(size: int) -> dict[str, tuple[str, ...]]:
    """Factors that each channel of the assay really shows: those that move its pixels out of the camera's noise.

    A factor is moved by one standard deviation (a count by one) in 64 cells, all else equal, and the noise-free change
    of each channel compared with the noise of its pixels: the detectability of an ideal observer.  It is 24 and more,
    or 0, so that the limit hardly matters.

    Args:
        size: side of the images in pixels.

    Returns:
        channel -> names of factors.
    """
    p = assay.plan(
        treatments={"none": {"nucleus_area": 0.0}}, channels=assay.CHANNELS, num_images=64, num_plates=1,
        wells_per_class=2,
    )  # fmt: skip
    index = np.arange(len(p))

    def planes(column: int, score: np.ndarray) -> np.ndarray:
        scores = p.scores.copy()
        scores[:, column] = score
        return assay.scene(replace(p, scores=scores), size, index).planes

    found: dict[str, tuple[str, ...]] = dict.fromkeys(assay.CHANNELS, ())
    for j, (name, factor) in enumerate(assay.FACTORS.items()):
        middle = factor.threshold if factor.threshold is not None else p.scores[:, j]
        low, high = planes(j, middle - 0.5), planes(j, middle + 0.5)
        noise = np.sqrt(1.5e-4 + 4e-4 * np.maximum(low, 0.0))  # as the renderer adds it
        change = np.sqrt((((high - low) / noise) ** 2).sum(axis=(2, 3)))
        for c, channel in enumerate(assay.CHANNELS):
            if np.median(change[:, c]) > SEEN:
                found[channel] += (name,)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Own images


def of_images(base: Experiment) -> Ablation:
    """Subsets of the images' channels; nobody knows their factors, so only the number of channels can be told."""
    channels = channels_of(base)
    if len(channels) < 2:
        raise UserError(f"{base.data.path!r} has one channel ({channels[0]}); this ablation needs two or more")
    sizes = range(1, len(channels) + 1) if len(channels) <= 3 else (1, len(channels) - 1, len(channels))
    cells = {
        "+".join(chosen): Cell(settings={"data.channels": ",".join(chosen)}, x={CHANNELS: len(chosen)})
        for size in sizes
        for chosen in combinations(channels, size)
    }
    return Ablation(
        name="channels", question=QUESTION, base=base, cells=cells, varied=("run.seed", "data.seed"),
        hypothesis="Directions are alike where there are few channels: more channels, more different directions.",
        claims=(
            Claim(
                words="one more channel makes directions more different", unit="effective rank per channel",
                statistic=lambda rows: slopes(rows, RANK, (CHANNELS,))[CHANNELS],
            ),
        ),
        measures={
            RANK: "how many different effects the directions have (effective rank)",
            "disentanglement": "how different the pixels are that the top directions change",
        },
        notes=(
            "Which factors the channels show is not known for real images, so more channels may only mean more to see: "
            "the simulated assay tells the two apart.",
        ),
    )  # fmt: skip


def channels_of(base: Experiment) -> tuple[str, ...]:
    """Names of the channels of an experiment's images.

    Raises:
        UserError: the images do not tell them, and no setting does.
    """
    if base.data.channels:
        return base.data.channels
    if base.data.channel_names:
        return base.data.channel_names
    path = Path(str(base.data.path))
    names = ImageStore(path).info.channels if (path / RECORD).is_file() else open_source(base.data, base.assay).channels
    if names is None:
        raise UserError("the images do not say what their channels are called: --set data.channel_names='[DNA, actin]'")
    return names


if __name__ == "__main__":
    sys.exit(ablation_main("channels", build, doc=__doc__))
