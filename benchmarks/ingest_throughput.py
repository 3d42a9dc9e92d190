"""How fast an ingest is: single cells against the plainest copy there is, and fields cell by cell.

    python benchmarks/ingest_throughput.py

`PNG to raw NumPy` decodes the same PNG files with torch's DataLoader and writes one memory-mapped array: no classes
checked, no split, no record, nothing atomic.  The DataLoader alone is beside it.  All run in turns on one machine; the
figures are medians of three rounds, and an ingest's two workers are Ray tasks whose start-up (of Ray) is not counted,
as a DataLoader's is not when it serves many epochs.  Fields are 512 px, three channels, 24 cells each.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from diffex.config import Assay
from diffex.data_cli import Workers
from diffex.ingest import ingest, run_here
from diffex.screen import Screen
from diffex.simulate import write_screen

COUNT, SIDE, ROUNDS = 8192, 64, 3
CHANNELS = ("DNA", "tubulin", "actin")


class Files(Dataset[torch.Tensor]):
    """One PNG an image."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(self.files[i]) as image:
            return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def write_cells(folder: Path) -> list[Path]:
    """PNG files in folders of two classes."""
    smooth = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE // 4, SIDE // 4, 3), np.uint8)
    files = []
    for i, image in enumerate(smooth):
        file = folder / "ab"[i % 2] / f"p{i % 4}_A{i % 12 + 1:02}_{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file)
        files.append(file)
    return files


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, Workers(2) as run_two:
        folder = Path(name)
        files = write_cells(folder / "cells")
        size = write_screen(Assay(num_plates=2, wells_per_class=4), CHANNELS, folder / "screen", fields_per_well=3)
        made = iter(range(10_000))
        run_two(len, None, [[], []])  # starts Ray

        def by_ingest(source: str, run: Callable) -> Callable[[], int]:
            return lambda: ingest(folder / source, Screen(), folder / f"store {next(made)}", run=run).images

        def by_loader(workers: int, *, keep: bool) -> Callable[[], int]:
            def read() -> int:
                out = folder / f"raw {next(made)}.npy"
                shape = (COUNT, 3, SIDE, SIDE)
                raw = np.lib.format.open_memmap(out, mode="w+", dtype=np.uint8, shape=shape) if keep else None
                done = 0
                for batch in DataLoader(Files(files), batch_size=64, num_workers=workers):
                    if raw is not None:
                        raw[done : done + len(batch)] = batch.numpy()
                    done += len(batch)
                return done

            return read

        ways = {
            "cells: ingest, 1 core": by_ingest("cells", run_here),
            "cells: ingest, 2 workers": by_ingest("cells", run_two),
            "cells: PNG to raw NumPy, 0 workers": by_loader(0, keep=True),
            "cells: PNG to raw NumPy, 2 workers": by_loader(2, keep=True),
            "cells: PNG read by DataLoader, 0 workers": by_loader(0, keep=False),
            "cells: PNG read by DataLoader, 2 workers": by_loader(2, keep=False),
            "fields: ingest, 1 core": by_ingest("screen", run_here),
            "fields: ingest, 2 workers": by_ingest("screen", run_two),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        images: dict[str, int] = {}
        for round_ in range(ROUNDS + 1):
            for way, do in ways.items():
                began = time.perf_counter()
                images[way] = do()
                if round_ > 0:  # the first round warms up
                    seconds[way].append(time.perf_counter() - began)
    print(f"{COUNT} PNG images of {SIDE} px; {size['fields']} fields of 512 px with {size['cells']} cells")
    print(f"{'':44}{'images/s':>10}  {'ratio to 1 core':>15}")
    for way, values in seconds.items():
        one = statistics.median(seconds[f"{way.split(':')[0]}: ingest, 1 core"])
        middle = statistics.median(values)
        print(f"{way:<44}{images[way] / middle:10,.0f}  {one / middle:15.2f}")
    fields = size["fields"] / statistics.median(seconds["fields: ingest, 1 core"])
    print(f"fields a second on one core: {fields:.2f} (each is read three times: twice for its plate's survey)")


if __name__ == "__main__":
    main()
