"""Download, verify and extract the raw text of a corpus, or find it in a folder.

Only complete, verified files get their final names. `prepare.py` reads them.
"""

from __future__ import annotations

import gzip
import lzma
import shutil
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, TextIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pooch
import requests
import urllib3
from tqdm import tqdm

import ptbench
from ptbench.corpus import CorpusError
from ptbench.corpus.definitions import (
    SPLITS,
    DownloadedCorpus,
    FolderCorpus,
    Mirror,
    Split,
    SplitChecksums,
    texts_in,
)
from ptbench.files import publish, sha256

pooch.get_logger().setLevel("WARNING")  # the errors raised here already say it

# Some hosts refuse the default name of Python's libraries.
HEADERS = {"User-Agent": f"ptbench/{ptbench.__version__}"}
CHUNK_BYTES = 1 << 16

# The most that a download, or a file in an archive, may have, so that no mirror fills the disk.
MOST_BYTES = 1 << 32  # where the corpus does not say its size
SPARE_BYTES = 1 << 28  # elsewhere: what an archive may hold beside the corpus,
BYTES_PER_TOKEN = 64  # and ten times the average of English

DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    RuntimeError,  # an encrypted zip archive, or one compressed in a way unknown to zipfile
)


class MirrorError(Exception):
    """A mirror that cannot be used; the next one is tried."""


class Bounded:
    """A file that takes at most so many bytes."""

    def __init__(self, file: IO[bytes], most: int, source: str) -> None:
        self.file, self.most, self.source = file, most, source
        self.flush = file.flush

    def write(self, data: bytes) -> int:
        """Write to the file.

        Raises:
            MirrorError: if it would have too many bytes.
        """
        if self.file.tell() + len(data) > self.most:
            raise MirrorError(
                f"{self.source} has more than {self.most:,} bytes, the most that is taken for this "
                "corpus"
            )
        return self.file.write(data)


def most_bytes(definition: DownloadedCorpus) -> int:
    """Return the most bytes that each download, and each file in an archive, may have."""
    if (size := definition.size) is None:
        return MOST_BYTES
    return SPARE_BYTES + BYTES_PER_TOKEN * (size.train + size.valid + size.test)


def fetch(
    name: str,
    definition: DownloadedCorpus | FolderCorpus,
    downloads_folder: Path,
    terminal: TextIO = sys.stderr,
) -> dict[Split, Path]:
    """Return the paths of the three raw files, after verifying them.

    Args:
        name: of the corpus, for messages and as the name of its folder in `downloads_folder`.
        definition: where the files are.
        downloads_folder: where downloads are kept; files already there are used if their checksums
            are right.
        terminal: where a progress bar is shown, if it is a terminal.

    Raises:
        CorpusError: if they cannot be fetched; only complete, verified files are left behind.
    """
    if isinstance(definition, FolderCorpus):
        return _find(name, definition)
    folder = downloads_folder / name
    paths: dict[Split, Path] = {split: folder / f"{split}.txt" for split in SPLITS}
    if all(paths[s].is_file() and sha256(paths[s]) == getattr(definition.files, s) for s in SPLITS):
        return paths

    reasons = []
    for mirror in definition.mirrors:
        try:
            downloads_folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=downloads_folder) as partial:
                staged = _from_mirror(mirror, definition, Path(partial), terminal)
                _verify(staged, definition.files, mirror.url)
                folder.mkdir(exist_ok=True)
                for split, path in staged.items():
                    publish(path, paths[split])
            return paths
        except MirrorError as error:
            reasons.append(str(error))
            print(f"[{name}] {error}", file=sys.stderr, flush=True)
        except OSError as error:
            raise CorpusError(
                f"corpus {name} cannot be stored in {downloads_folder}: {error.strerror or error}"
            ) from error
    raise CorpusError(
        f"corpus {name} cannot be fetched from any of its mirrors ({'; '.join(reasons)}); check "
        "the network, or say where else the three files are: "
        f"--config 'mirrors={{{name}: \"file:/folder/with/the/three/files\"}}'"
    )


def _find(name: str, definition: FolderCorpus) -> dict[Split, Path]:
    """Return the paths of a folder corpus' files."""
    folder = definition.folder
    paths = texts_in(name, folder)
    if definition.files is not None:
        try:
            _verify(paths, definition.files, str(folder))
        except (MirrorError, OSError) as error:
            raise CorpusError(f"corpus {name}: {error}") from error
    return paths


def _verify(paths: Mapping[Split, Path], checksums: SplitChecksums, source: str) -> None:
    """Raise MirrorError if a file has another checksum than the pinned one."""
    for split, path in paths.items():
        found, expected = sha256(path), getattr(checksums, split)
        if found != expected:
            raise MirrorError(
                f"the {split} file of {source} has the wrong checksum: SHA-256 {found}, not "
                f"{expected}"
            )


def _from_mirror(
    mirror: Mirror, definition: DownloadedCorpus, folder: Path, terminal: TextIO
) -> dict[Split, Path]:
    """Download into `folder` what a mirror has, and extract it, without verifying it."""
    within: dict[Split, str] = {split: getattr(mirror.paths, split) for split in SPLITS}
    paths: dict[Split, Path] = {split: folder / f"{split}.txt" for split in SPLITS}
    if mirror.format == "plain":
        for split, path in paths.items():
            url = f"{mirror.url.rstrip('/')}/{within[split]}"
            _download(url, path, definition, terminal)
        return paths
    archive = folder / "archive"
    _download(mirror.url, archive, definition, terminal)
    try:
        wanted = {within[split]: path for split, path in paths.items()}
        _extract(archive, wanted, mirror.url, most_bytes(definition))
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of bz2
            raise
        raise MirrorError(f"{mirror.url} is a damaged archive ({error})") from error
    return paths


def _download(url: str, path: Path, definition: DownloadedCorpus, terminal: TextIO) -> None:
    """Download one file to `path`; try again after failures that may be temporary."""
    most = most_bytes(definition)
    pauses = [definition.backoff_seconds * 2**attempt for attempt in range(definition.retries)]
    for pause in [*pauses, None]:
        try:
            with tqdm(
                total=1,  # pooch sets it when it knows
                desc=url.rsplit("/", 1)[-1],
                unit="B",
                unit_scale=True,
                file=terminal if terminal.isatty() else sys.stderr,  # which may be a log
                mininterval=0.1 if terminal.isatty() else 5.0,
            ) as bar:
                download: Callable[..., Any] = pooch.HTTPDownloader(
                    progressbar=bar,
                    chunk_size=CHUNK_BYTES,
                    timeout=definition.timeout_seconds,
                    headers=HEADERS,
                )
                if urlsplit(url).scheme == "file":
                    download = _copy

                def bounded(url: str, name: str, pooch: Any, download: Any = download) -> None:
                    with Path(name).open("wb") as file:
                        download(url, Bounded(file, most, url), pooch)

                pooch.retrieve(url, None, path.name, path.parent, downloader=bounded)
            return
        except requests.RequestException as error:
            reason = _explain(error, url, definition.timeout_seconds)
            if pause is None or not _may_pass(error):
                raise MirrorError(reason) from error
            print(f"{reason}; next try in {pause:g} s", file=sys.stderr, flush=True)
            time.sleep(pause)


def _copy(url: str, output: Bounded, _: object) -> None:
    """Copy the file of a file: address, as one of pooch's downloaders does."""
    source = Path(url2pathname(urlsplit(url).path))
    try:
        opened = source.open("rb")
    except OSError as error:
        raise MirrorError(f"{url} cannot be read: {error.strerror}") from error
    with opened:
        shutil.copyfileobj(opened, output)


def _may_pass(error: requests.RequestException) -> bool:
    """Return whether it makes sense to try again."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
        return status in (requests.codes.request_timeout, requests.codes.too_many) or status >= 500
    passing = requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError
    return isinstance(error, passing)


def _explain(error: requests.RequestException, url: str, timeout_seconds: float) -> str:
    """Return what went wrong with a download, as part of a sentence."""
    silent = isinstance(error, requests.Timeout) or any(
        isinstance(cause, urllib3.exceptions.ReadTimeoutError) for cause in error.args
    )
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"{url} is not served: HTTP {error.response.status_code} {error.response.reason}"
    if silent:
        return f"{url} timed out after {timeout_seconds:g} s of silence"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return f"{url} broke off before its end"
    if isinstance(error, requests.ConnectionError):
        return f"{url} cannot be reached: no network, or no such host or server"
    return f"{url} cannot be downloaded: {error}"


def _extract(archive: Path, wanted: Mapping[str, Path], source: str, most: int) -> None:
    """Copy the wanted members, by name, to the given paths; no other path is ever written.

    Raises:
        MirrorError: if it is not an archive, lacks a member, has one of more bytes than `most`, or
            has a path that leads outside.
    """
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            _copy_members(
                {info.filename: info for info in opened.infolist() if not info.is_dir()},
                opened.open,
                wanted,
                source,
                most,
            )
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as opened_tar:
            members = {member.name: member for member in opened_tar if not member.isdir()}
            regular = {name: member for name, member in members.items() if member.isreg()}
            _refuse_escapes(members, source)  # also links and other special members
            _copy_members(regular, opened_tar.extractfile, wanted, source, most)
    else:
        raise MirrorError(f"{source} is neither a tar nor a zip archive")


def _copy_members(
    members: Mapping[str, Any],
    open_member: Callable[[Any], IO[bytes] | None],
    wanted: Mapping[str, Path],
    source: str,
    most: int,
) -> None:
    _refuse_escapes(members, source)
    # ./a/b and a/b are the same: PurePosixPath drops the dot.
    by_path = {PurePosixPath(name): member for name, member in members.items()}
    if missing := [name for name in wanted if PurePosixPath(name) not in by_path]:
        raise MirrorError(f"{source} is an archive without {' and without '.join(missing)}")
    for name, path in wanted.items():
        opened = open_member(by_path[PurePosixPath(name)])
        assert opened is not None  # a regular file
        with opened, path.open("wb") as file:
            shutil.copyfileobj(opened, Bounded(file, most, f"{name} of {source}"))


def _refuse_escapes(names: Mapping[str, Any], source: str) -> None:
    for name in names:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise MirrorError(f"{source} is an archive with a path that leads outside it, {name!r}")
