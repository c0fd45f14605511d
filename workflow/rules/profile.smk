# What a step's time is made of, in a process of its own that trains nothing. The report shows the
# profiles that are there; `all` asks for them if the configuration does.
ROW = "{variant}/{framework}/devices-{devices}"


rule profile:
    input:
        found=lambda wildcards: study.found_in(wildcards.variant) or [],
        corpus=profiled_corpus,
        environment=profiled_environment,
    output:
        f"results/profiles/{ROW}/profile.json",
    log:
        f"results/logs/profiles/{ROW}.log",
    conda:
        "../../envs/{framework}.yaml"
    threads: cores_of_profile
    resources:
        nodes=nodes_of,
        mem_mb=memory_of_profile,
        runtime=runtime_of_profile,
        python=python_of,
    params:
        row=ROW,
        specification=specification_of,
    shell:
        f"{FRAMEWORK_PYTHON} -m ptbench profile --row {{params.row:q}}"
        " --specification {params.specification:q} --corpus {input.corpus:q} --output {output:q}"
        f" --threads {study.config.threads} --nodes {{resources.nodes}} --log {{log:q}}"
        # as in training.smk
        " > /dev/null"


rule profiles:
    input:
        lambda wildcards: profiles_of(),
    localrule: True
