# One cell. Its specification is a parameter, so a change of meaning re-runs exactly the cells
# concerned. Checkpoints are no output, because Snakemake deletes outputs before every run.
rule train:
    input:
        lambda wildcards: "results/corpora/{}/corpus.json".format(
            or_exit(study.corpus_of_cell, CELL.format(**wildcards))
        ),
    output:
        f"results/cells/{CELL}/metrics.json",
    log:
        f"results/logs/cells/{CELL}.log",
    benchmark:
        f"results/benchmarks/cells/{CELL}.tsv"
    conda:
        "../../envs/{framework}.yaml"
    threads: lambda wildcards: cell_threads(int(wildcards.devices))
    resources:
        nodes=1,  # or Slurm may spread GPUs over several
        mem_mb=lambda wildcards, input, attempt: study.memory_megabytes(
            CELL.format(**wildcards), input[0], attempt
        ),
        runtime=lambda wildcards, input, attempt: study.runtime_minutes(
            CELL.format(**wildcards), input[0], attempt
        ),
    params:
        cell=CELL,
        specification=lambda wildcards: study.specification(wildcards.variant).text(),
        corpus=subpath(input[0], parent=True),
        folder=subpath(output[0], parent=True),
        checkpoints=f"results/checkpoints/{CELL}",
    shell:
        f"{FRAMEWORK_PYTHON} -m ptbench train"
        " --cell {params.cell:q}"
        " --specification {params.specification:q} --corpus {params.corpus:q}"
        " --output {params.folder:q} --checkpoints {params.checkpoints:q}"
        " --threads {threads} --log {log:q}"
        # Not in params, for none of these is a reason to train again. Should the job that a killed
        # Snakemake had submitted still be at the cell, this one waits, as long as its own job may.
        " --attempts results/attempts/{params.cell:q} --wait-for-lock 1000000"
        f" --checkpoint-minutes {study.config.checkpoint_minutes}"
