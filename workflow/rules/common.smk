# The validated study, and what several rules need of it. No logic: that is in workflow/ptbench.
import shlex
import signal
import sys
from pathlib import Path

from snakemake.settings.types import DeploymentMethod

from ptbench.configuration.loading import load_study, read_configuration
from ptbench.errors import or_exit
from ptbench.report.commands import command_without_targets
from ptbench.slurm import refuse_duplicates

# Read twice: our reader's errors name the line, and Snakemake refuses a file that is empty.
own = Path("config.yaml")
needed = own.exists() or not workflow.overwrite_configfiles
if needed and or_exit(read_configuration, own):

    configfile: "config.yaml"


changed = workflow.config_settings.overwrite_config
study = or_exit(load_study, config, "configuration" if changed else own.name)

CELL = "{variant}/{framework}/devices-{devices}/seed-{seed}"
ACCELERATOR = study.config.accelerator
USES_CONDA = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method

# Rules say `python`: the one that runs Snakemake, unless conda brings another. Training runs in its
# framework's environment. The user's own settings of Python are overridden: compiled bytecode is kept,
# because frameworks then start in half the time; MXNet cannot be imported without docstrings (-OO);
# warnings are no errors; and the packages in the user's home folder are nobody's lock.
PYTHON_SETTINGS = (
    "PYTHONPATH=workflow PYTHONDONTWRITEBYTECODE= PYTHONOPTIMIZE= PYTHONWARNINGS="
    " PYTHONNOUSERSITE=1"
)
if USES_CONDA:
    FRAMEWORK_PYTHON = "python"
    shell.prefix(f"export {PYTHON_SETTINGS}; ")
else:
    FRAMEWORK_PYTHON = (
        f"results/environments/{{wildcards.framework}}-{ACCELERATOR}/bin/python"
    )
    folder = shlex.quote(str(Path(sys.executable).parent))
    shell.prefix(f"export {PYTHON_SETTINGS} PATH={folder}:$PATH; ")


# Cores that a cell claims: a replica on the CPU needs one, and a cell on this machine's GPUs all, for
# the GPUs are not shared out among cells. A cluster shares them out.
def cell_threads(devices):
    if ACCELERATOR == "cuda" and workflow.local_exec and not workflow.remote_exec:
        return workflow.cores
    return max(study.config.threads, devices)


def modified(file):
    return Path(file).stat().st_mtime_ns if Path(file).exists() else None


# Before a time limit Slurm sends USR1 to every process of the job's step, so to Snakemake too, whom it
# would end. It is for the cell, which handles it; what Snakemake ignores, its children start out with.
if workflow.remote_exec:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


# Whatever is between two slashes; what cannot be is refused in a sentence by the rules' inputs.
wildcard_constraints:
    variant="[^/]+",
    framework="[^/]+",
    devices="[^/]+",
    seed="[^/]+",
    corpus_folder="[^/]+",
    experiment="[^/]+",
