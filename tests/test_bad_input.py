"""Bad input: status 2, one line that says what to mend, no stack trace, and whatever was there stays as it was."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from diffex.cli import claim_output, main
from diffex.config import Experiment, load
from diffex.errors import UserError
from diffex.settings import digest, flat, parse_settings

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

TINY = Path(__file__).with_name("tiny.yaml")
RNG = np.random.default_rng(0)

Made = Path | str
Maker = Callable[[Path], Made]
"""Makes an input in a folder and returns what the command is given: a path or a word."""


# ----------------------------------------------------------------------------------------------------------------------
# Good input, to be spoilt


def picture(*shape: int) -> NDArray[np.uint8]:
    return RNG.integers(0, 255, shape or (16, 16, 3), dtype=np.uint8)


def png(image: NDArray | None = None, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture() if image is None else image).save(buffer, form)
    return buffer.getvalue()


def tiff(image: NDArray, **how: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, image, photometric="minisblack", **how)
    return buffer.getvalue()


def folder(
    classes: Sequence[str] = ("ape", "zebra"), count: int = 8, empty: Sequence[str] = (), **spoilt: bytes
) -> Maker:
    """A folder of classes, some perhaps empty; ``spoilt`` is one more file of the last class, by its ending."""

    def make(tmp: Path) -> Path:
        (tmp / "cells").mkdir()
        for name in classes:
            (tmp / "cells" / name).mkdir()
            for i in range(0 if name in empty else count):
                (tmp / "cells" / name / f"{i}.png").write_bytes(png())
        for ending, content in spoilt.items():
            (tmp / "cells" / classes[-1] / f"spoilt.{ending}").write_bytes(content)
        return tmp / "cells"

    return make


def parquet(**columns: Sequence[Any] | None) -> Maker:
    """A Parquet file of sixteen images; a column of None is left out."""

    def make(tmp: Path) -> Path:
        good: dict[str, Any] = {"image": [png() for _ in range(16)], "class_name": ["ape", "zebra"] * 8}
        table = {name: column for name, column in {**good, **columns}.items() if column is not None}
        pq.write_table(pa.table(table), tmp / "cells.parquet")
        return tmp / "cells.parquet"

    return make


def damaged(change: Callable[[bytes], bytes], make: Maker | None = None) -> Maker:
    """The same file with other bytes."""

    def remake(tmp: Path) -> Path:
        path = Path((make or parquet())(tmp))
        path.write_bytes(change(path.read_bytes()))
        return path

    return remake


def overwritten(content: bytes) -> bytes:
    """Half of it replaced in the middle, the end (a Parquet file's index) left whole."""
    quarter = len(content) // 4
    return content[:quarter] + b"\xaa" * (2 * quarter) + content[3 * quarter :]


def written(name: str, content: bytes) -> Maker:
    def make(tmp: Path) -> Path:
        (tmp / name).write_bytes(content)
        return tmp / name

    return make


def absent(name: str) -> Maker:
    return lambda tmp: tmp / name


def traced(channels: int, outputs: int) -> Maker:
    """A TorchScript classifier for images of so many channels, with so many outputs."""

    def make(tmp: Path) -> Path:
        network = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, outputs))
        torch.jit.trace(network.eval(), torch.zeros(2, channels, 16, 16)).save(str(tmp / "classifier.pt"))
        return tmp / "classifier.pt"

    return make


def weights(tmp: Path) -> Path:
    save_file({"w": torch.zeros(3)}, tmp / "weights.safetensors")
    return tmp / "weights.safetensors"


def state_dict(tmp: Path) -> Path:
    torch.save({"w": torch.zeros(3)}, tmp / "classifier.pt")
    return tmp / "classifier.pt"


# ----------------------------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Bad:
    """A bad command.

    Attributes:
        name: of the row.
        told: fragments of the message, which must say what is wrong or what mends it.
        settings: for --set; ``MADE`` stands for what ``made`` made.
        data: makes what --data names.
        made: makes a file that a setting names.
        verb: of the command.
        recipe: makes what --recipe names (default: the tiny recipe).
        options: more options, each made.
    """

    name: str
    told: tuple[str, ...]
    settings: tuple[str, ...] = ()
    data: Maker | None = None
    made: Maker | None = None
    verb: str = "data"
    recipe: Maker | None = None
    options: tuple[tuple[str, Maker], ...] = ()


def word(text: str) -> Maker:
    return lambda tmp: text


def set_(*settings: str, told: tuple[str, ...], name: str | None = None) -> Bad:
    """A row of settings that are refused as soon as they are read."""
    return Bad(name or " ".join(settings), told, settings, verb="config")


def given(name: str, *told: str, made: Maker, settings: Sequence[str] = ("classifier.path=MADE",)) -> Bad:
    """A row about a classifier of the user's."""
    return Bad(f"classifier: {name}", told, tuple(settings), made=made, verb="fit")


FACTORY = ("classifier.weights=MADE",)
NAN, INFINITE = np.ones((2, 16, 16), np.float32)
NAN[3, 3], INFINITE[3, 3] = np.nan, np.inf

CONFIGURATION = [
    set_("autoencoder.lamda1=1", told=("autoencoder.lamda1", "did you mean 'autoencoder.lambda1'?")),
    set_("autoencodr.lambda1=1", told=("autoencodr.lambda1", "did you mean 'autoencoder.lambda1'?")),
    set_("lambda1=1", told=("did you mean 'autoencoder.lambda1'?",)),
    set_("data=cells", told=("'data' is a section", "data.path")),
    set_("data.size", told=("--set takes a.b=v", "data.size")),
    set_("data.window=[1", told=("data.window", "not a YAML value")),
    set_("data.size=large", told=("data.size must be a number", "'large'")),
    set_("data.size=33.3", told=("data.size must be a whole number",)),
    set_("autoencoder.widths=32", told=("autoencoder.widths must be a list", "--set autoencoder.widths=")),
    set_("autoencoder.flips=maybe", told=("autoencoder.flips must be true or false",)),
    set_("autoencoder.lambda1=.nan", told=("autoencoder.lambda1 must be a number",)),
    set_("run.seed=.inf", told=("run.seed must be a number",)),
    set_("data.size=4", told=("data.size must be between 8 and 1024", "4")),
    set_("directions.num_directions=0", told=("directions.num_directions", "between 1 and 1000", "0")),
    set_("directions.tau=0", told=("directions.tau must be at least 1e-06",)),
    set_("directions.kind=cubic", told=("directions.kind = 'cubic'", "'mlp'", "'linear'", "'fixed'")),
    set_("autoencoder.prediction=epsilon", told=("did you mean 'eps'?",)),
    set_("data.size=30", told=("data.size = 30", "multiple of 4")),
    set_("data.classes=[ape]", told=("data.classes", "two or more")),
    set_("data.channels=[DNA, DNA]", told=("data.channels", "twice")),
    set_("classifier.path=a.pt", "classifier.factory=m:f", told=("not both",)),
    Bad("unknown recipe", ("unknown recipe 'golgy'", "did you mean 'golgi'?"), verb="config", recipe=word("golgy")),
    Bad("missing recipe file", ("no recipe file", "mine.yaml"), verb="config", recipe=absent("mine.yaml")),
    Bad("broken YAML", ("is not YAML", "line"), verb="config", recipe=written("mine.yaml", b"data: {size: 32\nrun: [")),
    Bad("binary recipe", ("is not YAML",), verb="config", recipe=written("mine.yaml", bytes(range(128, 256)))),
    Bad("recipe that is a list", ("must hold sections",), verb="config", recipe=written("mine.yaml", b"- data\n")),
    Bad("recipe with an unknown section", ("unknown section 'dat'", "'data'"), verb="config",
        recipe=written("mine.yaml", b"dat: {size: 32}\n")),
    Bad("recipe with an unknown setting", ("'data.sise'", "'data.size'"), verb="config",
        recipe=written("mine.yaml", b"data: {sise: 32}\n")),
]  # fmt: skip

IMAGES = [
    Bad("missing data path", ("no file or folder", "cells", "--data"), data=absent("cells")),
    Bad("data path of another kind", ("neither a folder", ".parquet"), data=written("cells.csv", b"a,b\n")),
    Bad("no sub-folders", ("no sub-folders", "a folder of its own"), data=folder(())),
    Bad("empty class folder", ("class folder", "zebra", ".png"),
        data=folder(empty=("zebra",))),
    Bad("one class only", ("one class only (ape)", "two or more"), data=folder(("ape",))),
    Bad("a class that isn't there", ("no class 'apes'", "did you mean 'ape'?"), ("data.classes=[apes, zebra]",),
        data=folder()),
    Bad("too few images", ("class 'ape' has only 2", "add images"), data=folder(count=2)),
    Bad("no image at all", ("spoilt.png", "not a PNG, JPEG or TIFF"), data=folder(png=b"I am a text")),
    Bad("empty image", ("spoilt.png", "repair or remove"), data=folder(png=b"")),
    Bad("cut PNG", ("spoilt.png", "unreadable"), data=folder(png=png()[:300])),
    Bad("cut JPEG", ("spoilt.jpg", "unreadable"), data=folder(jpg=png(form="JPEG")[:300])),
    Bad("cut TIFF", ("spoilt.tif", "unreadable"), data=folder(tif=tiff(picture(64, 64))[:900])),
    Bad("cut compressed TIFF", ("spoilt.tif", "unreadable"),
        data=folder(tif=tiff(picture(64, 64), compression="zlib")[:900])),
    Bad("NaN pixels", ("spoilt.tif", "NaN"), data=folder(tif=tiff(NAN))),
    Bad("infinite pixels", ("spoilt.tif", "infinite"), data=folder(tif=tiff(INFINITE))),
    Bad("too many channels", ("spoilt.tif", "6 channels", "has 3"), data=folder(tif=tiff(picture(6, 16, 16)))),
    Bad("channels that differ", ("spoilt.png", "1 channels", "has 3"), data=folder(png=png(picture(16, 16)))),
    Bad("types that differ", ("spoilt.tif", "uint16", "uint8", "convert"),
        data=folder(tif=tiff(picture(3, 16, 16).astype(np.uint16)))),
    Bad("more channels than there are", ("'3'", "3 channels", "red, green, blue"), ("data.channels=[0, 1, 2, 3]",),
        data=folder()),
    Bad("unknown channel", ("'DNA'", "red, green, blue"), ("data.channels=DNA",), data=folder()),
    Bad("more names than channels", ("data.channel_names", "4 channels", "have 3"),
        ("data.channels=[]", "data.channel_names=[a, b, c, d]"), data=folder()),
    Bad("unknown column to split by", ("data.split_by", "'plate'"), ("data.split_by=plate",), data=folder()),
]  # fmt: skip

PARQUET = [
    Bad("Parquet: no image column", ("column 'image'", "class_name"), data=parquet(image=None)),
    Bad("Parquet: no class column", ("'class_name' or 'label'",), data=parquet(class_name=None)),
    Bad("Parquet: images that are text", ("column 'image'", "encoded bytes", "string"), data=parquet(image=["x"] * 16)),
    Bad("Parquet: images that are numbers", ("encoded bytes", "list"), data=parquet(image=[[1, 2]] * 16)),
    Bad("Parquet: a null image", ("row 3", "empty"), data=parquet(image=[*[png()] * 3, None, *[png()] * 12])),
    Bad("Parquet: an unreadable image", ("row 3", "unreadable"),
        data=parquet(image=[*[png()] * 3, b"no image", *[png()] * 12])),
    Bad("Parquet: a null class", ("'class_name'", "row 2"), data=parquet(class_name=["a", "b", None, *["a"] * 13])),
    Bad("Parquet: label against class", ("'label' and 'class_name' contradict",), data=parquet(label=list(range(16)))),
    Bad("Parquet: no rows", ("lists no image",),
        data=parquet(image=pa.array([], pa.binary()), class_name=pa.array([], pa.string()))),
    Bad("Parquet: no bytes", ("not a readable Parquet file",), data=damaged(lambda content: b"")),
    Bad("Parquet: some text", ("not a readable Parquet file",), data=damaged(lambda content: b"image,label\n" * 50)),
    Bad("Parquet: cut off", ("not a readable Parquet file",), data=damaged(lambda content: content[:-40])),
    Bad("Parquet: overwritten", ("cells.parquet", "damaged"), data=damaged(overwritten)),
    Bad("Parquet: too few donors", ("class 'ape' has only 2 different Donor groups", "data.split_by"),
        data=parquet(donor=[str(i % 4) for i in range(16)])),
    Bad("Parquet: unknown column", ("data.split_by", "did you mean 'donor'?"), ("data.split_by=doner",),
        data=parquet(donor=["d"] * 16)),
]  # fmt: skip

ASSAY = [
    Bad("assay: too small", ("32 to 128", "16", "data.size"), ("data.size=16",)),
    Bad("assay: too large", ("32 to 128", "256", "data.size"), ("data.size=256",)),
    Bad("assay: unknown channel", ("'actine'", "DNA, tubulin, actin", "data.channels"), ("data.channels=[actine]",)),
    Bad("assay: more channels than there are", ("'ER'", "data.channels"),
        ("data.channels=[DNA, tubulin, actin, Golgi, mitochondria, ER]",)),
    Bad("assay: unknown factor", ("'actin_rimm'", "actin_rim", "assay.treatments"),
        ("assay.treatments={drug: {actin_rimm: 2}}",)),
    Bad("assay: shift without a factor", ("assay.treatments.drug must be a mapping",),
        ("assay.treatments={drug: 2}",)),
    Bad("assay: a treatment called like the control", ("'DMSO'", "control"), ("assay.treatments={DMSO: {}}",)),
    Bad("assay: fewer images than wells", ("assay.num_images = 64", "1600 wells", "raise it"),
        ("assay.num_images=64", "assay.wells_per_class=400")),
    Bad("assay: too few wells to split", ("has only 2 different Plate and Well groups",), ("assay.wells_per_class=1",)),
]  # fmt: skip

PLACES = [
    Bad("output: below a file", ("file", "Not a directory"), options=(("--output", lambda tmp: file(tmp) / "out"),)),
    Bad("store: a file", ("can't make the store", "file"), options=(("--store", lambda tmp: file(tmp)),)),
    Bad("store: below a file", ("can't make the store",), options=(("--store", lambda tmp: file(tmp) / "store"),)),
    Bad("tracking: no URI", ("--tracking-uri", "'nonsense'", "sqlite:///"),
        options=(("--tracking-uri", word("nonsense")),)),
    Bad("tracking: a folder", ("--tracking-uri", "sqlite:///"), options=(("--tracking-uri", word("./mlruns")),)),
    Bad("tracking: below a file", ("file", "File exists"),
        options=(("--tracking-uri", lambda tmp: f"sqlite:///{file(tmp)}/mlflow.db"),)),
    Bad("unknown device", ("run.device", "'tpu9'"), ("run.device=tpu9",)),
    Bad("a device that isn't there", ("run.device", "'cuda:99'"), ("run.device=cuda:99",)),
]  # fmt: skip

CLASSIFIERS = [
    given("missing", "no file or folder", "my.pt", made=absent("my.pt")),
    given("not TorchScript", "my.pt", "TorchScript", "torch.export", made=written("my.pt", b"hello")),
    given("not an exported program", "my.pt2", "torch.export", made=written("my.pt2", b"hello")),
    given("bare weights", "classifier.factory and classifier.weights", made=state_dict),
    given("too many outputs", "[2, 3]", "2 classes need [2, 2]", made=traced(2, 3)),
    given("other channels", "2 channels", "data.channels", made=traced(3, 2)),
    given("other classes", "classifier.class_names", "DMSO", "compound", made=traced(2, 2),
          settings=("classifier.path=MADE", "classifier.class_names=[control, drug]")),
    given("factory without a callable", "package.module:callable", made=weights,
          settings=(*FACTORY, "classifier.factory=torch.nn")),
    given("factory that isn't there", "can't be imported", "nowhere", made=weights,
          settings=(*FACTORY, "classifier.factory=nowhere.at:all")),
    given("factory of another kind", "returned OrderedDict", made=weights,
          settings=(*FACTORY, "classifier.factory=collections:OrderedDict")),
    given("weights of another network", "does not fit", made=weights,
          settings=(*FACTORY, "classifier.factory=torch.nn:Softmax")),
    given("weights of another kind", "not a safetensors file", made=written("w.safetensors", b"hello"),
          settings=(*FACTORY, "classifier.factory=torch.nn:Flatten")),
    given("weights that aren't there", "no file or folder", made=absent("w.safetensors"),
          settings=(*FACTORY, "classifier.factory=torch.nn:Flatten")),
]  # fmt: skip

TABLE = [*CONFIGURATION, *IMAGES, *PARQUET, *ASSAY, *PLACES, *CLASSIFIERS]


def file(tmp: Path) -> Path:
    (tmp / "file").write_text("somebody's")
    return tmp / "file"


def test_no_two_rows_of_the_table_have_the_same_name() -> None:
    assert len({bad.name for bad in TABLE}) == len(TABLE)


# ----------------------------------------------------------------------------------------------------------------------
# Running it


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all rows, so that the assay is drawn once."""
    return tmp_path_factory.mktemp("store")


def content(tmp: Path) -> dict[str, bytes]:
    return {str(p.relative_to(tmp)): p.read_bytes() for p in tmp.rglob("*") if p.is_file()}


def claim(out: Path, experiment: Experiment) -> None:
    """What an earlier run of an experiment leaves in its output folder."""
    claim_output(out, {"digest": digest(experiment), "settings": flat(experiment), "kind": "run"})
    (out / "report.html").write_text("earlier results")


def check(told: str, fragments: Sequence[str]) -> None:
    """Standard error: warnings and progress, then one line with all fragments."""
    *before, last = told.splitlines()
    assert last.startswith("error: ")
    assert "Traceback" not in told
    assert all(re.match(r"warning: |[\w ]+: [\d,]+ of [\d,]+$", line) for line in before), before
    assert all(fragment in last for fragment in fragments), last
    assert len(last) < 600


def command(bad: Bad, tmp: Path, store: Path) -> list[str]:
    """The row's command line; its output folder holds the results of an earlier run of the same experiment."""
    made = str(bad.made(tmp)) if bad.made else ""
    settings = [setting.replace("MADE", made) for setting in bad.settings]
    recipe = str(bad.recipe(tmp) if bad.recipe else TINY)
    argv = [bad.verb, "--recipe", recipe, *(part for setting in settings for part in ("--set", setting))]
    changes = {}
    if bad.data:
        path = str(bad.data(tmp))
        argv += ["--data", path]
        changes["data.path"] = path
        if not any(setting.startswith("data.channels") for setting in settings):
            argv += ["--set", "data.channels=[]"]  # the tiny recipe names two of the assay
            changes["data.channels"] = []
    if bad.verb != "config":
        places: dict[str, Made] = {"--output": tmp / "out", "--store": store}
        places |= {option: make(tmp) for option, make in bad.options}
        argv += [str(part) for place in places.items() for part in place]
        if places["--output"] == tmp / "out":
            try:
                claim(tmp / "out", load(recipe, {**parse_settings(settings), **changes}))
            except UserError:  # the settings themselves are bad
                claim(tmp / "out", Experiment())
    return argv


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_bad_input_is_one_line_status_2_and_nothing_touched(
    bad: Bad, tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = command(bad, tmp_path, store)
    before = content(tmp_path)
    assert main(argv) == 2
    check(capsys.readouterr().err, bad.told)
    assert {name: now for name, now in content(tmp_path).items() if name in before} == before


@pytest.mark.parametrize("name", ["cut TIFF", "Parquet: overwritten", "classifier: not TorchScript"])
def test_no_library_adds_lines_of_its_own(name: str, tmp_path: Path, store: Path) -> None:
    """In a process of its own, where no test runner catches what libraries log and warn."""
    (bad,) = (bad for bad in TABLE if bad.name == name)
    argv = [sys.executable, "-m", "diffex.cli", *command(bad, tmp_path, store)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
    assert done.returncode == 2
    check(done.stderr, bad.told)


# ----------------------------------------------------------------------------------------------------------------------
# Output folders that are somebody else's


def other_configuration(out: Path) -> None:
    claim(out, load(TINY, {"autoencoder.lambda1": 0.125}))


def foreign_files(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")


def a_file(out: Path) -> None:
    out.write_text("somebody's")


def damaged_identity(out: Path) -> None:
    claim(out, load(TINY))
    (out / "identity.json").write_text('{"digest": ')


def identity_of_another_program(out: Path) -> None:
    out.mkdir()
    (out / "identity.json").write_text(json.dumps(["a", "list"]))


@pytest.mark.parametrize("verb", ["data", "fit", "run"])
@pytest.mark.parametrize(
    ("occupy", "told"),
    [
        (other_configuration, ("another configuration", "autoencoder.lambda1 (0.125 there, 3.0 here)", "--output")),
        (foreign_files, ("not a diffex output folder", "--output")),
        (a_file, ("out",)),
        (damaged_identity, ("identity.json", "damaged", "--output")),
        (identity_of_another_program, ("identity.json", "--output")),
    ],
)
def test_an_output_folder_of_somebody_else_is_left_alone(
    verb: str, occupy: Callable[[Path], None], told: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    occupy(tmp_path / "out")
    before = content(tmp_path)
    assert main([verb, "--recipe", str(TINY), "--output", str(tmp_path / "out")]) == 2
    check(capsys.readouterr().err, told)
    assert content(tmp_path) == before


# ----------------------------------------------------------------------------------------------------------------------
# Odd, but good


@pytest.mark.parametrize(
    "make",
    [
        folder(png=png(picture(10, 40, 3))),
        folder(png=png(picture(3, 3, 3))),
        folder(("ä b", "1"), jpg=png(form="JPEG")),
        parquet(label=[0, 1] * 8, donor=[f"{i % 2}{i // 4}" for i in range(16)]),
    ],
    ids=["not square", "tiny", "odd names", "Parquet"],
)
def test_odd_input_that_is_not_bad_is_taken(make: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["data", "--recipe", str(TINY), "--data", str(make(tmp_path)), "--set", "data.channels=[]"]
    assert main([*argv, "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "contact-sheet.png").is_file()
    assert "error" not in capsys.readouterr().err


def test_a_bad_image_can_be_mended_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(png=b"broken")(tmp_path)
    argv = ["data", "--recipe", str(TINY), "--data", str(path), "--set", "data.channels=[]"]
    argv += ["--output", str(tmp_path / "out")]
    assert main(argv) == 2
    (Path(path) / "zebra" / "spoilt.png").write_bytes(png())
    assert main(argv) == 0
