"""How often a layer's dispatch has the host wait for the GPU, as torch's sync debug mode counts it."""

import warnings
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hiermoe.dispatch.communicators import played_hosts
from hiermoe.dispatch.dispatcher import Dispatcher, dispatch_context
from hiermoe.policies.system import SystemConfig
from hiermoe.ranks.launch import run_ranks
from hiermoe.topology.cluster import Cluster

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
    found = {}
    for counted in (False, True):  # the first warms up
        ids_TK = torch.rand(TOKENS, EXPERTS, device="cuda", generator=generator).topk(TOPK, dim=1).indices
        x_TM = torch.randn(TOKENS, HIDDEN, device="cuda", generator=generator).requires_grad_()
        weights_TK = torch.rand(TOKENS, TOPK, device="cuda", generator=generator).requires_grad_()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn" if counted else "default")
        for phase in ("forward", "backward"):
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                if phase == "forward":
                    out = dispatcher.dispatch(x_TM, ids_TK, weights_TK)
                    y_TM = dispatcher.combine(out.rows_PM * out.weights_P[:, None], out.plan)
                else:
                    y_TM.backward(x_TM.detach())
            found[phase] = Counter(
                f"{Path(w.filename).name}:{w.lineno}" for w in waits if "synchroniz" in str(w.message)
            )
        torch.cuda.set_sync_debug_mode("default")
    return found


@pytest.mark.parametrize("system", ["hd1", "hd2", "hd3", "hd_moe"])
def test_the_host_waits_at_most_twice_a_layer(system: str) -> None:
    hosts = played_hosts(CLUSTER.hierarchy)
    found = run_ranks(_synchronisations, 8, (system,), timedelta(minutes=1), hosts=hosts, device="cuda")[0]
    print(system, {phase: dict(places) for phase, places in found.items()})
    assert sum(found["forward"].values()) <= 2 and not found["backward"], found
