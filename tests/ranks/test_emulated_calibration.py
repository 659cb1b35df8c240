"""A calibration on the emulated cluster gives a cluster file that every command takes."""

from pathlib import Path

import pandas as pd
import pytest

from hiermoe.ranks.emulated.requirements import missing_requirement
from hiermoe.records.store import RunStore
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.peers import WORLD, Peers
from tests.conftest import Command

needs_namespaces = pytest.mark.skipif(missing_requirement() is not None, reason=missing_requirement() or "")


@pytest.mark.slow
@needs_namespaces
def test_calibration_finds_what_links_carry(
    hiermoe: Command, store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("hiermoe.runs.calibration", "hiermoe.records.groups"):
        monkeypatch.setattr(f"{module}.CLUSTERS", tmp_path)
    few = ["smallest_pair_bytes=65536", "largest_bytes=2097152", "repeats=3"]
    code, out, err = hiermoe("calibrate", "cluster=emulated_4x2", *few)
    assert code == 0, err
    assert "inter1" in out and "cluster=emulated_4x2_calibrated" in out
    (run,) = store.folder.iterdir()
    records = pd.read_parquet(run / "records.parquet")
    assert set(records["source"]) == {"emulated"} and set(records["phase"]) == {"calibration"}
    assert records["predicted_ms"].isna().all() and (records["wire_ms"] > 0).all()
    assert set(records["rank"]) == set(range(8))
    assert set(records["stage"]) == {"world", "inter1", "intra1", "inter1+intra1"}
    calibrated, derived = Cluster.named("emulated_4x2_calibrated"), Cluster.named("emulated_4x2")
    assert calibrated.shaped_rates == derived.shaped_rates
    assert derived.overlap is None and calibrated.overlap is not None and 0 <= calibrated.overlap <= 1
    assert derived.wave_ms is None and calibrated.wave_ms is not None and 0 <= calibrated.wave_ms < 1000
    for peers in (WORLD, Peers("inter", 1)):
        found, allowed = calibrated.constants(peers), derived.constants(peers)
        # What a link carries is a lower bound; how far above it a rank gets depends on how busy the cores are.
        assert 0.9 < found.beta_ms_per_byte / allowed.beta_ms_per_byte < 2
        assert "r^2" in found.source and not found.published
    assert (tmp_path / "emulated_4x2_calibrated.png").stat().st_size > 10_000
    code, _, err = hiermoe(
        "run", "cluster=emulated_4x2_calibrated", "system=hd2", "routing=uniform", "iterations=2", "tokens_per_rank=16",
        "wandb.mode=disabled",
    )  # fmt: skip
    assert code == 0, err
