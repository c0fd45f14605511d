"""Words and integers: order, unknown words, and that nothing is lost on the way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptbench.corpus import CorpusError
from ptbench.corpus.vocabulary import (
    END_OF_SENTENCE,
    Encoder,
    build_vocabulary,
    tokenize,
)

# Anything that is not white space, or half of a surrogate pair, can be in a word; `<eos>` is none.
WORDS = st.text(st.characters(codec="utf-8"), min_size=1).map(str.strip)
WORDS = WORDS.filter(lambda word: len(word.split()) == 1 and word != END_OF_SENTENCE)
LINES = st.lists(st.lists(WORDS, max_size=6), max_size=6)


def test_a_newline_becomes_eos() -> None:
    assert tokenize(" a b \n\nc\n") == ["a", "b", "<eos>", "<eos>", "c", "<eos>"]


def test_lines_that_end_as_on_windows_have_the_same_words() -> None:
    assert tokenize("a b\r\nc\r\n") == tokenize("a b\nc\n")


def test_words_are_sorted_by_falling_count_and_then_by_name() -> None:
    train = tokenize("b b b a c c Z\nc b\n")
    assert build_vocabulary(train) == ["b", "c", "<eos>", "Z", "a"]


def test_known_words_are_in_the_vocabulary_though_train_lacks_them() -> None:
    assert build_vocabulary(["b", "b", "c"], known=["d", "c", "a"]) == ["b", "c", "a", "d"]


def test_a_word_outside_the_vocabulary_becomes_unk_and_is_counted() -> None:
    encoder = Encoder(["<unk>", "<eos>", "a"])
    identifiers, outside = encoder.encode(tokenize("a x\n<unk> y\n"), "valid.txt")
    assert identifiers.tolist() == [2, 0, 1, 0, 0, 1]
    assert outside == 2


def test_without_unk_a_word_outside_is_an_error_that_names_word_file_and_line() -> None:
    encoder = Encoder(["a", "<eos>"])
    with pytest.raises(CorpusError, match=r"^my/valid\.txt, line 3: the word 'zebra' is not"):
        encoder.encode(tokenize("a\n\na zebra a\nyak\n"), "my/valid.txt")


@given(LINES)
def test_encoding_and_decoding_gives_the_text_back(lines: list[list[str]]) -> None:
    text = "".join(" ".join(line) + "\n" for line in lines)
    words = tokenize(text)
    vocabulary = build_vocabulary(words)
    identifiers, outside = Encoder(vocabulary).encode(words, "train")
    assert outside == 0
    assert len(words) == sum(len(line) + 1 for line in lines)
    decoded = " ".join(vocabulary[each] for each in identifiers).split("<eos>")
    assert [line.split() for line in decoded[:-1]] == lines


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=200))
def test_identifiers_fall_in_frequency(train: list[str]) -> None:
    vocabulary = build_vocabulary(train)
    counts = [train.count(word) for word in vocabulary]
    assert sorted(vocabulary) == sorted(set(train))
    assert counts == sorted(counts, reverse=True)
