# A framework's virtual environment from its lock, where conda is not asked for (--sdm conda).
rule environment:
    input:
        "envs/{framework}.{accelerator}.txt",
    output:
        "results/environments/{framework}-{accelerator}/environment.json",
    log:
        "results/logs/environments/{framework}-{accelerator}.log",
    message:
        "Building the environment of {wildcards.framework} for {wildcards.accelerator}"
    localrule: True
    shell:
        "{PYTHON:q} -m ptbench environment {wildcards.framework:q}"
        " --accelerator {wildcards.accelerator:q} --output $(dirname {output:q}) > {log:q} 2>&1"
