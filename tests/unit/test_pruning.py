"""A pruned model has the largest weights of its gate matrices, and is a checkpoint like others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support.checkpoints import save_model, small_corpus
from tests.support.problems import new_oracle, random_parameters, recipe

from ptbench.cli import main
from ptbench.training.checkpoints import read_arrays
from ptbench.training.inference import build, evaluate_split, open_corpus_of, read_checkpoint

MODEL = recipe(layers=1, embedding_size=4, hidden_size=4, test_batch_size=3)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruning")
    parameters = random_parameters(MODEL, seed=1)
    return save_model(folder / "best.safetensors", MODEL, parameters, small_corpus(folder))


def test_the_largest_weights_of_the_gate_matrices_stay(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = path.parent / "new" / "pruned.safetensors"
    main(["prune", str(path), "--keep", "0.25", "--output", str(output)])
    assert "has 32 of 128 weights" in capsys.readouterr().out
    whole, pruned = read_checkpoint(path).parameters, read_checkpoint(output).parameters
    for name, array in pruned.items():
        if name in ("rnn.0.input", "rnn.0.recurrent"):
            assert np.count_nonzero(array) == 16
            kept = array != 0
            np.testing.assert_array_equal(array[kept], whole[name][kept])
            assert np.abs(whole[name][kept]).min() >= np.abs(whole[name][~kept]).max()
        else:
            np.testing.assert_array_equal(array, whole[name])


def test_it_is_evaluated_as_a_model_with_zeros(path: Path) -> None:
    output = path.parent / "half.safetensors"
    main(["prune", str(path), "--keep", "0.5", "--output", str(output)])
    checkpoint = read_checkpoint(output)
    corpus = open_corpus_of(checkpoint)
    expected = new_oracle(MODEL)
    expected.load_parameters(checkpoint.parameters)
    found = evaluate_split(build(checkpoint, "oracle"), corpus, "test")
    assert found == evaluate_split(expected, corpus, "test")
    whole = evaluate_split(build(read_checkpoint(path), "oracle"), corpus, "test")
    assert found.nll != whole.nll
    assert read_arrays(output)[1]["pruned_to"] == "0.5"


def test_all_weights_are_the_model_itself(path: Path) -> None:
    output = path.parent / "all.safetensors"
    main(["prune", str(path), "--keep", "1", "--output", str(output)])
    for name, array in read_checkpoint(path).parameters.items():
        np.testing.assert_array_equal(read_checkpoint(output).parameters[name], array)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--keep", "0", "--output", "x"], "0 is not a share above 0, at most 1"),
        (["--keep", "0.5", "--output", "{path}"], "is the checkpoint itself; name another file"),
    ],
)
def test_bad_input_is_a_sentence(
    path: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = path.read_bytes()
    with pytest.raises(SystemExit) as ended:
        main(["prune", str(path), *(word.format(path=path) for word in arguments)])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
    assert path.read_bytes() == before
