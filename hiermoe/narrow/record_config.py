"""Schema of conf/record.yaml. Pure: imports neither torch nor megatron."""

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from hiermoe.narrow.training_config import TrainingConfig
from hiermoe.records.strict import Strict


class Stage(Strict):
    """Consecutive training steps that are recorded; training goes on through them.

    Attributes:
        after: Steps of training before the first recorded one.
        steps: Recorded steps.
    """

    after: NonNegativeInt
    steps: PositiveInt


class BalancingWarmup(Strict):
    """Balancing that starts stronger than the model's own, so that no expert is lost while the router knows nothing.

    Attributes:
        aux_loss_times: The auxiliary loss in the first step, over the model's own.
        bias_rate_times: The rate of the expert bias in the first step, over the model's own.
        steps: After so many both are the model's own; until then they fall geometrically.
    """

    aux_loss_times: PositiveFloat
    bias_rate_times: PositiveFloat
    steps: PositiveInt

    def at(self, step: int) -> tuple[float, float]:
        """Auxiliary loss and bias rate over the model's own, in a training step counted from 0."""
        left = max(0.0, 1.0 - step / self.steps)
        return float(self.aux_loss_times**left), float(self.bias_rate_times**left)


class RecordConfig(TrainingConfig):
    """A recording run: train a model on gloo ranks, and keep what its routers choose at some stages of the training.

    Attributes:
        stages: By name what is recorded, in a trace for each.
        balancing_warmup: Of the first steps.
        logical_ranks: Ranks of the trace; each holds an equal, contiguous share of a step's tokens.
        num_recorded: Experts kept per token.
        layers: Layer numbers (from 1) to record; None for every MoE layer.
        output: Where the traces go; a stage's name is added to the stem.
        checkpoint_every: Steps between two checkpoints; a run that was ended goes on from its newest one.
        checkpoint_dir: Folder of all recordings' checkpoints, each in one of its own, which is removed at the end.
        model_output: Folder for a checkpoint of the trained model, for a training to go on from; None for none.
        timeout_minutes: A rank that waits longer than this for another one ends the run.
    """

    stages: dict[str, Stage] = Field(min_length=1)
    balancing_warmup: BalancingWarmup
    logical_ranks: PositiveInt
    num_recorded: PositiveInt
    layers: list[PositiveInt] | None
    output: str
    checkpoint_every: PositiveInt
    checkpoint_dir: str
    model_output: str | None
    timeout_minutes: PositiveFloat

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.model_output is not None and self.ep_size == 1:
            raise ValueError(
                "model_output needs ep_size=2 or more: where one rank has all experts, Megatron names the "
                "optimizer's state otherwise, and no training on more ranks can go on from it"
            )
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
        return self._check_stages()

    def _check_stages(self) -> Self:
        ordered = sorted(self.stages.items(), key=lambda item: item[1].after)
        for (name, stage), (later_name, later) in pairwise(ordered):
            if stage.after + stage.steps > later.after:
                raise ValueError(f"stages: {name} is not over when {later_name} begins, after {later.after} steps")
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step, over all ranks."""
        return self.sequences_per_step * self.seq_length

    @property
    def recorded_layers(self) -> list[int]:
        """Layer numbers that the trace holds, ascending."""
        return sorted(self.model.moe_layers if self.layers is None else set(self.layers))

    @property
    def last_step(self) -> int:
        """Steps of the whole run."""
        return max(stage.after + stage.steps for stage in self.stages.values())

    def stage_at(self, step: int) -> str | None:
        """Which stage records a training step, counted from 0."""
        for name, stage in self.stages.items():
            if stage.after <= step < stage.after + stage.steps:
                return name
        return None

    def path_of(self, stage: str) -> Path:
        """Where a stage's trace goes."""
        path = Path(self.output).expanduser()
        return path.with_name(f"{path.stem}_{stage}{path.suffix}")

    def training_key(self, corpus_key: str) -> str:
        """A name of the training, equal for those that take the same steps: for its checkpoints."""
        unimportant = {"stages", "output", "layers", "num_recorded", "logical_ranks", "cache_dir", "corpus"}
        unimportant |= {"checkpoint_every", "checkpoint_dir", "model_output", "timeout_minutes"}
        said = json.dumps(self.model_dump(mode="json", exclude=unimportant), sort_keys=True)
        return f"{self.model.name}-{hashlib.sha256(f'{said} {corpus_key}'.encode()).hexdigest()[:12]}"
