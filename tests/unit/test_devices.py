"""Whether a cell was given exactly its devices."""

from __future__ import annotations

import pytest

from ptbench.errors import PtbenchError
from ptbench.training.devices import check_devices, device_list

JOB = {"SLURM_JOB_ID": "7"}


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"])
def test_in_a_slurm_job_the_list_has_exactly_the_cell_s_devices(
    accelerator: str, name: str
) -> None:
    check_devices(2, accelerator, JOB | {name: "1,3"})
    for count, given in [("1 GPUs", "0"), ("3 GPUs", "0,1,2")]:
        with pytest.raises(PtbenchError, match=f"job 7 was given {count} .* exactly 2"):
            check_devices(2, accelerator, JOB | {name: given})


@pytest.mark.parametrize("none", ["", "NoDevFiles", "-1"])
def test_a_slurm_job_without_gpus_may_train_on_the_cpu_alone(none: str) -> None:
    check_devices(2, "cpu", JOB)
    check_devices(2, "cpu", JOB | {"CUDA_VISIBLE_DEVICES": none})
    with pytest.raises(PtbenchError, match=r"job 7 was given 0 GPUs .* exactly 2"):
        check_devices(2, "cuda", JOB | {"CUDA_VISIBLE_DEVICES": none})
    with pytest.raises(PtbenchError, match="job 7 was given no GPU where the cell needs 2"):
        check_devices(2, "cuda", JOB)


def test_cuda_s_own_list_comes_before_the_job_s() -> None:
    """A step may have fewer devices than its job."""
    lists = JOB | {"CUDA_VISIBLE_DEVICES": "0", "SLURM_STEP_GPUS": "2", "SLURM_JOB_GPUS": "1,2,3"}
    check_devices(1, "cuda", lists)


def test_elsewhere_there_may_be_more_and_must_not_be_fewer() -> None:
    check_devices(2, "cuda", {})
    check_devices(2, "cuda", {"CUDA_VISIBLE_DEVICES": "0,1,2"})
    check_devices(2, "cpu", {"CUDA_VISIBLE_DEVICES": ""})
    with pytest.raises(PtbenchError, match=r"CUDA_VISIBLE_DEVICES=0 shows 1 GPUs .* needs 2"):
        check_devices(2, "cuda", {"CUDA_VISIBLE_DEVICES": "0"})


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("", []),
        ("0", ["0"]),
        ("3, 1", ["3", "1"]),
        ("GPU-8932f937,MIG-1/2/0", ["GPU-8932f937", "MIG-1/2/0"]),
        ("0,-1,1", ["0"]),  # CUDA C++ Programming Guide: those before the invalid one are visible
        ("NoDevFiles", []),  # what Slurm writes for none
    ],
)
def test_a_list_is_read_as_cuda_reads_it(text: str, devices: list[str]) -> None:
    assert device_list(text) == devices
