"""Kill trainers at random moments for as long as told.

    uv run python benchmarks/soak.py --minutes 30

Round after round it takes a framework and a number of devices, trains a small cell to its end
without disturbance, trains it again while killing it (SIGKILL) between its first moment and its
last, and compares the two: history, metrics and best parameters must be equal, bit for bit, in all
that no clock wrote. Prints a line for each round and ends with the kills survived; with status 1 at
the first difference, whose files it then keeps.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.faults.harness import Trainer, make_corpus

from ptbench.backends import FRAMEWORKS
from ptbench.training.records import read_metrics

KILLS = 12  # at most, of one run


def main() -> None:
    """Soak, and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--minutes", type=float, default=30, help="for how long (the last round ends)"
    )
    parser.add_argument("--framework", action="append", choices=FRAMEWORKS, help="this one alone")
    parser.add_argument("--devices", action="append", type=int, help="this many alone")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    rounds = itertools.cycle(
        itertools.product(arguments.devices or [1, 2], arguments.framework or FRAMEWORKS)
    )
    moments, survived, finished = random.Random(arguments.seed), Counter[str](), 0
    folder = Path(tempfile.mkdtemp(prefix="ptbench-soak-"))
    corpus = make_corpus(folder / "corpus")
    references: dict[tuple[str, int], Trainer] = {}
    end = time.monotonic() + 60 * arguments.minutes
    while time.monotonic() < end:
        devices, framework = next(rounds)
        if (framework, devices) not in references:
            reference = Trainer(framework, devices, corpus, folder / "uninterrupted")
            reference.finish()
            references[framework, devices] = reference
        reference = references[framework, devices]
        epoch = read_metrics(reference.output / "metrics.json").seconds_per_epoch
        assert epoch is not None
        trainer = Trainer(framework, devices, corpus, folder / f"round-{finished}")
        for _ in trainer.kill_until_done(moments, KILLS, delay=2 * epoch, at_start=0.25):
            pass
        same = trainer.result() == reference.result()
        name = f"{framework}, {devices} device{'s' * (devices > 1)}"
        print(f"{name}: {trainer.kills} kills, {'equal' if same else 'DIFFERENT'}", flush=True)
        if not same:
            sys.exit(f"the files are in {reference.output} and {trainer.output}")
        survived[name] += trainer.kills
        finished += 1
        shutil.rmtree(trainer.folder)
    shutil.rmtree(folder)
    for name, kills in survived.items():
        print(f"{name:<24}{kills:5} kills survived")
    print(f"{'in all':<24}{survived.total():5} kills survived in {finished} runs")


if __name__ == "__main__":
    main()
