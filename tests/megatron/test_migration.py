"""An expert that moves takes its weights, masters and moments along, to the bit, and nothing else travels."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hiermoe.megatron.standins import cpu

cpu.expect_fallbacks()

from hiermoe.narrow.corpus import Corpus, training_corpus  # noqa: E402
from hiermoe.narrow.training_config import TrainingConfig  # noqa: E402
from hiermoe.policies.price_of_moving import STATE_BYTES_PER_PARAMETER, price_migration  # noqa: E402
from hiermoe.ranks.launch import run_ranks  # noqa: E402
from hiermoe.ranks.server import RankFailedError  # noqa: E402
from hiermoe.topology.placement import Placement  # noqa: E402
from tests.megatron.moving import DEADLINE, SHUFFLED, TIMEOUT, Run, cluster_of, launch, small  # noqa: E402

ROUNDS = 40
PER_RANK = 2


def random_placement(old: Placement, round_: int) -> Placement:
    """Of all kinds: any permutation, swaps inside a rank and across ranks, cycles, none."""
    generator = torch.Generator().manual_seed(round_)
    experts, order = old.num_experts, torch.randperm(old.num_experts, generator=generator).tolist()
    slot_E, expert_at = old.slot_E.clone(), old.expert_at_S.tolist()
    match round_ % 5:
        case 0:
            return Placement.of_slots(torch.tensor(order))
        case 1:  # every pair of slots of a rank, or only one of them
            placement = old
            for rank in range(1 if round_ % 2 else experts // PER_RANK):
                placement = placement.swapped(*expert_at[rank * PER_RANK : (rank + 1) * PER_RANK])
            return placement
        case 2:
            return old.swapped(order[0], order[1])
        case 3:  # a cycle of some, inside ranks and across them
            cycle = order[: 3 + round_ % 4]
            slot_E[cycle] = old.slot_E[cycle[1:] + cycle[:1]]
            return Placement.of_slots(slot_E)
    return old


def move_at_random(rank: int, config: TrainingConfig, corpus: Corpus, buffers: list[int]) -> list[dict[str, Any]]:
    from hiermoe.dispatch.interposer import Interposer
    from hiermoe.megatron import migration

    run = Run(config, corpus, SHUFFLED).train(1)
    layer = run.placement.layers[0]
    group, cluster = layer.dispatcher.context.communicators.ep_group, cluster_of(config)
    expected = run.copied()
    seen = []
    for round_ in range(ROUNDS):
        migration.BUFFER_BYTES = buffers[round_ % len(buffers)]
        old = layer.dispatcher.placement
        new = random_placement(old, round_)
        with Interposer() as interposer:
            sent_bytes = migration.migrate(layer.parameters, run.trainer.optimizer, old, new, group)
            transfers = interposer.drain()
        layer.dispatcher.placement = new
        expert_bytes = sum(
            tensor.numel() * tensor.element_size() for p in layer.parameters[0] for _, tensor in run.states_of(p)
        )
        was, now = old.rank_of(config.ep_size), new.rank_of(config.ep_size)
        seen.append(
            {
                "sent_bytes": sent_bytes,
                "wire_bytes": sum(sum(x.sent_bytes) for x in transfers),
                "received_bytes": sum(sum(x.received_bytes) for x in transfers),
                "left_bytes": int(((was == rank) & (now != rank)).sum()) * expert_bytes,
                "operations": {x.operation for x in transfers},
                "largest_batch": largest_batch([sum(x.sent_bytes) for x in transfers]),
                "buffer": migration.BUFFER_BYTES,
                "moved_experts": len(old.moves_to(new).split()),
                "changed": int((old.slot_E != new.slot_E).sum()),
                "priced_bytes": price_migration(old, new, cluster, expert_bytes).moved_bytes,
                "expert_bytes": expert_bytes,
                "parameters": layer.expert_parameters,
                "tensors": run.copied(),
            }
        )
    seen.append({"tensors": expected})
    return seen


def largest_batch(sent: list[int]) -> int:
    """Sends are posted together and then receives, which sent nothing: the most that is under way at once."""
    largest = now = 0
    for amount in sent:
        now = now + amount if amount else 0
        largest = max(largest, now)
    return largest


@pytest.fixture(scope="module", params=[pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def moves(request: pytest.FixtureRequest, cache_dir: str) -> list[list[dict[str, Any]]]:
    """By rank and round."""
    config = small("qwen3_30b_a3b", cache_dir, dtype=request.param)
    # Pieces of odd sizes, cut inside tensors and inside elements; and all at once.
    return launch(move_at_random, config, training_corpus(config), [777, 2**25, 2049, 4096])


def test_every_expert_keeps_all_its_bits_through_any_sequence_of_placements(
    moves: list[list[dict[str, Any]]],
) -> None:
    before = all_experts([rank[-1]["tensors"] for rank in moves])
    kinds = {name.split()[1] for name in before}
    assert {"weight", "exp_avg", "exp_avg_sq"} <= kinds
    assert len({tuple(tensor.reshape(-1)[:8].tolist()) for tensor in before.values()}) > len(before) // 2
    for round_ in range(ROUNDS):
        after = all_experts([rank[round_]["tensors"] for rank in moves])
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before), f"round {round_}"


def all_experts(ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of all ranks; each is at one of them."""
    experts = [{name: x for name, x in rank.items() if "experts.local_experts" in name} for rank in ranks]
    found = {name: x for rank in experts for name, x in rank.items()}
    assert len(found) == sum(map(len, experts))
    return found


def test_only_experts_that_change_their_rank_are_sent_and_all_of_them(moves: list[list[dict[str, Any]]]) -> None:
    for rank in moves:
        for move in rank[:-1]:
            assert move["sent_bytes"] == move["wire_bytes"] == move["left_bytes"]
            assert move["operations"] <= {"send", "receive"}
            assert move["moved_experts"] == move["changed"]
    inside = [rank[1] for rank in moves]
    assert all(move["moved_experts"] > 0 and not move["operations"] for move in inside)


def test_bytes_sent_are_those_that_the_planner_prices(moves: list[list[dict[str, Any]]]) -> None:
    for round_ in range(ROUNDS):
        ranks = [rank[round_] for rank in moves]
        assert sum(move["sent_bytes"] for move in ranks) == ranks[0]["priced_bytes"]
        assert sum(move["received_bytes"] for move in ranks) == ranks[0]["priced_bytes"]
    move = moves[0][0]
    mixed = any(name.endswith("master") for name in move["tensors"])
    assert move["expert_bytes"] == (STATE_BYTES_PER_PARAMETER if mixed else 12) * move["parameters"]


def test_buffers_stay_small(moves: list[list[dict[str, Any]]]) -> None:
    for rank in moves:
        for move in rank[:-1]:
            assert move["largest_batch"] <= move["buffer"]
    assert max(move["largest_batch"] for rank in moves for move in rank[:-1]) > 4096


def killed_while_moving(rank: int, config: TrainingConfig, corpus: Corpus, survived: str) -> None:
    import os
    import signal
    from pathlib import Path

    from hiermoe.megatron import migration

    begin = migration._begin
    pieces = 0

    def dying(*args: Any) -> Any:
        nonlocal pieces
        pieces += 1
        if rank == 1 and pieces == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return begin(*args)

    migration._begin = dying
    migration.BUFFER_BYTES = 1000
    Run(config, corpus, SHUFFLED).train(1)
    (Path(survived) / str(rank)).touch()


def test_a_rank_that_dies_while_experts_move_ends_the_run_by_name(cache_dir: str, tmp_path: Any) -> None:
    config = small("qwen3_30b_a3b", cache_dir)
    with pytest.raises(RankFailedError, match="rank 1 of 4 died by signal SIGKILL"):
        launch(killed_while_moving, config, training_corpus(config), str(tmp_path))
    assert not list(tmp_path.iterdir())  # no rank took the step for done


def test_a_layer_whose_experts_are_half_moved_refuses_to_be_used() -> None:
    from hiermoe.dispatch.dispatcher import Dispatcher

    dispatcher = object.__new__(Dispatcher)
    dispatcher._half_moved = False
    with pytest.raises(ConnectionError), dispatcher.moving():
        raise ConnectionError
    with pytest.raises(RuntimeError, match="half moved"):
        dispatcher.dispatch(torch.zeros(1, 1), torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2))
    with dispatcher.moving():
        assert dispatcher._half_moved
    assert not dispatcher._half_moved


def test_optimizers_whose_state_cannot_be_found_are_refused_by_name() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer, MegatronOptimizer

    from hiermoe.megatron.expert_state import check_optimizer

    class Elsewhere(MegatronOptimizer):
        pass

    Elsewhere.__abstractmethods__ = frozenset()
    fine, refused = object.__new__(FP32Optimizer), object.__new__(Elsewhere)
    check_optimizer(fine)
    chained = object.__new__(ChainedOptimizer)
    chained.chained_optimizers = [fine, refused]
    for optimizer in (refused, chained):
        with pytest.raises(ValueError, match="Elsewhere is not supported where experts move"):
            check_optimizer(optimizer)
    divided = object.__new__(DistributedOptimizer)
    divided.is_stub_optimizer = False
    plain = {"optimizer_cpu_offload": False, "main_params_dtype": torch.float32}
    plain |= dict.fromkeys(("exp_avg_dtype", "exp_avg_sq_dtype"), torch.bfloat16)
    cases = [
        (True, {}, "use_megatron_fsdp"),
        (False, {"optimizer_cpu_offload": True}, "optimizer_cpu_offload is not supported"),
        (False, {"exp_avg_dtype": torch.uint8}, "exp_avg_dtype=torch.uint8: state in fp8 or fp16 has a scale"),
        (False, {"exp_avg_sq_dtype": torch.float16}, "exp_avg_sq_dtype=torch.float16: state in fp8 or fp16"),
        (False, {"main_params_dtype": torch.float16}, "main_params_dtype=torch.float16: state in fp8 or fp16"),
    ]
    for fsdp, changes, message in cases:
        divided.ddp_config = SimpleNamespace(use_megatron_fsdp=fsdp)  # type: ignore[assignment]
        divided.config = SimpleNamespace(**plain | changes)  # type: ignore[assignment]
        with pytest.raises(ValueError, match=f"^{message}"):
            check_optimizer(divided)
    divided.config = SimpleNamespace(**plain)  # type: ignore[assignment]
    divided.ddp_config = SimpleNamespace(use_megatron_fsdp=False)  # type: ignore[assignment]
    check_optimizer(divided)


def test_state_of_another_shape_than_its_parameter_is_refused() -> None:
    from hiermoe.megatron.expert_state import held_state

    parameter = torch.nn.Parameter(torch.zeros(4, 2))
    state = {parameter: {"step": torch.tensor(1.0), "exp_avg": torch.ones(4, 2)}}
    optimizer: Any = SimpleNamespace(optimizer=SimpleNamespace(state=state))
    shapes = [[x is not None and tuple(x.shape) for x in held.tensors] for held in held_state([parameter], optimizer)]
    assert shapes == [[(8,)], [(8,)]]
    state[parameter]["row_sums"] = torch.ones(4)
    with pytest.raises(ValueError, match=r"row_sums of shape \[4\]"):
        held_state([parameter], optimizer)


def test_experts_whose_parameters_cannot_be_told_apart_are_refused() -> None:
    from hiermoe.megatron.migration import expert_parameters

    class GroupedMLP(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight1 = torch.nn.Parameter(torch.zeros(4))

    with pytest.raises(ValueError, match="GroupedMLP"):
        expert_parameters(GroupedMLP())


def broken_loose(rank: int) -> str:
    import torch.distributed as dist

    from hiermoe.megatron.migration import migrate

    turned = [[torch.nn.Parameter(torch.zeros(3, 2).t(), requires_grad=False)]]
    swapped = Placement.of_slots(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="not contiguous"):
        assert dist.group.WORLD is not None
        migrate(turned, None, Placement.identity(2), swapped, dist.group.WORLD)
    return "refused"


def test_tensors_that_are_not_contiguous_are_refused_on_every_rank() -> None:
    assert run_ranks(broken_loose, 2, (), TIMEOUT, deadline=DEADLINE) == ["refused"] * 2
