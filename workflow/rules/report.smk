# The report on all experiments of the configuration.
rule report:
    input:
        expand(
            "results/experiments/{experiment}/analysis.json",
            experiment=study.experiments,
        ),
    output:
        "results/report/index.html",
    log:
        "results/logs/report.log",
    localrule: True
    conda:
        "../../envs/workflow.yaml"
    params:
        folder=subpath(output[0], parent=True),
        experiments=expand(
            "results/experiments/{experiment}", experiment=study.experiments
        ),
    shell:
        "python -m ptbench report {params.experiments:q} --output {params.folder:q}"
        " --log {log:q}"


# The report on what is there, with what is missing marked. It has no output, so it is made whenever it is
# asked for.
rule partial:
    log:
        "results/logs/partial.log",
    localrule: True
    conda:
        "../../envs/workflow.yaml"
    shell:
        "python -m ptbench partial --study results/partial/study.json --log {log:q}"
