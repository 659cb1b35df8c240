"""A calibration's line, its cluster file, and how commands find it."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hiermoe.planner.cost import time_of_alltoall
from hiermoe.planner.fit import COPIES, fit_alpha_beta, fit_chunks, fit_exchanges, timings
from hiermoe.planner.scheme import hierarchical
from hiermoe.ranks.world import Device, Source
from hiermoe.records.store import RunStore
from hiermoe.runs.calibration import CalibrationConfig, calibration_table, write_cluster
from hiermoe.runs.compose import compose
from hiermoe.runs.execute import execute
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.peers import WORLD, Peers
from tests.conftest import Command

SMALL = ["ranks=local", "cluster=a6000_1x8", "world_size=4"]
RUN = ["system=hd2", "routing=uniform", "iterations=2", "tokens_per_rank=16", "wandb.mode=disabled"]


def configured(*overrides: str) -> CalibrationConfig:
    return compose("calibrate", overrides, CalibrationConfig)


def rows_of(
    config: CalibrationConfig,
    alpha_ms: float,
    beta_ms_per_byte: float,
    overlap: float = 0.0,
    wave_ms: float = 0.0,
    inter_slower: float = 1.0,
) -> pd.DataFrame:
    """Timings on a line, of ranks of which the last is the slowest; one repeat is far off it.

    Stages in chunks take what a cluster of this overlap and these waves makes of them.
    """
    rows: list[dict[str, Any]] = []
    hierarchy = config.cluster.hierarchy
    made = config.cluster.model_copy(update={"overlap": overlap, "wave_ms": wave_ms})
    for repeat, exchanges, num_bytes, chunks in config.measurement.prepare(config).timings():
        if repeat < 0:
            continue
        slower = inter_slower if exchanges[0] == Peers("inter", 1) else 1.0
        time_ms = (alpha_ms + num_bytes * beta_ms_per_byte) * slower
        if len(exchanges) == 2:
            both_ms = [time_ms, alpha_ms + COPIES * num_bytes * beta_ms_per_byte]
            time_ms = time_of_alltoall(hierarchical(2, True, hierarchy, chunks), both_ms, made)
        time_ms += 100.0 if repeat == 1 else 0.0
        stage = "+".join(map(str, exchanges))
        common = {"phase": "calibration", "stage": stage, "iteration": repeat, "routing_iteration": -1}
        common |= {"counted": True, "layer": -1, "bytes": num_bytes, "chunks": chunks}
        rows += [
            common | {"rank": rank, "wire_ms": time_ms * (rank + 1) / hierarchy.num_ranks}
            for rank in range(hierarchy.num_ranks)
        ]
    return pd.DataFrame(rows)


@pytest.fixture
def clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of results/clusters/."""
    for module in ("hiermoe.runs.calibration", "hiermoe.records.groups"):
        monkeypatch.setattr(f"{module}.CLUSTERS", tmp_path / "clusters")
    return tmp_path / "clusters"


def test_line_goes_through_medians_of_the_slowest_rank() -> None:
    config = configured(*SMALL)
    for exchange, fit in fit_exchanges(rows_of(config, 3.0, 2e-6), config.cluster).items():
        assert (fit.alpha_ms, fit.beta_ms_per_byte, fit.r2) == pytest.approx((3.0, 2e-6, 1.0)), exchange


@pytest.mark.parametrize("overlap", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("wave_ms", [0.0, 12.0, 30.0])
@pytest.mark.parametrize("inter_slower", [1.0, 4.0])
def test_chunks_tell_overlap_and_the_least_of_a_wave(overlap: float, wave_ms: float, inter_slower: float) -> None:
    config = configured("cluster=emulated_4x8")
    records = rows_of(config, 3.0, 2e-4, overlap, wave_ms, inter_slower)
    found = fit_chunks(records, config.cluster)
    assert found is not None
    assert found.overlap == pytest.approx(overlap, abs=1e-2)
    if wave_ms:
        assert found.wave_ms == pytest.approx(wave_ms, rel=0.02)
    else:
        assert found.wave_ms < 5  # of times from 90 ms on, in at most nine waves
    assert found.error < 1e-3
    assert fit_chunks(records[records["chunks"] == 1], config.cluster) is None


@pytest.mark.parametrize(("noise", "marked"), [(1.05, False), (1.5, True)])
def test_chunks_that_no_overlap_explains_are_marked(noise: float, marked: bool) -> None:
    config = configured("cluster=emulated_4x8")
    records = rows_of(config, 3.0, 2e-4, 1.0, 12.0)
    sizes = {size: number for number, size in enumerate(sorted(records["bytes"].unique()))}
    odd = (records["chunks"] > 1) & (records["bytes"].map(sizes) % 2 == 1)
    records["wire_ms"] *= odd.map({True: noise, False: 1 / noise}).where(records["chunks"] > 1, 1.0)
    caption = str(calibration_table(records, "", config.cluster).caption)
    assert "Of two stages in chunks" in caption
    assert ("!: calibrate again)." in caption) == marked


def test_a_single_level_has_no_stages_to_overlap() -> None:
    config = configured("ranks=local", "cluster=a6000_1x8", "world_size=2")
    records = rows_of(config, 3.0, 2e-6)
    assert set(records["chunks"]) == {1} and fit_chunks(records, config.cluster) is None


@pytest.mark.parametrize(("alpha_ms", "beta_ms_per_byte"), [(-1.0, 1e-5), (20.0, -1e-6)])
def test_constants_are_never_negative(alpha_ms: float, beta_ms_per_byte: float) -> None:
    config = configured(*SMALL)
    fit = fit_exchanges(rows_of(config, alpha_ms, beta_ms_per_byte), config.cluster)[WORLD]
    assert min(fit.alpha_ms, fit.beta_ms_per_byte) == 0
    assert fit.r2 < 1


def test_small_messages_say_what_starting_costs_whatever_the_largest_ones_noise() -> None:
    """Of an emulated cluster: an exchange takes its start or its bytes, whichever is longer."""
    size_bytes, found = 2.0 ** np.arange(15, 23), []
    for noise in (-0.05, 0.0, 0.05):
        time_ms = np.maximum(14.0, 1.35e-4 * size_bytes)
        time_ms[-1] *= 1 + noise
        found.append(fit_alpha_beta(size_bytes, time_ms).alpha_ms)
    assert found == pytest.approx([found[1]] * 3, rel=0.15)
    assert 14 / 4 < found[1] < 14


def test_a_start_that_hides_the_bytes_of_small_messages_leaves_beta_alone() -> None:
    """Of GPUs, whose messages take a start or their bytes, whichever is longer, from 16 KB to 256 MB."""
    size_bytes = 2.0 ** np.arange(14, 29)
    fit = fit_alpha_beta(size_bytes, np.maximum(0.04, size_bytes / 2e8))
    assert fit.beta_ms_per_byte == pytest.approx(1 / 2e8, rel=0.08)


def test_sizes_double_up_to_both_bounds() -> None:
    config = configured("cluster=emulated_4x8", "largest_bytes=1048576", "largest_pair_bytes=262144")
    job = config.measurement.prepare(config)
    assert job.pair_bytes(WORLD) == [4096 * 2**i for i in range(4)]
    assert job.pair_bytes(Peers("inter", 2)) == [4096 * 2**i for i in range(7)]
    rounds = [repeat for repeat, *_ in job.timings()]
    assert sorted(set(rounds)) == [-1, 0, 1, 2] and rounds == sorted(rounds)


def test_cluster_file_is_found_by_name_and_by_path(
    clusters: Path, store: RunStore, hiermoe: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(*SMALL, "name=mine")
    made = rows_of(config, 3.0, 2e-6)
    monkeypatch.setattr("hiermoe.measure.calibrate.Calibrate.measure", lambda *_: [made])
    outcome = execute(config, store)
    assert outcome.status == "ok", outcome.reason
    written = write_cluster(config, store)
    assert Cluster.named("mine") == written == Cluster.named(str(clusters / "mine.yaml"))
    assert written.hierarchy == config.cluster.hierarchy
    assert written.overlap == pytest.approx(0.0, abs=1e-3) and written.wave_ms == pytest.approx(0.0, abs=0.1)
    assert all(written.constants(x).beta_ms_per_byte == pytest.approx(2e-6) for x in written.exchanges)
    date = json.loads((store.path(config.run_id) / "provenance.json").read_text())["time"][:10]
    assert written.constants(WORLD).source.endswith(f"on {date}, ranks=local, r^2 = 1.0000")
    for name in ("mine", clusters / "mine.yaml"):
        code, out, err = hiermoe("run", f"cluster={name}", *RUN)
        assert code == 0, err
        assert "mine" in out
    code, _, err = hiermoe("run", "cluster=nobodys", *RUN)
    assert code != 0 and "mine" in err  # among the choices


@pytest.mark.slow
def test_calibration_on_local_ranks(clusters: Path, hiermoe: Command, store: RunStore) -> None:
    code, out, err = hiermoe("calibrate", *SMALL, "largest_bytes=262144", "repeats=2")
    assert code == 0, err
    assert "cluster=a6000_1x8_4_calibrated_local" in out
    assert (clusters / "a6000_1x8_4_calibrated_local.png").exists()
    (run,) = store.folder.iterdir()
    records = pd.read_parquet(run / "records.parquet")
    assert set(records["source"]) == {"local"}
    table = timings(records)
    assert (table["n"] == 2).all() and np.isfinite(table["median_ms"]).all()


def test_calibration_needs_ranks(hiermoe: Command) -> None:
    code, _, err = hiermoe("calibrate", "~ranks")
    assert code == 2 and "a calibration needs ranks; choose ranks= from local, emulated, allocation" in err


class BusyRanks:
    """Ranks of a cluster of whose first timings those of more bytes are no longer."""

    source: Source = "cluster"
    device: Device = "cpu"
    timeout = timedelta(seconds=1)

    def __init__(self, config: CalibrationConfig, flat: int) -> None:
        self.config, self.flat, self.turns = config, flat, 0

    def run(self, *_arguments: Any, **_options: Any) -> pd.DataFrame:
        self.turns += 1
        return rows_of(self.config, 400.0, -1e-6) if self.turns <= self.flat else rows_of(self.config, 1.0, 1e-3)


def test_what_a_busy_machine_hides_is_measured_again_and_refused_in_the_end(store: RunStore) -> None:
    config = configured(*SMALL)
    busy = BusyRanks(config, flat=1)
    assert execute(config, store, world=busy).status == "ok"
    records = store.read(config.run_id)
    assert busy.turns == 2 and records["iteration"].nunique() == 2 * config.repeats
    assert all(fit.beta_ms_per_byte > 0 for fit in fit_exchanges(records, config.cluster).values())
    never = configured(*SMALL, "repeats=4")
    outcome = execute(never, store, world=BusyRanks(never, flat=99))
    assert outcome.status == "failed" and "world, inter1, intra1" in outcome.reason
    assert "more bytes took no longer in 16 repeats" in outcome.reason
    assert not store.is_done(never.run_id), "so the same command measures anew"


def test_a_calibrated_cluster_never_takes_the_name_of_a_shipped_one(hiermoe: Command) -> None:
    code, _, err = hiermoe("calibrate", "cluster=emulated_4x2", "ranks=local", "name=a6000_4x8")
    assert code == 2 and len(err.splitlines()) == 1
    assert "name=a6000_4x8: conf/cluster/a6000_4x8.yaml is that cluster's file" in err
