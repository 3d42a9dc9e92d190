"""How CPUs and GPUs are shared out: every running trial's workers find room, whatever the cluster looks like."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffex.cluster import Resources, share_out
from diffex.config import Run
from diffex.errors import UserError

LAPTOP = Resources(((2.0, 0.0),))
GPUS = Resources(((4.0, 0.0), (16.0, 4.0), (16.0, 4.0)))  # a head, and two nodes of four GPUs


def test_on_a_laptop_each_core_runs_a_trial() -> None:
    share = share_out(Run(), LAPTOP)
    assert (share.trial, share.worker, share.at_a_time) == ({"cpu": 1, "gpu": 0}, {}, 2)


def test_each_gpu_runs_a_trial_with_its_share_of_its_nodes_cores() -> None:
    share = share_out(Run(), GPUS)
    assert share.trial == {"cpu": 4, "gpu": 1}
    assert share.at_a_time == 8
    assert share.threads == 4


def test_fractions_of_a_gpu_run_more_trials() -> None:
    share = share_out(Run(gpus=0.25), GPUS)
    assert share.trial == {"cpu": 1, "gpu": 0.25}
    assert share.at_a_time == 32


def test_a_trial_with_several_workers_holds_next_to_nothing_itself() -> None:
    share = share_out(Run(workers=2), LAPTOP)
    assert share.trial["cpu"] < 0.01
    assert share.at_a_time == 1
    assert 0.9 < share.worker["CPU"] < 1
    assert "GPU" not in share.worker


def test_workers_are_counted_node_by_node() -> None:
    """Two nodes of three cores have six, but no room for three workers of two."""
    nodes = Resources(((3.0, 0.0), (3.0, 0.0)))
    assert share_out(Run(cpus=2, workers=2), nodes).at_a_time == 1
    with pytest.raises(UserError, match=r"run.workers = 3 of 2 CPUs and 0 GPUs each do not fit: .* room for 2"):
        share_out(Run(cpus=2, workers=3), nodes)
    assert share_out(Run(cpus=2, workers=3, min_workers=2), nodes).at_a_time == 1


def test_where_nodes_come_on_demand_the_owner_says_how_many_trials() -> None:
    head = Resources(((0.0, 0.0),))
    with pytest.raises(UserError, match="--concurrent"):
        share_out(Run(gpus=1), head)
    share = share_out(Run(gpus=1, cpus=4), head, at_a_time=8)
    assert share.trial == {"cpu": 4, "gpu": 1}
    assert share.at_a_time == 8


@given(
    nodes=st.lists(st.tuples(st.integers(0, 64), st.integers(0, 8)), min_size=1, max_size=6),
    workers=st.integers(1, 9), cpus=st.one_of(st.none(), st.integers(1, 9)),
    gpus=st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 1.0])),
)  # fmt: skip
def test_all_trials_that_run_at_a_time_fit_with_all_their_workers(
    nodes: list[tuple[int, int]], workers: int, cpus: int | None, gpus: float | None
) -> None:
    """Placed worker by worker, as Ray does, beside the nibbles of all trials: none is left waiting."""
    offered = Resources(tuple((float(c), float(g)) for c, g in nodes))
    try:
        share = share_out(Run(workers=workers, cpus=cpus, gpus=gpus), offered)
    except UserError:
        return
    if share.worker:
        needs = [(share.worker["CPU"], share.worker.get("GPU", 0.0))] * (workers * share.at_a_time)
    else:
        needs = [(share.trial["cpu"], share.trial["gpu"])] * share.at_a_time
    room = [[c, g] for c, g in offered.nodes]
    if share.worker:  # every trial's own nibble first, all on one node: the worst case
        place = next(r for r in room if r[1] >= 1 or (not share.trial["gpu"] and r[0] >= 1))
        place[0] -= share.at_a_time * share.trial["cpu"]
        place[1] -= share.at_a_time * share.trial["gpu"]
    for need_cpu, need_gpu in needs:
        for r in room:
            if r[0] + 1e-9 >= need_cpu and r[1] + 1e-9 >= need_gpu:
                r[0] -= need_cpu
                r[1] -= need_gpu
                break
        else:
            pytest.fail(f"no room for a worker of {need_cpu} CPUs and {need_gpu} GPUs: {share}")
