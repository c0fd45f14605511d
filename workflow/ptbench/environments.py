"""Building a framework's virtual environment from its lock, with uv.

The locks are `envs/<framework>.<accelerator>.txt`, and `envs/lock.sh` makes them. What runs inside
an environment, and the conda environments of `--sdm conda`, are no business of this module.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from ptbench.errors import PtbenchError
from ptbench.files import write_atomically

LOCKS = Path(__file__).parents[2] / "envs"
MARKER = "environment.json"
PYTHON = "bin/python"  # relative to the environment's folder

# Printed by the environment's own interpreter, so it says what that interpreter would import.
VERSIONS = """
import importlib.metadata, json, re
found = importlib.metadata.distributions()
versions = {re.sub("[-_.]+", "-", d.metadata["Name"]).lower(): d.version for d in found}
print(json.dumps(dict(sorted(versions.items()))))
"""


class BuildError(PtbenchError):
    """An environment that cannot be built."""


def build(framework: str, accelerator: str, folder: Path) -> Path:
    """Make `folder` a virtual environment with exactly what the framework's lock lists.

    Does nothing where the environment was already built from the same lock. Anything else that is
    in its place is built anew; an interrupted build has no marker and counts as absent.

    Args:
        framework: as in `envs/`: pytorch, tensorflow, keras, mxnet or jax.
        accelerator: `cpu` or `cuda`.
        folder: the environment's own; its interpreter becomes `folder/bin/python`.

    Returns:
        The marker, `folder/environment.json`, written last: `framework`, `accelerator`, `python`
        (relative to the folder), `lock_sha256`, and `versions` of every installed distribution.

    Raises:
        BuildError: no such lock, a folder that holds something else, uv missing, an unsupported
            Python, or whatever uv says it failed on.
    """
    _lock_sha256(framework, accelerator)  # refuses what has no lock
    marker = folder / MARKER
    if is_current(framework, accelerator, folder):
        return marker

    if not platform.python_version().startswith("3.11."):
        raise BuildError(
            "The locks in envs/ are for Python 3.11, and this is Python "
            f"{platform.python_version()}: run the workflow with `uv run`, which chooses the right "
            "one."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)  # another process may be building it
        if not is_current(framework, accelerator, folder):
            _build(framework, accelerator, folder)
    return marker


def _build(framework: str, accelerator: str, folder: Path) -> None:
    lock = LOCKS / f"{framework}.{accelerator}.txt"
    marker, python = folder / MARKER, folder / PYTHON
    if folder.exists() and not (folder.is_dir() and _is_replaceable(folder)):
        raise BuildError(
            f"{folder} is no virtual environment and not empty: name another folder, or remove it."
        )

    marker.unlink(missing_ok=True)
    _uv("venv", "--quiet", "--clear", "--python", sys.executable, str(folder))
    sync = ["pip", "sync", "--python", str(python), str(lock)]
    if (framework, accelerator) == ("pytorch", "cpu") and not _find_links():
        sync += ["--torch-backend", "cpu"]  # the public index has the build for CUDA alone
    _uv(*sync)

    versions = _installed_versions(python)
    if (
        accelerator == "cpu"
        and sys.platform == "linux"
        and "+" not in versions.get("torch", "+cpu")
    ):
        raise BuildError(
            f"UV_FIND_LINKS or PIP_FIND_LINKS is set to {_find_links()}, where uv found no CPU "
            f"build of torch {versions['torch']}: put its wheel there, or unset both, so that uv "
            "takes it from PyTorch's own index."
        )
    record = {
        "framework": framework,
        "accelerator": accelerator,
        "python": PYTHON,
        "lock_sha256": _lock_sha256(framework, accelerator),
        "versions": versions,
    }
    write_atomically(marker, json.dumps(record, indent=2) + "\n")


def is_current(framework: str, accelerator: str, folder: Path) -> bool:
    """Whether `folder` holds the environment that the framework's lock asks for."""
    try:
        record = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    locked = record.get("lock_sha256") if isinstance(record, dict) else None
    return locked == _lock_sha256(framework, accelerator) and (folder / PYTHON).exists()


@cache
def marker_path(framework: str, accelerator: str) -> str:
    """Return the file that the workflow makes when an environment is there, built from its lock.

    Its name has the lock's checksum, so a changed lock means another file, which is missing. The
    lock is read once in a process.

    Raises:
        BuildError: if there is no such lock.
    """
    digest = _lock_sha256(framework, accelerator)[:12]
    return f"results/environments/{framework}-{accelerator}/lock-{digest}"


def lock_of_marker(framework: str, accelerator: str, digest: str) -> str:
    """Return the lock that a marker was asked of, relative to the project.

    Raises:
        BuildError: if there is no such lock, or it has another checksum.
    """
    marker = marker_path(framework, accelerator)
    if not marker.endswith(f"-{digest}"):
        raise BuildError(
            f"lock-{digest} is not the lock of {framework}-{accelerator}; ask for {marker}"
        )
    return str((LOCKS / f"{framework}.{accelerator}.txt").relative_to(LOCKS.parent))


def to_wait_for(framework: str, accelerator: str) -> str:
    """Return what has to be there before a cell is trained: its environment's marker.

    Raises:
        BuildError: if the environment was damaged since it was built.
    """
    marker = Path(marker_path(framework, accelerator))
    if marker.exists() and not (marker.parent / PYTHON).exists():
        raise BuildError(f"{marker.parent} has no {PYTHON}: remove it, and it is built again.")
    return str(marker)


def _lock_sha256(framework: str, accelerator: str) -> str:
    lock = LOCKS / f"{framework}.{accelerator}.txt"
    if not lock.is_file():
        known = ", ".join(path.stem for path in sorted(LOCKS.glob("*.*.txt")))
        raise BuildError(
            f"There is no lock for {framework}.{accelerator} in envs/; there is: {known}."
        )
    return hashlib.sha256(lock.read_bytes()).hexdigest()


def _is_replaceable(folder: Path) -> bool:
    """Whether rebuilding here can destroy nothing but an environment."""
    return (folder / "pyvenv.cfg").is_file() or not any(folder.iterdir())


def _find_links() -> str:
    """Extra folders of wheels as uv spells them: with commas, where pip has spaces."""
    return os.environ.get("UV_FIND_LINKS") or ",".join(os.environ.get("PIP_FIND_LINKS", "").split())


def _uv(*arguments: str) -> None:
    """Run uv, passing on what it says as it says it."""
    # The one installed beside this interpreter is the version that pyproject.toml pins.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    uv = shutil.which("uv", path=path)
    if uv is None:
        raise BuildError(
            "uv, which builds the framework environments, is not on the PATH: `pip install uv`."
        )
    environment = os.environ | {"UV_FIND_LINKS": _find_links()}
    said: list[str] = []
    with subprocess.Popen(
        [uv, *arguments], env=environment, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            if line.startswith("error:"):
                said.clear()  # what came before was progress
            said.append(line.strip())
    if process.returncode != 0:
        command = " ".join(arguments[:2])
        reason = " ".join(said[:6])  # the rest may be pages of hashes
        raise BuildError(f"`uv {command}` failed: {reason}")


def _installed_versions(python: Path) -> dict[str, str]:
    """Version of every distribution that the interpreter can import, by the name the locks use."""
    answer = subprocess.run(
        [python, "-I", "-c", VERSIONS], capture_output=True, text=True, check=False
    )
    if answer.returncode != 0:
        reason = answer.stderr.strip().rpartition("\n")[2]
        raise BuildError(f"{python}, just built, does not run: {reason}")
    versions: dict[str, str] = json.loads(answer.stdout)
    return versions
