"""Synthetic text: what is said to be known exactly is, by independent routes."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from ptbench.corpus import synthetic
from ptbench.corpus.definitions import CORPUS_DEFINITION, HighRankCorpus, MarkovCorpus
from ptbench.corpus.synthetic import Process, Sample
from ptbench.corpus.vocabulary import tokenize

BUILT_IN = yaml.safe_load(
    (Path(__file__).parents[2] / "workflow" / "corpora.yaml").read_text(encoding="utf-8")
)["corpora"]
PROCESSES = ["synthetic", "synthetic-high-rank"]


def definition(name: str, **changes: Any) -> MarkovCorpus | HighRankCorpus:
    made = CORPUS_DEFINITION.validate_python({**BUILT_IN[name], **changes})
    assert isinstance(made, MarkovCorpus | HighRankCorpus)
    return made


@functools.cache
def built_in(name: str) -> Process:
    return synthetic.build(definition(name))


def draw(process: Process, tokens: int, seed: int = 5) -> Sample:
    return synthetic.sample(process, tokens, seed, stream=1)


@pytest.mark.parametrize("name", PROCESSES)
def test_probabilities_of_each_state_sum_to_one(name: str) -> None:
    process = built_in(name)
    np.testing.assert_allclose(process.probabilities.sum(axis=1), 1, rtol=0, atol=1e-12)
    assert len(set(process.words)) == len(process.words)
    assert all(len(word.split()) == 1 for word in process.words)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_stationary_law_is_the_limit_of_many_steps(name: str) -> None:
    process = built_in(name)
    states = len(process.probabilities)
    transition = np.zeros((states, states))
    for state, word in itertools.product(range(states), range(len(process.words))):
        transition[state, process.successors[state, word]] += process.probabilities[state, word]
    # The average over two steps: words of a markov sentence come in turns, with a period of two.
    law = np.linalg.matrix_power((transition + np.eye(states)) / 2, 2**14)[0]
    np.testing.assert_allclose(process.stationary, law, rtol=0, atol=1e-10)


def sentence_entropy(corpus: MarkovCorpus) -> tuple[float, float]:
    """Entropy of a whole markov sentence [nats] and its expected length, by hand.

    A sentence is: opener, N times a function word and a content word, closer, <eos>; N geometric.
    Content words are independent given the topic, a function word depends on the word before it
    only by which of four turns of one law it has, of equal entropy: so entropies add up.
    """

    def zipf(size: int) -> list[float]:
        total = math.fsum(1 / rank for rank in range(1, size + 1))
        return [1 / rank / total for rank in range(1, size + 1)]

    def entropy(law: list[float]) -> float:
        return -math.fsum(p * math.log(p) for p in law)

    openers = zipf(corpus.topics * corpus.openers_per_topic)
    closing = corpus.closing_probability
    pairs = 1 / closing  # expected number; at least one
    number = -(math.log(closing) + (pairs - 1) * math.log(1 - closing))  # entropy of a geometric
    anywhere = zipf(corpus.topics * corpus.content_words_per_topic)
    own = zipf(corpus.content_words_per_topic)
    content = 0.0
    for opener, share in enumerate(openers):
        topic = opener % corpus.topics
        law = [(1 - corpus.topic_loyalty) * p for p in anywhere]
        for rank, p in enumerate(own):
            law[topic + rank * corpus.topics] += corpus.topic_loyalty * p
        content += share * entropy(law)
    total = entropy(openers) + number + pairs * (entropy(zipf(corpus.function_words)) + content)
    return total, 3 + 2 * pairs


def test_the_markov_entropy_rate_is_that_of_a_sentence_over_its_length() -> None:
    corpus = definition("synthetic")
    assert isinstance(corpus, MarkovCorpus)
    entropy, length = sentence_entropy(corpus)
    assert synthetic.build(corpus).entropy_rate() == pytest.approx(entropy / length, rel=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_entropy_rate_agrees_with_the_text_drawn(name: str) -> None:
    process = built_in(name)
    sample = draw(process, 200_000)
    assert abs(sample.mean_nll() - process.entropy_rate()) < 4 * sample.standard_error()
    assert sample.standard_error() < 0.01


def test_the_standard_error_is_the_spread_over_seeds() -> None:
    process = built_in("synthetic")
    samples = [draw(process, 2000, seed) for seed in range(100)]
    scores = [
        (sample.mean_nll() - process.entropy_rate()) / sample.standard_error() for sample in samples
    ]
    # 100 standardised numbers: mean 0 +- 0.1, standard deviation 1 +- 0.07, each four times over.
    assert abs(np.mean(scores)) < 0.4
    assert abs(np.std(scores) - 1) < 0.28


@pytest.mark.parametrize("name", PROCESSES)
def test_the_nll_of_a_text_is_the_product_of_its_words_probabilities(name: str) -> None:
    """Follows the text word by word, with the probabilities and nothing else of the sampler."""
    process = built_in(name)
    sample = draw(process, 3000)
    identifiers = {word: identifier for identifier, word in enumerate(process.words)}
    nll, state, tokens = 0.0, 0, 0
    for word in tokenize("".join(f"{line}\n" for line in sample.lines)):
        nll -= math.log(process.probabilities[state, identifiers[word]])
        state = int(process.successors[state, identifiers[word]])
        tokens += 1
    assert sample.tokens.sum() == tokens
    assert sample.mean_nll() == pytest.approx(nll / tokens, rel=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_best_bigram_model_agrees_with_bigrams_counted_in_the_text(name: str) -> None:
    process = built_in(name)
    words = tokenize("".join(f"{line}\n" for line in draw(process, 400_000).lines))
    followers: dict[str, Counter[str]] = defaultdict(Counter)
    for previous, word in itertools.pairwise(words):
        followers[previous][word] += 1
    counted = -sum(
        count * math.log(count / counts.total())
        for counts in followers.values()
        for count in counts.values()
    ) / (len(words) - 1)
    # Counting is optimistic by half a nat per free parameter (Miller and Madow 1955).
    free = sum(len(counts) - 1 for counts in followers.values())
    assert counted + free / (2 * len(words)) == pytest.approx(process.bigram_entropy(), abs=0.01)


def test_memory_is_worth_much_on_the_markov_corpus() -> None:
    process = built_in("synthetic")
    assert math.exp(process.bigram_entropy()) > 1.5 * math.exp(process.entropy_rate())


def test_the_last_word_of_a_markov_sentence_agrees_with_the_first() -> None:
    for line in draw(built_in("synthetic"), 5000).lines:
        first, *_, last = line.split()
        assert first.endswith("num")
        assert last == first.removesuffix("num") + "tas"


def test_markov_words_follow_zipfs_law() -> None:
    """On logarithmic axes frequency falls with rank along a line of slope about -1."""
    sample = draw(built_in("synthetic"), 100_000)
    counts = Counter(itertools.chain.from_iterable(line.split() for line in sample.lines))
    frequencies = sorted(counts.values(), reverse=True)
    ranks = np.arange(1, len(frequencies) + 1)
    slope, _ = np.polyfit(np.log(ranks), np.log(frequencies), 1)
    assert -1.5 < slope < -0.8


def test_the_high_rank_corpus_has_a_rank_above_small_hidden_sizes() -> None:
    process = built_in("synthetic-high-rank")
    assert process.log_probability_rank() == len(process.words) - 1 == 63
    # Not by a hair: the best matrix of rank 33, a softmax of hidden size 32 and its bias, misses
    # a good part of the squared log-probabilities (Eckart and Young 1936).
    logarithms = np.log(process.probabilities)
    values = np.linalg.svd(logarithms - logarithms.mean(axis=1, keepdims=True), compute_uv=False)
    assert np.sum(values[33:] ** 2) > 0.05 * np.sum(values**2)


def test_a_single_softmax_has_the_rank_of_its_hidden_size_and_bias() -> None:
    random = np.random.default_rng(0)
    hidden, vocabulary = 5, 40
    logits = random.normal(size=(vocabulary, hidden)) @ random.normal(size=(hidden, vocabulary))
    weights = np.exp(logits + random.normal(size=vocabulary))
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    identifiers = np.arange(vocabulary)
    process = Process(
        ("<eos>",) * vocabulary,
        probabilities,
        np.broadcast_to(identifiers, probabilities.shape),
        identifiers,
    )
    assert process.log_probability_rank() == hidden + 1


def test_a_bigram_model_is_perfect_on_the_high_rank_corpus() -> None:
    process = built_in("synthetic-high-rank")
    assert process.bigram_entropy() == pytest.approx(process.entropy_rate(), rel=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
def test_splits_and_seeds_are_different_texts_of_one_process(name: str) -> None:
    process = built_in(name)
    texts = {
        synthetic.sample(process, 1000, seed, stream).lines
        for seed, stream in itertools.product((0, 1), synthetic.SPLIT_STREAMS.values())
    }
    assert len(texts) == 6


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("synthetic", "dbcbf28497416def1f1783fca80ebedbab7d82872e1dacdbcccec6897f39586c"),
        ("synthetic-high-rank", "f40ca55daedc4d23fe66accbdc0c8986ad53d3d2838e01c9483c78c56c9755c3"),
    ],
)
def test_the_same_seed_gives_the_same_bytes_everywhere(name: str, digest: str) -> None:
    """The digest was the same under NumPy 1.23.5 and 2.4.6."""
    corpus = definition(name)
    lines = synthetic.sample(synthetic.build(corpus), corpus.train_tokens, corpus.seed, 1).lines
    assert hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest() == digest


def test_a_sample_has_the_tokens_asked_for_and_whole_sentences() -> None:
    process = built_in("synthetic")
    sample = draw(process, 1000)
    assert 1000 <= sample.tokens.sum() < 1000 + sample.tokens[-1]


def test_sizes_whose_floor_would_take_too_long_to_compute_are_refused() -> None:
    with pytest.raises(ValidationError, match="these sizes make 90201 states and at most 4000"):
        definition(
            "synthetic",
            topics=50,
            content_words_per_topic=17,
            openers_per_topic=2,
            function_words=50,
        )


def test_independent_words_have_zipf_s_frequencies_and_all_are_in_the_vocabulary() -> None:
    definition = CORPUS_DEFINITION.validate_python(BUILT_IN["synthetic-zipf"])
    process = synthetic.build(definition)
    assert len(set(process.words)) == len(process.words) == 10_000
    law = process.probabilities[0]
    assert law.sum() == pytest.approx(1, abs=1e-12)
    assert law[0] == 1 / 22  # a sentence's mean length is the other way round
    assert law[1] / law[10] == pytest.approx(10)
    entropy = -float(np.sum(law * np.log(law)))
    assert process.entropy_rate() == pytest.approx(entropy, rel=1e-12)
    assert process.bigram_entropy() == process.entropy_rate()
    drawn = synthetic.sample(process, 20_000, 1, 1)
    assert drawn.mean_nll() == pytest.approx(entropy, abs=5 * drawn.standard_error())
