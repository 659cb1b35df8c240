"""Training with experts that move, run inside ranks; and policies that move them on purpose."""

import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from hiermoe.dispatch.communicators import played_hosts
from hiermoe.narrow.corpus import Corpus
from hiermoe.narrow.training_config import TrainingConfig
from hiermoe.policies.protocol import PlacementPolicy, PlacementUpdate, StepContext
from hiermoe.policies.system import SystemConfig
from hiermoe.ranks.launch import run_ranks
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement
from tests.narrow.tiny_training import tiny_training

# Far more than a busy machine takes: they end what hangs.
TIMEOUT = timedelta(minutes=10)  # of a collective
DEADLINE = timedelta(minutes=14)  # of a launch; pytest's own limit is 15
BOTH = ("qwen3_30b_a3b", "deepseek_v3")


class Shuffle(PlacementPolicy):
    """Every expert goes to a random slot after every step."""

    def measure(
        self, expert_ids_NK: Tensor, source_N: Tensor, placement: Placement, hierarchy: Hierarchy, iteration: int
    ) -> Tensor:
        return torch.bincount(expert_ids_NK.reshape(-1), minlength=placement.num_experts)

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        generator = torch.Generator().manual_seed(context.iteration)
        return PlacementUpdate(Placement.of_slots(torch.randperm(placement.num_experts, generator=generator)), None)

    def shared_state(self) -> dict[str, Tensor] | None:
        return {}  # one rank decides on a layer


class Swap(Shuffle):
    """The expert with most tokens changes places with one of another rank after every step."""

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        assert summed is not None
        rank_E = placement.rank_of(context.cluster.hierarchy.num_ranks)
        most = int(summed.argmax())
        others = (rank_E != rank_E[most]).nonzero().view(-1)
        return PlacementUpdate(placement.swapped(most, int(others[context.iteration % len(others)])), None)


class Watch(Shuffle):
    """Moves nothing and keeps the sums that it saw."""

    seen: list[Tensor]

    def __init__(self) -> None:
        self.seen = []

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        assert summed is not None
        self.seen.append(summed)
        return None

    def shared_state(self) -> None:
        """Every rank decides, to see."""


def system(policy: str | None = None, schemes: str = "hd2", **arguments: Any) -> SystemConfig:
    """A way of moving tokens with a policy: the name of a class here or a whole path; None: experts stay."""
    if policy is None:
        policy = "hiermoe.policies.protocol.StaticPolicy"
    target = policy if "." in policy else f"{__name__}.{policy}"
    return SystemConfig.named(schemes).model_copy(update={"policy": {"_target_": target, **arguments}})


STOCK = SystemConfig.named("megatron")
STATIC = system()
SHUFFLED = system("Shuffle")
SWAPPED = system("Swap")
REPACKED = system("baselines.smartmoe.SmartMoEPolicy", "smartmoe", interval=2)
HIERMOE = SystemConfig.named("hiermoe")


def small(model: str, cache_dir: str, *, topk: int = 2, **changes: Any) -> TrainingConfig:
    """Two MoE layers of 8 experts on 4 ranks, in fp64 unless said otherwise."""
    router = {"num_groups": None, "group_topk": None} if topk == 1 else {}
    config = tiny_training(model, cache_dir, router=router, **({"ep_size": 4, "dtype": "fp64"} | changes))
    shape = config.model.model_dump() | {"topk": topk, "num_layers": 2 + config.model.num_dense_layers}
    return TrainingConfig.model_validate(config.model_dump() | {"model": shape})


def cluster_of(config: TrainingConfig) -> Cluster:
    return Cluster.named("a6000_4x8").reduced(config.ep_size)


def launch(function: Any, config: TrainingConfig, *args: Any, deadline: timedelta = DEADLINE) -> list[Any]:
    """Run a function on the ranks that a configuration asks for: ``function(rank, config, *args)``."""
    hosts = played_hosts(cluster_of(config).hierarchy) * config.data_parallel
    return run_ranks(function, config.world_size, (config, *args), TIMEOUT, deadline=deadline, hosts=hosts)


class Run:
    """One rank's training under one system, from its first step; several may follow one another in a process."""

    def __init__(self, config: TrainingConfig, corpus: Corpus, system: SystemConfig) -> None:
        from megatron.core import parallel_state

        from hiermoe.megatron.standins import cpu

        cpu.expect_fallbacks()
        from hiermoe.megatron.attach import attach, moe_layers
        from hiermoe.narrow.trainer import Trainer

        parallel_state.destroy_model_parallel()
        self.config, self.corpus = config, corpus
        self.trainer = Trainer(config, TIMEOUT)
        self.placement = attach(self.trainer.model, system, cluster_of(config), timeout=TIMEOUT)
        self.layers = moe_layers(self.trainer.model)
        self.finished = 0
        self.losses: list[float] = []
        self.updates: list[list[tuple[int, list[int], int]]] = []

    def train(self, steps: int) -> "Run":
        """So many further steps."""
        for _ in range(steps):
            self.losses.append(self.trainer.step(self.trainer.batch(self.corpus, self.finished)))
            updates = self.placement.step(self.trainer.optimizer)
            self.updates.append([(x.layer, x.placement.slot_E.tolist(), x.sent_bytes) for x in updates])
            self.finished += 1
        return self

    def placement_of(self, layer: int) -> Placement:
        """By Megatron's number; a dispatcher of Megatron's own has experts at home."""
        (found,) = [x for x in self.layers if x.layer_number == layer]
        home = Placement.identity(self.config.model.num_experts)
        dispatcher: Any = found.token_dispatcher
        return dispatcher.dispatcher.placement if hasattr(dispatcher, "dispatcher") else home

    def tensors(self, slot: bool = False) -> dict[str, Tensor]:
        """Everything on this rank that training goes on from, by name; experts by logical number, or by slot."""
        found = {}
        for name, parameter in self.trainer.model.named_parameters():
            name = name if slot else self.logical(name)
            for kind, tensor in self.states_of(parameter):
                found[f"{name} {kind}"] = tensor
        buffers = self.trainer.model.named_buffers()
        return found | {name: buffer for name, buffer in buffers if name.endswith("expert_bias")}

    def copied(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.tensors().items()}

    def logical(self, name: str) -> str:
        """The name of a parameter with the expert's slot on this rank replaced by its logical number."""
        match = re.search(r"layers\.(\d+)\.mlp\.experts\.local_experts\.(\d+)\.", name)
        if match is None:
            return name
        per_rank = self.config.model.num_experts // self.config.ep_size
        slot = self.layers[0].ep_group.rank() * per_rank + int(match[2])
        expert = int(self.placement_of(int(match[1]) + 1).expert_at_S[slot])
        return f"{name[: match.start(2)]}{expert}{name[match.end(2) :]}"

    def states_of(self, parameter: Any) -> Iterator[tuple[str, Tensor]]:
        """The weight, its fp32 master and its moments, as the optimizer has them."""
        yield "weight", parameter.data
        for part in self.trainer.optimizer.chained_optimizers:  # type: ignore[attr-defined]
            masters = {
                id(low): high
                for lows, highs in zip(
                    getattr(part, "float16_groups", []), getattr(part, "fp32_from_float16_groups", []), strict=True
                )
                for low, high in zip(lows, highs, strict=True)
            }
            key = masters.get(id(parameter), parameter)
            if key is not parameter:
                yield "master", key.data
            for name in ("exp_avg", "exp_avg_sq"):
                if key in part.optimizer.state:
                    yield name, part.optimizer.state[key][name]


def joined(ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all ranks; those that several ranks hold must be the same to the bit."""
    found: dict[str, Tensor] = {}
    for tensors in ranks:
        for name, tensor in tensors.items():
            assert torch.equal(found.setdefault(name, tensor), tensor), f"replicas of {name} differ"
    return found


def largest_error(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative to the largest entry of each tensor."""
    assert tensors.keys() == expected.keys()
    return max(
        float((tensors[name].double() - expected[name].double()).abs().max())
        / max(float(expected[name].double().abs().max()), 1e-300)
        for name in expected
    )
