"""Which stains does an explanation need?  Classifier and autoencoder see a set of channels, trained anew for each.

python sweeps/channel_sweep.py                                      the simulated assay, on a laptop
python sweeps/channel_sweep.py --data crops.parquet --vary 'data.channels=["DNA", "actin", "DNA,actin"]'

A sweep looks for what works; why few channels give alike directions is asked by ablations/channels.py.
"""

import sys

from diffex.space import Levels, Range
from diffex.sweep_cli import sweep_main

SPACE = {
    "directions.lambda2": Range(0.3, 3.0, log=True),
    "directions.num_directions": Levels((4, 8)),
}
ASSAY_SPACE = {
    "data.channels": Levels(("actin", "DNA,actin", "DNA,tubulin", "DNA,tubulin,actin", "DNA,tubulin,actin,Golgi"))
}
FIRST = tuple({"data.channels": channels} for channels in ASSAY_SPACE["data.channels"].values)

if __name__ == "__main__":
    sys.exit(sweep_main("channel_sweep", SPACE, assay_space=ASSAY_SPACE, first=FIRST, trials=10, doc=__doc__))
