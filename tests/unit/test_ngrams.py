"""Kneser-Ney n-grams agree with the textbook's formulas, written down one n-gram at a time."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.support.checkpoints import small_corpus

from ptbench.cli import main
from ptbench.corpus.ngrams import KneserNey, mean_nll
from ptbench.corpus.store import open_corpus

END, WORDS = 0, 12
Gram = tuple[int, ...]


class Direct:
    """Chen and Goodman 1999, equations 25 to 28, by counting; slow."""

    def __init__(self, text: Sequence[int], order: int) -> None:
        self.order = order
        sentences, sentence = [], [END]
        for word in text:
            sentence.append(word)
            if word == END:
                sentences.append(sentence)
                sentence = [END]
        raw: Counter[Gram] = Counter()
        for words in [*sentences, sentence]:
            for length in range(1, order + 1):
                # The <eos> in front of a sentence is context, and predicted nowhere.
                for start in range(0 if length > 1 else 1, len(words) - length + 1):
                    raw[tuple(words[start : start + length])] += 1
        before: dict[Gram, set[int]] = defaultdict(set)
        for gram in raw:
            if len(gram) > 1:
                before[gram[1:]].add(gram[0])
        self.counts = {
            gram: len(before[gram]) if len(gram) < order and before[gram] else count
            for gram, count in raw.items()
        }
        self.continuations: dict[Gram, dict[int, int]] = defaultdict(dict)
        for gram, count in self.counts.items():
            self.continuations[gram[:-1]][gram[-1]] = count

    def discount(self, length: int, count: int) -> float:
        seen = Counter(c for gram, c in self.counts.items() if len(gram) == length)
        if not all(seen[n] for n in (1, 2, 3, 4)):
            return 0.5
        share = seen[1] / (seen[1] + 2 * seen[2])
        found = [n - (n + 1) * share * seen[n + 1] / seen[n] for n in (1, 2, 3)]
        usable = all(0 < d < n for n, d in enumerate(found, 1))
        return found[min(count, 3) - 1] if usable else 0.5

    def probability(self, word: int, context: Gram) -> float:
        lower = self.probability(word, context[1:]) if context else 1 / WORDS
        known = self.continuations.get(context)
        if not known:
            return lower
        length, total = len(context) + 1, sum(known.values())
        left_over = sum(self.discount(length, count) for count in known.values())
        count = known.get(word, 0)
        own = count - self.discount(length, count) if count else 0.0
        return (own + left_over * lower) / total

    def log_probabilities(self, text: Sequence[int]) -> list[float]:
        found, sentence = [], [END]
        for word in text:
            context = tuple(sentence[len(sentence) - (self.order - 1) :]) if self.order > 1 else ()
            context = context if len(sentence) >= self.order - 1 else tuple(sentence)
            found.append(math.log(self.probability(word, context)))
            sentence = [END] if word == END else [*sentence, word]
        return found


def text(tokens: int, seed: int) -> list[int]:
    """Sentences in which some words are frequent, and some never occur."""
    random = np.random.default_rng(seed)
    weights = 1 / np.arange(1, WORDS - 1)
    drawn = random.choice(WORDS - 2, tokens, p=weights / weights.sum())
    return [*drawn.tolist(), END]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("tokens", [25, 400])  # too short for discounts, and long enough
def test_probabilities_are_those_of_the_formulas(order: int, tokens: int) -> None:
    train, test = text(tokens, seed=1), text(60, seed=2)
    model = KneserNey(np.array(train), order, WORDS, END)
    found = model.log_probabilities(np.array(test))
    np.testing.assert_allclose(found, Direct(train, order).log_probabilities(test), rtol=1e-12)


@pytest.mark.parametrize("context", [[], [1], [1, 2, 1, 1], [11, 11, 11], [1, END], [1, 11]])
def test_the_probabilities_of_all_words_sum_to_one(context: list[int]) -> None:
    """Behind contexts that occur, that do not, and at the beginning of a sentence."""
    model = KneserNey(np.array(text(400, seed=1)), 4, WORDS, END)
    last = [model.log_probabilities(np.array([*context, word]))[-1] for word in range(WORDS)]
    assert np.exp(last).sum() == pytest.approx(1, abs=1e-12)


def test_sentences_shorter_than_the_order_are_used_whole() -> None:
    short = [1, END, 2, END, 1, END]
    five, three = (KneserNey(np.array(short), order, WORDS, END) for order in (5, 3))
    expected = three.log_probabilities(np.array(short))
    np.testing.assert_array_equal(five.log_probabilities(np.array(short)), expected)


def test_the_command_scores_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = open_corpus(small_corpus(tmp_path))
    train, test = (each.reader().read(len(each)) for each in (corpus.train, corpus.test))
    main(["ngram", "--corpus", str(tmp_path / "corpora/small"), "--orders", "2", "3", "--json"])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["order"] for answer in answers] == [2, 3]
    for answer in answers:
        model = KneserNey(train, answer["order"], corpus.vocabulary_size, corpus.end_of_sentence)
        assert answer["nll"] == mean_nll(model, test)
        assert answer["tokens"] == len(test)
