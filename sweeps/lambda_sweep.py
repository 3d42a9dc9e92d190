"""How do lambda1, lambda2, the number of directions and the channels decide an explanation?

python sweeps/lambda_sweep.py                                       the simulated assay, on a laptop
python sweeps/lambda_sweep.py --data cells.parquet --trials 24      own images
"""

import sys

from diffex.space import Levels, Range
from diffex.sweep_cli import sweep_main

SPACE = {
    # The classifier term.  A few levels, not a range: trials at the same level share one trained autoencoder.
    "autoencoder.lambda1": Levels((0.0, 3.0)),
    # Decorrelation against the other two terms of stage 2: at 0.1 directions repeat each other, at 10 it rules alone.
    "directions.lambda2": Range(0.1, 10.0, log=True),
    "directions.num_directions": Levels((4, 6, 8)),
}
# Which stains classifier and autoencoder see; for own images, say --vary 'data.channels=["DNA,actin", "DNA"]'.
ASSAY_SPACE = {"data.channels": Levels(("DNA,tubulin,actin", "DNA,actin"))}
FIRST = (
    {},  # the recipe itself
    {"data.channels": "DNA,actin"},
    {"autoencoder.lambda1": 0.0},
)

if __name__ == "__main__":
    sys.exit(sweep_main("lambda_sweep", SPACE, assay_space=ASSAY_SPACE, first=FIRST, trials=6, doc=__doc__))
