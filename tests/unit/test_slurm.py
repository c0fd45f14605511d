"""What Slurm says, as recorded from its commands, and what is made of it; tests/slurm/ asks it."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import snakemake_executor_plugin_slurm as plugin
from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string

from ptbench import slurm
from ptbench.configuration.study import load_study
from ptbench.errors import PtbenchError
from snakemake_executor_plugin_ptbench_slurm import Executor, share_out


class Resources(dict[str, Any]):
    """A job's resources, as items and as attributes."""

    __getattr__ = dict[str, Any].__getitem__
    __setattr__ = dict[str, Any].__setitem__


def answer(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a squeue on the PATH that runs a script."""
    squeue = folder / "bin" / "squeue"
    squeue.parent.mkdir(exist_ok=True)
    squeue.write_text(f"#!/bin/sh\n{script}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(squeue.parent), prepend=":")


def test_jobs_of_this_folder_alone_stand_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = tmp_path / "a clone", tmp_path / "another"
    here.mkdir()
    link = tmp_path / "link"
    link.symlink_to(here)
    lines = [
        f"7|RUNNING|2026-10-03T10:00:00|None|node2|rule_train_wildcards_tiny_jax_1_1|{here}",
        f"8|PENDING|N/A|Resources||rule_train_wildcards_tiny_jax_1_2|{link}",  # a node's view
        f"9|RUNNING|2026-10-03T10:00:00|None|node1|rule_train_wildcards_tiny_jax_1_3|{elsewhere}",
        f"10|RUNNING|2026-10-03T10:00:00|None|node1|(null)|{here}",  # the user's own
    ]
    answer(tmp_path, monkeypatch, "cat <<'END'\n" + "\n".join(lines) + "\nEND")
    assert [job.number for job in slurm.queue() or ()] == ["7", "8", "9", "10"]
    with pytest.raises(PtbenchError, match=r"^2 jobs of an earlier run .* scancel 7 8$"):
        slurm.refuse_duplicates(here)
    slurm.refuse_duplicates(tmp_path)


def test_where_slurm_is_not_or_does_not_answer_its_jobs_are_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.queue() is None
    slurm.refuse_duplicates(tmp_path)
    answer(tmp_path, monkeypatch, "exit 1")
    assert slurm.queue() is None
    assert slurm.states("ptbench_1") is None
    slurm.refuse_duplicates(tmp_path)  # the cells' locks still stand


def test_what_the_shell_says_to_squeue_hides_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ("SQUEUE_STATES", "SQUEUE_PARTITION", "SLURM_TIME_FORMAT", "SCANCEL_INTERACTIVE",
            "SBATCH_ARRAY_INX", "SBATCH_WAIT")  # fmt: skip
    for name in (*said, "SLURM_CONF", "SBATCH_PARTITION"):
        monkeypatch.setenv(name, "the user's")
    assert slurm.misleading(os.environ) == {*said}
    seen = tmp_path / "seen"
    answer(tmp_path, monkeypatch, f"env > {seen}")
    assert slurm.states("ptbench_1") == {}
    names = {line.partition("=")[0] for line in seen.read_text().splitlines()}
    assert names.isdisjoint(said)
    assert {"PATH", "SLURM_CONF", "SBATCH_PARTITION"} < names
    assert "SQUEUE_STATES" in os.environ  # it is the user's


def test_snakemake_s_own_calls_of_slurm_do_not_see_it_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugin.Executor, "__post_init__", lambda *_: None)
    monkeypatch.setenv("SCANCEL_STATE", "PENDING")
    executor = Executor.__new__(Executor)
    executor.workflow = SimpleNamespace(executor_settings=SimpleNamespace())
    executor.__post_init__()
    assert "SCANCEL_STATE" not in os.environ


def test_a_comment_with_a_line_break_hides_its_own_job_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = "|RUNNING|2026-10-03T10:00:00|None|node1|"
    script = f"cat <<'END'\n7{job}two\nlines|/elsewhere\n8{job}(null)|/elsewhere\nEND"
    answer(tmp_path, monkeypatch, script)
    assert [job.number for job in slurm.queue() or ()] == ["8"]


def test_a_cell_is_found_by_the_comment_of_its_job() -> None:
    path = "tiny+layers=2/jax/devices-4/seed-11"
    assert slurm.comment_of(path) == "rule_train_wildcards_tiny+layers=2_jax_4_11"


def test_only_cells_on_gpus_ask_for_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kinds = {"accelerator": "cuda", "accelerators": {"mxnet": "cpu"}}
    load_study({"experiments": ["demo"], **kinds}).write(Path("results/study.json"), [], "")
    submitted: list[str] = []
    monkeypatch.setattr(
        plugin.Executor, "run_job", lambda _, job: submitted.append(set_gres_string(job).strip())
    )
    executor = Executor.__new__(Executor)
    executor.ends, executor.told, executor.refused = threading.Event(), threading.local(), []
    executor.refusing = threading.Lock()
    for framework in ("jax", "mxnet"):
        for asked in ({"gpu": 2}, {"gres": "gpu:2"}):
            executor.run_job(job_of("demo-lstm", framework, asked))
    assert submitted == ["--gpus=2", "--gres=gpu:2", "", ""]


def job_of(variant: str, framework: str, asked: dict[str, Any]) -> SimpleNamespace:
    """A job of the rule `train`, as Snakemake hands it to the executor."""
    return SimpleNamespace(
        rule=SimpleNamespace(name="train"), resources=Resources(asked),
        wildcards=SimpleNamespace(variant=variant, framework=framework),
    )  # fmt: skip


def test_cells_that_run_alone_ask_for_a_node_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    load_study({"experiments": ["speed", "demo"]}).write(Path("results/study.json"), [], "")
    executor = Executor.__new__(Executor)
    for variant, expected in (
        ("speed-small", "--signal=USR1@120 --exclusive"),
        ("speed-small+alone=false", "--signal=USR1@120"),
        ("demo-lstm", "--signal=USR1@120"),
    ):
        job = job_of(variant, "jax", {"slurm_extra": "--signal=USR1@120"})
        executor.fit(job)
        assert job.resources.slurm_extra == expected


def test_a_job_whose_study_cannot_be_read_is_not_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    monkeypatch.setattr(
        plugin.Executor, "_report_job_error_threadsafe", lambda _, __, msg: said.append(msg)
    )
    Executor.__new__(Executor).run_job(job_of("demo-lstm", "jax", {}))
    assert said == [
        "not submitted: results/study.json: cannot be read: No such file or directory. "
    ]


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({"gpu": 8}, "--gres=gpu:4"),
        ({"gpu": 8, "gpu_model": "a100"}, "--gres=gpu:a100:4"),
        ({"gres": "gpu:a100:8"}, "--gres=gpu:a100:4"),
        ({}, "--ntasks=2"),  # sbatch would give one task one node
    ],
)
def test_each_node_of_a_job_is_asked_for_its_part(asked: dict[str, Any], options: str) -> None:
    job = SimpleNamespace(resources=Resources({"nodes": 2, **asked}), threads=4)
    share_out(job.resources)
    unused = ("run_uuid", "slurm_logfile", "comment_str", "account", "partition", "workdir")
    call = get_submit_command(job, dict.fromkeys(unused, "")) + set_gres_string(job)
    said = {option for option in call.split() if option.startswith(("--n", "--g", "--c"))}
    assert said - {"--comment"} == {"--nodes=2", "--cpus-per-task=4", options}


@pytest.mark.parametrize("path", ["/home/a b/ptbench", "/home/$USER/ptbench", "/home/it's"])
def test_a_path_that_a_shell_would_take_apart_is_refused(path: str) -> None:
    slurm.refuse_paths("/home/a_b-c/ptbench.1")
    with pytest.raises(PtbenchError, match=r"jobs cannot run in a path with a space"):
        slurm.refuse_paths("/home/fine", path)


@pytest.mark.parametrize(
    ("state", "end"),
    [
        ("PENDING", None), ("RUNNING", None), ("COMPLETING", None), ("CONFIGURING", None),
        ("REQUEUED", None), ("SUSPENDED", None), ("NODE_FAIL", None), ("PREEMPTED", None),
        ("COMPLETED", "finished"), ("FAILED", "failed"), ("CANCELLED", "failed"),
        ("TIMEOUT", "failed"), ("OUT_OF_MEMORY", "failed"), ("DEADLINE", "failed"),
    ],
)  # fmt: skip
def test_slurm_s_word_for_a_state_says_how_a_job_ended(state: str, end: str | None) -> None:
    assert slurm.judge(state, 0, requeues=True, outputs=[]) == end
    ends = {"NODE_FAIL": "failed", "PREEMPTED": "failed"}
    assert slurm.judge(state, 0, requeues=False, outputs=[]) == ends.get(state, end)


def test_a_job_whose_record_has_left_the_queue_is_judged_by_its_output(tmp_path: Path) -> None:
    output = tmp_path / "metrics.json"
    assert slurm.judge(None, 1, requeues=True, outputs=[str(output)]) is None  # not seen once
    assert slurm.judge(None, 2, requeues=True, outputs=[str(output)]) == "failed"
    output.touch()
    assert slurm.judge(None, 2, requeues=True, outputs=[str(output)]) == "finished"


@pytest.mark.parametrize(
    ("state", "log", "lacking"),
    [
        ("FAILED", "SIGUSR1: saving, and ending", "time"),  # our trainer, warned
        ("FAILED", "slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED AT ... DUE TO TIME LIMIT ***",
         "time"),
        ("TIMEOUT", "", "time"),
        ("FAILED", "srun: error: n1: task 0: Out Of Memory", "memory"),
        ("FAILED", "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.", "memory"),
        ("FAILED", "subprocess.CalledProcessError: Command returned non-zero exit status 137.",
         "memory"),
        ("FAILED", "numpy._core.ArrayMemoryError: Unable to allocate 2.0 TiB", "memory"),
        ("OUT_OF_MEMORY", "", "memory"),
        ("FAILED", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.", None),
        ("FAILED", "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 80 bytes.", None),
        ("FAILED", "ValueError: a bug", None),
        ("CANCELLED", "SIGTERM: saving, and ending", None),
        (None, "", None),
    ],
)  # fmt: skip
def test_more_is_asked_for_of_what_a_job_ran_out_of(
    state: str | None, log: str, lacking: str | None
) -> None:
    """Main memory and time can be asked for; a GPU's memory cannot, and a bug needs neither."""
    assert slurm.scarce(state, log) == lacking


@pytest.mark.parametrize(
    ("said", "passing"),
    [
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect "
         "failure)", True),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
         True),
        ("sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: "
         "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
         True),
        ("sbatch: error: AssocMaxSubmitJobLimit", True),
        ("sbatch: error: QOSMaxWallDurationPerJobLimit\nsbatch: error: Batch job submission failed"
         ": Job violates accounting/QOS policy (job submit limit)", False),
        ("sbatch: error: invalid partition specified: nosuch", False),
        ("sbatch: error: Batch job submission failed: Invalid qos specification", False),
        ("sbatch: error: Batch job submission failed: Requested time limit is invalid (missing or "
         "exceeds some limit)", False),
        ("sbatch: error: Batch job submission failed: Requested node configuration is not "
         "available", False),
    ],
)  # fmt: skip
def test_sbatch_is_asked_again_where_its_refusal_may_pass(said: str, passing: bool) -> None:
    message = (
        f"SLURM sbatch failed. The error message was '{said}'.\n    sbatch call:\n"
        "        sbatch --parsable --wrap=\"echo 'connection refused'\"\n"
    )
    words = slurm.sbatch_words(message)
    assert words == said.replace("\n", " ")
    assert slurm.passes(words) is passing
