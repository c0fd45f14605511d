"""How files are written: a whole file under its name, or none; and their checksums.

Every result is written by a function of this module. A file is first written beside its place,
flushed to the disk, and then renamed, so that neither a killed process nor a full disk leaves half
of it. Its permissions are those that the user's umask gives.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


def _default_mode() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask


# Read once, at import: to ask for the umask is to change it for a moment, in all threads.
MODE = _default_mode()


@contextlib.contextmanager
def replacing(path: Path, former: Path | None = None) -> Iterator[Path]:
    """Yield a path to write to; when the block ends, that file takes the place of `path`.

    Args:
        path: its folder is made if it is missing. It is replaced after all has reached the disk.
        former: what was at `path` is renamed to this, replacing what is there.

    Raises:
        OSError: if the file cannot be written; its `filename` is the path. What was there is
            still there, and nothing half-written is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_char_device():  # nothing takes the place of /dev/null, not even for root
        yield path
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        publish(temporary, path, former)
    except OSError as error:
        error.filename = str(path)  # a full disk names no file, and the temporary one helps nobody
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def publish(temporary: Path, path: Path, former: Path | None = None) -> None:
    """Give a finished file of the same file system its name, readable as the umask says.

    Args:
        former: what was at `path` is renamed to this, replacing what is there.
    """
    temporary.chmod(MODE)  # some libraries write files that only their owner may read
    flush(temporary)
    if former and path.exists():
        path.replace(former)
    temporary.replace(path)
    flush(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Write a whole text file or none; it raises what `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def overwrite(path: Path, text: str) -> None:
    """Write over a text file in its place, which needs no room if it is of about the same length.

    A process that dies meanwhile leaves half of it, so this is for a full disk alone.
    """
    with path.open("r+", encoding="utf-8") as file:
        file.write(text)
        file.truncate()
    flush(path)


def write_new(path: Path, text: str) -> bool:
    """Make a text file; return False, and change nothing, if there is one already.

    link(2) makes it: one process alone can succeed with it, on NFS too, and other processes see
    the whole content or no file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        own.write_text(text, encoding="utf-8")
        flush(own)
        try:
            path.hardlink_to(own)
        except FileExistsError:
            # An NFS server's answer may be lost and the link be there all the same (open(2)).
            return own.stat().st_nlink == 2
        return True
    finally:
        own.unlink(missing_ok=True)


def folders_above(path: Path) -> list[Path]:
    """Return the folders that a path is in, nearest first: as it is written, then without links.

    A folder of results may have been moved to another disk, with a link in its place.
    """
    return list(dict.fromkeys([*path.absolute().parents, *path.resolve().parents]))


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left beside a file while they were writing it."""
    for leftover in path.parent.glob(f".{path.name}.*"):
        leftover.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
