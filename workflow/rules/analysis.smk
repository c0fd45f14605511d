# Tables, figures and verdicts of one experiment.
rule analyse:
    input:
        cells=lambda wildcards: [
            f"results/cells/{cell.path}/metrics.json"
            for cell in or_exit(study.experiment, wildcards.experiment).cells
        ],
        published=study.published_files,
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
        margin=study.config.equivalence_margin,
    shell:
        "python -m ptbench analyse {wildcards.experiment:q} --study results/study.json"
        " --results results --output {params.folder:q} > {log:q} 2>&1"
