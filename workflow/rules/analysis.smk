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
    message:
        "Analysing {wildcards.experiment}"
    params:
        definition=lambda wildcards: study.experiments[wildcards.experiment].definition_json,
    localrule: True
    shell:
        "{PYTHON:q} -m ptbench analyse {wildcards.experiment:q} --config {input.config:q}"
        " --results results --output $(dirname {output:q}) > {log:q} 2>&1"
