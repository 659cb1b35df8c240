"""`hiermoe run -m` ends with a table of all runs, which a log shows whole."""

from collections.abc import Sequence
from io import StringIO
from math import inf, nextafter
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from rich.table import Table

from hiermoe.commands import comparison as comparison_module
from hiermoe.commands.comparison import Composed, comparison, print_comparison, run_all_and_print
from hiermoe.measure.replay import Replay
from hiermoe.measure.workload import Workload
from hiermoe.records.store import RunStore
from hiermoe.runs.execute import execute
from hiermoe.runs.run_config import RunConfig
from tests.conftest import Command, Composer
from tests.records.test_store import rows

SMALL = ("routing=uniform", "iterations=4", "wandb.mode=disabled")


def last_table(out: str) -> list[str]:
    return out[out.index("All runs") :].splitlines()


@pytest.mark.slow
def test_multirun_ends_with_a_table_of_eighty_columns_that_has_failed_runs_too(
    hiermoe: Command, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    varied = ("system=megatron,hd_moe,h4", "tokens_per_rank=32,64", "cluster=a6000_1x8", "narrowed=1,3")
    code, out, err = hiermoe("run", "-m", *varied, *SMALL)
    assert code == 2 and "6 of 12 runs failed" in " ".join(err.split())
    lines = last_table(out)
    assert max(map(len, lines)) <= 80 and "\x1b" not in out
    times = {" ".join(line.split()[:2]): line.split() for line in lines if "×" not in line and "hd_moe" in line}
    assert len(times) >= 2
    text = " ".join(" ".join(lines).split())
    assert (
        "narrowed=3 does not divide hidden_size=2048" in text and "not applicable, dimension=4 is outside 1..3" in text
    )
    assert "predicted" in text and "measured times" not in text


def test_systems_of_one_setting_are_measured_interleaved(
    hiermoe: Command, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[list[str]] = []
    measure = Replay.measure

    def noted(replay: Replay, jobs: Sequence[Workload], *rest: Any) -> list[pd.DataFrame]:
        together.append([job.system.name for job in jobs])
        return measure(replay, jobs, *rest)

    monkeypatch.setattr(Replay, "measure", noted)
    varied = ("system=megatron,h4,hd_moe", "tokens_per_rank=8,16", "narrowed=1024")
    code, out, _ = hiermoe("run", "-m", *varied, "measure=replay", "ranks=local", "world_size=2", *SMALL)
    assert code == 0
    assert together == 2 * [["megatron", "hd_moe"]]
    text = " ".join(" ".join(last_table(out)).split())
    assert "measured" in text and "not applicable, dimension=4 is outside" in text


def test_what_shaped_links_were_measured_with_is_predicted_too(
    composed: Composer, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hiermoe.ranks.places import RanksConfig

    twins = [composed(f"system={system}") for system in ("megatron", "hd_moe")]
    emulated = {"measure": "replay", "ranks": RanksConfig.named("emulated")}
    measured = [twin.model_copy(update=emulated) for twin in twins]
    monkeypatch.setattr(comparison_module, "run_and_print", lambda *_: None)
    monkeypatch.setattr(comparison_module, "RunStore", lambda: store)
    run_all_and_print([Composed((), config) for config in measured])
    assert all(store.is_done(twin.run_id) for twin in twins)


def test_chunks_stand_beside_the_stages_that_they_pass(composed: Composer, store: RunStore) -> None:
    config = composed("system=hd_pipelined", "+cluster.overlap=1.0", "tokens_per_rank=4096")
    execute(config, store)
    (table,) = comparison([Composed(("system=hd_pipelined",), config)], store)
    used = sorted({f"2x{n:.0f}" if n > 1 else "2" for n in store.read(config.run_id)["chunks"].dropna()})
    assert used != ["2"] and list(table.columns[1].cells) == [",".join(used)]
    assert "two stages, passed in 4 chunks" in str(table.caption)


def measured_twin(config: RunConfig, store: RunStore, total_ms: float, net_ms: float = float("nan")) -> RunConfig:
    """A record of the same setting, measured, made up: as there, stages stand in rows of dispatch alone."""
    from hiermoe.ranks.places import RanksConfig

    twin = config.model_copy(update={"measure": "replay", "ranks": RanksConfig.named("emulated")})
    keys = {"run_id": twin.run_id, **twin.keys, "rank": 0}
    call = rows(**keys, phase="dispatch", dispatch_ms=total_ms / 4, dimension=2, predicted_ms=float("nan"))
    step = rows(**keys, dispatch_ms=total_ms, net_ms=net_ms, dimension=float("nan"), predicted_ms=float("nan"))
    store.write(twin.run_id, twin.content, {}, type(step)(call.to_dict("records") + step.to_dict("records")))
    return twin


def headers(table: Table) -> list[str]:
    return [" ".join(str(column.header).split()) for column in table.columns]


def numbers(table: Table, column: int) -> list[float]:
    return [float(str(cell)) for cell in table.columns[column].cells]


def test_systems_with_copies_have_a_table_of_what_these_need(composed: Composer, store: RunStore) -> None:
    ended = []
    for system in ("megatron", "moonep"):
        config = composed(f"system={system}")
        execute(config, store)
        ended.append(Composed((f"system={system}",), config))
    table, copies = comparison(ended, store)
    assert headers(copies)[1:] == ["predicted net", "predicted with experts", "rows, most / mean", "slots, GB"]
    net, both, balance, slots = (numbers(copies, i) for i in range(1, 5))
    total = numbers(table, 3)
    assert net[0] == total[0] and net[1] > total[1] and balance[0] > balance[1] == 1
    pairs = ended[1].config.tokens_per_rank * 8  # at every GPU alike
    experts_ms = pairs * 3 * 2 * 3 * 2048 * 768 / 100e9
    assert both[1] - net[1] == pytest.approx(experts_ms, abs=0.011) and both[0] - net[0] > experts_ms + 0.01
    assert slots == [0, pytest.approx(4 * 6 * 3 * 2048 * 768 / 1e9, abs=0.005)]  # four slots that layers share
    assert len(comparison(ended[:1], store)) == 1


def test_measured_net_time_stands_beside_the_predicted_and_all_fits_eighty_columns(
    composed: Composer, store: RunStore
) -> None:
    ended = []
    for system, net_ms in (("megatron", 30000.0), ("ultraep", 34000.0)):
        config = composed(f"system={system}")
        execute(config, store)
        ended.append(Composed((f"system={system}",), measured_twin(config, store, 30000.0, net_ms)))
    _, copies = comparison(ended, store)
    assert headers(copies)[1:3] == ["predicted net", "measured net"] and numbers(copies, 2) == [30000, 34000]
    written = StringIO()
    print_comparison(ended, store, Console(file=written))
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and sum(line.startswith("ultraep ") for line in lines) == 2


def test_predicted_stands_beside_measured_and_speedup_is_over_the_first_system(
    composed: Composer, store: RunStore
) -> None:
    ended = []
    for system, total_ms in (("megatron", 300.0), ("hd_moe", 200.0)):
        config = composed(f"system={system}")
        execute(config, store)
        measured_twin(config, store, total_ms, net_ms=nextafter(total_ms, inf))  # a sum of the same, rounded otherwise
        ended.append(Composed(("iterations=64", f"system={system}", "routing=recorded"), config))  # two of them for all
    (table,) = comparison(ended, store)
    heads = headers(table)
    assert sum("predicted" in head for head in heads) == sum("measured" in head for head in heads) == 1
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["megatron", "hd_moe"]
    assert cells[4:] == [["2", "2"], ["300.00", "200.00"], ["1.00", "1.50"]]
    four = [float(str(cell)) for cell in cells[2]]
    assert cells[3] == ["1.00", f"{four[0] / four[1]:.2f}"]
    assert "emulated" in str(table.caption)
