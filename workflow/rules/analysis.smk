# The configuration as merged from all its sources, kept beside the results.
rule config:
    output:
        "results/config.json",
    log:
        "results/logs/config.log",
    localrule: True
    conda:
        "../../envs/workflow.yaml"
    params:
        json=study.config.model_dump_json(),
    shell:
        "python -m ptbench config --json {params.json:q} --output {output:q} > {log:q} 2>&1"


# Tables, figures and verdicts of one experiment.
rule analyse:
    input:
        config=ancient("results/config.json"),
        cells=lambda wildcards: [
            f"results/cells/{cell.path}/metrics.json"
            for cell in study.experiments[wildcards.experiment].cells
        ],
    output:
        "results/experiments/{experiment}/analysis.json",
    log:
        "results/logs/experiments/{experiment}.log",
    localrule: True
    conda:
        "../../envs/workflow.yaml"
    params:
        folder=subpath(output[0], parent=True),
        definition=lambda wildcards: study.experiments[
            wildcards.experiment
        ].definition_json,
    shell:
        "python -m ptbench analyse {wildcards.experiment:q} --config {input.config:q}"
        " --results results --output {params.folder:q} > {log:q} 2>&1"
