"""Fetching: every failure is one sentence and leaves no file; what arrives whole is verified."""

from __future__ import annotations

import hashlib
import io
import random
import socket
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ptbench.corpus import CorpusError
from ptbench.corpus import fetch as fetching
from ptbench.corpus.definitions import SPLITS, DownloadedCorpus, FolderCorpus
from ptbench.corpus.fetch import fetch

# Longer than a read, so that a body can break off in the middle.
TEXTS = {split: f"a line of {split}\n".encode() * 20_000 for split in SPLITS}
CHECKSUMS = {split: hashlib.sha256(text).hexdigest() for split, text in TEXTS.items()}
PLAIN = {split: f"{split}.txt" for split in SPLITS}
INSIDE = {split: f"data/ptb.{split}.txt" for split in SPLITS}


def tar(
    members: dict[str, bytes], links: dict[str, str] | None = None, mode: str = "w:gz"
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return buffer.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


WHOLE = {f"./{INSIDE[split]}": TEXTS[split] for split in SPLITS}


class Server(ThreadingHTTPServer):
    """Serves `content` by path, or misbehaves as its attributes say."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content: dict[str, bytes] = {f"/{PLAIN[s]}": TEXTS[s] for s in SPLITS}
        self.failures_to_come = 0  # answers of status 500 before the good ones
        self.truncate = False
        self.silent = threading.Event()  # set: never answer
        self.requests: list[str] = []
        self.agents: list[str] = []
        self.times: list[float] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(self.path)
        server.agents.append(self.headers["User-Agent"])
        server.times.append(time.monotonic())
        if server.silent.is_set():
            time.sleep(5)
            return
        if server.failures_to_come:
            server.failures_to_come -= 1
            self.send_error(500)
            return
        body = server.content.get(self.path)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if server.truncate else body)

    def log_message(self, *_: object) -> None:
        """Keeps the tests' output clean."""


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests talk to this machine, whatever proxy reaches the others."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def plain(url: str) -> dict[str, Any]:
    return {"url": url, "format": "plain", "paths": PLAIN}


def archive(url: str) -> dict[str, Any]:
    return {"url": url, "format": "archive", "paths": INSIDE}


def corpus(*mirrors: dict[str, Any], **settings: Any) -> DownloadedCorpus:
    quick = {"timeout_seconds": 0.5, "retries": 1, "backoff_seconds": 0.01}
    return DownloadedCorpus(kind="download", mirrors=mirrors, files=CHECKSUMS, **(quick | settings))


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def check_failure(definition: DownloadedCorpus, folder: Path, *parts: str) -> None:
    """One sentence that has the parts given; nothing at all in the folder for downloads."""
    with pytest.raises(CorpusError) as caught:
        fetch("mine", definition, folder)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(""": --config 'mirrors={mine: "file:/folder/with/the/three/files"}'""")
    for part in parts:
        assert part in sentence
    assert files(folder) == []


def check_success(definition: DownloadedCorpus, folder: Path) -> None:
    paths = fetch("mine", definition, folder)
    assert {split: path.read_bytes() for split, path in paths.items()} == TEXTS
    assert files(folder) == ["mine", "mine/test.txt", "mine/train.txt", "mine/valid.txt"]


def test_no_network_is_said(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"  # bound and not listening: refuses
        check_failure(corpus(plain(url)), tmp_path, url, "no network")


def test_404_is_said_and_not_tried_again(server: Server, tmp_path: Path) -> None:
    check_failure(corpus(plain(server.url + "/gone")), tmp_path, "HTTP 404", "/gone/train.txt")
    assert server.requests == ["/gone/train.txt"]


def test_a_time_out_is_said(server: Server, tmp_path: Path) -> None:
    server.silent.set()
    settings = corpus(plain(server.url), timeout_seconds=0.1)
    check_failure(settings, tmp_path, "timed out after 0.1 s")
    assert len(server.requests) == 2


def test_a_truncated_body_is_said(server: Server, tmp_path: Path) -> None:
    server.truncate = True
    check_failure(corpus(plain(server.url)), tmp_path, "broke off before its end")
    assert len(server.requests) == 2


def test_a_wrong_checksum_is_said(server: Server, tmp_path: Path) -> None:
    server.content["/valid.txt"] = b"another text\n"
    found = hashlib.sha256(b"another text\n").hexdigest()
    check_failure(
        corpus(plain(server.url)), tmp_path, "valid", "wrong checksum", found, CHECKSUMS["valid"]
    )


@pytest.mark.parametrize("pack", [tar, zipped], ids=["tar", "zip"])
def test_an_archive_without_the_files_is_said(server: Server, tmp_path: Path, pack: Any) -> None:
    server.content["/a"] = pack({k: v for k, v in WHOLE.items() if "valid" not in k})
    check_failure(corpus(archive(server.url + "/a")), tmp_path, "without data/ptb.valid.txt")


@pytest.mark.parametrize("pack", [tar, zipped], ids=["tar", "zip"])
@pytest.mark.parametrize("path", ["../evil.txt", "data/../../evil.txt", "/evil.txt"])
def test_an_archive_with_a_path_that_escapes_is_refused(
    server: Server, tmp_path: Path, pack: Any, path: str
) -> None:
    downloads = tmp_path / "inner" / "downloads"
    server.content["/a"] = pack({**WHOLE, path: b"gotcha\n"})
    said = "a path that leads outside it"
    check_failure(corpus(archive(server.url + "/a")), downloads, said, path)
    assert files(tmp_path) == ["inner", "inner/downloads"]


def test_an_archive_whose_file_is_a_link_is_refused(server: Server, tmp_path: Path) -> None:
    members = {k: v for k, v in WHOLE.items() if "test" not in k}
    server.content["/a"] = tar(members, {INSIDE["test"]: "/etc/passwd"})
    check_failure(corpus(archive(server.url + "/a")), tmp_path, "without data/ptb.test.txt")


def test_a_tar_archive_that_was_cut_off_is_said(server: Server, tmp_path: Path) -> None:
    whole = tar(WHOLE)
    server.content["/a"] = whole[: len(whole) // 2]
    check_failure(corpus(archive(server.url + "/a")), tmp_path, "/a is a damaged archive")


def test_a_zip_archive_with_altered_bytes_is_said(server: Server, tmp_path: Path) -> None:
    whole = zipped(WHOLE)
    middle = len(whole) // 2
    server.content["/a"] = whole[:middle] + bytes(64) + whole[middle + 64 :]
    check_failure(corpus(archive(server.url + "/a")), tmp_path, "/a is a damaged archive")


def test_a_damaged_bz2_archive_gives_way_to_the_next_mirror(server: Server, tmp_path: Path) -> None:
    """Its error says nothing of its kind: it is a plain OSError."""
    noise = {name: random.Random(name).randbytes(400_000) for name in WHOLE}
    whole = tar(noise, mode="w:bz2")
    last = len(whole) * 9 // 10  # not in the first block, where it would be no archive at all
    server.content["/a"] = whole[:last] + bytes(64) + whole[last + 64 :]
    bad = archive(server.url + "/a")
    check_failure(corpus(bad), tmp_path, "/a is a damaged archive (Invalid data stream)")
    check_success(corpus(bad, plain(server.url)), tmp_path)


SIZE = {"train": 100, "valid": 10, "test": 10, "vocabulary": 5}


@pytest.mark.parametrize("settings", [{}, {"size": SIZE}])
def test_a_mirror_that_would_fill_the_disk_is_cut_off(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    """As it is downloaded, as it is copied, and as it is unpacked."""
    monkeypatch.setattr(fetching, "MOST_BYTES", 250_000)
    monkeypatch.setattr(fetching, "SPARE_BYTES", 250_000 - 64 * 120)
    said = "has more than 250,000 bytes"
    check_failure(corpus(plain(server.url), **settings), tmp_path, f"/train.txt {said}")
    server.content["/a"] = tar(WHOLE)
    assert len(server.content["/a"]) < 250_000
    mirror = archive(server.url + "/a")
    check_failure(
        corpus(mirror, **settings), tmp_path, f"data/ptb.train.txt of {mirror['url']} {said}"
    )
    own = tmp_path / "own"
    own.mkdir()
    for split in SPLITS:
        (own / PLAIN[split]).write_bytes(TEXTS[split])
    check_failure(corpus(plain(own.as_uri()), **settings), tmp_path / "d", f"/train.txt {said}")


def test_what_is_no_archive_is_said(server: Server, tmp_path: Path) -> None:
    server.content["/a"] = b"<html>Please log in</html>"
    check_failure(corpus(archive(server.url + "/a")), tmp_path, "neither a tar nor a zip archive")


def test_a_file_mirror_that_is_not_there_is_said(tmp_path: Path) -> None:
    url = (tmp_path / "nowhere").as_uri()
    check_failure(corpus(plain(url)), tmp_path / "d", url, "No such file")


def test_every_mirror_has_its_reason_in_the_sentence(server: Server, tmp_path: Path) -> None:
    mirrors = plain(server.url + "/gone"), archive(server.url + "/lost")
    check_failure(corpus(*mirrors), tmp_path, "/gone/train.txt", "/lost", "HTTP 404")


def test_plain_files_are_fetched(server: Server, tmp_path: Path) -> None:
    check_success(corpus(plain(server.url)), tmp_path)
    assert all(agent.startswith("ptbench/") for agent in server.agents)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tar_archives_are_extracted(server: Server, tmp_path: Path, mode: str) -> None:
    server.content["/a"] = tar(WHOLE, mode=mode)
    check_success(corpus(archive(server.url + "/a")), tmp_path)


def test_zip_archives_are_extracted(server: Server, tmp_path: Path) -> None:
    server.content["/a"] = zipped({name.removeprefix("./"): text for name, text in WHOLE.items()})
    check_success(corpus(archive(server.url + "/a")), tmp_path)


def test_the_next_mirror_is_used_when_one_fails(server: Server, tmp_path: Path) -> None:
    server.content["/a"] = tar({"other.txt": b"something else\n"})
    bad = plain(server.url + "/gone"), archive(server.url + "/a")
    check_success(corpus(*bad, plain(server.url)), tmp_path)


def test_a_mirror_with_an_altered_file_gives_way_to_the_next(
    server: Server, tmp_path: Path
) -> None:
    server.content |= {f"/bad/{PLAIN[split]}": TEXTS[split] for split in SPLITS}
    server.content["/bad/test.txt"] += b"one line more\n"
    check_success(corpus(plain(server.url + "/bad"), plain(server.url)), tmp_path)


def test_a_passing_failure_is_tried_again(server: Server, tmp_path: Path) -> None:
    server.failures_to_come = 1
    check_success(corpus(plain(server.url), retries=1), tmp_path)
    assert server.requests[:2] == ["/train.txt", "/train.txt"]


def test_pauses_between_tries_double(server: Server, tmp_path: Path) -> None:
    server.failures_to_come = 3
    check_success(corpus(plain(server.url), retries=3, backoff_seconds=0.1), tmp_path)
    first, second, third, last = server.times[:4]
    assert second - first >= 0.1
    assert third - second >= 0.2
    assert last - third >= 0.4


def test_a_lasting_failure_ends_after_the_retries(server: Server, tmp_path: Path) -> None:
    server.failures_to_come = 100
    check_failure(corpus(plain(server.url), retries=2), tmp_path, "HTTP 500")
    assert len(server.requests) == 3


def test_a_file_mirror_goes_through_the_same_verification(tmp_path: Path) -> None:
    folder = tmp_path / "my mirror"
    folder.mkdir()
    for split in SPLITS:
        (folder / PLAIN[split]).write_bytes(TEXTS[split])
    check_success(corpus(plain(folder.as_uri())), tmp_path / "d1")
    (folder / "train.txt").write_bytes(b"tampered with\n")
    check_failure(corpus(plain(folder.as_uri())), tmp_path / "d2", "wrong checksum")


def test_a_file_mirror_may_be_relative_and_an_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "simple-examples.tgz").write_bytes(tar(WHOLE))
    check_success(corpus(archive("file:simple-examples.tgz")), tmp_path / "d")


def test_verified_files_are_not_downloaded_again(server: Server, tmp_path: Path) -> None:
    check_success(corpus(plain(server.url)), tmp_path)
    server.requests.clear()
    check_success(corpus(plain(server.url)), tmp_path)
    assert server.requests == []


def test_a_file_altered_on_disk_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    check_success(corpus(plain(server.url)), tmp_path)
    (tmp_path / "mine" / "valid.txt").write_bytes(b"half a fi")
    check_success(corpus(plain(server.url)), tmp_path)


def test_a_failure_keeps_files_fetched_before(server: Server, tmp_path: Path) -> None:
    check_success(corpus(plain(server.url)), tmp_path)
    (tmp_path / "mine" / "valid.txt").write_bytes(b"half a fi")
    with pytest.raises(CorpusError, match="404"):
        fetch("mine", corpus(plain(server.url + "/gone")), tmp_path)
    assert (tmp_path / "mine" / "train.txt").read_bytes() == TEXTS["train"]


def test_a_downloads_folder_that_cannot_be_written_is_said(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CorpusError, match=r"cannot be stored in .*file/downloads: Not a directory"):
        fetch("mine", corpus(plain(server.url)), tmp_path / "file" / "downloads")
    assert files(tmp_path) == ["file"]


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_on_a_terminal_or_else_written_to_the_log(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal, pipe = Terminal(), io.StringIO()
    fetch("mine", corpus(plain(server.url)), tmp_path / "d1", terminal)
    assert "train.txt: 100%" in terminal.getvalue()
    assert capsys.readouterr().err == ""
    fetch("mine", corpus(plain(server.url)), tmp_path / "d2", pipe)
    assert pipe.getvalue() == ""
    assert "train.txt: 100%" in capsys.readouterr().err


def test_a_folder_of_the_users_own_is_used_where_it_is(tmp_path: Path) -> None:
    for split in SPLITS:
        (tmp_path / f"{split}.txt").write_bytes(TEXTS[split])
    paths = fetch("mine", FolderCorpus(kind="folder", folder=tmp_path), tmp_path / "downloads")
    assert paths == {split: tmp_path / f"{split}.txt" for split in SPLITS}
    assert not (tmp_path / "downloads").exists()


def test_a_folder_without_a_split_is_said(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes(TEXTS["train"])
    with pytest.raises(CorpusError, match=r"has no valid\.txt and no test\.txt; it must hold"):
        fetch("mine", FolderCorpus(kind="folder", folder=tmp_path), tmp_path)


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"corpus mine: there is no folder .*nowhere"):
        fetch("mine", FolderCorpus(kind="folder", folder=tmp_path / "nowhere"), tmp_path)


def test_a_folder_with_checksums_is_verified(tmp_path: Path) -> None:
    for split in SPLITS:
        (tmp_path / f"{split}.txt").write_bytes(TEXTS[split])
    pinned = FolderCorpus(kind="folder", folder=tmp_path, files=CHECKSUMS)  # type: ignore[arg-type]
    assert fetch("mine", pinned, tmp_path)["test"].read_bytes() == TEXTS["test"]
    (tmp_path / "test.txt").write_bytes(b"another\n")
    with pytest.raises(CorpusError, match=r"corpus mine: the test file of .* wrong checksum"):
        fetch("mine", pinned, tmp_path)
