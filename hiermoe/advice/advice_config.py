"""What `hiermoe advise` may be asked: the schema of conf/advise.yaml."""

from typing import Any, Self

from pydantic import Field, model_validator

from hiermoe.model import AS_THE_MODEL, ModelConfig, WireConfig
from hiermoe.records.groups import files_of
from hiermoe.records.strict import Strict
from hiermoe.routing.routing_config import RoutingConfig
from hiermoe.topology.cluster import Cluster

SOURCES = ("trace", "loads", "routing")


class ComputeConfig(Strict):
    """What a GPU computes with; the entries are explained in conf/advise.yaml."""

    tflops: float | None = Field(default=None, gt=0)
    mfu: float | None = Field(default=None, gt=0, le=1)
    expert_mfu: float | None = Field(default=None, gt=0, le=1)
    dense_parameters: int | None = Field(default=None, ge=0)
    hidden: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _all_or_nothing(self) -> Self:
        if (self.tflops is None) != (self.mfu is None):
            raise ValueError(f"tflops={self.tflops} and mfu={self.mfu} must be given together")
        if self.tflops is None and self != ComputeConfig.model_construct():
            raise ValueError("tflops=... is missing: the other entries of compute= mean nothing without it")
        return self


class AdviceConfig(Strict):
    """One question; the entries are explained in conf/advise.yaml."""

    model: ModelConfig | None = None
    cluster: Cluster
    routing: RoutingConfig | None = None
    trace: str | tuple[str, ...] | None = None
    judged_on: str | tuple[str, ...] | None = None
    loads: str | None = None
    layer: int | None = Field(default=None, ge=0)
    topk: int | None = Field(default=None, ge=1)
    num_experts: int | None = Field(default=None, ge=1)
    hidden_size: int | None = Field(default=None, ge=1)
    moe_ffn_hidden_size: int | None = Field(default=None, ge=1)
    element_bytes: int | None = Field(default=None, ge=1)
    wire: WireConfig = AS_THE_MODEL
    tokens_per_rank: int = Field(ge=1)
    ep_size: int | None = Field(default=None, ge=1)
    across: bool = False
    iterations: int | None = Field(default=None, ge=2)
    share: float | None = Field(default=None, gt=0, lt=1)
    compute: ComputeConfig = ComputeConfig()
    systems: tuple[str, ...] | None = None
    copies: bool = False
    seed: int = Field(ge=0)
    output: str | None = None
    picture: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _cluster_is_given(cls, values: Any) -> Any:
        if values.get("across") and values.get("ep_size") is None:
            raise ValueError("across=true says how a group of ep_size= GPUs lies in the cluster; state that")
        if values.get("cluster") is None:
            raise ValueError(f"cluster=... is missing; choose from {', '.join(files_of('cluster'))}")
        return values

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            found = "none of them" if not given else " and ".join(f"{name}=" for name in given)
            raise ValueError(f"routing comes from one of trace=, loads= and routing=; given: {found}")
        if self.share is not None and self.compute.tflops is not None:
            raise ValueError("share= is what a profile found of AlltoAlls in your step, compute= predicts it: give one")
        if self.judged_on is not None and self.trace is None:
            raise ValueError("judged_on= is a trace that placements of another are judged on; that is trace=")
        return self
