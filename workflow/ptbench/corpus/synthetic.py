"""Generate text like Penn Treebank's from a seed, with an entropy rate that is known exactly.

Three processes. `markov` has a long-range dependency that a recurrent network learns and a bigram
model cannot; `high-rank` is a process of order one whose log-probabilities one softmax of a small
hidden size cannot express; `zipf` is of order zero and has as many words as one likes. All are
finite unifilar sources: the state after a word follows from the state before it and the word, so
entropy rate, best bigram model and the probability of a text are finite sums, not estimates.

It needs NumPy and the standard library alone. `prepare.py` turns the text into files.
"""

from __future__ import annotations

import bisect
import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ptbench.corpus.definitions import SPLITS, Generated, HighRankCorpus, MarkovCorpus, ZipfCorpus
from ptbench.corpus.vocabulary import END_OF_SENTENCE

Float = npt.NDArray[np.float64]
Integer = npt.NDArray[np.int64]

# Streams of random numbers: [seed, stream]. One for the process itself, one for each split.
PROCESS_STREAM = 0
SPLIT_STREAMS = {split: stream for stream, split in enumerate(SPLITS, start=1)}


@dataclass(frozen=True)
class Process:
    """A unifilar source of words.

    `words` [word]; `probabilities` [state, word], each row sums to one; `successors` [state, word],
    the next state; `previous` [state], the word that every path into the state ends with. State 0
    is the one after `<eos>`, where each text starts.
    """

    words: tuple[str, ...]
    probabilities: Float
    successors: Integer
    previous: Integer

    @cached_property
    def stationary(self) -> Float:
        """The long-run share of each state [state]: the solution of pi T = pi, sum(pi) = 1."""
        states = len(self.probabilities)
        transition = np.zeros((states, states))
        rows = np.broadcast_to(np.arange(states)[:, None], self.probabilities.shape)
        np.add.at(transition, (rows, self.successors), self.probabilities)
        system = transition.T - np.eye(states)
        system[-1] = 1.0  # one equation follows from the others; the sum takes its place
        right = np.zeros(states)
        right[-1] = 1.0
        return np.asarray(np.linalg.solve(system, right), dtype=np.float64)

    def entropy_rate(self) -> float:
        """Return the exact entropy rate [nats per token].

        H = sum_i pi_i H_i (Shannon 1948, section 7). It is the smallest expected negative
        log-likelihood that any model can reach.
        """
        return float(self.stationary @ _entropy(self.probabilities))

    def bigram_entropy(self) -> float:
        """Return the entropy of a word given only the word before it [nats per token].

        It is what the best possible bigram model reaches, one that knows the process and not the
        history. It equals the entropy rate if the process is of order one or zero.
        """
        if len(self.probabilities) == 1:  # independent words: the word before tells nothing
            return self.entropy_rate()
        joint = np.zeros((len(self.words), len(self.words)))
        np.add.at(joint, self.previous, self.stationary[:, None] * self.probabilities)
        share = joint.sum(axis=1)
        return float(share @ _entropy(joint / share[:, None]))

    def log_probability_rank(self) -> int:
        """Return the rank of the matrix of log-probabilities [state, word], each row centred.

        Centring removes the row's log-normaliser. A softmax of hidden size d with a bias vector
        reaches rank d + 1 at most (Yang et al. 2018, arXiv:1711.03953, section 2.2). Meaningful
        where no probability is zero. Tolerance as in Numerical Recipes, NumPy's default.
        """
        logarithms = np.log(self.probabilities)
        centred = logarithms - logarithms.mean(axis=1, keepdims=True)
        return int(np.linalg.matrix_rank(centred))


@dataclass(frozen=True)
class Sample:
    """Sentences drawn from a process, with the probability that the process gives to each."""

    lines: tuple[str, ...]  # one sentence each, words separated by one space, `<eos>` left out
    nll: Float  # [sentence], negative log-likelihood, `<eos>` counted [nats]
    tokens: Integer  # [sentence], tokens, `<eos>` counted

    def first(self, lines: int | None) -> Sample:
        """Return only the first sentences; None: all."""
        return Sample(self.lines[:lines], self.nll[:lines], self.tokens[:lines])

    def mean_nll(self) -> float:
        """Return the negative log-likelihood of the true process on this sample [nats per token].

        This is the floor of the sample; the entropy rate is the floor of the process. A model that
        was chosen without the sample can be lower by more than t nats per token only with a
        probability of at most exp(-t * tokens): the likelihood ratio of the model to the truth has
        mean one (Markov's inequality).
        """
        return float(self.nll.sum() / self.tokens.sum())

    def standard_error(self) -> float:
        """Return the standard error of `mean_nll` about the entropy rate [nats per token].

        Sentences are independent, so it is that of a ratio of means (Cochran, Sampling Techniques,
        3rd edition, section 2.11). Not a number for fewer than two sentences.
        """
        sentences = len(self.lines)
        residuals = self.nll - self.mean_nll() * self.tokens
        with np.errstate(invalid="ignore", divide="ignore"):
            variance = np.sum(residuals**2) * sentences / np.float64(sentences - 1)
        return float(np.sqrt(variance) / self.tokens.sum())


def build(corpus: Generated) -> Process:
    """Return the process that a definition describes."""
    if isinstance(corpus, MarkovCorpus):
        return _markov(corpus)
    if isinstance(corpus, ZipfCorpus):
        return _independent(corpus)
    return _high_rank(corpus)


def sample(process: Process, minimum_tokens: int, seed: int, stream: int) -> Sample:
    """Draw whole sentences until there are at least `minimum_tokens` tokens, `<eos>` included.

    Equal arguments give equal text on every platform and with every NumPy: each word is one number
    from `Generator.random`, put through the inverse of a cumulative distribution.
    """
    random = np.random.default_rng([seed, stream])
    cumulative = np.cumsum(process.probabilities, axis=1)
    cumulative /= cumulative[:, -1:]  # ends at exactly one, above every draw
    tables = cumulative.tolist()
    with np.errstate(divide="ignore"):
        costs = (-np.log(process.probabilities)).tolist()
    successors = process.successors.tolist()
    end = process.words.index(END_OF_SENTENCE)

    lines: list[str] = []
    sentence_nll: list[float] = []
    sentence_tokens: list[int] = []
    tokens = 0
    while tokens < minimum_tokens:
        words: list[str] = []
        state, nll, word = 0, 0.0, -1
        while word != end:
            word = bisect.bisect_right(tables[state], random.random())
            nll += costs[state][word]
            state = successors[state][word]
            words.append(process.words[word])
        lines.append(" ".join(words[:-1]))
        sentence_nll.append(nll)
        sentence_tokens.append(len(words))
        tokens += len(words)
    return Sample(tuple(lines), np.array(sentence_nll), np.array(sentence_tokens, dtype=np.int64))


def _markov(corpus: MarkovCorpus) -> Process:
    """Return a process of sentences with a topic, whose last word agrees with the first.

    `opener (function content)+ closer <eos>`. The opener fixes the topic, and with it which content
    words are likely; the closer belongs to the opener, whatever stands between. A function word
    depends on the word before it alone, and a content word on the topic alone, so that a bigram
    model, which sees the function word, never knows the topic. Every choice has a Zipfian law.
    """
    openers = corpus.topics * corpus.openers_per_topic
    content = corpus.topics * corpus.content_words_per_topic
    function = corpus.function_words

    supply = _pronounceable()
    plain = tuple(itertools.islice(supply, function + content))
    stems = tuple(itertools.islice(supply, openers))
    agreeing = (stem + ending for ending in ("num", "tas") for stem in stems)
    words = (END_OF_SENTENCE, *plain, *agreeing)
    first_function = 1
    first_content = first_function + function
    first_opener = first_content + content
    first_closer = first_opener + openers

    opener_law = _zipf(openers)
    function_law = _zipf(function)
    any_topic = _zipf(content)
    own_topic = _zipf(corpus.content_words_per_topic)

    # State 0 is the start; then, for each opener, one state for each word that can stand before.
    block = function + content + 2
    states = 1 + openers * block
    probabilities = np.zeros((states, len(words)))
    successors = np.zeros((states, len(words)), dtype=np.int64)
    previous = np.zeros(states, dtype=np.int64)

    for opener in range(openers):
        base = 1 + opener * block
        after_opener, after_closer = base, base + block - 1
        after_function = base + 1 + np.arange(function)
        after_content = base + 1 + function + np.arange(content)
        probabilities[0, first_opener + opener] = opener_law[opener]
        successors[0, first_opener + opener] = after_opener
        previous[after_opener] = first_opener + opener
        previous[after_function] = first_function + np.arange(function)
        previous[after_content] = first_content + np.arange(content)
        previous[after_closer] = first_closer + opener

        functions = slice(first_function, first_function + function)
        for state in (after_opener, *after_content):
            # Which function words are common turns with the word before: four laws in all.
            turn = (previous[state] % 4) * function // 4
            going_on = 1.0 if state == after_opener else 1.0 - corpus.closing_probability
            probabilities[state, functions] = going_on * np.roll(function_law, turn)
            successors[state, functions] = after_function
        probabilities[after_content, first_closer + opener] = corpus.closing_probability
        successors[after_content, first_closer + opener] = after_closer

        topic = opener % corpus.topics
        content_law = (1.0 - corpus.topic_loyalty) * any_topic
        content_law[topic :: corpus.topics] += corpus.topic_loyalty * own_topic
        probabilities[after_function, first_content:first_opener] = content_law
        successors[after_function, first_content:first_opener] = after_content

        probabilities[after_closer, 0] = 1.0
    return Process(words, probabilities, successors, previous)


def _high_rank(corpus: HighRankCorpus) -> Process:
    """Return a process of order one whose logits are independent Gaussian numbers.

    The matrix of its log-probabilities has full rank, with no direction that could be left out. A
    softmax of hidden size d reaches rank d + 1 at most, so that it stays above the entropy rate
    however well it is trained; a mixture of softmaxes has no such bound (Yang et al. 2018,
    arXiv:1711.03953).
    """
    size = corpus.words + 1
    random = np.random.default_rng([corpus.seed, PROCESS_STREAM])
    logits = corpus.logit_deviation * _gaussian(random, (size, size))
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)

    words = (END_OF_SENTENCE, *itertools.islice(_pronounceable(), corpus.words))
    identifiers = np.arange(size)
    return Process(words, probabilities, np.broadcast_to(identifiers, (size, size)), identifiers)


def _independent(corpus: ZipfCorpus) -> Process:
    """Independent words by Zipf's law; a sentence ends after each with the same probability."""
    ending = 1.0 / corpus.sentence_tokens
    words = (END_OF_SENTENCE, *itertools.islice(_pronounceable(), corpus.words))
    probabilities = np.concatenate([[ending], (1.0 - ending) * _zipf(corpus.words)])[None]
    return Process(words, probabilities, np.zeros_like(probabilities, np.int64), np.zeros(1, int))


def _zipf(size: int) -> Float:
    """Return Zipf's law [rank]: the probability of rank r is proportional to 1 / r."""
    weights = 1.0 / np.arange(1, size + 1)
    return weights / weights.sum()


def _entropy(probabilities: Float) -> Float:
    """Return the entropy of each row [nats]; zero times the logarithm of zero counts as zero."""
    logarithms = np.log(np.where(probabilities > 0, probabilities, 1.0))
    return -np.sum(probabilities * logarithms, axis=1)


def _gaussian(random: np.random.Generator, shape: tuple[int, ...]) -> Float:
    """Draw standard normal numbers by the inverse distribution function of uniform ones.

    `Generator.normal` may change with NumPy's version; `Generator.random` does not.
    """
    inverse = statistics.NormalDist().inv_cdf
    uniform = random.random(int(np.prod(shape))).tolist()
    # random() can be exactly zero, where the inverse has no value.
    return np.array([inverse(max(value, 2.0**-53)) for value in uniform]).reshape(shape)


def _pronounceable() -> Iterator[str]:
    """Yield 70 words of one syllable, then 4,900 of two; all differ, and neighbours differ most."""
    syllables = [consonant + vowel for vowel in "aeiou" for consonant in "bdfgklmnprstvz"]
    for length in (1, 2, 3):
        for *shifts, first in itertools.product(range(len(syllables)), repeat=length):
            places = itertools.accumulate(shifts, initial=first)
            yield "".join(syllables[place % len(syllables)] for place in places)
