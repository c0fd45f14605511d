# A corpus fetched or generated, verified, and stored as integers.
rule corpus:
    output:
        "results/corpora/{corpus_folder}/corpus.json",
    log:
        "results/logs/corpora/{corpus_folder}.log",
    localrule: True
    conda:
        "../../envs/workflow.yaml"
    params:
        folder=subpath(output[0], parent=True),
        request=lambda wildcards: study.corpus_request(wildcards.corpus_folder),
    shell:
        "python -m ptbench corpus --json {params.request:q}"
        " --downloads results/downloads --output {params.folder:q} --log {log:q}"
