"""Settings: checked once, named in full, stable in their digests, and written back as they were read."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from diffex.config import Autoencoder, Data, Experiment, Run, from_dict, idle_settings, load, recipes
from diffex.errors import UserError
from diffex.settings import describe, digest, flat, parse_settings, to_dict


def changed(**settings: Any) -> Experiment:
    """The default experiment with settings replaced; a double underscore stands for the dot."""
    return Experiment().with_settings({name.replace("__", "."): value for name, value in settings.items()})


# ----------------------------------------------------------------------------------------------------------------------
# --set


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("data.size=64", 64),
        ("autoencoder.lambda1=0.3", 0.3),
        ("autoencoder.learning_rate=1e-4", 1e-4),  # YAML takes this for a word
        ("data.path=null", None),
        ("autoencoder.flips=true", True),
        ("autoencoder.widths=[16, 32]", [16, 32]),
        ("data.path=a folder/x=y", "a folder/x=y"),
        ("ranking.target=7", "7"),  # a class may be called 7
        ("data.channels=[0, actin]", ["0", "actin"]),
        ("assay.treatments={drug: {actin_rim: 2}}", {"drug": {"actin_rim": 2.0}}),
    ],
)
def test_a_value_on_the_command_line_becomes_the_settings_type(pair: str, value: object) -> None:
    name = pair.split("=")[0]
    assert flat(load("assay", parse_settings([pair])))[name] == value


def test_the_last_of_two_equal_names_wins() -> None:
    assert parse_settings(["data.size=32", "data.size=64"]) == {"data.size": 64}


def test_spaces_around_a_name_do_not_count() -> None:
    assert parse_settings([" data.size = 64"]) == {"data.size": 64}


@pytest.mark.parametrize("pair", ["data.size", "=3", "  =3", "data.size=[1", "data.path=2020-13-45"])
def test_what_is_no_setting_is_refused(pair: str) -> None:
    with pytest.raises(UserError, match="--set"):
        parse_settings([pair])


@pytest.mark.parametrize("text", ["DNA,actin", "DNA, actin", " DNA ,actin,"])
def test_words_with_commas_are_a_list_of_words(text: str) -> None:
    assert changed(data__channels=text).data.channels == ("DNA", "actin")


def test_a_single_word_is_a_list_of_one() -> None:
    assert changed(data__split_by="donor").data.split_by == ("donor",)


def test_numbers_with_commas_are_a_list_of_numbers() -> None:
    """So that a sweep, whose choices are words and numbers, can vary a list."""
    assert changed(autoencoder__widths="16,32").autoencoder.widths == (16, 32)
    assert changed(ranking__alphas="0.5, 1").ranking.alphas == (0.5, 1.0)


@pytest.mark.parametrize("value", ["16", 16, "16,DNA", "a,b"])
def test_what_is_no_list_of_numbers_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="autoencoder.widths must be"):
        changed(autoencoder__widths=value)


# ----------------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("autoencoder.lamda1", "autoencoder.lambda1"),
        ("directions.num_direction", "directions.num_directions"),
        ("dat.size", "data.size"),
        ("autoencodr.images", "autoencoder.images"),
        ("lambda2", "directions.lambda2"),  # the section left out
        ("data.batch_size", "classifier.batch_size"),  # right name, wrong section
    ],
)
def test_an_unknown_setting_names_the_nearest_valid_one(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=rf"unknown setting '{name}': did you mean '{nearest}'\?"):
        Experiment().with_settings({name: 1})


def test_an_unknown_setting_in_a_tree_names_the_nearest_valid_one() -> None:
    with pytest.raises(UserError, match=r"'directions\.taus'.*'directions\.tau'"):
        from_dict({"directions": {"taus": 1}})


def test_an_unknown_section_in_a_tree_names_the_nearest_valid_one() -> None:
    with pytest.raises(UserError, match=r"'autoencode'.*'autoencoder'"):
        from_dict({"autoencode": {}})


def test_a_name_that_is_like_no_other_lists_the_sections() -> None:
    with pytest.raises(UserError) as told:
        Experiment().with_settings({"qqq.zzz": 1})
    assert all(repr(section) in str(told.value) for section in to_dict(Experiment()))


def test_a_section_alone_is_no_setting() -> None:
    with pytest.raises(UserError, match="is a section"):
        Experiment().with_settings({"data": 1})


def test_a_section_must_hold_settings() -> None:
    with pytest.raises(UserError, match="must hold settings"):
        from_dict({"data": 3})


# ----------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("directions.num_directions", 0, "between 1 and 1000"),
        ("data.size", 4, "between 8 and 1024"),
        ("data.valid_fraction", 0.6, "between 0.01 and 0.5"),
        ("autoencoder.lambda1", -1, "at least 0"),
        ("autoencoder.widths", [16, 2], "between 4 and 2048"),  # bounds hold for every element
        ("data.size", 32.5, "a whole number"),
        ("data.size", True, "a number"),
        ("data.size", "large", "a number"),
        ("data.size", None, "a number"),
        ("data.size", [32], "a number"),
        ("autoencoder.lambda1", float("nan"), "a number"),
        ("autoencoder.lambda1", float("inf"), "a number"),
        ("run.seed", float("inf"), "a number"),
        ("data.window", [0, float("inf")], "a number"),
        ("autoencoder.flips", 1, "true or false"),
        ("autoencoder.flips", "yes", "true or false"),
        ("data.path", ["a"], "a word"),
        ("data.classes", [True, False], "a word"),
        ("autoencoder.widths", 32, "a list"),
        ("assay.treatments", ["drug"], "a mapping"),
        ("assay.treatments", {"drug": 2}, "a mapping"),
        ("assay.treatments", {"drug": {"actin_rim": "much"}}, "a number"),
    ],
)
def test_a_value_out_of_type_or_range_is_refused_by_name(name: str, value: object, told: str) -> None:
    with pytest.raises(UserError, match=f"^{name}.* must be {told}"):
        Experiment().with_settings({name: value})


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("autoencoder.prediction", "epsilon", "eps"),
        ("directions.space", "whiten", "whitened"),
        ("evaluation.baselines", ["class_mean", "principle"], "principal"),  # words of a list are checked too
    ],
)
def test_an_unknown_word_names_the_nearest_allowed_one(name: str, value: object, nearest: str) -> None:
    with pytest.raises(UserError, match=f"^{name} = .*'{nearest}'"):
        Experiment().with_settings({name: value})


@pytest.mark.parametrize(("value", "kept"), [(1, 1), (1000, 1000), ("8", 8), (8.0, 8)])
def test_bounds_are_allowed_values_and_whole_numbers_stay_whole(value: object, kept: int) -> None:
    got = changed(directions__num_directions=value, directions__lambda2=0).directions.num_directions
    assert got == kept
    assert isinstance(got, int)


def test_every_default_lies_within_its_own_rules() -> None:
    assert from_dict(to_dict(Experiment())) == Experiment()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"data.size": 36}, "multiple of 8"),
        ({"data.size": 36, "autoencoder.widths": [16, 32]}, "encoder_widths"),
        ({"autoencoder.widths": []}, "autoencoder.widths is empty"),
        ({"classifier.path": "a.pt", "classifier.factory": "a:b"}, "not both"),
        ({"classifier.factory": "a:b"}, "classifier.weights"),
        ({"classifier.weights": "w.safetensors"}, "classifier.factory"),
        ({"classifier.input_low": 1.0}, "must lie below"),
        ({"data.window": [3]}, "two numbers"),
        ({"data.window": [3, 3]}, "the lower first"),
        ({"data.valid_fraction": 0.45, "data.test_fraction": 0.45}, "less than a fifth"),
        ({"directions.space": "raw"}, "directions.features = code"),
        ({"directions.num_directions": 1}, "directions.lambda2=0"),
        ({"data.classes": ["a"]}, "two or more"),
        ({"data.classes": ["a", "a"]}, "different"),
        ({"data.channels": ["DNA", "DNA"]}, "twice"),
        ({"ranking.source": "a", "ranking.target": "a"}, "both 'a'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Experiment().with_settings(settings)


def test_what_a_cross_check_advises_is_accepted() -> None:
    changed(directions__num_directions=1, directions__lambda2=0)
    changed(data__size=36, autoencoder__widths=[16, 32], autoencoder__encoder_widths=[16, 32])
    changed(
        directions__space="raw", directions__features="code", directions__covariance="shifts", directions__lambda3=0
    )


# ----------------------------------------------------------------------------------------------------------------------
# Copies and digests


def test_with_settings_leaves_the_original_and_all_other_settings_alone() -> None:
    before = Experiment()
    after = before.with_settings({"autoencoder.lambda1": 0.25})
    assert before == Experiment()
    assert {n for n, v in flat(after).items() if v != flat(before)[n]} == {"autoencoder.lambda1"}


def test_an_experiment_cannot_be_changed_in_place() -> None:
    with pytest.raises(AttributeError):
        Experiment().data.size = 64  # type: ignore[misc]


def test_a_digest_changes_with_every_setting() -> None:
    other = {
        "data.size": 64, "data.seed": 1, "assay.treatments": {"drug": {"actin_rim": 1}}, "classifier.noise": 0.5,
        "classifier.width": 25, "autoencoder.lambda1": 0.5, "autoencoder.flips": True, "rendering.steps": 11,
        "directions.tau": 0.4, "ranking.top": 4, "evaluation.baselines": [], "run.seed": 1, "ranking.target": "x",
    }  # fmt: skip
    digests = [digest(Experiment())] + [digest(Experiment().with_settings({n: v})) for n, v in other.items()]
    assert len(set(digests)) == len(digests)


def test_a_digest_does_not_depend_on_how_a_value_was_written() -> None:
    assert digest(changed(data__channels="DNA,actin")) == digest(changed(data__channels=["DNA", "actin"]))
    assert digest(changed(autoencoder__lambda1=1)) == digest(changed(autoencoder__lambda1="1.0"))


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})


def test_a_digest_is_the_same_in_another_process() -> None:
    """Hash randomisation must not reach it: other processes find results by it."""
    code = (
        "from diffex.config import load; from diffex.settings import digest; "
        "print(digest(load('assay', {'data.size': 64})))"
    )
    here = Path(__file__).resolve().parents[1]
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=here)
    assert other.stdout.strip() == digest(load("assay", {"data.size": 64}))


# ----------------------------------------------------------------------------------------------------------------------
# Recipes


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_that_ships_loads(name: str) -> None:
    assert isinstance(load(name), Experiment)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown recipe 'golgy': did you mean 'golgi'"):
        load("golgy")


def test_a_recipe_file_keeps_the_defaults_of_what_it_does_not_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("data:\n  size: 64\nrun: {seed: 3}\n")
    assert load(file) == Experiment(data=Data(size=64), run=Run(seed=3))


def test_an_empty_recipe_file_is_the_default(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing\n")
    assert load(file) == Experiment()


def test_settings_win_over_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("data: {size: 64}\nautoencoder: {lambda1: 7}\n")
    e = load(file, {"data.size": 128})
    assert (e.data.size, e.autoencoder.lambda1) == (128, 7.0)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"data: {size: 32", "is not YAML"),
        (b"data:\n\tsize: 32\n", "is not YAML"),
        (b"made: 2020-13-45\n", "is not YAML"),
        (b"data: {path: \xff\xfe}\n", "recipe"),
        (b"- data\n- run\n", "must hold sections"),
        (b"just words\n", "must hold sections"),
        (b"data:\n", "must hold settings"),
        (b"data: {sise: 32}\n", "did you mean 'data.size'"),
        (b"1: 2\n", "unknown section"),
    ],
)
def test_a_broken_recipe_file_is_refused_in_one_line(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=told) as error:
        load(file)
    assert "\n" not in str(error.value)


def test_a_recipe_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no recipe file '.*missing\.yaml'"):
        load(tmp_path / "missing.yaml")


# ----------------------------------------------------------------------------------------------------------------------
# Settings without effect


def test_the_default_experiment_has_no_idle_setting() -> None:
    assert idle_settings(Experiment()) == []


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({"data.path": "x", "assay.seed": 3}, "assay.seed"),
        ({"data.window": [0, 9]}, "data.window"),
        ({"data.channel_names": ["a"]}, "data.channel_names"),
        ({"assay.treatments": {"drug": {}}, "assay.design": "null"}, "assay.design"),
        ({"classifier.path": "c.pt", "classifier.width": 8}, "classifier.width"),
        ({"classifier.input_low": 0.0}, "classifier.input_low"),
        ({"rendering.encode_steps": 7}, "rendering.encode_steps"),
        ({"rendering.inversion": "ddim", "rendering.iterations": 3}, "rendering.iterations"),
        ({"autoencoder.truncated_steps": 3}, "autoencoder.truncated_steps"),
        ({"directions.space": "standardised", "directions.explained_variance": 0.5}, "directions.explained_variance"),
        ({"directions.kind": "linear", "directions.depth": 1}, "directions.depth"),
    ],
)
def test_a_changed_setting_without_effect_is_warned_of(settings: dict[str, object], idle: str) -> None:
    (warning,) = idle_settings(Experiment().with_settings(settings))
    assert warning.startswith(f"{idle} = ")
    assert "has no effect" in warning


def test_a_changed_setting_with_effect_is_not_warned_of() -> None:
    truncated = {"autoencoder.classifier_term": "truncated", "autoencoder.truncated_steps": 3}
    own_data = {"data.path": "x", "data.window": [0, 9], "classifier.path": "c.pt", "classifier.input_low": 0.0}
    assert idle_settings(Experiment().with_settings({**truncated, **own_data})) == []


# ----------------------------------------------------------------------------------------------------------------------
# Written and read again


def reread(e: Experiment) -> Experiment:
    return from_dict(yaml.safe_load(describe(e)))


@pytest.mark.parametrize("name", recipes())
def test_a_description_reads_back_to_the_same_experiment(name: str) -> None:
    assert reread(load(name)) == load(name)


def test_a_description_of_long_and_nested_values_reads_back() -> None:
    e = changed(
        data__path="/a/very/long/path/to/the/images/of/some/screen.parquet",  # longer than the column of comments
        data__channel_names=["nuclei: blue", "# 2", "null", "1", "yes", "", "über"],
        autoencoder__widths=[1024, 1024, 2048],
        autoencoder__learning_rate=1e-7,
        assay__treatments={"drug A, 3 µM": {"actin_rim": -1.5, "nucleus_area": 1e-9}},
    )
    assert reread(e) == e


@given(path=st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=80))
@budget(max_examples=40)
def test_a_description_of_any_path_reads_back(path: str) -> None:
    assert reread(changed(data__path=path)).data.path == path


def test_a_description_documents_every_setting() -> None:
    lines = [line for line in describe(Experiment()).splitlines() if line.startswith("  ")]
    assert len(lines) == len(flat(Experiment()))
    assert all(line.partition(" # ")[2].strip() for line in lines)


def test_a_description_lists_the_allowed_words() -> None:
    (line,) = (x for x in describe(Experiment()).splitlines() if x.startswith("  prediction:"))
    assert "(v | eps)" in line


def test_flat_names_are_the_keys_of_set() -> None:
    values = flat(changed(autoencoder__lambda1=0.5))
    assert Experiment().with_settings(values).autoencoder == Autoencoder(lambda1=0.5)
