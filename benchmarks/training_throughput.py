"""What a training step of the autoencoder costs, in pairs on one machine: bf16 against fp32, patch 2 against patch 1.

    python benchmarks/training_throughput.py [threads]

Variants take turns, five rounds; the figure is the ratio of the medians, so a noisy machine harms both alike.
"""

import statistics
import sys
import time

import torch

from diffex.compute import Compute
from diffex.config import load
from diffex.model import DiffusionAutoencoder

VARIANTS = {
    "default (bf16, patch 2)": {},
    "fp32": {"run.precision": "fp32"},
    "patch 1": {"autoencoder.patch": 1},
}
STEPS = 4


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    steps = {}
    for name, settings in VARIANTS.items():
        e = load("assay", {"run.precision": "bf16", "run.device": "cpu", **settings})
        model = DiffusionAutoencoder(
            e.autoencoder, e.rendering, channels=3, size=32, num_classes=2, compute=Compute.resolve(e.run)
        ).train()
        steps[name] = (model, torch.optim.Adam(model.parameters(), 1e-4), e.autoencoder.batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for round_ in range(6):
        for name, (model, optimiser, batch) in steps.items():
            x, probs = torch.rand(batch, 3, 32, 32) * 2 - 1, torch.full((batch, 2), 0.5)
            began = time.perf_counter()
            for _ in range(STEPS):
                loss, _ = model.loss(x, probs, torch.randint(0, 1000, (batch,)), torch.randn_like(x))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            if round_ > 0:  # the first round warms up
                seconds[name].append((time.perf_counter() - began) / (STEPS * batch))
    base = statistics.median(seconds["default (bf16, patch 2)"])
    print(f"{torch.get_num_threads()} thread(s)          images/s   time against default")
    for name, values in seconds.items():
        print(f"{name:<24}{1 / statistics.median(values):8.0f}   {statistics.median(values) / base:.2f}")


if __name__ == "__main__":
    main()
