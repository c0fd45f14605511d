"""A real Slurm on this machine, to throw away: three nodes with four fake GPUs each.

    uv run python tests/slurm/testbed.py start        # then sinfo, sbatch, snakemake
    uv run python tests/slurm/testbed.py crash node2  # as if its power went
    uv run python tests/slurm/testbed.py boot node2
    uv run python tests/slurm/testbed.py stop

Needs root, and Debian's packages slurmctld, slurmd, slurm-client and munge, whose daemons need not
run: this starts its own. A fake GPU is a character device; Slurm hands it out and sets
CUDA_VISIBLE_DEVICES as it would for a real one. Time limits, node failures and preemption are real,
and quicker than on a cluster. Processes are followed by cgroups, as on most clusters, where this
machine has cgroups of version 1. Limits of memory and CPUs are not enforced.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

# Nowhere else: the executor plugin drops SLURM_CONF, with all of SLURM_*, before its inner srun.
ETC = Path("/etc/slurm")
CGROUPS = Path("/sys/fs/cgroup")  # of version 1
MARK = "# Written by ptbench's tests, in "
OWNER = "# for process "  # on the second line; without it somebody started the testbed by hand
PROGRAMS = ("munged", "slurmctld", "slurmd", "squeue", "srun")
PACKAGES = "slurmctld slurmd slurm-client munge"
NODES = ("node1", "node2")  # of the default partition
SPARE = "node3"  # of the partition `spare`, whose jobs those of `urgent` preempt
ALL = (*NODES, SPARE)
GPUS = 4  # on each node
CPUS = 16  # that a node claims to have


class UnavailableError(Exception):
    """Why a Slurm cannot be started here."""


def path() -> str:
    """PATH with the folders of daemons."""
    return os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


def obstacle() -> str | None:
    """Why a Slurm cannot be started here, in a sentence; None if it can."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=path()) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install {PACKAGES}"
    if os.geteuid() != 0:
        return "starting Slurm's daemons and making device files needs root"
    with tempfile.TemporaryDirectory() as folder:
        try:
            make_device(Path(folder) / "nvidia0")
        except OSError as error:
            return f"fake GPUs need device files, which this machine refuses: {error.strerror}"
    configuration = ETC / "slurm.conf"
    if configuration.exists() and not configuration.read_text().startswith(MARK):
        return f"{configuration} is there already and not ours: this machine has a Slurm"
    return None


def identity(pid: int) -> str | None:
    """A process by number and start, so that no later one is taken for it; None if it is gone."""
    try:
        return f"{pid} of {psutil.Process(pid).create_time():.2f}"
    except psutil.NoSuchProcess:
        return None


def make_device(device: Path) -> None:
    """A character device that behaves as /dev/null."""
    os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    device.open("w").close()  # where devices are forbidden, they can be made and not opened


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def has_cgroups() -> bool:
    """Whether Slurm can follow processes by cgroups here, as it does on most clusters."""
    probe = CGROUPS / "freezer" / f"ptbench-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return False
    return True


class Testbed:
    """A running Slurm whose files are in one folder."""

    __test__ = False

    def __init__(self, folder: Path, owner: str | None = None) -> None:
        self.folder = folder
        self.owner = owner  # `identity` of the process that will stop it; None: a person will

    @classmethod
    def running(cls) -> Testbed | None:
        """The one whose configuration is in place, whether its daemons still live or not."""
        try:
            first, second, *_ = (ETC / "slurm.conf").read_text().split("\n")
        except (OSError, ValueError):
            return None
        if not first.startswith(MARK):
            return None
        owner = second.removeprefix(OWNER) if second.startswith(OWNER) else None
        return cls(Path(first.removeprefix(MARK)), owner)

    @classmethod
    def start(cls, *, by_hand: bool = False) -> Testbed:
        """Start the daemons, after stopping those that nobody needs; ready when this returns.

        Args:
            by_hand: it is to outlive this process, and may take the place of another such.

        Raises:
            UnavailableError: with the reason, if this machine cannot do it now.
        """
        if reason := obstacle():
            raise UnavailableError(reason)
        if earlier := cls.running():
            if earlier.owner is None and not by_hand:
                raise UnavailableError("a testbed that was started by hand is running: stop it")
            if earlier.owner and identity(int(earlier.owner.split()[0])) == earlier.owner:
                raise UnavailableError(f"process {earlier.owner.split()[0]} has its testbed here")
            earlier.stop()
        owner = None if by_hand else identity(os.getpid())
        testbed = cls(Path(tempfile.mkdtemp(prefix="ptbench-slurm-")), owner)
        testbed.folder.chmod(0o755)  # munge refuses sockets in private folders
        try:
            testbed._start()
        except BaseException:
            for log in sorted(testbed.folder.glob("log/*")):
                print(f"--- {log}", log.read_text()[-4000:], sep="\n", file=sys.stderr)
            testbed.stop()  # which leaves alone what is not its own
            raise
        return testbed

    def _start(self) -> None:
        for name in ("log", "state", "devices", "munge", *(f"spool-{node}" for node in ALL)):
            (self.folder / name).mkdir()
        for index in range(GPUS):
            make_device(self.folder / "devices" / f"nvidia{index}")
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (self.folder / "munge").chmod(0o755)
        ETC.mkdir(exist_ok=True)
        try:
            with (ETC / "slurm.conf").open("x") as file:
                file.write(self._slurm_conf())
        except FileExistsError:
            raise UnavailableError("another testbed has just been started") from None
        (ETC / "gres.conf").write_text(self._gres_conf())
        (ETC / "cgroup.conf").write_text(f"{MARK}{self.folder}\nCgroupPlugin=cgroup/v1\n")
        munge = self.folder / "munge"
        self._daemon(
            "munged", "--force", f"--key-file={key}", f"--socket={munge}/socket",
            f"--pid-file={munge}/pid", f"--log-file={self.folder}/log/munged.log",
            f"--seed-file={munge}/seed",
        )  # fmt: skip
        wait_until(lambda: (munge / "socket").exists(), "munged to listen")
        self.start_controller()
        for node in ALL:
            self.boot(node)
        self.wait_for_idle(*ALL)

    def _slurm_conf(self) -> str:
        host = socket.gethostname().partition(".")[0]
        controller, *ports = free_ports(1 + len(ALL))
        text = f"""{MARK}{self.folder}
{OWNER + self.owner if self.owner else "# by hand"}
ClusterName=ptbench
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until the credential of its last start is void: two minutes by default.
AuthInfo=socket={self.folder}/munge/socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/{"cgroup" if has_cgroups() else "linuxproc"}
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
EnforcePartLimits=ALL
SchedulerParameters=sched_interval=5,batch_sched_delay=1,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=5
MinJobAge=300
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd-%n.pid
SlurmdSpoolDir={self.folder}/spool-%n
StateSaveLocation={self.folder}/state
SlurmctldLogFile={self.folder}/log/slurmctld.log
SlurmdLogFile={self.folder}/log/slurmd-%n.log
"""
        for weight, node in enumerate(reversed(ALL)):  # the last node is filled first
            text += (
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports.pop()} "
                f"CPUs={CPUS} RealMemory=256000 Gres=gpu:{GPUS} Weight={weight + 1} State=UNKNOWN\n"
            )
        nodes, up = ",".join(NODES), "MaxTime=INFINITE State=UP"
        text += f"PartitionName=gpu Nodes={nodes} {up} Default=YES PriorityTier=1\n"
        text += f"PartitionName=short Nodes={nodes} MaxTime=1 State=UP PriorityTier=1\n"
        text += f"PartitionName=spare Nodes={SPARE} {up} PriorityTier=1\n"
        return text + f"PartitionName=urgent Nodes={SPARE} {up} PriorityTier=9\n"

    def _gres_conf(self) -> str:
        devices = f"{self.folder}/devices/nvidia[0-{GPUS - 1}]"
        nodes = ",".join(ALL)
        return (
            f"{MARK}{self.folder}\nAutoDetect=off\n"
            f"NodeName={nodes} Name=gpu File={devices} Flags=nvidia_gpu_env\n"
        )

    def start_controller(self) -> None:
        """Start slurmctld, which knows the jobs that it had."""
        self._daemon("slurmctld")

    def stop_controller(self) -> None:
        """End slurmctld; jobs run on."""
        controller = daemon(self.folder / "slurmctld.pid")
        assert controller is not None, "slurmctld is down already"
        controller.terminate()
        controller.wait(30)

    def boot(self, node: str) -> None:
        """Start a node's daemon."""
        self._daemon("slurmd", "-N", node)

    def wait_for_idle(self, *nodes: str) -> None:
        """Wait until nodes are up, and free."""
        idle = ("sinfo", "-h", "-N", "-t", "idle", "-o", "%N")
        wait_until(
            lambda: {*nodes} <= {*self.ask(*idle).split()}, f"{' and '.join(nodes)} to be idle"
        )

    def crash(self, node: str) -> None:
        """End a node's daemon and all that its jobs run, at once and without a word."""
        slurmd = daemon(self.folder / f"slurmd-{node}.pid")
        assert slurmd is not None, f"{node} is down already"
        jobs = self.ask("squeue", "-h", "-t", "running", "-w", node, "-o", "%A").split()
        slurmd.kill()
        steps = [
            process
            for process in psutil.process_iter(["cmdline"])
            if any(f"[{job}." in " ".join(process.info["cmdline"] or []) for job in jobs)
            and process.info["cmdline"][0].startswith("slurmstepd")
        ]
        below = [process for step in steps for process in step.children(recursive=True)]
        for process in steps + below:  # the steps first, or they would tell how their jobs ended
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def stop(self) -> None:
        """Stop the daemons and whatever their jobs still run, and remove every trace."""
        running = self.running()
        if running and running.folder == self.folder:
            with contextlib.suppress(subprocess.SubprocessError, OSError):
                self.ask("scancel", "--user=root", timeout=10)
                wait_until(lambda: not self.ask("squeue", "-h", "-t", "running,completing"), "", 10)
        pids = [*self.folder.glob("slurmd-*.pid"), self.folder / "slurmctld.pid"]
        for file in [*pids, self.folder / "munge" / "pid"]:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process := daemon(file):
                    process.terminate()
                    try:
                        process.wait(10)
                    except psutil.TimeoutExpired:
                        process.kill()
        for name in ("slurm.conf", "gres.conf", "cgroup.conf"):
            with contextlib.suppress(OSError):
                if (ETC / name).read_text().startswith(f"{MARK}{self.folder}\n"):
                    (ETC / name).unlink()
        for node in ALL:  # what cgroups Slurm leaves; the innermost first
            for group in sorted((CGROUPS / "freezer").glob(f"slurm_{node}/**/"), reverse=True):
                with contextlib.suppress(OSError):
                    group.rmdir()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, *command: str, timeout: float = 60) -> str:
        """The answer of one of Slurm's commands."""
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=True
        )
        return answer.stdout

    def _daemon(self, *command: str) -> None:
        """Run a program that goes into the background by itself."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        program = shutil.which(command[0], path=path())
        assert program is not None, command[0]
        # a daemon keeps what it inherits: a pipe here would never end
        with (self.folder / "log" / "daemons.log").open("ab") as log:
            subprocess.run(
                [program, *command[1:]], env=environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, check=True, timeout=60,
            )  # fmt: skip


def daemon(pid_file: Path) -> psutil.Process | None:
    """The daemon that wrote a file with its number; None if it is gone."""
    try:
        process = psutil.Process(int(pid_file.read_text()))
        written = pid_file.stat().st_mtime
    except (OSError, ValueError, psutil.NoSuchProcess):
        return None
    # a later process may have its number by now
    mine = process.name() in PROGRAMS and process.create_time() < written + 1
    return process if mine else None


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: if it does not within so many seconds; names what was waited for.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.2)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("start", help="start it, anew if it runs")
    commands.add_parser("stop", help="stop it and remove its files")
    for name, text in (("crash", "crash a node"), ("boot", "start a node's daemon again")):
        commands.add_parser(name, help=text).add_argument("node", choices=ALL)
    arguments = parser.parse_args()
    try:
        starts = arguments.command == "start"
        testbed = Testbed.start(by_hand=True) if starts else Testbed.running()
    except UnavailableError as reason:
        sys.exit(f"no Slurm here: {reason}")
    if testbed is None:
        sys.exit("no testbed is running")
    if arguments.command == "stop":
        testbed.stop()
    elif arguments.command == "start":
        print(f"Slurm runs; its files are in {testbed.folder}")
        print(testbed.ask("sinfo", "-N", "-o", "%N %P %t %G %c %m"), end="")
    else:
        getattr(testbed, arguments.command)(arguments.node)


if __name__ == "__main__":
    main()
