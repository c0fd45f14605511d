# The report on all experiments of the configuration.
rule report:
    input:
        expand(
            "results/experiments/{experiment}/analysis.json",
            experiment=study.experiments,
        ),
        expand("results/experiments/{experiment}/figures", experiment=study.experiments),
    output:
        "results/report/index.html",
    log:
        "results/logs/report.log",
    localrule: True
    retries: 0
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


# The report on what is there, with what is missing marked. Without an output, so that it is made
# whenever it is asked for: also if no result is new, but a run has failed since.
rule partial:
    log:
        "results/logs/partial.log",
    localrule: True
    retries: 0
    conda:
        "../../envs/workflow.yaml"
    params:
        configuration=study.configuration,
    shell:
        "python -m ptbench partial --configuration {params.configuration:q} --log {log:q}"
