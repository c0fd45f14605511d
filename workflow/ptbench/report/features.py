"""`docs/features.md`: what each framework has built in and what is written here, side by side."""

from __future__ import annotations

from ptbench.backends import FRAMEWORKS
from ptbench.backends.features import Feature, read_features
from ptbench.report.formatting import framework_name

HEADER = """\
# Features by framework

Every framework has every feature, or this table says which one lacks it. **Built in** means that
the framework has it under the names given; *written here* means that this project wrote it with
what the framework offers. `workflow/ptbench/backends/features.yaml` is where this comes from, and
`uv run ptbench generate` writes this file.
"""


def features_markdown() -> str:
    """Return the page: an overview, one section for each feature, and the kernels."""
    every = read_features()
    names = list(next(iter(every.values())))
    parts = [HEADER, overview(every, names)]
    for name in names:
        lines = [
            f"- {framework_name(framework)}, {describe(features[name])}"
            for framework, features in every.items()
        ]
        parts.append(f"## {name[0].upper()}{name[1:]}\n\n" + "\n".join(lines) + "\n")
    parts.append(kernels())
    return "\n".join(parts)


def describe(feature: Feature) -> str:
    """Return one feature of one framework in a line of Markdown."""
    if feature.absent:
        return f"*not here*: {feature.absent}"
    kind = "**built in**" if feature.built_in else "*written here*"
    names = ", ".join(f"`{name}`" for name in [*feature.symbols, *feature.code])
    return "; ".join(part for part in (f"{kind}: {names}" if names else kind, feature.note) if part)


def overview(every: dict[str, dict[str, Feature]], names: list[str]) -> str:
    """Return a table with ● where a feature is built in, ○ where it is written here, else –."""
    titles = [framework_name(framework) for framework in every]
    rows = [["Feature", *titles], ["---", *[":-:"] * len(titles)]]
    rows += [[name, *(sign(features[name]) for features in every.values())] for name in names]
    counts = [str(sum(f.built_in for f in features.values())) for features in every.values()]
    rows.append([f"**built in, of {len(names)}**", *counts])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"● built in, ○ written here, – not here\n\n{table}\n"


def sign(feature: Feature) -> str:
    """Return what a feature is in a table."""
    if feature.absent:
        return "–"
    return "●" if feature.built_in else "○"


def kernels() -> str:
    """Return a table of the kernels that each framework's LSTM has."""
    every = list(dict.fromkeys(kernel for row in FRAMEWORKS.values() for kernel in row.kernels))
    rows = [["Framework", *every], ["---", *[":-:"] * len(every)]]
    rows += [
        [own.title, *("✓" if kernel in own.kernels else "–" for kernel in every)]
        for own in FRAMEWORKS.values()
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        "## Kernels of the LSTM (`kernel` in a recipe)\n\n"
        "- fused: the framework's own layer; JAX has none for CPUs, so there it is a scan behind\n"
        "  one product for the inputs of all time steps\n"
        "- stepwise: explicit time steps\n"
        "- block: TensorFlow's BlockLSTM, which no other framework has\n"
        "- sparse: products with the kept weights alone\n\n"
        f"Other recurrent layers have fused and stepwise.\n\n{table}\n"
    )
