# One run. A change of its specification re-runs exactly the cells concerned: see `is_trained`.
# Checkpoints are no output, because Snakemake deletes outputs before every run.
rule train:
    input:
        unpack(inputs_of),
    output:
        f"results/cells/{CELL}/metrics.json",
    log:
        f"results/logs/cells/{CELL}.log",
    benchmark:
        f"results/benchmarks/cells/{CELL}.tsv"
    conda:
        "../../envs/{framework}.yaml"
    threads: cores_of
    resources:
        nodes=nodes_of,
        mem_mb=memory_of,
        runtime=runtime_of,
        python=python_of,
    params:
        cell=CELL,
        specification=specification_of,
        checkpoints=f"results/checkpoints/{CELL}",
    shell:
        # exec, so that the trainer is a child of Snakemake, which passes signals on to it
        f"exec {FRAMEWORK_PYTHON} -m ptbench train"
        " --cell {params.cell:q}"
        " --specification {params.specification:q} --corpus {input.corpus:q}"
        " --output results/cells/{params.cell:q} --checkpoints {params.checkpoints:q}"
        # What follows is not in params, because none of it is a reason to train again. If the job that a
        # killed Snakemake had submitted is still training the cell, this one waits for it, as long as
        # its own job may take.
        " --attempts results/attempts/{params.cell:q} --wait-for-lock 1000000"
        f" --threads {study.config.threads} --code {study.code}"
        " --nodes {resources.nodes}"
        f" --checkpoint-minutes {study.config.checkpoint_minutes}"
        f" --keep-checkpoints {study.config.keep_checkpoints} --log {{log:q}}"
        " --asked {resources.mem_mb} {resources.runtime}"
        # what it prints is in its log, whose end the display shows
        " > /dev/null"
