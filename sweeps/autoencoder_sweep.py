"""How large an autoencoder, and how fast may it learn?  Every trial trains its own: the dearest sweep.

python sweeps/autoencoder_sweep.py                                  the simulated assay, on a laptop
python sweeps/autoencoder_sweep.py --data cells.parquet --objective score   bad trials are stopped early
python sweeps/autoencoder_sweep.py --constraint 'gate.swapped>=0.8'         z must be followed, not x_T
"""

import sys

from diffex.space import Levels, Range
from diffex.sweep_cli import sweep_main

SPACE = {
    "autoencoder.code_dim": Levels((16, 32, 64, 128)),
    "autoencoder.widths": Levels(("16,32,64", "32,64,128", "48,96,192")),
    "autoencoder.encoder_widths": Levels(("16,32,64", "32,64,128")),
    "autoencoder.learning_rate": Range(3e-4, 4e-3, log=True),
}
FIRST = ({},)  # the recipe itself

if __name__ == "__main__":
    sys.exit(sweep_main("autoencoder_sweep", SPACE, first=FIRST, trials=8, doc=__doc__))
