"""Policies run in training: what they see, when they act, and that moved experts change no number of the run."""

from datetime import timedelta
from typing import Any

import pytest
import torch

from hiermoe.megatron.standins import cpu

cpu.expect_fallbacks()

from hiermoe.narrow.corpus import Corpus, training_corpus  # noqa: E402
from hiermoe.narrow.training_config import TrainingConfig  # noqa: E402
from hiermoe.policies.protocol import PlacementUpdate, StepContext  # noqa: E402
from hiermoe.policies.system import SystemConfig  # noqa: E402
from hiermoe.records.project import CONF  # noqa: E402
from hiermoe.topology.placement import Placement  # noqa: E402
from tests.megatron.moving import (  # noqa: E402
    DEADLINE,
    HIERMOE,
    REPACKED,
    SHUFFLED,
    STATIC,
    SWAPPED,
    Run,
    Shuffle,
    joined,
    largest_error,
    launch,
    small,
    system,
)

SYSTEMS = {
    "static": STATIC,
    "swapped": SWAPPED,
    "repacked": REPACKED,
    "hiermoe": HIERMOE,
    "shuffled": SHUFFLED,
}
Seen = dict[Any, Any]
both = pytest.mark.parametrize("model", [pytest.param("qwen3_30b_a3b", marks=pytest.mark.slow), "deepseek_v3"])


def train(rank: int, config: TrainingConfig, corpus: Corpus, systems: list[str], steps: int, clip: bool) -> Seen:
    """Train under one system after another."""
    seen = {}
    for name in systems:
        run = Run(config, corpus, SYSTEMS[name])
        if not clip:  # the norm is a sum over ranks, and so depends on where experts are
            for part in run.trainer.optimizer.chained_optimizers:  # type: ignore[attr-defined]
                part.config.clip_grad = 0.0
        run.train(steps)
        seen[name] = {"losses": run.losses, "updates": run.updates, "tensors": run.copied()}
    return seen


def trained(
    config: TrainingConfig, systems: list[str], steps: int, *, clip: bool = True, deadline: timedelta = DEADLINE
) -> dict[str, Seen]:
    """By system: losses, updates and, joined over ranks, everything that training would go on from."""
    ranks = launch(train, config, training_corpus(config), systems, steps, clip, deadline=deadline)
    for name in systems:
        assert all(rank[name]["losses"] == ranks[0][name]["losses"] for rank in ranks)
    return {name: ranks[0][name] | {"tensors": joined([rank[name]["tensors"] for rank in ranks])} for name in systems}


def check_equal_to_static(runs: dict[str, Seen], num_layers: int) -> None:
    static = runs["static"]
    for name, run in runs.items():
        assert run["losses"] == pytest.approx(static["losses"], rel=1e-9), name
        assert largest_error(run["tensors"], static["tensors"]) < 1e-9, name
        moves = [len(updates) for updates in run["updates"]]
        if name in ("swapped", "shuffled"):
            assert moves == [num_layers] * len(moves)
        elif name != "static":
            assert sum(moves) > 0
        if name == "repacked":
            assert sum(moves[1::2]) >= 2 and not any(moves[::2])
    assert len(set(static["losses"])) == len(static["losses"])


@pytest.mark.slow
@both
def test_moved_experts_change_neither_loss_nor_what_training_goes_on_from(model: str, cache_dir: str) -> None:
    check_equal_to_static(trained(small(model, cache_dir), ["static", "swapped", "repacked", "hiermoe"], 4), 2)


@pytest.mark.slow
def test_replicas_of_experts_move_together_and_stay_equal(cache_dir: str) -> None:
    config = small("deepseek_v3", cache_dir, data_parallel=2)
    check_equal_to_static(trained(config, ["static", "shuffled"], 4), 2)


@pytest.mark.slow
def test_mixed_precision_loses_no_bit_of_masters_and_moments(cache_dir: str) -> None:
    # With one expert a token no sum depends on where experts are, so that equality is to the bit.
    config = small("deepseek_v3", cache_dir, topk=1, dtype="bf16")
    runs = trained(config, ["static", "shuffled"], 4, clip=False)
    assert runs["shuffled"]["losses"] == runs["static"]["losses"]
    assert largest_error(runs["shuffled"]["tensors"], runs["static"]["tensors"]) == 0
    assert any(name.endswith("local_experts.7.linear_fc2.weight master") for name in runs["static"]["tensors"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_steps_of_a_narrow_model_under_moving_experts(cache_dir: str) -> None:
    from hiermoe.model import ModelConfig

    # The vocabulary does not pass through the experts, and stock computes experts one after another.
    fewer = {"vocab_size": 1024, "num_experts": 64}
    narrow = ModelConfig.from_yaml(CONF / "model" / "deepseek_v3_narrow.yaml").model_copy(update=fewer)
    values = small("deepseek_v3", cache_dir, sequences_per_step=16, corpus_files=200).model_dump()
    config = TrainingConfig.model_validate(values | {"model": narrow})
    runs = trained(config, ["static", "hiermoe"], 50, deadline=timedelta(minutes=25))
    for name, run in runs.items():
        loss = max(abs(a / b - 1) for a, b in zip(run["losses"], runs["static"]["losses"], strict=True))
        print(f"{name}: loss {loss:.1e}, tensors {largest_error(run['tensors'], runs['static']['tensors']):.1e}")
    check_equal_to_static(runs, narrow.num_moe_layers)


class Dissent(Shuffle):
    """Rank 1 decides otherwise than the others."""

    def decide(self, summed: Any, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        import torch.distributed as dist

        return PlacementUpdate(placement.swapped(0, 7 - dist.get_rank() % 2), None)

    def shared_state(self) -> None:
        """Every rank decides."""


def observe(rank: int, config: TrainingConfig, corpus: Corpus) -> Seen:
    seen: Seen = {}
    _disagreement(config, corpus, seen)
    _collectives(config, corpus, seen)
    _forwards_that_count(config, corpus, seen)
    _timing(config, corpus, seen)
    _refused_optimizer(config, corpus, seen)
    return seen


def _disagreement(config: TrainingConfig, corpus: Corpus, seen: Seen) -> None:
    run = Run(config, corpus, SystemConfig.model_validate(STATIC.model_dump() | {"policy": {"_target_": DISSENT}}))
    run.losses.append(run.trainer.step(run.trainer.batch(corpus, 0)))
    before = {name: x.clone() for name, x in run.tensors(slot=True).items()}
    try:
        run.placement.step(run.trainer.optimizer)
    except RuntimeError as error:
        seen["disagreement"] = str(error)
    after = run.tensors(slot=True)
    seen["nothing_moved"] = all(torch.equal(after[name], x) for name, x in before.items())
    seen["still_home"] = all(layer.dispatcher.placement.is_identity for layer in run.placement.layers)


def _collectives(config: TrainingConfig, corpus: Corpus, seen: Seen) -> None:
    from hiermoe.dispatch.interposer import Interposer

    rarely = system("hiermoe.policies.hierd_es.HierDESPolicy", interval=2)
    for name, one in (("watched", system("Watch")), ("static", STATIC), ("shuffled", SHUFFLED), ("rarely", rarely)):
        run = Run(config, corpus, one)
        run.trainer.step(run.trainer.batch(corpus, 0))
        with Interposer() as interposer:
            run.placement.step(run.trainer.optimizer)
            seen["operations", name] = [x.operation for x in interposer.drain()]


def _forwards_that_count(config: TrainingConfig, corpus: Corpus, seen: Seen) -> None:
    from megatron.core.distributed import finalize_model_grads

    def pairs(run: Run) -> list[int]:
        run.placement.step(run.trainer.optimizer)
        return [int(layer.policy.seen[-1].sum()) for layer in run.placement.layers]  # type: ignore[attr-defined]

    def forward(run: Run, step: int) -> torch.Tensor:
        sequences = run.trainer.batch(corpus, step)
        positions = torch.arange(sequences.shape[1] - 1).expand(len(sequences), -1)
        return run.trainer.model(sequences[:, :-1], positions, attention_mask=None, labels=sequences[:, 1:]).mean()

    for recompute in (False, True):
        changed = config.model_copy(update={"recompute": recompute, "dtype": "fp32"})
        run = Run(changed, corpus, system("Watch"))
        run.trainer.step(run.trainer.batch(corpus, 0))
        seen["one", recompute] = pairs(run)
        run.trainer.step(run.trainer.batch(corpus, 1))
        run.trainer.model.eval()
        with torch.no_grad():
            forward(run, 2)
        run.trainer.model.train()
        seen["evaluated", recompute] = pairs(run)
        run.trainer.model.zero_grad_buffer()
        for step in (3, 4):
            forward(run, step).backward()
        finalize_model_grads([run.trainer.model])  # type: ignore[list-item]
        seen["accumulated", recompute] = pairs(run)


def _timing(config: TrainingConfig, corpus: Corpus, seen: Seen) -> None:
    run = Run(config, corpus, SHUFFLED)
    seen["old"], seen["new"] = [], []
    for step in range(3):
        run.trainer.step(run.trainer.batch(corpus, step))
        layer = run.placement.layers[0]
        old, routed, plan = layer.dispatcher.placement, layer.measured, layer.dispatcher.plan
        run.placement.step(run.trainer.optimizer)
        new = layer.dispatcher.placement
        assert plan is not None and routed is not None
        by_slot = plan.counts.pairs_GS[layer.dispatcher.context.communicators.rank]
        seen["old"].append(torch.equal(by_slot[old.slot_E], routed.long()))
        seen["new"].append(torch.equal(by_slot[new.slot_E], routed.long()))


def _refused_optimizer(config: TrainingConfig, corpus: Corpus, seen: Seen) -> None:
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    class Elsewhere(MegatronOptimizer):
        pass

    Elsewhere.__abstractmethods__ = frozenset()
    run = Run(config, corpus, SHUFFLED).train(1)
    before = [layer.dispatcher.placement for layer in run.placement.layers]
    for name in ("step", "go_home"):
        try:
            getattr(run.placement, name)(object.__new__(Elsewhere))
        except ValueError as error:
            seen["refused", name] = str(error)
    seen["refused_stays"] = [layer.dispatcher.placement for layer in run.placement.layers] == before


DISSENT = f"{__name__}.Dissent"


@pytest.fixture(scope="module")
def seen(cache_dir: str) -> list[Seen]:
    config = small("qwen3_30b_a3b", cache_dir)
    return launch(observe, config, training_corpus(config))


def test_a_rank_that_decides_otherwise_stops_every_rank_before_anything_moves(seen: list[Seen]) -> None:
    for rank in seen:
        assert "ranks decided on different placements" in rank["disagreement"]
        assert rank["nothing_moved"] and rank["still_home"]


def test_a_decision_takes_one_sum_of_all_layers_and_one_comparison(seen: list[Seen]) -> None:
    for rank in seen:
        assert rank["operations", "watched"] == ["all_reduce", "all_reduce"]
        assert rank["operations", "static"] == rank["operations", "rarely"] == []
        assert rank["operations", "shuffled"][:2] == ["all_reduce", "all_reduce"]
        assert rank["operations", "shuffled"][2:6] == 2 * ["broadcast", "broadcast"]  # a layer each: size, content
        assert set(rank["operations", "shuffled"][6:]) <= {"send", "receive"}


@pytest.mark.parametrize("recompute", [False, True])
def test_every_micro_batch_counts_once_and_evaluation_does_not(recompute: bool, seen: list[Seen]) -> None:
    pairs = 8 * 16 * 2  # sequences, tokens, experts of a token; over all ranks
    for rank in seen:
        assert rank["one", recompute] == [pairs, pairs]
        assert rank["evaluated", recompute] == [pairs, pairs]
        assert rank["accumulated", recompute] == [2 * pairs, 2 * pairs]


def test_what_a_step_decides_acts_from_the_next_step_on(seen: list[Seen]) -> None:
    for rank in seen:
        assert rank["old"] == [True] * 3 and rank["new"] == [False] * 3


def test_an_unknown_optimizer_is_refused_before_anything_moves(seen: list[Seen]) -> None:
    for rank in seen:
        assert "Elsewhere is not supported" in rank["refused", "step"]
        assert "Elsewhere is not supported" in rank["refused", "go_home"]
        assert rank["refused_stays"]


def probe(rank: int, config: TrainingConfig, corpus: Corpus) -> dict[str, Seen]:
    """What router, losses and logs see in a step after some that moved experts or did not."""
    return {name: _probe(Run(config, corpus, SYSTEMS[name]).train(3)) for name in ("static", "shuffled")}


def _probe(run: Run) -> Seen:
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer.moe.moe_utils import (
        clear_aux_losses_tracker,
        get_moe_layer_wise_logging_tracker,
    )

    from hiermoe.narrow.precision import float32_means_float64

    trainer = run.trainer
    routers: list[Any] = [layer.router for layer in run.layers]
    clear_aux_losses_tracker()
    sequences = trainer.batch(run.corpus, 3)
    inputs, targets = sequences[:, :-1], sequences[:, 1:].contiguous()
    trainer.model.zero_grad_buffer()
    found: Seen = {"at_home": all(layer.dispatcher.placement.is_identity for layer in run.placement.layers)}
    with cpu.cuda_means_cpu(), float32_means_float64():
        loss = trainer.model(
            inputs, torch.arange(inputs.shape[1]).expand_as(inputs), attention_mask=None, labels=targets
        ).mean()
        loss.backward()
        found["loads"] = [
            getattr(router, name).clone()
            for router in routers
            for name in ("local_tokens_per_expert", "global_tokens_per_expert")
            if getattr(router, name, None) is not None
        ]
        finalize_model_grads([trainer.model])  # type: ignore[list-item]
        trainer.optimizer.prepare_grads()
        found["norm"] = trainer.optimizer.get_grad_norm()  # type: ignore[attr-defined]
    tracked = get_moe_layer_wise_logging_tracker()
    found["losses"] = [loss.detach(), *(values["values"].detach().clone() for values in tracked.values())]
    found["gradients"] = [router.weight.main_grad.clone() for router in routers]
    found["biases"] = [router.expert_bias.clone() for router in routers if router.expert_bias is not None]
    return found


@both
def test_router_and_logs_see_logical_experts(model: str, cache_dir: str) -> None:
    config = small(model, cache_dir)
    for rank in launch(probe, config, training_corpus(config)):
        static, moved = rank["static"], rank["shuffled"]
        assert not moved["at_home"]
        for kind in ("loads", "losses", "gradients", "biases"):
            assert len(moved[kind]) == len(static[kind])
            for a, b in zip(moved[kind], static[kind], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)
        assert moved["norm"] == pytest.approx(static["norm"], rel=1e-9)
        assert static["loads"] and all(load.max() > load.min() for load in static["loads"])
        assert len(static["losses"]) == 2 and static["losses"][1].sum() > 0
        assert len(static["biases"]) == (2 if model == "deepseek_v3" else 0)
        assert all(bias.abs().sum() > 0 for bias in static["biases"])


def test_a_policy_that_makes_copies_is_refused_before_anything_is_exchanged() -> None:
    from types import SimpleNamespace

    from hiermoe.megatron.expert_placement import ExpertPlacement

    copies = Placement(torch.tensor([0, 1, 0, 1]), torch.tensor([[0, 1], [2, 3]]))
    layer: Any = SimpleNamespace(
        number=3,
        keeps_copies=False,
        measured=None,
        measuring_ms=0.0,
        iteration=0,
        first_step=0,
        dispatcher=SimpleNamespace(placement=Placement.identity(2)),
        policy=SimpleNamespace(
            decide=lambda *_: PlacementUpdate(copies, None), shared_state=lambda: None, decides_after=lambda _: True
        ),
        context=lambda votes: None,
    )
    nobody: Any = object()
    with pytest.raises(ValueError, match="layer 3: training moves experts, but sums no gradients of copies"):
        ExpertPlacement([layer], nobody).step(None)
