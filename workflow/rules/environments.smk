# A framework's virtual environment from its lock, where conda is not asked for (--sdm conda).
rule environment:
    input:
        "envs/{framework}.{accelerator}.txt",
    output:
        "results/environments/{framework}-{accelerator}/environment.json",
    log:
        "results/logs/environments/{framework}-{accelerator}.log",
    localrule: True
    conda:
        "../../envs/workflow.yaml"
    params:
        folder=subpath(output[0], parent=True),
    shell:
        "python -m ptbench environment {wildcards.framework:q}"
        " --accelerator {wildcards.accelerator:q} --output {params.folder:q} > {log:q} 2>&1"
