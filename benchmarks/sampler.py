"""What the hardware sampler costs: training with it and without it, in turns.

    PYTHONPATH=workflow results/environments/pytorch-cpu/bin/python benchmarks/sampler.py pytorch

With --interval 0.01 it samples a hundred times as often, which shows a cost that is otherwise lost
in the noise. Prints the median over rounds of the speed with the sampler over the speed without it,
its 95 % interval by the sign test's order statistics, and the sampler's own processor time.
"""

from __future__ import annotations

import argparse
import contextlib

from ptbench.isolation import isolate


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("framework")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=2.0, help="least length of a turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--interval", type=float, default=1.0, help="between two samples [s]")
    asked = parser.parse_args()
    isolate(asked.framework, asked.threads)

    import numpy as np

    from ptbench.measurement.backend_speed import BackendSpeed
    from ptbench.model.recipe import Recipe
    from ptbench.training.hardware import Sampler

    task = {
        "framework": asked.framework, "vocabulary_size": 10_000, "threads": asked.threads,
        "recipe": Recipe(corpus="ptb").model_dump(mode="json"), "accelerator": "cpu",
    }  # fmt: skip
    worker = BackendSpeed(task)
    worker.train(2.0)
    ratios, spent, sampled = [], 0.0, 0.0
    for number in range(asked.rounds):
        speeds = {}
        for samples in (number % 2 == 0, number % 2 == 1):
            sampler = Sampler(asked.threads, interval=asked.interval)
            with sampler if samples else contextlib.nullcontext():
                measured = worker.train(asked.seconds)
            speeds[samples] = measured["tokens"] / measured["seconds"]
            spent += sampler.totals["sampling_seconds"]
            sampled += sampler.totals["seconds"]
        ratios.append(speeds[True] / speeds[False])
    ordered = np.sort(ratios)
    half = round(0.98 * len(ordered) ** 0.5)  # 1.96 standard deviations of a median's rank
    middle = len(ordered) // 2
    low, high = ordered[max(middle - half, 0)], ordered[min(middle + half, len(ordered) - 1)]
    print(
        f"{asked.framework}: with the sampler {np.median(ratios):.4f} times as fast "
        f"({low:.4f} to {high:.4f}, {asked.rounds} rounds); it took {spent / sampled:.3%} of a core"
    )


if __name__ == "__main__":
    main()
