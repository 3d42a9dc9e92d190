"""diffex: why does an image classifier decide as it does?

The public names are below; everything heavy (ray, mlflow, matplotlib) is imported where it is used.
"""

from diffex.classifier import FrozenClassifier, load_classifier
from diffex.config import Experiment, load
from diffex.data import Batch, ImageStore
from diffex.directions import DirectionSet
from diffex.errors import UserError
from diffex.explain import Attribution, Explainer
from diffex.model import Code, DiffusionAutoencoder
from diffex.pipeline import ensure, load_explainer
from diffex.store import Store
from diffex.version import __version__

__all__ = [
    "Attribution",
    "Batch",
    "Code",
    "DiffusionAutoencoder",
    "DirectionSet",
    "Experiment",
    "Explainer",
    "FrozenClassifier",
    "ImageStore",
    "Store",
    "UserError",
    "__version__",
    "ensure",
    "load",
    "load_classifier",
    "load_explainer",
]
