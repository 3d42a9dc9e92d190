"""One run of every stage: its row says what METRICS documents, and a second run computes only what has changed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from diffex import assay
from diffex.config import load
from diffex.data import ImageStore
from diffex.errors import UserError
from diffex.measures import METRICS, overall_score, pareto_front
from diffex.pipeline import Outcome, ensure, load_explainer
from diffex.ranking import EffectArrays
from diffex.scoreboard import describe, describe_change, partial_scores
from diffex.settings import to_dict
from diffex.store import Store

TINY = load(Path(__file__).with_name("tiny.yaml"))


@dataclass
class Ran:
    """A finished experiment, its store, and what an observer was told."""

    store: Store
    outcome: Outcome
    told: list[tuple[str, Mapping[str, Any]]]

    @property
    def row(self) -> dict[str, Any]:
        text = (self.outcome["scoreboard"].path / "row.json").read_text(encoding="utf-8")
        return dict(json.loads(text))

    def again(self, last: str = "scoreboard", **settings: Any) -> Outcome:
        changed = TINY.with_settings({name.replace("__", "."): value for name, value in settings.items()})
        return ensure(self.store, changed, last)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    store = Store(tmp_path_factory.mktemp("store"))
    told: list[tuple[str, Mapping[str, Any]]] = []
    outcome = ensure(store, TINY, "scoreboard", observe=lambda stage, facts: told.append((stage, dict(facts))))
    return Ran(store, outcome, told)


# ----------------------------------------------------------------------------------------------------------------------
# The row


def measures(row: Mapping[str, Any]) -> set[str]:
    """Keys of a row without bounds of intervals, numbers of images and units, names, and single directions."""
    sizes = {"reconstruction.n", "reconstruction.units", "classifier.n", "top_n", "top_units", "path.n", "path.units",
             "truth.n", "stability.seeds"}  # fmt: skip
    words = {n for n, value in row.items() if isinstance(value, str)}
    bounds = {f"{name}_{side}" for name in row for side in ("low", "high")}
    return {n for n in row if n not in sizes | bounds | words and not n.startswith("direction_")}


def test_the_row_has_just_the_measures_that_are_documented(ran: Ran) -> None:
    assert measures(ran.row) == {name for name in METRICS if "lpips" not in name}


def test_intervals_hold_their_values(ran: Ran) -> None:
    bounded = [name for name in ran.row if f"{name}_low" in ran.row]
    assert {"flip_rate", "ssim", "classifier.accuracy", "gate.random", "class_mean.flip_rate"} <= set(bounded)
    for name in (n for n in bounded if not math.isnan(ran.row[f"{n}_low"])):
        assert ran.row[f"{name}_low"] <= ran.row[name] <= ran.row[f"{name}_high"], name


def test_shares_lie_between_nothing_and_all(ran: Ran) -> None:
    shares = [n for n in METRICS if n.endswith(("flip_rate", "flip_max", "accuracy", "p_value", "overlap"))]
    shares += [
        "disentanglement",
        "gate.swapped",
        "gate.random",
        "score",
        "agreement",
        "edit.sparsity",
        "path.monotonic",
    ]
    shares += ["edit.implausible", "stability.code", "stability.image", "flip.area", "oracle.agreement"]
    told = [ran.row[name] for name in shares if not math.isnan(ran.row[name])]
    assert len(told) > len(shares) // 2
    assert all(0 <= value <= 1 for value in told)


def test_the_score_is_the_geometric_mean_of_the_objectives(ran: Ran) -> None:
    row = ran.row
    assert row["score"] == pytest.approx((row["flip_rate"] * row["disentanglement"] * row["ssim"]) ** (1 / 3))
    assert row["disentanglement"] == pytest.approx(1 - row["directions.overlap"])


def test_the_score_needs_all_objectives() -> None:
    assert overall_score({"flip_rate": 0.5, "disentanglement": 0.5, "ssim": 0.5}) == pytest.approx(0.5)
    assert overall_score({"flip_rate": 1.0, "disentanglement": 0.0, "ssim": 1.0}) == 0.0
    assert overall_score({"flip_rate": 1.0, "disentanglement": 0.5, "ssim": -0.1}) == 0.0


def test_the_row_repeats_what_ranking_and_stages_say(ran: Ran) -> None:
    first = pq.read_table(ran.outcome["scoreboard"].path / "ranking.parquet").to_pylist()[0]
    for name, column in {"flip_rate": "flip_rate", "mean_shift": "effect", "null.p_value": "p_value"}.items():
        assert ran.row[name] == pytest.approx(first[column])
    assert ran.row["ssim"] == ran.outcome["reconstruction"].facts["ssim"]["mean"]
    assert ran.row["classifier.accuracy"] == ran.outcome["classifier"].facts["report"]["accuracy"]
    spent = [entry.facts.get("unet_evaluations", 0) for entry in ran.outcome.entries.values()]
    assert ran.row["cost.unet_evaluations"] == sum(spent) > 0


def test_there_are_as_many_top_directions_as_asked_for_each_with_words(ran: Ran) -> None:
    top = ran.outcome["scoreboard"].facts["top"]
    assert [t["rank"] for t in top] == [1, 2]
    assert all(t["words"] for t in top)
    assert {t["truth"] for t in top} <= {"planted", "decoy", "nothing"}
    assert ran.row["direction_2.effect"] == pytest.approx(top[1]["effect"])


def test_effects_are_counted_on_test_images_only(ran: Ran) -> None:
    table = pq.read_table(ran.outcome["effects"].path / "effects.parquet")
    store = ImageStore(ran.outcome["data"].path)
    assert set(store.parts[table["row"].to_numpy()]) == {"test"}
    assert set(table["class_name"].to_pylist()) == {assay.CONTROL}
    assert "Metadata_Well" in table.column_names


def test_every_edit_has_a_verdict_of_everybody_and_its_distances(ran: Ran) -> None:
    table = pq.read_table(ran.outcome["effects"].path / "effects.parquet")
    for judge in ("p", "witness", "robust"):
        for when in ("reconstruction", "edit"):
            total = sum(table[f"{judge}_{when}:{c}"].to_numpy() for c in ran.outcome["data"].facts["class_names"])
            assert total == pytest.approx(1.0, abs=1e-5)
    assert (table["perceptual"].to_numpy() >= 0).all()
    inside, outside = (table[f"l1_{where}"].to_numpy() for where in ("cell", "outside"))
    whole, seen = table["l1"].to_numpy(), ~np.isnan(inside) & ~np.isnan(outside)
    assert seen.any()
    assert (np.minimum(inside, outside)[seen] <= whole[seen] + 1e-6).all()
    assert (np.maximum(inside, outside)[seen] >= whole[seen] - 1e-6).all()


def test_the_top_directions_are_followed_from_the_reconstruction_to_the_edit_of_the_table(ran: Ran) -> None:
    facts, folder = ran.outcome["evidence"].facts, ran.outcome["evidence"].path
    top = ran.outcome["scoreboard"].facts["top"]
    assert [a["direction"] for a in facts["audited"]] == [t["direction"] for t in top]
    ways = pq.read_table(folder / "trajectories.parquet")
    effects = pq.read_table(ran.outcome["effects"].path / "effects.parquet").to_pylist()
    said = {
        (r["row"], r["direction"], r["alpha"] > 0): r["p_edit:compound"]
        for r in effects if r["kind"] == "learned" and r["reference"]
    }  # fmt: skip
    last = [r for r in ways.to_pylist() if r["step"] == TINY.evaluation.steps]
    assert len(last) == TINY.evaluation.followed_images * TINY.evaluation.audited
    for r in last:
        assert r["p:compound"] == pytest.approx(said[r["row"], r["direction"], r["alpha"] > 0], abs=1e-4)
    assert {r["step"] for r in ways.to_pylist() if r["distance"] == 0.0} >= {0}


def test_real_cells_are_ones_that_no_training_has_seen(ran: Ran) -> None:
    table = pq.read_table(ran.outcome["real_cells"].path / "features.parquet")
    store = ImageStore(ran.outcome["data"].path)
    assert set(store.parts[table["row"].to_numpy()]) == {"valid", "test"}
    classes = table["class_name"].to_pylist()
    assert {classes.count(name) for name in store.info.class_names} == {TINY.evaluation.real_images}


def test_the_phenotype_table_has_a_row_for_each_direction_and_feature(ran: Ran) -> None:
    table = pq.read_table(ran.outcome["scoreboard"].path / "phenotypes.parquet").to_pylist()
    audited = {a["direction"] for a in ran.outcome["evidence"].facts["audited"]}
    assert {r["direction"] for r in table} == audited
    features = {r["feature"] for r in table}
    assert len(table) == len(features) * len(audited)
    assert ran.row["real.tested"] == len(features)
    assert ran.row["real.features"] == sum(r["differs"] for r in table) / len(audited)


def test_the_witness_is_another_network_and_does_not_depend_on_the_classifier(ran: Ran) -> None:
    weights = [load_file(ran.outcome[name].path / "model.safetensors") for name in ("classifier", "robust")]
    assert any(not torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
    assert "witness" not in ran.again("witness", classifier__width=16).paid


def test_attacks_never_raise_accuracy(ran: Ran) -> None:
    assert ran.row["attack.accuracy"] <= ran.outcome["robust"].facts["attacks"]["classifier"]["accuracy"]
    assert ran.row["attack.robust_accuracy"] <= ran.outcome["robust"].facts["attacks"]["robust"]["accuracy"]


def test_scores_of_a_complete_table_are_those_of_the_row(ran: Ran) -> None:
    table = pq.read_table(ran.outcome["effects"].path / "effects.parquet")
    found = partial_scores(TINY, ran.outcome["effects"].facts["pairs"], table)
    assert found == pytest.approx({name: ran.row[name] for name in ("flip_rate", "disentanglement")})


# ----------------------------------------------------------------------------------------------------------------------
# Running again

EVERYTHING = [
    "data", "classifier", "ruler", "witness", "robust", "real_cells", "warmup", "autoencoder", "reconstruction",
    "latents", "codes", "references", "responses", "directions", "replicas", "effects", "evidence", "truth",
    "scoreboard",
]  # fmt: skip


def test_the_first_run_pays_for_everything_and_tells_of_every_stage(ran: Ran) -> None:
    assert sorted(ran.outcome.paid) == sorted(EVERYTHING)
    assert ran.outcome.reused == []
    stages = [stage for stage, _ in ran.told]
    assert "effects so far" in stages
    assert [s for s in stages if s not in ("effects so far", "point")] == list(ran.outcome.entries)
    curves = [facts["point"] for stage, facts in ran.told if stage == "point" and facts["stage"] == "autoencoder"]
    assert curves[-1]["images"] == TINY.autoencoder.images
    assert dict(ran.told)["latents"] == ran.outcome["latents"].facts


def test_the_same_run_again_computes_nothing(ran: Ran) -> None:
    again = ran.again()
    assert again.paid == []
    assert again["scoreboard"].path == ran.outcome["scoreboard"].path
    assert again.seconds() == pytest.approx(ran.outcome.seconds())
    assert again.seconds(computed=True) == 0.0


def test_another_lambda2_trains_directions_only(ran: Ran) -> None:
    paid = ran.again(directions__lambda2=3.0).paid
    assert paid == ["directions", "replicas", "effects", "evidence", "truth", "scoreboard"]


def test_another_lambda1_branches_from_the_shared_warmup(ran: Ran) -> None:
    again = ran.again("autoencoder", autoencoder__lambda1=0.5)
    assert again.paid == ["autoencoder"]
    a, b = (load_file(o["autoencoder"].path / "model.safetensors") for o in (ran.outcome, again))
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_another_ranking_renders_nothing(ran: Ran) -> None:
    again = ran.again(ranking__top=1, ranking__confidence=0.8)
    assert again.paid == ["scoreboard"]
    assert [t["rank"] for t in again["scoreboard"].facts["top"]] == [1]


def test_another_store_gives_bit_identical_codes(ran: Ran, tmp_path: Path) -> None:
    other = ensure(Store(tmp_path), TINY, "latents")
    a, b = (load_file(o["latents"].path / "latents.safetensors")["z"] for o in (ran.outcome, other))
    assert torch.equal(a, b)


def test_a_class_that_is_not_there_stops_before_anything_is_rendered(ran: Ran) -> None:
    with pytest.raises(UserError, match=r"ranking\.target = 'tretaed' is not a class; the classes are DMSO, compound"):
        ran.again(ranking__target="tretaed")
    assert not list(ran.store.root.glob("effects/*.partial/*.parquet"))


# ----------------------------------------------------------------------------------------------------------------------
# The explanation, from a folder


def trial(folder: Path, name: str, ran: Ran, score: float, status: str = "finished") -> None:
    place = folder / "trials" / name
    place.mkdir(parents=True)
    (place / "row.json").write_text(json.dumps({"status": status, "score": score}))
    (place / "experiment.json").write_text(json.dumps(to_dict(TINY)))
    (place / "stages.json").write_text(json.dumps({s: str(e.path) for s, e in ran.outcome.entries.items()}))


def test_a_loaded_explainer_explains_images(ran: Ran, tmp_path: Path) -> None:
    trial(tmp_path, "t1", ran, 0.5)
    explainer = load_explainer(tmp_path, device="cpu")
    store = ImageStore(ran.outcome["data"].path)
    why = explainer.attribute(store.batch([0, 1]).x, target="compound", alphas=(1.0,))
    assert why.effect.shape == (2, 3, 2)
    probabilities = load_file(ran.outcome["classifier"].path / "probabilities.safetensors")["probs"]
    assert torch.allclose(explainer.classifier.probabilities(store.batch([0, 1]).x), probabilities[:2], atol=1e-5)


def test_the_trial_of_the_highest_score_is_loaded_unless_one_is_named(ran: Ran, tmp_path: Path) -> None:
    for name, score, status in (("low", 0.1, "finished"), ("high", 0.9, "finished"), ("cut", 1.0, "stopped")):
        trial(tmp_path, name, ran, score, status)
        file = tmp_path / "trials" / name / "experiment.json"
        file.write_text(json.dumps(to_dict(TINY.with_settings({"rendering.steps": 4 + len(name)}))))
    assert load_explainer(tmp_path).model.rendering.steps == 4 + len("high")
    assert load_explainer(tmp_path, trial="low").model.rendering.steps == 4 + len("low")
    with pytest.raises(UserError, match=r"no finished trial 'lov': did you mean 'low'"):
        load_explainer(tmp_path, trial="lov")


def test_a_folder_without_trials_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no finished trial"):
        load_explainer(tmp_path)


def test_an_explanation_whose_stages_are_gone_is_named(ran: Ran, tmp_path: Path) -> None:
    trial(tmp_path, "t1", ran, 0.5)
    file = tmp_path / "trials" / "t1" / "stages.json"
    places = json.loads(file.read_text()) | {"directions": f"{ran.store.root}/directions/gone"}
    file.write_text(json.dumps(places))
    with pytest.raises(UserError, match=r"stage directions of this explanation is gone"):
        load_explainer(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# The front


def front(*points: tuple[float, ...]) -> list[bool]:
    names = [f"o{i}" for i in range(len(points[0]))] if points else ["o0"]
    return pareto_front([dict(zip(names, p, strict=True)) for p in points], names)


def test_the_front_holds_rows_that_no_other_beats() -> None:
    assert front((1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.4, 0.4), (0.5, 0.4)) == [True, True, True, False, False]


def test_equal_rows_are_on_the_front_together() -> None:
    assert front((0.5, 0.5), (0.5, 0.5), (0.1, 0.1)) == [True, True, False]


def test_a_single_objective_has_its_best_row_in_front() -> None:
    assert front((0.1,), (0.9,), (0.5,)) == [False, True, False]


def test_no_rows_have_no_front() -> None:
    assert front() == []


def test_a_row_without_a_number_is_not_in_front() -> None:
    assert front((math.nan, 0.9), (0.5, 0.5)) == [False, True]


# ----------------------------------------------------------------------------------------------------------------------
# Words

SIDE = 8


def change(channels: int = 2, **values: float) -> np.ndarray:
    """A change map: 'c0' and 'c1' change a whole channel, 'centre0' only its middle, 'edge0' all but that."""
    at = np.linspace(-1, 1, SIDE)
    centre = np.hypot(at[:, None], at[None, :]) < 0.6
    maps = np.zeros((channels, SIDE, SIDE))
    for name, value in values.items():
        where = {"c": np.ones_like(centre), "centre": centre, "edge": ~centre}[name[:-1]]
        maps[int(name[-1])][where] = value
    return maps.reshape(-1)


NAMES = ("DNA", "actin")


def test_a_channel_that_gains_light_brightens() -> None:
    assert describe_change(change(centre0=0.2), NAMES) == "DNA brightens in the centre (+20 %)"


def test_a_channel_that_loses_light_darkens() -> None:
    assert describe_change(change(edge1=-0.05), NAMES) == "actin darkens around it (-5 %)"


def test_the_channel_that_changes_more_comes_first() -> None:
    words = describe_change(change(c0=0.05, c1=-0.3), NAMES).split("; ")
    assert [w.split()[0] for w in words] == ["actin", "DNA"]


def test_tiny_changes_are_not_described() -> None:
    assert describe_change(change(c0=0.004, c1=-0.2), NAMES).startswith("actin")
    assert "DNA" not in describe_change(change(c0=0.004, c1=-0.2), NAMES)
    assert describe_change(change(c0=0.004), NAMES) == "hardly any change of mean intensity"


def test_no_more_than_three_channels_are_described() -> None:
    words = describe_change(np.full(5 * SIDE * SIDE, 0.1), tuple("abcde"))
    assert len(words.split("; ")) == 3


def arrays_of(shifts: Mapping[str, float]) -> EffectArrays:
    """Two images, one direction, that shifts factors as given forwards and the other way backwards."""
    both = np.array([list(shifts.values()), [-v for v in shifts.values()]], np.float32)
    empty = np.zeros((2, 1, 2))
    return EffectArrays(
        rows=np.arange(2), groups=np.arange(2), effect=empty, flips=empty > 0, eligible=np.ones(2, bool),
        change=np.broadcast_to(change(c0=0.2).astype(np.float32), (2, 1, 2, 2 * SIDE * SIDE)),
        shifts=np.broadcast_to(both, (2, 1, 2, len(shifts))), factors=tuple(shifts), alpha=np.ones(2), extra={},
            before=np.zeros(2), judges={},
    )  # fmt: skip


def test_measured_factors_are_told_in_their_own_words() -> None:
    a = arrays_of({"nucleus_area": 0.6, "actin_rim": -2.0, "cytoplasm_area": 0.2})
    rim, area = assay.FACTORS["actin_rim"], assay.FACTORS["nucleus_area"]
    assert describe(a, 0, 0, NAMES) == f"{rim.falls} (-2.0 sd); {area.rises} (+0.6 sd)"
    assert describe(a, 0, 1, NAMES) == f"{rim.rises} (+2.0 sd); {area.falls} (-0.6 sd)"


def test_factors_that_hardly_move_are_not_told() -> None:
    assert describe(arrays_of({"nucleus_area": 0.3}), 0, 0, NAMES) == "no measured factor changes"


def test_without_measured_factors_the_change_map_is_told() -> None:
    assert describe(arrays_of({}), 0, 0, NAMES).startswith("DNA brightens")


def test_every_factor_has_words_for_both_ways() -> None:
    words = [w for f in assay.FACTORS.values() for w in (f.rises, f.falls)]
    assert all(words)
    assert len(set(words)) == len(words)


def test_every_metric_is_documented_in_one_line() -> None:
    assert all(doc and "\n" not in doc and not doc.endswith(".") for doc in METRICS.values())
