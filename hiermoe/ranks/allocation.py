"""Which process of an allocation this is, and how all of them find each other: under torchrun, or under Slurm."""

import json
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from hiermoe.dispatch.communicators import HOST_VARIABLE
from hiermoe.records.whole_file import write_whole

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID")
_CONNECT = timedelta(seconds=5)
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Member:
    """One process of an allocation.

    Attributes:
        rank: of the world.
        world_size: number of processes.
        local_rank: on its host; the GPU it uses.
        job: names this start of the allocation, the same on all ranks.
        under_slurm: whether Slurm's variables say all this, and not torchrun's.
    """

    rank: int
    world_size: int
    local_rank: int
    job: str
    under_slurm: bool

    @classmethod
    def from_environment(cls) -> "Member":
        """Read torchrun's variables, else those of a Slurm step.

        Raises:
            ValueError: there are neither, or a step of one node's worth of variables is incomplete.
        """
        env = os.environ
        if all(name in env for name in _TORCHRUN):
            rank, size, local = (int(env[name]) for name in _TORCHRUN[:3])
            restart = env.get("TORCHELASTIC_RESTART_COUNT", "0")
            job = f"torchrun-{env['MASTER_ADDR']}-{env['MASTER_PORT']}-{restart}"
            return cls(rank, size, local, job, under_slurm=False)
        if all(name in env for name in _SLURM):
            size = int(env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"])
            # Job numbers start again where Slurm is set up again; the port tells two starts apart.
            parts = ("CLUSTER_NAME", "JOB_ID", "STEP_ID", "RESTART_COUNT", "STEP_LAUNCHER_PORT")
            job = "-".join(["slurm", *(env.get(f"SLURM_{part}", "0") for part in parts)])
            return cls(int(env["SLURM_PROCID"]), size, int(env["SLURM_LOCALID"]), job, under_slurm=True)
        raise ValueError(
            "ranks=allocation finds neither torchrun's variables (RANK, WORLD_SIZE, ...) nor a Slurm step's: start "
            "every process by `torchrun ... -m hiermoe reproduce --on allocation` or by srun"
        )

    def name_host(self) -> str:
        """Tell this process's code which node it is on, and return it.

        Slurm's own name of the node counts more than the host's, because several nodes may be on one machine.
        """
        if "SLURMD_NODENAME" in os.environ:
            os.environ.setdefault(HOST_VARIABLE, os.environ["SLURMD_NODENAME"])
        return os.environ.get(HOST_VARIABLE) or socket.gethostname()

    def meet(self, folder: Path, timeout: timedelta) -> Store:
        """Find the store that all processes share. *Collective.*

        Args:
            folder: on a file system that all hosts share; Slurm names no port, so rank 0 leaves its address there.
            timeout: to wait for the others.

        Raises:
            ValueError: they did not come.
        """
        if not self.under_slurm:
            store, _, _ = next(rendezvous("env://", timeout=timeout))
            return store
        path = folder / f"{self.job}.json"
        if self.rank == 0:
            store = TCPStore(socket.gethostname(), 0, None, is_master=True, timeout=timeout, wait_for_workers=False)
            write_whole(path, json.dumps({"host": socket.gethostname(), "port": store.port}).encode())
            return PrefixStore(self.job, store)
        return PrefixStore(self.job, self._connect(path, timeout))

    def _connect(self, path: Path, timeout: timedelta) -> TCPStore:
        """Try until rank 0 answers; a file of an earlier start with the same number may be there before its own."""
        ends = time.monotonic() + timeout.total_seconds()
        problem = f"rank 0 left no address in {path}"
        while time.monotonic() < ends:
            try:
                address = json.loads(path.read_bytes())
                store = TCPStore(address["host"], address["port"], None, is_master=False, timeout=_CONNECT)
                store.set_timeout(timeout)
                return store
            except FileNotFoundError:
                pass
            except RuntimeError as error:
                problem = f"rank 0 does not answer at the address in {path}: {str(error).splitlines()[0]}"
            time.sleep(_POLL_SECONDS)
        raise ValueError(f"rank {self.rank} waited {timeout} in vain: {problem}")
