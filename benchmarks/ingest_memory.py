"""Peak memory of an ingest at 1 and at 10 times the data: it may grow with the list of images, never with the pixels.

    python benchmarks/ingest_memory.py

Each ingest runs in a process of its own, whose peak resident memory (Linux's VmHWM) is printed; `imports` is a process
that only imports the package.  Ten times the data are hard links under other plate names: other files to the
ingest, the same bytes on the disk.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from diffex.config import Assay
from diffex.simulate import write_screen

CELLS, SIDE, TIMES = 4096, 96, 10
MEASURED = """
import json, sys
from pathlib import Path
from diffex.ingest import ingest
from diffex.screen import Screen
images = ingest(Path(sys.argv[1]), Screen(), Path(sys.argv[2])).images if len(sys.argv) > 1 else 0
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([images, int(peak.split()[1]) * 1024]))
"""


def write_cells(folder: Path) -> None:
    """PNG files in folders of two classes."""
    rng = np.random.default_rng(0)
    for i in range(CELLS):
        file = folder / "ab"[i % 2] / f"p{i % 4}_A{i % 12 + 1:02}_{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(file)


def repeat(source: Path, target: Path) -> None:
    """Link every file ``TIMES`` times, each time on plates of another name."""
    for file in source.rglob("*.*"):
        folder = target / file.parent.relative_to(source)
        folder.mkdir(parents=True, exist_ok=True)
        for k in range(TIMES):
            os.link(file, folder / f"copy{k}{file.name}")


def measure(*paths: Path) -> tuple[int, int]:
    """Images and peak bytes of one ingest in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, paths)], check=True, capture_output=True, text=True
    )  # fmt: skip
    images, peak = json.loads(done.stdout.splitlines()[-1])
    return images, peak


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cells(folder / "cells")
        write_screen(
            Assay(num_plates=2, wells_per_class=2), ("DNA", "tubulin", "actin"), folder / "screen", layout="files",
            fields_per_well=3,
        )  # fmt: skip
        print(f"{'':24}{'images stored':>14}{'pixels read':>14}{'peak memory':>16}")
        print(f"{'imports':24}{'':28}{measure()[1] / 2**20:12,.0f} MiB")
        for kind, source in (("single cells", folder / "cells"), ("fields", folder / "screen" / "images")):
            repeat(source, folder / f"{kind} x{TIMES}")
            for times, path in ((1, source), (TIMES, folder / f"{kind} x{TIMES}")):
                images, peak = measure(path, folder / f"store {kind} {times}")
                files = len(list(path.rglob("*.*")))
                size = files * (SIDE * SIDE * 3 if kind == "single cells" else 512 * 512 * 2)
                print(f"{f'{kind}, {times} x':24}{images:14,}{size / 2**20:10,.0f} MiB{peak / 2**20:12,.0f} MiB")


if __name__ == "__main__":
    main()
