# A corpus fetched or generated, verified, and stored as integers. Where it is fetched from is read
# from results/study.json and no parameter here: another mirror is no reason to prepare it anew.
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
        content=lambda wildcards: study.corpus_content(wildcards.corpus_folder),
    shell:
        "python -m ptbench corpus --study results/study.json --downloads results/downloads"
        " --output {params.folder:q} --log {log:q}"
