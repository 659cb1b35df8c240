"""Whether a rank has all of a model's layers, or those of a stage of a pipeline."""

from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state


def is_stage() -> bool:
    """Whether other ranks have other layers, so that this one may have none with experts."""
    initialised = parallel_state.model_parallel_is_initialized()
    return initialised and parallel_state.get_pipeline_model_parallel_world_size() > 1


def ranks_with_same_layers() -> dist.ProcessGroup:
    """All ranks that have some of this rank's layers, or parts of them, whatever else they divide."""
    group: Any = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    return group
