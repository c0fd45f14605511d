"""The environments: what their locks promise, and what building one does when things go wrong."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from ptbench import environments
from ptbench.backends import FRAMEWORKS
from ptbench.environments import BuildError, build

ROOT = Path(__file__).parents[2]
ENVS = ROOT / "envs"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = [f"{framework}.{kind}" for framework in FRAMEWORKS for kind in ("cpu", "cuda")]
REQUIREMENT = re.compile(r"^([a-z0-9-]+)(?:\[[a-z0-9,-]+\])?==([^\s\\;]+)", re.MULTILINE)


def versions(text: str) -> dict[str, str]:
    """The `name==version` lines of a lock, a source or a list."""
    return dict(REQUIREMENT.findall(text))


def hashes(lock: str) -> dict[str, set[str]]:
    """SHA-256 sums that the lock allows, by requirement."""
    blocks = re.split(r"\n(?=[a-z0-9])", (ENVS / f"{lock}.txt").read_text())
    return {
        block.partition("==")[0]: set(re.findall(r"--hash=sha256:([0-9a-f]{64})\b", block))
        for block in blocks
    }


# --- the locks -------------------------------------------------------------------------------


def test_every_framework_has_a_source_and_a_lock_for_cpu_and_cuda() -> None:
    assert {path.stem for path in ENVS.glob("*.*.txt")} == set(LOCKS)
    assert {path.stem for path in ENVS.glob("*.*.in")} == set(LOCKS)


@pytest.mark.parametrize("lock", LOCKS)
def test_every_requirement_of_a_lock_is_exact_and_has_a_hash(lock: str) -> None:
    lines = (ENVS / f"{lock}.txt").read_text().splitlines()
    requirements = [line for line in lines if not line.startswith("    --hash=sha256:")]
    assert requirements
    assert all(REQUIREMENT.match(line) for line in requirements)
    assert all(hashes(lock).values())


@pytest.mark.parametrize("path", [*sorted(ENVS.iterdir()), ROOT / "pyproject.toml"], ids=str)
def test_no_environment_file_carries_an_address(path: Path) -> None:
    text = path.read_text()
    assert "://" not in text
    assert not re.search(r"^\s*(-i|-f|--(extra-)?index-url|--find-links|index-url)\b", text, re.M)


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_the_versions_that_its_source_asks_for(lock: str) -> None:
    source = (ENVS / f"{lock}.in").read_text()
    assert "-r common.in" in source
    asked = versions(source) | versions((ENVS / "common.in").read_text())
    asked = {name: version.removesuffix("+cpu") for name, version in asked.items()}
    locked = versions((ENVS / f"{lock}.txt").read_text())
    assert {name: locked.get(name) for name in asked} == asked


@pytest.mark.parametrize("lock", LOCKS)
def test_what_ptbench_imports_everywhere_has_the_same_version_as_in_the_workflow(lock: str) -> None:
    workflow = versions("\n".join(PROJECT["project"]["dependencies"]))
    shared = versions((ENVS / "common.in").read_text())
    assert set(shared) == {"nvidia-ml-py", "psutil", "pydantic", "safetensors"}
    assert shared == {name: workflow[name] for name in shared}
    if lock.startswith("mxnet"):
        workflow["numpy"] = "1.23.5"
    assert versions((ENVS / f"{lock}.txt").read_text())["numpy"] == workflow["numpy"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_cpu_lock_needs_no_nvidia_library(framework: str) -> None:
    locked = versions((ENVS / f"{framework}.cpu.txt").read_text())
    assert [name for name in locked if re.match(r"nvidia|cuda|triton", name)] == ["nvidia-ml-py"]


def test_the_cpu_lock_of_pytorch_allows_the_local_cpu_wheel_and_the_public_ones() -> None:
    allowed, public = hashes("pytorch.cpu")["torch"], hashes("pytorch.cuda")["torch"]
    assert public < allowed
    folders = re.split(
        "[ ,]+", os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS", "")
    )
    version = versions((ENVS / "pytorch.cpu.txt").read_text())["torch"]
    name = f"torch-{version}+cpu-cp311-*_x86_64.whl"
    wheels = [wheel for folder in folders if folder for wheel in Path(folder).glob(name)]
    if not wheels:
        pytest.skip(f"no {name} in a folder of UV_FIND_LINKS or PIP_FIND_LINKS to compare with")
    with wheels[0].open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() in allowed - public


def test_every_direct_dependency_of_the_workflow_is_exact_and_agrees_with_the_transitive_pins() -> (
    None
):
    groups = PROJECT["dependency-groups"].values()
    named = [each for group in groups for each in group if isinstance(each, str)]
    direct = PROJECT["project"]["dependencies"] + named
    asked = versions("\n".join(direct))
    pinned = versions("\n".join(PROJECT["tool"]["uv"]["constraint-dependencies"]))
    assert len(asked) == len(direct)
    assert {name: pinned.get(name) for name in asked} == asked


@pytest.mark.parametrize("name", [*FRAMEWORKS, "workflow"])
def test_a_conda_environment_has_the_versions_of_the_lock(name: str) -> None:
    environment = yaml.safe_load((ENVS / f"{name}.yaml").read_text())
    python, pip, packages = environment["dependencies"]
    assert (python, pip) == ("python =3.11", "pip")
    listed = versions("\n".join(packages["pip"]))
    if name == "workflow":
        asked = versions("\n".join(PROJECT["project"]["dependencies"]))
        pinned = versions("\n".join(PROJECT["tool"]["uv"]["constraint-dependencies"]))
        assert asked.items() <= listed.items() <= pinned.items()
    else:
        assert listed == versions((ENVS / f"{name}.cpu.txt").read_text())


# --- building --------------------------------------------------------------------------------


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of locks with one, `empty.cpu`, that requires nothing: no network is needed."""
    folder = tmp_path / "envs"
    folder.mkdir()
    (folder / "empty.cpu.txt").write_text("# nothing\n")
    monkeypatch.setattr(environments, "LOCKS", folder)
    return folder


def test_a_built_environment_runs_and_its_marker_says_what_it_is(
    locks: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "environment"
    marker = build("empty", "cpu", folder)
    assert marker == folder / "environment.json"
    record = json.loads(marker.read_text())
    assert record["framework"] == "empty"
    assert record["accelerator"] == "cpu"
    assert record["versions"] == {}
    lock = (locks / "empty.cpu.txt").read_bytes()
    assert record["lock_sha256"] == hashlib.sha256(lock).hexdigest()
    prefix = subprocess.check_output(
        [folder / record["python"], "-c", "import sys; print(sys.prefix)"], text=True
    )
    assert Path(prefix.strip()) == folder


def test_building_again_touches_nothing_until_the_lock_changes(locks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "environment"
    stray = folder / "stray"
    marker = build("empty", "cpu", folder)
    stray.touch()
    before = marker.stat().st_mtime_ns
    assert build("empty", "cpu", folder) == marker
    assert marker.stat().st_mtime_ns == before
    assert stray.exists()
    (locks / "empty.cpu.txt").write_text("# still nothing\n")
    build("empty", "cpu", folder)
    assert not stray.exists()
    digest = hashlib.sha256(b"# still nothing\n").hexdigest()
    assert json.loads(marker.read_text())["lock_sha256"] == digest


@pytest.mark.parametrize("damage", ["marker", "python", "half a marker"])
@pytest.mark.usefixtures("locks")
def test_an_interrupted_or_damaged_environment_is_built_anew(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "environment"
    marker = build("empty", "cpu", folder)
    if damage == "half a marker":
        marker.write_text(marker.read_text()[:20])
    else:
        (marker if damage == "marker" else folder / "bin" / "python").unlink()
    build("empty", "cpu", folder)
    subprocess.run([folder / "bin" / "python", "-c", ""], check=True)
    assert json.loads(marker.read_text())["python"] == "bin/python"


@pytest.mark.usefixtures("locks")
def test_of_two_that_build_at_once_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, ...]] = []
    uv = environments._uv
    monkeypatch.setattr(environments, "_uv", lambda *words: (made.append(words), uv(*words)))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(build, ["empty"] * 4, ["cpu"] * 4, [tmp_path / "environment"] * 4))
    assert [words[0] for words in made] == ["venv", "pip"]


@pytest.mark.usefixtures("locks")
def test_an_unknown_framework_is_told_which_locks_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        BuildError, match=r"no lock for theano\.cpu in envs/; there is: empty\.cpu\."
    ):
        build("theano", "cpu", tmp_path / "environment")
    assert not (tmp_path / "environment").exists()


@pytest.mark.usefixtures("locks")
def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "home" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("years of work")
    with pytest.raises(BuildError, match="no virtual environment and not empty"):
        build("empty", "cpu", precious.parent)
    assert precious.read_text() == "years of work"


@pytest.mark.usefixtures("locks")
def test_a_missing_uv_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(BuildError, match=r"uv, which builds .* not on the PATH: `pip install uv`"):
        build("empty", "cpu", tmp_path / "environment")


@pytest.mark.usefixtures("locks")
def test_another_python_is_refused_by_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.14.0")
    with pytest.raises(BuildError, match=r"for Python 3\.11, and this is Python 3\.14\.0: run"):
        build("empty", "cpu", tmp_path / "environment")
    assert not (tmp_path / "environment").exists()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of version 1.0 of a package `tiny`, in a folder that only pip's variable names."""
    path = tmp_path / "wheels" / "tiny-1.0-py3-none-any.whl"
    path.parent.mkdir()
    information = {
        "METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny.py", "")
        for name, text in information.items():
            archive.writestr(f"tiny-1.0.dist-info/{name}", text)
    monkeypatch.delenv("UV_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    monkeypatch.setenv("UV_OFFLINE", "1")
    return path


def test_wheels_in_the_folder_that_pip_is_told_of_are_found(
    locks: Path, wheel: Path, tmp_path: Path
) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (locks / "tiny.cpu.txt").write_text(f"tiny==1.0 --hash=sha256:{digest}\n")
    marker = build("tiny", "cpu", tmp_path / "environment")
    assert json.loads(marker.read_text())["versions"] == {"tiny": "1.0"}


@pytest.mark.usefixtures("wheel")
def test_a_wheel_with_another_hash_is_not_installed(locks: Path, tmp_path: Path) -> None:
    (locks / "tiny.cpu.txt").write_text(f"tiny==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(
        BuildError, match=r"^`uv pip sync` failed: error: .*[Hh]ash mismatch"
    ) as error:
        build("tiny", "cpu", tmp_path / "environment")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "environment" / "environment.json").exists()


@pytest.mark.usefixtures("wheel")
def test_a_failed_rebuild_leaves_no_marker_of_the_old_environment(
    locks: Path, tmp_path: Path
) -> None:
    marker = build("empty", "cpu", tmp_path / "environment")
    (locks / "empty.cpu.txt").write_text(f"absent==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(BuildError, match=r"^`uv pip sync` failed: error: .*absent"):
        build("empty", "cpu", tmp_path / "environment")
    assert not marker.exists()


@pytest.mark.usefixtures("wheel")
def test_a_torch_for_cuda_in_a_cpu_environment_is_an_error(
    locks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (locks / "pytorch.cpu.txt").write_text("# nothing\n")
    monkeypatch.setattr(environments, "_installed_versions", lambda _: {"torch": "2.13.0"})
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(BuildError, match=r"no CPU build of torch 2\.13\.0: put its wheel there"):
        build("pytorch", "cpu", tmp_path / "environment")
    assert not (tmp_path / "environment" / "environment.json").exists()
