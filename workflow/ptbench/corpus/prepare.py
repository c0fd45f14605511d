"""Prepare a corpus from its definition: integers, vocabulary and facts.

A prepared corpus is a folder with `train.npy`, `valid.npy` and `test.npy` (int32 [tokens], to be
memory-mapped), the text they were made from (`train.txt` and so on, with `train.index.npy`, which
allows reading from any place), `vocabulary.txt` (one word a line; the line's number, from 0, is the
word's identifier) and `corpus.json`, which is written last. `store.py` opens it.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt

from ptbench.corpus import CorpusError, ngrams, synthetic
from ptbench.corpus.definitions import (
    SPLITS,
    CorpusDefinition,
    DownloadedCorpus,
    FolderCorpus,
    Generated,
    HighRankCorpus,
    Split,
)
from ptbench.corpus.fetch import fetch
from ptbench.corpus.sources import index_text
from ptbench.corpus.vocabulary import (
    ADVICE,
    END_OF_SENTENCE,
    Encoder,
    Identifiers,
    build_vocabulary,
    tokenize,
)
from ptbench.files import publish, sha256

# A text with fewer words a line is probably in a script that writes no spaces.
WORDS_PER_LINE = 1.5


class Text(NamedTuple):
    """The text of a split, or of its first lines if a subset is wanted."""

    source: str  # what errors call it
    content: str  # ends in a newline
    raw_sha256: str  # of the whole split


def prepare(
    name: str,
    definition: CorpusDefinition,
    subset: int | None,
    downloads_folder: Path,
    output_folder: Path,
    terminal: TextIO = sys.stderr,
) -> dict[str, Any]:
    """Prepare a corpus and return the content of its corpus.json.

    There are three clocks. `load` reads and checks the raw text, or generates it. `preprocess`
    turns it into words, vocabulary and integers. `index` is the extra work for `source: stream`.
    Downloading and writing are on none of them.

    Args:
        name: of the corpus, for messages and corpus.json.
        definition: where the text comes from.
        subset: use only this many lines at the start of each split; None: all.
        downloads_folder: where downloads are kept.
        output_folder: created if it does not exist.
        terminal: where warnings and the progress of downloads are shown.

    Raises:
        CorpusError: if the text cannot be fetched, read or stored. A corpus that was prepared there
            before stays as it was.
    """
    facts: dict[str, Any] = {}
    known_words: tuple[str, ...] = ()
    if isinstance(definition, DownloadedCorpus | FolderCorpus):
        paths = fetch(name, definition, downloads_folder, terminal)
        started = time.perf_counter()
        texts = {split: read(path, subset) for split, path in paths.items()}
    else:
        started = time.perf_counter()
        known_words, texts, facts = generate(definition, subset)
    loaded = time.perf_counter()

    words = {split: _checked_words(text) for split, text in texts.items()}
    _warn_of_unspaced_text(name, texts["train"], words["train"], terminal)
    vocabulary = build_vocabulary(words["train"], known_words)
    encoder = Encoder(vocabulary)
    advice = ADVICE if subset is None else f"use more lines than subset={subset}"
    tokens: dict[Split, Identifiers] = {}
    outside: dict[Split, int] = {}
    for split in SPLITS:
        tokens[split], outside[split] = encoder.encode(words[split], texts[split].source, advice)
    preprocessed = time.perf_counter()
    raw = {split: text.content.encode() for split, text in texts.items()}
    indices = {split: index_text(content) for split, content in raw.items()}
    indexed = time.perf_counter()

    if len(tokens["train"]) <= ngrams.MOST_TOKENS:
        end = vocabulary.index(END_OF_SENTENCE)
        facts["kneser_ney_nll_nats"] = reference(tokens, len(vocabulary), end)
    unigram_entropy = entropy(np.bincount(tokens["train"]))
    description = {
        "name": name,
        "subset": subset,
        "definition": definition.model_dump(mode="json"),
        "vocabulary_size": len(vocabulary),
        "tokens": {split: len(tokens[split]) for split in SPLITS},
        "types": {split: int(np.count_nonzero(np.bincount(tokens[split]))) for split in SPLITS},
        "out_of_vocabulary": outside,
        "unigram_entropy_nats": unigram_entropy,
        "unigram_perplexity": math.exp(unigram_entropy),
        **facts,
        "raw_sha256": {split: texts[split].raw_sha256 for split in SPLITS},
        "seconds": {
            "load": loaded - started,
            "preprocess": preprocessed - loaded,
            "index": indexed - preprocessed,
        },
    }
    try:
        _store(output_folder, tokens, raw, indices, vocabulary, description)
    except OSError as error:
        raise CorpusError(
            f"corpus {name} cannot be written to {output_folder}: {error.strerror or error}"
        ) from error
    return description


def read(path: Path, subset: int | None) -> Text:
    """Read a raw file and check it.

    Raises:
        CorpusError: if it cannot be read, is empty, is not UTF-8 or does not end in a newline.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}") from error
    if not raw:
        raise CorpusError(f"{path} is empty; it must hold text, one sentence a line")
    try:
        content = raw.decode("utf-8-sig")  # a byte order mark is not part of the first word
        content = content.replace("\r\n", "\n").replace("\r", "\n")  # Windows, old Mac
    except UnicodeDecodeError as error:
        at = len(raw) - len(error.object) + error.start  # a byte order mark is not in the object
        line = 1 + raw.count(b"\n", 0, at)
        raise CorpusError(
            f"{path}, line {line}: byte {at} of the file, {raw[at]:#04x}, is not UTF-8; store the "
            "file as UTF-8"
        ) from error
    if not content.endswith("\n"):
        line = 1 + content.count("\n")
        raise CorpusError(
            f"{path} does not end in a newline, so its last line, {line}, may be cut off; if it is "
            "whole, add a newline at its end"
        )
    return Text(str(path), first_lines(content, subset), hashlib.sha256(raw).hexdigest())


def generate(
    definition: Generated, subset: int | None
) -> tuple[tuple[str, ...], dict[Split, Text], dict[str, Any]]:
    """Generate a synthetic corpus: its words, the text of each split, and its exact facts."""
    process = synthetic.build(definition)
    minimum: dict[Split, int] = {
        "train": definition.train_tokens,
        "valid": definition.valid_tokens,
        "test": definition.test_tokens,
    }
    texts: dict[Split, Text] = {}
    true_nll: dict[str, Any] = {}
    for split, stream in synthetic.SPLIT_STREAMS.items():
        sample = synthetic.sample(process, minimum[split], definition.seed, stream)
        content = "".join(f"{line}\n" for line in sample.lines)
        digest = hashlib.sha256(content.encode()).hexdigest()
        texts[split] = Text(f"the {split} split", first_lines(content, subset), digest)
        kept = sample.first(subset)
        error = kept.standard_error()
        true_nll[split] = {
            "nll_nats": kept.mean_nll(),
            "standard_error_nats": error if math.isfinite(error) else None,
        }
    rate = process.entropy_rate()
    facts = {
        "entropy_rate_nats": rate,
        "floor_perplexity": math.exp(rate),
        "best_bigram_nll_nats": process.bigram_entropy(),
        "true_process": true_nll,
    }
    if isinstance(definition, HighRankCorpus):
        facts["log_probability_rank"] = process.log_probability_rank()
    return process.words, texts, facts


def reference(
    tokens: Mapping[Split, Identifiers], vocabulary_size: int, end_of_sentence: int
) -> dict[str, dict[str, float]]:
    """Return what n-gram models reach on valid and test, by their order [nats per token]."""
    found: dict[str, dict[str, float]] = {}
    for order in ngrams.ORDERS:
        model = ngrams.KneserNey(tokens["train"], order, vocabulary_size, end_of_sentence)
        found[str(order)] = {
            split: ngrams.mean_nll(model, tokens[split]) for split in ("valid", "test")
        }
    return found


def first_lines(content: str, count: int | None) -> str:
    """Return the first lines of a text, or all of it if it has fewer; None: all."""
    if count is None:
        return content
    lines = content.split("\n", count)  # of no other line separator than a newline
    return "\n".join(lines[:count]) + "\n" if len(lines) > count else content


def entropy(counts: np.ndarray[Any, Any]) -> float:
    """Return the entropy of a distribution given by counts [nats]."""
    shares = counts[counts > 0] / counts.sum()
    return float(-np.sum(shares * np.log(shares)))


def _checked_words(text: Text) -> list[str]:
    """Return the words of a text.

    Raises:
        CorpusError: if there are none, or if `<eos>`, which replaces newlines, is one of them.
    """
    if END_OF_SENTENCE in text.content:
        for number, line in enumerate(text.content.split("\n"), start=1):
            if END_OF_SENTENCE in line.split():
                raise CorpusError(
                    f"{text.source}, line {number}: the text has the word {END_OF_SENTENCE}, which "
                    "stands for the end of a line; remove it"
                )
    if not text.content.strip():
        raise CorpusError(f"{text.source} has no words; it must hold text, one sentence a line")
    return tokenize(text.content)


def _warn_of_unspaced_text(name: str, text: Text, words: list[str], terminal: TextIO) -> None:
    """Warn if almost every line is a single word, as in a script that writes no spaces."""
    lines = text.content.count("\n")
    found = len(words) - words.count(END_OF_SENTENCE)
    if lines < 10 or found >= WORDS_PER_LINE * lines:
        return
    warning = (
        f"[{name}] warning: {text.source} has {found} words of {len(set(words)) - 1} kinds in "
        f"{lines} lines. Words are separated by spaces: if the text has none, separate its words "
        "first."
    )
    for stream in dict.fromkeys((sys.stderr, terminal)):  # the log, and whoever looks on
        print(warning, file=stream, flush=True)


def _store(
    folder: Path,
    tokens: Mapping[Split, Identifiers],
    texts: Mapping[Split, bytes],
    indices: Mapping[Split, npt.NDArray[np.int64]],
    vocabulary: list[str],
    description: dict[str, Any],
) -> None:
    """Write all files to a temporary folder, then rename them into place, corpus.json last."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as name:
        partial = Path(name)
        for split, identifiers in tokens.items():
            np.save(partial / f"{split}.npy", identifiers)
            np.save(partial / f"{split}.index.npy", indices[split])
            (partial / f"{split}.txt").write_bytes(texts[split])
        lines = "".join(f"{word}\n" for word in vocabulary)
        (partial / "vocabulary.txt").write_text(lines, encoding="utf-8")
        files = sorted(partial.iterdir())
        sums = {path.name: sha256(path) for path in files}
        with (partial / "corpus.json").open("w", encoding="utf-8") as file:
            json.dump({**description, "sha256": sums}, file, indent=2, ensure_ascii=False)
            file.write("\n")
        (folder / "corpus.json").unlink(missing_ok=True)  # never beside files of another corpus
        for path in [*files, partial / "corpus.json"]:
            publish(path, folder / path.name)
