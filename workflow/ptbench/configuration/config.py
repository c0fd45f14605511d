"""The configuration: its model, and reading it from files and the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from ptbench.backends import FRAMEWORKS, Framework
from ptbench.configuration.errors import known, parse, shown
from ptbench.configuration.experiments import WORKFLOW, Devices, Seed, Several, T
from ptbench.corpus.definitions import (
    CorpusDefinition,
    DownloadedCorpus,
    FolderCorpus,
    MirrorAddress,
)
from ptbench.errors import ConfigurationError
from ptbench.model.recipe import Accelerator, BudgetName, Keep, Model, Name
from ptbench.yaml import Located, merged, parse_yaml, read_mapping, shown_path

ALTERNATIVES = [
    ("experiments", "papers"), ("papers", "experiments"), ("seeds", "repeats"), ("repeats", "seeds")
]  # fmt: skip
Place = Callable[[str], str]  # where a key of the configuration was written, and the key


def as_list(value: Any, info: ValidationInfo) -> Any:
    """Return a list of a lone word or number, so that `--config experiments=demo` is enough.

    Other values are returned as they are, for pydantic to judge.

    Raises:
        ValueError: for several without brackets.
    """
    if isinstance(value, str) and "," in value:
        raise ValueError(
            f"{shown(value)} is not a list; write [{value}], on the command line "
            f"'{info.field_name}=[{value}]'"
        )
    return [value] if isinstance(value, str | int) and not isinstance(value, bool) else value


OneOrSeveral = Annotated[Several[T], BeforeValidator(as_list)]


class Prices(Model):
    """What device time costs, for estimates: on-demand prices of the first half of 2026.

    An H100 was rented for 2.5 to 4 USD an hour by specialised clouds, a core for 0.04 to 0.05.
    """

    currency: str = Field("USD", min_length=1, description="Of the prices.")
    gpu_hour: float = Field(3.0, ge=0, description="Rent of a GPU, its energy included.")
    core_hour: float = Field(0.05, ge=0, description="Rent of a CPU core, its energy included.")
    kilowatt_hour: float = Field(0.2, ge=0, description="Energy, for machines of one's own.")
    gpu_watts: float = Field(350.0, ge=0, description="Mean power of a GPU that trains [W].")
    core_watts: float = Field(6.0, ge=0, description="Mean power of a CPU core that trains [W].")

    def of(self, accelerator: Accelerator) -> tuple[float, float]:
        """Return rent an hour and power [W] of a GPU, or of a CPU core."""
        if accelerator == "cuda":
            return self.gpu_hour, self.gpu_watts
        return self.core_hour, self.core_watts


class Config(Model):
    """config.yaml, with what `--configfile` and `--config` change in it."""

    experiments: OneOrSeveral[Name] | None = Field(
        None,
        description="Experiments to run; all: every one there is; null: those of `papers`, or demo "
        "if that is null too.",
    )
    papers: OneOrSeveral[Name] | None = Field(
        None, description="Documents, folders of workflow/papers, whose experiments to run."
    )
    budget: BudgetName = Field(
        "full",
        description="full: train as the recipes say; quick: a few epochs on a part of the text; "
        "smoke: a few steps of everything, to see that it runs.",
    )
    corpus: Name | None = Field(
        None, description="Train every recipe on this corpus; null: on the recipe's own."
    )
    subset: Annotated[int, Field(ge=1)] | None = Field(
        None, description="First lines of every split to use [lines]; null: the recipe's own."
    )
    frameworks: OneOrSeveral[Framework] = Field(
        list(FRAMEWORKS), description="Frameworks to run, of those each experiment names."
    )
    seeds: OneOrSeveral[Seed] | None = Field(
        None, description="Seeds to run; null: each experiment's own, or those of `repeats`."
    )
    repeats: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="How often to run everything: 10 means the seeds 1 to 10."
    )
    devices: OneOrSeveral[Devices] | None = Field(
        None, description="Device counts to run; null: each experiment's own."
    )
    devices_per_node: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Devices that a run has on one node of a cluster, of which a run of more spans "
        "several, in the frameworks that can; null: all are on one node. A study on one machine "
        "runs as if it were null.",
    )
    accelerator: Accelerator = Field("cpu", description="Kind of device that trains.")
    accelerators: dict[Framework, Accelerator] = Field(
        {}, description="The same for single frameworks that differ, such as {mxnet: cpu}."
    )
    cuda_capability: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="CUDA compute capability of the GPUs that train, such as 9.0 of an H100, by "
        "which is known before a study begins what cannot run on them; null: that of the machine "
        "where Snakemake runs.",
    )
    threads: int = Field(
        1, ge=1, le=1024, description="CPU threads of a cell, shared by its replicas."
    )
    profile: bool = Field(
        False,
        description="Profile every row of the experiments too: phases of a step, operators, "
        "prediction, loading.",
    )
    checkpoint_minutes: float = Field(
        10, gt=0, description="Time between checkpoints within an epoch [minutes]."
    )
    keep_checkpoints: Keep = Field(
        "best",
        description="Parameters to keep of a finished cell: none; the best; or all, its last "
        "checkpoint too.",
    )
    max_memory: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Most main memory that a cell's Slurm job asks for [MB]; null: no limit."
    )
    max_runtime: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Longest time limit of a cell's Slurm job [minutes]; null: no limit."
    )
    equivalence_margin: float = Field(
        0.02, gt=0, lt=1, description="Largest difference of mean nll that does not matter [nats]."
    )
    prices: Prices = Field(Prices(), description="What device time costs, for `ptbench plan`.")
    corpora: dict[Name, CorpusDefinition] = Field(
        {}, description="Corpora of your own by name, or other definitions of the built-in ones."
    )
    mirrors: dict[Name, MirrorAddress] = Field(
        {},
        description="Where else to look first for a downloaded corpus, by name: an http:, https: "
        "or file: address of a folder that holds its three files. They are verified all the same.",
    )

    @model_validator(mode="after")
    def _seeds_once(self) -> Self:
        if self.seeds is not None and self.repeats is not None:
            raise ValueError("seeds and repeats exclude each other; set one of them to null")
        return self

    def accelerator_of(self, framework: Framework) -> Accelerator:
        """Return the kind of device that a framework trains on."""
        return self.accelerators.get(framework, self.accelerator)

    def nodes(self, devices: int) -> int:
        """Return how many nodes of a cluster a run of so many devices spans.

        Raises:
            ValueError: if they do not fill them.
        """
        each = min(self.devices_per_node or devices, devices)
        if devices % each:
            raise ValueError(f"devices={devices} do not fill nodes of devices_per_node={each}")
        return devices // each


class CorpusFile(Model):
    """`workflow/corpora.yaml`: the built-in corpora."""

    corpora: dict[Name, CorpusDefinition] = Field(description="Corpora by name.")


def read_configuration(files: Iterable[Path], values: Sequence[str] = ()) -> Located:
    """Return the configuration that several files and the command line make together.

    Later sources win over earlier ones, key by key. One that sets a key of `ALTERNATIVES` takes
    back the other: `--config experiments=demo` runs the demo instead of a file's `papers`.

    Args:
        files: in their order.
        values: of `--config`, as `key=value`; they come last.

    Raises:
        ConfigurationError: with file and line, if one cannot be read.
    """
    sources = [read_mapping(file) for file in files]
    entries = [entry.partition("=") for entry in values]
    given = {key: parse_yaml(text, f"--config {key}") for key, _, text in entries}
    sources.append(Located(given, dict.fromkeys(given, "--config")))
    result = Located()
    for source in sources:
        result = merged(result, source)
        for one, other in ALTERNATIVES:
            if source.get(one) is not None and source.get(other) is None:
                result.pop(other, None)
    return result


def load_corpora(settings: Config, place: Place) -> dict[str, CorpusDefinition]:
    """Return all corpora by name, with the configuration's definitions and mirrors.

    Raises:
        ConfigurationError: if a mirror is of no corpus that is downloaded.
    """
    file = WORKFLOW / "corpora.yaml"
    corpora = {
        **parse(CorpusFile, read_mapping(file), shown_path(file)).corpora, **settings.corpora
    }  # fmt: skip
    for name, address in settings.mirrors.items():
        definition = corpora[known(name, corpora, place("mirrors"), "corpus")]
        if not isinstance(definition, DownloadedCorpus):
            kind = "a folder" if isinstance(definition, FolderCorpus) else "generated"
            raise ConfigurationError(
                f"{place('mirrors')}.{name}: {name} is {kind}, so it has no mirrors"
            )
        corpora[name] = definition.with_first(address)
    return corpora
