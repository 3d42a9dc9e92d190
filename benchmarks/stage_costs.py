"""What the operations of the cost model (diffex/costs.py) take on this machine: seconds an item, and memory.

    python benchmarks/stage_costs.py --out benchmarks/results/NAME.json

Networks of the recipes, at their own sizes, on random images in a real image store; each figure is the median of the
calls within --seconds, after a warm-up.  Measurements come in order of importance and stop at --limit seconds; one
that fails (out of memory, say) leaves its error in its row.  Rows of the result:

    recipe, operation, precision, batch   what was measured: an item is an image (directions.*: a code; checkpoint.*,
                                          entry.*: one of them)
    seconds, low, high, calls             median and quartiles of seconds an item, and how many calls they are from
    peak_bytes                            most memory that torch held on a GPU meanwhile

``together`` has the steps a second of 1, 2 and 4 processes that train directions on one device at the same time.
Needs torch, numpy, pyarrow, pyyaml, safetensors, scipy, scikit-image and scikit-learn; neither ray nor mlflow.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from diffex import assay, train
from diffex.cells import compartments
from diffex.classifier import FrozenClassifier
from diffex.compute import Compute
from diffex.config import Experiment, load
from diffex.data import ImageStore, ShardWriter, StoreInfo, index_columns, write_index
from diffex.diffusion import Schedule
from diffex.directions import Responses
from diffex.features import measure_many
from diffex.model import DiffusionAutoencoder
from diffex.networks import ResidualClassifier
from diffex.store import Store

CHANNELS = {"assay": 3, "bbbc021": 3, "golgi": 2, "ffhq": 3}
RANKS = {"assay": (17,)}  # of the code's subspace, as measured; at the paper's scale it is not known: two guesses
GUESSED = (64, 256)
IMAGES = 512
PROCESSES = (1, 2, 4)


class Bench:
    """Measures one thing after the other until the time is up.

    Args:
        device: cpu, cuda, ...
        seconds: of each measurement.
        limit: seconds in all.
        folder: for files.
    """

    def __init__(self, device: str, seconds: float, limit: float, folder: Path) -> None:
        self.device, self.seconds, self.folder = device, seconds, folder
        self.rows: list[dict[str, Any]] = []
        self.began, self.limit = time.monotonic(), limit

    @property
    def left(self) -> float:
        return self.limit - (time.monotonic() - self.began)

    def measure(
        self, prepare: Callable[[], Callable[[], object]], items: int, *, needs: float = 0.0, **about: Any
    ) -> None:
        """Time what ``prepare`` returns, ``items`` of them a call; ``needs`` seconds must be left for it."""
        row: dict[str, Any] = dict(about)
        self.rows.append(row)
        cuda = self.device.startswith("cuda")
        if self.left < max(needs, 2 * self.seconds):
            row["error"] = "left out: no time left"
            return
        try:
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            run = prepare()
            calls = self._calls(run)
            q = np.quantile(calls, [0.25, 0.5, 0.75]) / items
            row |= {"seconds": float(q[1]), "low": float(q[0]), "high": float(q[2]), "calls": len(calls)}
            if cuda:
                row["peak_bytes"] = torch.cuda.max_memory_allocated()
        except Exception as error:  # whatever it is, the other figures are worth having
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        print(json.dumps(row), flush=True)

    def _calls(self, run: Callable[[], object]) -> list[float]:
        def once() -> float:
            began = time.perf_counter()
            run()
            if self.device.startswith("cuda"):
                torch.cuda.synchronize()
            return time.perf_counter() - began

        first = once()  # with whatever is compiled, tuned or allocated
        if first > 5 * self.seconds:
            return [first]
        once()
        calls: list[float] = []
        until = time.perf_counter() + self.seconds
        while not calls or time.perf_counter() < until:
            calls.append(once())
        return calls


# ----------------------------------------------------------------------------------------------------------------------
# What is measured


@cache
def image_store(folder: Path, channels: int, size: int) -> ImageStore:
    """A store of random images, all for training."""
    home = folder / f"images-{channels}-{size}"
    home.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    writer = ShardWriter(home / "images.arrow", np.dtype(np.uint8), (channels, size, size))
    for _ in range(IMAGES):
        writer.add(rng.integers(0, 256, (channels, size, size), np.uint8))
    writer.close()
    columns = index_columns(np.arange(IMAGES) % 2, np.zeros(IMAGES, np.int64))
    write_index(home / "index.arrow", iter([pa.table(columns)]))
    StoreInfo(
        channels=tuple(map(str, range(channels))), class_names=("control", "treated"), size=size, dtype="uint8",
        window=((0.0, 255.0),) * channels, count=IMAGES, source="random", split_by=(), simulated=False,
        shards=(("images.arrow", IMAGES),), depth=channels,
    ).write(home)  # fmt: skip
    return ImageStore(home)


class Recipe:
    """A recipe's networks and trainings on a device, at a precision."""

    def __init__(self, bench: Bench, name: str, precision: str, **settings: Any) -> None:
        self.bench, self.name = bench, name
        recipe, _, size = name.partition("@")
        dotted = {key.replace("__", "."): value for key, value in settings.items()} | (
            {"data.size": int(size)} if size else {}
        )
        self.e: Experiment = load(recipe, {"run.device": bench.device, "run.precision": precision, **dotted})
        self.compute = Compute.resolve(self.e.run)
        self.channels, self.size = CHANNELS[recipe], self.e.data.size

    @property
    def about(self) -> dict[str, Any]:
        return {"recipe": self.name, "precision": "bf16" if self.compute.bf16 else "fp32"}

    def images(self) -> ImageStore:
        return image_store(self.bench.folder, self.channels, self.size)

    def autoencoder(self) -> DiffusionAutoencoder:
        with self.compute.device:  # drawing 100 million weights on a CPU would take longer than the measurement
            model = DiffusionAutoencoder(
                self.e.autoencoder, self.e.rendering, channels=self.channels, size=self.size, num_classes=2,
                compute=self.compute,
            )  # fmt: skip
        model.schedule = Schedule.linear()
        return model

    def network(self, width: int | None = None) -> ResidualClassifier:
        return ResidualClassifier(self.channels, 2, width=width or self.e.classifier.width).to(self.compute.device)

    def noise(self, batch: int) -> Tensor:
        return torch.randn(batch, self.channels, self.size, self.size, device=self.compute.device).clamp_(-1, 1)

    def measure(self, operation: str, prepare: Callable[[], Callable[[], object]], batch: int, **more: Any) -> None:
        self.bench.measure(prepare, batch, **self.about, operation=operation, batch=batch, **more)

    # ------------------------------------------------------------------------------------------------------------------

    def forward(self, batch: int, **more: Any) -> None:
        def prepare() -> Callable[[], object]:
            model, x = self.autoencoder().eval().requires_grad_(False), self.noise(batch)
            t = torch.full((batch,), 500, device=self.compute.device)
            z = torch.randn(batch, self.e.autoencoder.code_dim, device=self.compute.device)
            return lambda: model.denoise(x, t, z)

        self.measure("unet.forward", prepare, batch, **more)

    def encoder(self, batch: int, **more: Any) -> None:
        def prepare() -> Callable[[], object]:
            model, x = self.autoencoder().eval().requires_grad_(False), self.noise(batch)
            probs = torch.full((batch, 2), 0.5, device=self.compute.device)
            return lambda: model.semantic(x, probs)

        self.measure("encoder.forward", prepare, batch, **more)

    def render(self, batch: int, **more: Any) -> None:
        """A whole rendering, to compare with that many evaluations."""

        def prepare() -> Callable[[], object]:
            model, x = self.autoencoder().eval().requires_grad_(False), self.noise(batch)
            z = torch.randn(batch, self.e.autoencoder.code_dim, device=self.compute.device)
            return lambda: model.decode(z, x)

        steps = self.autoencoder().render_evaluations
        self.measure("rendering", prepare, batch, evaluations=steps, **more)

    def stage_1(self, *, term: bool = False) -> train.AutoencoderTask:
        store = self.images()
        frozen = FrozenClassifier(self.network(), store.info.class_names).to(self.compute.device)
        probs = torch.full((len(store), 2), 0.5)
        return train.AutoencoderTask(
            self.autoencoder(), self.autoencoder(), store, probs, frozen, lambda1=float(term), seed=0
        )

    def training(self, *, term: bool = False, **more: Any) -> None:
        """A step of stage 1 as it is, reading of images included, without or with the classifier term."""

        def prepare() -> Callable[[], object]:
            task = self.stage_1(term=term)
            return partial(task.step, task.warmup_images if term else 0)

        name = "autoencoder.step with term" if term else "autoencoder.step"
        self.measure(name, prepare, self.e.autoencoder.batch_size, **more)

    def classifiers(self) -> None:
        widths = {"classifier": self.e.classifier.width, "witness": self.e.evaluation.witness_width}
        batch = self.e.classifier.batch_size

        def forward(width: int) -> Callable[[], object]:
            frozen, x = FrozenClassifier(self.network(width), ("a", "b")), self.noise(256)
            return lambda: frozen.probabilities(x)

        def gradient(width: int) -> Callable[[], object]:
            frozen, x = FrozenClassifier(self.network(width), ("a", "b")), self.noise(batch).requires_grad_()
            return lambda: torch.autograd.grad(frozen(x).sum(), x)

        def training(width: int) -> Callable[[], object]:
            store, network = self.images(), self.network(width)
            task = train.SupervisedTask(
                "classifier", network, store, train.classification_loss(torch.tensor(store.labels)), self.e.classifier,
                images=10 * batch, compute=self.compute, seed=0,
            )  # fmt: skip
            return partial(task.step, 0)

        for name, width in widths.items():
            self.measure(f"{name}.training", partial(training, width), batch)
            self.measure(f"{name}.forward", partial(forward, width), 256)
            self.measure(f"{name}.gradient", partial(gradient, width), batch)

    def directions(self, rank: int) -> train.DirectionsTask:
        s, device = self.e.directions, self.compute.device
        n, side = min(s.response_images, 256), min(16, self.size)  # the number of images doesn't matter to a step
        torch.manual_seed(0)
        image = torch.randn(n, self.channels * side * side, rank, device=device)
        responses = Responses(image, torch.randn(n, 2, rank, device=device))
        return train.DirectionsTask(s, torch.randn(n, rank, device=device), responses, seed=0)

    def direction_steps(self) -> None:
        for rank in RANKS.get(self.name, GUESSED):

            def prepare(rank: int = rank) -> Callable[[], object]:
                task = self.directions(rank)
                return partial(task.step, 0)

            self.measure("directions.training", prepare, self.e.directions.batch_size, rank=rank)

    def checkpoints(self, **more: Any) -> None:
        """Writing and reading a checkpoint of stage 1."""
        file = self.bench.folder / f"{self.name}-checkpoint.safetensors"

        def write() -> Callable[[], object]:
            task = self.stage_1()
            return lambda: train.save_checkpoint(task, file, 0, [])

        def read() -> Callable[[], object]:
            task = self.stage_1()
            return lambda: train.load_checkpoint(task, file)

        self.measure("checkpoint.write", write, 1, **more)
        if file.is_file():
            self.measure("checkpoint.read", read, 1, bytes=file.stat().st_size, **more)
            file.unlink()


def reading(bench: Bench, size: int, batch: int) -> None:
    """Shuffled batches of an image store, in the page cache, to the device as float32."""

    def prepare() -> Callable[[], object]:
        store, rng = image_store(bench.folder, 3, size), np.random.default_rng(0)
        return lambda: store.batch(rng.permutation(IMAGES)[:batch], bench.device)

    bench.measure(prepare, batch, operation="image.read", size=size, batch=batch)


def cells(bench: Bench, size: int) -> None:
    """Drawing and measuring simulated cells: on the CPU, whatever else there is."""
    names = assay.DEFAULT_CHANNELS
    plan = assay.plan(treatments=assay.DESIGNS["binary"], channels=names, num_images=64)
    some = next(iter(assay.draw(plan, size, range(8)))).astype(np.float32) / 255
    runs: dict[str, Callable[[], object]] = {
        "image.draw": lambda: list(assay.draw(plan, size, range(8))), "cell.measure": lambda: measure_many(some, names),
        "cell.mask": lambda: [compartments(image, names, None, None, None) for image in some],
    }  # fmt: skip
    for operation, run in runs.items():
        bench.measure(lambda run=run: run, 8, operation=operation, size=size, batch=8)  # type: ignore[misc]


def entries(bench: Bench, size: int) -> None:
    """Writing an entry of the stage store with one file of so many bytes, its digest included."""
    store, content, number = Store(bench.folder / "store"), bytes(size), 0

    def run() -> None:
        nonlocal number
        number += 1
        store.compute("bench", f"{size}-{number}", lambda out: {"bytes": (out / "file").write_bytes(content)})

    bench.measure(lambda: run, 1, operation="entry.write", bytes=size, batch=1)


def together(bench: Bench, recipe: str, rank: int) -> list[dict[str, Any]]:
    """Steps a second of several processes that train directions at the same time on one device."""
    rows: list[dict[str, Any]] = [{"recipe": recipe, "rank": rank, "processes": number} for number in PROCESSES]
    command = [sys.executable, __file__, "--worker", recipe, "--rank", str(rank), "--device", bench.device,
               "--seconds", str(2 * bench.seconds), "--threads", str(torch.get_num_threads())]  # fmt: skip
    if bench.left < 30 + 6 * bench.seconds:
        return [{**row, "error": "left out: no time left"} for row in rows]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(max(PROCESSES))
    ]
    try:
        for worker in workers:  # all have started and warmed up before any begins
            if _said(worker) != "ready":
                raise RuntimeError("a process did not start")
        for row in rows:
            chosen = workers[: row["processes"]]
            for worker in chosen:
                assert worker.stdin is not None
                worker.stdin.write("go\n")
                worker.stdin.flush()
            row["each"] = [float(_said(worker)) for worker in chosen]
            row["steps_per_second"] = sum(row["each"])
            print(json.dumps(row), flush=True)
    except Exception as error:  # whatever it is, the other figures are worth having
        rows = [row if "each" in row else {**row, "error": f"{type(error).__name__}: {error}"[:300]} for row in rows]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return rows


def _said(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    return worker.stdout.readline().strip()


def work(options: argparse.Namespace) -> None:
    """One process of ``together``: trains for a while whenever it is told to, and says how many steps a second."""
    bench = Bench(options.device, options.seconds, 600, Path())
    task = Recipe(bench, options.worker, "auto").directions(options.rank)
    for _ in range(5):
        task.step(0)
    print("ready", flush=True)
    while sys.stdin.readline():
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < options.seconds:
            task.step(0)
            if options.device.startswith("cuda"):
                torch.cuda.synchronize()
            count += 1
        print(count / (time.perf_counter() - began), flush=True)


# ----------------------------------------------------------------------------------------------------------------------


def run(bench: Bench, recipes: Sequence[str]) -> list[dict[str, Any]]:
    """Everything, the most important first; returns what processes reach together."""
    gpu = bench.device.startswith("cuda")
    shared: list[dict[str, Any]] = []
    for name in recipes:
        r = Recipe(bench, name, "auto")
        large = r.size > 64 and not gpu
        slow = {"needs": 60.0} if large else {}  # on a CPU a step at the paper's scale takes minutes: a small one
        r.forward(1 if large else 64, **slow)
        step = Recipe(bench, name, "auto", autoencoder__batch_size=2) if large else r
        step.training(**slow)
        if not large:
            r.training(term=True)
            r.classifiers()
            r.render(16)
        r.encoder(8 if large else 256, **slow)
        r.direction_steps()
        r.checkpoints(**slow)
        if name == recipes[0]:
            shared += together(bench, name, RANKS.get(name, GUESSED)[-1])
    for size in (32, 64, 128):
        reading(bench, size, 64)
    for size in (32, 128):
        cells(bench, size)
    for size in (0, 64 << 20):
        entries(bench, size)
    for name in recipes:  # the rest: other batch sizes, and the other precision
        auto = Recipe(bench, name, "auto")
        if (auto.size > 64 and not gpu) or "@" in name:
            continue
        other = "fp32" if auto.compute.bf16 else "bf16"
        Recipe(bench, name, other).forward(64)
        Recipe(bench, name, other).training()
        for batch in (1, 16, 256):
            auto.forward(batch)
        for batch in (16, 32, 128, 256):
            if batch != auto.e.autoencoder.batch_size:
                Recipe(bench, name, "auto", autoencoder__batch_size=batch).training()
    return shared


def commit() -> str:
    """Of the code that was measured, marked where files differ from it."""
    try:
        here = Path(__file__).parent
        out = partial(subprocess.run, cwd=here, capture_output=True, text=True, check=True)
        name = out(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        return name + ("+" if out(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(device: str) -> dict[str, Any]:
    """What was measured on."""
    about: dict[str, Any] = {
        "device": device, "torch": torch.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d"), "processor": processor(),
    }  # fmt: skip
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        about |= {"name": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda,
                  "tf32_convolutions": torch.backends.cudnn.allow_tf32}  # fmt: skip
    return about | {"name": about.get("name", about["processor"])}


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    parser.add_argument("--limit", type=float, default=135.0, help="seconds in all")
    parser.add_argument("--recipes", default=None, help="names or NAME@SIZE, comma-separated, the most important first")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--commit", default=None, help="of the code, where there is no git")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        work(options)
        return
    gpu = options.device.startswith("cuda")
    usual = ["bbbc021", "assay", "bbbc021@64"] if gpu else ["assay", "bbbc021"]
    recipes = options.recipes.split(",") if options.recipes else usual
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.device, options.seconds, options.limit, Path(folder))
        result: dict[str, Any] = {"machine": machine(options.device), "commit": options.commit or commit()}
        try:
            result["together"] = run(bench, recipes)
        except Exception as error:  # what was measured until then is still written
            result["error"] = f"{type(error).__name__}: {error}"[:500]
        result |= {"rows": bench.rows, "seconds": round(time.monotonic() - bench.began, 1)}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    errors = sum("error" in row for row in bench.rows)
    print(f"{len(bench.rows) - errors} figures, {errors} errors, {result['seconds']} s")
    if errors == len(bench.rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
