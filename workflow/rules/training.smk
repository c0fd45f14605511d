# One variant resolved to the JSON that the trainers read.
rule specification:
    output:
        "results/specifications/{variant}.json",
    log:
        "results/logs/specifications/{variant}.log",
    params:
        json=lambda wildcards: study.specification(wildcards.variant).model_dump_json(),
    localrule: True
    shell:
        "{PYTHON:q} -m ptbench specification --json {params.json:q} --output {output:q}"
        " > {log:q} 2>&1"


def corpus_of(wildcards):
    folder = study.specification(wildcards.variant).recipe.corpus_folder
    return f"results/corpora/{folder}/corpus.json"


# One cell. What its inputs mean is in the fingerprint, so their ages do not matter: a change of
# meaning re-runs exactly the cells concerned. Checkpoints are no output, because Snakemake deletes
# outputs before every run.
rule train:
    input:
        environment=[]
        if USES_CONDA
        else ancient(
            f"results/environments/{{framework}}-{ACCELERATOR}/environment.json"
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
    message:
        "Training {wildcards.variant} in {wildcards.framework}, devices {wildcards.devices}, seed {wildcards.seed}"
    threads: study.config.threads
    params:
        fingerprint=lambda wildcards: study.specification(wildcards.variant).fingerprint,
        python=(
            "python"
            if USES_CONDA
            else f"results/environments/{{framework}}-{ACCELERATOR}/bin/python"
        ),
        cell=CELL,
        checkpoints=f"results/checkpoints/{CELL}",
    shell:
        "PYTHONPATH=workflow {params.python:q} -m ptbench train --cell {params.cell:q}"
        " --specification {input.specification:q} --corpus $(dirname {input.corpus:q})"
        " --output $(dirname {output:q}) --checkpoints {params.checkpoints:q}"
        " --threads {threads} --log {log:q}"
