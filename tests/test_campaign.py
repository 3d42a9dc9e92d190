"""The simulated scheduler: where the answer is known by hand, it gives that answer."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("simpy", reason="the simulation needs simpy: pip install 'diffex[test]'")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import campaign  # noqa: E402
from scheduler import HOUR, Fleet, Simulation, Task, expected_waste, summary  # noqa: E402

from diffex.config import load  # noqa: E402
from diffex.plan import budget  # noqa: E402
from diffex.search import Sweep  # noqa: E402
from diffex.space import Levels  # noqa: E402

TINY = load(Path(__file__).with_name("tiny.yaml"))


def prefix_sweep(weights: int = 4, settings: int = 6) -> tuple[dict[str, Task], list[list[str]]]:
    """One warm-up of 100 s, branches of 30 s, directions of 5 s, tables of 1 s."""
    tasks = {"warm": Task("warm", 100.0, bytes=8)}
    tasks |= {f"branch{a}": Task(f"branch{a}", 30.0, bytes=4) for a in range(weights)}
    trials = []
    for a, b in product(range(weights), range(settings)):
        tasks[f"directions{a}{b}"] = Task(f"directions{a}{b}", 5.0, bytes=2)
        tasks[f"table{a}{b}"] = Task(f"table{a}{b}", 1.0, bytes=1)
        trials.append(["warm", f"branch{a}", f"directions{a}{b}", f"table{a}{b}"])
    return tasks, trials


# ----------------------------------------------------------------------------------------------------------------------
# Without losses


def test_one_worker_takes_the_sum_of_all_distinct_stages() -> None:
    tasks, trials = prefix_sweep()
    report = Simulation(tasks, trials, Fleet(nodes=1)).run()
    assert report.makespan == pytest.approx(sum(t.seconds for t in tasks.values()))
    assert report.useful == pytest.approx(report.makespan) == pytest.approx(report.paid)
    assert report.lost == report.overhead == report.waited == 0


def test_a_shared_prefix_costs_once_what_24_trials_would_pay_24_times() -> None:
    tasks, trials = prefix_sweep()
    report = Simulation(tasks, trials, Fleet(nodes=3)).run()
    assert report.useful == pytest.approx(100 + 4 * 30 + 24 * 6)
    alone = sum(tasks[d].seconds for trial in trials for d in trial)
    assert alone == pytest.approx(24 * (100 + 30 + 6))
    assert report.computed == pytest.approx({d: t.seconds for d, t in tasks.items()})
    assert report.bytes == 8 + 4 * 4 + 24 * 3


def test_trials_wait_for_a_stage_that_another_one_computes() -> None:
    tasks, trials = prefix_sweep(weights=1, settings=4)
    report = Simulation(tasks, trials, Fleet(nodes=4)).run()
    assert report.makespan == pytest.approx(100 + 30 + 6)  # all four begin together and finish together
    assert report.waited == pytest.approx(3 * 130)


def test_what_is_shared_is_there_before_the_trials_start() -> None:
    tasks, trials = prefix_sweep()
    tasks["other"] = Task("other", 40.0)
    ahead = Simulation(tasks, trials, Fleet(nodes=2), prepared=[["warm"], ["other"]]).run()
    # The warm-up with the other stage beside it; then four times a branch, for which one slot waits, and six trials.
    assert ahead.makespan == pytest.approx(100 + 4 * (30 + 6 * 6 / 2))
    assert ahead.waited == pytest.approx(4 * 30)


def test_slots_wait_less_where_trials_of_one_prefix_do_not_come_together() -> None:
    tasks, trials = prefix_sweep()
    mixed = sorted(trials, key=lambda trial: trial[2][-1])  # branch after branch in turn
    together, apart = (Simulation(tasks, t, Fleet(nodes=2), prepared=[["warm"]]).run() for t in (trials, mixed))
    assert apart.waited < 0.1 * together.waited
    assert apart.makespan < together.makespan
    assert apart.useful == pytest.approx(together.useful)


@pytest.mark.parametrize("nodes", [1, 2, 5, 16, 64])
def test_the_makespan_lies_between_the_bounds_of_list_scheduling(nodes: int) -> None:
    tasks, trials = prefix_sweep()
    makespan = Simulation(tasks, trials, Fleet(nodes=nodes)).run().makespan
    work, longest = sum(t.seconds for t in tasks.values()), 136.0
    assert makespan >= max(work / nodes, longest) - 1e-9
    assert makespan <= work + 1e-9


def test_overheads_are_paid_where_they_arise() -> None:
    tasks, trials = prefix_sweep(weights=1, settings=2)
    fleet = Fleet(nodes=1, trial=3.0, entry=0.5, rate=2.0)
    report = Simulation(tasks, trials, fleet).run()
    written = sum(t.bytes for t in tasks.values()) / 2.0
    read = (8 + 4) / 2.0  # the second trial finds warm-up and branch
    assert report.overhead == pytest.approx(2 * 3.0 + 8 * 0.5 + written + read)
    assert report.makespan == pytest.approx(report.useful + report.overhead)


def test_checkpoints_between_cost_their_writing() -> None:
    one = {"a": Task("a", 100.0, every=10.0, write=2.0)}
    report = Simulation(one, [["a"]], Fleet(nodes=1)).run()
    assert report.overhead == pytest.approx(9 * 2.0)  # the end of the stage is its entry
    assert report.makespan == pytest.approx(118.0)


def test_slots_of_a_node_run_beside_each_other() -> None:
    tasks, trials = prefix_sweep()
    quarter = Simulation(tasks, trials, Fleet(nodes=1, slots=4)).run()
    whole = Simulation(tasks, trials, Fleet(nodes=4)).run()
    assert quarter.makespan == pytest.approx(whole.makespan)
    assert quarter.paid == pytest.approx(whole.paid / 4)


# ----------------------------------------------------------------------------------------------------------------------
# With losses


def test_equal_seeds_give_equal_runs_and_losses_cost_time() -> None:
    tasks, trials = prefix_sweep()
    fleet = Fleet(nodes=3, loss=10.0, delay=20.0)
    a, b, other = (Simulation(tasks, trials, fleet, seed=seed).run() for seed in (1, 1, 2))
    assert a == b
    assert a.makespan != other.makespan
    assert a.losses > 0
    assert (
        statistics.fmean(Simulation(tasks, trials, fleet, seed=seed).run().makespan for seed in range(20))
        > Simulation(tasks, trials, Fleet(nodes=3)).run().makespan
    )


def test_everything_is_finished_and_nothing_done_twice_but_what_was_lost() -> None:
    tasks, trials = prefix_sweep()
    tasks = {d: Task(d, t.seconds, every=5.0) for d, t in tasks.items()}
    work = sum(t.seconds for t in tasks.values())
    for seed in range(20):
        report = Simulation(tasks, trials, Fleet(nodes=4, loss=30.0, delay=10.0), seed=seed).run()
        assert report.useful == pytest.approx(work)
        assert sum(report.computed.values()) == pytest.approx(work + report.lost)
        assert report.lost <= 5.0 * report.losses + 1e-9  # on each node one checkpoint interval at most
        assert all(report.computed[d] >= t.seconds - 1e-9 for d, t in tasks.items())


def test_lost_work_is_what_theory_expects() -> None:
    seconds, every, write, loss = 3000.0, 60.0, 3.0, 12.0 / HOUR
    task = {"a": Task("a", seconds, every=every, write=write)}
    fleet = Fleet(nodes=1, loss=loss * HOUR)
    reports = [Simulation(task, [["a"]], fleet, seed=seed).run() for seed in range(400)]
    lost = [r.lost for r in reports]
    error = statistics.stdev(lost) / math.sqrt(len(lost))
    expected = expected_waste(seconds, every, write, loss)
    assert statistics.fmean(lost) == pytest.approx(expected, abs=4 * error)
    assert error < 0.1 * expected
    # Rule of thumb: every loss takes half an interval.
    losses = loss * (seconds + 49 * write + expected)
    assert expected == pytest.approx(losses * (every + write) / 2, rel=0.1)
    assert statistics.fmean(r.losses for r in reports) == pytest.approx(losses, rel=0.1)


def test_without_checkpoints_a_long_stage_takes_exponentially_long() -> None:
    seconds, loss = 600.0, 6.0 / HOUR
    task = {"a": Task("a", seconds)}
    makespans = [Simulation(task, [["a"]], Fleet(nodes=1, loss=6.0), seed=seed).run().makespan for seed in range(600)]
    error = statistics.stdev(makespans) / math.sqrt(len(makespans))
    assert statistics.fmean(makespans) == pytest.approx(math.expm1(loss * seconds) / loss, abs=4 * error)


def test_a_node_away_is_not_paid_for() -> None:
    task = {"a": Task("a", 1800.0, every=1.0)}
    fleet = Fleet(nodes=1, loss=20.0, delay=100.0)
    for seed in range(5):
        report = Simulation(task, [["a"]], fleet, seed=seed).run()
        assert report.makespan == pytest.approx(1800.0 + report.lost + 100.0 * report.losses)
        assert report.paid == pytest.approx(1800.0 + report.lost)


def test_efficiency_is_one_without_losses_and_overheads() -> None:
    tasks, trials = prefix_sweep()
    assert summary(tasks, trials, Fleet(nodes=4)).efficiency == pytest.approx(1.0)
    lossy = summary(tasks, trials, Fleet(nodes=4, loss=30.0, delay=30.0))
    assert lossy.efficiency < 1.0
    assert lossy.lost > 0


# ----------------------------------------------------------------------------------------------------------------------
# From the platform


def test_tasks_of_a_sweep_are_its_distinct_stages() -> None:
    points = [TINY.with_settings({"autoencoder.lambda1": a, "directions.lambda2": b})
              for a, b in product((0.1, 1.0), (0.1, 1.0, 10.0))]  # fmt: skip
    plan = budget(points)
    images = campaign.Images.of(TINY)
    seconds_of = {"unet.training": 1.0, "unet.forward": 0.1, "directions.training": 0.01}
    tasks = campaign.tasks_of(plan, TINY, images, seconds_of, rate=1e8)
    by_stage = Counter(task.stage for task in tasks.values())
    assert (by_stage["warmup"], by_stage["autoencoder"], by_stage["effects"]) == (1, 2, 6)
    ahead = campaign.prepared_of(plan)
    assert {tasks[trial[-1]].stage for trial in ahead} == set(campaign.PREPARED)
    report = Simulation(tasks, plan.trials, Fleet(nodes=1), ahead).run()
    assert report.useful == pytest.approx(plan.cost.seconds(seconds_of))
    half = campaign.tasks_of(plan, TINY, images, seconds_of, rate=1e8, speed=2.0)
    assert sum(t.seconds for t in half.values()) == pytest.approx(plan.cost.seconds(seconds_of) / 2)


def test_units_come_from_the_platform_s_own_batch_sizes_and_the_nearest_rank() -> None:
    def row(operation: str, seconds: float, **more: object) -> dict[str, object]:
        return {"recipe": "assay", "precision": "bf16", "operation": operation, "batch": 1, "seconds": seconds, **more}

    rows = [
        row("unet.forward", 1.0), row("autoencoder.step", 5.0), row("encoder.forward", 0.5),
        row("classifier.forward", 0.2), row("witness.training", 0.3), row("unet.forward", 9.0),
        row("unet.forward", 7.0, precision="fp32"), row("directions.training", 1.0, rank=64),
        row("directions.training", 4.0, rank=256), {**row("unet.gradient", 0.0), "error": "out of memory"},
        {"operation": "image.read", "size": 32, "seconds": 0.1},
        {"operation": "image.read", "size": 128, "seconds": 2.0},
    ]  # fmt: skip
    del rows[9]["seconds"]
    found = campaign.units({"rows": rows}, "assay", rank=200)
    assert found["unet.forward"] == 1.0
    assert found["unet.training"] + found["encoder.training"] == pytest.approx(5.0)
    assert found["directions.training"] == 4.0
    assert found["image.read"] == 0.1
    assert (found["robust.forward"], found["ruler.training"]) == (0.2, 0.3)


def test_a_real_sweep_is_replayed_by_its_own_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, store, start = tmp_path / "out", tmp_path / "store", 1_700_000_000.0

    def entry(stage: str, digest: str, began: float, seconds: float, **needs: str) -> None:
        made = time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime(start + began + seconds))
        folder = store / stage / digest
        folder.mkdir(parents=True)
        record = {"stage": stage, "digest": digest, "seconds": seconds, "made": made, "about": {"needs": needs}}
        (folder / "entry.json").write_text(json.dumps(record))

    entry("data", "d", 0, 10)
    entry("warmup", "w", 10, 50, data="d")
    for number, (began, ended) in enumerate(((60, 100), (60, 110))):
        entry("directions", f"k{number}", began, ended - began, data="d", warmup="w")
        trial = output / "trials" / f"t{number}"
        trial.mkdir(parents=True)
        places = {"data": "d", "warmup": "w", "directions": f"k{number}"}
        (trial / "stages.json").write_text(json.dumps({s: str(store / s / d) for s, d in places.items()}))
        (trial / "row.json").write_text(json.dumps({"paid": "directions"}))
        os.utime(trial / "row.json", (start + ended, start + ended))
    replay = campaign.read_replay(output, store)
    assert replay.seconds == pytest.approx(110)
    assert replay.prepared == [["d", "w"]]
    assert Simulation(replay.tasks, replay.trials, Fleet(nodes=2), replay.prepared).run().makespan == pytest.approx(110)
    assert Simulation(replay.tasks, replay.trials, Fleet(nodes=1), replay.prepared).run().makespan == pytest.approx(150)
    options = ["campaign.py", "--replay", str(output), str(store), "--workers", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", options)
        campaign.main()
    assert "1.00 of the real one" in capsys.readouterr().out


def test_measuring_needs_no_ray_and_no_readers_of_images() -> None:
    code = (
        "import sys; sys.argv = ['x']; import stage_costs;"
        "print(*sorted({'ray', 'mlflow', 'optuna', 'tifffile', 'imagecodecs', 'zarr', 'pandas', 'matplotlib', 'simpy'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_measurement_that_fails_leaves_its_error_and_the_others(tmp_path: Path) -> None:
    import stage_costs

    bench = stage_costs.Bench("cpu", 0.01, 60.0, tmp_path)

    def broken() -> None:
        raise RuntimeError("out of memory\nand more")

    bench.measure(lambda: broken, 1, operation="bad")
    bench.measure(lambda: lambda: time.sleep(0.001), 2, operation="good")
    bench.measure(lambda: lambda: None, 1, operation="late", needs=1e6)
    bad, good, late = bench.rows
    assert bad["error"] == "RuntimeError: out of memory"
    assert good["low"] <= good["seconds"] <= good["high"]
    assert good["seconds"] >= 0.0005
    assert "no time left" in late["error"]


def test_tables_are_filled_between_their_lines_and_the_rest_stays(tmp_path: Path) -> None:
    import scaling_tables

    text = (
        "Before.\n<!-- table stages recipe=assay -->\nold\n<!-- end -->\nBetween.\n"
        "<!-- table units none.json -->\n<!-- end -->\nAfter.\n"
    )
    filled = scaling_tables.fill(text, tmp_path)
    assert "old" not in filled
    assert filled.startswith("Before.\n<!-- table stages recipe=assay -->\n")
    assert "| warmup | 25.6 k |" in filled
    assert "**To be measured**" in filled
    assert filled.endswith("<!-- end -->\nAfter.\n")
    assert scaling_tables.fill(filled, tmp_path) == filled


def test_measured_tables_are_made_of_the_measured_figures() -> None:
    import scaling_tables

    e, images = scaling_tables.case("bbbc021")
    flops = scaling_tables.networks(e, images).flops
    rows = [
        {"recipe": "bbbc021", "precision": "bf16", "operation": name, "batch": 64, "seconds": flops[of] / 1e14,
         "low": 0.0, "high": 0.0, "calls": 1, "peak_bytes": 3 * 10**10}
        for name, of in (("unet.forward", "unet.forward"), ("encoder.forward", "encoder.forward"),
                         ("classifier.forward", "classifier.forward"), ("autoencoder.step", "unet.training"))
    ]  # fmt: skip
    machine = {"name": "made up", "device": "cuda", "torch": "0", "threads": 1, "date": "never"}
    measured = {"machine": machine, "commit": "none", "rows": rows}
    hours = 9e6 * flops["unet.training"] / 1e14 / HOUR  # of stage 1, which is nearly all
    row = next(line for line in scaling_tables.recipes({"price": "2"}, measured).splitlines() if "| bbbc021 |" in line)
    one, dollars = (float(cell) for cell in row.split("|")[5:7])
    assert hours < one < 1.1 * hours
    assert dollars == pytest.approx(2 * one, rel=0.01)
    assert "0.49" in scaling_tables.memory({}, measured)  # 30 of 61 GB
    assert "12.3 TB" in scaling_tables.cells({"recipe": "bbbc021@64"}, {**measured, "rows": [
        {**row, "recipe": "bbbc021@64"} for row in rows]})  # fmt: skip


def test_the_order_of_a_grid_is_that_of_a_sweep_and_together_is_what_shares_most() -> None:
    experiments = campaign.grid(TINY, 2, 3)
    weights = sorted({e.autoencoder.lambda1 for e in experiments})
    settings = sorted({e.directions.lambda2 for e in experiments})
    space = {"autoencoder.lambda1": Levels(tuple(weights)), "directions.lambda2": Levels(tuple(settings))}
    asked = Sweep(name="s", base=TINY, space=space, sampler="grid")
    assert experiments == [TINY.with_settings(point) for point in asked.grid()]

    trials = budget(experiments).trials
    assert campaign.ordered(trials, "grid") == trials
    together = campaign.ordered(trials, "together")
    assert together == [trials[i] for i in (0, 2, 4, 1, 3, 5)]
    assert sorted(campaign.ordered(trials, "random")) == sorted(trials)
