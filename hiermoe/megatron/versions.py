"""Where Megatron-Core's versions 0.16 to 0.19 differ in what this suite touches, and nowhere else."""

import copy
from functools import partial
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer


def class_of(mlp: Any) -> Any:
    """The class that an MLP's builder in a spec builds: a ``ModuleSpec``'s, later a ``functools.partial``'s."""
    return mlp.func if isinstance(mlp, partial) else mlp.module


def builder_of(mlp: Any, layer: type[MoELayer], **more: Any) -> Any:
    """What builds an MLP in a spec, changed so that an MoE layer is one of a class derived from Megatron's.

    Args:
        mlp: what builds it; left as it is.
        layer: the class.
        **more: further arguments of its ``__init__``.

    Returns:
        What builds it now; None where it builds no MoE layer.
    """
    if class_of(mlp) is not MoELayer:
        return None
    if isinstance(mlp, partial):
        return partial(layer, *mlp.args, **mlp.keywords, **more)
    changed = copy.copy(mlp)
    changed.module, changed.params = layer, {**(mlp.params or {}), **more}
    return changed


def layer_number_of(layer: MoELayer) -> int:
    """A layer's number in the whole model, from 1; layers of multi-token prediction come after the decoder's.

    So 0.16 counts; in 0.19 those of multi-token prediction begin at 1 again.
    """
    number = layer.layer_number or 0
    before = layer.config.num_layers if getattr(layer, "is_mtp_layer", False) else 0
    return number if number > before else number + before
