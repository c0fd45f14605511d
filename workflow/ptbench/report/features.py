"""`docs/features.md`: what each framework has built in and what is written here, side by side."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ptbench.backends.contract import FEATURES, Feature
from ptbench.configuration.models import FRAMEWORKS, KERNELS
from ptbench.environments import PYTHON
from ptbench.errors import PtbenchError
from ptbench.report.formatting import framework_name

PRINT_FEATURES = """
import json, sys
from ptbench.backends.registry import backend_class
print(json.dumps(backend_class(sys.argv[1], 1).features))
"""

HEADER = """\
# Features by framework

Every capability is in every framework, or this table says which one lacks it. **Built in** means
that the framework has it under the name given; *written here* means that we wrote it over what the
framework offers. The backends say so themselves; `uv run ptbench features` writes this file.
"""


def declared_features(framework: str, environments: Path) -> list[Feature]:
    """What the framework's backend says of itself, asked in its own environment.

    Raises:
        PtbenchError: if that environment is not there or cannot import the backend.
    """
    python = environments / f"{framework}-cpu" / PYTHON
    if not python.exists():
        raise PtbenchError(
            f"{environments} has no environment {framework}-cpu: build it with `uv run ptbench "
            f"environments {framework} --output {environments}`"
        )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    answer = subprocess.run(
        [python, "-c", PRINT_FEATURES, framework],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    if answer.returncode != 0:
        reason = answer.stderr.strip().rpartition("\n")[2]
        raise PtbenchError(f"the backend of {framework} cannot be imported: {reason}")
    return [Feature(*each) for each in json.loads(answer.stdout.splitlines()[-1])]


def features_markdown(declared: Mapping[str, Sequence[Feature]]) -> str:
    """The table, one section per feature, so that long explanations can be read.

    Args:
        declared: every framework's features, in the order of `FEATURES`.
    """
    parts = [HEADER, overview(declared)]
    for index, name in enumerate(FEATURES):
        lines = []
        for framework, features in declared.items():
            feature = features[index]
            kind = "**built in**" if feature.built_in else "*written here*"
            lines.append(f"- {framework_name(framework)}, {kind}: {feature.how}")
        parts.append(f"## {name[0].upper()}{name[1:]}\n\n" + "\n".join(lines) + "\n")
    parts.append(kernels())
    return "\n".join(parts)


def overview(declared: Mapping[str, Sequence[Feature]]) -> str:
    """● where built in, ○ where written here."""
    names = [framework_name(framework) for framework in declared]
    rows = [["Feature", *names], ["---", *[":-:"] * len(names)]]
    for index, name in enumerate(FEATURES):
        rows.append([name, *("●" if f[index].built_in else "○" for f in declared.values())])
    counts = [str(sum(f.built_in for f in features)) for features in declared.values()]
    rows.append(["**built in, of " + str(len(FEATURES)) + "**", *counts])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"● built in, ○ written here\n\n{table}\n"


def kernels() -> str:
    """Which kernels each framework's LSTM has."""
    every = list(dict.fromkeys(kernel for own in KERNELS.values() for kernel in own))
    rows = [["Framework", *every], ["---", *[":-:"] * len(every)]]
    for framework in FRAMEWORKS:
        own = KERNELS[framework]
        rows.append([framework_name(framework), *("✓" if k in own else "–" for k in every)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        "## Kernels of the LSTM (`kernel` in a recipe)\n\n"
        "fused: the framework's own layer, or in JAX, which has none for CPUs, a scan behind one\n"
        "product for the inputs of all time steps; cell: explicit time steps; block: TensorFlow's\n"
        "BlockLSTM, which no other framework has; sparse: products with the kept weights alone.\n"
        f"Other cells have fused and cell.\n\n{table}\n"
    )
