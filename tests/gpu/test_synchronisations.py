"""How often a layer's dispatch has the host wait for the GPU, as torch's sync debug mode counts it."""

from collections import Counter
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist

from hiermoe.dispatch.communicators import played_hosts
from hiermoe.dispatch.dispatcher import Dispatcher, dispatch_context
from hiermoe.policies.system import SystemConfig
from hiermoe.ranks.launch import run_ranks
from hiermoe.topology.cluster import Cluster
from tests.gpu.waits import host_waits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
TOKENS, HIDDEN, EXPERTS, TOPK = 512, 256, 64, 8
CLUSTER = Cluster.named("a6000_4x8").reduced(8)


def _synchronisations(rank: int, system: str) -> dict[str, Counter[str]]:
    """Places in the code that waited, in the plan and data movement of one layer: forward and backward."""
    group = dist.group.WORLD
    assert group is not None
    context = dispatch_context(SystemConfig.named(system), CLUSTER, group, timedelta(minutes=1))
    dispatcher = Dispatcher(context, EXPERTS)
    generator = torch.Generator(device="cuda").manual_seed(rank)
    found: dict[str, Counter[str]] = {}
    for _ in range(2):  # the first warms up
        ids_TK = torch.rand(TOKENS, EXPERTS, device="cuda", generator=generator).topk(TOPK, dim=1).indices
        x_TM = torch.randn(TOKENS, HIDDEN, device="cuda", generator=generator).requires_grad_()
        weights_TK = torch.rand(TOKENS, TOPK, device="cuda", generator=generator).requires_grad_()
        outputs: list[torch.Tensor] = []
        found["forward"] = host_waits(partial(_forward, dispatcher, x_TM, ids_TK, weights_TK, outputs))
        found["backward"] = host_waits(partial(outputs[0].backward, x_TM.detach()))
    return found


def _forward(
    dispatcher: Dispatcher,
    x_TM: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    outputs: list[torch.Tensor],
) -> None:
    arrived = dispatcher.dispatch(x_TM, ids_TK, weights_TK)
    assert arrived.plan is not None
    outputs.append(dispatcher.combine(arrived.rows_PM * arrived.weights_P[:, None], arrived.plan))


@pytest.mark.parametrize("system", ["hd1", "hd2", "hd3", "hd_moe"])
def test_the_host_waits_once_for_a_plan_and_never_in_backward(system: str) -> None:
    hosts = played_hosts(CLUSTER.hierarchy)
    found = run_ranks(_synchronisations, 8, (system,), timedelta(minutes=1), hosts=hosts, device="cuda")[0]
    print(system, {phase: dict(places) for phase, places in found.items()})
    assert sum(found["forward"].values()) <= 1 and not found["backward"], found
