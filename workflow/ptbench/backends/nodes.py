"""Processes on the other nodes of a Slurm job: started with srun, and talked to over TCP.

Both sides prove to each other that they know a secret before anything is received. `replicas.py`
gives the processes their work.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil

from ptbench.errors import PtbenchError

MEETING = "PTBENCH_MEETING"  # port of the first process, and the secret
# Variables of Slurm that srun keeps: the others describe the step that it is called in.
KEPT = ("SLURM_CLUSTER_NAME", "SLURM_CONF", "SLURM_JOB_ID")
# How long a process that connects may take to prove itself: struct timeval, 60 s.
PATIENCE, NO_LIMIT = struct.pack("ll", 60, 0), struct.pack("ll", 0, 0)
START = "from ptbench.backends.nodes import take_part; take_part()"


class Elsewhere(NamedTuple):
    """A process on another node."""

    number: int  # its rank among all that were started
    node: str
    connection: Connection
    address: str  # of this node, as that one reaches it

    def ended(self) -> bool:
        """Return whether it has ended, or is just about to."""
        try:
            while self.connection.poll(1):
                self.connection.recv()
        except (EOFError, OSError):
            return True
        return False


def start(nodes: int, each: int) -> list[Elsewhere]:
    """Start processes on all nodes of this Slurm job but this one.

    Args:
        nodes: of the job.
        each: processes on each of them.

    Returns:
        The processes, by node.

    Raises:
        PtbenchError: if this runs on no node of a Slurm job, or srun ends before all have begun.
    """
    if not {"SLURM_JOB_ID", "SLURMD_NODENAME"} <= set(os.environ):
        raise PtbenchError(
            f"a run on {nodes} nodes starts its replicas with Slurm, and this is on no node of a "
            "Slurm job"
        )
    secret = secrets.token_bytes(32)
    reader, writer = os.pipe()  # srun keeps it open as long as it runs
    with socket.create_server(("", 0)) as server, os.fdopen(reader, "rb") as ended:
        environment = {
            name: value
            for name, value in os.environ.items()
            if name in KEPT or not name.startswith(("SLURM_", "SRUN_"))
        }
        environment[MEETING] = f"{server.getsockname()[1]} {secret.hex()}"
        # No child of this process: of the SIGTERM that may go to all of them, srun would kill the
        # processes that it started, which are needed to save the run.
        subprocess.run(
            [
                "setsid", "--fork", "srun", "--overlap", "--export=ALL", "--input=none",
                "--cpu-bind=none", f"--exclude={os.environ['SLURMD_NODENAME']}",
                f"--nodes={nodes - 1}", f"--ntasks={(nodes - 1) * each}",
                f"--ntasks-per-node={each}", "--distribution=block", "--kill-on-bad-exit=1",
                sys.executable, "-c", START,
            ],
            env=environment, stdin=subprocess.DEVNULL, pass_fds=[writer], check=True,
        )  # fmt: skip
        os.close(writer)
        found: list[Elsewhere] = []
        while len(found) < (nodes - 1) * each:
            ready, _, _ = select.select([server.fileno(), ended.fileno()], [], [])
            if server.fileno() not in ready:
                raise PtbenchError(
                    "srun ended before the replicas on the other nodes had begun; the reason is in "
                    "what it printed"
                )
            with contextlib.suppress(AuthenticationError, EOFError, OSError):  # a stranger
                accepted, _ = server.accept()
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, PATIENCE)
                address = accepted.getsockname()[0]
                connection = Connection(accepted.detach())
                deliver_challenge(connection, secret)
                answer_challenge(connection, secret)
                number, node = connection.recv()
                with socket.socket(fileno=os.dup(connection.fileno())) as accepted:
                    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, NO_LIMIT)
                found.append(Elsewhere(number, node, connection, address))
    return sorted(found, key=lambda process: process.number)


def take_part() -> None:
    """Be a process that `start` started: call what the first one sends, with the connection."""
    # As in all replicas: they end when the first process does, and not of a signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT})
    port, secret = os.environ.pop(MEETING).split()
    address = os.environ["SLURM_LAUNCH_NODE_IPADDR"], int(port)
    connection = Client(address, authkey=bytes.fromhex(secret))
    connection.send((int(os.environ["SLURM_PROCID"]), os.environ["SLURMD_NODENAME"]))
    threading.Thread(target=exit_on_hangup, args=(connection.fileno(),), daemon=True).start()
    function, arguments = connection.recv()
    function(connection, *arguments)


def exit_on_hangup(other_end: int) -> None:
    """End this process when the other end of a connection is closed, whatever it is doing."""
    poll = select.poll()
    poll.register(other_end, select.POLLRDHUP)
    poll.poll()
    os._exit(0)


def free_port() -> int:
    """Return a port on which nobody listens now."""
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def interface_towards(address: str) -> str:
    """Return the network interface of this machine that reaches an address, tcp://host:port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((urlsplit(address).hostname, 9))  # nothing is sent
        own = probe.getsockname()[0]
    interfaces = psutil.net_if_addrs().items()
    return next(name for name, its in interfaces if any(each.address == own for each in its))
