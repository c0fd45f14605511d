"""The metadata of an archive, as a Workflow Run RO-Crate: what ran, on what, when, with what.

Written with the library `rocrate`, after https://w3id.org/ro/wfrun. Checksums are not here but in
the archive's manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ptbench.analysis.metrics import METRICS
from ptbench.configuration.study import Study
from ptbench.report.formatting import framework_name
from ptbench.training.records import Metrics, read_metrics

METADATA = "ro-crate-metadata.json"
WORKFLOW = "Snakefile"
LICENSE = "https://spdx.org/licenses/MIT"
PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": "Process Run Crate",
    "https://w3id.org/ro/wfrun/workflow/0.5": "Workflow Run Crate",
    "https://w3id.org/ro/wfrun/provenance/0.5": "Provenance Run Crate",
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": "Workflow RO-Crate",
}
BIOSCHEMAS = "https://bioschemas.org/profiles/ComputationalWorkflow/1.0-RELEASE"
FORMATS = {
    ".csv": "text/csv", ".json": "application/json", ".md": "text/markdown", ".txt": "text/plain",
    ".yaml": "application/yaml",
}  # fmt: skip

# Files and folders of every archive; those of studies that have none of a kind are left out.
PLAN = "results/study.json"
REPORT = "results/report/"
MADE = {
    REPORT: "The report; index.html is its first page.",
    "results/experiments/": "Tables, figures and verdicts of each experiment.",
    "results/papers/": "Answers to the documents that the study reproduces.",
    "results/searches/": "Searches: their trials, and what they found.",
    "results/profiles/": "What the time of a training step is made of.",
}
OTHERS = {
    PLAN: "The study as it was planned: the whole configuration, resolved.",
    "workflow/": "The workflow's rules and package, and the documents' numbers and findings.",
    "envs/": "The pinned environment of each framework.",
    "README.md": "What the workflow is, and how to run it.",
    "manifest-sha256.txt": "The SHA-256 of every other file, as sha256sum reads it.",
}


class Run(NamedTuple):
    """A run of an archive."""

    folder: str  # relative to the archive
    metrics: Metrics
    facts: dict[str, Any]  # of provenance.json

    @property
    def release(self) -> str:
        """Return the version of its framework."""
        return str(self.facts.get("framework_version") or "of unknown version")

    def properties(self) -> dict[str, Any]:
        """Return what is said of it: when, and how it ended."""
        cell, failed = self.metrics.cell, self.metrics.status != "ok"
        test = self.metrics.test
        perplexity = METRICS["test_perplexity"].write(test.perplexity) if test else "unknown"
        found = {
            "name": f"{cell.variant} in {framework_name(cell.framework)}, "
            f"devices {cell.devices}, seed {cell.seed}",
            "description": f"It ended {self.metrics.status}, with test perplexity {perplexity}.",
            "actionStatus": f"http://schema.org/{'Failed' if failed else 'Completed'}ActionStatus",
            "startTime": self.facts.get("started"),
            "endTime": self.facts.get("finished"),
            "error": self.metrics.reason if failed else None,
        }
        return {key: value for key, value in found.items() if value is not None}


def runs_in(folder: Path) -> Iterator[Run]:
    """Yield the runs of an unpacked archive."""
    for file in sorted((folder / "results" / "cells").glob("*/*/*/*/metrics.json")):
        facts = json.loads(file.with_name("provenance.json").read_bytes())
        yield Run(file.parent.relative_to(folder).as_posix(), read_metrics(file), facts)


def metadata(folder: Path, study: Study, version: str) -> str:
    """Return the text of ro-crate-metadata.json.

    Args:
        folder: the files of the archive.
        study: what was run.
        version: of the workflow's files.
    """
    # The library takes 0.4 s to import.
    from rocrate.model.contextentity import ContextEntity
    from rocrate.rocrate import ROCrate

    crate = ROCrate(version="1.1")
    runs = list(runs_in(folder))

    def about(identifier: str, **properties: Any) -> Any:
        return crate.add(ContextEntity(crate, identifier, properties=properties))

    def part(path: str, **properties: Any) -> Any:
        if path.endswith("/"):
            return crate.add_dataset(dest_path=path, properties={"name": path, **properties})
        kind = {"encodingFormat": FORMATS[Path(path).suffix]}
        return crate.add_file(dest_path=path, properties={"name": path, **kind, **properties})

    titles = "; ".join(each.definition.title for each in study.experiments.values())
    crate.name = f"ptbench: {titles}"
    crate.description = (
        f"{len(runs)} training runs of language models, the report on them, and the workflow that "
        "made both. Without the corpora and the trained parameters."
    )
    crate.license = about(LICENSE, **{"@type": "CreativeWork", "name": "MIT License"})
    crate.root_dataset["conformsTo"] = [
        about(address, **{"@type": "CreativeWork"}, name=name, version=address.rpartition("/")[2])
        for address, name in PROFILES.items()
    ]
    parts = {
        path: part(path, description=words)
        for path, words in {**MADE, **OTHERS}.items()
        if not path.endswith("/") or (folder / path).is_dir()
    }
    parts["README.md"]["about"] = crate.root_dataset
    corpora = {
        file.parent.name: part(
            file.relative_to(folder).as_posix(),
            description=f"Facts and checksums of the corpus {file.parent.name}, not its text.",
        )
        for file in sorted((folder / "results" / "corpora").glob("*/corpus.json"))
    }

    workflow = crate.add_workflow(
        dest_path=WORKFLOW,
        main=True,
        lang="snakemake",
        properties={
            "name": "ptbench",
            "version": version,
            "license": LICENSE,
            "encodingFormat": "text/plain",
        },
    )
    workflow["conformsTo"] = {"@id": BIOSCHEMAS}
    for what, path, kind in (("input", PLAN, "File"), ("output", REPORT, "Dataset")):
        properties = {"workExample": {"@id": path}}
        slot = crate.add_formal_parameter(what, kind, f"#{what}", properties=properties)
        parts[path]["exampleOfWork"] = workflow[what] = slot

    tools = {
        (run.metrics.cell.framework, run.release): about(
            f"#{run.metrics.cell.framework}-{run.release}",
            **{"@type": "SoftwareApplication"},
            name=f"ptbench train, in {framework_name(run.metrics.cell.framework)} {run.release}",
            softwareVersion=run.release,
        )
        for run in runs
    }
    workflow["hasPart"] = list(tools.values())
    actions = [
        crate.add_action(
            tools[run.metrics.cell.framework, run.release],
            identifier=f"#{run.metrics.cell.path}",
            object=[
                part(f"{run.folder}/recipe.yaml"),
                corpora[study.corpus_of_cell(run.metrics.cell.path)],
            ],
            result=[
                part(f"{run.folder}/{name}")
                for name in ("metrics.json", "history.csv", "provenance.json")
            ],
            properties={"@type": "CreateAction", **run.properties()},
        )
        for run in runs
    ]
    begun = [run.facts["started"] for run in runs if run.facts.get("started")]
    ended = [run.facts["finished"] for run in runs if run.facts.get("finished")]
    whole = {
        "@type": "CreateAction",
        "name": "The study",
        "description": "All runs, and the report on them.",
        "actionStatus": "http://schema.org/CompletedActionStatus",
        **({"startTime": min(begun), "endTime": max(ended)} if begun and ended else {}),
    }
    study_action = crate.add_action(
        workflow,
        identifier="#study",
        object=parts[PLAN],
        result=[parts[path] for path in MADE if path in parts],
        properties=whole,
    )
    crate.root_dataset["mentions"] = [study_action, *actions]
    crate.datePublished = max(ended, default="1980-01-01T00:00:00+00:00")
    return json.dumps(crate.metadata.generate(), indent=1, ensure_ascii=False) + "\n"
