"""Training: a stopped one continues bit for bit, the weights of the losses do something, what is frozen stays so."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffex.classifier import FrozenClassifier
from diffex.compute import Compute
from diffex.config import Assay, Autoencoder, Classifier, Data, Directions, Rendering
from diffex.data import ImageStore
from diffex.directions import Responses, pairwise_overlap
from diffex.errors import UserError
from diffex.model import DiffusionAutoencoder
from diffex.networks import ResidualClassifier
from diffex.prepare import build_store
from diffex.team import ALONE, Team
from diffex.train import (
    CHECKPOINT,
    AutoencoderTask,
    CheckpointError,
    DirectionsTask,
    SupervisedTask,
    Task,
    TrainingError,
    classification_loss,
    cosine_rate,
    fit,
    hash_seed,
    load_checkpoint,
    mirror,
    regression_loss,
    save_checkpoint,
)

CPU = Compute(torch.device("cpu"), False)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    """A small screen of two classes."""
    folder = tmp_path_factory.mktemp("store")
    build_store(
        Data(size=32, channels=("DNA", "actin")), Assay(num_images=240, num_plates=2, wells_per_class=4), folder
    )
    return ImageStore(folder)


# ----------------------------------------------------------------------------------------------------------------------
# The tasks, small


def classifier_task(
    store: ImageStore, init: int = 0, team: Team = ALONE, accumulate: int = 1, images: int = 160, **changes: object
) -> SupervisedTask:
    torch.manual_seed(init)
    settings = replace(Classifier(width=4, batch_size=16), **changes)  # type: ignore[arg-type]
    network = ResidualClassifier(2, 2, width=4)
    loss = classification_loss(torch.tensor(store.labels))
    return SupervisedTask(
        "classifier", network, store, loss, settings, images=images, compute=CPU, seed=3, team=team,
        accumulate=accumulate,
    )  # fmt: skip


def frozen(store: ImageStore) -> FrozenClassifier:
    torch.manual_seed(5)
    return FrozenClassifier(ResidualClassifier(2, 2, width=4), store.info.class_names)


def autoencoder_task(
    store: ImageStore,
    init: int = 0,
    lambda1: float = 3.0,
    classifier: FrozenClassifier | None = None,
    team: Team = ALONE,
    accumulate: int = 1,
    **changes: object,
) -> AutoencoderTask:
    settings = Autoencoder(
        code_dim=6, widths=(8, 8), encoder_widths=(8, 8), images=64, warmup_fraction=0.5, batch_size=8, dropout=0.1
    )
    settings = replace(settings, **changes)  # type: ignore[arg-type]

    def fresh() -> DiffusionAutoencoder:
        return DiffusionAutoencoder(settings, Rendering(steps=4), channels=2, size=32, num_classes=2, compute=CPU)

    torch.manual_seed(init)
    classifier = classifier or frozen(store)
    probs = torch.tensor(np.eye(2, dtype=np.float32)[store.labels])
    return AutoencoderTask(
        fresh(), fresh(), store, probs, classifier, lambda1=lambda1, seed=3, team=team, accumulate=accumulate
    )


def codes(n: int = 64, r: int = 5) -> Tensor:
    return torch.randn(n, r, generator=torch.Generator().manual_seed(0))


def responses(n: int = 64, r: int = 5, pixels: int = 12) -> Responses:
    """Each axis mostly changes pixels of its own, and the first one moves the classifier."""
    generator = torch.Generator().manual_seed(1)
    image = 0.3 * torch.randn(pixels, r, generator=generator)
    for axis in range(r):
        image[2 * axis : 2 * axis + 2, axis] += 1.0
    verdict = torch.zeros(2, r)
    verdict[:, 0] = torch.tensor([1.0, -1.0])
    wobble = 0.05 * torch.randn(n, pixels, r, generator=generator)
    return Responses(image + wobble, verdict.expand(n, -1, -1).contiguous())


def directions_task(init: int = 0, team: Team = ALONE, n: int = 64, **changes: object) -> DirectionsTask:
    settings = replace(Directions(num_directions=4, images=640, batch_size=16), **changes)  # type: ignore[arg-type]
    task = DirectionsTask(settings, codes(n), responses(n), seed=3, team=team)
    if init:  # weights that a checkpoint must replace
        torch.manual_seed(init)
        for parameter in [*task.models.parameters(), *task.projector.parameters()]:
            torch.nn.init.normal_(parameter, std=0.1)
    return task


MAKERS: dict[str, Callable[[ImageStore, int], Task]] = {
    "classifier": lambda store, init: classifier_task(store, init),
    "autoencoder": lambda store, init: autoencoder_task(store, init),
    "directions": lambda store, init: directions_task(init),
}
KINDS = pytest.mark.parametrize("kind", MAKERS)


def copied(task: Task) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in task.tensors().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class KilledError(Exception):
    """What happens to a job on a busy cluster."""


def killer(calls: int) -> Callable[[str, int, int], None]:
    """A meter that dies when it is told for the ``calls``-th time."""
    left = iter(range(calls - 1))

    def progress(what: str, done: int, total: int) -> None:
        if next(left, None) is None:
            raise KilledError

    return progress


# ----------------------------------------------------------------------------------------------------------------------
# Stopping and resuming


@KINDS
def test_a_training_in_two_parts_equals_one_in_one(store: ImageStore, tmp_path: Path, kind: str) -> None:
    straight, first, second = MAKERS[kind](store, 0), MAKERS[kind](store, 0), MAKERS[kind](store, 9)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = fit(straight, tmp_path / "a", seed=1)
    half = fit(first, tmp_path / "b", seed=1, until=straight.images // 2)
    assert half[-1]["images"] == straight.images // 2
    assert not same(copied(second), copied(first))
    resumed = fit(second, tmp_path / "b", seed=1)
    assert resumed == whole
    assert same(copied(second), copied(straight))


@KINDS
def test_a_killed_training_started_again_equals_an_undisturbed_one(
    store: ImageStore, tmp_path: Path, kind: str
) -> None:
    straight, killed, again = MAKERS[kind](store, 0), MAKERS[kind](store, 0), MAKERS[kind](store, 9)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = fit(straight, tmp_path / "a", seed=1)
    with pytest.raises(KilledError):
        fit(killed, tmp_path / "b", seed=1, every=0.0, progress=killer(4))
    assert fit(again, tmp_path / "b", seed=1) == whole
    assert same(copied(again), copied(straight))


@KINDS
def test_a_training_that_is_finished_is_not_trained_again(store: ImageStore, tmp_path: Path, kind: str) -> None:
    done, again = MAKERS[kind](store, 0), MAKERS[kind](store, 9)
    history = fit(done, tmp_path, seed=1)
    again.step = None  # type: ignore[method-assign,assignment]
    assert fit(again, tmp_path, seed=1) == history
    assert same(copied(again), copied(done))


@KINDS
def test_another_seed_gives_another_training(store: ImageStore, tmp_path: Path, kind: str) -> None:
    """All but the directions draw random numbers in their steps."""
    tasks = [MAKERS[kind](store, 0) for _ in range(2)]
    for seed, task in enumerate(tasks):
        (tmp_path / str(seed)).mkdir()
        fit(task, tmp_path / str(seed), seed=seed, until=task.batch_size * 2)
    assert same(copied(tasks[0]), copied(tasks[1])) == (kind == "directions")


def test_no_half_written_checkpoint_is_left(store: ImageStore, tmp_path: Path) -> None:
    fit(classifier_task(store), tmp_path, every=0.0)
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]


class Sum:
    """A task without networks: adds up the random numbers that its steps draw."""

    name = "sum"

    def __init__(self, images: int, batch_size: int, losses: Callable[[int], float] = lambda seen: 1.0) -> None:
        self.images, self.batch_size, self.losses = images, batch_size, losses
        self.total, self.steps = torch.zeros(()), []  # type: tuple[Tensor, list[int]]

    def step(self, seen: int) -> dict[str, Tensor]:
        self.steps.append(seen)
        self.total += torch.rand(())
        return {"loss": torch.tensor(self.losses(seen))}

    def tensors(self) -> dict[str, Tensor]:
        return {"total": self.total}


def test_what_is_to_be_told_is_told_after_each_stretch_and_each_checkpoint(tmp_path: Path) -> None:
    points: list[dict[str, float]] = []
    whole: list[bool] = []
    history = fit(
        Sum(images=24, batch_size=8, losses=float), tmp_path, every=0.0,
        point=lambda name, point: points.append({"name": name, **point}),
        saved=lambda: whole.append((tmp_path / CHECKPOINT).is_file()),
    )  # fmt: skip
    assert points == [{"name": "sum", **point} for point in history]
    assert whole == [True] * 3


# ----------------------------------------------------------------------------------------------------------------------
# Damaged checkpoints


class Line:
    """A task whose state is a few numbers."""

    name, images, batch_size = "line", 64, 8

    def __init__(self) -> None:
        self.state, self.count = torch.zeros(3, 2), torch.zeros((), dtype=torch.int64)

    def step(self, seen: int) -> dict[str, Tensor]:
        self.state += torch.rand(3, 2)
        self.count += 1
        return {"loss": self.state.mean()}

    def tensors(self) -> dict[str, Tensor]:
        return {"state": self.state, "count": self.count}


def test_a_checkpoint_gives_back_what_was_saved(tmp_path: Path) -> None:
    task, again = Line(), Line()
    history = fit(task, tmp_path, until=32)
    assert load_checkpoint(again, tmp_path / CHECKPOINT) == (32, history)
    assert same(again.tensors(), task.tensors())


def test_any_flipped_bit_and_any_missing_end_of_a_checkpoint_is_found_before_the_task_is_touched(
    tmp_path: Path,
) -> None:
    whole, damaged = tmp_path / CHECKPOINT, tmp_path / "damaged.safetensors"
    fit(Line(), tmp_path, until=8)
    data = whole.read_bytes()
    task = Line()
    variants = [data[:n] for n in range(0, len(data), 7)]
    for i in range(len(data)):
        for bit in (0, 5):
            variants.append(data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :])
    for variant in variants:
        damaged.write_bytes(variant)
        with pytest.raises(CheckpointError, match=r"^checkpoint '.*damaged.safetensors' is "):
            load_checkpoint(task, damaged)
        assert not task.state.any()
        assert not task.count.any()


def test_a_checkpoint_of_another_network_is_refused_before_the_task_is_touched(tmp_path: Path) -> None:
    fit(Line(), tmp_path)
    other = Line()
    other.count = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(CheckpointError, match="is of another network or optimiser"):
        load_checkpoint(other, tmp_path / CHECKPOINT)
    assert not other.state.any()


@KINDS
def test_a_training_whose_checkpoint_is_damaged_starts_again_with_a_warning(
    store: ImageStore, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    straight, first, again = (MAKERS[kind](store, 0) for _ in range(3))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = fit(straight, tmp_path / "a", seed=1)
    fit(first, tmp_path / "b", seed=1, until=straight.images // 2)
    data = bytearray((tmp_path / "b" / CHECKPOINT).read_bytes())
    data[-100] ^= 16
    (tmp_path / "b" / CHECKPOINT).write_bytes(data)
    assert fit(again, tmp_path / "b", seed=1) == whole
    assert same(copied(again), copied(straight))
    assert "is damaged: its checksum is not that of its bytes; training starts again" in caplog.text


@pytest.mark.parametrize("state", ["none", "damaged", "later"])
def test_a_training_branches_from_its_base_unless_it_has_a_whole_checkpoint_of_its_own(
    tmp_path: Path, state: str
) -> None:
    base, own = tmp_path / "base", tmp_path / "own"
    base.mkdir()
    own.mkdir()
    history = fit(Line(), base, until=32, seed=1)
    before = (base / CHECKPOINT).read_bytes()
    straight = fit(Line(), tmp_path, seed=1)
    if state == "damaged":
        (own / CHECKPOINT).write_bytes(before[:-5])
    if state == "later":
        history = fit(Line(), own, until=48, base=base / CHECKPOINT, seed=1)
    task, steps = Line(), []  # type: tuple[Line, list[int]]
    step = task.step
    task.step = lambda seen: (steps.append(seen), step(seen))[1]  # type: ignore[method-assign,func-returns-value]
    assert fit(task, own, base=base / CHECKPOINT, seed=1) == straight
    assert steps[0] == history[-1]["images"]
    assert (base / CHECKPOINT).read_bytes() == before


def test_saving_leaves_the_old_checkpoint_whole_until_the_new_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, path = Line(), tmp_path / CHECKPOINT
    save_checkpoint(task, path, 8, [])

    def full(tensors: object, waiting: Path, metadata: object) -> None:
        waiting.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("diffex.train.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(task, path, 16, [])
    assert load_checkpoint(task, path) == (8, [])


def test_every_batch_is_seen_once_in_order(tmp_path: Path) -> None:
    task = Sum(images=50, batch_size=8)
    fit(task, tmp_path)
    assert task.steps == [0, 8, 16, 24, 32, 40]


def test_every_step_draws_numbers_of_its_own(tmp_path: Path) -> None:
    task, drawn = Sum(images=400, batch_size=4), []
    fit(task, tmp_path, progress=lambda *call: drawn.append(float(task.total)))
    assert len(set(np.diff(drawn).round(4).tolist())) > 90


def test_a_training_may_start_in_the_middle(tmp_path: Path) -> None:
    task = Sum(images=40, batch_size=8)
    fit(task, tmp_path, start=16)
    assert task.steps == [16, 24, 32]


def test_until_is_rounded_down_to_whole_batches_and_ends_with_the_training(tmp_path: Path) -> None:
    task = Sum(images=40, batch_size=8)
    fit(task, tmp_path, until=20)
    assert task.steps == [0, 8]
    fit(task, tmp_path, until=1000)
    assert task.steps == [0, 8, 16, 24, 32]


def test_losses_are_means_over_about_a_hundred_stretches(tmp_path: Path) -> None:
    history = fit(Sum(images=8000, batch_size=4, losses=float), tmp_path)
    assert len(history) == 100
    assert history[0] == {"images": 80, "loss": pytest.approx(38.0)}
    assert history[-1] == {"images": 8000, "loss": pytest.approx(7958.0)}


def test_a_kill_before_the_first_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    straight, again = Sum(images=400, batch_size=4), Sum(images=400, batch_size=4)
    (tmp_path / "straight").mkdir()
    with pytest.raises(KilledError):
        fit(Sum(images=400, batch_size=4), tmp_path, progress=killer(3))
    assert fit(again, tmp_path) == fit(straight, tmp_path / "straight")
    assert again.steps[0] == 0
    assert torch.equal(again.total, straight.total)


def test_progress_is_told_of_the_images_seen(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    fit(Sum(images=24, batch_size=8), tmp_path, progress=lambda *call: told.append(call))
    assert told == [("sum", 8, 24), ("sum", 16, 24), ("sum", 24, 24)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_training_in_words(tmp_path: Path, value: float) -> None:
    task = Sum(images=80, batch_size=8, losses=lambda seen: value if seen == 40 else 1.0)
    with pytest.raises(TrainingError, match=r"^sum: the loss loss is (nan|inf) after 48 images; lower the learning"):
        fit(task, tmp_path, every=0.0)
    assert issubclass(TrainingError, UserError)
    again = Sum(images=80, batch_size=8)
    fit(again, tmp_path)
    assert again.steps[0] == 40  # the last checkpoint is from before


def test_a_network_that_blows_up_ends_the_training_in_words(store: ImageStore, tmp_path: Path) -> None:
    task = autoencoder_task(store, learning_rate=1e18, clip=0.0)
    with pytest.raises(TrainingError, match=r"autoencoder: the \w+ loss is (nan|inf) after \d+ images"):
        fit(task, tmp_path)


def test_seeds_differ_in_every_number() -> None:
    assert len({hash_seed(0, 1), hash_seed(1, 0), hash_seed(0, 2), hash_seed(2, 0), hash_seed(1, 1)}) == 5
    assert all(0 <= hash_seed(a, b) < 2**63 for a in range(10) for b in range(10))


# ----------------------------------------------------------------------------------------------------------------------
# Classifier and ruler


def test_the_classifier_learns(store: ImageStore, tmp_path: Path) -> None:
    task = classifier_task(store)
    task.images = 640
    history = fit(task, tmp_path)
    losses = [h["loss"] for h in history]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:3])


def test_losses_find_their_targets_by_row() -> None:
    targets = torch.tensor([[0.0], [10.0], [20.0], [30.0]])
    assert float(regression_loss(targets)(torch.tensor([[30.0], [10.0]]), torch.tensor([3, 1]))) == 0.0
    sure = torch.tensor([[-99.0, 99.0], [99.0, -99.0]])
    assert float(classification_loss(torch.tensor([0, 1, 1, 0]))(sure, torch.tensor([2, 3]))) == 0.0


def test_the_learning_rate_rises_then_falls_to_a_fiftieth() -> None:
    rates = [cosine_rate(2.0, seen, 1000, 200) for seen in range(1001)]
    top = int(np.argmax(rates))
    assert 100 < top <= 200
    assert max(rates) > 1.7
    assert all(np.diff(rates[:top]) > 0)
    assert all(np.diff(rates[top:]) < 0)
    assert rates[0] == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(0.04)


def test_mirroring_gives_each_of_four_images_as_often() -> None:
    x = torch.arange(4.0).view(1, 1, 2, 2).expand(4000, -1, -1, -1)
    torch.manual_seed(0)
    found, counts = torch.unique(mirror(x), dim=0, return_counts=True)
    wanted = {(0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0)}
    assert {tuple(image.flatten().int().tolist()) for image in found} == wanted
    assert (counts - 1000).abs().max() < 150


# ----------------------------------------------------------------------------------------------------------------------
# Autoencoder


def test_the_autoencoder_learns(store: ImageStore, tmp_path: Path) -> None:
    task = autoencoder_task(store, images=640, lambda1=0.0, dropout=0.0)
    losses = [h["simple"] for h in fit(task, tmp_path)]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:3])


def weights(task: AutoencoderTask) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in task.model.state_dict().items()}


@pytest.mark.parametrize("term", ["one_step", "truncated"])
def test_lambda1_changes_the_model_that_is_trained_but_not_its_warmup(
    store: ImageStore, tmp_path: Path, term: str
) -> None:
    tasks = {lambda1: autoencoder_task(store, lambda1=lambda1, classifier_term=term) for lambda1 in (0.0, 0.1, 3.0)}
    for lambda1, task in tasks.items():
        (tmp_path / str(lambda1)).mkdir()
        fit(task, tmp_path / str(lambda1), until=task.warmup_images)
    assert same(weights(tasks[0.0]), weights(tasks[0.1]))
    assert same(weights(tasks[0.0]), weights(tasks[3.0]))
    for lambda1, task in tasks.items():
        history = fit(task, tmp_path / str(lambda1))
        assert ("classifier" in history[-1]) == (lambda1 > 0)
    for part in ("unet", "encoder", "project"):
        a, b, c = ({n: w for n, w in weights(task).items() if n.startswith(part)} for task in tasks.values())
        assert not same(a, b)
        assert not same(b, c)


def test_training_the_autoencoder_leaves_the_classifier_bit_identical(store: ImageStore, tmp_path: Path) -> None:
    classifier = frozen(store)
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    assert any("running_mean" in name for name in before)
    fit(autoencoder_task(store, classifier=classifier, warmup_fraction=0.0), tmp_path)
    assert same(dict(classifier.state_dict()), before)
    assert all(p.grad is None and not p.requires_grad for p in classifier.parameters())
    assert not any(module.training for module in classifier.modules())


def test_the_average_follows_the_weights(store: ImageStore) -> None:
    """Step by step: average += (1 - decay) (weights - average), with a short memory at the start."""
    task = autoencoder_task(store, ema=0.15)
    by_hand = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    for step, decay in enumerate((0.1, 0.15, 0.15)):  # (1 + n) / (10 + n), then the setting
        torch.manual_seed(step)
        task.step(step * task.batch_size)
        for name, p in task.model.named_parameters():
            by_hand[name] += (1 - decay) * (p.detach() - by_hand[name])
    for name, p in task.average.named_parameters():
        assert torch.allclose(p, by_hand[name], atol=1e-6)
    assert not same(dict(task.average.state_dict()), dict(task.model.state_dict()))


def test_the_average_takes_running_statistics_along(store: ImageStore) -> None:
    task = autoencoder_task(store, ema=0.0)
    task.step(0)
    for (name, a), b in zip(task.average.named_buffers(), task.model.buffers(), strict=True):
        if "running" in name:
            assert torch.equal(a, b)
            assert a.any()


def test_images_come_with_their_own_verdicts_and_times_from_end_to_end(store: ImageStore) -> None:
    task = autoencoder_task(store)
    task.probs = torch.rand(len(store), 2, generator=torch.Generator().manual_seed(0))
    everything = store.batch(range(len(store))).x
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    loss = task.model.loss

    def listen(x: Tensor, probs: Tensor, t: Tensor, noise: Tensor, **rest: object) -> object:
        seen.append((x, probs, t))
        return loss(x, probs, t, noise, **rest)  # type: ignore[arg-type]

    task.model.loss = listen  # type: ignore[method-assign,assignment]
    task.step(0)
    x, probs, t = seen[0]
    training = set(store.rows("train").tolist())
    for image, verdict in zip(x, probs, strict=True):
        row = int((everything - image).abs().flatten(1).sum(dim=1).argmin())
        assert row in training
        assert torch.equal(verdict, task.probs[row])
    assert (t // 125).tolist() == list(range(8))  # one in each eighth


@pytest.mark.parametrize(("images", "fraction", "warm"), [(64, 0.5, 32), (70, 0.5, 32), (64, 0.0, 0), (64, 1.0, 64)])
def test_the_warmup_is_a_share_of_the_training_in_whole_batches(
    store: ImageStore, images: int, fraction: float, warm: int
) -> None:
    task = autoencoder_task(store, images=images, warmup_fraction=fraction)
    assert task.images == 64
    assert task.warmup_images == warm


# ----------------------------------------------------------------------------------------------------------------------
# Directions


def trained(tmp_path: Path, **changes: object) -> tuple[DirectionsTask, list[dict[str, float]]]:
    task = directions_task(**changes)  # type: ignore[arg-type]
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    return task, fit(task, folder)


def test_the_directions_learn(tmp_path: Path) -> None:
    _, history = trained(tmp_path, images=3200, lambda2=0.0, lambda3=0.0)
    assert history[-1]["contrastive"] < history[0]["contrastive"] - 0.1


@pytest.mark.parametrize("covariance", ["image", "shifts"])
def test_lambda2_changes_the_directions_and_decorrelates_them(tmp_path: Path, covariance: str) -> None:
    overlap = []
    for lambda2 in (0.0, 1.0):
        task, _ = trained(tmp_path, images=1600, lambda2=lambda2, lambda3=0.0, covariance=covariance)
        with torch.no_grad():
            u = task.models.eval().unit(codes())
            change = torch.einsum("bpr,kbr->kbp", responses().image, u).abs()
        overlap.append(float(pairwise_overlap(u if covariance == "shifts" else change)))
    assert overlap[1] < 0.6 * overlap[0]


def test_lambda3_makes_a_direction_move_the_classifier(tmp_path: Path) -> None:
    moved = []
    for lambda3 in (0.0, 3.0):
        task, _ = trained(tmp_path, images=3200, lambda3=lambda3)
        u = task.models.eval().unit(codes()).detach()
        moved.append(float(u[..., 0].mean(dim=1).abs().max()))  # only the first axis moves it
    assert moved[1] > 0.9
    assert moved[1] > moved[0]


@pytest.mark.parametrize("kind", ["anchored", "mlp", "linear", "fixed"])
def test_the_published_objective_trains_every_kind_of_direction(tmp_path: Path, kind: str) -> None:
    published = {
        "space": "raw", "features": "code", "signed": False, "covariance": "published", "lambda3": 0.0, "alpha": 0.1
    }  # fmt: skip
    task, history = trained(tmp_path, kind=kind, **published)
    assert set(history[-1]) == {"images", "contrastive", "covariance"}
    assert not same(dict(task.models.state_dict()), dict(directions_task(kind=kind, **published).models.state_dict()))


def test_fewer_codes_than_a_batch_are_enough() -> None:
    few = DirectionsTask(Directions(batch_size=32, images=64), codes(10), responses(10), seed=0)
    assert few.batch_size == 10
    assert all(torch.isfinite(value) for value in few.step(0).values())
