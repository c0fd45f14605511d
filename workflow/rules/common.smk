# The validated study, and what several rules need of it. No logic: that is in workflow/ptbench.
import shlex
import signal
import sys
from pathlib import Path

from snakemake.logging import logger
from snakemake.settings.types import DeploymentMethod

from ptbench import environments
from ptbench.configuration.config import read_configuration
from ptbench.configuration.study import load_study
from ptbench.errors import or_exit
from ptbench.report.commands import command_without_targets
from ptbench.report.dry_run import Summary
from ptbench.slurm import ran_out, refuse_duplicates, refuse_paths

# Snakemake's own reader knows YAML 1.1 and not the lines of keys, so files and --config are read again,
# in its order: config.yaml, every --configfile, --config.
files = workflow.overwrite_configfiles
if Path("config.yaml").exists() or not files:
    if not workflow.config_settings.replace_workflow_config:
        files = ["config.yaml", *files]
study = or_exit(
    load_study,
    or_exit(
        read_configuration, map(Path, files), workflow.config_settings.config_args or ()
    ),
)

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


# A text as a shell command has it, where it is no parameter because a change of it re-runs nothing.
def literal(text):
    return shlex.quote(text).replace("{", "{{").replace("}", "}}")


# A dry run has one core unless it is told more, and would show one thread of every job on a cluster.
if workflow.output_settings.dryrun and workflow.nodes is not None:
    workflow.global_resources["_cores"] = sys.maxsize


# Cores that a cell claims: all of this machine's if its recipe says that it runs alone, or if it trains on
# this machine's GPUs, which are not shared out among cells; a cluster does that. Otherwise one for each
# replica on the CPU at least.
def cores_of(path, devices):
    here = workflow.nodes is None and not workflow.remote_exec
    if here and (ACCELERATOR == "cuda" or study.recipe(path).alone):
        return workflow.cores
    return max(study.config.threads, devices)


# Whether a cell has the result that it is to have, and nobody asked for another one.
def is_trained(path):
    settings, output = workflow.dag_settings, f"results/cells/{path}/metrics.json"
    forced = settings.forceall or not {"train", output}.isdisjoint(settings.forcerun)
    forced = forced or (settings.forcetargets and output in settings.targets)
    return not forced and study.is_trained(path)


# What a cell is trained with: its corpus, and its framework's environment, which only has to be there.
# With conda, Snakemake makes the environment. One function, because Snakemake is slow to call many.
def inputs_of(wildcards, path):
    corpus = or_exit(study.corpus_of_cell, path)
    inputs = {"corpus": f"results/corpora/{corpus}/corpus.json"}
    if not USES_CONDA:
        framework, trained = wildcards.framework, lambda: is_trained(path)
        waits = or_exit(environments.to_wait_for, framework, ACCELERATOR, trained)
        inputs["environment"] = ancient(waits)
    return inputs


# What runs this study, whatever its targets are now.
def command():
    return command_without_targets(sys.argv, workflow.dag_settings.targets)


# What a cell's job asks for: more of what it has run out of.
def asked(estimate, wildcards, input, scarce):
    path = CELL.format(**wildcards)
    return estimate(path, input.corpus, 1 + ran_out[path, scarce])


def modified(file):
    return Path(file).stat().st_mtime_ns if Path(file).exists() else None


# Before a time limit Slurm sends USR1 to every process of the job's step, so to Snakemake too, which it
# would end. It is meant for the trainer, which handles it; a child process starts with what its parent
# ignores.
if workflow.remote_exec:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


# A dry run of thousands of jobs is summed up, unless how to print it was asked for.
if workflow.output_settings.dryrun and not workflow.output_settings.quiet:
    logger.addFilter(
        Summary({name: each.cells for name, each in study.experiments.items()})
    )


# Anything between two slashes. The rules' inputs refuse what cannot be, in a sentence.
wildcard_constraints:
    variant="[^/]+",
    framework="[^/]+",
    devices="[^/]+",
    seed="[^/]+",
    corpus_folder="[^/]+",
    experiment="[^/]+",
    paper="[^/]+",
