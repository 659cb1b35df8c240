"""Every file in conf/ and sweeps/ composes, and what does not fit is refused in one line."""

from pathlib import Path

import pytest

from hiermoe.measure.workload import open_workload
from hiermoe.records.project import CONF
from hiermoe.records.store import RunStore
from hiermoe.runs.compose import expand, large_sweep_names, sweep_names
from hiermoe.runs.execute import execute
from tests.conftest import Composer


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


SYNTHETIC = [routing for routing in names("routing") if routing not in ("recorded", "resampled", "public")]
OTHERS = [routing for routing in SYNTHETIC if routing != "uniform"]
ROUTED = [
    *(("uniform", model) for model in names("model") if model != "mixtral_8x22b"),
    *((routing, "deepseek_v3") for routing in OTHERS),
    *(pytest.param(routing, "qwen3_30b_a3b", marks=pytest.mark.slow) for routing in OTHERS),
]


@pytest.mark.slow
@pytest.mark.parametrize("system", names("system"))
def test_every_system_runs_on_four_nodes(system: str, composed: Composer, store: RunStore) -> None:
    outcome = execute(composed(f"system={system}"), store)
    if system.endswith("_pipelined"):
        assert outcome.status == "not_applicable" and "does not say how far its stages overlap" in outcome.reason
        outcome = execute(composed(f"system={system}", "+cluster.overlap=0.5"), store)
    assert (outcome.status, outcome.reason) == ("ok", "")
    steps = store.read(outcome.run_id).query("phase == 'step'")
    assert len(steps) == 4 and (steps["predicted_ms"] > 0).all()


@pytest.mark.parametrize(("routing", "model"), ROUTED)
def test_every_model_and_every_synthetic_routing_runs(
    routing: str, model: str, composed: Composer, store: RunStore
) -> None:
    config = composed(f"routing={routing}", f"model={model}", "system=hiermoe")
    outcome = execute(config, store)
    if routing == "group_limited" and config.model.router.num_groups is None:
        assert outcome.status == "not_applicable" and "no group limit" in outcome.reason
    else:
        assert (outcome.status, outcome.reason) == ("ok", "")


def test_model_with_fewer_experts_than_gpus_takes_a_group_of_them(composed: Composer, store: RunStore) -> None:
    eight = ("model=mixtral_8x22b", "cluster=h100_ib400", "world_size=32", "max_ep_size=64")
    outcome = execute(composed(*eight, "system=hiermoe"), store)
    assert (outcome.status, outcome.reason) == ("ok", "")
    assert set(store.read(outcome.run_id)["num_ranks"]) == {8}


@pytest.mark.slow
@pytest.mark.parametrize("cluster", names("cluster"))
def test_every_cluster_runs(cluster: str, composed: Composer, store: RunStore) -> None:
    assert execute(composed(f"cluster={cluster}"), store).status == "ok"


@pytest.mark.parametrize("model", ["qwen3_30b_a3b", "deepseek_v3"])
def test_shipped_trace_runs_for_every_model(model: str, composed: Composer, store: RunStore) -> None:
    outcome = execute(composed(f"model={model}", "routing=recorded", "tokens_per_rank=1024", "iterations=2"), store)
    assert (outcome.status, outcome.reason) == ("ok", "")


@pytest.mark.parametrize("name", [*sweep_names(), *large_sweep_names()])
def test_sweep_expands_to_valid_runs_and_states_its_command(name: str) -> None:
    cells = expand(name)
    assert len(cells) > 1 and len({cell.overrides for cell in cells}) == len(cells)
    lines = (CONF.parent / "sweeps" / f"{name}.yaml").read_text().splitlines()
    folder, _, stem = f"sweeps/{name}".rpartition("/")
    assert lines[1] == f"# hiermoe run -m +{folder}={stem}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_experts=30"], "num_experts=30 is smaller than ep_size=32"),
        (["model.topk=129"], "topk=129 exceeds num_experts=128"),
        (["cluster.levels.1.groups=6"], "6 groups do not split 4 groups evenly"),
        (["cluster.world.alpha_ms=-1"], "alpha_ms=-1"),
        (["cluster.levels.0.inter.beta_ms_per_byte=-1e-9"], "beta_ms_per_byte"),
        (["iterations=1"], "iterations=1"),
        (["tokens_per_rank=0"], "tokens_per_rank=0"),
        (["+model.hidden=3"], "model.hidden"),
        (["system.policy.gamma=0"], "gamma=0"),
        (["system.policy.max_function=median"], "choose from plain, smooth, logsumexp"),
        (["+system.policy.patience=3"], "unexpected keyword argument 'patience'"),
        (["system.policy.interval=0"], "interval=0"),
        (["routing.source._target_=hiermoe.routing.nothing"], "cannot be imported"),
    ],
)
def test_value_that_does_not_fit_is_refused_by_name(
    overrides: list[str], message: str, composed: Composer, store: RunStore
) -> None:
    with pytest.raises(ValueError) as error:
        open_workload(composed(*overrides))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_choice_lists_what_there_is(composed: Composer) -> None:
    with pytest.raises(ValueError, match=r"system=nothing is unknown; choose from .*hd2_moe_smart"):
        composed("system=nothing")


@pytest.mark.parametrize(
    ("overrides", "status", "reason"),
    [
        (["system=h4", "cluster=a6000_1x8"], "not_applicable", "dimension=4 is outside 1..3"),
        (["routing=recorded", "model.num_experts=512"], "not_applicable", "no trace was recorded"),
        (["routing=recorded", "model.topk=11", "tokens_per_rank=1024"], "failed", "topk=11 exceeds the 10 experts"),
    ],
)
def test_run_without_meaning_keeps_a_row_with_its_reason(
    overrides: list[str], status: str, reason: str, composed: Composer, store: RunStore
) -> None:
    outcome = execute(composed(*overrides), store)
    assert outcome.status == status and reason in outcome.reason
    assert store.read(outcome.run_id)["reason"].tolist() == [outcome.reason]


def test_altered_trace_fails_with_its_name(composed: Composer, store: RunStore, tmp_path: Path) -> None:
    bad = tmp_path / "bad.trace"
    bad.write_bytes(b"PK\x03\x04 not a trace")
    outcome = execute(composed("routing=recorded", f"routing.source.path={bad}"), store)
    assert outcome.status == "failed" and "bad.trace is truncated or not a trace" in outcome.reason
