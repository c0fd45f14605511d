"""A mixture of softmaxes models high-rank text measurably better than one softmax.

This is the experiment `softmax-bottleneck`, shortened. One framework is enough: the other tests of
parity show that all compute the same, and training takes each a minute. So is one seed, whose
results differ by a tenth of what is shown; `--exhaustive` tests three in all frameworks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support import probes
from tests.support.problems import recipe
from tests.support.remote import Backends, probe

from ptbench.analysis.statistics import SIGNIFICANCE, t_test
from ptbench.backends import FRAMEWORKS
from ptbench.configuration.study import Study, load_study
from ptbench.corpus.prepare import prepare
from ptbench.corpus.store import open_corpus
from ptbench.model.parameters import parameter_count

SOFTMAX, MIXTURE = "bottleneck-softmax", "bottleneck-mixture"
SHORT = {"epochs": 5, "constant_epochs": 3, "learning_rate_decay": 0.4}
SEEDS = [1, 2, 3]


@pytest.fixture(scope="module")
def study() -> Study:
    return load_study({"experiments": ["softmax-bottleneck"]})


@pytest.fixture(scope="module")
def corpus(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora") / "synthetic-high-rank"
    name, definition, subset = study.corpus(folder.name)
    prepare(name, definition, subset, folder / "downloads", folder)
    return folder


def test_the_mixture_has_fewer_parameters(study: Study, corpus: Path) -> None:
    words = open_corpus(corpus).vocabulary_size
    softmax, mixture = (
        parameter_count(study.specification(variant).recipe, words)
        for variant in (SOFTMAX, MIXTURE)
    )
    assert (mixture, softmax) == (5488, 5904)  # as the recipes' comments have it


@pytest.mark.one_framework
def test_a_mixture_of_softmaxes_comes_closer_to_the_floor_than_one_softmax(
    backends: Backends, framework: str, study: Study, corpus: Path, pytestconfig: pytest.Config
) -> None:
    exhaustive = pytestconfig.getoption("exhaustive")
    anyone = backends.get(framework, recipe())  # a process in the framework's environment
    softmax, mixture = (
        np.array(
            probe(
                probes.nlls_of_runs, anyone, study.specification(variant).text(), str(corpus),
                SEEDS if exhaustive else SEEDS[:1], SHORT,
            )
        )
        for variant in (SOFTMAX, MIXTURE)
    )  # fmt: skip
    floor = open_corpus(corpus).description["true_process"]["test"]["nll_nats"]
    margin = softmax.mean() - floor
    assert margin > 0.1  # nats: 10 % of perplexity
    assert softmax.mean() - mixture.mean() > margin / 3
    assert mixture.min() > floor - 0.01  # below by t nats per token: a chance of exp(-10,000 t)
    if not exhaustive:
        return
    test = t_test(softmax, mixture, margin)
    assert test is not None
    # Holm's correction for all frameworks demands at most this of the least certain of them.
    assert test.p < SIGNIFICANCE / len(FRAMEWORKS)
