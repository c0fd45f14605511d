"""A prepared corpus, opened: memory-mapped tokens and what is known of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Corpus:
    """Three splits of token identifiers, each [tokens]."""

    train: npt.NDArray[np.int32]
    valid: npt.NDArray[np.int32]
    test: npt.NDArray[np.int32]
    vocabulary_size: int
    description: dict[str, Any]


def open_corpus(folder: Path) -> Corpus:
    """The corpus that was prepared in a folder."""
    description = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    splits = (np.load(folder / f"{s}.npy", mmap_mode="r") for s in ("train", "valid", "test"))
    return Corpus(*splits, description["vocabulary_size"], description)
