"""Teams: however many workers share a batch, the training is the same.

Workers are processes on this machine that talk by gloo; they are started once and do one job after another.
"""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_robustness import task as adversarial_task
from test_train import autoencoder_task, classifier_task, directions_task
from torch import Tensor, nn

from diffex.config import Assay, Data
from diffex.data import ImageStore, sample_rows
from diffex.errors import UserError
from diffex.networks import Encoder, ResidualClassifier, join
from diffex.prepare import build_store
from diffex.team import ALONE, Team
from diffex.train import CHECKPOINT, AutoencoderTask, Task, TrainingError, fit

# ----------------------------------------------------------------------------------------------------------------------
# Workers that wait for jobs


def work(rank: int, size: int, meeting: str, jobs: Connection) -> None:
    """A worker's life: join the group, then do what it is sent until it is sent nothing."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    while (job := jobs.recv()) is not None:
        function, arguments = job
        try:
            jobs.send((True, function(Team.current(), *arguments)))
        except Exception:  # the test that asked for it is told
            jobs.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Workers:
    """``size`` processes; a call runs a function of this module on all of them and returns their answers by rank."""

    def __init__(self, size: int, folder: Path) -> None:
        context = mp.get_context("spawn")
        pairs = [context.Pipe() for _ in range(size)]
        self.jobs = [pair[0] for pair in pairs]
        meeting = str(folder / f"meeting-{size}")
        self.processes = [
            context.Process(target=work, args=(rank, size, meeting, pair[1]), daemon=True)
            for rank, pair in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function: Callable[..., Any], *arguments: object) -> list[Any]:
        for jobs in self.jobs:
            jobs.send((function, arguments))
        answers = []
        for rank, jobs in enumerate(self.jobs):
            if not jobs.poll(120):
                pytest.fail(f"rank {rank} gave no answer")
            fine, answer = jobs.recv()
            assert fine, answer
            answers.append(answer)
        return answers

    def close(self) -> None:
        for jobs in self.jobs:
            jobs.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Workers]]:
    made = {size: Workers(size, tmp_path_factory.mktemp("meeting")) for size in (2, 3)}
    yield made
    for workers in made.values():
        workers.close()


@pytest.fixture(scope="module")
def screen_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    build_store(
        Data(size=32, channels=("DNA", "actin")), Assay(num_images=240, num_plates=2, wells_per_class=4), folder
    )
    return folder


SIZES = pytest.mark.parametrize("size", [2, 3])

# ----------------------------------------------------------------------------------------------------------------------
# Shares and exchange


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 16, 17])
def test_shares_and_their_parts_are_the_whole_in_order_and_nearly_even(count: int, size: int, parts: int) -> None:
    items = list(range(count))
    shares = [[Team(rank, size).share(items, part, parts) for part in range(parts)] for rank in range(size)]
    assert [item for share in shares for part in share for item in part] == items
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert [Team(rank, size).share(items) for rank in range(size)] == [list(chain(*share)) for share in shares]
    assert all(max(map(len, share)) - min(map(len, share)) <= 1 for share in shares)


@pytest.mark.parametrize(("count", "size", "parts"), [(16, 3, 1), (17, 2, 3), (8, 1, 3), (2, 3, 1)])
def test_weighted_means_of_shares_make_the_mean_of_the_whole(count: int, size: int, parts: int) -> None:
    values = np.random.default_rng(0).normal(size=count)
    total = 0.0
    for rank in range(size):
        team = Team(rank, size)
        for part in range(parts):
            mine = team.share(values, part, parts)
            total += team.weight(count, part, parts) * (mine.mean() if len(mine) else 0.0) / size
    assert total == pytest.approx(values.mean(), abs=1e-12)


def test_without_a_process_group_a_worker_is_alone_and_exchanges_nothing() -> None:
    x = torch.randn(3)
    assert Team.current() == ALONE == Team(0, 1)
    assert ALONE.sum(x) is x
    assert ALONE.gather(x, 3) is x
    assert ALONE.broadcast([x], 5) == 5


def exchange(team: Team, count: int) -> dict[str, Any]:
    """What each collective makes of numbers that depend on the rank."""
    everything = torch.randn(2, count, 3, generator=torch.Generator().manual_seed(0))
    mine = everything[:, team.slice(count)].clone().requires_grad_()
    whole = team.gather(mine, count, dim=1)
    (team.weight(count) * whole.square() * (1 + team.rank)).sum().backward()
    tensors = [torch.full((2,), float(team.rank + 1)), torch.tensor(team.rank + 5), torch.ones(2, 3).T * team.rank]
    value = team.broadcast(tensors, (team.rank, [{"a": 1.5 + team.rank}]))
    torch.manual_seed(4)
    alike = float(torch.rand(()))
    team.part_ways()
    return {
        "team": (team.rank, team.size), "everything": everything, "whole": whole.detach(), "gradient": mine.grad,
        "tensors": tensors, "value": value, "means": team.means({"a": torch.tensor(float(team.rank))}),
        "alike": alike, "apart": float(torch.rand(())),
    }  # fmt: skip


@SIZES
@pytest.mark.parametrize("count", [7, 2])
def test_what_ranks_exchange_is_whole_alike_and_has_its_gradient(
    teams: dict[int, Workers], size: int, count: int
) -> None:
    answers = teams[size](exchange, count)
    slope = sum(Team(rank, size).weight(count) * (1 + rank) for rank in range(size))
    for rank, a in enumerate(answers):
        assert a["team"] == (rank, size)
        assert torch.equal(a["whole"], a["everything"])
        wanted = 2 * slope * a["everything"][:, Team(rank, size).slice(count)]
        assert torch.allclose(a["gradient"], wanted, rtol=1e-5)
        assert a["tensors"][0].tolist() == [1.0, 1.0]
        assert int(a["tensors"][1]) == 5
        assert not a["tensors"][2].any()
        assert a["value"] == (0, [{"a": 1.5}])
        assert a["means"] == {"a": pytest.approx((size - 1) / 2)}
        assert a["alike"] == answers[0]["alike"]
    assert len({a["apart"] for a in answers}) == size


# ----------------------------------------------------------------------------------------------------------------------
# Batch normalisation


def normalised(team: Team, x: Tensor, slope: Tensor, affine: bool, momentum: float | None) -> dict[str, Any]:
    """Three steps of batch normalisation of a rank's share, with the gradient of sum(slope * y)."""
    torch.manual_seed(0)
    kind = nn.BatchNorm2d if x.dim() == 4 else nn.BatchNorm1d
    network = nn.Sequential(kind(x.shape[1], affine=affine, momentum=momentum))
    if affine:
        for parameter in network.parameters():
            nn.init.normal_(parameter)
    join(network, team)
    for step in range(3):
        mine = (team.share(x) + step).clone().requires_grad_()
        y = network(mine)
        network.zero_grad()
        (team.share(slope) * y).sum().backward()
    gradients = [team.sum(p.grad) for p in network.parameters() if p.grad is not None]
    return {
        "y": y.detach(), "dx": mine.grad, "gradients": gradients, "state": dict(network.state_dict()),
        "eval": network.eval()(x).detach(),
    }  # fmt: skip


@SIZES
@pytest.mark.parametrize("shape", [(8, 3), (7, 3, 4, 5), (2, 3, 2, 2)])
@pytest.mark.parametrize(("affine", "momentum"), [(True, 0.1), (False, 0.02), (True, None)])
def test_a_team_normalises_as_torch_does_on_the_joined_batch(
    teams: dict[int, Workers], size: int, shape: tuple[int, ...], affine: bool, momentum: float | None
) -> None:
    generator = torch.Generator().manual_seed(1)
    x = 5 + torch.randn(shape, generator=generator) * torch.tensor([0.1, 1.0, 10.0]).view(1, 3, *[1] * (len(shape) - 2))
    slope = torch.randn(shape, generator=generator)
    given = (x, slope, affine, momentum)
    one, many = normalised(ALONE, *given), teams[size](normalised, *given)
    for whole, shares in ((one["y"], [a["y"] for a in many]), (one["dx"], [a["dx"] for a in many])):
        assert torch.allclose(torch.cat(shares), whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
    for a in many:
        assert a["state"].keys() == one["state"].keys()
        for name, tensor in one["state"].items():
            assert torch.allclose(a["state"][name], tensor, rtol=1e-5, atol=1e-6)
            assert torch.equal(a["state"][name], many[0]["state"][name])
        assert torch.allclose(a["eval"], one["eval"], rtol=1e-4, atol=1e-4)
        for mine, wanted in zip(a["gradients"], one["gradients"], strict=True):
            assert torch.allclose(mine, wanted, rtol=1e-4, atol=1e-4)


def half_precision(team: Team) -> dict[str, Any]:
    x = (100 + torch.randn(64, 3, 2, 2, generator=torch.Generator().manual_seed(0))).bfloat16()
    network = nn.Sequential(nn.BatchNorm2d(3))
    join(network, team)
    with torch.autocast("cpu", torch.bfloat16):
        y = network(team.share(x))
    return {"dtype": str(y.dtype), "mean": network[0].running_mean, "wanted": 0.1 * x.float().mean((0, 2, 3))}


def test_statistics_are_float32_under_autocast(teams: dict[int, Workers]) -> None:
    for a in teams[2](half_precision):
        assert a["dtype"] == "torch.bfloat16"
        assert torch.allclose(a["mean"], a["wanted"], rtol=1e-5)


def test_joining_a_team_changes_no_name_and_no_parameter_and_alone_nothing() -> None:
    for network in (
        ResidualClassifier(2, 3, width=4),
        Encoder(2, 16, widths=(4, 8), blocks=1, attention=(), code_dim=4, standardise=True),
    ):
        before, parameters = dict(network.state_dict()), list(map(id, network.parameters()))
        classes = [type(module) for module in network.modules()]
        join(network, ALONE)
        assert [type(module) for module in network.modules()] == classes
        join(network, Team(0, 2))
        assert [type(module) for module in network.modules()] != classes
        assert list(network.state_dict()) == list(before)
        assert list(map(id, network.parameters())) == parameters
        x = torch.randn(4, 2, 16, 16)
        network.eval()
        network.load_state_dict(before)
        joined = network(x)
        assert torch.isfinite(joined).all()


# ----------------------------------------------------------------------------------------------------------------------
# Trainings


def make(which: str, path: str, team: Team, **options: Any) -> Task:
    """A small task with 20 or so steps."""
    store = ImageStore(path)
    if which == "classifier":
        return classifier_task(store, team=team, **{"images": 320, **options})
    if which == "adversarial":
        return adversarial_task(store, 0.1, team=team, **{"images": 320, "share": 0.6, **options})
    if which == "autoencoder":
        # Biases in front of a normalisation have no gradient but rounding, which Adam makes steps of: small ones here.
        given = {"images": 160, "dropout": 0.0, "lambda1": 3.0, "flips": True, "learning_rate": 2e-4, **options}
        return autoencoder_task(store, team=team, **given)  # type: ignore[arg-type]
    return directions_task(team=team, **{"images": 320, **options})  # type: ignore[arg-type]


def train(team: Team, kind: str, path: str, folder: str, options: dict, fitting: dict) -> dict[str, Any]:
    """Train, each rank with a folder of its own; returns what came of it."""
    task = make(kind, path, team, **options)
    rows: list[int] = []
    if store := getattr(task, "store", None):
        batch = store.batch
        store.batch = lambda these, *rest: (rows.extend(map(int, these)), batch(these, *rest))[1]
    out, told = Path(folder) / str(team.rank), []  # type: tuple[Path, list[str]]
    out.mkdir(parents=True, exist_ok=True)
    history = fit(
        task, out, seed=1, team=team, progress=lambda *_: told.append("progress"),
        saved=lambda: told.append("saved"), point=lambda *_: told.append("point"), **fitting,
    )  # fmt: skip
    return {
        "history": history, "rows": rows, "told": sorted(set(told)), "files": [p.name for p in out.iterdir()],
        "tensors": {name: tensor.detach().clone() for name, tensor in task.tensors().items()},
    }  # fmt: skip


def train_alone(kind: str, path: Path, folder: Path, options: dict | None = None, **fitting: object) -> dict[str, Any]:
    return train(ALONE, kind, str(path), str(folder), options or {}, fitting)


def assert_close(a: dict[str, Any], b: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Equal histories and weights; Adam's moments, which tell the gradient's size, in the units of their largest."""
    assert [h.keys() for h in a["history"]] == [h.keys() for h in b["history"]]
    for one, other in zip(a["history"], b["history"], strict=True):
        assert one == pytest.approx(other, abs=tolerance)
    assert a["tensors"].keys() == b["tensors"].keys()
    largest = {"exp_avg": 0.0, "exp_avg_sq": 0.0}
    for name, tensor in b["tensors"].items():
        moment = name.rsplit(".")[-1]
        if moment in largest:
            largest[moment] = max(largest[moment], float(tensor.abs().max()))
    for name, tensor in a["tensors"].items():
        difference = float((tensor.double() - b["tensors"][name].double()).abs().max())
        moment = largest.get(name.rsplit(".")[-1])
        assert difference <= (tolerance if moment is None else 10 * tolerance * moment), (name, difference)


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["history"] == b["history"]
    for name, tensor in a["tensors"].items():
        assert torch.equal(tensor, b["tensors"][name]), name


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "classifier": ("classifier", {}),
    "adversarial": ("adversarial", {}),
    "autoencoder": ("autoencoder", {}),
    "autoencoder, truncated, not standardised": (
        "autoencoder", {"classifier_term": "truncated", "standardise": False, "flips": False}
    ),
    "directions": ("directions", {}),
    "directions, published": (
        "directions",
        {"kind": "linear", "features": "code", "covariance": "published", "lambda2": 1e-4, "lambda3": 0.0},
    ),
    "directions, features": ("directions", {"kind": "fixed", "features": "code", "covariance": "features"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(screen_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every case, trained by one worker."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: train_alone(kind, screen_path, folder / name, options) for name, (kind, options) in CASES.items()}


@pytest.mark.parametrize(
    ("case", "size"),
    [*((case, 3) for case in CASES), ("classifier", 2), ("autoencoder", 2), ("directions", 2)],
)
def test_any_number_of_workers_trains_the_same(
    teams: dict[int, Workers], alone: dict[str, dict[str, Any]], screen_path: Path, tmp_path: Path, case: str, size: int
) -> None:
    """20 steps; 16 and 8 images are uneven among 3.  Every rank ends with the very same tensors."""
    kind, options = CASES[case]
    assert len(alone[case]["history"]) == 20
    answers = teams[size](train, kind, str(screen_path), str(tmp_path), options, {})
    for answer in answers:
        assert_close(answer, alone[case])
        assert_same(answer, answers[0])


@pytest.mark.parametrize("case", ["classifier", "autoencoder"])
def test_each_worker_reads_its_own_rows_and_together_they_read_each_once(
    teams: dict[int, Workers], screen_path: Path, tmp_path: Path, case: str
) -> None:
    answers = teams[3](train, case, str(screen_path), str(tmp_path), {"images": 64}, {})
    size, training = (16, 4) if case == "classifier" else (8, 8)
    batches = [sample_rows(ImageStore(screen_path).rows("train"), size, size * i, 3) for i in range(training)]
    for rank, answer in enumerate(answers):
        mine = [row for batch in batches for row in Team(rank, 3).share(batch)]
        assert answer["rows"] == mine
    assert sum(len(answer["rows"]) for answer in answers) == 64


def test_rank_0_alone_writes_and_tells(teams: dict[int, Workers], screen_path: Path, tmp_path: Path) -> None:
    first, *others = teams[3](train, "classifier", str(screen_path), str(tmp_path), {}, {"every": 0.0})
    assert first["files"] == [CHECKPOINT]
    assert first["told"] == ["point", "progress", "saved"]
    for other in others:
        assert other["files"] == other["told"] == []


@pytest.mark.parametrize(("case", "size"), [("classifier", 3), ("autoencoder", 3), ("directions", 2)])
def test_a_stopped_team_resumes_bit_for_bit_and_one_worker_may_take_over(
    teams: dict[int, Workers], alone: dict[str, dict[str, Any]], screen_path: Path, tmp_path: Path, case: str, size: int
) -> None:
    given = (case, str(screen_path))
    half = 80 if case == "autoencoder" else 160
    whole = teams[size](train, *given, str(tmp_path / "whole"), {}, {})[0]
    teams[size](train, *given, str(tmp_path / "stopped"), {}, {"until": half})
    shutil.copytree(tmp_path / "stopped", tmp_path / "handed on")
    resumed = teams[size](train, *given, str(tmp_path / "stopped"), {"init": 9}, {})
    for answer in resumed:
        assert_same(answer, whole)
    taken_over = train_alone(case, screen_path, tmp_path / "handed on", {"init": 9})
    assert taken_over["history"][: len(whole["history"]) // 2] == whole["history"][: len(whole["history"]) // 2]
    assert_close(taken_over, alone[case])


def test_a_team_branches_from_a_warmup_that_one_worker_trained(
    teams: dict[int, Workers], alone: dict[str, dict[str, Any]], screen_path: Path, tmp_path: Path
) -> None:
    """The base need not be seen by any rank but the first."""
    train_alone("autoencoder", screen_path, tmp_path / "warm", {"lambda1": 0.0}, until=80)
    base = tmp_path / "warm" / "0" / CHECKPOINT
    answers = teams[2](branch, str(screen_path), str(tmp_path / "branch"), str(base))
    for answer in answers:
        assert_close(answer, alone["autoencoder"])
        assert "classifier" in answer["history"][-1]
        assert "classifier" not in answer["history"][0]


def branch(team: Team, path: str, folder: str, base: str) -> dict[str, Any]:
    here = Path(base) if team.rank == 0 else Path("/not/on/this/node")
    return train(team, "autoencoder", path, folder, {"init": 9 if team.rank else 0}, {"base": here})


@pytest.mark.parametrize(("accumulate", "size"), [(3, 1), (2, 3)])
def test_a_share_taken_in_parts_trains_the_same(
    teams: dict[int, Workers], alone: dict[str, dict[str, Any]], screen_path: Path, tmp_path: Path, accumulate: int,
    size: int,
) -> None:  # fmt: skip
    """Without batch statistics: those are of a part."""
    case = "autoencoder, truncated, not standardised"
    kind, options = CASES[case]
    given = (kind, str(screen_path), str(tmp_path), {**options, "accumulate": accumulate}, {})
    answers = teams[size](train, *given) if size > 1 else [train(ALONE, *given)]
    for answer in answers:
        assert_close(answer, alone[case])


def test_with_batch_statistics_the_parts_of_all_workers_are_normalised_together(
    teams: dict[int, Workers], screen_path: Path, tmp_path: Path
) -> None:
    """Part 0 of two workers' shares, and then part 1: not what one worker has for its parts, unless reordered."""
    one = train_alone("classifier", screen_path, tmp_path / "one", {"accumulate": 2, "images": 32})
    two = teams[2](train, "classifier", str(screen_path), str(tmp_path / "two"), {"accumulate": 2, "images": 32}, {})
    assert one["history"][0]["loss"] == pytest.approx(two[0]["history"][0]["loss"], abs=0.1)
    assert two[0]["history"] == two[1]["history"]
    assert int(two[0]["tensors"]["network.stages.0.norm1.num_batches_tracked"]) == 4


def blow_up(team: Team, path: str, folder: str) -> str:
    task = make("autoencoder", path, team, learning_rate=1e18, clip=0.0)
    out = Path(folder) / str(team.rank)
    out.mkdir()
    if team.rank == 1:  # one worker's images alone are bad
        assert isinstance(task, AutoencoderTask)
        task.probs = task.probs * torch.nan
    with pytest.raises(TrainingError, match=r"autoencoder: the \w+ loss is (nan|inf) after \d+ images") as raised:
        fit(task, out, seed=1, team=team)
    return str(raised.value)


def test_a_loss_that_is_not_finite_on_one_rank_ends_the_training_on_all(
    teams: dict[int, Workers], screen_path: Path, tmp_path: Path
) -> None:
    answers = teams[2](blow_up, str(screen_path), str(tmp_path))
    assert answers[0] == answers[1]


def generators(team: Team, path: str) -> list[bytes]:
    """State of the random numbers when the loss of a step begins, after a common seed."""
    task, states = make("autoencoder", path, team, dropout=0.5), []  # type: tuple[Task, list[bytes]]
    assert isinstance(task, AutoencoderTask)
    loss = task.model.loss

    def listen(*given: Any, **rest: Any) -> Any:
        states.append(torch.get_rng_state().numpy().tobytes())
        return loss(*given, **rest)

    task.model.loss = listen  # type: ignore[method-assign]
    torch.manual_seed(0)
    task.step(0)
    return states


def test_dropout_masks_are_a_rank_s_own(teams: dict[int, Workers], screen_path: Path, tmp_path: Path) -> None:
    states = teams[2](generators, str(screen_path))
    assert states == teams[2](generators, str(screen_path))
    assert states[0] != states[1]
    first = teams[2](train, "autoencoder", str(screen_path), str(tmp_path), {"dropout": 0.5, "images": 32}, {})
    assert_same(*first)


def test_more_workers_than_codes_train_directions(teams: dict[int, Workers], screen_path: Path, tmp_path: Path) -> None:
    """The third has an empty share."""
    options = {"n": 2, "images": 40}
    one = train_alone("directions", screen_path, tmp_path / "one", options)
    for answer in teams[3](train, "directions", str(screen_path), str(tmp_path / "three"), options, {}):
        assert_close(answer, one)


def test_a_batch_that_is_too_small_for_the_team_is_refused_in_words(screen_path: Path) -> None:
    for kind in ("classifier", "autoencoder"):
        with pytest.raises(UserError, match=rf"^{kind}: 5 workers, each in 4 parts, can't share a batch of (8|16)"):
            make(kind, str(screen_path), Team(0, 5), accumulate=4)
