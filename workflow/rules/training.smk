# One variant resolved to the JSON that the trainers read.
rule specification:
    output:
        "results/specifications/{variant}.json",
    log:
        "results/logs/specifications/{variant}.log",
    localrule: True
    conda:
        "../../envs/workflow.yaml"
    params:
        json=lambda wildcards: study.specification(wildcards.variant).model_dump_json(),
    shell:
        "python -m ptbench specification --json {params.json:q} --output {output:q}"
        " > {log:q} 2>&1"


# One cell. What its inputs mean is in the fingerprint, so their ages do not matter: a change of
# meaning re-runs exactly the cells concerned. Checkpoints are no output, because Snakemake deletes
# outputs before every run.
rule train:
    input:
        environment=(
            []
            if USES_CONDA
            else ancient(
                f"results/environments/{{framework}}-{ACCELERATOR}/environment.json"
            )
        ),
        corpus=ancient(corpus_of),
        specification=ancient("results/specifications/{variant}.json"),
    output:
        f"results/cells/{CELL}/metrics.json",
    log:
        f"results/logs/cells/{CELL}.log",
    benchmark:
        f"results/benchmarks/cells/{CELL}.tsv"
    conda:
        "../../envs/{framework}.yaml"
    threads: study.config.threads
    params:
        folder=subpath(output[0], parent=True),
        corpus=subpath(input.corpus, parent=True),
        fingerprint=lambda wildcards: study.specification(wildcards.variant).fingerprint,
        python=(
            "python"
            if USES_CONDA
            else f"results/environments/{{framework}}-{ACCELERATOR}/bin/python"
        ),
        cell=CELL,
        checkpoints=f"results/checkpoints/{CELL}",
    shell:
        "{params.python:q} -m ptbench train --cell {params.cell:q}"
        " --specification {input.specification:q} --corpus {params.corpus:q}"
        " --output {params.folder:q} --checkpoints {params.checkpoints:q}"
        " --threads {threads} --log {log:q}"
