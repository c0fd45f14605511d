# Tables, figures and verdicts of one experiment, and its page of the report.
rule analyse:
    input:
        cells=lambda wildcards: results_of(
            cell.path
            for cell in study.runnable(
                or_exit(study.experiment, wildcards.experiment).cells
            )
        ),
        published=study.published_files,
        profiles=lambda wildcards: (
            profiles_of(wildcards.experiment) if study.config.profile else []
        ),
    output:
        multiext(
            "results/experiments/{experiment}/",
            "analysis.json",
            "table.md",
            "table.tex",
            "comparison.csv",
            "differences.csv",
            "variants.csv",
            "curves.csv",
        ),
        # Snakemake's own report, of --report, shows what is marked with report().
        page=report(
            "results/report/experiments/{experiment}.html",
            caption="../report/page.rst",
            category="{experiment}",
            labels={"result": "page", "kind": "HTML"},
        ),
        table=report(
            "results/experiments/{experiment}/table.csv",
            caption="../report/table.rst",
            category="{experiment}",
            labels={"result": "results", "kind": "table"},
        ),
        figures=report(
            directory("results/experiments/{experiment}/figures"),
            patterns=["{figure}.svg"],
            caption="../report/figure.rst",
            category="{experiment}",
            labels={"result": "{figure}", "kind": "figure"},
        ),
    log:
        "results/logs/experiments/{experiment}.log",
    retries: 0
    localrule: True
    conda:
        "../../envs/workflow.yaml"
    params:
        folder=subpath(output[0], parent=True),
        plan=lambda wildcards: study.plan(wildcards.experiment),
    shell:
        "python -m ptbench analyse --plan {params.plan:q} --papers workflow/papers"
        " --results results --output {params.folder:q} --report results/report --log {log:q}"
