# The report on all experiments of the configuration.
rule report:
    input:
        expand("results/experiments/{experiment}/analysis.json", experiment=study.experiments),
    output:
        "results/report/index.html",
    log:
        "results/logs/report.log",
    message:
        "Rendering the report"
    params:
        experiments=expand("results/experiments/{experiment}", experiment=study.experiments),
    localrule: True
    shell:
        "{PYTHON:q} -m ptbench report {params.experiments:q} --output $(dirname {output:q})"
        " > {log:q} 2>&1"
