# Findings judged, and tables and figures drawn again, of one document: from the experiments that plan
# a row which it names. Its page of the report too.
rule answer:
    input:
        analyses=lambda wildcards: expand(
            "results/experiments/{experiment}/analysis.json",
            experiment=or_exit(study.answering, wildcards.paper),
        ),
        paper=lambda wildcards: study.paper_files(wildcards.paper),
    output:
        "results/papers/{paper}/answers.json",
        exhibits=directory("results/papers/{paper}/exhibits"),
        tables=directory("results/papers/{paper}/tables"),
        page="results/report/papers/{paper}.html",
    log:
        "results/logs/papers/{paper}.log",
    retries: 0
    localrule: True
    conda:
        "../../envs/workflow.yaml"
    params:
        experiments=lambda wildcards, input: [
            str(Path(file).parent) for file in input.analyses
        ],
        folder=subpath(output[0], parent=True),
    shell:
        "python -m ptbench answer {params.experiments:q} --paper workflow/papers/{wildcards.paper}"
        " --results results --output {params.folder:q} --report results/report --log {log:q}"
