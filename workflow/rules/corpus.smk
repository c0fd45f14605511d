# A corpus fetched or generated, verified, and stored as integers. Where it is fetched from is no
# parameter: another mirror, or another place of one's own folder, is no reason to prepare it again.
# What is in it is a parameter; of one's own texts, their checksums.
rule corpus:
    output:
        "results/corpora/{corpus_folder}/corpus.json",
    log:
        "results/logs/corpora/{corpus_folder}.log",
    retries: 0
    localrule: True
    conda:
        "../../envs/workflow.yaml"
    params:
        folder=subpath(output[0], parent=True),
        corpus=lambda wildcards: or_exit(study.corpus_content, wildcards.corpus_folder),
    shell:
        "python -m ptbench corpus --corpus {params.corpus:q} --downloads results/downloads"
        f" --output {{params.folder:q}} --log {{log:q}} --fetching {literal(study.fetching)} > /dev/null"
