"""How many directions, how different, how deep?  Only the directions are trained: all trials share one autoencoder.

python sweeps/direction_sweep.py                                    the simulated assay, on a laptop
python sweeps/direction_sweep.py --data cells.parquet --trials 40   own images
python sweeps/direction_sweep.py --set run.gpus=0.25                four trials on one GPU
"""

import sys

from diffex.space import Levels, Range
from diffex.sweep_cli import sweep_main

SPACE = {
    "directions.num_directions": Range(2, 16),
    "directions.tau": Range(0.1, 2.0, log=True),
    # How far a shift goes in training; the responses to it are measured again for each level.
    "directions.alpha": Levels((1.0, 2.0, 3.0)),
    "directions.lambda2": Range(0.1, 10.0, log=True),
    # One shift for all cells; one bent by the cell; a network that is free to do something else to each (published).
    "directions.kind": Levels(("fixed", "anchored", "mlp")),
    "directions.depth": Levels((1, 2, 3)),
}
FIRST = ({},)  # the recipe itself

if __name__ == "__main__":
    sys.exit(sweep_main("direction_sweep", SPACE, first=FIRST, trials=16, doc=__doc__))
