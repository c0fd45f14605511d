# The validated study, and what several rules need of it. No logic: that is in workflow/ptbench.
import inspect
import shlex
import sys
from pathlib import Path

from snakemake.cli import get_argument_parser
from snakemake.logging import logger
from snakemake.settings.types import DeploymentMethod

from ptbench import environments
from ptbench.configuration.config import read_configuration
from ptbench.configuration.specification import parse_cell_path
from ptbench.configuration.start import pass_on_signals, take_sigterm
from ptbench.configuration.study import load_study, read_study
from ptbench.errors import or_exit
from ptbench.report.commands import command_without_targets, plan_command
from ptbench.report.dry_run import Summary
from ptbench.slurm import ran_out, refuse_duplicates, refuse_paths
from ptbench.training.attempts import has_failed

project = Path(workflow.basedir).resolve()
if Path.cwd().resolve() != project:
    sys.exit(f"ptbench: give this command in {project}, not in {Path.cwd()}")

# Snakemake's own reader knows YAML 1.1 and not the lines of keys, so files and --config are read again,
# in its order: config.yaml, every --configfile, --config. A job on a cluster trains what was planned
# when its run began, whatever has been edited since.
files = workflow.overwrite_configfiles
if Path("config.yaml").exists() or not files:
    if not workflow.config_settings.replace_workflow_config:
        files = ["config.yaml", *files]
values = workflow.config_settings.config_args or ()
if workflow.remote_exec:
    study = or_exit(read_study, Path("results/study.json"))
else:
    configuration = or_exit(read_configuration, map(Path, files), values)
    study = or_exit(load_study, configuration, on_cluster=workflow.nodes is not None)
    workflow.config_settings.configfiles = []  # Snakemake would read them in every job

CELL = "{variant}/{framework}/devices-{devices}/seed-{seed}"
USES_CONDA = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method

# Rules say `python`: the one that runs Snakemake, unless conda brings another. Training runs in its
# framework's environment. The user's own settings of Python are overridden: compiled bytecode is kept,
# because frameworks then start in half the time; MXNet cannot be imported without docstrings (-OO);
# development mode and the tracing of memory are slow; warnings are no errors; and the packages in the
# user's home folder are nobody's lock.
PYTHON_SETTINGS = (
    "PYTHONPATH=workflow PYTHONDONTWRITEBYTECODE= PYTHONOPTIMIZE= PYTHONWARNINGS= PYTHONDEVMODE="
    " PYTHONMALLOC= PYTHONTRACEMALLOC= PYTHONNOUSERSITE=1"
)


if USES_CONDA:
    FRAMEWORK_PYTHON = "python"
    shell.prefix(f"export {PYTHON_SETTINGS}; ")
else:
    FRAMEWORK_PYTHON = "{resources.python}"
    folder = shlex.quote(str(Path(sys.executable).parent))
    shell.prefix(f"export {PYTHON_SETTINGS} PATH={folder}:$PATH; ")


# A text as a shell command has it, where it is no parameter because a change of it re-runs nothing.
def literal(text):
    return shlex.quote(text).replace("{", "{{").replace("}", "}}")


# Snakemake asks what parameters a function has whenever it calls it, which is slow unless it was noted.
def noted(function):
    function.__signature__ = inspect.signature(function)
    return function


# A dry run has one core unless it is told more, and would show one thread of every job on a cluster.
if workflow.output_settings.dryrun and workflow.nodes is not None:
    workflow.global_resources["_cores"] = sys.maxsize


# Nodes that a cell's devices are on.
@noted
def nodes_of(wildcards):
    return study.config.nodes(int(wildcards.devices))


# A job's step has all that its job has on its node. The plugin would ask for `gpu` again, for all nodes.
if workflow.remote_exec:
    for asked in workflow.resource_settings.overwrite_resources.values():
        if "gpu" in asked:
            asked["gpu"] = 0


# Cores that a cell claims on each of its nodes: all of this machine's if its recipe says that it runs
# alone, or if it trains on this machine's GPUs, which are not shared out among cells; a cluster does that.
# Otherwise one for each replica on the CPU at least.
@noted
def cores_of(wildcards):
    here = workflow.nodes is None and not workflow.remote_exec
    on_gpus = study.config.accelerator_of(wildcards.framework) == "cuda"
    if here and (on_gpus or study.recipe(CELL.format(**wildcards)).alone):
        return workflow.cores
    threads = max(study.config.threads, int(wildcards.devices))
    return -(-threads // nodes_of(wildcards))


# The Python of a cell's framework. A resource and no parameter, because where it is is no reason to train
# again.
@noted
def python_of(wildcards):
    accelerator = study.config.accelerator_of(wildcards.framework)
    return f"results/environments/{wildcards.framework}-{accelerator}/bin/python"


# How many times as much a job asks for: more of what it has run out of.
def times(output, what):
    return 1 + ran_out[output, what]


# What a cell's job asks for.
@noted
def memory_of(wildcards, input):
    path = CELL.format(**wildcards)
    output = f"results/cells/{path}/metrics.json"
    return study.memory_megabytes(path, input.corpus, times(output, "memory"))


@noted
def runtime_of(wildcards, input):
    path = CELL.format(**wildcards)
    output = f"results/cells/{path}/metrics.json"
    return study.runtime_minutes(path, input.corpus, times(output, "time"))


# Of a variant that a search has yet to find, Snakemake asks again when its file is there. A parameter
# that is made from inputs is not recorded: whether a result counts is decided by `study.result` alone.
@noted
def specification_of(wildcards, input):
    return study.text(wildcards.variant, wildcards.framework)


# Whether somebody asked for an output to be made again.
def is_forced(rule, output):
    settings = workflow.dag_settings
    forced = settings.forceall or not {rule, output}.isdisjoint(settings.forcerun)
    return forced or (settings.forcetargets and output in settings.targets)


replaced = []  # cells whose result is there and does not count


# Whether a cell has the result that it is to have, and nobody asked for another one. Snakemake would
# keep a file that is there, though it cannot be read or is of another specification.
def is_trained(path):
    output = f"results/cells/{path}/metrics.json"
    if is_forced("train", output):
        return False
    result = study.result(path, output)
    if result == "other" and path not in replaced:
        replaced.append(path)
        workflow.dag.forcefiles.add(output)
    return result == "counts"


# What a cell is trained with: its corpus, and its framework's environment, which only has to be there.
# With conda, Snakemake makes the environment, and a job on a cluster begins with it. A cell that is
# trained waits for nothing: if a file that it was made with is newer, or gone, it is still its result.
# A cell of a search waits for what says its recipe, which may become another one.
@noted
def inputs_of(wildcards):
    path = CELL.format(**wildcards)
    corpus = f"results/corpora/{or_exit(study.corpus_of_cell, path)}/corpus.json"
    trained = not workflow.remote_exec and is_trained(path)
    found = study.found_in(wildcards.variant)
    if trained and not found:
        return {}
    # If the search finds the same recipe again, the result that is there is still the cell's.
    output = f"results/cells/{path}/metrics.json"
    if (
        found
        and modified(output)
        and not is_forced("train", output)
        and path not in replaced
    ):
        replaced.append(path)
    inputs = {"found": found} if found else {}
    inputs["corpus"] = ancient(corpus) if trained else corpus
    if not USES_CONDA and not workflow.remote_exec:
        waits = or_exit(
            environments.to_wait_for,
            wildcards.framework,
            study.config.accelerator_of(wildcards.framework),
        )
        inputs["environment"] = ancient(waits)
    return inputs


# A profile is of a variant in a framework, whatever the seed. As of cells, Snakemake would keep one of
# another specification.
@noted
def profiled_cell(wildcards):
    return CELL.format(**wildcards, seed=1)


def profile_of(wildcards):
    row = profiled_cell(wildcards).rpartition("/")[0]
    return f"results/profiles/{row}/profile.json"


@noted
def profiled_corpus(wildcards):
    path = profiled_cell(wildcards)
    corpus = or_exit(study.corpus_of_cell, path)
    output = profile_of(wildcards)
    if not workflow.remote_exec and study.result(path, output) == "other":
        workflow.dag.forcefiles.add(output)
    return f"results/corpora/{corpus}/corpus.json"


@noted
def profiled_environment(wildcards):
    if USES_CONDA or workflow.remote_exec:
        return []
    return ancient(
        or_exit(
            environments.to_wait_for,
            wildcards.framework,
            study.config.accelerator_of(wildcards.framework),
        )
    )


# It has this machine to itself.
@noted
def cores_of_profile(wildcards):
    here = workflow.nodes is None and not workflow.remote_exec
    threads = max(study.config.threads, int(wildcards.devices))
    return workflow.cores if here else -(-threads // nodes_of(wildcards))


# What its job asks for: the memory that a cell does, and 30 minutes.
@noted
def memory_of_profile(wildcards, input):
    again = times(profile_of(wildcards), "memory")
    return study.memory_megabytes(profiled_cell(wildcards), input.corpus, again)


@noted
def runtime_of_profile(wildcards):
    asked = 30 * times(profile_of(wildcards), "time")
    return min(asked, study.config.max_runtime or asked)


# Whether a run is a trial that has failed, which is a result of its search: it is the worst there is.
# It is trained again if its file is asked for by name.
def is_lost(cell):
    return (
        cell in study.trials
        and not is_forced("train", f"results/cells/{cell}/metrics.json")
        and has_failed(Path(f"results/attempts/{cell}"), study.fingerprint(cell))
    )


# The results of runs, without trials that have failed.
def results_of(cells):
    return [f"results/cells/{cell}/metrics.json" for cell in cells if not is_lost(cell)]


# The profiles of an experiment, or of all, without those of trials that have failed.
def profiles_of(experiment=None):
    lost = {cell.rpartition("/")[0] for cell in study.trials if is_lost(cell)}
    rows = study.profiles(experiment)
    return [f"results/profiles/{row}/profile.json" for row in rows if row not in lost]


# Snakemake would keep a file that a search wrote when it was another one, if nothing it waits for is
# newer and Snakemake does not know what it was made with.
def force_unless_answered(file):
    if Path(file).exists() and not study.is_answered(file):
        workflow.dag.forcefiles.add(file)


# What a generation waits for: all trials before it that have not failed, and what says their points,
# though all may have failed. A generation that has been proposed stays.
@noted
def inputs_of_generation(wildcards):
    name, number = wildcards.search, int(wildcards.number)
    or_exit(study.question, name, number)
    search = study.search(name)
    output = search.generation(number)
    if study.is_answered(output) and not is_forced("propose", output):
        return {}
    force_unless_answered(output)
    question = search.question(number)
    inputs = {"trials": results_of(question.told.values()), "before": question.files}
    if search.definition.method == "gp" and not USES_CONDA:
        accelerator = study.config.accelerator_of("pytorch")
        waits = or_exit(environments.to_wait_for, "pytorch", accelerator)
        inputs["environment"] = ancient(waits)
    return inputs


# What a selection is made from: all trials that have not failed, and what says their points.
@noted
def inputs_of_selection(wildcards):
    search = or_exit(study.search, wildcards.search)
    force_unless_answered(search.selection)
    return {"trials": results_of(search.own_trials), "points": search.contest.files}


# What runs this study, whatever its targets are now.
def command():
    return command_without_targets(sys.argv, get_argument_parser().parse_args)


def modified(file):
    return Path(file).stat().st_mtime_ns if Path(file).exists() else None


# Slurm signals a job's step before a time limit, and when it cancels the job. The trainer must get it.
if workflow.remote_exec:
    pass_on_signals()


# Whether only failures are to be printed, as in `ptbench.report.live`.
silent = bool({"all", "progress"} & set(map(str, workflow.output_settings.quiet or ())))


# A dry run of thousands of jobs is summed up, unless how to print it was asked for.
if workflow.output_settings.dryrun and not workflow.output_settings.quiet:
    experiments = {name: each.cells for name, each in study.experiments.items()}
    logger.addFilter(Summary(workflow, experiments))


# Anything between two slashes. The rules' inputs refuse what cannot be, in a sentence.
wildcard_constraints:
    variant="[^/]+",
    framework="[^/]+",
    devices="[^/]+",
    seed="[^/]+",
    corpus_folder="[^/]+",
    experiment="[^/]+",
    paper="[^/]+",
    search="[^/]+",


# What the whole study makes. A function, because a list of ten thousand files takes half a second to
# parse.
def everything(wildcards):
    return [
        "results/report/index.html",
        # by name, because Snakemake does not miss a file between two that are there
        *results_of(cell.path for cell in study.runnable(study.cells)),
        *(profiles_of() if study.config.profile else []),
    ]
