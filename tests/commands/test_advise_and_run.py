"""Two commands, one answer: `advise` and `run` lay an expert-parallel group out alike and price it alike."""

from typing import Any

import numpy as np
import pytest

from hiermoe.advice.advice_config import AdviceConfig
from hiermoe.advice.assessment import assess
from hiermoe.advice.inputs import resolve
from hiermoe.advice.systems import candidates
from hiermoe.measure.predict import simulate
from hiermoe.measure.workload import open_workload
from hiermoe.records.groups import files_of
from hiermoe.runs.compose import compose
from hiermoe.runs.run_config import RunConfig
from hiermoe.topology.cluster import Cluster

SIZES = [2, 3, 8, 12, 16, 24, 32, 48, 64, 72]
FEW = ("a6000_4x8",)  # of which sizes are tried in the short tests too
SMALL = ["routing=uniform", "model=deepseek_v3", "tokens_per_rank=32", "iterations=16"]


def advised(cluster: str, ep_size: int, across: bool) -> Any:
    """What `advise` answers for, or why not."""
    overrides = [*SMALL, f"cluster={cluster}", f"ep_size={ep_size}", f"across={across}"]
    return resolve(compose("advise", overrides, AdviceConfig)).cases[0]


def run(cluster: str, ep_size: int, across: bool) -> RunConfig:
    """What `run` simulates, or why not."""
    overrides = [*SMALL, f"cluster={cluster}", f"world_size={ep_size}", f"max_ep_size={ep_size}", f"across={across}"]
    return compose("config", [*overrides, "system=hd_moe", "wandb.mode=disabled"], RunConfig)


def cluster_or_reason(make: Any, *arguments: Any) -> Cluster | str:
    try:
        return make(*arguments).cluster
    except ValueError as error:
        return str(error).partition("take ")[2] or "refused"


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(
    "name",
    [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in files_of("cluster")],
)
def test_both_see_the_same_cluster_or_refuse_the_same_sizes(name: str, across: bool) -> None:
    for ep_size in (size for size in SIZES if 256 % size == 0):
        assert cluster_or_reason(advised, name, ep_size, across) == cluster_or_reason(run, name, ep_size, across)


@pytest.mark.parametrize(("config", "schema"), [("config", RunConfig), ("advise", AdviceConfig)])
def test_a_group_of_no_stated_size_cannot_lie_across(config: str, schema: Any) -> None:
    with pytest.raises(ValueError, match="across=true says how"):
        compose(config, ["cluster=a6000_4x8", "across=true"], schema)


@pytest.mark.parametrize(("name", "ep_size"), [("gb200_nvl72_ib400", 64), ("h100_ib400", 8), ("h100_ib400", 32)])
def test_both_answer_to_the_digit(name: str, ep_size: int) -> None:
    case = advised(name, ep_size, False)
    assessment = assess(case, candidates(case.cluster, ["hd_moe"])[0])
    workload = open_workload(run(name, ep_size, False))
    steps = simulate(workload).query("phase == 'step' and counted")
    ours = assessment.named("hd_moe").held_out.step_ms(case.cluster)
    np.testing.assert_allclose(ours, steps["predicted_ms"], rtol=1e-12)
