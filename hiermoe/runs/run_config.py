"""The configuration of a run: its schema."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from hiermoe.measure.measurement import Measurement
from hiermoe.measure.registry import MEASUREMENTS
from hiermoe.model import AS_THE_MODEL, LayerSizes, ModelConfig, WireConfig
from hiermoe.policies.system import SystemConfig
from hiermoe.ranks.memory import RANKS_PER_CORE, bytes_of_rank, cores, ranks_that_fit
from hiermoe.ranks.places import PLACES, RanksConfig
from hiermoe.ranks.server import preload
from hiermoe.records.choices import unknown
from hiermoe.records.free_memory import total_bytes
from hiermoe.records.strict import Strict, checked, is_valid
from hiermoe.routing.routing_config import RoutingConfig
from hiermoe.routing.step import RoutingRequest
from hiermoe.routing.trace import recorded_path
from hiermoe.runs.measurable import keys_of, name_run
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.scaling import laid_out

preload(__name__)  # ranks are told what to do in its terms, and with it come pandas, SciPy and Arrow

WandbMode = Literal["offline", "online", "disabled"]


class WandbConfig(Strict):
    """Weights & Biases mirrors records; nothing reads it."""

    mode: WandbMode
    project: str


def _sizes_that_work(cluster: Cluster, world_size: int, ep_size: int, across: bool) -> str:
    """Group sizes near a size, smaller and larger, that divide the world and lie in the cluster."""

    def works(size: int) -> bool:
        try:
            return world_size % size == 0 and laid_out(cluster, size, across).hierarchy.num_ranks == size
        except ValueError:
            return False

    smaller = next((n for n in range(ep_size - 1, 0, -1) if works(n)), None)
    larger = next((n for n in range(ep_size + 1, world_size + 1) if works(n)), None)
    return "take max_ep_size=" + " or ".join(str(size) for size in (smaller, larger) if size is not None)


def _on_this_machine(values: dict[str, Any]) -> bool:
    """Whether local ranks replay something, and all that says how much memory they take is as it should be."""
    ranks, tokens = values.get("ranks"), values.get("tokens_per_rank")
    local = is_valid(ranks, RanksConfig) and RanksConfig.model_validate(ranks).name == "local"
    narrowed = values.get("narrowed", 1)
    whole = all(isinstance(size, int) and size > 0 for size in (tokens, narrowed))
    return local and whole and is_valid(values.get("model"), ModelConfig)


def _fitting(values: dict[str, Any]) -> int:
    """As many ranks of the cluster as this machine has memory and cores for; the fewest there can be, if for none.

    Not what is free at the moment counts: the same command must name the same run tomorrow.
    """
    cluster, sizes = Cluster.model_validate(values["cluster"]), ModelConfig.model_validate(values["model"]).sizes()
    each = bytes_of_rank(values["tokens_per_rank"], sizes.topk, sizes.row_bytes // values.get("narrowed", 1))
    most = min(ranks_that_fit(total_bytes(), each), RANKS_PER_CORE * cores())
    possible = [n for n in range(2, cluster.hierarchy.num_ranks + 1) if _can_be_cut_to(cluster, n)]
    return max([n for n in possible if n <= most], default=min(possible, default=cluster.hierarchy.num_ranks))


def _can_be_cut_to(cluster: Cluster, num_ranks: int) -> bool:
    try:
        cluster.reduced(num_ranks)
    except ValueError:
        return False
    return True


class RunConfig(Strict):
    """One run: the schema of conf/config.yaml.

    Attributes:
        measure: what is measured, one file in conf/measure/.
        ranks: where; None where no ranks are needed.
        system: None, as model and routing are, where the measurement needs none (then nothing asks for them).
        world_size: GPUs in all, or ranks; None: as many as the cluster has.
        max_ep_size: without ranks, GPUs of an expert-parallel group at most; None: all are one group.
        across: whether a group is spread over as many nodes or racks as there are, instead of filling one.
        iterations: of training; the last ones count, at most half.
        tokens_per_rank: sequence length times micro-batch.
        narrowed: rows of tokens and experts are smaller by this factor than the model's.
        seed: of synthetic routing.
        wire: how simulated rows are sent; ranks send elements as the model has them.
    """

    measure: str
    ranks: RanksConfig | None = None
    system: SystemConfig = None  # type: ignore[assignment]
    model: ModelConfig = None  # type: ignore[assignment]
    routing: RoutingConfig = None  # type: ignore[assignment]
    cluster: Cluster
    world_size: int | None = Field(default=None, ge=1)
    max_ep_size: int | None = Field(default=None, ge=1)
    across: bool = False
    iterations: int = Field(ge=2)
    tokens_per_rank: int = Field(ge=1)
    narrowed: int = Field(default=1, ge=1)
    seed: int = Field(ge=0)
    wire: WireConfig = AS_THE_MODEL
    wandb: WandbConfig

    @model_validator(mode="before")
    @classmethod
    def _cut_cluster(cls, values: Any) -> Any:
        """The cluster of as many GPUs as exchange with each other.

        Where there are ranks, ``world_size`` may ask for fewer than the cluster has GPUs; local ones are by default as
        many as fit this machine. Elsewhere it asks for a
        cluster of that size, of which an expert-parallel group takes ``max_ep_size`` GPUs, or fewer where there are
        fewer GPUs or experts.
        """
        world_size, largest = values.get("world_size"), values.get("max_ep_size")
        given = [size for size in (world_size, largest) if size is not None]
        whole = is_valid(values.get("cluster"), Cluster) and (
            largest is None or is_valid(values.get("model"), ModelConfig)
        )
        if not whole or any(not isinstance(size, int) or size < 1 for size in given):
            return values  # the fields themselves say what is wrong
        if world_size is None and _on_this_machine(values):
            values = {**values, "world_size": (world_size := _fitting(values))}
            given = [world_size, *given]
        if values.get("across") and (largest is None or values.get("ranks") is not None):
            raise ValueError("across=true says how a simulated group of max_ep_size= GPUs lies; state that")
        if not given:
            return values
        cluster = Cluster.model_validate(values["cluster"])
        if values.get("ranks") is not None:
            if world_size is None or largest is not None:
                raise ValueError(f"max_ep_size={largest} is for simulation: ranks that are started are one group")
            return {**values, "cluster": cluster.reduced(world_size)}
        world_size = world_size or cluster.hierarchy.num_ranks
        ep_size = world_size
        if largest is not None:
            ep_size = min(world_size, largest, ModelConfig.model_validate(values["model"]).num_experts)
        if world_size % ep_size:
            raise ValueError(
                f"world_size={world_size} is not divisible into groups of ep_size={ep_size}; "
                f"{_sizes_that_work(cluster, world_size, ep_size, bool(values.get('across')))}"
            )
        return {**values, "world_size": world_size, "cluster": laid_out(cluster, ep_size, bool(values.get("across")))}

    @model_validator(mode="after")
    def _check_needs(self) -> Self:
        """Everything that the measurement needs, and nothing else."""
        measurements = {name: one for name, one in MEASUREMENTS.items() if one.command == "run"}
        if self.measure not in measurements:
            raise unknown("measure", self.measure, measurements)
        needs = self.measurement
        if needs.needs_ranks and self.ranks is None:
            raise ValueError(f"measure={self.measure} needs ranks; choose ranks= from {', '.join(PLACES)}")
        if self.ranks is not None and not needs.needs_ranks:
            with_ranks = ", ".join(name for name, one in measurements.items() if one.needs_ranks)
            raise ValueError(
                f"measure={self.measure} takes no ranks: leave ranks={self.ranks.name} out, or say measure={with_ranks}"
            )
        if self.wire != AS_THE_MODEL and (needs.needs_ranks or not needs.needs_system):
            raise ValueError(f"measure={self.measure} sends no rows of other bytes than the model's: leave wire.* out")
        for name in ("system", "model", "routing"):
            if needs.needs_system and getattr(self, name) is None:
                raise ValueError(f"measure={self.measure} needs a {name}; choose {name}=")
            if not needs.needs_system and getattr(self, name) is not None:
                raise ValueError(f"measure={self.measure} takes no {name}: leave {name}= out")
        return self

    @model_validator(mode="after")
    def _check_narrowed(self) -> Self:
        if self.model is not None and self.model.hidden_size % self.narrowed:
            raise ValueError(f"narrowed={self.narrowed} does not divide hidden_size={self.model.hidden_size}")
        return self

    @classmethod
    def of_content(cls, content: dict[str, Any]) -> Self:
        """The run whose content this is, as the present schema has it.

        Raises:
            ValueError: it breaks a rule.
        """
        said = {key: value for key, value in content.items() if value is not None}
        said["wandb"] = {"mode": "disabled", "project": "hiermoe"}
        if "model" in said:  # which may leave out what only a training needs
            said["model"] = {key: value for key, value in said["model"].items() if value is not None}
        return checked(said, cls)

    @property
    def measurement(self) -> Measurement:
        """What is measured."""
        return MEASUREMENTS[self.measure]

    @property
    def ep_groups(self) -> int:
        """Expert-parallel groups of the simulated world, each with all experts; ranks that are started are one."""
        return 1 if self.world_size is None else self.world_size // self.cluster.hierarchy.num_ranks

    @property
    def sizes(self) -> LayerSizes:
        """Of the model's layer, after what the run narrows it to."""
        return self.model.sizes(self.narrowed, self.wire)

    @property
    def routing_source(self) -> dict[str, Any]:
        """What makes the routing."""
        return self.routing.source

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
    def routing_key(self) -> str:
        """The same for runs that have the same routing, which is made once for all of them."""
        return "" if self.routing is None else f"{self.routing.source} {self.request}"

    @property
    def content(self) -> dict[str, Any]:
        """Everything that may change a number, as JSON-ready values."""
        return self.model_dump(mode="json", exclude={"wandb"})

    @property
    def run_id(self) -> str:
        """The name of the run, by its content."""
        return name_run(self, self._inputs)

    def named_on(self, host: str | None, _content: Mapping[str, Any]) -> str:
        """The name that the present code gives the run, measured on a machine, whose stored content this is."""
        return name_run(self, self._inputs, host)

    @property
    def _inputs(self) -> tuple[Path, ...]:
        """Files that it reads."""
        source = {} if self.routing is None else self.routing.source
        return (recorded_path(source["path"], self.request, source.get("stage", "")),) if "path" in source else ()

    @property
    def keys(self) -> dict[str, Any]:
        """Columns that all rows of the record share."""
        if self.system is None:
            return keys_of(self, seed=self.seed, tokens_per_rank=self.tokens_per_rank)
        return keys_of(
            self,
            self.system,
            self.model,
            routing=self.routing.name,
            seed=self.seed,
            tokens_per_rank=self.tokens_per_rank,
            row_bytes=self.sizes.sent.dispatch,
        )
