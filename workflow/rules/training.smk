# One run. Its specification is a parameter, so a change of meaning re-runs exactly the cells
# concerned. Checkpoints are no output, because Snakemake deletes outputs before every run.
rule train:
    input:
        unpack(lambda wildcards: inputs_of(wildcards, CELL.format(**wildcards))),
    output:
        f"results/cells/{CELL}/metrics.json",
    log:
        f"results/logs/cells/{CELL}.log",
    benchmark:
        f"results/benchmarks/cells/{CELL}.tsv"
    conda:
        "../../envs/{framework}.yaml"
    threads: lambda wildcards: cores_of(CELL.format(**wildcards), int(wildcards.devices))
    resources:
        nodes=1,  # or Slurm may spread GPUs over several
        mem_mb=lambda wildcards, input: asked(
            study.memory_megabytes, wildcards, input, "memory"
        ),
        runtime=lambda wildcards, input: asked(
            study.runtime_minutes, wildcards, input, "time"
        ),
    params:
        cell=CELL,
        specification=lambda wildcards: study.specification(wildcards.variant).text(),
        corpus=subpath(input.corpus, parent=True),
        folder=subpath(output[0], parent=True),
        checkpoints=f"results/checkpoints/{CELL}",
    shell:
        f"{FRAMEWORK_PYTHON} -m ptbench train"
        " --cell {params.cell:q}"
        " --specification {params.specification:q} --corpus {params.corpus:q}"
        " --output {params.folder:q} --checkpoints {params.checkpoints:q}"
        # What follows is not in params, because none of it is a reason to train again. If the job that a
        # killed Snakemake had submitted is still training the cell, this one waits for it, as long as
        # its own job may take.
        " --attempts results/attempts/{params.cell:q} --wait-for-lock 1000000"
        f" --threads {study.config.threads}"
        f" --checkpoint-minutes {study.config.checkpoint_minutes}"
        f" --keep-checkpoints {study.config.keep_checkpoints} --log {{log:q}}"
