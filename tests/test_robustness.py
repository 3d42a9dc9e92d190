"""Robustness: attacks against closed forms, reports that count what attacks did, and training that withstands them."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffex.classifier import FrozenClassifier
from diffex.compute import Compute
from diffex.config import Assay, Classifier, Data
from diffex.data import ImageStore, sample_rows
from diffex.errors import UserError
from diffex.networks import ResidualClassifier
from diffex.prepare import build_store
from diffex.robustness import AdversarialTask, attack_report, fgsm, pgd
from diffex.statistics import bootstrap_interval
from diffex.team import ALONE, Team
from diffex.train import SupervisedTask, classification_loss, fit, regression_loss

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

CPU = Compute(torch.device("cpu"), False)
SHAPE = (2, 6, 6)
ATTACKS = pytest.mark.parametrize("attack", [fgsm, pgd])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 40, reach: float = 1.0, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return reach * (torch.rand(n, *shape, generator=generator(seed)) * 2 - 1)


class Linear:
    """Two classes, log odds of the second w.x + b."""

    def __init__(self, w: Tensor | None = None, b: float = 0.0) -> None:
        self.w = torch.randn(SHAPE, generator=generator(3)) if w is None else w
        self.b = b

    def log_odds(self, x: Tensor) -> Tensor:
        return (x * self.w).sum(dim=(1, 2, 3)) + self.b

    def __call__(self, x: Tensor) -> Tensor:
        odds = self.log_odds(x)
        return torch.stack([torch.zeros_like(odds), odds], dim=1)

    def labels(self, x: Tensor) -> Tensor:
        return (self.log_odds(x) > 0).long()

    def worst(self, x: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        """The image in the ball and the range with the lowest odds of the label: each pixel as far as it may go."""
        down = torch.where(labels == 1, -1.0, 1.0)[:, None, None, None] * self.w.sign()
        return torch.where(down > 0, (x + epsilon).clamp(max=1), (x - epsilon).clamp(min=-1))


def network(seed: int = 0, outputs: int = 3, scale: float = 1.0) -> FrozenClassifier:
    """A small convolutional network, frozen, that gives its classes about equally often, with logits of this spread."""
    torch.manual_seed(seed)
    net = ResidualClassifier(2, outputs, width=8, levels=2)
    for _ in range(5):
        net(torch.randn(32, *SHAPE))
    with torch.no_grad():
        logits = net.eval()(images(400, seed=1))
        spread = logits.std(dim=0)
        net.head.weight *= (scale / spread)[:, None]
        net.head.bias.copy_((net.head.bias - logits.mean(dim=0)) * scale / spread)
    return FrozenClassifier(net, [f"class {i}" for i in range(outputs)])


def losses(classifier: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(classifier(x).double(), labels, reduction="none")


def verdicts(classifier: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return classifier(x).argmax(dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# Attacks


@ATTACKS
@pytest.mark.parametrize("epsilon", [0.01, 0.3, 3.0])
def test_attacks_stay_in_the_ball_and_the_range_and_use_them(attack: Callable[..., Tensor], epsilon: float) -> None:
    classifier, x = network(), images()
    moved = attack(classifier, x, verdicts(classifier, x), epsilon) - x
    assert moved.abs().max() <= epsilon + 1e-6
    assert (x + moved).abs().max() <= 1 + 1e-6
    assert moved.abs().max() > 0.9 * min(epsilon, 1.0)


@ATTACKS
def test_a_useless_attack_changes_nothing(attack: Callable[..., Tensor]) -> None:
    classifier, x = network(), images()
    assert torch.equal(attack(classifier, x, verdicts(classifier, x), 0.0), x)


@ATTACKS
@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.7])
def test_on_a_linear_classifier_attacks_reach_the_worst_case_in_closed_form(
    attack: Callable[..., Tensor], epsilon: float
) -> None:
    classifier, x = Linear(), images()
    labels = classifier.labels(x)
    assert torch.allclose(attack(classifier, x, labels, epsilon), classifier.worst(x, labels, epsilon), atol=1e-6)


def test_fgsm_follows_the_signs_of_the_cross_entropys_gradient() -> None:
    classifier, x = network(), images(reach=0.8)
    labels = torch.arange(40) % 3
    asked = x.clone().requires_grad_()
    F.cross_entropy(classifier(asked), labels).backward()
    moved = (fgsm(classifier, x, labels, 0.1) - x).sign()
    clear = asked.grad.abs() > 1e-3 * asked.grad.abs().max()  # type: ignore[union-attr]
    assert clear.float().mean() > 0.5
    assert torch.equal(moved[clear], asked.grad.sign()[clear])  # type: ignore[union-attr]


def test_a_sure_classifier_is_no_safer_for_its_vanishing_cross_entropy() -> None:
    plain, sure, x = network(), network(scale=1e4), images()
    labels = verdicts(plain, x)
    asked = x.clone().requires_grad_()
    F.cross_entropy(sure(asked), labels).backward()
    assert (asked.grad.flatten(1).abs().sum(dim=1) == 0).float().mean() > 0.8  # type: ignore[union-attr]
    fooled = [(verdicts(c, fgsm(c, x, labels, 0.3)) != labels).float().mean() for c in (plain, sure)]
    assert fooled[1] >= fooled[0] - 0.05
    assert fooled[0] > 0.3


@pytest.mark.parametrize("seed", range(3))
def test_pgd_is_never_weaker_than_fgsm_or_no_attack(seed: int) -> None:
    two, three, x = network(seed, 2), network(seed, 3), images()
    stronger = 0.0
    for epsilon in (0.02, 0.1, 0.5):
        labels = verdicts(two, x)
        strong, weak = (losses(two, attack(two, x, labels, epsilon), labels) for attack in (pgd, fgsm))
        assert (strong >= weak - 1e-5).all()
        assert (strong >= losses(two, x, labels) - 1e-5).all()
        stronger = max(stronger, float((strong - weak).mean()))
        labels = torch.arange(len(x)) % 3  # wrong ones among them
        by_fgsm, by_pgd = (verdicts(three, attack(three, x, labels, epsilon)) != labels for attack in (fgsm, pgd))
        assert not (by_fgsm & ~by_pgd).any()
    assert stronger > 0.01


class Bowl:
    """Log odds of the second class: |x|^2 - b, flat at x = 0, and worst at any corner of the ball."""

    def __call__(self, x: Tensor) -> Tensor:
        odds = x.square().sum(dim=(1, 2, 3)) - 1.0
        return torch.stack([torch.zeros_like(odds), odds], dim=1)


def test_pgd_leaves_a_flat_spot_where_fgsm_stays_and_reaches_the_corner() -> None:
    x, labels = torch.zeros(5, *SHAPE), torch.zeros(5, dtype=torch.long)
    assert torch.equal(fgsm(Bowl(), x, labels, 0.2), x)
    assert torch.allclose(pgd(Bowl(), x, labels, 0.2).abs(), torch.full_like(x, 0.2), atol=1e-6)
    short = pgd(Bowl(), x, labels, 0.2, steps=2, step_size=0.01)
    assert short.abs().min() < 0.1  # the step size is what it says


class Trap:
    """One pixel: rises gently to the right, and steeply on the far left, where only some starts fall."""

    def __call__(self, x: Tensor) -> Tensor:
        p = x[:, 0, 0, 0]
        odds = torch.relu(p) + 30 * torch.relu(-p - 0.45) - 1.0
        return torch.stack([torch.zeros_like(odds), odds], dim=1)


def test_of_several_restarts_the_best_is_kept_image_by_image() -> None:
    x, labels = torch.full((200, 1, 1, 1), 0.05), torch.zeros(200, dtype=torch.long)
    shares = []
    for restarts in (1, 4, 30):
        found = pgd(Trap(), x, labels, 0.6, restarts=restarts, steps=5)
        shares.append(float((verdicts(Trap(), found) == 1).float().mean()))
    assert 0.02 < shares[0] < shares[1] < shares[2]
    assert shares[0] == pytest.approx(0.1 / 1.2, abs=0.08)  # of the starts, those left of -0.45
    assert shares[2] == pytest.approx(1 - (1 - 0.1 / 1.2) ** 30, abs=0.1)


class Decoy:
    """Three classes of one pixel: to the right the loss is highest, but only to the left does the verdict change."""

    def __call__(self, x: Tensor) -> Tensor:
        p = x[:, 0, 0, 0]
        truth = 10 - 20 * torch.relu(-p)  # falls to the left, below the second
        return torch.stack([truth, 5 + 4.99 * torch.relu(p) - 5 * torch.relu(-p), 4.99 + 5 * torch.relu(p)], dim=1)


def test_an_attack_that_succeeds_is_kept_before_one_of_higher_loss() -> None:
    x, labels = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.long)
    found = pgd(Decoy(), x, labels, 1.0, restarts=8)
    assert verdicts(Decoy(), found).item() != 0
    assert found.item() < 0


class Spike:
    """One pixel: log odds of the second class, above 0 near 0.002 only, so that steps jump over it."""

    def __call__(self, x: Tensor) -> Tensor:
        odds = 1 - 50 * (x[:, 0, 0, 0] - 0.002).abs()
        return torch.stack([torch.zeros_like(odds), odds], dim=1)


def test_an_attack_never_puts_a_wrong_verdict_right() -> None:
    x, labels = torch.zeros(20, 1, 1, 1), torch.zeros(20, dtype=torch.long)
    assert (verdicts(Spike(), x) == 1).all()
    assert (verdicts(Spike(), fgsm(Spike(), x, labels, 0.9)) == 0).all()  # one step knows no better
    found = pgd(Spike(), x, labels, 0.9)
    assert (losses(Spike(), found, labels) >= losses(Spike(), x, labels)).all()
    (attacks,) = attack_report(Spike(), x, labels, np.arange(20), epsilons=(0.9,), grid=(0.5,))["attacks"]
    assert attacks["fgsm_accuracy"] == attacks["pgd_accuracy"] == 0.0


def test_a_targeted_attack_reaches_its_target_where_an_untargeted_one_need_not() -> None:
    classifier, x = network(), images()
    labels = (verdicts(classifier, x) + 1) % 3
    found = pgd(classifier, x, labels, 0.5, targeted=True)
    assert (verdicts(classifier, found) == labels).float().mean() > 0.9
    assert (losses(classifier, found, labels) <= losses(classifier, x, labels) + 1e-5).all()
    assert (found - x).abs().max() <= 0.5 + 1e-6
    linear = Linear()
    other = 1 - linear.labels(x)
    wanted = linear.worst(x, linear.labels(x), 0.1)
    assert torch.allclose(pgd(linear, x, other, 0.1, targeted=True), wanted, atol=1e-6)


def test_the_seed_decides_the_random_start() -> None:
    classifier, x = network(), images()
    labels = verdicts(classifier, x)
    a, b, c = (pgd(classifier, x, labels, 0.1, steps=1, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@ATTACKS
@pytest.mark.parametrize("around", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_attacks_leave_no_trace_in_the_classifier(
    attack: Callable[..., Tensor], around: Callable[[], torch.no_grad]
) -> None:
    """A module as training left it: parameters with gradients, training mode, running statistics."""
    torch.manual_seed(0)
    net = ResidualClassifier(2, 2, width=8, levels=2)
    for _ in range(5):
        net(torch.randn(32, *SHAPE))
    net.stages[0].eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    x = images()
    labels = verdicts(network(outputs=2), x)
    random = torch.get_rng_state()
    with around():
        found = attack(net, x, labels, 0.2)
    assert not found.requires_grad
    assert torch.equal(x, images())
    assert x.grad is None
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(found, attack(net.eval(), x, labels, 0.2))  # attacked as it will be used


@ATTACKS
def test_a_scripted_classifier_can_be_attacked(attack: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    net = ResidualClassifier(2, 2, width=8, levels=2)
    x = images()
    scripted = torch.jit.script(net)
    labels = verdicts(FrozenClassifier(net, ("a", "b")), x)
    found = attack(scripted, x, labels, 0.3)
    assert (losses(net, found, labels) > losses(net, x, labels)).float().mean() > 0.9


@ATTACKS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": -0.1}, "epsilon = -0.1: it must be a finite number >= 0"),
        ({"epsilon": math.nan}, "epsilon = nan: it must be"),
        ({"x": images() * 127}, "images reach 12[67].*need them in \\[-1, 1\\]"),
        ({"x": images()[0]}, "give \\(B, C, H, W\\) and \\(B,\\) classes"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "labels \\[3\\]: give"),
        ({"labels": torch.full((40,), 2)}, "returns \\[40, 2\\], but labels up to 2"),
        ({"classifier": lambda x: Linear()(x.detach())}, "passes no gradient to its images"),
        ({"classifier": lambda x: Linear()(x) * math.inf}, "are not finite"),
    ],
)
def test_what_cant_be_attacked_is_said_in_words(
    attack: Callable[..., Tensor], change: dict[str, object], message: str
) -> None:
    given = {"classifier": Linear(), "x": images(), "labels": torch.zeros(40, dtype=torch.long), "epsilon": 0.1}
    with pytest.raises(UserError, match=message):
        attack(**{**given, **change})


def test_pgd_needs_a_step_and_a_start() -> None:
    for steps, restarts in ((0, 1), (1, 0)):
        with pytest.raises(UserError, match="both must be at least 1"):
            pgd(Linear(), images(), Linear().labels(images()), 0.1, steps=steps, restarts=restarts)


# ----------------------------------------------------------------------------------------------------------------------
# Report

WELLS = np.arange(120) // 10


def linear_case() -> tuple[Linear, Tensor, Tensor, np.ndarray]:
    """A linear classifier, images away from the borders, a sixth of the labels wrong, and each verdict's radius."""
    classifier, x = Linear(), images(120, reach=0.5)
    labels = classifier.labels(x)
    labels[::6] = 1 - labels[::6]
    radius = (classifier.log_odds(x).abs() / classifier.w.abs().sum()).numpy()  # |w.x + b| / |w|_1
    radius[::6] = 0.0
    return classifier, x, labels, radius


def test_on_a_linear_classifier_the_report_is_the_closed_form() -> None:
    classifier, x, labels, radius = linear_case()
    epsilons, grid = (0.005, 0.02, 0.05), tuple(np.geomspace(0.001, 0.4, 40))
    report = attack_report(classifier, x, labels, WELLS, epsilons=epsilons, grid=grid)
    assert (report["n"], report["units"], report["accuracy"]) == (120, 12, pytest.approx(100 / 120))
    assert report["accuracy_interval"] == list(bootstrap_interval((radius > 0).astype(float), WELLS))
    for found, epsilon in zip(report["attacks"], epsilons, strict=True):
        stays = radius > epsilon
        assert found["epsilon"] == epsilon
        assert 0 < stays.mean() < 100 / 120
        for attack in ("fgsm", "pgd"):
            assert found[f"{attack}_accuracy"] == pytest.approx(stays.mean())
            assert found[f"{attack}_accuracy_interval"] == list(bootstrap_interval(stays.astype(float), WELLS))
    tried = sorted({*epsilons, *grid})
    smallest = report["smallest_epsilon"]
    rounded = [next(e for e in tried if e >= r) for r in radius[radius > 0]]
    assert smallest["n"] == 100
    assert smallest["withstood"] == 0.0
    assert smallest["median"] == pytest.approx(np.quantile(rounded, 0.5, method="inverted_cdf"))
    low, high = smallest["median_interval"]
    assert low < smallest["median"] < high
    resampled = []  # the interval, by brute force
    draw = np.random.default_rng(1)
    right = [radius[(well == WELLS) & (radius > 0)] for well in range(12)]
    for _ in range(2000):
        resampled.append(np.median(np.concatenate([right[i] for i in draw.integers(0, 12, 12)])))
    expected = np.quantile(resampled, [0.025, 0.975])
    assert np.log([low, high]) == pytest.approx(np.log(expected), abs=0.25)  # one step of the grid is 0.15


def test_accuracy_falls_with_epsilon_and_pgd_is_below_fgsm() -> None:
    classifier, x = network(), images(60)
    labels = verdicts(classifier, x)
    labels[:6] = (labels[:6] + 1) % 3
    epsilons = (0.0, 0.01, 0.03, 0.1, 0.3)
    report = attack_report(classifier, x, labels, WELLS[:60], epsilons=epsilons, grid=(0.02, 0.05), batch_size=25)
    by_fgsm, by_pgd = (np.array([a[f"{k}_accuracy"] for a in report["attacks"]]) for k in ("fgsm", "pgd"))
    assert by_fgsm[0] == by_pgd[0] == report["accuracy"] == pytest.approx(0.9)
    assert (np.diff(by_pgd) <= 0).all()
    assert (by_pgd <= by_fgsm).all()
    assert by_pgd[-1] < 0.2
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_a_classifier_that_looks_at_nothing_withstands_everything() -> None:
    report = attack_report(lambda x: Linear(0 * Linear().w, 1.0)(x), images(120), torch.ones(120).long(), WELLS)
    assert [a["pgd_accuracy"] for a in report["attacks"]] == [1.0] * 4
    assert report["attacks"][0]["pgd_accuracy_interval"][0] < 0.8  # 12 of 12 wells isn't certainty
    smallest = report["smallest_epsilon"]
    assert (smallest["median"], smallest["withstood"]) == (None, 1.0)
    assert smallest["median_interval"] == [None, None]


def test_a_classifier_that_is_never_right_has_nothing_to_attack() -> None:
    report = attack_report(Linear(), images(120), 1 - Linear().labels(images(120)), WELLS)
    assert report["accuracy"] == 0.0
    assert all(a["fgsm_accuracy"] == a["pgd_accuracy"] == 0.0 for a in report["attacks"])
    assert report["smallest_epsilon"]["n"] == 0
    assert json.dumps(report, allow_nan=False)


def test_duplicated_wells_are_worth_one() -> None:
    """Every image ten times in its own well: the numbers and the intervals stay."""
    classifier, x, labels, _ = linear_case()
    options = {"epsilons": (0.02,), "grid": (0.01, 0.03)}
    once = attack_report(classifier, x, labels, WELLS, **options)  # type: ignore[arg-type]
    often = attack_report(
        classifier, x.repeat(10, 1, 1, 1), labels.repeat(10), np.tile(WELLS, 10), **options  # type: ignore[arg-type]
    )  # fmt: skip
    assert often["n"] == 1200
    for name, value in once["attacks"][0].items():
        assert often["attacks"][0][name] == pytest.approx(value)
    assert often["smallest_epsilon"]["median"] == once["smallest_epsilon"]["median"]
    assert often["smallest_epsilon"]["median_interval"] == once["smallest_epsilon"]["median_interval"]


def test_a_report_that_cant_be_made_is_refused() -> None:
    x = images(120)
    with pytest.raises(UserError, match="120 images, 5 groups"):
        attack_report(Linear(), x, Linear().labels(x), WELLS[:5])
    with pytest.raises(UserError, match="epsilon = -1"):
        attack_report(Linear(), x, Linear().labels(x), WELLS, epsilons=(0.1, -1.0))


class Backdoored:
    """The mean of the image against 0, and one pixel that overrules it once it leaves the background's level."""

    def __init__(self, weight: float, threshold: float) -> None:
        self.weight, self.threshold = weight, threshold

    def __call__(self, x: Tensor) -> Tensor:
        odds = 20 * x[:, :, 1:].mean(dim=(1, 2, 3)) + self.weight * torch.relu(x[:, 0, 0, 3] + 1 - self.threshold)
        return torch.stack([torch.zeros_like(odds), odds], dim=1)


@pytest.mark.parametrize("threshold", [-1e-3, 0.03])
def test_a_planted_backdoor_of_one_pixel_is_fooled_where_an_honest_classifier_isnt(threshold: float) -> None:
    """Above 0 the threshold hides the pixel's gradient at the image itself: only random starts find it."""
    x = 0.1 * images(120)
    x[:, :, 1:] -= 0.4  # the class without the treatment, by far
    x[:, :, 0] = -1.0  # background
    labels = torch.zeros(120, dtype=torch.long)
    honest, planted = Backdoored(0.0, 0.0), Backdoored(300.0, threshold)
    assert (verdicts(honest, x) == labels).all()
    assert (verdicts(planted, x) == labels).all()
    options = {"epsilons": (0.1,), "grid": (0.05, 0.2, 0.4, 0.8), "restarts": 10}
    reports = [attack_report(c, x, labels, WELLS, **options) for c in (honest, planted)]  # type: ignore[arg-type]
    accuracy = [report["attacks"][0]["pgd_accuracy"] for report in reports]
    assert accuracy[0] == 1.0
    assert accuracy[1] < 0.05
    assert reports[1]["attacks"][0]["fgsm_accuracy"] == (1.0 if threshold > 0 else 0.0)
    median = [report["smallest_epsilon"]["median"] for report in reports]
    assert median[0] >= 4 * median[1]
    pixel = torch.zeros(SHAPE, dtype=torch.bool)
    pixel[0, 0, 3] = True
    found = pgd(planted, x, labels, 0.1, restarts=10)
    assert (found[:, 0, 0, 3] > x[:, 0, 0, 3] + 0.03).float().mean() > 0.95
    undone = torch.where(pixel, x, found)  # that pixel did it
    assert (verdicts(planted, undone) == labels).all()


# ----------------------------------------------------------------------------------------------------------------------
# Adversarial training


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    """A small screen of two classes."""
    folder = tmp_path_factory.mktemp("store")
    build_store(
        Data(size=32, channels=("DNA", "actin")), Assay(num_images=960, num_plates=2, wells_per_class=6), folder
    )
    return ImageStore(folder)


def task(
    store: ImageStore, epsilon: float | None, init: int = 0, images: int = 160, share: float = 0.5,
    team: Team = ALONE, **changes: object,
) -> SupervisedTask:  # fmt: skip
    """Adversarial training, or with epsilon None the plain one."""
    torch.manual_seed(init)
    settings = replace(Classifier(width=8, batch_size=16), **changes)  # type: ignore[arg-type]
    given = ("classifier", ResidualClassifier(2, 2, width=8), store, classification_loss(torch.tensor(store.labels)))
    if epsilon is None:
        return SupervisedTask(*given, settings, images=images, compute=CPU, seed=3)
    return AdversarialTask(
        *given, settings, images=images, compute=CPU, seed=3, epsilon=epsilon, share=share, team=team
    )


def copied(task: SupervisedTask) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in task.tensors().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    """Fresh folders, one after the other."""

    def fresh() -> Iterator[Path]:
        for i in range(100):
            (tmp_path / str(i)).mkdir()
            yield tmp_path / str(i)

    return fresh()


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_interrupted_and_resumed_adversarial_training_gives_equal_weights(
    store: ImageStore, folders: Iterator[Path], share: float
) -> None:
    straight, first, second = (task(store, 0.1, init, share=share) for init in (0, 0, 9))
    whole = fit(straight, next(folders), seed=1)
    folder = next(folders)
    fit(first, folder, seed=1, until=80)
    torch.rand(7)  # whatever the interruption did to the random numbers
    assert fit(second, folder, seed=1) == whole
    assert same(copied(second), copied(straight))


def test_without_an_attack_it_is_plain_training_bit_for_bit(store: ImageStore, folders: Iterator[Path]) -> None:
    plain, none, nobody, attacked = (task(store, *a) for a in ((None,), (0.0,), (0.1, 0, 160, 0.0), (0.1,)))
    histories = [fit(t, next(folders), seed=1) for t in (plain, none, nobody, attacked)]
    assert histories[0] == histories[1] == histories[2] != histories[3]
    assert same(copied(plain), copied(none))
    assert same(copied(plain), copied(nobody))


@pytest.mark.parametrize(("share", "attacked"), [(0.5, 8), (1.0, 16), (0.25, 4)])
def test_each_step_trains_on_attacks_that_fit_the_ball(store: ImageStore, share: float, attacked: int) -> None:
    """What the network is shown: the attack's start in evaluation mode, then the batch in training mode."""
    shown: list[tuple[bool, Tensor]] = []
    subject = task(store, 0.1, share=share, noise=0.0)
    reference = task(store, None, noise=0.0)
    before = copy.deepcopy(subject.network).eval()
    subject.network.register_forward_pre_hook(lambda net, x: shown.append((net.training, x[0].detach())))
    reference.network.register_forward_pre_hook(lambda net, x: shown.append((net.training, x[0].detach())))
    for t in (subject, reference):
        torch.manual_seed(0)
        t.step(32)
    (mode_a, start), (mode_b, x_adv), (_, x) = shown
    assert (mode_a, mode_b) == (False, True)
    assert len(start) == attacked
    assert torch.equal(x_adv[attacked:], x[attacked:])
    moved = x_adv[:attacked] - x[:attacked]
    assert moved.abs().max() <= 0.1 + 1e-6
    assert moved.abs().flatten(1).amax(dim=1).min() > 0.09
    assert x_adv.abs().max() <= 1.0
    offset = start - x[:attacked]
    assert offset.abs().max() <= 0.1 + 1e-6
    inside = (x[:attacked].abs() < 0.9).expand_as(offset)
    assert offset[inside].std() == pytest.approx(0.1 / 3**0.5, rel=0.05)  # uniform
    labels = torch.tensor(store.labels)[sample_rows(subject.rows, 16, 32, 3)][:attacked]
    assert (losses(before, x_adv[:attacked], labels) > losses(before, x[:attacked], labels)).all()
    # 1.25 epsilon from a uniform start in +-epsilon, cut at epsilon: those that start above -epsilon / 4 end there
    assert (moved[inside].abs() > 0.0999).float().mean() == pytest.approx(0.625, abs=0.03)


def test_an_attacked_step_updates_running_statistics_once(store: ImageStore) -> None:
    subject = task(store, 0.1)
    for step in range(3):
        subject.step(16 * step)
    counts = [int(buffer) for name, buffer in subject.network.named_buffers() if name.endswith("batches_tracked")]
    assert len(counts) == 6
    assert set(counts) == {3}
    assert all(module.training for module in subject.network.modules())


def test_other_losses_can_be_trained_against_attacks(store: ImageStore) -> None:
    targets = torch.randn(len(store), 3, generator=generator(0))
    subject = AdversarialTask(
        "ruler", ResidualClassifier(2, 3, width=4), store, regression_loss(targets), Classifier(batch_size=16),
        images=160, compute=CPU, seed=3, epsilon=0.1,
    )  # fmt: skip
    assert torch.isfinite(subject.step(0)["loss"])


def test_epsilon_and_share_must_make_sense(store: ImageStore) -> None:
    with pytest.raises(UserError, match="epsilon = -1"):
        task(store, -1.0)
    with pytest.raises(UserError, match="share = 2.0: the share of a batch"):
        task(store, 0.1, share=2.0)


def test_an_adversarially_trained_network_withstands_attacks_that_fool_the_plain_one(
    store: ImageStore, folders: Iterator[Path]
) -> None:
    rows = np.concatenate([store.rows("valid"), store.rows("test")])
    x, labels, _ = store.batch(rows)
    reports = []
    for epsilon in (None, 0.1):
        trained = task(store, epsilon, images=3840, batch_size=32)
        fit(trained, next(folders), seed=1)
        classifier = FrozenClassifier(trained.network, store.info.class_names)
        reports.append(attack_report(classifier, x, labels, store.groups()[rows], epsilons=(0.1,), grid=(0.05, 0.2)))
    plain, robust = reports
    assert robust["accuracy"] > max(plain["accuracy"] - 0.04, 0.9)
    by_pgd = [report["attacks"][0]["pgd_accuracy"] for report in reports]
    assert by_pgd[0] < 0.6
    assert by_pgd[1] > 0.75  # above 0.6 came only attacks of the right sign, over three initial weights
    assert by_pgd[1] > robust["attacks"][0]["fgsm_accuracy"] - 0.1  # no catastrophic overfitting
