"""A trace of a training run of one's own: every rank writes what its routers chose into a file of its own.

No rank waits for another one and nothing is gathered, so it fits a run of any size. The files have the form of
Megatron-LM's router trace; `hiermoe trace import megatron <folder>` makes one trace of them.

What it costs, on one CPU core at E = 128 and K = 8, for every layer and 4096 tokens of a rank: 9 ms in the forward, to
rank the experts and check them against the router's choice (on a GPU: a few small kernels, and a wait for them), 5 ms
after the step, to write 140 kB.
"""

import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from hiermoe.megatron.pipeline_stage import is_stage
from hiermoe.megatron.recorder import RouterRecorder, find_routers

_LINE_BYTES = 180  # of a line, without its experts
_STEP = re.compile(r'\{"step": (\d+),')


class RankTrace:
    """Records training steps until enough are there, then leaves the model as it was.

    Example:
        >>> trace = RankTrace(model, "/scratch/trace", steps=128)  # on every rank, after the model is built
        >>> while training:
        ...     train_step()
        ...     trace.step()                                       # free once it has what it wants
        >>> trace.close()

    Attributes:
        path: This rank's file; None on ranks that route the same tokens as another one, or that have none of the
            layers, as a pipeline stage may.
        steps: Steps to record, fewer than asked for where they would not fit `max_bytes`.
    """

    def __init__(
        self,
        model: torch.nn.Module | list[torch.nn.Module],
        folder: str | Path,
        steps: int = 128,
        *,
        layers: list[int] | None = None,
        first_step: int = 0,
        max_bytes: int = 2**30,
    ) -> None:
        """Attach to the routers of `model`. Megatron's process groups must be there.

        Args:
            model: A Megatron model, wrapped or not, or the list of its pipeline chunks on this rank.
            folder: Where the files go, one a rank; each may be on a disk of its own and be copied together later.
            steps: Training steps to record.
            layers: Layer numbers (counted from 1, in the whole model) to record; None for every MoE layer.
            first_step: Number of the first step, for the trace's metadata. A run that resumes at it into the same
                folder keeps what is there of the steps before, and records anew what a killed run had got further.
            max_bytes: Size of this rank's file, at most.

        Raises:
            ValueError: No router, one that `RouterRecorder` does not know, or a size below 1.
        """
        if steps < 1 or max_bytes < 1:
            raise ValueError(f"steps={steps} and max_bytes={max_bytes} must be at least 1")
        self.steps = steps
        self._first, self._done, self._max_bytes = first_step, 0, max_bytes
        self.path, self._recorder, self._kept = None, None, 0
        routers = find_routers(model, may_lack=is_stage())
        config: Any = (model[0] if isinstance(model, list) else model).config
        in_model, here = _moe_layers(config), layers
        if is_stage():
            if missing := sorted(set(layers or []) - in_model):  # said on every stage: one alone would be waited for
                raise ValueError(f"layers={missing} have no router; MoE layers are {sorted(in_model)}")
            here = [layer for layer in routers if layers is None or layer in layers]
            if not here:
                return  # other stages have them
        router = next(iter(routers.values()))
        self._topk, self._expert_bytes = router.topk, len(str(router.weight.shape[0] - 1)) + 2
        self._num_layers = len(layers) if layers else len(in_model)
        self._rank, alone = _data_rank(bool(router.config.sequence_parallel))
        self._recorder = RouterRecorder(model, self._topk, here)
        if alone:
            self.path = Path(folder) / f"router_trace_rank{dist.get_rank()}.jsonl"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._kept = _keep_before(first_step, self.path)

    def step(self) -> None:
        """Write what the routers chose since the last call. Call it after every training step.

        Raises:
            ValueError: Not even one step fits `max_bytes`.
        """
        if self._done == self.steps or self._recorder is None:
            return
        forwards = [
            (layer, ids_SBK.transpose(0, 1).flatten(0, 1))  # sequence after sequence
            for layer, of_layer in self._recorder.drain().items()
            for ids_SBK in of_layer
        ]
        if self._done == 0:
            # From sizes alone, as if this rank had all layers, which are the same on all: all stop after the same step.
            share = self._num_layers / len(self._recorder.layers)
            tokens, lines = (share * n for n in (sum(len(ids_TK) for _, ids_TK in forwards), len(forwards)))
            self._fit(math.ceil(tokens * (self._topk * self._expert_bytes + 2) + lines * _LINE_BYTES))
        if self._done < self.steps and self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                for layer, ids_TK in forwards:
                    file.write(self._line(layer, ids_TK))
        self._done = min(self._done + 1, self.steps)
        if self._done == self.steps:
            self.close()

    def close(self) -> None:
        """Give the routers their own methods back. Safe to call again."""
        if self._recorder is not None:
            self._recorder.detach()
        self._done = self.steps

    def _fit(self, step_bytes: int) -> None:
        """Record fewer steps where all of them would not fit, and say so."""
        fitting = self._max_bytes // max(step_bytes, 1) - self._kept
        if fitting <= 0:
            self.close()
            beside = f" beside {self._kept} that are there" if self._kept else ""
            takes = f"which takes up to {step_bytes} bytes"
            raise ValueError(f"max_bytes={self._max_bytes} does not hold a step{beside}, {takes}")
        if fitting < self.steps and dist.get_rank() == 0:
            warnings.warn(f"max_bytes={self._max_bytes} holds {fitting} of {self.steps} steps", stacklevel=3)
        self.steps = min(self.steps, fitting)

    def _line(self, layer: int, ids_TK: torch.Tensor) -> str:
        step, experts = self._first + self._done, str(ids_TK.tolist())  # as json.dumps would, several times faster
        return (
            f'{{"step": {step}, "block": "decoder", "numbering": "model", "layer": {layer}, "rank": {self._rank}, '
            f'"num_tokens": {len(ids_TK)}, "topk": {self._topk}, "top_indices": {experts}}}\n'
        )


def _keep_before(first_step: int, path: Path) -> int:
    """Leave of a file only whole lines of the steps before one.

    Returns:
        Number of steps that stay.
    """
    steps: set[int] = set()
    partial = path.with_name(f".{path.name}")
    with partial.open("w", encoding="utf-8") as kept:
        if path.exists():
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    match = _STEP.match(line)
                    if match is not None and int(match[1]) < first_step and line.endswith("}\n"):
                        steps.add(int(match[1]))
                        kept.write(line)
    partial.replace(path)
    return len(steps)


def _moe_layers(config: TransformerConfig) -> set[int]:
    """Numbers of those of the whole model, as Megatron reads ``moe_layer_freq``."""
    freq = config.moe_layer_freq
    return {
        index + 1 for index in range(config.num_layers) if (index % freq == 0 if isinstance(freq, int) else freq[index])
    }


def _data_rank(sequence_parallel: bool) -> tuple[int, bool]:
    """Place of this rank's tokens among all tokens, and whether it is the one to record them.

    Pipeline stages of one place share it, each with layers of its own. Tensor-parallel ranks have tokens of their own
    only with sequence parallelism.
    """
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    place = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    if sequence_parallel:
        return place * parallel_state.get_tensor_model_parallel_world_size() + tensor_rank, True
    return place, tensor_rank == 0
