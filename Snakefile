# ptbench: from the corpora to the report.
#
#   results/corpora/{corpus_folder}/corpus.json                        a prepared corpus
#   results/cells/{variant}/{framework}/devices-{devices}/seed-{seed}/metrics.json
#   results/experiments/{experiment}/analysis.json                     tables and figures beside it
#   results/report/index.html                                          the report
#   results/partial/index.html                                         the same on what is there (`partial`)
#
# Logs and benchmarks mirror these paths under results/logs and results/benchmarks.
from snakemake.utils import min_version

min_version("9.24")


include: "workflow/rules/common.smk"
include: "workflow/rules/corpus.smk"
include: "workflow/rules/training.smk"
include: "workflow/rules/analysis.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        "results/report/index.html",
        # by name, because Snakemake does not miss a file between two that are there
        [f"results/cells/{cell.path}/metrics.json" for cell in study.cells],


# Not rules: what these make, the rules merely use, so its age must not decide what is run again.
onstart:
    trains = set(workflow.dag_settings.targets) != {"partial"}
    if trains:
        or_exit(refuse_duplicates, Path.cwd())
    # `partial` has one of its own, for a study may be running on the other.
    or_exit(
        study.write, Path("results" if trains else "results/partial") / "study.json"
    )
    if trains and not USES_CONDA:
        shell(
            "python -m ptbench environments {study.frameworks} --accelerator {ACCELERATOR}"
            " --output results/environments"
        )


# Last, for Snakemake shows the whole of rule `all` after the report's job.
report_before = modified("results/report/index.html")


onsuccess:
    if modified("results/report/index.html") != report_before:
        print("The report is at results/report/index.html", flush=True)


# What failed, why, and the command that runs it alone.
onerror:
    again = command_without_targets(sys.argv, workflow.dag_settings.targets)
    shell(
        "python -m ptbench status --failed --snakemake-log {log:q} --again {again:q}"
    )
