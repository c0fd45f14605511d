"""Pydantic models of a corpus' definition: where its text comes from.

Definitions differ by `kind`, and synthetic ones also by `process`. The configuration package reads
`corpora.yaml` and the user's own definitions; the other modules here fetch, generate and prepare.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, TypeAdapter, field_validator, model_validator

from ptbench.corpus import CorpusError
from ptbench.files import sha256
from ptbench.model.recipe import Model

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")

# The stationary law of a markov process is a dense linear system, of at most this size: 130 MB.
MAXIMUM_STATES = 4000

ADDRESS_PATTERN = r"^(https?://[^/\s]+\S*|file:.+)$"


def address_of_a_mirror(value: Any) -> Any:
    """Return `value` if files can be fetched from that address, or if it is not text.

    Raises:
        ValueError: it says what to write instead.
    """
    if not isinstance(value, str):
        return value
    parts = urlsplit(value)
    if parts.scheme == "file" and parts.netloc:
        raise ValueError(
            f"{value} names a host, {parts.netloc}; write file:/absolute/path or file:relative/path"
        )
    if re.match(ADDRESS_PATTERN, value):
        return value
    if value and not parts.scheme:
        raise ValueError(f"{value} is not an address; for a folder on disk write file:{value}")
    raise ValueError(f'"{value}" is not an http:, https: or file: address')


MirrorAddress = Annotated[str, Field(pattern=ADDRESS_PATTERN), BeforeValidator(address_of_a_mirror)]
Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class SplitChecksums(Model):
    """SHA-256 of the three raw files, as 64 lower-case hexadecimal digits."""

    train: Checksum = Field(description="SHA-256 of the training text.")
    valid: Checksum = Field(description="SHA-256 of the validation text.")
    test: Checksum = Field(description="SHA-256 of the test text.")


class SplitPaths(Model):
    """Where the three files are within a mirror."""

    train: str = Field(min_length=1, description="Path of the training text within the mirror.")
    valid: str = Field(min_length=1, description="Path of the validation text within the mirror.")
    test: str = Field(min_length=1, description="Path of the test text within the mirror.")


class Mirror(Model):
    """One place that serves the three files."""

    url: MirrorAddress = Field(
        description="http:, https: or file: address of the archive, or of the folder of plain "
        "files; a file: address without a leading slash is relative to the working directory.",
    )
    format: Literal["archive", "plain"] = Field(
        description="archive: url is a tar (.tgz, .tar.xz, ...) or zip archive; plain: url is a "
        "folder."
    )
    paths: SplitPaths = Field(description="Where the three files are within the archive or folder.")


class DocumentedSize(Model):
    """How large a corpus is, for estimates before it has been prepared."""

    train: int = Field(ge=1, description="Training tokens, <eos> counted [tokens].")
    valid: int = Field(ge=1, description="Validation tokens, <eos> counted [tokens].")
    test: int = Field(ge=1, description="Test tokens, <eos> counted [tokens].")
    vocabulary: int = Field(ge=1, description="Word types.")


class DownloadedCorpus(Model):
    """Three files from the first of several mirrors that serves them with the right checksums."""

    kind: Literal["download"] = Field(description="A corpus that is downloaded.")
    mirrors: tuple[Mirror, ...] = Field(min_length=1, description="Mirrors, tried in this order.")
    files: SplitChecksums = Field(description="SHA-256 of the three files, whichever the mirror.")
    size: DocumentedSize | None = Field(
        None, description="As its authors state it; used by estimates until it is prepared."
    )
    timeout_seconds: float = Field(
        30.0, gt=0, description="Longest silence of a server before the try is given up [seconds]."
    )
    retries: int = Field(
        3, ge=0, le=10, description="Further tries of one mirror after a passing failure."
    )
    backoff_seconds: float = Field(
        1.0, ge=0, description="Pause before the first retry [seconds]; it doubles with each."
    )

    def with_first(self, address: MirrorAddress) -> Self:
        """Return this corpus with a folder of plain files as its first mirror.

        The files there must have the names that they have in what was the first mirror.
        """
        first = self.mirrors[0].paths
        paths = SplitPaths(**{split: getattr(first, split).rpartition("/")[2] for split in SPLITS})
        mirror = Mirror(url=address, format="plain", paths=paths)
        return self.model_copy(update={"mirrors": (mirror, *self.mirrors)})


class FolderCorpus(Model):
    """A local folder with train.txt, valid.txt and test.txt."""

    kind: Literal["folder"] = Field(description="A corpus in a local folder.")
    folder: Path = Field(
        description="The folder that holds train.txt, valid.txt and test.txt, in UTF-8, one "
        "sentence a line; a relative path starts at the working directory."
    )
    files: SplitChecksums | None = Field(
        None, description="SHA-256 the three files must have; null: any content will do."
    )

    @field_validator("folder")
    @classmethod
    def _expand_home(cls, folder: Path) -> Path:
        return folder.expanduser()


class _GeneratedCorpus(Model):
    """The settings that all synthetic processes have."""

    kind: Literal["synthetic"] = Field(description="A corpus that is generated.")
    seed: int = Field(0, ge=0, description="Seed of the process and of the text drawn from it.")
    train_tokens: int = Field(ge=1, description="Least training tokens, <eos> counted [tokens].")
    valid_tokens: int = Field(ge=1, description="Least validation tokens, <eos> counted [tokens].")
    test_tokens: int = Field(ge=1, description="Least test tokens, <eos> counted [tokens].")


class MarkovCorpus(_GeneratedCorpus):
    """Sentences with a topic, whose last word agrees with the first."""

    process: Literal["markov"] = Field(description="Zipfian words with long-range dependency.")
    topics: int = Field(ge=1, description="Topics; each has its own content words.")
    openers_per_topic: int = Field(
        ge=1, description="First words of a sentence per topic; each has its own last word."
    )
    content_words_per_topic: int = Field(ge=1, description="Content words of each topic.")
    function_words: int = Field(
        ge=4, le=64, description="Words that stand before each content word and know no topic."
    )
    topic_loyalty: float = Field(
        ge=0, le=1, description="Share of content words drawn from the sentence's own topic."
    )
    closing_probability: float = Field(
        ge=0.01, le=1, description="Probability that a content word is followed by the last word."
    )

    @model_validator(mode="after")
    def _small_enough(self) -> Self:
        content = self.topics * self.content_words_per_topic
        openers = self.topics * self.openers_per_topic
        states = 1 + openers * (self.function_words + content + 2)
        if states > MAXIMUM_STATES:
            raise ValueError(
                f"these sizes make {states} states and at most {MAXIMUM_STATES} are allowed; lower "
                "topics, openers_per_topic or content_words_per_topic"
            )
        return self


class HighRankCorpus(_GeneratedCorpus):
    """Order one with Gaussian logits: one softmax of a small hidden size cannot fit it."""

    process: Literal["high-rank"] = Field(
        description="Log-probabilities whose matrix has a rank above a small hidden size."
    )
    words: int = Field(
        ge=16, le=2000, description="Words besides <eos>; the matrix has just that rank."
    )
    logit_deviation: float = Field(
        gt=0, le=3, description="Standard deviation of the logits: the higher, the more peaked."
    )


class ZipfCorpus(_GeneratedCorpus):
    """Independent words with the frequencies of Zipf's law: nothing to learn, and many words."""

    process: Literal["zipf"] = Field(description="Independent words, with Zipf's frequencies.")
    words: int = Field(ge=2, le=100_000, description="Words besides <eos>.")
    sentence_tokens: float = Field(
        20.0, gt=1, description="Mean length of a sentence, <eos> counted [tokens]."
    )


Generated = MarkovCorpus | HighRankCorpus | ZipfCorpus
SyntheticCorpus = Annotated[Generated, Field(discriminator="process")]
CorpusDefinition = Annotated[
    DownloadedCorpus | FolderCorpus | SyntheticCorpus, Field(discriminator="kind")
]
CORPUS_DEFINITION: TypeAdapter[CorpusDefinition] = TypeAdapter(CorpusDefinition)


# Keys that say where and how a corpus is fetched, not what is in it.
TRANSPORT = {"mirrors", "size", "timeout_seconds", "retries", "backoff_seconds", "folder"}


def content_of(name: str, definition: CorpusDefinition) -> dict[str, Any]:
    """Return what decides what is in a corpus: its definition without `TRANSPORT`.

    Of a folder, that is what its files hold, wherever it is and whenever they were written.

    Raises:
        CorpusError: if a file of the folder cannot be read.
    """
    content = definition.model_dump(mode="json", exclude_defaults=True, exclude=TRANSPORT)
    if isinstance(definition, FolderCorpus) and definition.files is None:
        content["files"] = _checksums(name, definition.folder)
    return content


def texts_in(name: str, folder: Path) -> dict[Split, Path]:
    """Return the paths of the three texts in a folder of the user's.

    Raises:
        CorpusError: if one is missing.
    """
    if not folder.is_dir():
        raise CorpusError(f"corpus {name}: there is no folder {folder}")
    paths: dict[Split, Path] = {split: folder / f"{split}.txt" for split in SPLITS}
    if missing := [path.name for path in paths.values() if not path.is_file()]:
        raise CorpusError(
            f"corpus {name}: {folder} has no {' and no '.join(missing)}; it must hold train.txt, "
            "valid.txt and test.txt"
        )
    return paths


@cache
def _checksums(name: str, folder: Path) -> dict[Split, str]:
    try:
        return {split: sha256(path) for split, path in texts_in(name, folder).items()}
    except OSError as error:
        raise CorpusError(f"corpus {name}: {error.filename}: {error.strerror}") from error


def definition_from(
    asked: Mapping[str, Any], fetching: Mapping[str, Any]
) -> tuple[str, CorpusDefinition, int | None]:
    """Return name, definition and subset of a corpus.

    Args:
        asked: its `name`, its `content` as `content_of` has it, and its `subset`.
        fetching: by corpus, the keys of `TRANSPORT`.

    Raises:
        KeyError, ValueError: if something is missing or wrong.
    """
    content = {**asked["content"], **fetching.get(asked["name"], {})}
    return asked["name"], CORPUS_DEFINITION.validate_python(content), asked["subset"]
