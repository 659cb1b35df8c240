"""The command: what a user types, what it prints, how it exits."""

import pytest

from hiermoe.records.checksums import LIST
from hiermoe.records.store import CONFIG, PROVENANCE, ROWS, RunStore
from hiermoe.runs.compose import expand
from tests.conftest import Command

SMALL = ["routing=uniform", "iterations=4", "tokens_per_rank=64", "wandb.mode=disabled"]


def test_run_prints_a_summary_and_writes_a_record(hiermoe: Command, store: RunStore) -> None:
    code, out, _ = hiermoe("run", "system=hiermoe", "model=deepseek_v3", "cluster=a6000_4x8", *SMALL)
    assert code == 0
    assert "HierMoE" in out and "the four AlltoAlls of a step" in out
    (run,) = store.folder.iterdir()
    assert {path.name for path in run.iterdir()} == {CONFIG, PROVENANCE, ROWS, LIST}
    _, again, _ = hiermoe("run", "system=hiermoe", "model=deepseek_v3", "cluster=a6000_4x8", *SMALL)
    assert "kept from before" in again


def test_multirun_goes_on_where_a_combination_has_no_meaning(hiermoe: Command, store: RunStore) -> None:
    code, out, _ = hiermoe("run", "-m", "system=h4,hd3", "cluster=a6000_1x8", *SMALL)
    assert code == 0
    assert "not applicable" in out and "HD3" in out
    assert len(list(store.folder.iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "command=fly is unknown; choose from run"),
        (["run", "model.num_experts=30", *SMALL], "num_experts=30 is smaller than ep_size=32"),
        (["run", "model.topk=999"], "topk=999 exceeds num_experts=128"),
        (["run", "system=h4", "cluster=a6000_1x8", *SMALL], "dimension=4 is outside 1..3"),
        (["run", "cluster.world.beta_ms_per_byte=-1"], "beta_ms_per_byte=-1"),
        (["run", "system=nothing"], "hd2_moe_smart"),
        (["run", "colour=red"], "colour"),
        (["reproduce", "--sweeps", "fig99"], "sweep=fig99 is unknown; did you mean fig9"),
    ],
)
def test_bad_input_ends_with_one_clear_message(arguments: list[str], message: str, hiermoe: Command) -> None:
    code, _, err = hiermoe(*arguments)
    assert code != 0
    assert message in err
    assert "Traceback" not in err


def test_help_says_what_each_command_is_for(hiermoe: Command) -> None:
    code, out, _ = hiermoe("--help")
    assert code == 0
    for command in (
        "run",
        "calibrate",
        "train",
        "record",
        "reproduce",
        "report",
        "advise",
        "published",
        "trace",
        "doctor",
    ):
        assert f"hiermoe {command}" in out


@pytest.mark.slow
@pytest.mark.parametrize("sweep", ["fig12", "fig9", "table2"])
def test_multirun_of_a_sweep_makes_the_runs_that_reproduce_makes(sweep: str, hiermoe: Command, store: RunStore) -> None:
    code, _, _ = hiermoe("run", "-m", f"+sweeps={sweep}", "wandb.mode=disabled")
    assert code == 0
    assert {path.name for path in store.folder.iterdir()} == {cell.config.run_id for cell in expand(sweep)}
