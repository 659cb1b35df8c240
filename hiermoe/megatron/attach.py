"""Turns a Megatron-Core model into one whose MoE layers use a given system, and back."""

import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import fused_a2a
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
    MoETokenDispatcher,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from hiermoe.dispatch.communicators import group_of
from hiermoe.dispatch.dispatcher import Dispatcher, dispatch_context
from hiermoe.dispatch.plan import DispatchContext
from hiermoe.megatron.adapter import StagedTokenDispatcher
from hiermoe.megatron.delegating import ReorderedTokenDispatcher
from hiermoe.megatron.expert_placement import ExpertPlacement
from hiermoe.megatron.layer_placement import LayerPlacement
from hiermoe.megatron.logical_names import name_experts_logically
from hiermoe.megatron.meter import Meter, MeteredDispatcher
from hiermoe.megatron.migration import expert_parameters
from hiermoe.megatron.pipeline_stage import is_stage, ranks_with_same_layers
from hiermoe.megatron.versions import builder_of, layer_number_of
from hiermoe.policies.protocol import PlacementPolicy, StaticPolicy
from hiermoe.policies.system import SystemConfig
from hiermoe.records.status import NotApplicable
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.placement import Placement
from hiermoe.topology.placement_files import read_placements

_FLEX_BACKENDS = {"deepep": "HAVE_DEEP_EP", "hybridep": "HAVE_HYBRIDEP"}  # flag in Megatron: whether it is installed
_BEFORE = "_before_attach"  # on a layer: its own dispatcher, and the placement that it has meanwhile


def attach(
    model: torch.nn.Module | list[torch.nn.Module],
    system: SystemConfig | str,
    cluster: Cluster | str,
    *,
    placements: str | Path | None = None,
    meter: Meter | None = None,
    timeout: timedelta | None = None,
) -> ExpertPlacement:
    """Give every MoE layer of a model the dispatcher of a system. Router and loss stay as they are.

    *Collective: every rank must call it*, after Megatron's process groups exist.

    Args:
        model: a Megatron-Core model with AlltoAll dispatchers, wrapped or not, or the list of its chunks.
        system: a system, or the name of one in conf/system/.
        cluster: hierarchy and constants of the cluster that the ranks run on, or the name of one in conf/cluster/.
        placements: file of expert placements (`placement.json` of `hiermoe advise`), to which the experts' weights move
            now; before the optimizer has any state. None: experts begin in their own slots.
        meter: times and counts what the dispatchers do.
        timeout: of a collective inside the system's own process groups; None for torch's default.

    Returns:
        Where the experts are. Its ``step`` belongs behind every optimizer step; a system that moves no experts does
        nothing there.

    Raises:
        ValueError: no MoE layer, a setting that is not supported, ranks that do not fit the hierarchy, placements that
            do not fit the model, or a system that cannot follow any.
        NotApplicable: the system needs what this machine lacks, or keeps experts in more than one place.
        RuntimeError: a system is attached already.
    """
    system = SystemConfig.named(system) if isinstance(system, str) else system
    cluster = Cluster.named(cluster) if isinstance(cluster, str) else cluster
    system.refuse_copies()
    layers = moe_layers(model)
    if any(hasattr(layer, _BEFORE) for layer in layers):
        raise RuntimeError("a system is attached already: call detach() first")
    for layer in layers:
        check_supported(layer.config)
    if not layers:
        return ExpertPlacement([])
    wanted = None if placements is None else _read(Path(placements), layers)
    context = dispatch_context(system, cluster, get_default_pg_collection().ep, timeout)
    moving = []
    for layer in layers:
        original, placement = layer.token_dispatcher, None
        assert original is not None
        dispatcher: Any = new_dispatcher(system, original, layer.config, get_default_pg_collection(), context)
        if isinstance(dispatcher, StagedTokenDispatcher):
            dispatcher.dispatcher.is_training = lambda layer=layer: layer.training
            if layer.shared_expert_overlap:
                dispatcher.set_shared_experts(layer.shared_experts)
            policy = system.build_policy()
            if wanted is not None or not isinstance(policy, StaticPolicy):
                placement = _place_experts(layer, dispatcher.dispatcher, policy, meter)
                moving.append(placement)
        elif wanted is not None:
            raise ValueError(f"system {system.name} leaves experts where stock Megatron has them: no placements=")
        if meter is not None:
            dispatcher = MeteredDispatcher(dispatcher, layer_number_of(layer), meter)
        layer.token_dispatcher = dispatcher
        setattr(layer, _BEFORE, (original, placement))
    background: Any = None
    if moving and system.migration == "background":
        ranks = torch.distributed.get_process_group_ranks(ranks_with_same_layers())
        background = group_of(tuple(ranks), timeout, "background")
    placed = ExpertPlacement(moving, background=background)
    placed.move_to(wanted or {}, None)
    return placed


def detach(model: torch.nn.Module | list[torch.nn.Module]) -> None:
    """Give every MoE layer the dispatcher back that it had before `attach`. Safe to call again.

    Raises:
        RuntimeError: experts have moved; `ExpertPlacement.go_home` comes first.
    """
    for layer in moe_layers(model):
        if hasattr(layer, _BEFORE):
            original, placement = getattr(layer, _BEFORE)
            if placement is not None:
                placement.release()
                vars(layer.experts).pop("sharded_state_dict")  # the class's own names experts by slot
            layer.token_dispatcher = original
            delattr(layer, _BEFORE)


def with_system(spec: Any, system: SystemConfig | str, cluster: Cluster | str, *, meter: Meter | None = None) -> Any:
    """A model spec whose MoE layers are built with a system: for models that are built from specs.

    Args:
        spec: spec of a layer, or the block spec of `get_gpt_decoder_block_spec`; left as it is.
        system: as for `attach`.
        cluster: as for `attach`.
        meter: as for `attach`.

    Returns:
        A copy of the spec.

    Raises:
        ValueError: the spec has no MoE layer.
    """
    spec = copy.deepcopy(spec)
    submodules = [layer.submodules for layer in getattr(spec, "layer_specs", [spec])]
    more = {"system": system, "cluster": cluster, "meter": meter}
    built = [builder_of(one.mlp, DispatchedMoELayer, **more) for one in submodules]
    if not any(built) and not is_stage():
        raise ValueError("the spec has no MoE layer")
    for one, builder in zip(submodules, built, strict=True):
        one.mlp = builder or one.mlp
    return spec


class DispatchedMoELayer(MoELayer):
    """Megatron's MoE layer with the dispatcher of a system."""

    def __init__(
        self, *stock: Any, system: SystemConfig | str, cluster: Cluster | str, meter: Meter | None = None, **more: Any
    ) -> None:
        """Build the stock layer, then attach."""
        super().__init__(*stock, **more)
        attach(self, system, cluster, meter=meter)


def moe_layers(model: torch.nn.Module | list[torch.nn.Module]) -> list[MoELayer]:
    """All MoE layers of a model, in order; a stage of a pipeline may have none.

    Raises:
        ValueError: there is none.
    """
    chunks = model if isinstance(model, list) else [model]
    layers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, MoELayer)]
    if not layers and not is_stage():
        raise ValueError("the model has no MoE layer")
    return layers


def check_supported(config: TransformerConfig) -> None:
    """Refuse what would give wrong results or has no test.

    Raises:
        ValueError: names the setting.
    """
    divided = getattr(config, "expert_tensor_parallel_size", None) or 1
    if divided > 1:
        raise ValueError(
            f"expert_tensor_parallel_size={divided} is not supported: experts must be whole "
            "(--expert-tensor-parallel-size 1); attention may be divided"
        )
    unsupported = {
        "moe_token_dispatcher_type": config.moe_token_dispatcher_type != "alltoall",
        "moe_expert_capacity_factor": config.moe_expert_capacity_factor is not None,
        "moe_pad_expert_input_to_capacity": config.moe_pad_expert_input_to_capacity,
        "moe_router_padding_for_quantization": getattr(config, "moe_router_padding_for_quantization", False),
        "cuda_graph_impl": getattr(config, "cuda_graph_impl", "none") != "none",
        "overlap_moe_expert_parallel_comm": getattr(config, "overlap_moe_expert_parallel_comm", False),
        "fp8_param": getattr(config, "fp8_param", False),
    }
    for name, refused in unsupported.items():
        if refused:
            raise ValueError(f"{name}={getattr(config, name)} is not supported by the dispatchers of this suite")


def new_dispatcher(
    system: SystemConfig,
    stock: MoETokenDispatcher,
    config: TransformerConfig,
    pg_collection: ProcessGroupCollection,
    context: DispatchContext,
) -> Any:
    """What executes a system in one layer.

    Args:
        system: the system.
        stock: the layer's own dispatcher, which some systems use or wrap.
        config: of the layer.
        pg_collection: of the layer.
        context: from `dispatch_context`.

    Raises:
        NotApplicable: the system needs what this machine lacks.
    """
    if system.executor == "staged":
        return StagedTokenDispatcher(config, pg_collection, context)
    assert isinstance(stock, MoEAlltoAllTokenDispatcher)
    if system.executor != "flex":
        return ReorderedTokenDispatcher(stock) if system.executor == "reordered" else stock
    # Its own kernels move the bytes, so none are counted.
    installed = [name for name, flag in _FLEX_BACKENDS.items() if getattr(fused_a2a, flag, False)]
    if not installed:
        known = " or ".join(_FLEX_BACKENDS)
        raise NotApplicable(f"Megatron's flex dispatcher needs a GPU and {known}; none is installed")
    config = copy.copy(config)
    config.moe_token_dispatcher_type = "flex"
    config.moe_flex_dispatcher_backend = installed[0]  # type: ignore[assignment]
    return MoEFlexTokenDispatcher(stock.num_local_experts, stock.local_expert_indices, config, pg_collection)


def _read(path: Path, layers: list[MoELayer]) -> dict[int, Placement]:
    """Placements of a file for every layer.

    Raises:
        ValueError: the file does not fit, or lacks a layer.
    """
    found = read_placements(path, layers[0].config.num_moe_experts or 0)
    missing = [number for number in map(layer_number_of, layers) if number not in found]
    if missing:
        raise ValueError(f"{path} has {len(found)} layers, the model has experts in layers {missing} too")
    return found


def _place_experts(
    layer: MoELayer, dispatcher: Dispatcher, policy: PlacementPolicy, meter: Meter | None
) -> LayerPlacement:
    assert isinstance(layer.experts, torch.nn.Module)
    parameters = expert_parameters(layer.experts)
    name_experts_logically(layer, dispatcher)
    size = sum(parameter.numel() for parameter in parameters[0])
    return LayerPlacement(layer_number_of(layer), dispatcher, policy, parameters, size, meter)
