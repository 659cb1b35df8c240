"""Schema of conf/record.yaml. Pure: imports neither torch nor megatron."""

from typing import Self

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from hiermoe.narrow.training_config import TrainingConfig


class RecordConfig(TrainingConfig):
    """A recording run: train a model on gloo ranks, then keep what its routers choose.

    Attributes:
        train_steps: Steps before recording starts.
        record_steps: Consecutive steps that are recorded; training goes on through them.
        logical_ranks: Ranks of the trace; each holds an equal, contiguous share of a step's tokens.
        num_recorded: Experts kept per token.
        layers: Layer numbers (from 1) to record; None for every MoE layer.
        output: Where the trace goes.
        timeout_minutes: A rank that waits longer than this for another one ends the run.
    """

    train_steps: NonNegativeInt
    record_steps: PositiveInt
    logical_ranks: PositiveInt
    num_recorded: PositiveInt
    layers: list[PositiveInt] | None
    output: str
    timeout_minutes: PositiveFloat

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tokens_per_step % self.logical_ranks:
            raise ValueError(
                f"sequences_per_step * seq_length = {self.tokens_per_step} is not divisible by "
                f"logical_ranks={self.logical_ranks}"
            )
        topk, usable = self.model.topk, self.model.usable_experts
        if not topk <= self.num_recorded <= usable:
            raise ValueError(
                f"num_recorded={self.num_recorded} is outside {topk}..{usable}, from topk to the experts that the "
                "router lets a token use"
            )
        unknown = sorted(set(self.layers or []) - set(self.model.moe_layers))
        if unknown:
            raise ValueError(f"layers={unknown} have no experts; MoE layers are {self.model.moe_layers}")
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step, over all ranks."""
        return self.sequences_per_step * self.seq_length

    @property
    def recorded_layers(self) -> list[int]:
        """Layer numbers that the trace holds, ascending."""
        return sorted(self.model.moe_layers if self.layers is None else set(self.layers))
