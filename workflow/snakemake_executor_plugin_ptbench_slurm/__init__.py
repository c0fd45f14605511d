"""Snakemake's Slurm plugin, but a study on it ends, whatever becomes of the controller.

It differs from snakemake-executor-plugin-slurm in this (docs/slurm-upstream.md):

- Jobs are followed by squeue alone. When the controller does not answer, it is asked again until it
  does; a job whose record has left the queue is judged by its output.
- When sbatch refuses a job for a reason that may pass, it is asked again. When it refuses several
  in a row for one reason that stays, the run ends.
- What a job ran out of is remembered, and `ptbench.slurm.ran_out` tells it to the next attempt.
- Cells of frameworks that `accelerators` puts on CPUs ask for no GPU, whatever the profile says.
- GPUs of a cell that spans several nodes are shared out to them.
- What the user's shell says to squeue, scancel and sbatch is not passed on where it would mislead.
- Cells whose recipe says `alone` ask for a node of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import Counter
from collections.abc import AsyncGenerator
from functools import cached_property
from pathlib import Path
from typing import Any

import snakemake_executor_plugin_slurm as plugin
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo

from ptbench import slurm
from ptbench.configuration.study import Study, read_study
from ptbench.errors import PtbenchError

REFUSALS = 3  # in a row, in the same words, after which no more jobs are submitted
GPU_RESOURCES = ("gpu", "gpu_model", "gres")  # that the plugin asks sbatch for
LOG_BYTES = 100_000  # of a log's end, which say why a job failed

common_settings = plugin.common_settings
ExecutorSettings = plugin.ExecutorSettings


class Executor(plugin.Executor):  # type: ignore[misc] # the plugin has no types
    """Submits the jobs of a study and follows them."""

    def __post_init__(self, test_mode: bool = False) -> None:
        # The threads that submit and follow jobs may be running before this returns.
        self.followed: dict[str, SubmittedJobInfo] = {}  # the jobs that have not ended, by number
        self.misses: Counter[str] = Counter()  # answers in a row without a job, by its number
        self.silent = False  # Slurm has not answered the last time
        self.refused: list[str] = []  # what sbatch said to the last jobs, if it refused them
        self.refusing = threading.Lock()  # for `refused`: two threads submit
        self.told = threading.local()  # what the plugin says of this thread's job
        self.ends = threading.Event()  # no more jobs are to be submitted
        for name in slurm.misleading(os.environ):
            del os.environ[name]
        # How the plugin would follow jobs is not used, and what it says about that misleads.
        self.workflow.executor_settings.status_command = None
        super().__post_init__(test_mode)

    @cached_property
    def study(self) -> Study:
        """What is run."""
        return read_study(Path("results/study.json"))

    def fit(self, job: Any) -> None:
        """Let a job ask for what its cell needs, beyond what the profile says.

        Raises:
            ConfigurationError: if the study cannot be read.
        """
        config, framework = self.study.config, getattr(job.wildcards, "framework", None)
        # Without `accelerators` the profile says what all ask for.
        if framework and config.accelerators and config.accelerator_of(framework) == "cpu":
            for name in GPU_RESOURCES:
                setattr(job.resources, name, "")
        if job.rule.name == "train" and self.study.recipe(job.wildcards.variant).alone:
            job.resources.slurm_extra = f"{job.resources.get('slurm_extra') or ''} --exclusive"
        share_out(job.resources)

    def shutdown(self) -> None:
        self.ends.set()
        super().shutdown()

    def cancel_jobs(self, active_jobs: list[SubmittedJobInfo]) -> None:  # noqa: ARG002
        """Cancel every job: Snakemake's list lacks all of them while their states are asked for."""
        self.ends.set()
        self._job_submission_executor.shutdown(wait=True)  # or a job is submitted afterwards
        super().cancel_jobs(list(self.followed.values()))

    # ------------------------------------------------------------------------------- submitting

    def report_job_submission(self, job_info: SubmittedJobInfo, register_job: bool = True) -> None:
        self.followed[job_info.external_jobid] = job_info
        super().report_job_submission(job_info, register_job)

    def run_job(self, job: Any) -> None:
        """Submit a job, patiently; called in a thread of its own."""
        try:
            self.fit(job)
        except PtbenchError as error:
            super()._report_job_error_threadsafe(SubmittedJobInfo(job), f"not submitted: {error}. ")
            return
        waits = 0
        while not self.ends.is_set():
            self.told.words = None
            super().run_job(job)
            words = self.told.words
            if words is None:
                with self.refusing:
                    self.refused.clear()
                return
            if not slurm.passes(words):
                self.refuse(words)
                break
            if waits in (0, 10):
                self.logger.warning(f"{words}. Trying again until it takes the job.")
            waits += 1
            self.ends.wait(self.pause)
        else:
            words = "Snakemake was about to end"
        super()._report_job_error_threadsafe(SubmittedJobInfo(job), f"not submitted: {words}. ")

    def _report_job_error_threadsafe(self, _: SubmittedJobInfo, msg: str) -> None:
        """Take note of what the plugin says of a job that it could not submit."""
        self.told.words = slurm.sbatch_words(msg)

    def refuse(self, words: str) -> None:
        """Count refusals in the same words; after a few, let Snakemake end as by SIGTERM."""
        with self.refusing:
            self.refused = [*(each for each in self.refused if each == words), words]
            enough = len(self.refused) >= REFUSALS and not self.ends.is_set()
            if enough:
                self.ends.set()
        if enough:
            self.logger.error(
                f"sbatch refused {REFUSALS} jobs in a row: {words}\n"
                "No more are submitted; those that run will finish. Mend slurm/profile.yaml "
                "(docs/slurm.md) and give the same command again."
            )
            self.workflow.scheduler.exit_gracefully()

    # -------------------------------------------------------------------------------- following

    @property
    def pause(self) -> float:
        """Seconds between two looks at the queue."""
        return float(self.workflow.remote_execution_settings.seconds_between_status_checks)

    async def check_active_jobs(
        self, active_jobs: list[SubmittedJobInfo]
    ) -> AsyncGenerator[SubmittedJobInfo, None]:
        """Report the jobs that have ended, and yield the others."""
        if not active_jobs:  # before `__post_init__` too
            return
        states = await asyncio.to_thread(slurm.states, self.run_uuid)
        if (states is None) != self.silent:
            self.silent = states is None
            now = "does not answer; it is asked until it does" if self.silent else "answers again"
            self.logger.warning(f"Slurm {now}.")
        for info in active_jobs:
            if states is None:
                yield info
                continue
            number = info.external_jobid
            state = states.get(number)
            self.misses[number] = 0 if state else self.misses[number] + 1
            requeues = self.workflow.executor_settings.requeue
            end = slurm.judge(state, self.misses[number], requeues, list(map(str, info.job.output)))
            if end is None:
                yield info
                continue
            del self.followed[number]
            if end == "failed":
                self.fail(info, state)
            else:
                self.report_job_success(info)
                if not self.workflow.executor_settings.keep_successful_logs:
                    with contextlib.suppress(OSError):
                        info.aux["slurm_logfile"].unlink()

    def fail(self, info: SubmittedJobInfo, state: str | None) -> None:
        """Report a job that failed, and remember what it ran out of."""
        log = str(info.aux["slurm_logfile"])
        lacking = slurm.scarce(state, "".join(map(end_of, (log, *info.job.log))))
        if lacking:
            [output] = info.job.output
            slurm.ran_out[str(output), lacking] += 1
        how = f"it ended as {state}" if state else "it left the queue without a result"
        more = f"; it ran out of {lacking}" if lacking else ""
        self.report_job_error(
            info, msg=f"Slurm job {info.external_jobid}: {how}{more}. ", aux_logs=[log]
        )


def share_out(resources: Any) -> None:
    """Let a job on several nodes ask each of them for its part of the GPUs."""
    nodes, asked = resources.get("nodes") or 1, [resources.get(name) for name in GPU_RESOURCES]
    if nodes == 1:
        return
    gpu, model, gres = asked
    if gpu:
        gres = f"gpu:{model}:{gpu}" if model else f"gpu:{gpu}"
    if not gres:
        resources.tasks = nodes  # sbatch gives a job of one task one node
        return
    kind, _, count = gres.rpartition(":")
    resources.gpu = resources.gpu_model = ""
    resources.gres = f"{kind}:{int(count) // nodes}" if count.isdecimal() else gres


def end_of(log: str) -> str:
    """Return the end of a log; nothing if it cannot be read."""
    try:
        with Path(log).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
