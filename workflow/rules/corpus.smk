# A corpus fetched or generated, verified, and stored as integers.
rule corpus:
    output:
        "results/corpora/{corpus_folder}/corpus.json",
    log:
        "results/logs/corpora/{corpus_folder}.log",
    message:
        "Preparing the corpus {wildcards.corpus_folder}"
    params:
        request=lambda wildcards: study.corpus_request(wildcards.corpus_folder),
    localrule: True
    shell:
        "{PYTHON:q} -m ptbench corpus --json {params.request:q}"
        " --downloads results/downloads --output $(dirname {output:q}) --log {log:q}"
