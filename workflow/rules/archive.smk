# One file of everything that a finished study is, to be shared. Without an output, so that it is made
# whenever it is asked for: the workflow's own files are in it too.
rule archive:
    input:
        everything,
    log:
        "results/logs/archive.log",
    retries: 0
    localrule: True
    conda:
        "../../envs/workflow.yaml"
    params:
        configuration=files,
    shell:
        "python -m ptbench archive --configuration {params.configuration:q} --log {log:q}"
