"""How fast training reads its batches: the image store against raw memory-mapped NumPy and against PNG files.

    python benchmarks/reading_throughput.py [threads]

All readers give the same shuffled batches of 64 float32 images in [-1, 1], on one machine; the store and raw NumPy take
turns batch by batch, and the figures are medians over the batches of seven rounds.  `raw NumPy` is one memory-mapped
.npy array indexed by rows; `PNG, DataLoader` is torch's DataLoader over one PNG file an image, with 0 and 2 workers
(start-up of the workers included: every epoch has it).
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from diffex.data import ImageStore, ShardWriter, StoreInfo, index_columns, sample_rows, write_index

COUNT, SIZE, BATCH, SHARDS, ROUNDS = 8192, 64, 64, 32, 7


class Files(Dataset[torch.Tensor]):
    """One PNG an image."""

    def __init__(self, folder: Path, order: np.ndarray) -> None:
        self.folder, self.order = folder, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(self.folder / f"{self.order[i]}.png") as image:
            return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).astype(np.float32) / 127.5 - 1.0)


def write(folder: Path, pixels: np.ndarray) -> ImageStore:
    """The same images as a store of many shards, one .npy array and PNG files."""
    np.save(folder / "raw.npy", pixels)
    (folder / "png").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / "png" / f"{i}.png")
    shards = []
    for k, part in enumerate(np.array_split(pixels, SHARDS)):
        writer = ShardWriter(folder / f"images-{k:05}.arrow", pixels.dtype, pixels.shape[1:])
        for image in part:
            writer.add(image)
        writer.close()
        shards.append((f"images-{k:05}.arrow", len(part)))
    write_index(folder / "index.arrow", iter([pa.table(index_columns(np.zeros(COUNT), np.zeros(COUNT)))]))
    StoreInfo(
        channels=("a", "b", "c"), class_names=("x",), size=SIZE, dtype="uint8", window=((0.0, 255.0),) * 3, count=COUNT,
        source="", split_by=(), simulated=False, shards=tuple(shards), depth=3,
    ).write(folder)  # fmt: skip
    return ImageStore(folder)


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 3, SIZE, SIZE), np.uint8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = write(folder, pixels)
        raw = np.load(folder / "raw.npy", mmap_mode="r")
        rows = np.arange(COUNT)

        def batches(epoch: int) -> Iterator[np.ndarray]:
            return (sample_rows(rows, BATCH, epoch * COUNT + i, 0) for i in range(0, COUNT, BATCH))

        def from_store(epoch: int) -> Iterator[torch.Tensor]:
            return (store.batch(order).x for order in batches(epoch))

        def from_raw(epoch: int) -> Iterator[torch.Tensor]:
            return (torch.from_numpy(raw[order]).float().mul_(1 / 127.5).sub_(1.0) for order in batches(epoch))

        def from_png(workers: int) -> Callable[[int], Iterator[torch.Tensor]]:
            def read(epoch: int) -> Iterator[torch.Tensor]:
                files = Files(folder / "png", np.concatenate(list(batches(epoch))))
                return iter(DataLoader(files, batch_size=BATCH, num_workers=workers))

            return read

        assert torch.allclose(next(from_store(0)), next(from_raw(0)), atol=1e-6)
        readers = {
            "diffex store": from_store, "raw NumPy": from_raw, "PNG, DataLoader, 0 workers": from_png(0),
            "PNG, DataLoader, 2 workers": from_png(2),
        }  # fmt: skip
        batch_seconds: dict[str, list[float]] = {reader: [] for reader in readers}
        ratios = []  # raw NumPy's time over the store's, one round each
        for round_ in range(ROUNDS + 1):
            turns = {reader: read(round_) for reader, read in readers.items()}
            spent: dict[str, list[float]] = {reader: [] for reader in readers}
            for _ in range(COUNT // BATCH):  # batch by batch, so that what else the machine does hits all alike
                for reader in ("diffex store", "raw NumPy"):
                    began = time.perf_counter()
                    next(turns[reader])
                    spent[reader].append(time.perf_counter() - began)
            for reader in list(readers)[2:]:
                began = time.perf_counter()
                assert sum(len(x) for x in turns[reader]) == COUNT
                spent[reader].append((time.perf_counter() - began) / (COUNT // BATCH))
            if round_ > 0:  # the first round warms up
                for reader, values in spent.items():
                    batch_seconds[reader] += values
                ratios.append(statistics.median(spent["raw NumPy"]) / statistics.median(spent["diffex store"]))
    head = f"{COUNT} images of {SIZE} px, 3 channels, {torch.get_num_threads()} thread(s)"
    print(f"{head}     images/s   store is x times as fast")
    for reader, values in batch_seconds.items():
        rate = BATCH / statistics.median(values)
        times = statistics.median(values) / statistics.median(batch_seconds["diffex store"])
        print(f"{reader:<52}{rate:12,.0f}   {times:.2f}")
    print(f"store against raw NumPy, round by round: {', '.join(f'{r:.2f}' for r in sorted(ratios))}")


if __name__ == "__main__":
    main()
