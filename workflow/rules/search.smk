# Searches: the next trials, from the results of those before, and the ones that go on in full. Trials
# and full runs are cells like any other. What a search finds is in files that its cells wait for, so
# the graph of jobs is known when it is planned, and nothing outlives a job but files.
rule propose:
    input:
        unpack(inputs_of_generation),
    output:
        "results/searches/{search}/generation-{number}.json",
    log:
        "results/logs/searches/{search}/generation-{number}.log",
    wildcard_constraints:
        number=r"\d+",
    retries: 0
    localrule: True
    conda:
        "../../envs/workflow.yaml"
    params:
        question=lambda wildcards: or_exit(
            study.question, wildcards.search, int(wildcards.number)
        ),
    shell:
        "python -m ptbench propose --question {params.question:q} --results results"
        f" --pytorch results/environments/pytorch-{study.config.accelerator_of('pytorch')}"
        " --output {output:q} --log {log:q}"


rule select:
    input:
        unpack(inputs_of_selection),
    output:
        "results/searches/{search}/selection.json",
    log:
        "results/logs/searches/{search}/selection.log",
    retries: 0
    localrule: True
    conda:
        "../../envs/workflow.yaml"
    params:
        contest=lambda wildcards: study.search(
            wildcards.search
        ).contest.model_dump_json(),
    shell:
        "python -m ptbench select --contest {params.contest:q} --results results"
        " --output {output:q} --log {log:q}"


rule search:
    input:
        selection="results/searches/{search}/selection.json",
        trials=lambda wildcards: results_of(
            or_exit(study.search, wildcards.search).shown_trials
        ),
        full=lambda wildcards: [
            f"results/cells/{cell}/metrics.json"
            for cells in or_exit(study.search, wildcards.search).full.values()
            for cell in cells
            if not study.obstacle(parse_cell_path(cell))
        ],
    output:
        multiext(
            "results/searches/{search}/", "search.json", "trials.csv", "recipe.yaml"
        ),
        page=report(
            "results/report/searches/{search}.html",
            caption="../report/search.rst",
            category="{search}",
            labels={"result": "page", "kind": "HTML"},
        ),
        figures=report(
            directory("results/searches/{search}/figures"),
            patterns=["{figure}.svg"],
            caption="../report/search.rst",
            category="{search}",
            labels={"result": "{figure}", "kind": "figure"},
        ),
    log:
        "results/logs/searches/{search}/search.log",
    retries: 0
    localrule: True
    conda:
        "../../envs/workflow.yaml"
    params:
        folder=subpath(output[0], parent=True),
        contest=lambda wildcards: study.shown(wildcards.search).model_dump_json(),
    shell:
        "python -m ptbench search --contest {params.contest:q}"
        " --results results --output {params.folder:q} --report results/report --log {log:q}"
