"""The files that are made: schemas, `docs/features.md`, `docs/manual/`, the list of decisions.

`uv run ptbench generate` writes them, and a test holds them to what is here.
"""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ptbench.analysis.claims import ClaimFile
from ptbench.analysis.costs import Estimator
from ptbench.analysis.exhibits import ExhibitFile
from ptbench.analysis.metrics import METRICS, write_bytes
from ptbench.analysis.published import COLUMNS, LeftOut, PublishedValue
from ptbench.analysis.source import source_json
from ptbench.configuration.config import Config, CorpusFile, read_configuration
from ptbench.configuration.experiments import WORKFLOW, ExperimentFile, Paper, load_library
from ptbench.configuration.schemas import schemas
from ptbench.configuration.study import load_study
from ptbench.model.recipe import NAME_PATTERN, Recipe
from ptbench.report.costs import costs_of, groups
from ptbench.report.features import features_markdown

Schema = dict[str, Any]

# at the end of a page, because at its beginning it hides the title
NOTE = "<!-- Written by `uv run ptbench generate`; do not edit. -->\n"

CONFIG = """\
# config.yaml

What to run, and how. Every key can also be changed for one run, as in `--config seeds=1
frameworks=jax`; a list is written `'seeds=[1,2]'`. The order is: `config.yaml`, then every
`--configfile` in its turn, then `--config`; the last one that sets a key wins. A source that sets
`experiments` takes back an earlier `papers`, and the reverse; so do `seeds` and `repeats`.
"""

RECIPE = """\
# Recipe

A recipe is everything that defines a training run except framework, device count and seed. It
stands under `recipes:` in a file of [experiments](experiments.md), and starts from another recipe
with `extends: name`. A key that is not given has its default.

A variant is a recipe with other values of some keys: `zaremba-small+dropout=0.5+epochs=20`. Keys
whose value is the recipe's own are left out of the name and the others sorted, so a variant has
one name.
"""

EXPERIMENTS = """\
# Experiments YAML

Files in `workflow/experiments/` are our own; `workflow/papers/<document>/experiments.yaml` are
those of a document. Names of recipes are unique over all files, and so are those of experiments
and searches. What there is already is in the [catalogue](catalogue.md). The
[tutorial](../tutorial.md#a-search-of-your-own) has a search.
"""

CORPORA = """\
# Corpora

`workflow/corpora.yaml` defines the built-in corpora; `corpora:` in [config.yaml](config.md) adds
your own, or replaces a built-in one of the same name. `kind` says which of the tables below
holds, and for synthetic text `process` does.
"""

PAPER = """\
# A document's folder

`workflow/papers/<document>/` holds what is known of a document that is reproduced. `paper.yaml`
and [experiments.yaml](experiments.md) are required; the other files are read where they are
there. [Tutorial](../tutorial.md#a-paper-of-your-own) makes such a folder step by step.
"""

PUBLISHED = """\
## published.csv

One line for each printed number; the first line has the names of these columns. `framework`,
`note` and columns with a default may be empty. A bound is written `>3000` or `<130`.
"""

CLAIMS = """\
## claims.yaml

The document's findings, in its order. A row of ours is written `variant [framework] [devices]`;
without a framework it stands for every framework that ran it, without devices for one. [How
findings are judged](../reading.md#findings) says what the tests do.
"""

EXHIBITS = """\
## exhibits.yaml

The document's tables and figures, which the report draws again in their own shape, ours beside
the published. An exhibit's published numbers are those of `published.csv` that are located in it:
all words of their `locator` are in its `number`.
"""

LEFT_OUT = """\
## left_out.csv

Printed numbers that are set beside nothing, each with the reason. `*` stands for anything.
"""

METRIC = """\
# Metrics

Names for `metric:`, published numbers and findings, and the columns of the CSV files. A
perplexity is summarised by exp of the mean negative log-likelihood over seeds with its 95 % t
interval; times and rates by median and quartiles, of fewer than five seeds the range; sizes by
the largest.
"""

CATALOGUE = """\
# Catalogue

The experiments that there are, for `--config experiments=<name>`. A document's experiments are
run together by `--config papers=<document>`, and all of them by `--config experiments=all`; a
search is run only by its name, and with it its `-winners`. A cell is one run.
"""

PLAN = """\
# What the full study takes

What `uv run ptbench plan --gpus 32 slurm/reproduction.yaml` says before anything has run: every
experiment of every document, all five frameworks, on GPUs that all of them know. Hours are bounds
on the safe side, the time limits that jobs ask Slurm for; once runs have finished, or a run with
`budget=smoke` has, the same command tells by what they took.
"""

DECISIONS = """\
# Decisions

Half a page for each decision that a newcomer would question, with the alternative that was not
taken.
"""

COMMANDS = """\
# Commands of ptbench

Each is typed as `uv run ptbench <command>`. `analyse`, `answer`, `corpus`, `environments`,
`partial`, `propose`, `report`, `search`, `select` and `train` are called by the workflow's rules;
you will rarely type them.
"""


def generated(parser: ArgumentParser) -> dict[str, str]:
    """Return the text of every generated file, by its path in the project.

    Args:
        parser: the command line's grammar.
    """
    recipe = Recipe.model_json_schema()
    paper = [
        PAPER,
        models(Paper.model_json_schema(), "paper.yaml"),
        PUBLISHED,
        columns(PublishedValue.model_json_schema(), COLUMNS, value="number, bound or `diverges`"),
        LEFT_OUT,
        columns(
            LeftOut.model_json_schema(), [name for name in LeftOut.model_fields if name != "source"]
        ),
        CLAIMS,
        models(ClaimFile.model_json_schema(), "A file of findings", level=3),
        EXHIBITS,
        models(ExhibitFile.model_json_schema(), "A file of exhibits", level=3),
    ]
    pages = {
        "config": [CONFIG, config()],
        "recipe": [RECIPE, f"## Keys\n\n{keys(recipe, recipe)}"],
        "experiments": [EXPERIMENTS, experiments()],
        "corpora": [CORPORA, models(CorpusFile.model_json_schema(), "corpora.yaml")],
        "paper": paper,
        "metrics": [METRIC, metrics()],
        "catalogue": [CATALOGUE, catalogue()],
        "plan": [PLAN, plan()],
        "commands": [COMMANDS, commands(parser)],
    }
    return (
        {f"workflow/schemas/{name}": text for name, text in schemas().items()}
        | {"docs/features.md": features_markdown()}
        | {"workflow/ptbench/backends/source.json": source_json()}
        | {"docs/decisions/index.md": "\n".join([DECISIONS, decisions(), NOTE])}
        | {f"docs/manual/{name}.md": "\n".join([*parts, NOTE]) for name, parts in pages.items()}
    )


def table(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; lines that have no entry in a column have no entry at all."""
    header = list(header)
    every = [header, ["---"] * len(header), *lines]
    written = (
        " | ".join(cell.replace("|", r"\|").replace("<", "&lt;") for cell in e) for e in every
    )
    return "".join(f"| {line} |\n" for line in written)


def models(schema: Schema, title: str, level: int = 2) -> str:
    """Return a section for a model, and one for each model that it is made of."""
    parts = [part for part in schema.get("$defs", {}).values() if "properties" in part]
    sections = [section(part, schema, level) for part in parts]
    return "\n".join([section(schema, schema, level, title), *sections])


def section(model: Schema, root: Schema, level: int = 2, title: str = "") -> str:
    """Return a heading, what the model is, and the table of its keys.

    Args:
        root: the schema whose `$defs` the model refers to.
    """
    said = model.get("description", "").partition("\n\n")[0].replace("\n", " ")
    heading = f"{'#' * level} {title or heading_of(model)}"
    return "\n\n".join(filter(None, [heading, said, keys(model, root)]))


def columns(row: Schema, names: Iterable[str], **written: str) -> str:
    """Return the table of a CSV file's columns.

    Args:
        written: what columns hold that the file has in another form than the model.
    """
    shown = {name: row["properties"][name] for name in names}
    for name, words in written.items():
        shown[name] |= {"link": words}
    return keys(row | {"properties": shown}, row, "Column")


def heading_of(model: Schema) -> str:
    """Return a model's name; of one that a key chooses among others, that key."""
    chosen = [f"{k}: {v['const']}" for k, v in model["properties"].items() if "const" in v]
    return ", ".join(chosen) or str(model["title"])


def keys(model: Schema, root: Schema, first: str = "Key") -> str:
    """Return the table of a model's keys."""
    required = model.get("required", ())
    lines = [
        [
            f"`{name}`",
            key.get("description", ""),
            allowed(key, root),
            "required" if name in required else default(key.get("default")),
        ]
        for name, key in model["properties"].items()
    ]
    return table([first, "Meaning", "Value", "Default"], lines)


def default(value: Any) -> str:
    """Return a default as YAML has it, on one line."""
    return "those below" if isinstance(value, dict) and value else f"`{json.dumps(value)}`"


def allowed(key: Schema, root: Schema) -> str:
    """Return in words what a key may be."""
    match key:
        case {"link": link}:
            return str(link)
        case {"$ref": reference}:
            model = root["$defs"][reference.rpartition("/")[2]]
            if "properties" not in model:
                return allowed(model, root)
            heading = heading_of(model)
            return f"[{heading}](#{re.sub('[^a-z-]', '', heading.lower().replace(' ', '-'))})"
        case {"anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "number"}, *_]}:
            return "values"  # of a recipe's keys
        case {"anyOf": several} | {"oneOf": several}:
            return " or ".join(dict.fromkeys(allowed(each, root) for each in several))
        case {"enum": names} if names == list(METRICS):
            return "[metric](metrics.md)"
        case {"enum": values}:
            return ", ".join(f"`{value}`" for value in values)
        case {"const": value}:
            return f"`{value}`"
        case {"prefixItems": _}:
            return "`variant [framework] [devices]`"
        case {"type": "array", "items": items}:
            return f"list of {allowed(items, root)}"
        case {"additionalProperties": dict(values)}:
            return f"mapping of names to {allowed(values, root)}"
        case {"patternProperties": patterns}:
            [values] = patterns.values()
            return f"mapping of names to {allowed(values, root)}"
        case {"type": "integer" | "number" as kind}:
            return ("whole number" if kind == "integer" else "number") + bounds(key)
        case {"pattern": pattern} if pattern == NAME_PATTERN:
            return "name"
    names = {"null": "`null`", "boolean": "`true`, `false`", "string": "text", "object": "mapping"}
    return names.get(key.get("type", ""), "any value")


def bounds(key: Schema) -> str:
    """Return the bounds of a number, such as ` (at least 1 and below 10)`."""
    words = {
        "minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most",
        "exclusiveMaximum": "below",
    }  # fmt: skip
    found = [f"{word} {key[bound]:,.12g}" for bound, word in words.items() if bound in key]
    return f" ({' and '.join(found)})" if found else ""


def config() -> str:
    """Return the keys of config.yaml; corpora have a page of their own."""
    schema = Config.model_json_schema()
    schema["properties"]["corpora"] |= {
        "additionalProperties": {"link": "[definitions](corpora.md)"}
    }
    return "\n".join(
        [section(schema, schema, title="Keys"), section(schema["$defs"]["Prices"], schema)]
    )


def experiments() -> str:
    """Return the keys of a file of experiments; recipes have a page of their own."""
    schema = ExperimentFile.model_json_schema()
    schema["properties"]["recipes"] |= {"additionalProperties": {"link": "[recipes](recipe.md)"}}
    return models(schema, "A file")


def metrics() -> str:
    """Return the table of metrics."""
    lines = [
        [f"`{each.name}`", each.title, each.unit or "–", each.kind.value, each.better]
        for each in METRICS.values()
    ]
    return table(["Name", "What", "Unit", "Over seeds", "Better"], lines)


def plan() -> str:
    """Return what the full study takes by document, before any of its runs has finished."""
    file = WORKFLOW.parent / "slurm" / "reproduction.yaml"
    # whatever GPU is in the machine where this is written
    study = load_study(read_configuration([file], ["cuda_capability=8.0"]))
    estimator = Estimator(study, Path("nowhere"))
    everything = costs_of(study.cells, estimator)
    prices = everything.prices
    lines = [
        *(
            (group, costs_of([c for n in names for c in study.experiments[n].cells], estimator))
            for group, names in groups(study).items()
        ),
        ("**all, each run once**", everything),
    ]
    header = ["Document", "Runs", "GPU-hours", "Disk", "kWh", prices.currency]
    body = [
        [
            name,
            f"{len(costs.runs):,}",
            f"{costs.unit_hours:,.0f}",
            write_bytes(costs.disk_bytes),
            f"{costs.kilowatt_hours:,.0f}",
            f"{costs.money:,.0f}",
        ]
        for name, costs in lines
    ]
    rent, watts = prices.of("cuda")
    return (
        f"{table(header, body)}\n"
        f"A GPU is taken to cost {rent:g} {prices.currency} an hour and to use {watts:g} W. On 32 "
        f"GPUs without a gap, these hours are {everything.hours(32) / 24:,.0f} days. Disk is for "
        "the best parameters of every run; `keep_checkpoints: none` keeps none.\n"
    )


def catalogue() -> str:
    """Return a section for each document, and one for our own experiments."""
    library = load_library()
    study = load_study({"experiments": ["all"]})
    own = [n for n in library.experiments if not any(n in p for p in library.papers.values())]
    sections = {"Our own": own} | {f"`papers={paper}`": n for paper, n in library.papers.items()}
    found = {title: rows(names, study) for title, names in sections.items()}
    searched = load_study({"experiments": list(library.searches)})
    found["Searches"] = rows(searched.experiments, searched)
    return "\n".join(
        f"## {title}\n\n{table(['Experiment', 'What', 'Corpus', 'Cells'], lines)}"
        for title, lines in found.items()
    )


def rows(names: Iterable[str], study: Any) -> list[list[str]]:
    """Return a row for each experiment of a study."""
    planned = [study.experiments[name] for name in names]
    return [
        [
            f"`{each.name}`",
            each.definition.title,
            each.specifications[0].recipe.corpus_folder,
            f"{len(each.cells):,}",
        ]
        for each in planned
    ]


def decisions() -> str:
    """Return the list of the records of decisions, by their headings."""
    files = sorted((WORKFLOW.parent / "docs" / "decisions").glob("[0-9]*.md"))
    headings = [file.read_text(encoding="utf-8").partition("\n")[0] for file in files]
    titles = [heading.partition(". ")[2] for heading in headings]
    return "".join(
        f"{number}. [{title}]({file.name})\n"
        for number, (title, file) in enumerate(zip(titles, files, strict=True), start=1)
    )


def commands(parser: ArgumentParser) -> str:
    """Return a section for each command."""
    [subparsers] = [a for a in parser._actions if isinstance(a.choices, Mapping)]
    sections = []
    for name, command in sorted(subparsers.choices.items()):  # type: ignore[union-attr]
        options = [
            [
                ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.dest}`",
                action.help or "",
                ", ".join(f"`{choice}`" for choice in action.choices or ()),
                option_default(action),
            ]
            for action in command._actions
            if action.dest != "help"
        ]
        header = ["Option", "Meaning", "Choices", "Default"]
        sections.append(f"## {name}\n\n{command.description}\n\n{table(header, options)}")
    return "\n".join(sections)


def option_default(action: Any) -> str:
    """Return an option's default, or that it must be given."""
    if action.required and action.nargs != "*":
        return "required"
    value = action.default
    if value is None or value is False or value == []:
        return ""
    return f"`{' '.join(map(str, value)) if isinstance(value, list | tuple | dict) else value}`"
