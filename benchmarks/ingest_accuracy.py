"""How true an ingest is to a screen whose every cell is known: nuclei found, light found, factors measured again.

    python benchmarks/ingest_accuracy.py [SCREEN STORE]

Writes the default simulated screen and ingests it (or takes those that are named), then compares with the truth: nuclei
at an overlap (IoU) of at least 0.5, fields in focus only; the light as root mean square of its ratio to the true one;
for each factor the rank correlation of its true value with the one feature that should say it, and the correlation with
a linear (ridge) fit of all features' ranks, fitted on half of the wells and judged on the others.  `alone` are cells
that touch no other.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import tifffile
from numpy.typing import NDArray

from diffex.cells import segment_nuclei
from diffex.config import Assay
from diffex.data import ImageStore
from diffex.data_cli import Workers
from diffex.fields import PlateSurvey, correct
from diffex.illumination import surface
from diffex.ingest import ingest
from diffex.layouts import open_screen
from diffex.profiles import write_profiles
from diffex.screen import Read, Screen
from diffex.simulate import write_screen

WELL = ["Metadata_Plate", "Metadata_Well", "Metadata_Site"]
CHANNELS = ("DNA", "tubulin", "actin")
NAMED = {
    "nucleus_area": "Nuclei_AreaShape_Area",
    "nucleus_count": "Metadata_Cells_Children_Nuclei_Count",
    "chromatin_texture": "Nuclei_Texture_Entropy_DNA_1",
    "cytoplasm_area": "Cells_AreaShape_EquivalentDiameter",
    "cell_elongation": "Cells_AreaShape_Eccentricity",
    "microtubule_density": "Nuclei_Intensity_UpperQuartileIntensity_tubulin",
    "actin_rim": "Cells_RadialDistribution_MeanFrac_actin_4of4",
    "actin_fibres": "Nuclei_Texture_Contrast_actin_3",
}


def main() -> None:
    with tempfile.TemporaryDirectory() as name, Workers(None) as run:
        if len(sys.argv) > 1:
            screen, store = map(Path, sys.argv[1:3])
        else:
            screen, store = Path(name) / "screen", Path(name) / "store"
            write_screen(Assay(), CHANNELS, screen)
            ingest(screen, Screen(), store, run=run)
        made = ImageStore(store)
        surveys = {
            s["plate"]: PlateSurvey.from_dict({k: v for k, v in s.items() if k != "plate"})
            for s in made.ingest_record()["surveys"]
        }
        nuclei(screen, surveys)
        light(screen, surveys)
        write_profiles(made, Path(name) / "features.parquet", run=run)
        factors(screen, pd.read_parquet(Path(name) / "features.parquet"))


def nuclei(screen: Path, surveys: dict[str, PlateSurvey]) -> None:
    """Recall and precision of the segmentation."""
    source = open_screen(screen, Read())
    table = pq.read_table(screen / "truth_fields.parquet").to_pandas()
    keys = zip(*(source.metadata[n].tolist() for n in WELL), strict=True)
    at = {(p, w, int(s)): row for row, (p, w, s) in enumerate(keys)}
    hits = planted = found = 0
    for field in table[~table.Out_of_focus].itertuples():
        row = at[field.Metadata_Plate, field.Metadata_Well, field.Metadata_Site]
        survey = surveys[field.Metadata_Plate]
        image = next(iter(source.images([row], 0)))[1]
        labels = segment_nuclei(correct(image, survey, Screen())[0], survey.nucleus_diameter)
        match = overlap(tifffile.imread(screen / "truth" / f"{field.Field}.tif"), labels) >= 0.5
        hits += int(match.any(axis=1).sum())
        planted, found = planted + match.shape[0], found + match.shape[1]
    print(f"nuclei: {planted:,} planted, {found:,} found, recall {hits / planted:.3f}, precision {hits / found:.3f}")


def overlap(a: NDArray, b: NDArray) -> NDArray[np.float64]:
    """Intersection over union of every label of a with every label of b."""
    names_a, a = np.unique(a, return_inverse=True)
    names_b, b = np.unique(b, return_inverse=True)
    both = np.zeros((len(names_a), len(names_b)))
    np.add.at(both, (a.ravel(), b.ravel()), 1)
    return (both / (both.sum(axis=1)[:, None] + both.sum(axis=0)[None] - both))[1:, 1:]


def light(screen: Path, surveys: dict[str, PlateSurvey]) -> None:
    """What is left of the uneven light, in percent."""
    left, before = [], []
    for plate, survey in surveys.items():
        planted = np.load(screen / "truth" / f"light_{plate}.npy")
        for c, plane in enumerate(planted):
            true = plane / plane.mean()
            left.append(np.std(surface(survey.flat[c], true.shape) / true))
            before.append(np.std(true))
    print(f"light, rms over the field: {100 * np.mean(before):.1f} % before, {100 * np.mean(left):.1f} % after "
          f"correction (worst of {len(left)} plates and channels {100 * np.max(left):.1f} %)")  # fmt: skip


def factors(screen: Path, crops: pd.DataFrame) -> None:
    """True against re-measured factors."""
    crops["Metadata_Site"] = crops.Metadata_Site.astype(int)
    cells = pq.read_table(screen / "truth.parquet").to_pandas()
    pairs = crops.reset_index().merge(cells, on=WELL, suffixes=("", "_true"))
    y, x = pairs.y - pairs.Metadata_Nuclei_Location_Center_Y, pairs.x - pairs.Metadata_Nuclei_Location_Center_X
    pairs["distance"] = np.hypot(y, x)
    pairs = pairs.loc[pairs.groupby("index").distance.idxmin()]
    print(f"crops: {len(crops):,}, of which {(pairs.distance < 6).mean():.1%} lie within 6 px of a planted cell")
    pairs = pairs[pairs.distance < 6].reset_index(drop=True)
    area = (pairs.Area_1.astype(float) + pairs.Area_2) / pairs.Nuclei
    right = (pairs.Nuclei == pairs.Metadata_Cells_Children_Nuclei_Count).mean()
    r = np.corrcoef(area, pairs.Metadata_Nuclei_AreaShape_Area)[0, 1]
    print(f"true area of nuclei: correlation {r:.3f}; number of nuclei right in {right:.1%}")
    own = ["Metadata_Nuclei_AreaShape_Area", "Metadata_Cells_Children_Nuclei_Count"]  # as the ingest saw the field
    names = [n for n in crops if n.startswith(("Nuclei_", "Cells_", "Cytoplasm_"))] + own
    features = pairs[names].fillna(pairs[names].median())
    features = features.rank().to_numpy() / len(features) - 0.5
    wells = pairs.Metadata_Plate + pairs.Metadata_Well
    half = wells.isin(np.random.default_rng(0).permutation(wells.unique())[: wells.nunique() // 2]).to_numpy()
    alone = ~pairs.Touches.to_numpy()
    print(f"{'factor':<22}{'by one feature':>16}{'alone':>8}{'by all':>8}{'alone':>8}    feature")
    for factor, feature in NAMED.items():
        true = pairs[f"Factor_{factor}"].to_numpy()
        one, every = [], []
        for some in (alone | ~alone, alone):
            one.append(pairs[feature][some].rank().corr(pd.Series(true[some], pairs.index[some]).rank()))
            x, y = features[some & half], true[some & half]
            weights = np.linalg.solve(x.T @ x + 3.0 * np.eye(x.shape[1]), x.T @ (y - y.mean()))
            every.append(np.corrcoef(features[some & ~half] @ weights, true[some & ~half])[0, 1])
        print(f"{factor:<22}{one[0]:16.3f}{one[1]:8.3f}{every[0]:8.3f}{every[1]:8.3f}    {feature}")


if __name__ == "__main__":
    main()
