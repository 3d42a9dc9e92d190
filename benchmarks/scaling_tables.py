"""Fills the tables of docs/scaling.md from the cost model, from measurements and from simulations.

    python benchmarks/scaling_tables.py docs/scaling.md

A table stands between ``<!-- table NAME [FILE] [key=value ...] -->`` and ``<!-- end -->``; FILE is a JSON file that
stage_costs.py (workers.py, prefix_sharing.py) wrote.  Where it is missing the place says how to make it.  All that is
not between such lines stays.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from campaign import ordered, plan_of, prepared_of, tasks_of, units
from scheduler import HOUR, Fleet, expected_waste, summary

from diffex.config import Experiment, load
from diffex.costs import Case, Cost, Images, stage_costs
from diffex.plan import networks

RECIPES = {"assay": 3, "bbbc021": 3, "golgi": 2, "ffhq": 3}
SHARED = ("classifier", "witness", "robust", "real_cells", "warmup")
PER_WEIGHT = ("autoencoder", "reconstruction", "latents", "responses", "codes", "references")
PER_TRIAL = ("directions", "replicas", "effects", "evidence", "pictures")
RATE = 2e8  # bytes a second to the store, where nothing is measured
BLOCK = re.compile(r"(<!-- table (?P<words>[^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)

Words = Mapping[str, str]


def number(x: float, digits: int = 3) -> str:
    """Three digits, with a word for large ones."""
    for size, word in ((1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(x) >= size:
            return f"{x / size:.{digits}g}{word}"
    return f"{x:.{digits}g}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *[[str(cell) for cell in row] for row in rows]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def case(recipe: str, images: float = 1e5) -> tuple[Experiment, Images]:
    """A recipe on ingested images of two classes; the assay on its own."""
    name, _, size = recipe.partition("@")
    e = load(name, {"data.size": int(size)} if size else {})
    if name == "assay":
        return e, Images.of(e)
    e = e.with_settings({"data.path": "ingested"})
    return e, replace(Images.even(e, int(images), RECIPES[name], ("control", "treated")), copied=False)


def group(costs: Mapping[str, Cost], names: Sequence[str]) -> Cost:
    return sum((costs[name] for name in names if name in costs), Cost())


# ----------------------------------------------------------------------------------------------------------------------
# Without measurements


def counts(words: Words) -> str:
    rank = int(words.get("rank", "64"))
    rows = []
    for recipe in RECIPES:
        e, images = case(recipe)
        costs, sizes = stage_costs(e, images, rank=17 if recipe == "assay" else rank), networks(e, images)
        parts = [group(costs, names) for names in (SHARED, PER_WEIGHT, PER_TRIAL)]
        trained, whole = sum(p.work["unet.training"] for p in parts), sum(costs.values(), Cost())
        rows.append([
            recipe, number(sizes.parameters["unet"] + sizes.parameters["encoder"]),
            number(sizes.flops["unet.forward"]), number(trained), *(number(p.work["unet.forward"]) for p in parts[1:]),
            number(whole.flops(sizes.flops)), number(costs["warmup"].scratch), number(whole.bytes),
            number(whole.points),
        ])  # fmt: skip
    head = ["recipe", "parameters", "FLOP a U-Net pass", "U-Net trainings", "U-Net passes each λ1", "... each trial",
            "FLOP, one trial alone", "checkpoint, bytes", "store, bytes", "points of curves"]  # fmt: skip
    return table(head, rows)


def stages(words: Words) -> str:
    recipe = words.get("recipe", "bbbc021")
    e, images = case(recipe, float(words.get("images", "1e5")))
    costs, sizes = stage_costs(e, images, rank=int(words.get("rank", "64"))), networks(e, images)
    total = sum(costs.values(), Cost()).flops(sizes.flops)
    rows = [
        [name, number(c.work["unet.training"]), number(c.work["unet.forward"]), number(c.work["encoder.forward"]),
         f"{c.flops(sizes.flops) / total:.2g}", number(c.bytes), number(c.scratch), number(c.points)]
        for name, c in costs.items()
    ]  # fmt: skip
    head = ["stage", "U-Net trainings", "U-Net passes", "encoder passes", "share of FLOP", "bytes", "bytes on the way",
            "points"]  # fmt: skip
    return table(head, rows)


# ----------------------------------------------------------------------------------------------------------------------
# With measurements


def _machine(measured: Mapping[str, Any]) -> str:
    m = measured["machine"]
    threads = "" if m["device"].startswith("cuda") else f", {m['threads']} thread(s)"
    return f"\n{m['name']}{threads}, torch {m['torch']}, commit {measured['commit']}, {m['date']}.\n"


def measured_units(words: Words, measured: Mapping[str, Any]) -> str:
    rows = []
    for r in measured["rows"]:
        what = r.get("recipe", f"{r['size']} px" if "size" in r else "")
        if "seconds" in r:
            more = [f"{r['bytes']:,} bytes"] if "bytes" in r else [f"rank {r['rank']}"] if "rank" in r else []
            rows.append([
                what, r["operation"], r.get("precision", ""), r["batch"], f"{r['seconds'] * 1e3:.3g}",
                f"{r['low'] * 1e3:.3g} to {r['high'] * 1e3:.3g}", r["calls"],
                f"{r['peak_bytes'] / 1e9:.3g}" if "peak_bytes" in r else "", *(more or [""]),
            ])  # fmt: skip
        else:
            rows.append([what, r["operation"], r.get("precision", ""), r.get("batch", ""), "-", "", "", "", r["error"]])
    head = ["recipe", "operation", "precision", "batch", "ms an item", "quartiles", "calls", "peak GB", ""]
    return table(head, rows) + _machine(measured)


def sharing(words: Words, measured: Mapping[str, Any]) -> str:
    rows = [r for r in measured.get("together", []) if "steps_per_second" in r]
    if not rows:
        return "No figures.\n"
    one = next(r["steps_per_second"] for r in rows if r["processes"] == 1)
    lines = [[r["recipe"], r["rank"], r["processes"], f"{r['steps_per_second']:.3g}",
              f"{r['steps_per_second'] / one:.2f}"] for r in rows]  # fmt: skip
    return table(["recipe", "rank", "processes", "steps a second together", "against one"], lines) + _machine(measured)


def memory(words: Words, measured: Mapping[str, Any]) -> str:
    rows = []
    for r in measured["rows"]:
        if r["operation"] == "autoencoder.step" and "peak_bytes" in r:
            e, images = case(r["recipe"])
            estimate = networks(e, images).training_memory(r["batch"])
            rows.append([r["recipe"], r["precision"], r["batch"], f"{estimate / 1e9:.3g}",
                         f"{r['peak_bytes'] / 1e9:.3g}", f"{r['peak_bytes'] / estimate:.2f}"])  # fmt: skip
    head = ["recipe", "precision", "batch", "estimate, all float32, GB", "measured, GB", "measured / estimate"]
    return table(head, rows) if rows else "No figures of a GPU's memory.\n"


def recipes(words: Words, measured: Mapping[str, Any]) -> str:
    price, rank = float(words.get("price", "3")), int(words.get("rank", "64"))
    known = {r.get("recipe") for r in measured["rows"] if "seconds" in r}
    rows = []
    for recipe in RECIPES:
        like = recipe if recipe in known else "bbbc021" if recipe in ("golgi", "ffhq") else None
        if like not in known or like is None:
            continue
        e, images = case(recipe)
        seconds = units(measured, like, rank=rank)
        costs = stage_costs(e, images, rank=17 if recipe == "assay" else rank)
        parts = [group(costs, names).seconds(seconds) / HOUR for names in (SHARED, PER_WEIGHT, PER_TRIAL)]
        trial, sweep = sum(parts), parts[0] + 4 * parts[1] + 24 * parts[2]
        rows.append([recipe + ("" if like == recipe else f" (by {like}'s seconds)"), *(f"{p:.3g}" for p in parts),
                     f"{trial:.3g}", f"{trial * price:.3g}", f"{sweep:.3g}", f"{sweep * price:.3g}",
                     f"{sweep / (24 * trial):.2f}"])  # fmt: skip
    head = ["recipe", "shared, h", "each λ1, h", "each trial, h", "one run, h", f"one run, $ at {price:g}",
            "24 trials (4 λ1 x 6), h", "24 trials, $", "of 24 runs alone"]  # fmt: skip
    return table(head, rows) + _machine(measured)


def losses(words: Words, measured: Mapping[str, Any]) -> str:
    """A sweep of 24 trials on several fleets."""
    recipe, rank = words.get("recipe", "bbbc021"), int(words.get("rank", "64"))
    e, images, plan = plan_of(recipe, int(float(words.get("images", "1e5"))), RECIPES[recipe], rank=rank)
    seconds = units(measured, recipe, rank=rank)
    workers, ddp, runs = int(words.get("workers", "1")), float(words.get("ddp", "1")), int(words.get("runs", "20"))
    found = [r for r in measured["rows"] if r["operation"] == "checkpoint.write" and r.get("recipe") == recipe]
    write = found[0].get("seconds") if found else None
    rate = max(c.scratch for c in stage_costs(e, images).values()) / write if write else RATE
    tasks = tasks_of(plan, e, images, seconds, rate=rate, speed=workers * ddp)
    rows = []
    for order in words.get("orders", "random").split(","):
        for gpus in map(int, words.get("gpus", "1,4,8").split(",")):
            for loss in map(float, words.get("losses", "0,0.05,0.2,1").split(",")):
                fleet = Fleet(
                    nodes=gpus // workers, loss=loss * workers, delay=float(words.get("delay", "300")), rate=rate,
                    trial=float(words.get("trial", "2")), entry=float(words.get("entry", "0.1")),
                )  # fmt: skip
                s = summary(tasks, ordered(plan.trials, order), fleet, prepared_of(plan), runs=runs,
                            gpus_per_node=workers)  # fmt: skip
                rows.append([
                    f"{gpus}, {workers} a trial", order, f"{loss:g}", f"{s.hours:.3g} ± {s.error:.1g}",
                    f"{s.gpu_hours:.3g}", f"{s.losses:.3g}", f"{s.lost:.2%}", f"{s.overhead:.2%}", f"{s.waited:.1%}",
                    f"{s.efficiency:.3f}",
                ])  # fmt: skip
    head = ["GPUs", "trials' order", "losses an hour and GPU", "makespan, h", "GPU-hours", "losses", "work lost",
            "overhead", "slots waiting", "of the ideal"]  # fmt: skip
    warm = next(t for t in tasks.values() if t.stage == "warmup")
    waste = expected_waste(warm.seconds, warm.every, warm.write, 0.2 * workers / HOUR) / warm.seconds
    note = (
        f"\nThe warm-up takes {warm.seconds / HOUR:.3g} h, with a checkpoint of {warm.write:.2g} s every "
        f"{warm.every:.0f} s; at 0.2 losses an hour and GPU {waste:.2%} of it is expected to be done again.  {runs} "
        f"runs each; {'measured' if write else 'assumed'} rate of checkpoints {rate / 1e6:.0f} MB/s.\n"
    )
    return table(head, rows) + note + _machine(measured)


def cells(words: Words, measured: Mapping[str, Any]) -> str:
    """A campaign of very many cells: what grows with them."""
    n, gpus = float(words.get("cells", "1e9")), int(words.get("gpus", "64"))
    recipe, price = words.get("recipe", "bbbc021@64"), float(words.get("price", "3"))
    rank = int(words.get("rank", "64"))
    (e, images), (_, few) = case(recipe, n), case(recipe, 1e5)
    seconds = units(measured, recipe, rank=rank)
    costs, constant = stage_costs(e, images, rank=rank), stage_costs(e, few, rank=rank)
    pixels = n * Case(e, images).pixels
    encode, verdict = (n * seconds.get(name, 0.0) / gpus / HOUR for name in ("encoder.forward", "classifier.forward"))
    reading = pixels / max(encode * HOUR, 1e-9) / 1e9
    shared, each = (group(constant, names).seconds(seconds) / HOUR for names in ((*SHARED, *PER_WEIGHT), PER_TRIAL))
    rows = [
        ["pixels in the image store", f"{pixels / 1e12:.3g} TB", "grows"],
        ["index of the store", f"{costs['data'].bytes / 1e9:.3g} GB", "grows"],
        ["verdicts of the classifier", f"{costs['classifier'].bytes / 1e9:.3g} GB", "grows"],
        ["latents", f"{costs['latents'].bytes / 1e12:.3g} TB", "grows"],
        ["encoding every cell", f"{encode:.3g} h on {gpus} GPUs, ${encode * gpus * price:,.0f}", "grows"],
        ["the classifier's verdict on every cell", f"{verdict:.3g} h on {gpus} GPUs", "grows"],
        ["reading that this encoding asks for", f"{reading:.3g} GB/s", "with the GPUs"],
        ["all that is shared, on 100,000 cells", f"{shared:.3g} GPU-hours", "does not grow"],
        ["directions, effects, evidence of a trial", f"{each:.3g} GPU-hours", "does not grow"],
    ]  # fmt: skip
    return table([f"{n:,.0f} cells, {recipe}", "", "with the cells"], rows) + _machine(measured)


def workers(words: Words, measured: Mapping[str, Any]) -> str:
    rows = [
        [name, f"{m['efficiency']:.2f}", f"{m['range'][0]:.2f} to {m['range'][1]:.2f}", len(m["seconds"]),
         f"{m['with_start']:.2f}"]
        for name, m in measured.items() if isinstance(m, dict) and "efficiency" in m
    ]  # fmt: skip
    text = table(["work", "efficiency of two workers", "range", "pairs", "with the start of the workers"], rows)
    if cost := measured.get("ray"):
        low, high = cost["range"]
        each = f"{cost['seconds_a_trial']:.2f} s ({low:.2f} to {high:.2f})"
        text += f"\nA trial of which every stage is there takes {each} of a slot; "
        text += f"a sweep of two such trials takes {cost['seconds_of_two_trials']:.1f} s.\n"
    return text + f"\nTwo cores of {measured['machine']}, {measured['versions']}.\n"


def prefix(words: Words, measured: Mapping[str, Any]) -> str:
    m = measured
    same = m["scores_compared"] - len(m["scores_that_differ"])
    return table(["24 trials", "seconds of computing", ""], [
        ["on one store", f"{m['together']:,.0f}",
         f"{m['stages_together']} stages, stage 1 {m['stage_1_together']:,.0f} s"],
        ["sharing nothing", f"{m['apart']:,.0f}",
         f"24 times the mean of {len(m['independent'])} that were run: {min(m['independent']):.0f} to "
         f"{max(m['independent']):.0f} s"],
        ["**ratio**", f"**{m['share']:.3f}**", f"{same} of {m['scores_compared']} numbers of a row are equal"],
    ])  # fmt: skip


PLAIN: dict[str, Callable[[Words], str]] = {"counts": counts, "stages": stages}
MEASURED: dict[str, Callable[[Words, Mapping[str, Any]], str]] = {
    "units": measured_units, "sharing": sharing, "memory": memory, "recipes": recipes, "losses": losses, "cells": cells,
    "workers": workers, "prefix": prefix,
}  # fmt: skip


def fill(text: str, root: Path) -> str:
    """The text with its tables made anew.

    Args:
        text: Markdown with blocks.
        root: folder that FILE is relative to.
    """

    def made(match: re.Match[str]) -> str:
        name, *rest = match["words"].split()
        words = dict(word.split("=", 1) for word in rest if "=" in word)
        files = [word for word in rest if "=" not in word]
        if name in PLAIN:
            body = PLAIN[name](words)
        elif not (root / files[0]).is_file():
            script = {"workers": "workers", "prefix": "prefix_sharing"}.get(name, "stage_costs")
            body = (f"**To be measured**: `python benchmarks/{script}.py --out {files[0]}`, then "
                    "`python benchmarks/scaling_tables.py docs/scaling.md`.\n")  # fmt: skip
        else:
            body = MEASURED[name](words, json.loads((root / files[0]).read_text(encoding="utf-8")))
        return f"{match[1]}\n{body}\n{match[3]}"

    return BLOCK.sub(made, text)


def main() -> None:
    for name in sys.argv[1:] or ["docs/scaling.md"]:
        file = Path(name)
        file.write_text(fill(file.read_text(encoding="utf-8"), file.absolute().parents[1]), encoding="utf-8")


if __name__ == "__main__":
    main()
