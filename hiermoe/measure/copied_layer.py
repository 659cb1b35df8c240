"""A layer whose experts have copies on real ranks: weights travel to them, gradients home, and both have known answers.

A weight is the digits of its expert's number, so what arrives says which expert it is, and an expert multiplies by what
arrived. Gradients are integers as wide as the policy's, whose sums nothing rounds.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, TypeVar

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from hiermoe.dispatch.communicators import reduced
from hiermoe.dispatch.dispatcher import Dispatcher
from hiermoe.dispatch.expert_copies import CopiesOfExperts, ShardedExperts, send
from hiermoe.measure.replay_job import FACTORS, ReplayJob
from hiermoe.megatron.deciding import check_same
from hiermoe.megatron.layer_placement import LayerPlacement
from hiermoe.megatron.meter import Meter
from hiermoe.policies.price_of_moving import STATE_BYTES_PER_PARAMETER, WEIGHT_BYTES_PER_PARAMETER, arrivals
from hiermoe.policies.protocol import PlacementPolicy, StepContext
from hiermoe.policies.ways_of_copies import part_of_expert, ways_of_copies
from hiermoe.topology.placement import Placement

Result = TypeVar("Result")

_DIGITS = 6  # of an expert's number in base FACTORS, repeated
_WIRE = {2: torch.int16, 4: torch.int32}  # gradients


class CopiedLayer(LayerPlacement):
    """One layer's experts and their copies on this rank; a micro-batch begins with `begin` and ends with `end`."""

    keeps_copies: ClassVar[bool] = True

    def __init__(self, job: ReplayJob, dispatcher: Dispatcher, policy: PlacementPolicy, meter: Meter) -> None:
        """Keep what is at home where the dispatcher's placement has it.

        Args:
            job: sizes and device.
            dispatcher: of the layer.
            policy: makes copies.
            meter: times what travels, in phases of their own.
        """
        super().__init__(job.layer, dispatcher, policy, [], job.sizes.expert_parameters)
        dispatcher.observe = None  # `begin` measures, while experts are at home
        assert policy.copies is not None
        self._job, self._terms, self._meter = job, policy.copies, meter
        self._group = dispatcher.context.communicators.ep_group
        self._rank, self._ranks = dispatcher.context.communicators.rank, dispatcher.context.communicators.size
        self._part = part_of_expert(job.sizes.expert_parameters, self._ranks)
        self._home = dispatcher.placement
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # by expert: weights, the rest of its training state
        self._parts: list[Tensor] = []
        if self._terms.sharded:
            own = slice(self._rank * self._part, (self._rank + 1) * self._part)
            self._parts = [self._padded(self._weight_of(e))[own].clone() for e in range(job.sizes.num_experts)]
        else:
            self._kept = {e: (self._weight_of(e), self._rest()) for e in self._here(self._home)}

    def context(self, votes: Tensor | None) -> StepContext:
        """As the simulation has it."""
        sizes = self._job.sizes
        return replace(super().context(votes), row_bytes=sizes.sent, num_experts=sizes.num_experts)

    def begin(self, ids_TK: Tensor) -> None:
        """Plan the micro-batch's copies, and send their weights. *Collective.*

        Args:
            ids_TK: int64 [T, K], experts of this rank's tokens.

        Raises:
            RuntimeError: ranks planned differently.
        """
        self.observe(ids_TK)
        sizes, self._home = self._job.sizes, self.dispatcher.placement
        dist.barrier(self._group)
        started = time.perf_counter()
        acting = self._home
        if type(self.policy).rebalance is not PlacementPolicy.rebalance:
            mine_E = torch.bincount(ids_TK.reshape(-1), minlength=sizes.num_experts)
            gathered = mine_E.new_empty(self._ranks * sizes.num_experts)
            dist.all_gather_into_tensor(gathered, mine_E, group=self._group)
            pairs_GE = gathered.view(self._ranks, -1).cpu()
            acting = self.policy.rebalance(pairs_GE, self._home, self.context(None)) or self._home
        hierarchy = self._job.cluster.hierarchy
        ways = ways_of_copies(acting, self._home, hierarchy, self._terms.relays_from, sizes.num_experts)
        self.measuring_ms += (time.perf_counter() - started) * 1e3
        check_same(acting.key.hex(), self._group)
        self.dispatcher.placement = acting
        self._copies, self._sharded = CopiesOfExperts(ways, self._group), ShardedExperts(acting, self._group)
        self._at_home = {e for e, rank in enumerate(ways.home_E.tolist()) if rank == self._rank}
        self._send_weights("weights")

    @property
    def factor_S(self) -> Tensor:
        """What the expert in each slot multiplies by, as its weights say: float32 [S / G]."""
        return torch.stack([weight[0] for weight in self._slots()]).float()

    def before_backward(self) -> None:
        """Layers that share buffers send weights once more. *Collective.*"""
        if self._terms.shared_buffers:
            self._send_weights("weights again")

    def end(self, gradient_SM: Tensor, expected_EM: Tensor) -> int:
        """Bring gradients where they are summed, and experts home. *Collective.*

        Args:
            gradient_SM: [S / G, M], of this rank's slots; repeated over a weight's elements.
            expected_EM: int64 [E, M], of the tokens of this rank, for every expert.

        Returns:
            Elements of weights here and of gradients summed here that are wrong.
        """
        wrong = sum(int(x.ne(self._weight_of(e)).sum()) for e, x in zip(self._local, self._slots(), strict=True))
        gradients = [self._whole(gradient_M) for gradient_M in gradient_SM]
        if self._terms.sharded:
            sums = self._metered("gradients", lambda: self._sharded.sum_parts(gradients, "home"))[0]
            own = slice(self._rank * self._part, (self._rank + 1) * self._part)
            found = {expert: (part, own) for expert, part in enumerate(sums)}
        else:
            sum_of = {e: torch.zeros_like(gradients[0]) for e in {*self._local, *self._at_home}}
            for expert, gradient in zip(self._local, gradients, strict=True):
                sum_of[expert].add_(gradient)
            self._metered("gradients", lambda: self._copies.sum_home(sum_of, "home"))
            if self._terms.with_state:
                self._metered("copies", lambda: self._copies.spread(sum_of, "sums"))
            known = sum_of if self._terms.with_state else self._at_home
            found = {expert: (sum_of[expert], slice(None)) for expert in known}
        self.dispatcher.placement = self._home
        summed_EM = reduced(expected_EM, dist.ReduceOp.SUM, self._group).to(self._job.device)
        return wrong + sum(int(x.ne(self._whole(summed_EM[e])[of]).sum()) for e, (x, of) in found.items())

    def move(self, optimizer: MegatronOptimizer | None, new: Placement) -> int:
        """Bring experts with their training state to GPUs that did not have them; of sharded ones nothing moves."""
        if self._terms.sharded:
            return 0
        hops = arrivals(self._home, new, self._ranks)
        coming = {e: (x, y) for e, x, y in zip(*(part.tolist() for part in hops), strict=True) if y == self._rank}
        arrived = {expert: (self._empty(), self._rest()) for expert in coming}
        sent_bytes = 0
        for part in (0, 1):
            leaving = {expert: state[part] for expert, state in self._kept.items()}
            arriving = {(expert, coming[expert][0]): state[part] for expert, state in arrived.items()}
            sent_bytes += send(hops, leaving, arriving, self._group)
        both = self._kept | arrived
        self._kept = {expert: both[expert] for expert in self._here(new)}
        return sent_bytes

    def _send_weights(self, stage: str) -> None:
        """Whatever does not stay here from step to step is forgotten first, so that it must arrive."""
        self._local = self.dispatcher.local_experts.tolist()
        if self._terms.sharded:
            self._filled = [self._empty(self._part * self._ranks) for _ in self._local]
            self._metered("copies", lambda: self._sharded.gather(self._parts, self._filled, stage))
            return
        self._weights: dict[int, Tensor] = {}
        for expert in {*self._local, *self._at_home}:
            stays = expert in self._at_home or self._terms.with_state
            weight = self._kept[expert][0] if expert in self._kept else self._empty()
            self._weights[expert] = weight if stays else weight.zero_()
        if not self._terms.with_state:
            self._metered("copies", lambda: self._copies.spread(self._weights, stage))

    def _slots(self) -> list[Tensor]:
        """Weights of every local slot."""
        if self._terms.sharded:
            return [weight[: self._job.sizes.expert_parameters] for weight in self._filled]
        return [self._weights[expert] for expert in self._local]

    def _metered(self, phase: str, transfer: Callable[[], Result]) -> Result:
        device = torch.device(self._job.device)
        self._meter.start(phase, device)
        result = transfer()
        self._meter.stop(self.number, phase, None, device)
        return result

    def _here(self, placement: Placement) -> list[int]:
        return sorted(set(placement.expert_at_S.view(self._ranks, -1)[self._rank].tolist()))

    def _weight_of(self, expert: int) -> Tensor:
        """Its weights: every parameter 1 + a digit of its number, bf16."""
        digits = [1 + expert // FACTORS**digit % FACTORS for digit in range(_DIGITS)]
        return self._repeated(torch.tensor(digits, dtype=torch.bfloat16, device=self._job.device))

    def _whole(self, gradient_M: Tensor) -> Tensor:
        """A gradient of as many elements as a weight has."""
        return self._padded(self._repeated(gradient_M.long()).to(_WIRE[self._terms.gradient_bytes]))

    def _repeated(self, values: Tensor) -> Tensor:
        length = self._job.sizes.expert_parameters
        return values.repeat(-(-length // len(values)))[:length]

    def _padded(self, values: Tensor) -> Tensor:
        """Zeros behind it, where experts are sharded in equal parts."""
        more = self._part * self._ranks - len(values) if self._terms.sharded else 0
        return torch.cat([values, values.new_zeros(more)])

    def _empty(self, length: int | None = None) -> Tensor:
        return torch.zeros(length or self._job.sizes.expert_parameters, dtype=torch.bfloat16, device=self._job.device)

    def _rest(self) -> Tensor:
        rest_bytes = STATE_BYTES_PER_PARAMETER - WEIGHT_BYTES_PER_PARAMETER
        return torch.zeros(rest_bytes * self._job.sizes.expert_parameters, dtype=torch.uint8, device=self._job.device)
