# Findings judged, and tables and figures drawn again, of one document: from the experiments that plan
# a row which it names.
rule answer:
    input:
        analyses=lambda wildcards: expand(
            "results/experiments/{experiment}/analysis.json",
            experiment=or_exit(study.answering, wildcards.paper),
        ),
        paper=lambda wildcards: study.paper_files(wildcards.paper),
    output:
        "results/papers/{paper}/answers.json",
    log:
        "results/logs/papers/{paper}.log",
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
        " --output {params.folder:q} --log {log:q}"
