"""What rank 0 does on an allocation: its cluster, runs of another size, and runs that ended jobs."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from hiermoe.commands import on_cluster
from hiermoe.commands.on_cluster import calibration_of, required_shape, shape_of, uncalibrated
from hiermoe.ranks.crew import CrewEnded
from hiermoe.ranks.places import RanksConfig
from hiermoe.records.keep import Outcome, kept
from hiermoe.records.store import RunStore
from hiermoe.runs.attempts import Attempts
from hiermoe.runs.calibration import with_measured_links
from hiermoe.runs.execute import refuse
from hiermoe.runs.measurable import source_of
from hiermoe.runs.measured_cells import measured_cells, together
from hiermoe.runs.run_config import RunConfig
from hiermoe.topology.peers import WORLD, AlphaBeta

CPU = RanksConfig.named("allocation", "cpu")


def test_shape_counts_hosts_in_rank_order() -> None:
    assert shape_of(["a", "a", "b", "b"]) == (2, 2)
    with pytest.raises(ValueError, match="not one after another"):
        shape_of(["a", "b", "a", "b"])
    with pytest.raises(ValueError, match="a: 2, b: 1"):
        shape_of(["a", "a", "b"])


def test_gpus_are_the_default_and_nothing_replaces_them() -> None:
    assert RanksConfig.named("allocation").device == "cuda"


@pytest.mark.parametrize(
    ("shape", "names"), [((4, 8), ("node", "gpu")), ((1, 8), ("gpu",)), ((4, 1), ("node",)), ((1, 1), ("gpu",))]
)
def test_an_allocation_has_levels_of_nodes_and_gpus(shape: tuple[int, int], names: tuple[str, ...]) -> None:
    config = calibration_of(shape, CPU, "default", None, None)
    assert config.cluster.hierarchy.names == names
    assert config.cluster.hierarchy.num_ranks == shape[0] * shape[1]
    assert config.name == config.cluster.name == f"cluster_{shape[0]}x{shape[1]}_cpu"


def test_the_levels_inside_of_a_node_come_from_a_cluster_of_the_same_size() -> None:
    config = calibration_of((4, 8), CPU, "default", "a6000_4x8", None)
    assert config.cluster.hierarchy.names == ("node", "half", "pair", "gpu")
    assert config.cluster.constants(WORLD).alpha_ms == 0  # nothing of that cluster's constants
    with pytest.raises(ValueError, match="has 4 nodes and 32 GPUs, the allocation 2 nodes and 32"):
        calibration_of((2, 16), CPU, "default", "a6000_4x8", None)


def test_links_carry_what_they_did_in_the_calibration() -> None:
    bare = uncalibrated("x", "x", {"node": 4, "gpu": 32})
    inter, intra = (AlphaBeta(alpha_ms=0, beta_ms_per_byte=beta, source="test") for beta in (6e-7, 7e-8))
    cluster = bare.model_copy(
        update={
            "levels": (bare.levels[0].model_copy(update={"inter": inter, "intra": intra}), bare.levels[1]),
        }
    )
    node, gpu = with_measured_links(cluster).levels
    assert node.link_gb_per_s == pytest.approx(10.0)  # 8 GPUs, 3/4 of n leave: 6 n in 6e-7 n ms
    assert gpu.link_gb_per_s == pytest.approx(12.5)  # 7/8 of n in 7e-8 n ms


def test_measured_runs_on_gpus_have_their_full_size() -> None:
    cells = measured_cells("quick", RanksConfig.named("allocation", "cuda"), "emulated_4x2")
    assert {(cell.measured.config.narrowed, cell.measured.config.tokens_per_rank) for cell in cells} == {(1, 1024)}
    assert {source_of(cell.measured.config) for cell in cells} == {"cluster"}
    assert {source_of(cell.predicted.config) for cell in cells} == {"simulated"}


def test_a_run_of_another_size_says_which_allocation_it_needs(store: RunStore) -> None:
    cell = measured_cells("quick", CPU, "emulated_4x2")[0]
    assert required_shape(cell) == (4, 2)
    outcome = on_cluster._wrong_size(cell, (2, 2), store)
    assert outcome.status == "not_applicable"
    assert "this allocation has 2 x 2: ask for NODES=4 GPUS_PER_NODE=2" in outcome.reason


def test_the_first_host_of_an_allocation_does_not_name_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_ids() -> tuple[str, str]:
        config = measured_cells("quick", CPU, "emulated_4x2")[0].measured.config
        return config.run_id, calibration_of((4, 2), CPU, "quick", None, None).run_id

    before = run_ids()
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    assert run_ids() == before


Execute = Callable[..., list[Outcome]]


def _fake_execution(deadly: str, executed: list[str]) -> Execute:
    """Measures nothing; the crew ends whenever one system is among what runs."""

    def execute(configs: Sequence[RunConfig], store: RunStore, world: Any) -> list[Outcome]:
        if any(config.system.name == deadly and not store.is_done(config.run_id) for config in configs):
            raise CrewEnded("rank 3 of 8 failed: out of memory")
        outcomes = []
        for config in configs:
            executed.append(config.system.name)
            outcomes.append(kept(config.run_id, store) or refuse(config, "not_applicable", "a fake", store))
        return outcomes

    return execute


def test_a_run_that_ends_every_job_is_given_up_and_the_others_are_done(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = measured_cells("quick", CPU, "emulated_4x2")
    groups = together(cell.measured.config for cell in cells)
    executed: list[str] = []
    monkeypatch.setattr(on_cluster, "execute_together", _fake_execution("hd2_moe", executed))

    def job(number: int) -> list[Outcome]:
        crew: Any = SimpleNamespace()
        return on_cluster._measure(groups, store, Attempts(store, f"job {number}"), crew)

    for number in (1, 2):
        with pytest.raises(CrewEnded):
            job(number)
    outcomes = job(3)
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    assert len(outcomes) == len(cells)
    assert len(failed) == 1 and failed[0].run_id.startswith("hd2_moe")
    assert failed[0].reason.startswith(
        "ended the job 2 times (job 1: rank 3 of 8 failed: out of memory; job 2: rank 3 of 8 failed: out of memory)"
    )
    assert len(job(4)) == len(cells)  # and stays given up
    assert sorted(set(executed)) == sorted({cell.measured.config.system.name for cell in cells} - {"hd2_moe"})


def test_what_is_told_to_stop_is_not_blamed_on_runs(store: RunStore) -> None:
    attempts = Attempts(store, "job 1")
    for stop in (KeyboardInterrupt, SystemExit):
        with pytest.raises(stop), attempts.of(["a-run"]):
            raise stop
    with pytest.raises(RuntimeError), attempts.of(["a-run"]):
        attempts.excuse()  # as on SIGTERM, some time before SIGKILL
        assert not attempts.unfinished("a-run")
        raise RuntimeError
    assert not attempts.unfinished("a-run")
