"""Kneser-Ney n-gram models, the reference that a neural model has to beat. It needs NumPy alone.

Interpolated, with three discounts for each order (modified Kneser-Ney: Chen and Goodman 1999,
section 3, equations 25 to 28). As in SRILM, an n-gram lies within one sentence: `<eos>` ends a
sentence, and is also what stands before its first word. Every n-gram that occurs is used, and the
vocabulary is the corpus' own, `<unk>` a word like others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ptbench.corpus.sources import Tokens

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
ORDERS = (3, 5)  # that every corpus is scored with
MOST_TOKENS = 10_000_000  # of training text; more takes minutes, and 1 GB for every 10 million


@dataclass(frozen=True)
class Order:
    """What is known of the n-grams of one length, each with a number from 0."""

    keys: Integers  # of each, ascending: number of all its words but the last x vocabulary + last
    discounted: Floats  # of each: its count less the discount
    # Of each context, which is an n-gram of the length below:
    totals: Floats  # counts of all n-grams that continue it
    left_over: Floats  # what they were discounted by together


class KneserNey:
    """A model of n-grams, estimated from a text."""

    def __init__(
        self, tokens: Tokens, order: int, vocabulary_size: int, end_of_sentence: int
    ) -> None:
        """Estimate the model.

        Args:
            tokens: [tokens].
            order: length of the longest n-grams, at least 1.
            vocabulary_size: number of word types.
            end_of_sentence: the identifier that ends a sentence.
        """
        self.order, self.vocabulary_size, self._end = order, vocabulary_size, end_of_sentence
        text, depth = self._sentences(tokens)
        self._orders: list[Order] = []
        numbers, contexts = np.zeros(len(text), np.int64), 1  # of the empty n-gram, everywhere
        counted: list[tuple[Integers, Integers, int]] = []
        suffixes: list[Integers] = []  # of each n-gram: the number of all its words but the first
        for length in range(1, order + 1):
            # Where one ends: behind the `<eos>` that was put in front, and within its sentence.
            places = np.flatnonzero(depth >= length - 1)
            if not len(places):  # every sentence is shorter
                self.order = order = length - 1
                break
            keys = self._keys(numbers, text)[places]
            unique, first, inverse, counts = np.unique(
                keys, return_index=True, return_inverse=True, return_counts=True
            )
            suffixes.append(numbers[places[first]])
            counted.append((unique, counts, contexts))
            numbers, contexts = np.full(len(text), -1), len(unique)
            numbers[places] = inverse
            if length == 1:
                numbers[0] = np.searchsorted(unique, end_of_sentence)
        for length, (unique, counts, contexts) in enumerate(counted, 1):
            adjusted = counts
            if length < order:
                before = np.bincount(suffixes[length], minlength=len(unique))
                # Nothing stands before the beginning of a sentence: such n-grams keep their count.
                adjusted = np.where(before > 0, before, counts)
            self._orders.append(_order(unique, adjusted, contexts, vocabulary_size))

    def log_probabilities(self, tokens: Tokens) -> Floats:
        """Return the natural logarithm of each token's probability after those before it.

        Args:
            tokens: [tokens], from the beginning of a sentence.
        """
        text, depth = self._sentences(tokens)
        probability = np.full(len(text), 1 / self.vocabulary_size)
        context = np.zeros(len(text), np.int64)  # number of the words before, -1: never seen
        numbers = context
        for length, known in enumerate(self._orders, 1):
            usable = (context >= 0) & (depth >= length - 1)
            at = np.where(usable, context, 0)
            keys = self._keys(at, text, shift=False)
            place = np.minimum(np.searchsorted(known.keys, keys), len(known.keys) - 1)
            found = usable & (known.keys[place] == keys)
            count = np.where(found, known.discounted[place], 0.0)
            total = known.totals[at]
            usable &= total > 0
            new = (count + known.left_over[at] * probability) / np.where(usable, total, 1.0)
            probability = np.where(usable, new, probability)
            numbers = np.where(found, place, -1)
            if length == 1:
                numbers[0] = np.searchsorted(known.keys, self._end)
            context = np.concatenate([[-1], numbers[:-1]])
        return np.log(probability[1:])

    def _sentences(self, tokens: Tokens) -> tuple[Integers, Integers]:
        """Return the text behind an `<eos>`, and how many words of context each has."""
        text = np.concatenate([[self._end], np.asarray(tokens, np.int64)])
        places = np.arange(len(text))
        ends = np.maximum.accumulate(np.where(text == self._end, places, 0))
        depth = np.concatenate([[-1], places[1:] - ends[:-1]])  # the first is not predicted
        return text, depth

    def _keys(self, numbers: Integers, text: Integers, shift: bool = True) -> Integers:
        """Return what identifies the n-grams of which `numbers` are all words but the last."""
        before = np.concatenate([[0], numbers[:-1]]) if shift else numbers
        return before * self.vocabulary_size + text


def _order(keys: Integers, counts: Integers, contexts: int, vocabulary_size: int) -> Order:
    """Return what is known of n-grams with these adjusted counts."""
    discounts = _discounts(counts)[np.minimum(counts, 3)]
    context = keys // vocabulary_size
    return Order(
        keys,
        counts - discounts,
        np.bincount(context, counts, contexts).astype(np.float64),
        np.bincount(context, discounts, contexts).astype(np.float64),
    )


def _discounts(counts: Integers) -> Floats:
    """Return what counts of 0, 1, 2, and 3 or more are lowered by.

    Short texts may lack the n-grams that the estimates need; their only discount is a half.
    """
    seen = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(float)
    if seen.all():
        share = seen[0] / (seen[0] + 2 * seen[1])
        found = np.array([n - (n + 1) * share * seen[n] / seen[n - 1] for n in (1, 2, 3)])
        if (found > 0).all() and (found < (1, 2, 3)).all():
            return np.concatenate([[0.0], found])
    return np.array([0.0, 0.5, 0.5, 0.5])


def mean_nll(model: KneserNey, tokens: Tokens) -> float:
    """Return the mean negative log-likelihood of a text, all of its tokens [nats per token]."""
    return -float(model.log_probabilities(tokens).mean())
