"""Checkpoints: a run's whole state on disk, so that killing its process loses minutes, not the run.

A cell's folder holds `last.safetensors` and `previous.safetensors`. Each has the backend's
snapshot, the best parameters so far as `best.{name}`, and in its header how far the run is. At
every instant one of them is whole. A file that cannot be used is renamed `*.rejected-N` and never
deleted. `best.safetensors` beside them, written when the run is over, has the model that was
scored; of the matrices of a sparse model, it has the kept weights alone, as `{name}`, and where
they are, counted along the rows, as `{name}.places`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ptbench.errors import PtbenchError
from ptbench.files import remove_leftovers, replacing
from ptbench.model.recipe import Model, Recipe
from ptbench.model.shapes import place_bytes
from ptbench.training.loop import Keeper, Run, Saved, Sums
from ptbench.training.records import Epoch
from ptbench.training.signals import Signals

FORMAT = 1  # of the header; raised when what is in a checkpoint changes its meaning
NAMES = ("last.safetensors", "previous.safetensors")
BEST = "best."
PLACES = ".places"  # after a matrix's name: where in it the weights are that are stored alone

Arrays = dict[str, npt.NDArray[Any]]


class Identity(Model):
    """What a checkpoint must have in common with a run, or numbers of two runs would be mixed."""

    cell: str = Field(description="Path of the cell.")
    fingerprint: str = Field(description="Of the specification.")
    corpus: str = Field(description="Of the corpus' tokens.")
    vocabulary_size: int = Field(description="Word types.")
    framework: str = Field(description="Package and version.")


class Header(Model):
    """A checkpoint's header, in JSON."""

    format: int = Field(FORMAT, description="Version of this description.")
    identity: Identity = Field(description="Whose checkpoint it is.")
    history: list[Epoch] = Field(description="The finished epochs.")
    sums: Sums | None = Field(description="Of the epoch under way; null between two.")
    seconds: dict[str, float] = Field(description="The run's clocks [s].")
    hardware: dict[str, float] = Field({}, description="What the hardware sampler added up.")
    written: float = Field(description="When [s since 1970], by this machine's clock.")


class RejectedError(Exception):
    """Why a checkpoint cannot be used."""


class Resumed(NamedTuple):
    """A saved run, its clocks, and what the hardware sampler added up."""

    saved: Saved
    seconds: dict[str, float]
    hardware: dict[str, float]


class Checkpoints(Keeper):
    """The checkpoints of one cell, as the training loop writes them."""

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        seconds: Callable[[], Mapping[str, float]],
        minutes: float = 10.0,
        signals: Signals | None = None,
        check: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = print,
        hardware: Mapping[str, float] | None = None,
    ) -> None:
        """Change nothing on disk.

        Args:
            folder: the cell's own.
            identity: of this run.
            seconds: returns the run's clocks as they are now.
            minutes: between two checkpoints within an epoch.
            signals: whether the process has been told to end.
            check: raises PtbenchError if this process may no longer write here.
            say: called with a line about anything unusual.
            hardware: what the hardware sampler adds up.
        """
        self.hardware: Mapping[str, float] = {} if hardware is None else hardware
        self.folder, self.identity, self.seconds = folder, identity, seconds
        self.minutes, self.check, self.say = minutes, check, say
        self.signals = signals or Signals()
        self.paths = [folder / name for name in NAMES]
        self.saved_at = time.monotonic()
        self.position: str | None = None  # how far the run on disk is

    def interrupted(self) -> bool:
        return self.signals.interrupted()

    def due(self) -> bool:
        return time.monotonic() - self.saved_at >= 60 * self.minutes

    def save(self, saved: Saved) -> None:
        """Write `last`; what was `last` becomes `previous`.

        Raises:
            PtbenchError: if it cannot be written; the one before it is still there.
        """
        run = saved.run
        with self.signals.written():
            self.check()
            header = Header(
                identity=self.identity,
                history=run.history,
                sums=run.sums and dataclasses.replace(run.sums),
                seconds=dict(self.seconds()),
                hardware=dict(self.hardware),
                written=time.time(),
            )
            best = {BEST + name: array for name, array in (run.best_parameters or {}).items()}
            last, previous = self.paths
            write_arrays(last, saved.snapshot | best, {"checkpoint": to_json(header)}, previous)
            self.saved_at = time.monotonic()
            self.position = describe(header)

    def latest(self, template: Callable[[], Arrays]) -> Resumed | None:
        """Return the newest checkpoint that can be used; set aside those that cannot.

        Args:
            template: returns a snapshot of this very run at its beginning.

        Raises:
            PtbenchError: if a file cannot be read now; it may be whole.
        """
        for path in self.paths:
            remove_leftovers(path)
            if not path.exists():
                continue
            try:
                header, arrays, best = self.read(path)
                if shapes(arrays) != shapes(template()) or (header.history and not best):
                    raise RejectedError("its arrays are not those of this model")
            except RejectedError as reason:
                aside = set_aside(path)
                self.say(f"{path} is no checkpoint of this run: {reason}; it is now {aside.name}")
                continue
            except OSError as error:
                raise PtbenchError(f"{path}: cannot be read: {error.strerror or error}") from error
            self.position = describe(header)
            lowest = min(header.history, key=lambda epoch: epoch.valid_nll, default=None)
            run = Run(header.history, lowest, best or None, header.sums)
            return Resumed(Saved(run, arrays), header.seconds, header.hardware)
        return None

    def read(self, path: Path) -> tuple[Header, Arrays, Arrays]:
        """Return header, snapshot and best parameters of a checkpoint of this run.

        Raises:
            RejectedError: if it is damaged, or another run's.
        """
        arrays, metadata = read_arrays(path)
        try:
            content = json.loads(metadata["checkpoint"])
            version = content["format"]
            if version != FORMAT:
                raise RejectedError(f"it has format {version}, this ptbench reads format {FORMAT}")
            header = Header.model_validate(content)
        except (ValidationError, ValueError, KeyError, TypeError) as error:
            raise RejectedError("its header is not that of a checkpoint") from error
        ours = self.identity.model_dump()
        for name, value in header.identity.model_dump().items():
            if value != ours[name]:
                raise RejectedError(f"its {name} is {value}, not {ours[name]}")
        best = {name[len(BEST) :]: a for name, a in arrays.items() if name.startswith(BEST)}
        rest = {name: array for name, array in arrays.items() if not name.startswith(BEST)}
        return header, rest, best


def clear(folder: Path) -> None:
    """Delete the checkpoints of a finished run; what was set aside stays, and its best model."""
    for name in NAMES:
        (folder / name).unlink(missing_ok=True)
        remove_leftovers(folder / name)


def describe(header: Header) -> str:
    """Say how far a run is."""
    number = len(header.history) + 1
    if header.sums is None:
        return f"after epoch {number - 1}"
    return f"in epoch {number}, after step {header.sums.steps}"


def shapes(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return type and shape of each array."""
    return {name: (array.dtype.str, array.shape) for name, array in arrays.items()}


def to_json(model: Model) -> str:
    """Return JSON by Python's own writer, whose floats are read back exactly."""
    return json.dumps(model.model_dump())


def set_aside(path: Path) -> Path:
    """Rename a file to the first free `*.rejected-N`; return that."""
    number = 1
    while (aside := path.with_name(f"{path.name}.rejected-{number}")).exists():
        number += 1
    return path.rename(aside)


def write_arrays(
    path: Path,
    arrays: Mapping[str, npt.NDArray[Any]],
    metadata: Mapping[str, str],
    former: Path | None = None,
) -> None:
    """Write a whole safetensors file or none, with a checksum over all its content.

    Args:
        path: replaced after all has reached the disk.
        arrays: by name.
        metadata: for the file's header.
        former: what was at `path` is renamed to this, replacing what is there.

    Raises:
        PtbenchError: if it cannot be written; what was at `path` is still there.
    """
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    sealed = {**metadata, "sha256": checksum(contiguous, metadata)}
    try:
        with replacing(path, former) as temporary:
            save_file(contiguous, temporary, sealed)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PtbenchError(
            f"{path} cannot be written ({reason}); make room or allow writing there, and run the "
            "same command again: it goes on from the last checkpoint"
        ) from error


def read_arrays(path: Path) -> tuple[Arrays, dict[str, str]]:
    """Return arrays and metadata of a file that `write_arrays` wrote.

    Raises:
        RejectedError: if it is damaged.
        OSError: if it cannot be read now; it may be whole.
    """
    try:
        path.open("rb").close()  # its errors have numbers, safetensors' have none
        with safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, IsADirectoryError, ValueError, KeyError, TypeError) as error:
        raise RejectedError(f"it cannot be read ({error})") from error
    if metadata.pop("sha256", None) != checksum(arrays, metadata):
        raise RejectedError("its checksum is wrong")
    return arrays, metadata


def packed(arrays: Mapping[str, npt.NDArray[Any]], recipe: Recipe) -> Arrays:
    """Return arrays of which the sparse ones hold their weights other than zero, and their places.

    Args:
        arrays: by name.
        recipe: says which are sparse.
    """
    result = dict(arrays)
    for name, array in arrays.items():
        if place := place_bytes(recipe, name, array.shape):
            flat = np.reshape(array, -1)
            places = np.flatnonzero(flat)
            result[name], result[name + PLACES] = flat[places], places.astype(f"u{place}")
    return result


def unpacked(
    arrays: Mapping[str, npt.NDArray[Any]], shapes: Mapping[str, tuple[int, ...]]
) -> Arrays:
    """Return the whole arrays; the reverse of `packed`.

    Raises:
        ValueError: if places are not those of an array of these shapes.
    """
    result = {name: array for name, array in arrays.items() if not name.endswith(PLACES)}
    for name in arrays.keys() - result.keys():
        matrix = name.removesuffix(PLACES)
        if matrix not in result or matrix not in shapes:
            raise ValueError(f"it has {name} and no {matrix}")
        whole = np.zeros(math.prod(shapes[matrix]), result[matrix].dtype)
        try:
            whole[arrays[name]] = result[matrix]
        except IndexError as error:
            raise ValueError(f"{name} has a place outside {matrix}") from error
        result[matrix] = whole.reshape(shapes[matrix])
    return result


def checksum(arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 over names, types, shapes, numbers and metadata."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
