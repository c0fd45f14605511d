"""What the workflow itself costs: `uv run python benchmarks/workflow.py`.

Times the parsing of the Snakefile, which every Slurm job repeats, a dry run of 10,000 cells, and a
run when all of them are done, in seconds of processor time, which a busy machine does not stretch;
the median of several runs, and the largest memory. Ends with status 1 if one is above its limit.
The results of those cells are of no content but their fingerprint, in a throw-away copy of the
project.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from ptbench.configuration.study import load_study

ROOT = Path(__file__).parents[1]
# Ten variants by five frameworks, two device counts and a hundred seeds: 10,000 cells.
STUDY = {
    "experiments": ["greatti-hidden", "greatti-depth"],
    "corpus": "synthetic",
    "devices": [1, 2],
    "seeds": list(range(100)),
}
REPEATS = 3
ANALYSIS = (
    "analysis.json", "table.csv", "table.md", "table.tex", "comparison.csv", "differences.csv",
    "variants.csv", "curves.csv",
)  # fmt: skip

REPORT = (
    "index.html", "frameworks.html", "methods.html", "runs.html", "report.md",
    "papers/greatti2019.html",
)  # fmt: skip


def run(*command: str, folder: Path = ROOT) -> tuple[float, float]:
    """Seconds of processor time that a command takes in a folder, and its peak memory in MB."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    output = process.stdout.read()  # to its end, so that the pipe never fills up
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(output.decode())
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def median_run(*command: str, folder: Path = ROOT) -> tuple[float, float]:
    """Median seconds and largest memory [MB] over the repeats."""
    seconds, memory = zip(*(run(*command, folder=folder) for _ in range(REPEATS)), strict=True)
    return statistics.median(seconds), max(memory)


def copy_project(folder: Path) -> None:
    """The project's own files, without results."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def pretend_done(folder: Path, config: Path) -> None:
    """Make every output a file of no content, and Snakemake believe that its rules made them."""
    study = load_study(STUDY)
    assert len(study.cells) == 10_000
    outputs = [
        "corpora/synthetic/corpus.json",
        *(f"cells/{cell.path}/metrics.json" for cell in study.cells),
        *(f"experiments/{name}/{file}" for name in study.experiments for file in ANALYSIS),
        *(f"experiments/{name}/figures" for name in study.experiments),
        *(f"papers/greatti2019/{name}" for name in ("answers.json", "exhibits", "tables")),
        *(f"report/experiments/{name}.html" for name in study.experiments),
        *(f"report/{name}" for name in REPORT),
    ]
    for output in outputs:
        path = folder / "results" / output
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch() if path.suffix else path.mkdir()
    for cell in study.cells:
        result = {"fingerprint": study.specification(cell.variant).fingerprint}
        (folder / "results" / "cells" / cell.path / "metrics.json").write_text(json.dumps(result))
    # Without hooks, which would write study.json, as any run does, and read the results.
    touch = ("--touch", "--no-hooks", "--cores", "1")
    run("-m", "snakemake", "--configfile", str(config), *touch, folder=folder)


def main() -> None:
    """Measure, print, and hold the limits."""
    with tempfile.TemporaryDirectory() as folder:
        config, project = Path(folder) / "config.yaml", Path(folder) / "project"
        config.write_text(json.dumps(STUDY))  # JSON is YAML
        copy_project(project)
        snakemake = ("-m", "snakemake", "--configfile", str(config))
        bare, _ = median_run("-c", "import snakemake.cli")
        listed, _ = median_run("-m", "snakemake", "--list-rules")
        parsed, _ = median_run(*snakemake, "--list-rules")
        planned, planned_memory = median_run(*snakemake, "-n", folder=project)
        pretend_done(project, config)
        done, done_memory = median_run(*snakemake, "--cores", "1", folder=project)
        if (project / "results" / "study.json").exists():
            sys.exit("something was run where all should have been done")
    print(f"{'importing Snakemake':<42}{bare:6.2f} s")
    measured = [
        ("parsing the Snakefile, default study", listed - bare, 0.5, "s"),
        ("parsing the Snakefile, 10,000 cells", parsed - bare, 0.5, "s"),
        ("dry run of 10,000 cells", planned, 15, "s"),
        ("peak memory of the dry run", planned_memory, 400, "MB"),
        ("run when all of them are done", done, 30, "s"),
        ("peak memory of that run", done_memory, 400, "MB"),
    ]
    for what, value, limit, unit in measured:
        print(f"{what:<42}{value:6.2f} {unit:<2}  limit {limit} {unit}")
    above = [
        f"{what}: {value:.2f} {unit} is above {limit} {unit}"
        for what, value, limit, unit in measured
        if value > limit
    ]
    if above:
        sys.exit("\n".join(above))


if __name__ == "__main__":
    main()
