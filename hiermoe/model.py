"""What a mixture-of-experts model is: the schema of conf/model/*.yaml. Pure: imports neither torch nor megatron."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from hiermoe.records.groups import read_named
from hiermoe.records.project import shown
from hiermoe.records.strict import Strict, checked

T = TypeVar("T")
Format = Literal["bf16", "fp8_with_scales"]
VALUE_BYTES: dict[Format, int] = {"bf16": 2, "fp8_with_scales": 1}
SCALE_BYTES, SCALED_VALUES = 4, 128  # FP8 rows: an fp32 scale for so many values (DeepEP; DeepSeek-V3, Sec. 3.3.2)


class RouterConfig(Strict):
    """How a router turns scores into the experts of a token, and how its load is balanced in training.

    Attributes:
        score_function: `softmax` (of the chosen logits, hence normalised) or `sigmoid` (normalised after the choice).
        num_groups: Experts are split into this many groups of equal size; None for no group limit.
        group_topk: A token may use only its best `group_topk` groups.
        scaling_factor: Factor on the chosen probabilities; None for 1.
        expert_bias: Whether a bias per expert, moved by its load and not by gradients, is added for the choice.
        bias_update_rate: Step of that bias; only with `expert_bias`.
        aux_loss_type: Which of Megatron's auxiliary balancing losses is used.
        aux_loss_coeff: Its coefficient; 0 with `aux_loss_type=none`.
    """

    score_function: Literal["softmax", "sigmoid"]
    num_groups: PositiveInt | None = None
    group_topk: PositiveInt | None = None
    scaling_factor: PositiveFloat | None = None
    expert_bias: bool = False
    bias_update_rate: PositiveFloat | None = None
    aux_loss_type: Literal["none", "aux_loss", "seq_aux_loss", "global_aux_loss"] = "none"
    aux_loss_coeff: float = Field(default=0.0, ge=0.0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.num_groups is None) != (self.group_topk is None):
            raise ValueError(
                f"num_groups={self.num_groups} and group_topk={self.group_topk} must be given together or not at all"
            )
        if self.num_groups is not None and self.group_topk is not None and self.group_topk > self.num_groups:
            raise ValueError(f"group_topk={self.group_topk} exceeds num_groups={self.num_groups}")
        if self.expert_bias and self.score_function != "sigmoid":
            raise ValueError(f"expert_bias=True needs score_function=sigmoid, not {self.score_function}")
        if self.expert_bias != (self.bias_update_rate is not None):
            raise ValueError(f"bias_update_rate={self.bias_update_rate} does not fit expert_bias={self.expert_bias}")
        if (self.aux_loss_type == "none") != (self.aux_loss_coeff == 0.0):
            raise ValueError(f"aux_loss_coeff={self.aux_loss_coeff} does not fit aux_loss_type={self.aux_loss_type}")
        return self

    def describe(self) -> str:
        """The router in one line, as traces state it."""
        parts = [self.score_function]
        if self.num_groups is not None:
            parts.append(f"best {self.group_topk} of {self.num_groups} groups")
        if self.expert_bias:
            parts.append(f"expert bias (rate {self.bias_update_rate:g})")
        if self.aux_loss_type != "none":
            parts.append(f"{self.aux_loss_type} {self.aux_loss_coeff:g}")
        if self.scaling_factor is not None:
            parts.append(f"scale {self.scaling_factor:g}")
        return ", ".join(parts)


class GroupedQueryAttention(Strict):
    """Grouped-query attention; `qk_norm` normalises queries and keys per head, as Qwen3 does."""

    kind: Literal["gqa"]
    num_heads: PositiveInt
    num_query_groups: PositiveInt
    head_dim: PositiveInt
    qk_norm: bool

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.num_query_groups:
            raise ValueError(f"num_heads={self.num_heads} is not divisible by num_query_groups={self.num_query_groups}")
        return self

    def parameters(self, hidden_size: int) -> int:
        """Weights of one layer: of queries and the output, of keys and values."""
        return 2 * hidden_size * (self.num_heads + self.num_query_groups) * self.head_dim


class LatentAttention(Strict):
    """Multi-head latent attention (MLA) of DeepSeek; `qk_norm` normalises what is compressed.

    Queries are not where `q_lora_rank` is null (DeepSeek-V2-Lite).
    """

    kind: Literal["mla"]
    num_heads: PositiveInt
    q_lora_rank: PositiveInt | None
    kv_lora_rank: PositiveInt
    qk_head_dim: PositiveInt
    qk_pos_emb_head_dim: PositiveInt
    v_head_dim: PositiveInt
    qk_norm: bool

    def parameters(self, hidden_size: int) -> int:
        """Weights of one layer: of queries, of what keys and values are compressed to and made of, of the output."""
        query_dim = self.num_heads * (self.qk_head_dim + self.qk_pos_emb_head_dim)
        rank = self.q_lora_rank
        queries = hidden_size * query_dim if rank is None else rank * (hidden_size + query_dim)
        compressed = hidden_size * (self.kv_lora_rank + self.qk_pos_emb_head_dim)
        made = self.kv_lora_rank * self.num_heads * (self.qk_head_dim + self.v_head_dim)
        return queries + compressed + made + hidden_size * self.num_heads * self.v_head_dim


@dataclass(frozen=True)
class RowBytes:
    """Bytes of a row in each of the four AlltoAlls of a step. The paper's are all M * v.

    Attributes:
        dispatch: tokens, to their experts.
        combine: results, back.
        combine_backward: gradients of results, to the experts.
        dispatch_backward: gradients of tokens, back.
    """

    dispatch: float
    combine: float
    combine_backward: float
    dispatch_backward: float

    @classmethod
    def alike(cls, row_bytes: float) -> "RowBytes":
        """The same in all four."""
        return cls(row_bytes, row_bytes, row_bytes, row_bytes)

    @property
    def by_call(self) -> Mapping[str, float]:
        """By name of the AlltoAll, in their order in a step."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def mean(self) -> float:
        """Over the four; the very number where they are alike."""
        return self.averaged(lambda row_bytes: row_bytes)

    def averaged(self, of: Callable[[float], T]) -> T:
        """Mean over the four AlltoAlls of what rows of that size take: numbers, tensors or arrays."""
        sizes = Counter(self.by_call.values())
        if len(sizes) == 1:
            return of(self.dispatch)
        return sum(count * of(row_bytes) for row_bytes, count in sizes.items()) / sizes.total()  # type: ignore[operator]

    def times(self, factor: float) -> "RowBytes":
        """Every row by a factor."""
        return RowBytes(*(factor * row_bytes for row_bytes in self.by_call.values()))

    def shared(self, parts: int) -> "RowBytes":
        """A part of every row, in whole bytes, at least one."""
        return RowBytes(*(max(row_bytes // parts, 1) for row_bytes in self.by_call.values()))


class WireConfig(Strict):
    """How the rows of each AlltoAll of a step are sent, by what moves the tokens.

    Attributes:
        dispatch: Format of tokens on their way to experts, `bf16` or `fp8_with_scales` (a byte for each value and an
            fp32 scale for every 128 of them); None: elements as the model has them.
        combine: Of results on their way back.
        combine_backward: Of their gradients, which go to the experts.
        dispatch_backward: Of tokens' gradients, which come back.
        choice_bytes: Bytes beside them, in a dispatched row, for each of a token's K choices: expert and weight.
    """

    dispatch: Format | None = None
    combine: Format | None = None
    combine_backward: Format | None = None
    dispatch_backward: Format | None = None
    choice_bytes: NonNegativeInt = 0

    def row_bytes(self, hidden_size: int, element_bytes: int, topk: int) -> RowBytes:
        """Of a model's rows.

        Args:
            hidden_size: M.
            element_bytes: v, where no format is stated.
            topk: K.
        """

        def sent(form: Format | None) -> int:
            scales = -(-hidden_size // SCALED_VALUES) * SCALE_BYTES if form == "fp8_with_scales" else 0
            return hidden_size * (element_bytes if form is None else VALUE_BYTES[form]) + scales

        return RowBytes(
            dispatch=sent(self.dispatch) + topk * self.choice_bytes,
            combine=sent(self.combine),
            combine_backward=sent(self.combine_backward),
            dispatch_backward=sent(self.dispatch_backward),
        )


AS_THE_MODEL = WireConfig()
"""Elements as the model has them, in all four AlltoAlls, and nothing beside them: the paper's rows."""


@dataclass(frozen=True)
class LayerSizes:
    """One layer of experts, as whoever moves its tokens and experts sees it.

    Attributes:
        num_experts: E.
        topk: K.
        hidden_size: M.
        element_bytes: v, of one activation element.
        expert_parameters: of one expert.
        num_layers: layers with experts; None where that is not known.
        wire: how rows are sent.
    """

    num_experts: int
    topk: int
    hidden_size: int
    element_bytes: int
    expert_parameters: int
    num_layers: int | None = None
    wire: WireConfig = AS_THE_MODEL

    @property
    def row_bytes(self) -> int:
        """M * v: of a row in memory."""
        return self.hidden_size * self.element_bytes

    @property
    def sent(self) -> RowBytes:
        """Of a row in each AlltoAll of a step."""
        return self.wire.row_bytes(self.hidden_size, self.element_bytes, self.topk)


class ModelConfig(Strict):
    """A mixture-of-experts transformer.

    Simulation and advice need E, K, and the widths of a token and of an expert; what only a training needs may be left
    out, and so may what has a default.

    Attributes:
        name: Name of the model; also the stem of its file in conf/model/.
        label: In figures and tables; the name where it is left out.
        entrant: Whether it joins every sweep that compares models.
        trace: Stem of the file in results/traces/ that holds routing for this model; the name where it is left out.
        num_layers: Decoder layers, of which the first `num_dense_layers` have no experts.
        num_dense_layers: Decoder layers without experts, the first ones.
        hidden_size: Width of a token, the paper's M.
        ffn_hidden_size: Inner width of the dense layers.
        moe_ffn_hidden_size: Inner width of one expert.
        num_experts: Experts of a layer, the paper's E.
        topk: Experts of a token, the paper's K.
        num_shared_experts: Experts that every token uses, beside the routed ones.
        element_bytes: Bytes of one activation element, the paper's v.
        vocab_size: Tokens that there are.
        source: Where the numbers come from.
    """

    name: str
    label: str = ""
    entrant: bool = False
    trace: str = ""
    num_layers: PositiveInt = None  # type: ignore[assignment] - as the others, asked for where it is trained
    num_dense_layers: NonNegativeInt = 0
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt = None  # type: ignore[assignment]
    moe_ffn_hidden_size: PositiveInt
    num_experts: PositiveInt
    topk: PositiveInt
    num_shared_experts: NonNegativeInt = 0
    element_bytes: PositiveInt = 2
    vocab_size: PositiveInt = None  # type: ignore[assignment]
    router: RouterConfig = RouterConfig(score_function="softmax")
    attention: Annotated[GroupedQueryAttention | LatentAttention, Field(discriminator="kind")] | None = None
    source: str = "as stated"

    @model_validator(mode="before")
    @classmethod
    def _called_by_its_name(cls, values: Any) -> Any:
        name = values.get("name") if isinstance(values, dict) else None
        return values if name is None else {"label": name, "trace": name, **values}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.topk > self.num_experts:
            raise ValueError(f"topk={self.topk} exceeds num_experts={self.num_experts}")
        if self.num_layers is not None and self.num_dense_layers >= self.num_layers:
            raise ValueError(
                f"num_dense_layers={self.num_dense_layers} leaves no MoE layer of num_layers={self.num_layers}"
            )
        num_groups, group_topk = self.router.num_groups, self.router.group_topk
        if num_groups is None or group_topk is None:
            return self
        if self.num_experts % num_groups:
            raise ValueError(f"num_experts={self.num_experts} is not divisible by num_groups={num_groups}")
        if self.topk > self.usable_experts:
            raise ValueError(
                f"topk={self.topk} exceeds the {self.usable_experts} experts of group_topk={group_topk} groups"
            )
        if not 1 <= self.topk // group_topk <= self.num_experts // num_groups:
            raise ValueError(
                f"topk={self.topk} // group_topk={group_topk}, the experts that score a group, "
                f"is not between 1 and the group size {self.num_experts // num_groups}"
            )
        return self

    @property
    def lacking(self) -> list[str]:
        """What a training needs, and this model does not say."""
        return [
            key for key in ("num_layers", "ffn_hidden_size", "vocab_size", "attention") if getattr(self, key) is None
        ]

    @property
    def expert_parameters(self) -> int:
        """Weights of one routed expert: gate, up and down projection."""
        return 3 * self.hidden_size * self.moe_ffn_hidden_size

    @property
    def dense_parameters(self) -> int:
        """Weights that a token meets beside its routed experts, all layers and the output: for each layer with experts.

        Only where nothing is :attr:`lacking`.
        """
        assert self.attention is not None
        attention = self.attention.parameters(self.hidden_size) * self.num_layers
        dense = 3 * self.hidden_size * self.ffn_hidden_size * self.num_dense_layers
        beside = (
            self.num_shared_experts * self.expert_parameters + self.num_experts * self.hidden_size
        )  # and the router
        total = attention + dense + beside * self.num_moe_layers + self.hidden_size * self.vocab_size
        return total // self.num_moe_layers

    @property
    def usable_experts(self) -> int:
        """Experts that one token can reach under the router's group limit."""
        if self.router.num_groups is None or self.router.group_topk is None:
            return self.num_experts
        return self.num_experts // self.router.num_groups * self.router.group_topk

    def sizes(self, narrowed: int = 1, wire: WireConfig = AS_THE_MODEL) -> LayerSizes:
        """Of one layer, rows of tokens and experts smaller by a factor, and sent in some way."""
        return LayerSizes(
            num_experts=self.num_experts,
            topk=self.topk,
            hidden_size=self.hidden_size // narrowed,
            element_bytes=self.element_bytes,
            expert_parameters=self.expert_parameters // narrowed,
            num_layers=None if self.num_layers is None else self.num_moe_layers,
            wire=wire,
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's hidden state, the paper's M * v."""
        return self.hidden_size * self.element_bytes

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts."""
        return self.num_layers - self.num_dense_layers

    @property
    def moe_layers(self) -> list[int]:
        """Numbers of the layers with experts, counted from 1 as Megatron does."""
        return list(range(self.num_dense_layers + 1, self.num_layers + 1))

    @classmethod
    def named(cls, name: str) -> Self:
        """The model of conf/model/<name>.yaml.

        Raises:
            ValueError: there is none, or a value breaks a rule.
        """
        return read_named("model", name, cls)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read and validate one file of conf/model/.

        Raises:
            ValueError: The file does not hold one mapping, or a value breaks a rule.
        """
        return checked(yaml.safe_load(Path(path).read_text(encoding="utf-8")), cls, shown(Path(path)))
