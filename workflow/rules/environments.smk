# A framework's virtual environment. The output says that it is there and made from this very lock: a
# changed lock has another name, so that Snakemake finds a file missing, not one out of date. What is
# downstream of a job that is out of date it would not look at (docs/decisions/0008).
rule environment:
    input:
        lambda wildcards: ancient(or_exit(environments.lock_of_marker, **wildcards)),
    output:
        touch("results/environments/{framework}-{accelerator}/lock-{digest}"),
    log:
        "results/logs/environments/{framework}-{accelerator}-{digest}.log",
    wildcard_constraints:
        accelerator="cpu|cuda",
        digest="[0-9a-f]{12}",
    retries: 0
    localrule: True
    conda:
        "../../envs/workflow.yaml"
    shell:
        "python -m ptbench environments {wildcards.framework:q} --output results/environments"
        " --accelerator {wildcards.accelerator} --log {log:q} > /dev/null"
