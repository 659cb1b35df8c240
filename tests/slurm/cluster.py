"""A real Slurm cluster of four nodes on this machine: munged, slurmctld and four slurmd in a temporary folder.

Needs root, and the Debian packages slurm-wlm and munge; ``make test-slurm`` installs them.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

NODES = ("n1", "n2", "n3", "n4")

# Nodes are names only: each slurmd is told its own. No cgroups, because a container has none to give away. A job that
# is put back into the queue waits there until its credential has expired.
_CONFIGURATION = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=100000,sched_interval=1
ReturnToService=2
KillWait=5
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_CPUS = 8  # of a node, whatever the machine has


class SlurmCluster:
    """The running cluster; a context manager that ends every process it started.

    Attributes:
        environment: variables that Slurm's commands and jobs need, to be added to one's own.
    """

    def __init__(self, folder: Path) -> None:
        """Prepare.

        Args:
            folder: for configuration, state and logs; a short path, because a Unix socket lies in it.
        """
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        (self.folder / "munge").mkdir(parents=True)
        (self.folder / "state").mkdir()
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={_CPUS} State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        configuration = _CONFIGURATION.format(host=socket.gethostname(), ports=ports, folder=self.folder, nodes=nodes)
        Path(self.environment["SLURM_CONF"]).write_text(configuration, encoding="utf-8")
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        for process in reversed(self._daemons):
            process.send_signal(signal.SIGTERM)
        for process in reversed(self._daemons):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def run(self, *command: str, timeout_s: float = 600) -> str:
        """Run one of Slurm's commands and return what it printed.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        environment = os.environ | self.environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=timeout_s)
        return done.stdout

    def job_states(self) -> dict[str, str]:
        """State of every job that the controller still knows, by job id."""
        lines = self.run("squeue", "--noheader", "--states=all", "--format=%i %T").splitlines()
        return {line.split()[0]: line.split()[1] for line in lines}

    def _start(self) -> None:
        munge = self.folder / "munge"
        files = [f"--{kind}-file={munge / kind}" for kind in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files)
        _wait(lambda: (munge / "socket").exists(), "munged made no socket")
        self._daemon("slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
        for name in NODES:
            self._daemon("slurmd", "-D", "-N", name, "-f", self.environment["SLURM_CONF"])
        _wait(self._all_idle, f"nodes are not idle; see the logs in {self.folder}")

    def _daemon(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}-{len(self._daemons)}.out").open("wb")
        environment = os.environ | self.environment
        with log:
            self._daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))

    def _all_idle(self) -> bool:
        try:
            states = self.run("sinfo", "--noheader", "--Node", "--format=%T", timeout_s=60).split()
        except subprocess.SubprocessError:
            return False
        return states == ["idle"] * len(NODES)


def _free_ports(count: int) -> list[int]:
    """Ports below those that the kernel gives to clients, so that none is taken between here and the daemons' start."""
    found = []
    for port in range(20_000 + os.getpid() % 5_000, 32_000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"no {count} free ports")


def _wait(ready: Callable[[], bool], message: str, timeout_s: float = 600) -> None:
    ends = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > ends:
            raise RuntimeError(message)
        time.sleep(0.2)
