"""Files are written whole or not at all, and readable as the umask says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ptbench.files import remove_leftovers, replacing, sha256, write_atomically, write_new
from ptbench.log import Log


def test_a_block_that_fails_changes_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "before")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_there_gets_the_former_name(tmp_path: Path) -> None:
    path, former = tmp_path / "folder" / "file", tmp_path / "folder" / "former"
    for text in ("one", "two", "three"):
        with replacing(path, former) as temporary:
            temporary.write_text(text)
    assert (path.read_text(), former.read_text()) == ("three", "two")


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_atomically(tmp_path / "folder", "text")
    assert caught.value.filename == str(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_new_file_is_made_whole_and_once(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "record"
    assert write_new(path, "first")
    assert not write_new(path, "second")
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["record"]


def test_what_killed_processes_left_of_a_file_is_removed(tmp_path: Path) -> None:
    for name in (".last.1", ".last.23", ".lasting.1", "last"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "last")
    assert {path.name for path in tmp_path.iterdir()} == {".lasting.1", "last"}


def test_a_checksum_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("abc")
    # FIPS 180-2, appendix B.1
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "file") == digest


WRITES = """
import sys
from pathlib import Path
import numpy as np
from ptbench.log import Log
from ptbench.files import write_atomically, write_new
from ptbench.training.checkpoints import write_arrays

folder = Path(sys.argv[1])
write_atomically(folder / "text", "text")
write_new(folder / "record", "text")
write_arrays(folder / "arrays", {"a": np.zeros(3)}, {})
"""


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_every_kind_of_file_is_readable_as_the_umask_says(tmp_path: Path, umask: int) -> None:
    subprocess.run(
        [sys.executable, "-c", WRITES, tmp_path], preexec_fn=lambda: os.umask(umask), check=True
    )
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(["text", "record", "arrays"], 0o666 & ~umask)


def test_nothing_takes_the_place_of_a_device(tmp_path: Path) -> None:
    """Root could replace /dev/null itself; a link to it is enough to see."""
    device = tmp_path / "null"
    device.symlink_to("/dev/null")
    write_atomically(device, "text")
    with Log(device) as log:
        log.say("a line")
    assert device.is_char_device()
