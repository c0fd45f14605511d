# ptbench: from the corpora to the report.
#
#   results/environments/{framework}-{accelerator}/lock-{digest}       a framework's environment
#   results/corpora/{corpus_folder}/corpus.json                        a prepared corpus
#   results/cells/{variant}/{framework}/devices-{devices}/seed-{seed}/metrics.json
#   results/profiles/{variant}/{framework}/devices-{devices}/profile.json   (`profiles`: all of them)
#   results/searches/{search}/generation-{number}.json                 trials that a search proposes
#   results/searches/{search}/selection.json                           those that go on in full
#   results/experiments/{experiment}/analysis.json                     tables and figures beside it
#   results/report/experiments/{experiment}.html                       its page of the report
#   results/papers/{paper}/answers.json                                findings and exhibits of a document
#   results/report/index.html                                          the report
#   results/partial/index.html                                         the same on what is there (`partial`)
#   results/archive/*.crate.zip                                        all of it, to be shared (`archive`)
#
# Logs and benchmarks mirror these paths under results/logs and results/benchmarks.
from snakemake.utils import min_version

min_version("9.24")


include: "workflow/rules/common.smk"
include: "workflow/rules/environments.smk"
include: "workflow/rules/corpus.smk"
include: "workflow/rules/search.smk"
include: "workflow/rules/training.smk"
include: "workflow/rules/profile.smk"
include: "workflow/rules/analysis.smk"
include: "workflow/rules/papers.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        everything,


include: "workflow/rules/archive.smk"


# Not a rule, because it must be new with every run: what the run is of, and, by its age, when it began.
# `ptbench status` and the trainers read it; no rule does. `partial` only looks at a study, which may
# be running.
onstart:
    from ptbench.report.live import name_trials

    take_sigterm()
    name_trials(study.names_of_trials)
    for sentence in study.obstacles:
        logger.warning(sentence)
    if set(workflow.dag_settings.targets) != {"partial"}:
        if not workflow.local_exec:
            or_exit(refuse_paths, sys.executable, str(Path.cwd()))
        or_exit(refuse_duplicates, Path.cwd())
        or_exit(study.write, Path("results/study.json"), replaced, command())


if workflow.output_settings.dryrun and not silent:
    print(
        *study.obstacles, sep="\n", end="\n" if study.obstacles else "", file=sys.stderr
    )
    print(
        f"What this takes in hours, disk and money: {plan_command(files, values)}",
        file=sys.stderr,
    )


# At the very end: Snakemake prints all of rule `all` after the report is made.
report_before = modified("results/report/index.html")


onsuccess:
    from ptbench.report.closing import print_results
    from ptbench.report.live import finish

    finish(logger)
    if modified("results/report/index.html") != report_before and not silent:
        print_results(
            [Path("results/experiments") / name for name in study.experiments],
            Path("results/report/index.html"),
            [Path("results/searches") / name for name in study.searches],
            [Path("results/papers") / name for name in study.answered()],
        )


# Says what failed, why, and the command that runs it alone.
onerror:
    from ptbench.report.live import finish

    finish(logger)
    again = command()
    shell(
        "python -m ptbench status --failed --snakemake-log {log:q} --again {again:q}"
    )
