"""From raw text to a prepared corpus, and back from the store."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ptbench.corpus import CorpusError
from ptbench.corpus.definitions import CORPUS_DEFINITION, CorpusDefinition, FolderCorpus
from ptbench.corpus.ngrams import KneserNey, mean_nll
from ptbench.corpus.prepare import first_lines, prepare
from ptbench.corpus.sources import Integers, Source
from ptbench.corpus.store import open_corpus, read_vocabulary
from ptbench.model.recipe import TokenSource

ROOT = Path(__file__).parents[2]
PTB = ROOT.parent / "shared" / "data" / "ptb"
ENDS = ["npy", "txt", "index.npy"]
BUILT_IN = yaml.safe_load((ROOT / "workflow" / "corpora.yaml").read_text(encoding="utf-8"))[
    "corpora"
]
PARTS = sorted(
    ["corpus.json", "vocabulary.txt"]
    + [f"{split}.{end}" for split in ("train", "valid", "test") for end in ENDS]
)
TEXTS = {
    "train": b"the cat sat\nthe dog\n<unk> sat\n",
    "valid": b"the dog sat\nthe yak sat\n",
    "test": b"cat\n\n",
}


def definition(name: str, **changes: Any) -> CorpusDefinition:
    return CORPUS_DEFINITION.validate_python({**BUILT_IN[name], **changes})


def folder_corpus(folder: Path, **texts: bytes | None) -> FolderCorpus:
    """A folder of one's own with the usual texts, or others, or (None) without one."""
    folder.mkdir(exist_ok=True)
    for split, text in {**TEXTS, **texts}.items():
        if text is not None:
            (folder / f"{split}.txt").write_bytes(text)
    return FolderCorpus(kind="folder", folder=folder)


def prepared(corpus: CorpusDefinition, folder: Path, subset: int | None = None) -> Path:
    prepare("mine", corpus, subset, folder / "downloads", folder / "out")
    return folder / "out"


def identifiers(source: Source) -> list[int]:
    """All tokens of a split."""
    tokens: list[int] = source.reader().read(len(source)).tolist()
    return tokens


@pytest.mark.parametrize("source", get_args(TokenSource))
def test_a_corpus_comes_back_from_the_store_as_it_was(tmp_path: Path, source: TokenSource) -> None:
    folder = prepared(folder_corpus(tmp_path / "raw"), tmp_path)
    corpus, words = open_corpus(folder, source), read_vocabulary(folder)
    # Counts 3 3 3 2 2 ... in train: the 2, <eos> 3, sat 2; then one each, by name.
    assert words == ["<eos>", "sat", "the", "<unk>", "cat", "dog"]
    assert corpus.vocabulary_size == 6
    as_text = {s: " ".join(words[i] for i in identifiers(getattr(corpus, s))) for s in TEXTS}
    assert as_text == {
        "train": "the cat sat <eos> the dog <eos> <unk> sat <eos>",
        "valid": "the dog sat <eos> the <unk> sat <eos>",
        "test": "cat <eos> <eos>",
    }
    assert corpus.description["out_of_vocabulary"] == {"train": 0, "valid": 1, "test": 0}
    assert sorted(path.name for path in folder.iterdir()) == PARTS


def test_integers_are_in_memory_or_mapped_from_their_file_as_asked(tmp_path: Path) -> None:
    folder = prepared(folder_corpus(tmp_path / "raw"), tmp_path)
    for source, mapped in {"memory": False, "memory_map": True}.items():
        train = open_corpus(folder, cast("TokenSource", source)).train
        assert isinstance(train, Integers)
        assert train.tokens.dtype == np.int32
        assert isinstance(train.tokens.base, np.memmap) == mapped


def test_a_corpus_needs_nothing_outside_its_folder(tmp_path: Path) -> None:
    folder = prepared(folder_corpus(tmp_path / "raw"), tmp_path)
    expected = identifiers(open_corpus(folder).train)
    shutil.rmtree(tmp_path / "raw")
    moved = folder.rename(tmp_path / "elsewhere")
    for source in get_args(TokenSource):
        assert identifiers(open_corpus(moved, source).train) == expected


def test_the_text_of_a_subset_is_that_of_its_lines(tmp_path: Path) -> None:
    folder = prepared(folder_corpus(tmp_path / "raw", train=b"a <unk>\nb\nc\n"), tmp_path, subset=2)
    assert (folder / "train.txt").read_bytes() == b"a <unk>\nb\n"


def test_corpus_json_has_the_facts(tmp_path: Path) -> None:
    folder = prepared(folder_corpus(tmp_path / "raw"), tmp_path)
    facts = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    assert facts["name"] == "mine"
    assert facts["subset"] is None
    assert facts["definition"]["kind"] == "folder"
    assert facts["tokens"] == {"train": 10, "valid": 8, "test": 3}
    assert facts["types"] == {"train": 6, "valid": 5, "test": 2}
    # Counts in train: <eos> 3, the 2, sat 2 and three words of 1, of 10.
    shares = [0.3, 0.2, 0.2, 0.1, 0.1, 0.1]
    entropy = -sum(p * math.log(p) for p in shares)
    assert facts["unigram_entropy_nats"] == pytest.approx(entropy, rel=1e-12)
    assert facts["unigram_perplexity"] == pytest.approx(math.exp(entropy), rel=1e-12)
    assert facts["raw_sha256"] == {s: hashlib.sha256(t).hexdigest() for s, t in TEXTS.items()}
    assert facts["sha256"] == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in PARTS[1:]
    }
    assert facts["seconds"].keys() == {"load", "preprocess", "index"}
    assert all(0 < seconds < 60 for seconds in facts["seconds"].values())
    assert "floor_perplexity" not in facts
    train, test = (np.load(folder / f"{split}.npy") for split in ("train", "test"))
    end = read_vocabulary(folder).index("<eos>")
    for order in (3, 5):
        expected = mean_nll(KneserNey(train, order, facts["vocabulary_size"], end), test)
        assert facts["kneser_ney_nll_nats"][str(order)]["test"] == expected


def test_subset_takes_the_first_lines_of_every_split(tmp_path: Path) -> None:
    folder = prepared(folder_corpus(tmp_path / "raw", train=b"a <unk>\nb\nc\n"), tmp_path, subset=1)
    corpus = open_corpus(folder)
    assert read_vocabulary(folder) == ["<eos>", "<unk>", "a"]  # b and c are not in these lines
    assert [len(corpus.train), len(corpus.valid), len(corpus.test)] == [3, 4, 2]
    assert corpus.description["subset"] == 1


def test_a_subset_larger_than_the_corpus_is_the_corpus(tmp_path: Path) -> None:
    folder = prepared(folder_corpus(tmp_path / "raw"), tmp_path, subset=1000)
    assert open_corpus(folder).description["tokens"] == {"train": 10, "valid": 8, "test": 3}


@given(st.text(st.sampled_from("ab \n\r\x0b\x85\u2028")), st.integers(1, 8))
def test_first_lines_are_those_that_newlines_end(text: str, count: int) -> None:
    kept = first_lines(text + "\n", count)
    assert (text + "\n").startswith(kept)
    assert kept.endswith("\n")
    assert kept.count("\n") == min(count, text.count("\n") + 1)


MALFORMED = {
    "an empty file": (b"", r"valid\.txt is empty; it must hold text"),
    "blank lines alone": (b" \n\n", r"valid\.txt has no words"),
    "not UTF-8": (
        b"the\ndog \xff\n",
        r"valid\.txt, line 2: byte 8 of the file, 0xff, is not UTF-8",
    ),
    "not UTF-8 after a byte order mark": (
        b"\xef\xbb\xbfthe\n\xe9\n",
        r"line 2: byte 7 of the file, 0xe9, is not UTF-8",
    ),
    "UTF-16": ("the\n".encode("utf-16"), r"line 1: byte 0 of the file, 0xff, is not UTF-8"),
    "no newline at the end": (
        b"the\ndog",
        r"valid\.txt does not end in a newline, so its last line, 2, may be cut off",
    ),
    "the end of a sentence written out": (b"the\ndog <eos>\n", r"valid\.txt, line 2: .* <eos>"),
    "no such file": (None, r"has no valid\.txt; it must hold train\.txt, valid\.txt and test\.txt"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_text_is_one_sentence_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    text, sentence = MALFORMED[case]
    corpus = folder_corpus(tmp_path / "raw", valid=text)
    with pytest.raises(CorpusError, match=sentence) as caught:
        prepared(corpus, tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_word_outside_a_vocabulary_without_unk_names_word_file_and_line(tmp_path: Path) -> None:
    corpus = folder_corpus(tmp_path / "raw", train=b"the dog sat cat\n")
    with pytest.raises(CorpusError, match=r"raw/valid\.txt, line 2: the word 'yak' is not"):
        prepared(corpus, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_word_outside_a_subset_asks_for_more_lines(tmp_path: Path) -> None:
    corpus = folder_corpus(tmp_path / "raw", train=b"the dog\na <unk> yak sat cat\n")
    with pytest.raises(CorpusError, match="use more lines than subset=1"):
        prepared(corpus, tmp_path, subset=1)


@pytest.mark.parametrize("ending", [b"\r\n", b"\r"], ids=["Windows", "old Mac"])
def test_carriage_returns_end_lines_too(tmp_path: Path, ending: bytes) -> None:
    usual = prepared(folder_corpus(tmp_path / "usual"), tmp_path / "a")
    texts = {split: text.replace(b"\n", ending) for split, text in TEXTS.items() if text}
    other = prepared(folder_corpus(tmp_path / "other", **texts), tmp_path / "b")
    for split in ("train", "valid", "test"):
        expected = identifiers(getattr(open_corpus(usual), split))
        assert identifiers(getattr(open_corpus(other), split)) == expected


def test_text_without_spaces_is_prepared_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "".join(f"{word}\n" for word in ["\u6211\u5011", "\u4f60\u5011", "\u4ed6"] * 30)
    text = lines.encode()
    prepared(folder_corpus(tmp_path / "raw", train=text, valid=text, test=text), tmp_path)
    said = capsys.readouterr().err
    assert "90 words of 3 kinds in 90 lines" in said
    assert "separate its words first" in said


def test_ordinary_text_is_prepared_without_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = b"the dog sat\n" * 20
    prepared(folder_corpus(tmp_path / "raw", train=text, valid=text, test=text), tmp_path)
    assert capsys.readouterr().err == ""


def test_a_folder_in_the_place_of_a_file_is_said(tmp_path: Path) -> None:
    corpus = folder_corpus(tmp_path / "raw", test=None)
    (tmp_path / "raw" / "test.txt").mkdir()
    with pytest.raises(CorpusError, match=r"has no test\.txt"):
        prepared(corpus, tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_first_word(tmp_path: Path) -> None:
    corpus = folder_corpus(tmp_path / "raw", train=b"\xef\xbb\xbf" + TEXTS["train"])
    assert "the" in read_vocabulary(prepared(corpus, tmp_path))
    assert open_corpus(tmp_path / "out").vocabulary_size == 6


def test_an_output_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(CorpusError, match=r"corpus mine cannot be written to .*out: File exists"):
        prepared(folder_corpus(tmp_path / "raw"), tmp_path)
    assert (tmp_path / "out").read_text() == "in the way"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output_is_said(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o555)
    with pytest.raises(CorpusError, match=r"cannot be written to .*out: Permission denied"):
        prepared(folder_corpus(tmp_path / "raw"), tmp_path)


def test_a_full_disk_leaves_the_corpus_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepared(folder_corpus(tmp_path / "raw"), tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(CorpusError, match=r"cannot be written to .*: No space left on device"):
        prepared(folder_corpus(tmp_path / "raw", train=b"another <unk>\n"), tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_corpus_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"there is no prepared corpus in .*nowhere"):
        open_corpus(tmp_path / "nowhere")


def damage_length(folder: Path) -> None:
    np.save(folder / "valid.npy", np.zeros(7, np.int32))


def damage_type(folder: Path) -> None:
    np.save(folder / "valid.npy", np.zeros(8, np.int64))


def cut_off(folder: Path) -> None:
    (folder / "valid.npy").write_bytes((folder / "valid.npy").read_bytes()[:-4])


def empty(folder: Path) -> None:
    (folder / "valid.npy").write_bytes(b"")


def cut_off_description(folder: Path) -> None:
    (folder / "corpus.json").write_text('{"vocabulary_size": ')


def no_counts(folder: Path) -> None:
    (folder / "corpus.json").write_text('{"vocabulary_size": 6}')


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (damage_length, r"valid\.npy holds int32 \[7\] where corpus\.json has int32 \[8\]"),
        (damage_type, r"valid\.npy holds int64 \[8\] where corpus\.json has int32 \[8\]"),
        (cut_off, "is damaged"),
        (empty, "is damaged"),
        (cut_off_description, "is damaged"),
        (no_counts, "is damaged"),
    ],
)
def test_a_damaged_corpus_is_not_opened(tmp_path: Path, damage: Any, sentence: str) -> None:
    folder = prepared(folder_corpus(tmp_path / "raw"), tmp_path)
    damage(folder)
    with pytest.raises(CorpusError, match=sentence):
        open_corpus(folder)


@pytest.mark.parametrize("name", ["synthetic", "synthetic-high-rank"])
def test_a_synthetic_corpus_records_its_floor(tmp_path: Path, name: str) -> None:
    corpus = definition(name)
    facts = open_corpus(prepared(corpus, tmp_path)).description
    assert facts["floor_perplexity"] == pytest.approx(math.exp(facts["entropy_rate_nats"]))
    assert facts["best_bigram_nll_nats"] >= facts["entropy_rate_nats"] - 1e-12
    for split, tokens in facts["tokens"].items():
        assert tokens >= getattr(corpus, f"{split}_tokens")
        true = facts["true_process"][split]
        assert abs(true["nll_nats"] - facts["entropy_rate_nats"]) < 4 * true["standard_error_nats"]
    assert facts["types"]["train"] == facts["vocabulary_size"]
    assert facts.get("log_probability_rank") == (63 if name == "synthetic-high-rank" else None)


def test_a_synthetic_subset_has_all_words_and_the_nll_of_its_own_lines(tmp_path: Path) -> None:
    corpus = definition("synthetic")
    whole = open_corpus(prepared(corpus, tmp_path / "whole")).description
    part = open_corpus(prepared(corpus, tmp_path / "part", subset=40)).description
    assert part["vocabulary_size"] == whole["vocabulary_size"]
    assert part["floor_perplexity"] == whole["floor_perplexity"]
    assert part["true_process"]["test"]["nll_nats"] != whole["true_process"]["test"]["nll_nats"]
    assert (
        part["true_process"]["test"]["standard_error_nats"]
        > whole["true_process"]["test"]["standard_error_nats"]
    )


def test_one_synthetic_sentence_has_no_standard_error(tmp_path: Path) -> None:
    facts = open_corpus(prepared(definition("synthetic"), tmp_path, subset=1)).description
    assert facts["true_process"]["test"]["standard_error_nats"] is None


def test_preparing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (
        prepared(definition("synthetic"), tmp_path / name) for name in ("first", "second")
    )
    for name in PARTS[1:]:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_corpus_prepared_without_its_text_cannot_be_streamed(tmp_path: Path) -> None:
    folder = prepared(folder_corpus(tmp_path / "raw"), tmp_path)
    (folder / "valid.txt").unlink()
    with pytest.raises(CorpusError, match=r"lacks .*valid\.txt; remove .*corpus\.json and run"):
        open_corpus(folder, "stream")
    open_corpus(folder)


@pytest.mark.parametrize(
    "text", [b"the dog sat\nthe yak sat", b"the dog sat\nthe yak_sat\n"], ids=["length", "words"]
)
def test_a_text_that_was_changed_is_not_streamed(tmp_path: Path, text: bytes) -> None:
    folder = prepared(folder_corpus(tmp_path / "raw"), tmp_path)
    (folder / "valid.txt").write_bytes(text)
    with pytest.raises(CorpusError, match=r"valid\.txt has"):
        identifiers(open_corpus(folder, "stream").valid)


needs_ptb = pytest.mark.skipif(
    not PTB.is_dir(), reason="the Penn Treebank is licensed text and not beside this checkout"
)


def ptb(**changes: Any) -> CorpusDefinition:
    """The built-in definition, its files taken from a local folder."""
    paths = {split: f"ptb.{split}.txt" for split in TEXTS}
    mirror = {"url": PTB.as_uri(), "format": "plain", "paths": paths}
    return definition("ptb", mirrors=[mirror], **changes)


@needs_ptb
def test_the_penn_treebank_has_its_published_counts(tmp_path: Path) -> None:
    folder = prepared(ptb(), tmp_path)
    corpus, words = open_corpus(folder), read_vocabulary(folder)
    assert corpus.description["tokens"] == {"train": 929_589, "valid": 73_760, "test": 82_430}
    assert corpus.description["types"]["train"] == corpus.vocabulary_size == 10_000
    assert corpus.description["out_of_vocabulary"] == {"train": 0, "valid": 0, "test": 0}
    # The most frequent words, as in the TensorFlow PTB tutorial, which sorts in the same way.
    assert words[:5] == ["the", "<unk>", "<eos>", "N", "of"]
    first_line = (PTB / "ptb.valid.txt").read_text().split("\n")[0].split()
    first = corpus.valid.reader().read(len(first_line) + 1)
    assert [words[i] for i in first] == [*first_line, "<eos>"]
    streamed = open_corpus(folder, "stream")
    for split in TEXTS:
        assert identifiers(getattr(streamed, split)) == identifiers(getattr(corpus, split))


@needs_ptb
def test_altered_penn_treebank_is_refused(tmp_path: Path) -> None:
    wrong = {**BUILT_IN["ptb"]["files"], "test": "0" * 64}
    with pytest.raises(CorpusError, match=r"the test file of .* has the wrong checksum"):
        prepared(ptb(files=wrong), tmp_path)
