"""Ranks in small hierarchies, and the Megatron process groups of a test's rank."""

from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from hiermoe.dispatch.communicators import played_hosts
from hiermoe.megatron.standins import cpu
from hiermoe.policies.system import SystemConfig
from hiermoe.records.project import CONF
from hiermoe.topology.cluster import Cluster
from tests.dispatch.routings import CASES, FEWER

# Far more than a busy machine takes: they end what hangs.
TIMEOUT = timedelta(minutes=10)  # of a collective
DEADLINE = timedelta(minutes=14)  # of a launch; pytest's own limit is 15

SYSTEMS = sorted(path.stem for path in (CONF / "system").glob("*.yaml"))
NEEDS_LEVELS = {"h2": 2, "hd2": 2, "h3": 3, "hd3": 3, "h4": 4, "hd4": 4}  # all others run on any two levels
NEEDS_LEVELS |= {"hd_pipelined": 3, "hiermoe_pipelined": 3}  # as tested here, see `transport_of`
BY_SOURCE = {"copy_choice": "source"}  # where experts stay there is nothing to choose
NEEDS_GPU = {"megatron_flex"}


@dataclass(frozen=True)
class World:
    """Ranks in nested groups; those of one group of level 1 play one host."""

    groups: tuple[int, ...]

    def __str__(self) -> str:
        return "x".join(map(str, self.groups))

    @property
    def num_ranks(self) -> int:
        return self.groups[-1]

    @property
    def cluster(self) -> Cluster:
        """Constants of the paper's cluster on these groups."""
        full = Cluster.named("a6000_4x8")
        last = len(self.groups) - 1
        levels = [
            level.model_copy(update={"groups": groups} | ({"inter": None, "intra": None} if i == last else {}))
            for i, (level, groups) in enumerate(zip(full.levels, self.groups, strict=False))
        ]
        return full.model_copy(update={"name": str(self), "levels": tuple(levels), "overlap": 1.0})

    @property
    def hosts(self) -> list[str]:
        return played_hosts(self.cluster.hierarchy)

    def runs(self, system: str) -> bool:
        """Whether the system is applicable here."""
        return system not in NEEDS_GPU and NEEDS_LEVELS.get(system, 2) <= len(self.groups)


@cache
def transport_of(system: str) -> SystemConfig:
    """A system whose experts stay: its way of moving tokens alone.

    Rows as short as a test's would never be cut by choice: pipelined systems have three chunks here, one of them
    narrower, and two or three stages.
    """
    found = SystemConfig.named(system)
    schemes = found.schemes
    if "chunks" in schemes:
        stages = schemes.get("dimensions", [3])
        schemes = {**schemes, "chunks": [3], "dimensions": stages, "cut": stages}
    static = {"_target_": "hiermoe.policies.protocol.StaticPolicy"}
    return found.model_copy(update={"policy": static, "schemes": schemes, "migration": "at_once"} | BY_SOURCE)


@cache
def same_transport(system: str) -> str:
    """The first system that moves tokens in the same way; systems may differ in their policies alone."""

    def transport(name: str) -> tuple[str, dict[str, Any]]:
        return transport_of(name).executor, transport_of(name).schemes

    return next(name for name in SYSTEMS if transport(name) == transport(system))


TRANSPORTS = sorted({same_transport(system) for system in SYSTEMS})


WORLDS = [World((2, 4)), World((2, 4, 8)), World((4, 8))]


def cases_of(world: World) -> tuple[str, ...]:
    """All cases, and fewer where they would only repeat themselves."""
    return FEWER if world == WORLDS[-1] else tuple(CASES)


def start_megatron(ep_size: int) -> None:
    """Process groups and seeds of this rank, after those of an earlier call."""
    cpu.expect_fallbacks()
    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ep_size)
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)


def only_expert_parallel() -> Any:
    """The process groups that a dispatcher needs, the expert-parallel group being the world.

    Megatron's own set has dozens, and gloo connects every two ranks of each.
    """
    cpu.expect_fallbacks()
    cpu.install()
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return SimpleNamespace(ep=dist.group.WORLD, expt_tp=alone, tp_ep=dist.group.WORLD)


def layer_config(num_experts: int, topk: int, hidden: int, ep_size: int, **settings: Any) -> Any:
    """Megatron's configuration of a layer that only moves tokens."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=1,
        num_moe_experts=num_experts,
        moe_router_topk=topk,
        moe_router_pre_softmax=topk == 1,
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=ep_size,
        add_bias_linear=False,
        **settings,
    )


def stock_dispatcher(config: Any, groups: Any) -> Any:
    """Megatron's own dispatcher of this rank."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    per_rank = config.num_moe_experts // groups.ep.size()
    first = groups.ep.rank() * per_rank
    return MoEAlltoAllTokenDispatcher(per_rank, list(range(first, first + per_rank)), config, groups)
