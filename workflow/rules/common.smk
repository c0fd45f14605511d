# The validated study, and what several rules need of it. No logic: that is in workflow/ptbench.
import sys

from snakemake.exceptions import WorkflowError
from snakemake.settings.types import DeploymentMethod

from ptbench.configuration.loading import load_study
from ptbench.configuration.models import VARIANT_PATTERN
from ptbench.errors import ConfigurationError

try:
    study = load_study(config)
except ConfigurationError as error:
    raise WorkflowError(f"this configuration cannot be run:\n{error}")

CELL = "{variant}/{framework}/devices-{devices}/seed-{seed}"
ACCELERATOR = study.config.accelerator
USES_CONDA = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
# The workflow's own interpreter; the frameworks' are in their environments.
PYTHON = sys.executable


wildcard_constraints:
    variant=VARIANT_PATTERN,
    framework="[a-z]+",
    accelerator="cpu|cuda",
    devices="[1-9][0-9]*",
    seed="[0-9]+",
    corpus_folder="[a-z0-9][a-z0-9.-]*",
    experiment="[a-z0-9][a-z0-9.-]*",


# The configuration as merged from all its sources, kept beside the results.
rule config:
    output:
        "results/config.json",
    log:
        "results/logs/config.log",
    params:
        json=study.config.model_dump_json(),
    localrule: True
    shell:
        "{PYTHON:q} -m ptbench config --json {params.json:q} --output {output:q} > {log:q} 2>&1"
