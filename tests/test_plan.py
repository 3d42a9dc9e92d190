"""The cost model: what it says before a run agrees with what the run then does, leaves on the disk and logs."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from diffex.config import Experiment, load
from diffex.costs import FORMULAS, Case, Cost, Images, stage_costs
from diffex.errors import UserError
from diffex.networks import ResidualClassifier
from diffex.pipeline import GRAPH, Outcome, ensure, stage_digests
from diffex.plan import budget, check_budget, drawn, networks, say_budget
from diffex.space import Levels, Range
from diffex.store import Store

TINY = load(Path(__file__).with_name("tiny.yaml"))

CHEAP = {"truth", "scoreboard"}
"""Stages that only read tables and codes."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return ensure(Store(tmp_path_factory.mktemp("store")), TINY)


@pytest.fixture(scope="module")
def costs(run: Outcome) -> dict[str, Cost]:
    """What the model says of that run, given the rank that its codes turned out to have."""
    return stage_costs(TINY, rank=run["directions"].facts["rank"])


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# ----------------------------------------------------------------------------------------------------------------------
# Against a real run


def test_every_stage_has_a_formula_or_is_known_to_be_cheap() -> None:
    assert FORMULAS.keys() | CHEAP == GRAPH.keys()
    assert not FORMULAS.keys() & CHEAP


def test_evaluations_are_those_that_the_stages_note(run: Outcome, costs: dict[str, Cost]) -> None:
    noted = {name: entry.facts["unet_evaluations"] for name, entry in run.entries.items()
             if "unet_evaluations" in entry.facts}  # fmt: skip
    assert len(noted) >= 6
    assert {name: costs[name].unet_evaluations for name in noted} == noted


def test_without_a_rank_evaluations_are_an_upper_bound(costs: dict[str, Cost]) -> None:
    for name, cost in stage_costs(TINY).items():
        assert cost.unet_evaluations >= costs[name].unet_evaluations


def test_bytes_of_entries_are_right_within_a_third(run: Outcome, costs: dict[str, Cost]) -> None:
    found = {name: size(entry.path) for name, entry in run.entries.items()}
    for name, number in found.items():
        if name not in CHEAP and number > 20_000:
            assert costs[name].bytes == pytest.approx(number, rel=0.35), name
    whole = sum(costs.values(), Cost()).bytes
    assert whole == pytest.approx(sum(number for name, number in found.items() if name not in CHEAP), rel=0.1)
    assert sum(number for name, number in found.items() if name in CHEAP) < 0.1 * whole


def test_points_of_the_curves_are_those_that_are_logged(run: Outcome, costs: dict[str, Cost]) -> None:
    for name in ("classifier", "directions"):
        history = json.loads((run[name].path / "history.json").read_text())
        assert costs[name].points == sum(len(point) - 1 for point in history)
    history = json.loads((run["autoencoder"].path / "history.json").read_text())
    assert costs["warmup"].points == sum("classifier" not in point for point in history)
    assert costs["autoencoder"].points == sum(len(point) - 1 for point in history)


def test_the_simulated_assay_s_images_are_counted(run: Outcome) -> None:
    images, facts = Images.of(TINY), run["data"].facts
    assert images.number() == facts["images"]
    assert images.class_names == tuple(facts["class_names"])
    assert images.channels == len(facts["channels"])
    for part, counts in facts["counts"].items():
        assert images.number(part) == pytest.approx(sum(counts), rel=0.35)  # wells stay together


def test_an_ingested_store_is_counted_without_copying(run: Outcome, tmp_path: Path) -> None:
    e = TINY.with_settings({"data.path": str(run["data"].path)})
    images = Images.of(e)
    assert images.number() == run["data"].facts["images"]
    assert not images.copied
    view = ensure(Store(tmp_path), e, "data")["data"]
    assert stage_costs(e, images)["data"].bytes == pytest.approx(size(view.path), rel=0.35)
    other_size = e.with_settings({"data.size": 16})
    assert Images.of(other_size).copied
    assert Images.of(e.with_settings({"data.max_per_class": 100})).number() == 200


# ----------------------------------------------------------------------------------------------------------------------
# How costs follow settings


def cost_of(stage: str, e: Experiment = TINY, **settings: object) -> Cost:
    return stage_costs(e.with_settings({name.replace("__", "."): value for name, value in settings.items()}))[stage]


def test_training_does_not_grow_with_the_number_of_images_but_encoding_does() -> None:
    few, many = (stage_costs(TINY, Images.even(TINY, n, 2)) for n in (10_000, 10_000_000))
    for stage in ("warmup", "autoencoder", "responses", "directions", "effects", "evidence"):
        assert many[stage].work == few[stage].work
        assert many[stage].bytes == few[stage].bytes
    assert many["latents"].work["encoder.forward"] == 1000 * few["latents"].work["encoder.forward"]
    assert many["latents"].bytes == pytest.approx(1000 * few["latents"].bytes, rel=0.01)


def test_a_truncated_term_pays_for_its_steps_and_a_weight_of_nought_for_no_term() -> None:
    plain = cost_of("autoencoder", autoencoder__lambda1=0.0)
    term = cost_of("autoencoder", autoencoder__lambda1=1.0)
    truncated = {"autoencoder__lambda1": 1.0, "autoencoder__classifier_term": "truncated"}
    assert plain.work["classifier.gradient"] == 0
    assert term.unet_evaluations == plain.unet_evaluations == term.work["classifier.gradient"]
    assert cost_of("autoencoder", **truncated).unet_evaluations == 3 * plain.unet_evaluations


def test_inversion_costs_what_its_settings_say() -> None:
    steps, n = TINY.rendering.steps, TINY.evaluation.num_images
    assert cost_of("reconstruction").unet_evaluations == n * steps * (TINY.rendering.iterations + 3)
    published = cost_of("reconstruction", rendering__inversion="ddim", rendering__encode_steps=50)
    assert published.unet_evaluations == n * (50 + 3 * steps)


def test_a_given_classifier_is_not_trained() -> None:
    given = TINY.with_settings({"classifier.path": "net.pt2"})
    assert stage_costs(given)["classifier"].work["classifier.training"] == 0
    assert "classifier.forward" not in networks(given, Images.of(given)).flops


def test_seconds_are_counts_times_units() -> None:
    cost = cost_of("latents")
    n = Images.of(TINY).number()
    assert cost.seconds({"encoder.forward": 2.0, "unet.forward": 7.0}) == 2.0 * n


def test_operations_of_a_classifier_are_counted_by_hand() -> None:
    counted = networks(TINY, Images.of(TINY))
    c, s, w = 2, 32, TINY.classifier.width
    macs = 9 * c * w * s * s  # the stem; then three blocks that halve the side: two 3 x 3 convolutions and a 1 x 1
    inside = w
    for level in range(3):
        outside, s = w * 2**level, s // 2
        macs += (9 * inside * outside + 9 * outside * outside + inside * outside) * s * s
        inside = outside
    macs += inside * 2
    assert counted.flops["classifier.forward"] == 2 * macs
    assert counted.flops["unet.training"] == pytest.approx(3 * counted.flops["unet.forward"], rel=0.02)
    network = ResidualClassifier(c, 2, width=w)
    assert counted.parameters["classifier"] == sum(p.numel() for p in network.parameters())


def test_activations_are_those_that_backpropagation_keeps() -> None:
    torch.manual_seed(0)
    images = Images.of(TINY)
    kept: dict[int, torch.Tensor] = {}
    model = Case(TINY, images).model
    real = type(model)(TINY.autoencoder, TINY.rendering, channels=2, size=32, num_classes=2,
                       compute=type(model.compute)(torch.device("cpu"), False))  # fmt: skip
    own = {p.untyped_storage().data_ptr() for p in real.parameters()}
    x, probs, t = torch.rand(8, 2, 32, 32), torch.full((8, 2), 0.5), torch.arange(8)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        real.loss(x, probs, t, torch.randn_like(x))
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / len(x)
    assert networks(TINY, images).activations == pytest.approx(measured, rel=0.15)


# ----------------------------------------------------------------------------------------------------------------------
# A sweep


def grid(base: Experiment = TINY) -> list[Experiment]:
    """24 trials: four lambda_1, six settings of the directions each."""
    return [
        base.with_settings({"autoencoder.lambda1": a, "directions.lambda2": b, "directions.num_directions": k})
        for a, b, k in product((0.1, 0.3, 1.0, 3.0), (0.1, 1.0, 10.0), (2, 3))
    ]


def test_a_sweep_counts_distinct_stages() -> None:
    plan = budget(grid())
    numbers = {stage: plan.number(stage) for stage in GRAPH}
    assert numbers["data"] == numbers["classifier"] == numbers["warmup"] == 1
    assert numbers["autoencoder"] == numbers["latents"] == numbers["responses"] == numbers["reconstruction"] == 4
    assert numbers["directions"] == numbers["effects"] == numbers["pictures"] == 24
    assert plan.cost.work["unet.training"] == sum(
        plan.number(stage) * stage_costs(TINY)[stage].work["unet.training"] for stage in ("warmup", "autoencoder")
    )


def test_what_the_store_holds_is_not_paid_again(run: Outcome) -> None:
    store = Store(run["data"].path.parents[1])
    assert budget([TINY], has=store.has).cost.bytes == 0
    assert budget([TINY]).cost.bytes > 0
    more = budget([TINY, TINY.with_settings({"directions.lambda2": 7.0})], has=store.has)
    assert more.number("autoencoder") == 0
    assert more.number("directions") == 1


def test_needs_are_digests_of_the_same_trial() -> None:
    plan = budget(grid()[:5])
    for trial in plan.trials:
        for place, digest in enumerate(trial):
            assert set(plan.instances[digest].needs) <= set(trial[:place])
    assert plan.trials[0] == list(stage_digests(grid()[0]).values())


def test_the_budget_is_said_in_words_and_a_full_disk_is_told_before_it_is_full() -> None:
    plan = budget(grid())
    store, work = say_budget(plan, free=10**12)
    assert "24 trials: 1 image set, 1 warm-up, 4 autoencoders, 24 direction sets" in store
    assert "1.0 TB free" in store
    assert f"{plan.cost.unet_evaluations:,} U-Net evaluations" in work
    check_budget(plan, plan.cost.bytes + 2 * plan.cost.scratch, concurrent=2)
    with pytest.raises(UserError, match="make room"):
        check_budget(plan, plan.cost.bytes + 2 * plan.cost.scratch - 1, concurrent=2)
    assert "needed on the way" in say_budget(plan, free=plan.cost.bytes)[0]


def test_drawn_points_start_with_those_named_and_lie_in_the_space() -> None:
    space = {"autoencoder.lambda1": Levels((0.1, 1.0)), "directions.lambda2": Range(0.1, 10.0, log=True),
             "directions.num_directions": Range(2, 5)}  # fmt: skip
    points = drawn(TINY, space, 40, [{"directions.lambda2": 5.0}])
    assert points[0] == TINY.with_settings({"directions.lambda2": 5.0})
    assert {e.autoencoder.lambda1 for e in points[1:]} == {0.1, 1.0}
    assert {e.directions.num_directions for e in points[1:]} == {2, 3, 4, 5}
    lengths = [e.directions.lambda2 for e in points[1:]]
    assert 0.1 <= min(lengths) < 1.0 < max(lengths) <= 10.0
    assert points == drawn(TINY, space, 40, [{"directions.lambda2": 5.0}])
    assert budget(points).number("autoencoder") == 3  # the recipe's own, and both levels
