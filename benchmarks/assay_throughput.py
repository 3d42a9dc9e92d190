"""How many cells a second the simulated assay draws on one core, by size and number of channels.

    python benchmarks/assay_throughput.py

The aim is 3,000 images a second at 32 px with three channels.  Figures are the best and the median of five passes
over 2,048 cells (fewer where they are larger) in one process; NumPy's elementwise work uses one core.
"""

import statistics
import time

from diffex import assay

CASES = ((32, 1), (32, 3), (32, 5), (64, 3), (128, 3))
CELLS = 2048


def main() -> None:
    print("size  channels  images/s best  median")
    for size, channels in CASES:
        plan = assay.plan(treatments=assay.DESIGNS["binary"], channels=assay.CHANNELS[:channels], num_images=CELLS)
        cells = CELLS if size == 32 else CELLS // (size // 32) ** 2
        rates = []
        for _ in range(5):
            began = time.perf_counter()
            drawn = sum(len(chunk) for chunk in assay.draw(plan, size, range(cells)))
            rates.append(drawn / (time.perf_counter() - began))
        print(f"{size:4}  {channels:8}  {max(rates):13,.0f}  {statistics.median(rates):6,.0f}")


if __name__ == "__main__":
    main()
