"""The stage graph: what decides a stage's digest, what a user's own classifier needs, and what is left after errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from diffex.assay import DEFAULT_CHANNELS
from diffex.config import Experiment, load
from diffex.data import ImageStore
from diffex.errors import UserError
from diffex.networks import ResidualClassifier
from diffex.pipeline import GRAPH, absent, code_digest, ensure, fingerprint, stage_digests
from diffex.store import Store

TINY = load(Path(__file__).with_name("tiny.yaml"))

FROM_SCOREBOARD = {"scoreboard", "pictures"}
FROM_EVIDENCE = {"evidence", "truth", *FROM_SCOREBOARD}
FROM_EFFECTS = {"effects", *FROM_EVIDENCE}
FROM_DIRECTIONS = {"directions", "replicas", *FROM_EFFECTS}
FROM_REFERENCES = {"references", *FROM_EFFECTS}
FROM_CODES = {"codes", *FROM_REFERENCES}
FROM_ROBUST = {"robust", *FROM_REFERENCES}
FROM_AUTOENCODER = {"autoencoder", "reconstruction", "latents", "responses", *FROM_CODES, *FROM_DIRECTIONS}
FROM_WARMUP = {"warmup", *FROM_AUTOENCODER}
FROM_CLASSIFIER = {"classifier", *FROM_WARMUP, *FROM_ROBUST}
FROM_WITNESS = {"witness", "reconstruction", *FROM_ROBUST}
EVERYTHING = {"data", "ruler", "real_cells", *FROM_WITNESS, *FROM_CLASSIFIER}


def changed(base: Experiment = TINY, **settings: object) -> set[str]:
    """Stages whose digest differs with other settings."""
    before = stage_digests(base)
    after = stage_digests(base.with_settings({name.replace("__", "."): value for name, value in settings.items()}))
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize(
    ("setting", "value", "stages"),
    [
        ("data.seed", 5, EVERYTHING),
        ("assay.well_sd", 0.5, EVERYTHING),
        ("run.seed", 5, EVERYTHING - {"data"}),
        ("run.precision", "fp32", EVERYTHING - {"data"}),
        ("classifier.width", 12, FROM_CLASSIFIER),
        ("evaluation.ruler_images", 128, {"ruler", *FROM_REFERENCES}),
        ("classifier.noise", 0.1, EVERYTHING - {"data", "real_cells"}),
        ("evaluation.witness_images", 128, FROM_WITNESS),
        ("evaluation.epsilon", 0.1, FROM_ROBUST),
        ("evaluation.real_images", 9, {"real_cells", "truth", *FROM_SCOREBOARD}),
        ("evaluation.nucleus_channel", "actin", {"real_cells", *FROM_REFERENCES}),
        ("evaluation.cell_features", "full", {"real_cells", *FROM_EVIDENCE}),
        ("evaluation.followed_images", 4, FROM_EVIDENCE),
        ("evaluation.replicas", 2, {"replicas", *FROM_SCOREBOARD}),
        ("evaluation.lpips", "lpips", {"reconstruction", *FROM_REFERENCES}),
        ("autoencoder.code_dim", 16, FROM_WARMUP),
        ("autoencoder.images", 1920, FROM_WARMUP),
        ("autoencoder.warmup_fraction", 0.5, FROM_WARMUP),
        ("autoencoder.lambda1", 0.5, FROM_AUTOENCODER),
        ("autoencoder.classifier_term", "truncated", FROM_AUTOENCODER),
        ("rendering.steps", 5, {"reconstruction", *FROM_CODES}),
        ("evaluation.num_images", 12, {"reconstruction", *FROM_EVIDENCE}),
        ("directions.response_images", 32, {"responses", *FROM_DIRECTIONS}),
        ("directions.alpha", 1.0, {"responses", *FROM_DIRECTIONS}),
        ("directions.lambda2", 3.0, FROM_DIRECTIONS),
        ("directions.lambda3", 0.1, FROM_DIRECTIONS),
        ("directions.num_directions", 4, FROM_DIRECTIONS),
        ("directions.tau", 1.0, FROM_DIRECTIONS),
        ("evaluation.random_directions", 5, FROM_REFERENCES),
        ("ranking.num_images", 8, FROM_CODES),
        ("ranking.alphas", [1.0], FROM_EFFECTS),
        ("ranking.top", 1, FROM_SCOREBOARD),
        ("ranking.confidence", 0.9, FROM_SCOREBOARD),
        ("run.accumulate", 2, FROM_CLASSIFIER),
        ("run.device", "cpu", set()),
        ("run.workers", 2, set()),
        ("run.cpus", 2, set()),
        ("run.gpus", 0.5, set()),
        ("run.checkpoint_seconds", 5.0, set()),
        ("run.failures", 0, set()),
    ],
)
def test_a_setting_changes_the_stages_that_it_decides_and_no_others(
    setting: str, value: object, stages: set[str]
) -> None:
    assert changed(**{setting: value}) == stages


def test_rendering_decides_the_autoencoder_only_where_its_loss_renders() -> None:
    truncated = TINY.with_settings({"autoencoder.classifier_term": "truncated"})
    assert "autoencoder" in changed(truncated, rendering__steps=5)
    without = truncated.with_settings({"autoencoder.lambda1": 0.0})
    assert "autoencoder" not in changed(without, rendering__steps=5)


def test_asking_for_the_default_channels_by_name_is_the_same_data() -> None:
    named = load(settings={"data.channels": list(DEFAULT_CHANNELS)})
    assert stage_digests(named, "data") == stage_digests(load(settings={"data.channels": []}), "data")


def test_stages_come_after_what_they_need() -> None:
    order = list(stage_digests(TINY))
    assert set(order) == set(GRAPH)
    for name, stage in GRAPH.items():
        assert all(order.index(need) < order.index(name) for need in stage.needs)


def test_only_what_a_stage_rests_on_is_asked_for() -> None:
    assert set(stage_digests(TINY, "latents")) == {"data", "classifier", "warmup", "autoencoder", "latents"}


def test_losses_that_look_at_the_code_only_need_no_responses() -> None:
    settings = {"directions.features": "code", "directions.covariance": "shifts", "directions.lambda3": 0.0}
    assert absent(TINY.with_settings(settings)) == {"responses"}
    assert "responses" not in stage_digests(TINY.with_settings(settings))


def test_real_images_have_no_truth(tmp_path: Path) -> None:
    real = TINY.with_settings({"data.path": str(tmp_path)})
    assert absent(real) == {"ruler", "truth"}
    assert not {"ruler", "truth"} & set(stage_digests(real))


def test_code_that_runs_decides_the_digest() -> None:
    latents = code_digest("stages", "run_latents", ("model",))
    assert latents != code_digest("stages", "run_latents", ("networks",))
    assert latents != code_digest("stages", "run_effects", ("model",))
    ruler = code_digest("instruments", "run_ruler", ("networks",))
    assert ruler != code_digest("instruments", "run_witness", ("networks",))


# ----------------------------------------------------------------------------------------------------------------------
# What a user's files hold


def test_a_file_s_fingerprint_is_its_content(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"one")
    b.write_bytes(b"one")
    assert fingerprint(a) == fingerprint(b)
    b.write_bytes(b"two")
    assert fingerprint(a) != fingerprint(b)


def test_a_folder_s_fingerprint_changes_with_any_file(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "1.png").write_bytes(b"one")
    seen = [fingerprint(tmp_path)]
    (tmp_path / "class" / "2.png").write_bytes(b"two")
    seen.append(fingerprint(tmp_path))
    (tmp_path / "class" / "1.png").write_bytes(b"longer")
    seen.append(fingerprint(tmp_path))
    (tmp_path / "class" / "2.png").rename(tmp_path / "class" / "3.png")
    seen.append(fingerprint(tmp_path))
    assert len(set(seen)) == 4
    assert fingerprint(tmp_path) == seen[-1]


def test_a_path_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"no file or folder 'nowhere'"):
        fingerprint(Path("nowhere"))


# ----------------------------------------------------------------------------------------------------------------------
# A user's own classifier


def exported(folder: Path, outputs: int = 2) -> Path:
    torch.manual_seed(0)
    network = ResidualClassifier(2, outputs, width=4).eval()
    nn.init.normal_(network.head.weight)
    batch = torch.export.Dim("n", min=1, max=4096)
    program = torch.export.export(network, (torch.zeros(2, 2, 32, 32),), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "net.pt2")
    return folder / "net.pt2"


def test_a_given_classifier_is_judged_not_trained(tmp_path: Path) -> None:
    e = TINY.with_settings({"classifier.path": str(exported(tmp_path))})
    outcome = ensure(Store(tmp_path / "store"), e, "classifier")
    facts = outcome["classifier"].facts
    assert facts["trained_here"] is False
    assert facts["report"]["n"] == len(ImageStore(outcome["data"].path).rows("test"))
    assert not (outcome["classifier"].path / "model.safetensors").exists()


def test_another_file_under_the_same_name_is_another_classifier(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(b"one")
    e = TINY.with_settings({"classifier.path": str(path)})
    before = stage_digests(e)
    path.write_bytes(b"two")
    after = stage_digests(e)
    assert {name for name in before if before[name] != after[name]} == FROM_CLASSIFIER


def test_the_seed_of_training_does_not_matter_to_a_given_classifier(tmp_path: Path) -> None:
    e = TINY.with_settings({"classifier.path": str(exported(tmp_path))})
    assert "classifier" not in changed(e, run__seed=7)


def test_a_classifier_that_does_not_fit_leaves_no_entry_and_mending_it_goes_on(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    e = TINY.with_settings({"classifier.path": str(exported(tmp_path, outputs=3))})
    with pytest.raises(UserError, match=r"returns \[2, 3\] for 2 images, but 2 classes"):
        ensure(store, e, "classifier")
    assert not store.has("classifier", stage_digests(e)["classifier"])
    exported(tmp_path)
    outcome = ensure(store, e, "classifier")
    assert outcome.paid == ["classifier"]
    assert outcome.reused == ["data"]


def test_weights_that_are_not_there_are_told_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="evaluation.lpips"):
        stage_digests(TINY.with_settings({"evaluation.lpips": str(tmp_path / "none.pth")}))


def test_other_weights_under_the_same_name_are_another_distance(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"one")
    before = stage_digests(TINY.with_settings({"evaluation.lpips": str(weights)}))
    weights.write_bytes(b"two")
    after = stage_digests(TINY.with_settings({"evaluation.lpips": str(weights)}))
    assert {n for n in before if before[n] != after[n]} == {"reconstruction", *FROM_REFERENCES}
