"""The configuration of a run: its schema, and what is built from it."""

import json
from functools import lru_cache
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from hiermoe.measure.replay import first_replayed
from hiermoe.measure.workload import CachedRouting, Workload
from hiermoe.model import ModelConfig
from hiermoe.policies.system import SystemConfig, build
from hiermoe.records.run_id import run_id
from hiermoe.records.status import NotApplicable
from hiermoe.records.strict import Strict
from hiermoe.routing.resampled import Resampled
from hiermoe.routing.step import RoutingRequest, experts_per_rank
from hiermoe.routing.trace import RecordedRouting, recorded_path
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.scaling import scaled


class RoutingConfig(Strict):
    """Where routing comes from: one file in conf/routing/."""

    name: str
    source: dict[str, Any]


class BackendConfig(Strict):
    """Where the run happens: one file in conf/backend/."""

    name: Literal["simulated", "bounds", "synthetic_timings", "planning", "local", "emulated", "torchrun"]
    timeout_s: float | None = Field(default=None, gt=0)  # of a collective, where there are ranks
    device: Literal["cpu", "cuda"] = "cpu"  # of the tensors that ranks exchange: over gloo, or over NCCL

    @model_validator(mode="before")
    @classmethod
    def _is_no_submission(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name") == "slurm":
            raise ValueError(
                "backend=slurm submits a whole reproduction: hiermoe reproduce --backend slurm --nodes ..."
            )
        return values

    @property
    def starts_ranks(self) -> bool:
        """Whether real processes exchange real bytes."""
        return self.name in ("local", "emulated", "torchrun")

    @property
    def on_this_host(self) -> bool:
        """Whether numbers are those of this machine, and not those of a cluster that this process has a part of."""
        return self.name != "torchrun"

    @property
    def modules(self) -> tuple[str, ...]:
        """Where the code begins that makes the numbers."""
        if self.starts_ranks:
            return ("hiermoe.measure.replay", "hiermoe.ranks.worlds", "hiermoe.ranks.crew")
        module = {"simulated": "predict", "bounds": "bound", "planning": "plan_cost", "synthetic_timings": "self_test"}
        return (f"hiermoe.measure.{module[self.name]}",)

    @property
    def source(self) -> str:
        """What a record says of its numbers."""
        if self.name == "planning":
            return "local"
        if not self.starts_ranks:
            return "simulated"
        return self.name if self.on_this_host else "cluster"


WandbMode = Literal["offline", "online", "disabled"]


class WandbConfig(Strict):
    """Weights & Biases mirrors records; nothing reads it."""

    mode: WandbMode
    project: str


class RunConfig(Strict):
    """One run."""

    system: SystemConfig
    model: ModelConfig
    cluster: Cluster
    routing: RoutingConfig
    backend: BackendConfig
    world_size: int | None = Field(default=None, ge=1)
    max_ep_size: int | None = Field(default=None, ge=1)
    iterations: int = Field(ge=2)
    tokens_per_rank: int = Field(ge=1)
    narrowed: int = Field(default=1, ge=1)
    seed: int = Field(ge=0)
    wandb: WandbConfig

    @model_validator(mode="before")
    @classmethod
    def _cut_cluster(cls, values: Any) -> Any:
        """The cluster of as many GPUs as exchange with each other.

        Where ranks are started, ``world_size`` may ask for fewer than the cluster has GPUs. Simulated, it asks for a
        cluster of that size, of which an expert-parallel group takes ``max_ep_size`` GPUs, or fewer where there are
        fewer GPUs or experts.
        """
        world_size, largest = (None if values.get(k) is None else int(values[k]) for k in ("world_size", "max_ep_size"))
        if world_size is None and largest is None:
            return values
        cluster = Cluster.model_validate(values["cluster"])
        if BackendConfig.model_validate(values["backend"]).starts_ranks:
            if world_size is None or largest is not None:
                raise ValueError(f"max_ep_size={largest} is for simulation: ranks that are started are one group")
            return {**values, "cluster": cluster.reduced(world_size)}
        world_size = world_size or cluster.hierarchy.num_ranks
        ep_size = world_size
        if largest is not None:
            ep_size = min(world_size, largest, ModelConfig.model_validate(values["model"]).num_experts)
        if world_size % ep_size:
            raise ValueError(f"world_size={world_size} is not divisible into groups of ep_size={ep_size}")
        return {**values, "world_size": world_size, "cluster": scaled(cluster, ep_size)}

    @model_validator(mode="after")
    def _check_narrowed(self) -> Self:
        if self.model.hidden_size % self.narrowed:
            raise ValueError(f"narrowed={self.narrowed} does not divide hidden_size={self.model.hidden_size}")
        return self

    @property
    def replicas(self) -> int:
        """Expert-parallel groups of the simulated world, each with a replica of all experts."""
        return 1 if self.world_size is None else self.world_size // self.cluster.hierarchy.num_ranks

    @property
    def row_bytes(self) -> int:
        """M * v, after what the run narrows it to."""
        return self.model.token_bytes // self.narrowed

    @property
    def request(self) -> RoutingRequest:
        """What the run asks of its routing."""
        return RoutingRequest(
            trace=self.model.trace,
            num_experts=self.model.num_experts,
            topk=self.model.topk,
            num_ranks=self.cluster.hierarchy.num_ranks,
            tokens_per_rank=self.tokens_per_rank,
            seed=self.seed,
            num_groups=self.model.router.num_groups,
            group_topk=self.model.router.group_topk,
        )

    @property
    def num_steps(self) -> int:
        """Iterations that the backend goes through one by one; 0 where the run cannot even start."""
        if not self.backend.starts_ranks:
            return self.iterations
        try:
            return self.iterations - first_replayed(self.iterations, self.workload().routing.num_distinct)
        except ValueError:
            return 0

    @property
    def content(self) -> dict[str, Any]:
        """Everything that may change a number, as JSON-ready values."""
        return self.model_dump(mode="json", exclude={"wandb"})

    @property
    def run_id(self) -> str:
        """The name of the run, by its content."""
        path = self.routing.source.get("path")
        inputs = () if path is None else (recorded_path(path, self.request),)
        backend = self.backend
        here = backend.source != "simulated" and backend.on_this_host
        return run_id(self.content, backend.modules, inputs, on_this_host=here)

    def workload(self) -> Workload:
        """Everything that a backend needs.

        Raises:
            NotApplicable: the combination has no meaning or no data.
            ValueError: sizes that do not fit.
        """
        experts_per_rank(self.model.num_experts, self.cluster.hierarchy.num_ranks)
        schemes = self.system.build_schemes(self.cluster.hierarchy)
        routing, layer = _open_routing(json.dumps(self.routing.source), self.request, self.replicas)
        self.system.build_policy()  # bad arguments end the run here, not in its middle
        return Workload(
            system=self.system,
            schemes=schemes,
            new_policy=self.system.build_policy,
            cluster=self.cluster,
            routing=routing,
            layer=layer,
            num_experts=self.model.num_experts,
            topk=self.model.topk,
            row_bytes=self.row_bytes,
            element_bytes=self.model.element_bytes,
            expert_parameters=self.model.expert_parameters // self.narrowed,
            iterations=self.iterations,
        )


@lru_cache(maxsize=2)  # runs come grouped by routing; two keep a model's E and K neighbours without filling memory
def _open_routing(source: str, request: RoutingRequest, replicas: int) -> tuple[CachedRouting, int]:
    """The routing source and the model layer that it stands for (0 for synthetic routing)."""
    opened = build(json.loads(source), request=request)
    layer = opened.trace.metadata.layers[opened.layer] if isinstance(opened, RecordedRouting | Resampled) else 0
    routing = CachedRouting(opened, replicas)
    if routing.num_distinct is not None and routing.num_distinct < 2:
        raise NotApplicable(
            f"the trace lasts for {routing.num_distinct} iterations of {replicas} groups of {request.num_ranks} ranks "
            f"with {request.tokens_per_rank} tokens each; a run takes at least 2 (routing=resampled has no end)"
        )
    return routing, layer
