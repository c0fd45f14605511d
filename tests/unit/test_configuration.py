"""Bad configuration is one clear sentence: file, key, value, what is allowed."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.support.sentences import assert_no_frames

from ptbench.analysis.plan import plan_experiment
from ptbench.backends import FRAMEWORKS
from ptbench.configuration import config, experiments
from ptbench.configuration.config import Config, read_configuration
from ptbench.configuration.experiments import load_library, read_papers
from ptbench.configuration.specification import Specification, parse_cell_path, variant_name
from ptbench.configuration.study import NEEDS, load_study, read_study
from ptbench.corpus.definitions import SPLITS
from ptbench.errors import ConfigurationError
from ptbench.model.recipe import Recipe
from ptbench.model.shapes import kept_count, parameter_count, parameter_shapes
from ptbench.yaml import parse_yaml

ROOT = Path(__file__).parents[2]

DOWNLOAD = {"kind": "download", "files": dict.fromkeys(SPLITS, "0" * 64)}
MIRROR = {"url": "file:x", "format": "plain", "paths": dict.fromkeys(SPLITS, "x")}

BAD_CONFIGURATIONS: list[tuple[dict[str, Any], str]] = [
    (
        {"experiment": ["demo"]},
        r"experiment: there is no such key; did you mean experiments\?",
    ),
    ({"experiments": ["dmo"]}, r"config.yaml: experiments: .*\"dmo\"; did you mean demo\?"),
    ({"experiments": []}, r"config.yaml: experiments: \[\] is not allowed: .*at least 1"),
    ({"experiments": {"demo": 1}}, r"config.yaml: experiments: {\"demo\": 1} .*list"),
    ({"experiments": True}, r"config.yaml: experiments: true .*list"),
    ({"experiments": ["demo", "demo"]}, r"config.yaml: experiments: \"demo\" is there twice"),
    ({"experiments": ["Demo"]}, r"config.yaml: experiments\[0\]: \"Demo\" is not allowed"),
    ({"experiments": ["../x"]}, r"config.yaml: experiments\[0\]: \"../x\" is not allowed"),
    ({"frameworks": ["torch"]}, r"config.yaml: frameworks\[0\]: \"torch\" .*'pytorch'"),
    ({"frameworks": []}, r"config.yaml: frameworks: \[\] is not allowed: .*at least 1"),
    ({"frameworks": ["jax", "jax"]}, r"\"jax\" is there twice"),
    ({"seeds": []}, r"config.yaml: seeds: \[\] is not allowed: .*at least 1"),
    ({"seeds": [-1]}, r"config.yaml: seeds\[0\]: -1 .*greater than or equal to 0"),
    ({"seeds": [2**31]}, r"config.yaml: seeds\[0\]: 2147483648 .*less than"),
    ({"seeds": [1, 1]}, r"config.yaml: seeds: 1 is there twice"),
    ({"seeds": [1.5]}, r"config.yaml: seeds\[0\]: 1.5 is not allowed"),
    ({"seeds": ["one"]}, r"config.yaml: seeds\[0\]: \"one\" is not allowed"),
    ({"devices": [0]}, r"config.yaml: devices\[0\]: 0 .*greater than or equal to 1"),
    ({"devices": [3]}, r"config.yaml: devices: demo-lstm: batch_size=20 does not divide"),
    ({"seeds": "1,2"}, r"config.yaml: seeds: \"1,2\" is not a list; .* 'seeds=\[1,2\]'"),
    ({"experiments": "demo,a"}, r"config.yaml: experiments: .* 'experiments=\[demo,a\]'"),
    ({"frameworks": None}, r"config.yaml: frameworks: null is not allowed: .* \[a, b\]"),
    ({"devices": [2, 2]}, r"config.yaml: devices: 2 is there twice"),
    ({"accelerators": {"mxnte": "cpu"}}, r"config.yaml: accelerators.*mxnte.*'mxnet'"),
    ({"accelerators": {"mxnet": "tpu"}}, r"config.yaml: accelerators.mxnet: \"tpu\" .*'cpu' or"),
    ({"accelerator": "tpu"}, r"config.yaml: accelerator: \"tpu\" .*'cpu' or 'cuda'"),
    ({"threads": 0}, r"config.yaml: threads: 0 .*greater than or equal to 1"),
    ({"threads": True}, r"config.yaml: threads: true is not allowed: .*integer"),
    ({"seeds": [True]}, r"config.yaml: seeds\[0\]: true is not allowed: .*integer"),
    ({"threads": "many"}, r"config.yaml: threads: \"many\" .*integer"),
    (
        {"corpus": "ptbb"},
        r"^config.yaml: corpus: there is no corpus \"ptbb\"; did you mean ptb\?.* wikitext2",
    ),
    ({"mirrors": {"synthetic": "file:x"}}, r"synthetic is generated, so it has no mirrors"),
    ({"corpus": "/etc"}, r"config.yaml: corpus: \"/etc\" is not allowed"),
    ({"subset": 0}, r"config.yaml: subset: 0 .*greater than or equal to 1"),
    ({"equivalence_margin": -0.1}, r"config.yaml: equivalence_margin: -0.1 .*greater than 0"),
    ({"corpora": {"mine": {"folder": "x"}}}, r"config.yaml: corpora.mine.kind: is required"),
    (
        {"corpora": {"mine": {"kind": "zip"}}},
        r"corpora.mine.kind: \"zip\" is not allowed: .*'folder'",
    ),
    ({"corpora": {"Mine": {"kind": "folder", "folder": "x"}}}, r"the name \"Mine\" is not allowed"),
    ({"corpora": {"mine": {"kind": "folder", "folder": 1}}}, r"folder: 1 .* a valid string$"),
    (
        {"corpora": {"mine": {"kind": "synthetic", "process": "chain"}}},
        r"corpora.mine.process: \"chain\" is not allowed: should be 'markov', 'high-rank'",
    ),
    (
        {"corpora": {"ptb": DOWNLOAD | {"mirrors": [MIRROR | {"url": "/x"}]}}},
        r"^config.yaml: corpora.ptb.mirrors\[0\].url: /x is not an address[^\n]*$",
    ),
    ({"corpora": {"mine": {"kind": "folder"}}}, r"config.yaml: corpora.mine.folder: is required"),
    (
        {"corpora": {"mine": {"kind": "folder", "folder": "x", "fils": 1}}},
        r"config.yaml: corpora.mine.fils: there is no such key",
    ),
    (
        {"mirrors": {"ptb": "file://data/ptb"}},
        r"config.yaml: mirrors.ptb: file://data/ptb names a host, data; write file:/absolute",
    ),
    (
        {"mirrors": {"ptb": "/data/ptb"}},
        r"config.yaml: mirrors.ptb: /data/ptb is not an address; .* write file:/data/ptb$",
    ),
    (
        {"mirrors": {"ptb": "ftp://data/ptb"}},
        r"config.yaml: mirrors.ptb: \"ftp://data/ptb\" is not an http:, https: or file: address",
    ),
]

BAD_RECIPES: list[tuple[str, str]] = [
    ("hiden_size: 3", r"own.yaml, line \d+: r: hiden_size: .*did you mean hidden_size\?"),
    ("hidden_size: -3", r"own.yaml, line \d+: r: hidden_size: -3 .*greater than or equal to 1"),
    ("hidden_size: wide", r"own.yaml, line \d+: r: hidden_size: \"wide\" .*integer"),
    ("hidden_size: 2.5", r"own.yaml, line \d+: r: hidden_size: 2.5 is not allowed"),
    ("dropout: 1.0", r"own.yaml, line \d+: r: dropout: 1.0 .*less than 1"),
    ("clip_norm: 0", r"own.yaml, line \d+: r: clip_norm: 0 .*greater than 0"),
    ("clip_norm: .inf", r"own.yaml, line \d+: r: clip_norm: Infinity is not allowed: .*finite"),
    ("learning_rate: .nan", r"own.yaml, line \d+: r: learning_rate: NaN"),
    ("rnn: lsmt", r"own.yaml, line \d+: r: rnn: \"lsmt\" .*'lstm'"),
    ("objective: mean", r"own.yaml, line \d+: r: objective: \"mean\" .*'sum_over_time'"),
    (
        "{constant_epochs: 9, epochs: 3}",
        r"own.yaml, line \d+: r: constant_epochs=9 must not exceed epochs=3",
    ),
    ("{kernel: block, rnn: gru}", r"own.yaml, line \d+: r: kernel=block is for rnn=lstm, not gru"),
    ("kernel: sparse", r"own.yaml, line \d+: r: kernel=sparse needs kept_weights below 1"),
    (
        "aliased: true",
        r"own.yaml, line \d+: r: aliased=true is for feeding=windows, not parallel_st",
    ),
    (
        "{window_lengths: varied, feeding: windows}",
        r"own.yaml, line \d+: r: window_lengths=varied is for feeding=parallel_str",
    ),
    (
        "{optimizer: asgd, epochs: 4, fine_tuning_epochs: 4}",
        r"own.yaml, line \d+: r: fine_tuning_epochs=4 must be less than epochs=4",
    ),
    (
        "{optimizer: asgd, fine_tuning_epochs: 2, patience: 3}",
        r"own.yaml, line \d+: r: patience could end the run before fine_tuning_epochs begin",
    ),
    (
        "fine_tuning_epochs: 2",
        r"own.yaml, line \d+: r: fine_tuning_epochs is for optimizer=asgd, not sgd",
    ),
    ("kept_weights: 0", r"own.yaml, line \d+: r: kept_weights: 0 .*greater than 0"),
    (
        "{tie_weights: true, output_rank: 8}",
        r"own.yaml, line \d+: r: tie_weights and output_rank exclude",
    ),
    (
        "{initialization: pytorch, forget_bias: 1}",
        r"own.yaml, line \d+: r: .* forget_bias must be 0",
    ),
    (
        "kernel: block",
        r"experiment e: frameworks: r has kernel=block, which pytorch does not have; "
        "it is in tensorflow",
    ),
    (
        "precision: bfloat16",
        r"experiment e: frameworks: r has precision=bfloat16, which mxnet does not have; "
        "it is in pytorch, tensorflow, keras, jax",
    ),
    (
        "{precision: bfloat16, kernel: block}",
        r"own.yaml, line \d+: r: precision=bfloat16 is for kernel=fused or stepwise, not block",
    ),
    (
        "{precision: bfloat16, implementation: tuned}",
        r"own.yaml, line \d+: r: precision=bfloat16 is for implementation=stock, not tuned",
    ),
    ("extends: nothing", r"own.yaml, line \d+: r: extends: there is no recipe \"nothing\""),
    ("extends: [r]", r"own.yaml, line \d+: r: extends: \[\"r\"\] must be the name of one recipe"),
    ("extends: r", r"own.yaml, line \d+: r: extends: r → r goes in a circle"),
    ("corpus: no-such", r"experiment e: variants: r: corpus: there is no corpus \"no-such\""),
    ("[1, 2]", r"own.yaml, line \d+: recipes.r: \[1, 2\] is not allowed"),
    (
        "{hidden_size: 3, \n maximum_seconds: 1:30}",
        r"own.yaml, line 2: r: maximum_seconds: \"1:30\" is not allowed",
    ),
    ("batch_size: true", r"own.yaml, line \d+: r: batch_size: true is not allowed"),
]

BAD_EXPERIMENTS: list[tuple[str, str]] = [
    ("{title: T, variants: [s]}", r"experiment e: variants: there is no recipe \"s\""),
    (
        "{title: T, variants: []}",
        r"own.yaml, line \d+: experiments.e.variants: \[\] is not allowed",
    ),
    ("{variants: [r]}", r"own.yaml, line \d+: experiments.e.title: is required"),
    ("{title: T}", r"own.yaml, line \d+: experiments.e.variants: is required"),
    ("{title: T, variants: [r+x=1]}", r"experiment e: variants: r: there is no recipe key \"x\""),
    ("{title: T, variants: [r+layers]}", r"variants\[0\]: r\+layers: layers must be key=value"),
    (
        "{title: T, variants: [r+layers=1+layers=3]}",
        r"r\+layers=1\+layers=3: layers is there twice",
    ),
    (
        "{title: T, variants: [r, r+adam_beta1=0.5]}",
        r"variants: r\+adam_beta1=0.5: adam_beta1 has no effect with optimizer=sgd; leave it out",
    ),
    (
        "{title: T, variants: [{recipe: r, sweep: {mixtures: [0, 2], latent_size: [9]}}]}",
        r"r\+latent_size=9: latent_size has no effect with mixtures=0",
    ),
    ("{title: T, variants: [r+layers=0]}", r"layers: 0 .*greater than or equal to 1"),
    (
        "{title: T, variants: [r], sedes: [1]}",
        r"own.yaml, line \d+: experiments.e.sedes: there is no such",
    ),
    (
        "{title: T, variants: [{recipe: r, set: {layers: 1}, sweep: {layers: [2]}}]}",
        r"layers is both in set and in sweep",
    ),
    ("{title: T, variants: [{recipe: r, sweep: {layers: []}}]}", r"at least 1 item"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CONFIGURATIONS)
def test_a_bad_configuration_is_refused_with_file_key_value_and_what_is_allowed(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_study({"experiments": ["demo"], **change})


def folder_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Make `text` the only file of recipes and experiments."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "own.yaml").write_text(text)
    (tmp_path / "corpora.yaml").write_bytes((ROOT / "workflow/corpora.yaml").read_bytes())
    for module in (config, experiments):
        monkeypatch.setattr(module, "WORKFLOW", tmp_path)


@pytest.mark.parametrize(("recipe", "message"), BAD_RECIPES)
def test_a_bad_recipe_is_refused_with_file_key_value_and_what_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, message: str
) -> None:
    indented = recipe if recipe[0] in "{[" else f"{{{recipe}}}"
    text = f"recipes: {{r: {indented}}}\nexperiments: {{e: {{title: T, variants: [r]}}}}\n"
    folder_with(tmp_path, monkeypatch, text)
    with pytest.raises(ConfigurationError, match=message):
        load_study({"experiments": ["e"]})


@pytest.mark.parametrize(("experiment", "message"), BAD_EXPERIMENTS)
def test_a_bad_experiment_is_refused_with_file_key_value_and_what_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment: str, message: str
) -> None:
    folder_with(tmp_path, monkeypatch, f"recipes: {{r: {{}}}}\nexperiments: {{e: {experiment}}}\n")
    with pytest.raises(ConfigurationError, match=message):
        load_study({"experiments": ["e"]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"recipes: [", r"own.yaml, line \d+: not valid YAML"),
        (b"\xff\xfe", r"own.yaml: not UTF-8 at byte 0"),
        (b"- 1\n", r"own.yaml: must be a mapping"),
        (b"recipes: {}\nrecipes: {}", r"own.yaml, line 2: not valid YAML: recipes is there twice"),
    ],
)
def test_a_file_that_is_not_yaml_is_refused_by_name_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    folder_with(tmp_path, monkeypatch, "")
    (tmp_path / "experiments" / "own.yaml").write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        load_study({"experiments": ["e"]})


def test_a_recipe_in_two_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_with(tmp_path, monkeypatch, "recipes: {r: {}}\n")
    (tmp_path / "experiments" / "more.yaml").write_text("recipes: {r: {}}\n")
    with pytest.raises(
        ConfigurationError, match=r"own.yaml, line \d+: recipe r is already in .*more.yaml, line 1"
    ):
        load_study({"experiments": ["e"]})


def test_the_command_line_prints_the_sentence_and_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("sedes: [1]\n")
    answer = subprocess.run(
        [sys.executable, "-m", "ptbench", "validate", str(path)], capture_output=True, text=True
    )
    assert answer.returncode == 2
    assert "config.yaml, line 1: sedes: there is no such key; did you mean seeds?" in answer.stderr
    assert_no_frames(answer.stderr)


def test_a_variant_has_one_name_however_it_is_written() -> None:
    base = Recipe()
    one = Recipe(learning_rate=0.5, dropout=0.25, clip_norm=None)
    assert variant_name("r", base, one) == "r+clip_norm=null+dropout=0.25+learning_rate=0.5"
    assert variant_name("r", base, Recipe(learning_rate=1)) == "r"  # the recipe's own value
    assert variant_name("r", base, Recipe(learning_rate=2)) == "r+learning_rate=2"
    assert variant_name("r", base, Recipe(learning_rate=2.0)) == "r+learning_rate=2"


STUDY = load_study({"experiments": ["demo"]})


@given(st.floats(min_value=1e-12, max_value=1e6, exclude_min=True))
def test_a_number_in_a_variants_name_is_exactly_the_number(rate: float) -> None:
    base = STUDY.recipes["demo-lstm"]
    name = variant_name("demo-lstm", base, base.model_copy(update={"learning_rate": rate}))
    assert STUDY.specification(name).recipe.learning_rate == rate


def test_a_sweep_makes_every_combination_and_shares_what_is_the_recipe_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = "{recipe: r, sweep: {layers: [1, 2], learning_rate: [0.1, 1]}}"
    text = f"recipes: {{r: {{}}}}\nexperiments: {{e: {{title: T, variants: [{sweep}, r]}}}}\n"
    folder_with(tmp_path, monkeypatch, text)
    study = load_study({"experiments": ["e"]})
    assert list(dict.fromkeys(cell.variant for cell in study.cells)) == [
        "r+layers=1+learning_rate=0.1",
        "r+layers=1",
        "r+learning_rate=0.1",
        "r",
    ]


def test_corpus_and_subset_of_the_configuration_become_part_of_the_variants_name() -> None:
    study = load_study({"experiments": ["zaremba-small"], "corpus": "synthetic", "subset": 50})
    assert study.cells[0].variant == "zaremba-small+corpus=synthetic+subset=50"
    same = load_study({"experiments": ["zaremba-small"], "corpus": "ptb"})
    assert same.cells[0].variant == "zaremba-small"


def configured(tmp_path: Path, *texts: str | bytes, values: tuple[str, ...] = ()) -> dict[str, Any]:
    """What configuration files of these contents make, with these values of --config."""
    files = []
    for index, text in enumerate(texts):
        files.append(tmp_path / f"file-{index}.yaml")
        files[-1].write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_configuration(files, values)


def test_a_later_file_wins_key_by_key_and_the_command_line_wins_over_both(tmp_path: Path) -> None:
    first = "seeds: 1\nthreads: 2\ncorpora: {a: {kind: folder, folder: a}}\n"
    second = "threads: 3\ndevices: 1\ncorpora: {b: {kind: folder, folder: b}}\n"
    merged = configured(tmp_path, first, second, values=("devices=[2]", "accelerator=cuda"))
    assert merged == {
        "seeds": 1, "threads": 3, "devices": [2], "accelerator": "cuda",
        "corpora": {name: {"kind": "folder", "folder": name} for name in "ab"},
    }  # fmt: skip


@pytest.mark.parametrize("text", ["", "# nothing\n", "null\n"])
def test_an_empty_file_changes_nothing(tmp_path: Path, text: str) -> None:
    assert configured(tmp_path, "seeds: 1\n", text) == {"seeds": 1}


@pytest.mark.parametrize("values", [("seeds=010",), ("seeds=[010]",), ("seeds=[1]", "seeds=10")])
def test_the_command_line_s_numbers_are_those_of_the_files(
    tmp_path: Path, values: tuple[str, ...]
) -> None:
    assert load_study(configured(tmp_path, values=values)).config.seeds == [10]
    assert load_study(configured(tmp_path, "seeds: 010\n")).config.seeds == [10]


@pytest.mark.parametrize("value", ["null", "~", ""])
@pytest.mark.parametrize("key", ["corpus", "subset", "seeds"])
def test_null_on_the_command_line_takes_back_what_a_file_says(
    tmp_path: Path, key: str, value: str
) -> None:
    file = "corpus: ptb\nsubset: 7\nseeds: [7]\n"
    merged = load_study(configured(tmp_path, file, values=(f"{key}={value}",))).config
    assert getattr(merged, key) is None
    assert getattr(load_study(configured(tmp_path, file)).config, key) is not None


@pytest.mark.parametrize(
    ("texts", "values", "message"),
    [
        (("seeds: 1\n", "threads: 1\nsedes: 2\n"), (), r"file-1.yaml, line 2: sedes: there is no"),
        (("seeds: 1\n", "\nseeds: x\n"), (), r"file-1.yaml, line 2: seeds\[0\]: \"x\" is not"),
        (("seeds: x\n", "threads: 1\n"), (), r"file-0.yaml, line 1: seeds\[0\]: \"x\" is not"),
        (
            ("seeds: 1\n", "seeds: 1\nseeds: 2\n"),
            (),
            r"file-1.yaml, line 2: .* seeds is there twice",
        ),
        (("experiments: [dmo]\n",), (), r"file-0.yaml, line 1: experiments: there is no .* demo\?"),
        (("mirrors:\n  ptb: /x\n",), (), r"file-0.yaml, line 2: mirrors.ptb: /x is not an address"),
        (
            ("papers: [singh2018]\n",),
            (),
            r"file-0.yaml, line 1: papers: there is no paper \"singh2018\"; did",
        ),
        (("threads: 1\n",), ("seeds=one",), r"^--config: seeds\[0\]: \"one\" is not allowed"),
        (("threads: 1\n",), ("seeds=[1",), r"^--config seeds, line 1: not valid YAML"),
        ((b"seeds: 1 # \xe9\n",), (), r"file-0.yaml: not UTF-8 at byte 11"),
        (("- 1\n",), (), r"file-0.yaml: must be a mapping"),
        (("a: {x: 1,\n  x: 2}\n",), (), r"file-0.yaml, line 2: .* x is there twice"),
    ],
)
def test_what_is_wrong_is_named_by_its_own_file_and_line(
    tmp_path: Path, texts: tuple[str | bytes, ...], values: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_study(configured(tmp_path, *texts, values=values))


def test_a_key_takes_back_what_an_earlier_source_says_by_another_key(tmp_path: Path) -> None:
    file = "papers: [greatti2019]\nseeds: [1, 2]\n"
    study = load_study(configured(tmp_path, file, values=("experiments=demo", "repeats=7")))
    assert list(study.experiments) == ["demo"]
    assert {cell.seed for cell in study.cells} == set(range(1, 8))
    kept = load_study(configured(tmp_path, file, values=("experiments=null", "repeats=null")))
    assert "greatti-depth" in kept.experiments
    assert kept.config.seeds == [1, 2]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot read .*none.yaml: No such file"):
        read_configuration([tmp_path / "none.yaml"])


def test_one_of_something_needs_no_list() -> None:
    study = load_study({"experiments": "zaremba-small", "seeds": 4, "frameworks": "jax"})
    assert [cell.path for cell in study.cells] == ["zaremba-small/jax/devices-1/seed-4"]


def test_a_number_may_be_written_as_yaml_1_2_has_it() -> None:
    assert STUDY.specification("demo-lstm+learning_rate=1e-05").recipe.learning_rate == 1e-5
    for text, value in {"1e-3": 1e-3, "010": 10, "[010, 020]": [10, 20], "1:30": "1:30"}.items():
        assert parse_yaml(text, "text") == value
    assert parse_yaml("yes", "text") == "yes"


def test_numbers_with_a_leading_nought_are_decimal_in_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = "{recipe: r, sweep: {batch_size: [010, 020]}}"
    folder_with(
        tmp_path,
        monkeypatch,
        f"recipes: {{r: {{}}}}\nexperiments: {{e: {{title: T, variants: [{variant}]}}}}\n",
    )
    cells = load_study({"experiments": ["e"]}).cells
    assert {cell.variant for cell in cells} == {"r", "r+batch_size=10"}  # 20 is the default


def test_a_document_s_name_selects_all_its_experiments_and_its_folder_is_its_name() -> None:
    assert set(LIBRARY.papers) == {path.name for path in (ROOT / "workflow/papers").iterdir()}
    assert set(read_papers()) == set(LIBRARY.papers)
    for paper, names in LIBRARY.papers.items():
        assert list(load_study({"papers": paper}).experiments) == names
    both = load_study({"papers": ["greatti2019"], "experiments": ["demo", "greatti-depth"]})
    assert list(both.experiments) == [
        "demo", "greatti-depth", "greatti-hidden", "greatti-context", "greatti-cells"
    ]  # fmt: skip


def test_all_experiments_can_be_asked_for_at_once() -> None:
    assert set(load_study({"experiments": "all"}).experiments) == set(LIBRARY.experiments)


def test_documents_count_beside_all_experiments() -> None:
    with pytest.raises(ConfigurationError, match=r'papers: there is no paper "zarembo2014"'):
        load_study({"experiments": "all", "papers": ["zarembo2014"]})


def test_a_key_that_others_make_effective_is_refused_in_variants_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe may have it, and a variant may have it with what makes it effective."""
    text = (
        "recipes: {r: {adam_beta1: 0.5}}\n"
        "experiments: {e: {title: T, variants: [r, r+adam_beta1=0.6+optimizer=adam]}}\n"
    )
    folder_with(tmp_path, monkeypatch, text)
    assert len(load_study({"experiments": ["e"]}).experiments["e"].specifications) == 2
    for key, (other, values) in NEEDS.items():
        assert {key, other} < Recipe.model_fields.keys()
        assert Recipe().model_dump()[other] not in values or key == "constant_epochs"


def test_repeats_are_the_seeds_from_one(tmp_path: Path) -> None:
    study = load_study(configured(tmp_path, values=("repeats=10",)))
    assert {cell.seed for cell in study.cells} == set(range(1, 11))
    with pytest.raises(ConfigurationError, match="seeds and repeats exclude each other"):
        load_study({"seeds": [1], "repeats": 2})


def test_the_plan_of_an_analysis_is_short_however_many_cells_there_are() -> None:
    """Linux allows 128 KiB for an argument of a command."""
    study = load_study({"experiments": ["zhang-mos-number"], "seeds": list(range(1000))})
    assert len(study.cells) == 21 * 5 * 1000
    assert len(study.plan("zhang-mos-number")) < 20_000
    plan = plan_experiment(load_study({"experiments": ["zhang-mos"]}), "zhang-mos")
    assert plan.cells == load_study({"experiments": ["zhang-mos"]}).experiment("zhang-mos").cells


def test_the_configuration_as_json_makes_the_same_study() -> None:
    study = load_study({"papers": "greatti2019", "seeds": [3], "mirrors": {"ptb": "file:/x"}})
    again = load_study(json.loads(study.configuration))
    assert (again.config, again.cells) == (study.config, study.cells)


def test_speed_is_measured_with_penn_treebank_s_number_of_words_and_alone() -> None:
    study = load_study({"experiments": "speed"})
    [corpus] = {study.recipe(cell.path).corpus for cell in study.cells}
    assert study.corpora[corpus].words + 1 == 10_000
    assert all(study.recipe(cell.path).alone for cell in study.cells)
    assert len(study.cells) == 3 * 5 * 2 * 2 * 3


def test_a_study_is_read_back_as_it_was_planned(tmp_path: Path) -> None:
    asked = {"papers": ["zaremba2014"], "seeds": [4], "accelerator": "cuda"}
    study = load_study(asked | {"mirrors": {"ptb": "file:x"}})
    beyond = study.specification("demo-lstm+dropout=0.3")
    study.write(tmp_path / "study.json", ["a cell"], "snakemake --cores 2")
    again = read_study(tmp_path / "study.json")
    assert again == study
    assert again.specification(beyond.variant) == beyond
    assert [s.text() for e in again.experiments.values() for s in e.specifications] == [
        s.text() for e in study.experiments.values() for s in e.specifications
    ]


def test_of_a_folder_the_content_counts_and_not_the_place(tmp_path: Path) -> None:
    def fingerprint(name: str, text: str, **pinned: Any) -> str:
        folder = tmp_path / name
        folder.mkdir()
        for split in SPLITS:
            (folder / f"{split}.txt").write_text(text)
        own = {"ptb": {"kind": "folder", "folder": str(folder), **pinned}}
        return load_study({"corpora": own}).specification("zaremba-small").fingerprint

    base = fingerprint("one", "a b\n")
    assert fingerprint("copied", "a b\n") == base
    assert fingerprint("other", "a b b\n") != base
    digest = hashlib.sha256(b"a b\n").hexdigest()
    assert fingerprint("pinned", "not read", files=dict.fromkeys(SPLITS, digest)) == base


def test_a_name_that_no_folder_can_have_is_refused() -> None:
    study = load_study({"experiments": ["demo"]})
    sizes = "embedding_size=7+epochs=9+hidden_size=7+learning_rate=0.123456789012345"
    assert study.specification(f"demo-lstm+{sizes}").recipe.epochs == 9
    more = "sequence_length=7+softmax_bias=false+temporal_activation_regularization=0.123456789"
    name = f"demo-lstm+divergence_perplexity=123456+{sizes}+{more}+weight_decay=0.001"
    with pytest.raises(ConfigurationError, match=r"has 2\d\d characters and may have 200; make a"):
        study.specification(name)


def test_a_corpus_may_be_called_first_or_have_a_subset() -> None:
    own = {"my-first-corpus": {"kind": "folder", "folder": "x"}}
    study = load_study({"experiments": ["demo"], "corpora": own})
    assert study.corpus("my-first-corpus")[::2] == ("my-first-corpus", None)
    assert study.corpus("my-first-corpus-first-20-lines")[::2] == ("my-first-corpus", 20)


def test_the_global_batch_is_shared_or_given_to_each_device() -> None:
    assert Recipe(batch_size=20).global_batch_size(2) == 20
    assert Recipe(batch_size=20, batch_scope="per_device").global_batch_size(2) == 40


def test_any_variant_can_be_specified_but_only_by_its_own_name() -> None:
    study = load_study({"experiments": ["demo"]})
    assert study.specification("zaremba-small+dropout=0.5").recipe.dropout == 0.5
    with pytest.raises(ConfigurationError, match=r"is written zaremba-small\+dropout=0.5"):
        study.specification("zaremba-small+dropout=0.50")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("zaremba-smal/jax/devices-1/seed-1", r"did you mean zaremba-small\?"),
        ("demo-lstm+droput=1/jax/devices-1/seed-1", r"did you mean dropout\?"),
        ("demo-lstm/torch/devices-1/seed-1", r"there is no framework \"torch\".* pytorch"),
        ("demo-lstm/jax/devices-3/seed-1", r"batch_size=20 does not divide by devices=3"),
        ("demo-lstm/jax/devices-0/seed-1", r"devices: 0 is not allowed"),
        ("demo-lstm/jax/devices-two/seed-1", r"is not of the form variant/framework/devices-N"),
        ("demo-lstm/jax/devices-1/seed-2147483648", r"seed: 2147483648 is not allowed"),
        ("demo-lstm/jax/devices-1/seed-01", r"is written results/cells/demo-lstm/.*/seed-1$"),
        ("demo-lstm+kernel=block/jax/devices-1/seed-1", r"kernel=block, which jax does not have"),
        (
            "demo-lstm+precision=bfloat16/mxnet/devices-1/seed-1",
            r"precision=bfloat16, which mxnet does not have",
        ),
    ],
)
def test_a_cell_that_cannot_be_is_refused_by_its_path(path: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^results/cells/{re.escape(path)}: .*{message}"):
        STUDY.corpus_of_cell(path)


def test_an_experiment_that_the_study_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigurationError, match='the study has no experiment "x"; it has demo'):
        STUDY.experiment("x")


def test_any_cell_that_can_be_has_a_corpus() -> None:
    assert STUDY.corpus_of_cell("zaremba-small+subset=9/jax/devices-2/seed-7") == (
        "ptb-first-9-lines"
    )


def test_the_fingerprint_follows_the_meaning_and_nothing_else() -> None:
    def fingerprint(variant: str = "zaremba-small", **config: Any) -> str:
        study = load_study({"experiments": ["demo"], **config})
        return study.specification(variant).fingerprint

    base = fingerprint()
    assert fingerprint(mirrors={"ptb": "file:elsewhere"}) == base
    assert fingerprint(seeds=[7], threads=3, frameworks=["jax"]) == base
    assert fingerprint("zaremba-small+dropout=0.5") != base
    assert fingerprint(accelerator="cuda") != base
    other_text = {"kind": "folder", "folder": "x", "files": dict.fromkeys(SPLITS, "0" * 64)}
    assert fingerprint(corpora={"ptb": other_text}) != base
    written = Specification.model_validate_json(
        load_study({"experiments": ["demo"]}).specification("zaremba-small").text()
    )
    assert written.fingerprint == base  # what the trainer reads means the same
    assert set(json.loads(written.text())["recipe"]) <= {  # keys at their defaults are left out
        "corpus", "constant_epochs"
    }  # fmt: skip


def test_a_framework_can_have_a_kind_of_device_of_its_own(tmp_path: Path) -> None:
    gpus = {"experiments": ["demo"], "accelerator": "cuda"}
    mixed, all_gpus, all_cpus = (
        load_study(gpus | {"accelerators": {"mxnet": "cpu"}}),
        load_study(gpus), load_study({"experiments": ["demo"]}),
    )  # fmt: skip
    (tmp_path / "corpus.json").write_text(
        '{"tokens": {"train": 9000, "valid": 9, "test": 9}, "vocabulary_size": 9}'
    )
    corpus = str(tmp_path / "corpus.json")
    for cell in mixed.cells:
        alike = all_cpus if cell.framework == "mxnet" else all_gpus
        assert mixed.fingerprint(cell.path) == alike.fingerprint(cell.path)
        assert mixed.text(cell.variant, cell.framework) == alike.text(cell.variant, cell.framework)
        asked = mixed.memory_megabytes(cell.path, corpus), mixed.runtime_minutes(cell.path, corpus)
        assert asked == (
            alike.memory_megabytes(cell.path, corpus), alike.runtime_minutes(cell.path, corpus)
        )  # fmt: skip
    kinds = json.loads(mixed.plan("demo"))["accelerators"]
    assert kinds == dict.fromkeys(FRAMEWORKS, "cuda") | {"mxnet": "cpu"}


def test_a_cells_path_reads_back_as_the_cell() -> None:
    study = load_study({"experiments": ["demo"]})
    assert [parse_cell_path(cell.path) for cell in study.cells] == list(study.cells)


def test_the_recipes_of_zaremba_are_those_of_the_thesis() -> None:
    """Zhang 2018, Table A.1."""
    columns = {
        "initialization_scale": (0.1, 0.05, 0.04),
        "learning_rate": (1.0, 1.0, 1.0),
        "clip_norm": (5.0, 5.0, 10.0),
        "layers": (2, 2, 2),
        "hidden_size": (200, 650, 1500),
        "embedding_size": (200, 650, 1500),
        "batch_size": (20, 20, 20),
        "sequence_length": (20, 35, 35),
        "constant_epochs": (4, 6, 14),
        "epochs": (13, 39, 55),
        "dropout": (0.0, 0.5, 0.65),  # one minus the keeping probability
        "learning_rate_decay": (0.5, 0.8, 1 / 1.15),
    }
    study = load_study({"experiments": ["demo"]})
    for column, size in enumerate(("small", "medium", "large")):
        recipe = study.specification(f"zaremba-{size}").recipe
        for key, values in columns.items():
            assert getattr(recipe, key) == pytest.approx(values[column], rel=1e-15), (size, key)


def test_a_job_asks_for_no_more_than_the_configuration_allows(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.json"
    tokens = {"train": 929_589, "valid": 73_760, "test": 82_430}
    corpus.write_text(json.dumps({"tokens": tokens, "vocabulary_size": 10_000}))
    cell = "zaremba-large/jax/devices-1/seed-1"
    free = load_study({"experiments": ["zaremba-large"]})
    capped = load_study({"experiments": ["zaremba-large"], "max_memory": 2000, "max_runtime": 90})
    for times in (1, 3):
        assert free.memory_megabytes(cell, str(corpus), times) > 2000 * times
        assert free.runtime_minutes(cell, str(corpus), times) > 90 * times
        assert capped.memory_megabytes(cell, str(corpus), times) == 2000
        assert capped.runtime_minutes(cell, str(corpus), times) == 90


def test_config_yaml_names_every_key_with_its_default() -> None:
    written = yaml.safe_load((ROOT / "config.yaml").read_text())
    assert written == Config().model_dump(mode="json")


LIBRARY = load_library()


@pytest.mark.parametrize("name", LIBRARY.experiments)
def test_every_experiment_can_be_planned_in_the_frameworks_it_names(name: str) -> None:
    planned = load_study({"experiments": [name]}).experiments[name]
    assert {cell.framework for cell in planned.cells} == set(LIBRARY.experiments[name].frameworks)
    assert len({cell.variant for cell in planned.cells}) >= len(LIBRARY.experiments[name].variants)
    for cell in planned.cells:  # or no rule of the workflow would make it
        assert parse_cell_path(cell.path) == cell


def test_the_recipes_of_the_documents_are_those_of_their_tables() -> None:
    millions = {
        "zaremba-small": "4.652", "zaremba-medium": "19.775", "zaremba-large": "66.022",
        "zhang-bm": "41.520", "zhang-bmlg": "41.520",
        "singh-lstm1": "16.395", "singh-lstm2": "19.780", "singh-mos": "24.018",
    }  # fmt: skip
    for name, published in millions.items():
        assert f"{parameter_count(LIBRARY.recipes[name], 10_000) / 1e6:.3f}" == published, name
    # AWD-LSTM and its mixture print whole millions: 24 and 22
    assert parameter_count(LIBRARY.recipes["awd-lstm"], 10_000) == 24_221_600
    assert round(parameter_count(LIBRARY.recipes["awd-lstm-mos"], 10_000) / 1e6) == 22


def test_sparselang_s_second_experiment_keeps_as_many_weights_at_every_width() -> None:
    """SparseLang 2018: those of the model that keeps 1 % of the 81 million of its Table 1."""
    planned = load_study({"experiments": ["sparselang-weights"]}).experiments["sparselang-weights"]
    kept = {}
    for recipe in (specification.recipe for specification in planned.specifications):
        if recipe.kept_weights < 1:
            assert recipe.embedding_size == recipe.hidden_size
            kept[recipe.kept_weights] = sum(
                kept_count(recipe, name, shape)
                for name, shape in parameter_shapes(recipe, 10_000).items()
                if name.endswith((".input", ".recurrent"))
            )
    assert list(kept) == [0.01, 0.005, 0.002, 0.001, 0.0005, 0.0001]
    for count in kept.values():
        assert count == pytest.approx(810_000, abs=50)


def test_a_run_on_two_nodes_asks_each_for_the_parameters_of_its_own_devices(
    tmp_path: Path,
) -> None:
    corpus = tmp_path / "corpus.json"
    tokens = {"train": 929_589, "valid": 73_760, "test": 82_430}
    corpus.write_text(json.dumps({"tokens": tokens, "vocabulary_size": 10_000}))
    settings = {"experiments": ["zaremba-large"], "accelerator": "cuda", "devices": [2, 4]}
    whole, halves = load_study(settings), load_study(settings | {"devices_per_node": 2})
    of_two, of_four = (f"zaremba-large/jax/devices-{count}/seed-1" for count in (2, 4))
    assert halves.memory_megabytes(of_two, str(corpus)) == whole.memory_megabytes(
        of_two, str(corpus)
    )
    assert halves.memory_megabytes(of_four, str(corpus)) < whole.memory_megabytes(
        of_four, str(corpus)
    )
