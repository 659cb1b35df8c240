"""An emulated cluster's links are as slow as it says, and nothing of it is left, however its owner ends."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from pyroute2.netlink.exceptions import NetlinkError

from hiermoe.ranks.emulated import requirements
from hiermoe.ranks.emulated.network import EmulatedNetwork
from hiermoe.ranks.emulated.requirements import missing_requirement
from hiermoe.ranks.launch import run_ranks
from hiermoe.ranks.server import RankFailedError
from hiermoe.records.store import RunStore
from hiermoe.runs.execute import execute
from hiermoe.topology.cluster import Cluster
from tests.conftest import Composer

needs_namespaces = pytest.mark.skipif(missing_requirement() is not None, reason=missing_requirement() or "")
TIMEOUT = timedelta(minutes=10)  # far more than a busy machine takes
MEGABYTE = 1_000_000
MANY = 200  # copies, of which one has the cores that it needs


@pytest.fixture(scope="module")
def network() -> Iterator[EmulatedNetwork]:
    with EmulatedNetwork(Cluster.named("emulated_4x2")) as network:
        yield network


class Conversation:
    """A connection between two leaves of a network."""

    def __init__(self, network: EmulatedNetwork, source: int, target: int) -> None:
        listener = network.leaves[target].run(lambda: socket.create_server((network.address(target), 0)))
        with listener:
            address = listener.getsockname()
            self.sender = network.leaves[source].run(lambda: socket.create_connection(address, timeout=600))
            self.receiver = listener.accept()[0]
        self.sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> "Conversation":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.sender.close()
        self.receiver.close()

    def send(self, num_bytes: int) -> float:
        """Seconds until all has arrived."""

        def send_all() -> None:
            self.sender.sendall(bytes(num_bytes))

        thread = threading.Thread(target=send_all)
        started = time.perf_counter()
        thread.start()
        left = num_bytes
        while left:
            left -= len(self.receiver.recv(min(left, MEGABYTE)))
        elapsed = time.perf_counter() - started
        thread.join()
        return elapsed


def rates(network: EmulatedNetwork, source: int, target: int, num_bytes: int, enough: float = 0.0) -> list[float]:
    """Mbit/s that a socket gets, copy by copy, until one gets enough: others may use the machine's cores."""
    found: list[float] = []
    with Conversation(network, source, target) as conversation:
        while len(found) < 3 or (max(found) < enough and len(found) < MANY):
            found.append(num_bytes * 8 / 1e6 / conversation.send(num_bytes))
    return found


def assert_shaped(network: EmulatedNetwork, source: int, target: int, rate: float) -> None:
    """A link gives what it should within 10 %: no copy gets more, and one that the cores do not hold up no less."""
    found = rates(network, source, target, 4 * MEGABYTE, enough=0.9 * rate)
    assert 0.9 * rate < max(found) < 1.1 * rate


def identity(path: Path | str) -> int:
    """Of a namespace, the same for every file that stands for it."""
    return os.stat(path).st_ino  # noqa: PTH116


def referred_to(files: Iterable[Path]) -> set[int]:
    """Network namespaces that some files of /proc stand for."""
    found = set()
    for file in files:
        try:
            target = os.readlink(file)  # noqa: PTH115
        except OSError:  # closed meanwhile
            continue
        if target.startswith("net:["):
            found.add(int(target[5:-1]))
    return found


def open_namespaces() -> set[int]:
    """Those that this process has a file of."""
    return referred_to(Path("/proc/self/fd").iterdir())


def in_use(namespaces: set[int]) -> set[int]:
    """Those of some network namespaces that a process is in, or that it has a file of, or that are mounted."""
    mounts = Path("/proc/self/mountinfo").read_text()
    mounted = {namespace for namespace in namespaces if f"net:[{namespace}]" in mounts}
    processes = Path("/proc")
    found = referred_to([*processes.glob("[0-9]*/ns/net"), *processes.glob("[0-9]*/fd/*")])
    return mounted | (found & namespaces)


def wait_until_gone(namespaces: set[int]) -> None:
    """For as long as a test may take."""
    while in_use(namespaces):
        time.sleep(0.1)


@needs_namespaces
def test_copy_between_nodes_gets_the_shaped_rate(network: EmulatedNetwork) -> None:
    (rate,) = Cluster.named("emulated_4x2").shaped_rates
    assert_shaped(network, 0, 3, rate)


@needs_namespaces
def test_inside_a_leaf_nothing_is_shaped(network: EmulatedNetwork) -> None:
    (rate,) = Cluster.named("emulated_4x2").shaped_rates
    assert max(rates(network, 1, 1, 4 * MEGABYTE, enough=5 * rate)) > 5 * rate


@needs_namespaces
def test_links_carry_both_directions_at_once(network: EmulatedNetwork) -> None:
    (rate,) = Cluster.named("emulated_4x2").shaped_rates
    with Conversation(network, 0, 3) as there, Conversation(network, 3, 0) as back:
        found = []
        while len(found) < MANY and max(found, default=0.0) < 0.9 * rate:
            started = time.perf_counter()
            thread = threading.Thread(target=back.send, args=(4 * MEGABYTE,))
            thread.start()
            there.send(4 * MEGABYTE)
            thread.join()
            found.append(4 * MEGABYTE * 8 / 1e6 / (time.perf_counter() - started))
    assert 0.9 * rate < max(found) < 1.1 * rate


@needs_namespaces
def test_small_message_gets_through_beside_a_large_one(network: EmulatedNetwork) -> None:
    with Conversation(network, 0, 1) as bulk, Conversation(network, 0, 1) as small:
        started = time.perf_counter()
        thread = threading.Thread(target=bulk.send, args=(10 * MEGABYTE,))
        thread.start()
        delays = []
        while thread.is_alive():
            time.sleep(0.02)
            delays.append(small.send(100))
        large = time.perf_counter() - started
    assert len(delays) > 3 and min(delays[:-1]) < large / 5


@needs_namespaces
def test_every_level_of_a_deeper_hierarchy_is_shaped() -> None:
    cluster = Cluster.named("emulated_4x8")
    with EmulatedNetwork(cluster) as network:
        assert len(network.leaves) == 8 and len(set(network.namespace_of_rank)) == 8
        assert network.namespace_of_rank[7] == network.leaves[1].path
        node, half = cluster.shaped_rates
        assert_shaped(network, 0, 1, half)
        assert_shaped(network, 0, 7, node)


@needs_namespaces
def test_two_networks_at_once_do_not_meet(network: EmulatedNetwork) -> None:
    """Both have the same addresses, so the right one answers only if they are apart."""
    interfaces = socket.if_nameindex()
    with EmulatedNetwork(Cluster.named("emulated_4x2")) as other:
        assert other.address(1) == network.address(1)
        listener = other.leaves[1].run(lambda: socket.create_server((other.address(1), 0)))
        port = listener.getsockname()[1]
        other.leaves[0].run(lambda: socket.create_connection((other.address(1), port), timeout=600)).close()
        with pytest.raises(ConnectionRefusedError):
            network.leaves[0].run(lambda: socket.create_connection((network.address(1), port), timeout=600))
        listener.close()
        assert socket.if_nameindex() == interfaces  # nothing of them is seen outside


def interface_of(rank: int) -> tuple[str, str, int]:
    dist.barrier()
    names = ",".join(sorted(name for _, name in socket.if_nameindex()))
    return os.environ["GLOO_SOCKET_IFNAME"], names, identity("/proc/self/ns/net")


def fail(rank: int) -> None:
    raise ValueError("on purpose")


@needs_namespaces
def test_ranks_live_in_their_leaf(network: EmulatedNetwork) -> None:
    results = run_ranks(interface_of, 8, (), TIMEOUT, namespaces=network.namespace_of_rank)
    assert {(interface, names) for interface, names, _ in results} == {("up", "lo,up")}
    assert [leaf for *_, leaf in results] == [identity(network.leaves[rank // 2].path) for rank in range(8)]
    with pytest.raises(ValueError, match="namespaces names 8 namespaces for world_size=2 ranks"):
        run_ranks(interface_of, 2, (), TIMEOUT, namespaces=network.namespace_of_rank)


@pytest.mark.slow
@needs_namespaces
def test_nothing_is_left_of_a_run_that_failed() -> None:
    namespaces: set[int] = set()
    with pytest.raises(RankFailedError, match="on purpose"), EmulatedNetwork(Cluster.named("emulated_4x2")) as network:
        namespaces |= {identity(path) for path in network.namespace_of_rank}
        assert in_use(namespaces) == namespaces and len(namespaces) == 4
        run_ranks(fail, 8, (), TIMEOUT, namespaces=network.namespace_of_rank)
    wait_until_gone(namespaces)


@needs_namespaces
def test_run_leaves_a_record_and_no_namespace(composed: Composer, store: RunStore) -> None:
    tiny = ["model.hidden_size=64", "iterations=2", "tokens_per_rank=16"]
    config = composed("measure=replay", "ranks=emulated", "cluster=emulated_4x2", "system=hd2", *tiny)
    before = open_namespaces()
    outcome = execute(config, store)
    assert outcome.status == "ok", outcome.reason
    records = store.read(outcome.run_id)
    assert (records["source"] == "emulated").all()
    steps = records[records["phase"] == "step"]
    assert len(steps) == 16 and (steps["num_wrong"] == 0).all() and (steps["wire_ms"] > 0).all()
    assert open_namespaces() == before


def wait_for_ever(rank: int, folder: Path) -> None:
    dist.barrier()
    (folder / str(rank)).write_text(str(identity("/proc/self/ns/net")))
    time.sleep(3600)


OWNER = """
import sys
from datetime import timedelta
from pathlib import Path
from hiermoe.ranks.emulated.network import EmulatedNetwork
from hiermoe.ranks.launch import run_ranks
from hiermoe.topology.cluster import Cluster
from tests.ranks.test_emulated import wait_for_ever

if __name__ == "__main__":
    with EmulatedNetwork(Cluster.named("emulated_4x2")) as network:
        run_ranks(wait_for_ever, 8, (Path(sys.argv[1]),), timedelta(minutes=10), namespaces=network.namespace_of_rank)
"""


@needs_namespaces
@pytest.mark.slow
def test_nothing_is_left_of_an_owner_that_was_killed(tmp_path: Path) -> None:
    script, folder = tmp_path / "owner.py", tmp_path / "ranks"
    script.write_text(OWNER)
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    owner = subprocess.Popen([sys.executable, str(script), str(folder)], env=environment)
    while len(files := [file for file in folder.iterdir() if file.read_text()]) < 8:
        assert owner.poll() is None
        time.sleep(0.1)
    namespaces = {int(file.read_text()) for file in files}
    assert len(namespaces) == 4 and in_use(namespaces) == namespaces
    family = psutil.Process(owner.pid).children(recursive=True)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    psutil.wait_procs(family)
    wait_until_gone(namespaces)
    with EmulatedNetwork(Cluster.named("emulated_4x2")) as network:
        assert min(rates(network, 0, 1, MEGABYTE)) > 0


def test_missing_capabilities_are_named(monkeypatch: pytest.MonkeyPatch, composed: Composer, store: RunStore) -> None:
    monkeypatch.setattr(requirements, "effective_capabilities", lambda: 0)
    with pytest.raises(
        ValueError, match=r"lacks CAP_NET_ADMIN and CAP_SYS_ADMIN, .* run it as root \(sudo\); a container"
    ):
        EmulatedNetwork(Cluster.named("emulated_4x2"))
    outcome = execute(composed("measure=replay", "ranks=emulated", "cluster=emulated_4x2", "system=hd2"), store)
    assert outcome.status == "failed" and "CAP_NET_ADMIN" in outcome.reason


@needs_namespaces
@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOENT, "modprobe -a veth bridge sch_tbf"), (errno.EPERM, "a container needs --cap-add")],
)
def test_what_the_kernel_refuses_is_said_and_nothing_is_left(
    code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise NetlinkError(code, os.strerror(code))

    monkeypatch.setattr("hiermoe.ranks.emulated.network._shape", refuse)
    network = EmulatedNetwork(Cluster.named("emulated_4x2"))
    with pytest.raises(ValueError, match=f"cannot be set up here: .*{message}"), network:
        pass
    assert network.leaves == [] and network._namespaces == []


def test_cluster_without_shaped_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="cluster a6000_4x8 has no level with shaped_mbit_per_s"):
        EmulatedNetwork(Cluster.named("a6000_4x8"))
