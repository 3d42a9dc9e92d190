"""The classifier to be explained: however it is given it says the same, stays as it was, and is refused in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffex.classifier import FrozenClassifier, classification_report, is_given, load_classifier
from diffex.config import Classifier
from diffex.errors import UserError
from diffex.networks import ResidualClassifier

NAMES = ("control", "treated")

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")


def network(outputs: int = 2) -> ResidualClassifier:
    """A network whose batch normalisation has seen data, in evaluation mode."""
    torch.manual_seed(0)
    made = ResidualClassifier(2, outputs, width=4)
    for _ in range(3):
        made(2 * torch.randn(16, 2, 16, 16) + 0.5)
    nn.init.normal_(made.head.weight)
    return made.eval()


def images(n: int = 5) -> Tensor:
    return torch.rand(n, 2, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


class Reads(nn.Module):
    """Says what it was shown: the mean and the largest pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        return torch.stack([x.mean(dim=(1, 2, 3)), x.amax(dim=(1, 2, 3))], dim=1)


class Says(nn.Module):
    """Says the same of every image."""

    def __init__(self, *numbers: float) -> None:
        super().__init__()
        self.numbers = numbers

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor(self.numbers).expand(len(x), -1)


# ----------------------------------------------------------------------------------------------------------------------
# Ways to give a classifier


FACTORY = """
from diffex.networks import ResidualClassifier

def build():
    return ResidualClassifier(2, 2, width=4)
"""


def given(way: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Classifier, Path | None]:
    """Settings that name the network as a file of some kind (or the weights of the one trained here)."""
    made = network()
    example = torch.zeros(2, 2, 16, 16)
    if way == "scripted":
        torch.jit.script(made).save(str(folder / "net.pt"))
        return Classifier(path=str(folder / "net.pt")), None
    if way == "traced":
        torch.jit.trace(made, example).save(str(folder / "net.ts"))
        return Classifier(path=str(folder / "net.ts")), None
    if way == "exported":
        program = torch.export.export(made, (example,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=4096)},))
        torch.export.save(program, folder / "net.pt2")
        return Classifier(path=str(folder / "net.pt2")), None
    save_file(made.state_dict(), folder / "net.safetensors")
    if way == "factory":
        (folder / "their_lab").mkdir()
        (folder / "their_lab" / "nets.py").write_text(FACTORY)
        monkeypatch.syspath_prepend(str(folder))
        return Classifier(factory="their_lab.nets:build", weights=str(folder / "net.safetensors")), None
    return Classifier(width=4), folder / "net.safetensors"


@pytest.fixture(scope="module", params=["scripted", "traced", "exported", "factory", "trained here"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrozenClassifier]:
    """The same network, however it was given."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        settings, trained = given(request.param, tmp_path_factory.mktemp("classifier"), monkeypatch)
        yield load_classifier(settings, NAMES, channels=2, size=16, trained=trained)


def test_a_loaded_classifier_says_what_the_network_said(loaded: FrozenClassifier) -> None:
    expected = network()(images()).softmax(dim=1)
    assert expected.std() > 0.01
    assert torch.allclose(loaded.probabilities(images()), expected, atol=1e-5)


def test_a_loaded_classifier_passes_gradients_to_images_only(loaded: FrozenClassifier) -> None:
    x = images().requires_grad_()
    loaded(x)[:, 0].sum().backward()
    assert x.grad is not None
    assert (x.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(not p.requires_grad and p.grad is None for p in loaded.parameters())


def test_a_loaded_classifier_stays_as_it_was(loaded: FrozenClassifier) -> None:
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    assert any(value.is_floating_point() and "running_mean" in name for name, value in before.items())
    loaded.train()
    loaded(images().requires_grad_()).sum().backward()
    loaded.probabilities(3 * images())
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())


def test_a_loaded_classifier_judges_every_image_by_itself(loaded: FrozenClassifier) -> None:
    loaded.train()
    assert torch.allclose(loaded(images()[:1]), loaded(images())[:1], atol=1e-5)


def test_asking_for_training_mode_changes_nothing() -> None:
    frozen = FrozenClassifier(network(), NAMES)
    nn.Sequential(frozen, nn.Dropout()).train()
    assert not any(module.training for module in frozen.modules())


def test_a_network_saved_in_training_mode_is_put_into_evaluation_mode(tmp_path: Path) -> None:
    torch.jit.script(network().train()).save(str(tmp_path / "net.pt"))
    loaded = load_classifier(Classifier(path=str(tmp_path / "net.pt")), NAMES, 2, 16)
    assert torch.allclose(loaded.probabilities(images()), network()(images()).softmax(dim=1), atol=1e-5)


def test_a_classifier_is_given_by_file_or_factory() -> None:
    assert not is_given(Classifier())
    assert is_given(Classifier(path="net.pt"))
    assert is_given(Classifier(factory="a:b", weights="c"))


# ----------------------------------------------------------------------------------------------------------------------
# Range, size, order and kind of its numbers


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (0.0, 255.0), (-2.1, 2.6)])
def test_images_are_mapped_to_the_range_that_the_network_expects(low: float, high: float) -> None:
    frozen = FrozenClassifier(Reads(), NAMES, low=low, high=high)
    dark, bright = torch.full((1, 2, 8, 8), -1.0), torch.full((1, 2, 8, 8), 1.0)
    assert frozen(dark)[0].tolist() == pytest.approx([low, low], abs=1e-4)
    assert frozen(bright)[0].tolist() == pytest.approx([high, high], abs=1e-4)


@pytest.mark.parametrize("size", [8, 16, 40])
def test_images_are_resized_to_what_the_network_expects(size: int) -> None:
    reads = Reads()
    frozen = FrozenClassifier(reads, NAMES, size=size)
    x = torch.full((3, 2, 16, 16), 0.25)
    assert frozen(x)[:, 0].tolist() == pytest.approx([0.25] * 3)
    assert reads.shapes == [(3, 2, size, size)]


def test_a_stated_size_equal_to_the_images_changes_no_pixel() -> None:
    assert torch.equal(FrozenClassifier(Reads(), NAMES, size=16)(images()), FrozenClassifier(Reads(), NAMES)(images()))


def test_settings_of_range_and_size_reach_a_loaded_network(tmp_path: Path) -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(2 * 24 * 24, 2))  # takes images of 24 pixels only
    torch.jit.trace(flat, torch.zeros(2, 2, 24, 24)).save(str(tmp_path / "net.pt"))
    settings = Classifier(path=str(tmp_path / "net.pt"), input_low=0.0, input_size=24)
    loaded = load_classifier(settings, NAMES, channels=2, size=16)
    x = torch.full((1, 2, 16, 16), 0.5)
    assert torch.allclose(loaded(x), flat(torch.full((1, 2, 24, 24), 0.75)), atol=1e-5)


def test_outputs_are_put_into_the_order_of_the_data() -> None:
    frozen = FrozenClassifier(Says(1.0, 2.0, 3.0), ("a", "b", "c"), order=("c", "a", "b"))
    assert frozen(images(2)).tolist() == [[2.0, 3.0, 1.0]] * 2


def test_probabilities_that_a_network_returns_come_out_as_they_are() -> None:
    frozen = FrozenClassifier(Says(0.1, 0.7, 0.2), ("a", "b", "c"), output="probabilities")
    assert frozen.probabilities(images(2))[0].tolist() == pytest.approx([0.1, 0.7, 0.2], abs=1e-6)


def test_a_certain_network_has_finite_logits() -> None:
    frozen = FrozenClassifier(Says(0.0, 1.0), NAMES, output="probabilities")
    assert torch.isfinite(frozen(images(2))).all()
    assert frozen.probabilities(images(2))[0].tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("order", [NAMES, NAMES[::-1]])
def test_a_single_output_is_the_log_odds_of_the_second_class(order: tuple[str, str]) -> None:
    p = 1 / (1 + np.exp(-1.3))
    frozen = FrozenClassifier(Says(1.3), NAMES, order=order)
    found = dict(zip(NAMES, frozen.probabilities(images(1))[0].tolist(), strict=True))
    assert found[order[1]] == pytest.approx(p, abs=1e-6)


def test_a_single_probability_is_that_of_the_second_class() -> None:
    frozen = FrozenClassifier(Says(0.8), NAMES, output="probabilities")
    assert frozen.probabilities(images(1))[0].tolist() == pytest.approx([0.2, 0.8], abs=1e-6)


def test_probabilities_do_not_depend_on_the_size_of_batches() -> None:
    frozen = FrozenClassifier(network(), NAMES)
    assert torch.allclose(frozen.probabilities(images(), batch_size=2), frozen.probabilities(images()), atol=1e-6)


def test_half_precision_images_are_taken() -> None:
    frozen = FrozenClassifier(network(), NAMES)
    assert frozen(images().bfloat16()).dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------------------
# Complaints


def saved(module: nn.Module, folder: Path) -> Classifier:
    torch.jit.script(module).save(str(folder / "net.pt"))
    return Classifier(path=str(folder / "net.pt"))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"no classifier file 'nowhere\.pt' \(classifier\.path\)"):
        load_classifier(Classifier(path="nowhere.pt"), NAMES, 2, 16)


def test_without_file_or_training_there_is_no_classifier() -> None:
    with pytest.raises(UserError, match=r"set classifier\.path, or train one"):
        load_classifier(Classifier(), NAMES, 2, 16)


@pytest.mark.parametrize("name", ["net.pt", "net.pt2"])
@pytest.mark.parametrize("content", ["state_dict", "noise", "nothing"])
def test_a_file_that_is_no_network_is_named(tmp_path: Path, name: str, content: str) -> None:
    if content == "state_dict":
        torch.save(network().state_dict(), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(b"noise" if content == "noise" else b"")
    with pytest.raises(UserError, match=r"neither a TorchScript file nor, as \.pt2, a torch\.export file") as caught:
        load_classifier(Classifier(path=str(tmp_path / name)), NAMES, 2, 16)
    assert "classifier.factory" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("outputs", [1, 2, 4])
def test_the_wrong_number_of_outputs_is_named(tmp_path: Path, outputs: int) -> None:
    with pytest.raises(UserError, match=rf"returns \[2, {outputs}\] for 2 images, but 3 classes need \[2, 3\]"):
        load_classifier(saved(network(outputs), tmp_path), ("a", "b", "c"), 2, 16)


def test_the_wrong_number_of_channels_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"can't take images of 3 channels and 16 pixels.*data\.channels"):
        load_classifier(saved(network(), tmp_path), NAMES, 3, 16)


def test_the_wrong_size_is_named(tmp_path: Path) -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(2 * 24 * 24, 2))
    with pytest.raises(UserError, match=r"images of 2 channels and 16 pixels.*classifier\.input_size"):
        load_classifier(saved(flat, tmp_path), NAMES, 2, 16)


def test_a_network_exported_for_one_batch_size_is_refused(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(network(), (torch.zeros(2, 2, 16, 16),)), tmp_path / "net.pt2")
    with pytest.raises(UserError, match=r"export with a dynamic batch dimension"):
        load_classifier(Classifier(path=str(tmp_path / "net.pt2")), NAMES, 2, 16)


class Counts(nn.Module):
    """Remembers how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.mean(dim=(2, 3))


def test_a_network_that_changes_when_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"changes its own buffer 'calls'.*evaluation mode"):
        load_classifier(saved(Counts(), tmp_path), NAMES, 2, 16)


def test_a_network_exported_in_training_mode_is_refused(tmp_path: Path) -> None:
    """Its batch normalisation would drift with every image, and evaluation mode does not exist in such a file."""
    program = torch.export.export(
        network().train(), (torch.zeros(4, 2, 16, 16),), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=64)},)
    )
    torch.export.save(program, tmp_path / "net.pt2")
    with pytest.raises(UserError, match=r"changes its own buffer .*evaluation mode"):
        load_classifier(Classifier(path=str(tmp_path / "net.pt2")), NAMES, 2, 16)


@pytest.mark.parametrize("order", [("control", "other"), ("control",), ("control", "treated", "treated")])
def test_classes_that_are_not_the_data_s_are_named(tmp_path: Path, order: tuple[str, ...]) -> None:
    settings = replace(saved(network(), tmp_path), class_names=order)
    with pytest.raises(UserError, match=r"classifier\.class_names = .*but the data's classes are \['control', 'tr"):
        load_classifier(settings, NAMES, 2, 16)


@pytest.mark.parametrize(
    ("factory", "complaint"),
    [
        ("their_lab_nets", "must read package.module:callable"),
        ("no_such_lab.nets:build", "can't be imported"),
        ("math:no_such_thing", "can't be imported"),
        ("builtins:dict", "returned dict, not a torch module"),
    ],
)
def test_a_factory_that_does_not_work_is_named(factory: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        load_classifier(Classifier(factory=factory, weights="net.safetensors"), NAMES, 2, 16)
    assert repr(factory) in str(caught.value)


@pytest.mark.parametrize("factory", ["torch.nn:Linear", ":build"])
def test_a_factory_that_fails_is_named(factory: str) -> None:
    with pytest.raises(UserError, match=r"classifier\.factory"):
        load_classifier(Classifier(factory=factory, weights="net.safetensors"), NAMES, 2, 16)


@pytest.mark.parametrize("weights", ["missing", "of another network", "not safetensors"])
def test_weights_that_do_not_fit_the_factory_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    settings, _ = given("factory", tmp_path, monkeypatch)
    file = tmp_path / "net.safetensors"
    file.unlink()
    if weights == "of another network":
        save_file(network(3).state_dict(), file)
    if weights == "not safetensors":
        file.write_bytes(b"not what it says")
    with pytest.raises(UserError, match=r"no weights file|does not fit the network|not a safetensors file") as caught:
        load_classifier(settings, NAMES, 2, 16)
    assert str(file) in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# Report

PROBS = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8], [0.45, 0.55], [0.25, 0.75]])
LABELS = np.array([0, 0, 0, 1, 1, 1])


def test_the_report_holds_the_numbers_worked_out_by_hand() -> None:
    """One control image of three is called treated; of nine pairs of classes seven are in order."""
    report = classification_report(PROBS, LABELS, np.array([0, 0, 1, 2, 2, 3]), NAMES)
    assert (report["n"], report["units"]) == (6, 4)
    assert report["accuracy"] == pytest.approx(5 / 6)
    assert report["balanced_accuracy"] == pytest.approx(5 / 6)
    assert report["recall"] == pytest.approx({"control": 2 / 3, "treated": 1.0})
    assert report["confusion"] == [[2, 1], [0, 3]]
    assert report["auc"] == pytest.approx({"control": 8 / 9, "treated": 8 / 9})


def test_calibration_error_is_the_weighted_gap_of_confidence_and_accuracy() -> None:
    """Half of the images are 90 % sure and half of those right; the others are 60 % sure and all right."""
    probs = np.array([[0.95, 0.05]] * 4 + [[0.65, 0.35]] * 4)
    labels = np.array([0, 0, 1, 1, 0, 0, 0, 0])
    report = classification_report(probs, labels, np.arange(8), NAMES)
    assert report["calibration_error"] == pytest.approx(0.5 * 0.45 + 0.5 * 0.35)


def test_balanced_accuracy_does_not_favour_the_larger_class() -> None:
    probs = np.tile([0.9, 0.1], (10, 1))
    report = classification_report(probs, np.array([0] * 9 + [1]), np.arange(10), NAMES)
    assert report["accuracy"] == pytest.approx(0.9)
    assert report["balanced_accuracy"] == pytest.approx(0.5)
    assert report["auc"] == pytest.approx({"control": 0.5, "treated": 0.5})


def test_the_interval_of_the_accuracy_resamples_units() -> None:
    right = np.repeat([1, 1, 1, 0], 25)
    probs = np.where(right[:, None] == 1, [0.9, 0.1], [0.1, 0.9])
    wells = classification_report(probs, np.zeros(100, int), np.repeat(np.arange(4), 25), NAMES)["accuracy_interval"]
    cells = classification_report(probs, np.zeros(100, int), np.arange(100), NAMES)["accuracy_interval"]
    assert wells[1] - wells[0] > 2 * (cells[1] - cells[0])  # type: ignore[index]


def test_several_classes_are_reported_one_against_the_rest() -> None:
    probs = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7], [0.5, 0.2, 0.3]])
    report = classification_report(probs, np.array([0, 1, 2, 2]), np.arange(4), ("a", "b", "c"))
    assert report["confusion"] == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert report["auc"] == pytest.approx({"a": 1.0, "b": 1.0, "c": 1.0})


def test_a_class_without_images_has_no_auc() -> None:
    report = classification_report(PROBS[:3], LABELS[:3], np.arange(3), NAMES)
    assert np.isnan(report["auc"]["treated"])  # type: ignore[index]
