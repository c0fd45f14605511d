"""What the workflow itself costs: `uv run python benchmarks/workflow.py`.

Times the parsing of the Snakefile, which every Slurm job repeats, and a dry run of 10,000 cells, in
seconds of processor time, which a busy machine does not stretch; the median of several runs, and
the largest memory. Limits: 1 s; 30 s and 600 MB.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SEEDS = 1000  # by five frameworks and two device counts: 10,000 cells
REPEATS = 3


def run(*command: str) -> tuple[float, float]:
    """Seconds of processor time that a command takes, and its peak memory in MB."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    output = process.stdout.read()  # to its end, so that the pipe never fills up
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(output.decode())
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def median_run(*command: str) -> tuple[float, float]:
    """Median seconds and largest memory [MB] over the repeats."""
    seconds, memory = zip(*(run(*command) for _ in range(REPEATS)), strict=True)
    return statistics.median(seconds), max(memory)


def main() -> None:
    """Measure and print."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as config:
        json.dump({"seeds": list(range(SEEDS))}, config)  # JSON is YAML
        config.flush()
        snakemake = ("-m", "snakemake", "--configfile", config.name)
        bare, _ = median_run("-c", "import snakemake.cli")
        listed, _ = median_run("-m", "snakemake", "--list-rules")
        parsed, _ = median_run(*snakemake, "--list-rules")
        planned, memory = median_run(*snakemake, "-n", "--quiet", "all")
    print(f"{'importing Snakemake':<42}{bare:6.2f} s")
    print(f"{'parsing the Snakefile, default study':<42}{listed - bare:6.2f} s   limit 1 s")
    print(f"{'parsing the Snakefile, 10,000 cells':<42}{parsed - bare:6.2f} s   limit 1 s")
    print(f"{'dry run of 10,000 cells':<42}{planned:6.2f} s   limit 30 s")
    print(f"{'its peak memory':<42}{memory:6.0f} MB  limit 600 MB")


if __name__ == "__main__":
    main()
