"""The same code on a GPU: networks agree with the CPU's, bfloat16 is chosen, trainings resume, all stages run."""

import json
from pathlib import Path

import pytest
import torch

from diffex import train
from diffex.classifier import FrozenClassifier
from diffex.compute import Compute
from diffex.config import Experiment, Run, load
from diffex.data import ImageStore
from diffex.model import DiffusionAutoencoder
from diffex.networks import ResidualClassifier
from diffex.pipeline import ensure
from diffex.store import Store

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")

TINY = load(Path(__file__).with_name("tiny.yaml"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def images(store: Store) -> ImageStore:
    return ImageStore(ensure(store, TINY, "data")["data"].path)


def autoencoder(images: ImageStore, device: str, precision: str = "fp32") -> DiffusionAutoencoder:
    torch.manual_seed(0)
    model = DiffusionAutoencoder(
        TINY.autoencoder, TINY.rendering, channels=len(images.info.channels), size=images.info.size, num_classes=2,
        compute=Compute.resolve(Run(device="cpu")),
    )  # fmt: skip
    model.compute = Compute.resolve(Run(device=device, precision=precision))
    return model.to(device)


def task(images: ImageStore, precision: str) -> train.AutoencoderTask:
    model = autoencoder(images, "cuda", precision)
    torch.manual_seed(1)
    network = ResidualClassifier(len(images.info.channels), 2, width=8)
    classifier = FrozenClassifier(network, images.info.class_names).to("cuda")
    probs = torch.full((len(images), 2), 0.5)
    return train.AutoencoderTask(
        model, autoencoder(images, "cuda", precision), images, probs, classifier, lambda1=3.0, seed=0
    )


def test_the_loss_on_a_gpu_is_that_on_the_cpu(images: ImageStore) -> None:
    x, probs = images.batch(range(16)).x, torch.full((16, 2), 0.5)
    t, noise = torch.arange(16) * 60, torch.randn(16, *x.shape[1:], generator=torch.Generator().manual_seed(2))
    losses = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for device in ("cpu", "cuda"):
            model = autoencoder(images, device)
            loss, _ = model.loss(*(v.to(device) for v in (x, probs, t, noise)))
            loss.backward()
            grads = torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
            losses.append((float(loss), grads))
    (a, grad_a), (b, grad_b) = losses
    assert b == pytest.approx(a, rel=1e-4)
    assert float((grad_a - grad_b).norm() / grad_a.norm()) < 1e-2


def test_bfloat16_is_chosen_and_trains_as_well(images: ImageStore, tmp_path: Path) -> None:
    assert Compute.resolve(Run(device="cuda")).bf16
    final = {}
    for precision in ("bf16", "fp32"):
        (tmp_path / precision).mkdir()
        final[precision] = train.fit(task(images, precision), tmp_path / precision)[-1]["simple"]
    assert final["bf16"] == pytest.approx(final["fp32"], rel=0.1)


def test_a_stopped_training_goes_on_where_it_was(images: ImageStore, tmp_path: Path) -> None:
    """To 1e-3, not bit for bit: cuDNN's backward passes add in an order of their own."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    straight.mkdir()
    resumed.mkdir()
    whole = train.fit(task(images, "fp32"), straight)
    train.fit(task(images, "fp32"), resumed, until=512)
    again = train.fit(task(images, "fp32"), resumed)
    for a, b in zip(whole, again, strict=True):
        assert b["images"] == a["images"]
        assert b["simple"] == pytest.approx(a["simple"], rel=1e-3)


def test_every_stage_runs_on_a_gpu(store: Store) -> None:
    e: Experiment = TINY.with_settings({"run.device": "cuda"})
    outcome = ensure(store, e)
    row = json.loads((outcome["scoreboard"].path / "row.json").read_text())
    assert 0.3 < row["ssim"] < 1
    assert set(outcome.entries) >= {"effects", "evidence", "pictures"}
    again = ensure(store, TINY.with_settings({"run.device": "cuda"}))
    assert again.paid == []
