"""Every setting of an experiment: frozen dataclasses, strict YAML, ``--set a.b=v``, digests.

One dotted name (``autoencoder.lambda1``) is the YAML key, the dataclass field, the ``--set`` key, the Optuna parameter,
the MLflow parameter and the column of the scoreboard.  Values are checked once, here; the rest of the library trusts
them.  ``diffex config`` prints all of this with the documentation below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from diffex.errors import UserError, did_you_mean
from diffex.settings import build, flat, read_yaml, replaced, setting

# ----------------------------------------------------------------------------------------------------------------------
# The settings


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which images, and how they are cut into training, validation and test images."""

    path: str | None = setting(None, "ingested store, folder of classes, Parquet file, ...; null: the simulated assay")
    class_column: str | None = setting(None, "metadata column that holds the class; null: the source's own")
    classes: tuple[str, ...] = setting((), "class names to use; empty: all")
    channels: tuple[str, ...] = setting((), "channels to use, by name or number; empty: all (assay: its default)")
    channel_names: tuple[str, ...] = setting((), "names of the file's channels, in order; empty: as the file says")
    size: int = setting(32, "side of the images in pixels after cropping to a square and shrinking", low=8, high=1024)
    window: tuple[float, ...] = setting(
        (), "intensities mapped to -1 and 1; empty: 0..255 for 8 bit, else the 0.1 and 99.9 % quantiles per channel"
    )
    split_by: tuple[str, ...] = setting(
        ("auto",),
        "columns whose groups stay in one part; auto: as ingested, else plate and well, donor, ...; empty: by image",
    )
    valid_fraction: float = setting(0.15, "share of the groups kept for validation", low=0.01, high=0.5)
    test_fraction: float = setting(0.20, "share of the groups kept for testing and explaining", low=0.01, high=0.5)
    max_per_class: int | None = setting(None, "at most so many images of each class, drawn at random", low=10)
    seed: int = setting(0, "seed of the split and of the drawing of images", low=0)


@dataclass(frozen=True, kw_only=True)
class Assay:
    """The simulated assay, used where ``data.path`` is null."""

    design: str = setting("binary", "named set of treatments", choices=("binary", "multiclass", "golgi", "null"))
    treatments: dict[str, dict[str, float]] = setting(
        {}, "class -> factor -> shift in standard deviations at dose 1; replaces the design where given"
    )
    doses: tuple[float, ...] = setting((1.0,), "doses given in turn to a treatment's wells", low=0.0)
    num_images: int = setting(12288, "cells in the screen", low=64)
    num_plates: int = setting(4, "plates", low=1)
    wells_per_class: int = setting(6, "wells of each class on each plate", low=1)
    well_sd: float = setting(0.15, "random effect of a well on every factor, in standard deviations", low=0.0)
    plate_sd: float = setting(0.10, "random effect of a plate on factors and gain", low=0.0)
    seed: int = setting(0, "seed of the screen", low=0)


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """The classifier to explain: a file of the user's, or a small residual network trained here."""

    path: str | None = setting(None, "TorchScript (.pt, .ts) or torch.export (.pt2) file; null: train one, or factory")
    factory: str | None = setting(None, "package.module:callable that builds the network; with classifier.weights")
    weights: str | None = setting(None, "safetensors file with the weights of the factory's network")
    class_names: tuple[str, ...] = setting((), "classes in the order of its outputs; empty: the data's, sorted")
    input_low: float = setting(-1.0, "what the network expects for the darkest value")
    input_high: float = setting(1.0, "what the network expects for the brightest value")
    input_size: int | None = setting(None, "side in pixels that it expects; null: the data's", low=8, high=2048)
    output: str = setting("logits", "what it returns", choices=("logits", "probabilities"))
    width: int = setting(24, "channels of the first level of the network trained here", low=4, high=512)
    images: int = setting(20_000, "images seen in training", low=64)
    batch_size: int = setting(64, "images a step", low=2)
    learning_rate: float = setting(2e-3, "peak learning rate of AdamW, one cycle", low=0.0)
    weight_decay: float = setting(1e-2, "weight decay of AdamW", low=0.0)
    noise: float = setting(0.03, "standard deviation of pixel noise added in training (images are in [-1, 1])", low=0.0)


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """Stage 1: the diffusion autoencoder, with its code conditioned on the classifier."""

    code_dim: int = setting(64, "d, width of the semantic code z", low=2, high=4096)
    patch: int = setting(2, "pixels folded into channels before the network (1: the published one)", low=1, high=8)
    coordinates: bool = setting(True, "tell the networks where each pixel lies (published: false)")
    standardise: bool = setting(True, "batch-normalise the encoder's output w (published: false)")
    widths: tuple[int, ...] = setting((32, 64, 128), "channels of the U-Net's levels, finest first", low=4, high=2048)
    blocks: int = setting(1, "residual blocks a level", low=1, high=8)
    attention: tuple[int, ...] = setting((), "sides of the feature maps that get self-attention", low=1)
    encoder_widths: tuple[int, ...] = setting((32, 64, 128), "channels of the encoder's levels", low=4, high=2048)
    encoder_blocks: int = setting(1, "residual blocks a level of the encoder", low=1, high=8)
    dropout: float = setting(0.0, "dropout in the U-Net", low=0.0, high=0.9)
    prediction: str = setting("v", "what the U-Net's output stands for (eps: published)", choices=("v", "eps"))
    weighting: str = setting("v", "loss weight over time: simple is eps error (published)", choices=("v", "simple"))
    images: int = setting(32_000, "images seen in training, warm-up included", low=32)
    warmup_fraction: float = setting(0.8, "share trained without classifier term; trials share it", low=0.0, high=1.0)
    batch_size: int = setting(32, "images a step", low=2)
    learning_rate: float = setting(2e-3, "peak learning rate of Adam; linear rise, cosine fall", low=0.0)
    beta2: float = setting(0.99, "second-moment decay of Adam", low=0.5, high=0.9999)
    clip: float = setting(1.0, "largest norm of the gradient", low=0.0)
    ema: float = setting(0.9995, "decay of the averaged weights a step (shorter at the start)", low=0.0, high=0.99999)
    flips: bool = setting(False, "mirror images at random")
    lambda1: float = setting(3.0, "weight of the classifier term KL(p(x) || p(x_hat))", low=0.0)
    classifier_term: str = setting(
        "one_step", "x_hat: the one-step estimate, or from the last DDIM steps", choices=("one_step", "truncated")
    )
    truncated_steps: int = setting(2, "DDIM steps that the truncated term differentiates through", low=1, high=20)

    @property
    def whole_images(self) -> int:
        """Images of the whole training: full batches of them."""
        return self.images - self.images % self.batch_size

    @property
    def warmup_images(self) -> int:
        """Images of the warm-up, which does not depend on lambda1: trials branch from its end."""
        warm = int(self.whole_images * self.warmup_fraction)
        return warm - warm % self.batch_size


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """How a trained autoencoder turns images into x_T and back; changing this trains nothing anew."""

    inversion: str = setting("fixed_point", "ddim is the published one", choices=("fixed_point", "ddim"))
    iterations: int = setting(6, "fixed-point iterations a step", low=1, high=50)
    encode_steps: int = setting(50, "T_encode of the published inversion", low=1, high=1000)
    steps: int = setting(10, "T_render, DDIM steps of rendering (and of fixed-point inversion)", low=2, high=1000)
    spacing: str = setting("quadratic", "times of those steps (uniform: published)", choices=("uniform", "quadratic"))


@dataclass(frozen=True, kw_only=True)
class Directions:
    """Stage 2: K directions in the code."""

    num_directions: int = setting(8, "K", low=1, high=1000)
    kind: str = setting(
        "anchored", "D_k(z): mlp is published; anchored bends one shift", choices=("anchored", "mlp", "linear", "fixed")
    )
    depth: int = setting(2, "layers of the mlp (published: 3)", low=1, high=8)
    space: str = setting("whitened", "where they live; raw is published", choices=("whitened", "standardised", "raw"))
    explained_variance: float = setting(0.99, "variance of z that the whitened subspace holds", low=0.1, high=1.0)
    features: str = setting(
        "image", "what the projector sees of a shift: the code (published) or its image", choices=("code", "image")
    )
    alpha: float = setting(2.0, "length of a shift in training, in standard deviations (raw: units of z)", low=1e-6)
    tau: float = setting(0.5, "factor of the similarity in the contrastive loss", low=1e-6)
    signed: bool = setting(True, "a direction pushes all images the same way; published: false")
    lambda2: float = setting(1.0, "weight of the covariance regularisation", low=0.0)
    covariance: str = setting(
        "image", "what is decorrelated: change maps, unit shifts, projected features, or as in the reference code",
        choices=("image", "shifts", "features", "published"),
    )  # fmt: skip
    lambda3: float = setting(0.3, "weight of the largest share of the classifier's change (published: 0)", low=0.0)
    response_images: int = setting(192, "images around which the image's response is measured", low=8)
    images: int = setting(12_000, "codes seen in training", low=16)
    batch_size: int = setting(32, "codes a step", low=4)
    learning_rate: float = setting(3e-3, "learning rate of Adam", low=0.0)
    weight_decay: float = setting(1e-3, "weight decay of Adam", low=0.0)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Stage 3: the effects table and the ranking made from it."""

    source: str | None = setting(None, "class whose images are edited; null: the control (two classes) or every class")
    target: str | None = setting(None, "class to be reached; null: the other one, or every other one in turn")
    num_images: int = setting(56, "images edited of each source class", low=2)
    alphas: tuple[float, ...] = setting(
        (), "shift lengths in standard deviations, both signs, to be tried besides the reference length", low=1e-6
    )
    top: int = setting(5, "directions to report, M", low=1)
    order: str = setting("effect", "by effect on all images; greedy: AttFind (published)", choices=("effect", "greedy"))
    explained_at: float | None = setting(None, "greedy: effect that explains an image; null: the mean effect", low=0.0)
    confidence: float = setting(0.95, "level of the intervals", low=0.5, high=0.999)
    bootstrap: int = setting(1000, "bootstrap draws (of wells where there are wells)", low=50)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the scoreboard measures, and on how many images."""

    num_images: int = setting(64, "test images for reconstruction and for the conditioning gate", low=4)
    random_directions: int = setting(24, "random directions of the null", low=1)
    baselines: tuple[str, ...] = setting(
        ("class_mean",), "directions to set beside the learned ones", choices=("class_mean", "linear", "principal")
    )
    ruler_images: int = setting(16_000, "images the factor regressor is trained on (assay only)", low=64)
    witness_images: int = setting(6_000, "images an independent classifier, the witness, is trained on", low=64)
    witness_width: int = setting(16, "channels of the witness's first level", low=4, high=512)
    robust_images: int = setting(2_500, "images of the adversarial training of a robust counterpart", low=64)
    epsilon: float = setting(0.06, "largest change of a pixel in attacks (images are in [-1, 1])", low=1e-4, high=1.0)
    real_images: int = setting(96, "held-out images of each class whose cells are measured", low=8)
    cell_features: str = setting(
        "core", "features of cells: diffex's own, or CellProfiler's full set (diffex[cells])", choices=("core", "full")
    )
    nucleus_channel: str | None = setting(None, "channel that shows nuclei; null: told by its name")
    cell_channel: str | None = setting(None, "channel that shows whole cells; null: all but the nuclei's")
    audited: int = setting(5, "directions whose way is followed and audited (one of every pair at least)", low=1)
    followed_images: int = setting(16, "images on which that is done", low=4)
    steps: int = setting(4, "steps on the way to the reference length", low=2, high=64)
    replicas: int = setting(2, "times the directions are trained again, for their stability", low=1, high=20)
    lpips: str | None = setting(
        None, "real LPIPS beside the witness's distance: path of ST-LPIPS' AlexNet weights, or lpips (the package)"
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where and how things run; only seed, precision and accumulate decide what comes out."""

    seed: int = setting(0, "seed of every training", low=0)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    precision: str = setting("auto", "auto: bf16 where the device has it", choices=("auto", "bf16", "fp32"))
    workers: int = setting(1, "processes that train one model, and render its effects, together", low=1, high=4096)
    min_workers: int | None = setting(None, "elastic: go on with so few while nodes are missing; null: all", low=1)
    cpus: int | None = setting(None, "CPUs (threads) of a worker; null: its share of the machine", low=1, high=1024)
    gpus: float | None = setting(
        None, "GPUs of a worker; 0.25: four share one (sweeps of directions); null: 1 where there are any",
        low=0.0, high=1.0,
    )  # fmt: skip
    accumulate: int = setting(1, "parts in which a worker takes its share of a batch, to save memory", low=1)
    checkpoint_seconds: float = setting(20.0, "time between checkpoints of a training", low=0.0)
    failures: int = setting(3, "times that a training is started again after a lost worker", low=0)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """All settings of one experiment.  Build it with ``load``; derive others with ``with_settings``."""

    data: Data = Data()
    assay: Assay = Assay()
    classifier: Classifier = Classifier()
    autoencoder: Autoencoder = Autoencoder()
    rendering: Rendering = Rendering()
    directions: Directions = Directions()
    ranking: Ranking = Ranking()
    evaluation: Evaluation = Evaluation()
    run: Run = Run()

    def __post_init__(self) -> None:
        _cross_check(self)

    def with_settings(self, settings: Mapping[str, Any]) -> Experiment:
        """A copy with dotted settings replaced, e.g. ``{"autoencoder.lambda1": 0.1}``.

        Raises:
            UserError: an unknown name (the message names the nearest valid one) or a value out of range.
        """
        return replaced(self, settings)


# ----------------------------------------------------------------------------------------------------------------------
# Checks that need more than one setting


def _cross_check(e: Experiment) -> None:
    a, c, d = e.autoencoder, e.classifier, e.directions
    for name, widths in (("widths", a.widths), ("encoder_widths", a.encoder_widths)):
        multiple = a.patch * 2 ** (len(widths) - 1)
        if not widths:
            raise UserError(f"autoencoder.{name} is empty: give the channels of at least one level")
        if e.data.size % multiple:
            raise UserError(
                f"data.size = {e.data.size} can't be halved for every level: with autoencoder.patch = {a.patch} and "
                f"{len(widths)} autoencoder.{name} it must be a multiple of {multiple}"
            )
    if len([x for x in (c.path, c.factory) if x]) == 2:
        raise UserError("give classifier.path or classifier.factory, not both")
    if bool(c.factory) != bool(c.weights):
        raise UserError("classifier.factory and classifier.weights go together: a callable and a safetensors file")
    if c.input_low >= c.input_high:
        raise UserError(f"classifier.input_low = {c.input_low} must lie below classifier.input_high = {c.input_high}")
    if e.data.window and (len(e.data.window) != 2 or e.data.window[0] >= e.data.window[1]):
        raise UserError(f"data.window = {list(e.data.window)} must be two numbers, the lower first, or empty")
    if e.data.valid_fraction + e.data.test_fraction > 0.8:
        raise UserError("data.valid_fraction + data.test_fraction leave less than a fifth of the groups for training")
    if d.space == "raw" and (d.features == "image" or d.covariance == "image" or d.lambda3 > 0):
        raise UserError(
            "directions.space = raw is the published form and goes with directions.features = code, "
            "directions.covariance = shifts, features or published, and directions.lambda3 = 0"
        )
    if d.num_directions < 2 and d.lambda2 > 0:
        raise UserError("directions.num_directions = 1 has nothing to decorrelate: set directions.lambda2=0")
    if len(set(e.data.classes)) != len(e.data.classes) or len(e.data.classes) == 1:
        raise UserError(f"data.classes = {list(e.data.classes)}: name two or more different classes, or none for all")
    if len(set(e.data.channels)) != len(e.data.channels):
        raise UserError(f"data.channels = {list(e.data.channels)} names a channel twice")
    if e.run.min_workers is not None and e.run.min_workers > e.run.workers:
        raise UserError(f"run.min_workers = {e.run.min_workers} is more than run.workers = {e.run.workers}")
    smallest = min(c.batch_size, a.batch_size, d.batch_size)
    if e.run.workers * e.run.accumulate > smallest:
        raise UserError(
            f"run.workers = {e.run.workers} times run.accumulate = {e.run.accumulate} is more than the smallest batch "
            f"has images ({smallest}): use fewer workers, or larger batches"
        )
    if e.ranking.source is not None and e.ranking.source == e.ranking.target:
        raise UserError(f"ranking.source and ranking.target are both {e.ranking.source!r}")


def idle_settings(e: Experiment) -> list[str]:
    """Warnings, one line each, for settings that differ from their default but have no effect in this experiment."""
    default, mine = flat(Experiment()), flat(e)
    warnings: list[str] = []

    def idle(names: Iterator[str] | list[str], why: str) -> None:
        warnings.extend(f"{n} = {mine[n]!r} has no effect: {why}" for n in names if mine[n] != default[n])

    if e.data.path is not None:
        idle([n for n in mine if n.startswith("assay.")], "data.path is set, the assay is not used")
    else:
        idle(["data.window", "data.channel_names"], "the simulated assay needs none")
    if e.assay.treatments:
        idle(["assay.design"], "assay.treatments replaces it")
    if e.classifier.path or e.classifier.factory:
        trained = ("width", "images", "batch_size", "learning_rate", "weight_decay", "noise")
        idle([f"classifier.{n}" for n in trained], "the classifier is given, not trained")
    else:
        given = ("class_names", "input_low", "input_high", "input_size", "output")
        idle([f"classifier.{n}" for n in given], "the classifier is trained here")
    if e.rendering.inversion == "fixed_point":
        idle(["rendering.encode_steps"], "fixed-point inversion runs on the rendering's own steps")
    else:
        idle(["rendering.iterations"], "rendering.inversion = ddim does not iterate")
    if e.autoencoder.classifier_term == "one_step" or e.autoencoder.lambda1 == 0:
        idle(["autoencoder.truncated_steps"], "the classifier term is not the truncated one")
    if e.directions.space != "whitened":
        idle(["directions.explained_variance"], f"directions.space = {e.directions.space} keeps every dimension")
    if e.ranking.order == "effect":
        idle(["ranking.explained_at"], "ranking.order = effect needs no threshold")
    if e.directions.kind in ("linear", "fixed"):
        idle(["directions.depth"], f"directions.kind = {e.directions.kind} has one layer")
    return warnings


# ----------------------------------------------------------------------------------------------------------------------
# Files


def from_dict(tree: Mapping[str, Any]) -> Experiment:
    """Build an experiment from nested dictionaries; missing settings keep their defaults.

    Raises:
        UserError: an unknown key (with the nearest valid one), a wrong type, a value out of range.
    """
    return build(Experiment, tree)


def load(recipe: str | Path = "assay", settings: Mapping[str, Any] | None = None) -> Experiment:
    """Load a recipe by name or file, then replace settings.

    Args:
        recipe: name of a recipe that comes with diffex (see ``recipes()``), or path of a YAML file.
        settings: dotted settings that win over the recipe.

    Raises:
        UserError: no such recipe, not YAML, unknown or impossible settings.
    """
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"there is no recipe file {str(path)!r}")
        text = path.read_bytes()  # YAML finds the encoding
    elif str(recipe) in recipes():
        text = (resources.files("diffex") / "recipes" / f"{recipe}.yaml").read_bytes()
    else:
        raise UserError(f"unknown recipe {str(recipe)!r}: {did_you_mean(str(recipe), recipes())} or give a .yaml file")
    experiment = from_dict(read_yaml(text, f"recipe {str(recipe)!r}"))
    return experiment.with_settings(settings) if settings else experiment


def recipes() -> tuple[str, ...]:
    """Names of the recipes that come with diffex."""
    folder = resources.files("diffex") / "recipes"
    return tuple(sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")))
