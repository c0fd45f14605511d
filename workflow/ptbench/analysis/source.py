"""What a framework costs in source: lines, functions, its symbols, complexity, the second device.

`ptbench generate` counts and writes `backends/source.json`, which the report reads: counting needs
radon, which is there for development alone.
"""

from __future__ import annotations

import ast
import io
import json
import re
import statistics
import tokenize
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from ptbench.backends import FRAMEWORKS
from ptbench.model.recipe import Model

BACKENDS = Path(__file__).parents[1] / "backends"
FILE = BACKENDS / "source.json"


class Counted(NamedTuple):
    """What of a framework is counted."""

    packages: tuple[str, ...]  # whose symbols are the framework's
    shared: tuple[str, ...] = ()  # files elsewhere that it uses on one machine
    replicas: str = ""  # names that data parallelism alone needs, as a regular expression


# Names that say what a line is there for, in every framework and in each.
REPLICAS = r"devices|rank|replicas?|replicated?|all_?reduce"
COUNTED = {
    "pytorch": Counted(("torch",), ("replicas.py",),
                       "dist|DistributedDataParallel|parallel|meet|gathered|on_every_replica|"
                       "over_replicas|training_state|Replicated|TrainingState|other_replicas|"
                       "ReplicatedBackend|Group|join_group|leave_group"),
    "tensorflow": Counted(("tensorflow",), ("tensorflow/runtime.py",),
                          "strategy|distribute|MirroredStrategy|local|_distribute|LOGICAL_CPUS|"
                          "PerReplica"),
    "keras": Counted(("keras", "tensorflow"), ("tensorflow/runtime.py",),
                     "strategy|distribute|MirroredStrategy|local|_distribute|LOGICAL_CPUS|"
                     "PerReplica|alike_on_all_replicas"),
    "mxnet": Counted(("mxnet",), replicas="contexts|split_and_load|allreduce_grads|kvstore"),
    "jax": Counted(("jax", "jaxlib"), replicas="psum|shard_map|Mesh|mesh|NamedSharding|"
                   "PartitionSpec|AxisType|DATA|on_replicas|everywhere|_everywhere|of_batch|"
                   "_of_batch|of_state|_of_state|shardings?|in_specs|out_specs|pool_threads"),
}  # fmt: skip


class Source(Model):
    """A framework's source, as it is counted: without comments, docstrings and blank lines."""

    lines: dict[str, int] = Field(description="Lines of code, by file.")
    functions: int = Field(description="Functions and methods.")
    symbols: list[str] = Field(description="Public names of the framework that are used.")
    mean_complexity: float = Field(description="Cyclomatic, mean over functions.")
    most_complex: str = Field(description="The function with the highest complexity.")
    highest_complexity: int = Field(description="Of that function.")
    replica_lines: int = Field(description="Lines that are there for a second device.")


def read_source() -> dict[str, Source]:
    """Return what was counted, by framework."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    return {name: Source.model_validate(facts) for name, facts in content.items()}


def source_json() -> str:
    """Return `source.json`, counted now."""
    content = {name: count(name).model_dump() for name in FRAMEWORKS}
    return json.dumps(content, indent=1) + "\n"


def count(framework: str) -> Source:
    """Count a framework's source."""
    from radon.complexity import cc_visit

    counted = COUNTED[framework]
    files = sorted(file for file in (BACKENDS / framework).glob("*.py") if file.stem != "__init__")
    files += [BACKENDS / name for name in counted.shared]
    texts = {str(file.relative_to(BACKENDS)): file.read_text("utf-8") for file in set(files)}
    functions: list[tuple[int, str]] = []
    symbols: set[str] = set()
    replica_lines = 0
    for name, text in sorted(texts.items()):
        blocks = [block for block in cc_visit(text) if not hasattr(block, "methods")]
        module = name.removesuffix(".py").replace("/", ".")
        functions += [(block.complexity, f"{module}.{block.fullname}") for block in blocks]
        symbols |= used_symbols(text, counted.packages)
        whole = name.endswith("replicas.py")
        replica_lines += len(code_lines(text) if whole else lines_naming(text, counted.replicas))
    complexity, where = max(functions)
    return Source(
        lines={name: len(code_lines(text)) for name, text in sorted(texts.items())},
        functions=len(functions),
        symbols=sorted(symbols),
        mean_complexity=round(statistics.fmean(each for each, _ in functions), 2),
        most_complex=where,
        highest_complexity=complexity,
        replica_lines=replica_lines,
    )


def tokens_of(text: str) -> Iterable[tokenize.TokenInfo]:
    """Yield the tokens of code: no comments, no line ends, and no docstrings."""
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    statement_begins = True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in layout:
            statement_begins = statement_begins or token.type == tokenize.NEWLINE
        elif token.type != tokenize.COMMENT:
            if not (statement_begins and token.type == tokenize.STRING):
                yield token
            statement_begins = False


def code_lines(text: str) -> set[int]:
    """Return the numbers of the lines that have code."""
    return {line for token in tokens_of(text) for line in range(token.start[0], token.end[0] + 1)}


def lines_naming(text: str, names: str) -> set[int]:
    """Return the numbers of the lines of code that have a name of `REPLICAS` or `names`."""
    wanted = re.compile(f"(?:{REPLICAS}|{names})" if names else REPLICAS)
    return {
        token.start[0]
        for token in tokens_of(text)
        if token.type == tokenize.NAME and wanted.fullmatch(token.string)
    }


def used_symbols(text: str, packages: Iterable[str]) -> set[str]:
    """Return the dotted names of packages that a module uses, such as `torch.nn.Linear`.

    A name that is imported counts under its own name, and so does each of its attributes that is
    used; what is only on the way to another is left out.
    """
    tree = ast.parse(text)
    bound = {}  # the package's name for each name of the module
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.partition(".")[0]
                bound[alias.asname or name] = name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    theirs = {ours: name for ours, name in bound.items() if name.partition(".")[0] in set(packages)}
    found = {full for node in ast.walk(tree) if (full := dotted(node, theirs))}
    return {full for full in found if not any(other.startswith(f"{full}.") for other in found)}


def dotted(node: Any, bound: dict[str, str]) -> str | None:
    """Return the full name of an expression `name.attribute...` of which `name` is bound."""
    attributes: list[str] = []
    while isinstance(node, ast.Attribute):
        attributes.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name) and node.id in bound:
        return ".".join([bound[node.id], *reversed(attributes)])
    return None
