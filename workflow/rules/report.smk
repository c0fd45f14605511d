# The report's pages on all experiments of the configuration together. Each experiment's own page is
# written with its tables and figures.
rule report:
    input:
        expand(
            "results/experiments/{experiment}/analysis.json",
            experiment=study.experiments,
        ),
        expand(
            "results/report/experiments/{experiment}.html",
            experiment=study.experiments,
        ),
        expand(
            "results/report/searches/{search}.html",
            search=study.searches,
        ),
        # as a function, because only this job has to know which documents the study answers
        answers=lambda wildcards: expand(
            "results/papers/{paper}/answers.json", paper=or_exit(study.answered)
        ),
    output:
        report(
            "results/report/index.html",
            caption="../report/index.rst",
            category="Report",
            labels={"result": "first page", "kind": "HTML"},
        ),
        multiext(
            "results/report/",
            "frameworks.html",
            "methods.html",
            "runs.html",
            "report.md",
        ),
    log:
        "results/logs/report.log",
    retries: 0
    localrule: True
    conda:
        "../../envs/workflow.yaml"
    params:
        folder=subpath(output[0], parent=True),
        experiments=expand(
            "results/experiments/{experiment}", experiment=study.experiments
        ),
        searches=expand("results/searches/{search}", search=study.searches),
        documents=lambda wildcards, input: [
            str(Path(file).parent) for file in input.answers
        ],
    shell:
        "python -m ptbench report {params.experiments:q} --documents {params.documents:q}"
        " --searches {params.searches:q} --results results --report {params.folder:q} --log {log:q}"


# The report on what is there, with what is missing marked. Without an output, so that it is made
# whenever it is asked for: also if no result is new, but a run has failed since.
rule partial:
    log:
        "results/logs/partial.log",
    retries: 0
    localrule: True
    conda:
        "../../envs/workflow.yaml"
    params:
        configuration=study.configuration,
    shell:
        "python -m ptbench partial --configuration {params.configuration:q} --log {log:q}"
