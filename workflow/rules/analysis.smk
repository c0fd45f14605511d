# Tables, figures and verdicts of one experiment.
rule analyse:
    input:
        cells=lambda wildcards: [
            f"results/cells/{cell.path}/metrics.json"
            for cell in or_exit(study.experiment, wildcards.experiment).cells
        ],
        published=study.published_files,
    output:
        multiext(
            "results/experiments/{experiment}/",
            "analysis.json",
            "table.csv",
            "table.md",
            "table.tex",
            "comparison.csv",
            "differences.csv",
        ),
        figures=directory("results/experiments/{experiment}/figures"),
    log:
        "results/logs/experiments/{experiment}.log",
    localrule: True
    retries: 0
    conda:
        "../../envs/workflow.yaml"
    params:
        folder=subpath(output[0], parent=True),
        plan=lambda wildcards: study.plan(wildcards.experiment),
    shell:
        "python -m ptbench analyse --plan {params.plan:q} --papers workflow/papers"
        " --results results --output {params.folder:q} --log {log:q}"
