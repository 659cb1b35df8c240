"""`hiermoe calibrate`: measure every AlltoAll of a cluster, fit its constants, and write the cluster's file."""

import socket
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, Self

import pandas as pd
import yaml
from pydantic import Field, model_validator
from rich.table import Table

from hiermoe.measure.calibrate import CalibrationJob
from hiermoe.measure.measurement import Measurement
from hiermoe.measure.registry import MEASUREMENTS
from hiermoe.planner.fit import CALIBRATED, fit_chunks, fit_exchanges, timings
from hiermoe.ranks.places import PLACES, RanksConfig
from hiermoe.ranks.world import Progress, World, no_progress
from hiermoe.records.groups import check_is_free
from hiermoe.records.project import CLUSTERS
from hiermoe.records.store import RunStore
from hiermoe.records.strict import checked, is_valid
from hiermoe.records.whole_file import write_whole
from hiermoe.runs.compose import compose
from hiermoe.runs.execute import execute
from hiermoe.runs.measurable import keys_of, name_run
from hiermoe.runs.run_config import WandbConfig
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.peers import WORLD, AlphaBeta, Peers

# Of a line that a reader may trust.
GOOD_R2 = 0.98
# Of times in chunks, root mean square of relative errors.
GOOD_ERROR = 0.15


class CalibrationConfig(CalibrationJob):
    """One calibration; the schema of conf/calibrate.yaml.

    Attributes:
        ranks: where; the cluster is cut down to them.
        name: of the cluster's file.
    """

    ranks: RanksConfig
    name: str = Field(pattern=r"^[\w.-]+$")

    @model_validator(mode="before")
    @classmethod
    def _cut_cluster(cls, values: dict[str, Any]) -> dict[str, Any]:
        """As many GPUs as ``world_size`` asks for, and a name."""
        values = {key: value for key, value in values.items() if key != "measure"}  # of a stored one's content
        world_size = values.pop("world_size")
        if values.get("ranks") is None:
            raise ValueError(f"a calibration needs ranks; choose ranks= from {', '.join(PLACES)}")
        if not (is_valid(values["ranks"], RanksConfig) and is_valid(values["cluster"], Cluster)):
            return {**values, "name": values["name"] or "unnamed"}  # the fields themselves say what is wrong
        ranks = RanksConfig.model_validate(values["ranks"])
        cluster = Cluster.model_validate(values["cluster"])
        if world_size is not None:
            cluster = cluster.reduced(int(world_size))
        if values["name"] is None:
            suffix = "" if ranks.name == "emulated" else f"_{ranks.name}"
            values["name"] = f"{cluster.name}_calibrated{suffix}".replace("@", "_")
        check_is_free(values["name"])
        return {**values, "cluster": cluster}

    @property
    def wandb(self) -> WandbConfig:
        """W&B shows steps of runs; a calibration has none."""
        return WandbConfig(mode="disabled", project="hiermoe")

    @property
    def measurement(self) -> Measurement:
        """What is measured."""
        return MEASUREMENTS["calibrate"]

    @property
    def ep_groups(self) -> int:
        """All ranks exchange with each other."""
        return 1

    @property
    def content(self) -> dict[str, Any]:
        """Everything that may change a number, as JSON-ready values."""
        return {"measure": "calibrate", **self.model_dump(mode="json", exclude={"name"})}

    @property
    def run_id(self) -> str:
        """The name of the run, by its content."""
        return name_run(self)

    def named_on(self, host: str | None, _content: Mapping[str, Any]) -> str:
        """The name that the present code gives the run, measured on a machine, whose stored content this is."""
        return name_run(self, host=host)

    @classmethod
    def of_content(cls, content: Mapping[str, Any]) -> Self:
        """The calibration whose content this is, as the present schema has it.

        Raises:
            ValueError: it breaks a rule.
        """
        return checked({**content, "world_size": None, "name": None}, cls)

    @property
    def keys(self) -> dict[str, Any]:
        """Columns that all rows of the record share."""
        return keys_of(self)

    @property
    def path(self) -> Path:
        """Where the cluster's file goes."""
        return CLUSTERS / f"{self.name}.yaml"


def calibration_config(cluster: str, ranks: str, **more: str) -> CalibrationConfig:
    """conf/calibrate.yaml with these choices, outside of Hydra's own command line.

    Raises:
        ValueError: an unknown name, or a value that breaks a rule.
    """
    overrides = [f"{key}={value}" for key, value in {"cluster": cluster, "ranks": ranks, **more}.items()]
    return compose("calibrate", overrides, CalibrationConfig)


def calibrate(
    config: CalibrationConfig,
    store: RunStore,
    progress: Progress = no_progress,
    world: World | None = None,
) -> Cluster:
    """Measure unless that is done, and write the cluster's file.

    Raises:
        ValueError: the calibration failed.
    """
    outcome = execute(config, store, progress, world)
    if outcome.status != "ok":
        raise ValueError(f"calibration of {config.cluster.name}: {outcome.reason}")
    return write_cluster(config, store)


def write_cluster(config: CalibrationConfig, store: RunStore) -> Cluster:
    """Write the calibrated cluster to results/clusters/, where ``cluster=<name>`` finds it.

    Args:
        config: of a calibration that has a record.
        store: where it is.

    Returns:
        The cluster.
    """
    provenance = store.provenance(config.run_id)
    date = provenance["time"][:10]
    # Not the host where it belongs to an allocation: the next one may begin with another, and the name would count.
    where = socket.gethostname() if config.ranks.on_this_host else config.cluster.name
    records = store.read(config.run_id)
    fits = fit_exchanges(records, config.cluster)

    def constants(exchange: Peers) -> AlphaBeta:
        fit = fits[exchange]
        source = f"{CALIBRATED} {where} on {date}, ranks={config.ranks.name}, r^2 = {fit.r2:.4f}"
        return fit.line(source)

    levels = [
        level.model_copy(update={kind: constants(Peers(kind, number)) for kind in ("inter", "intra")})
        for number, level in enumerate(config.cluster.levels[:-1], start=1)
    ]
    update = {
        "name": config.name,
        "description": f"{config.cluster.description}, calibrated",
        "world": constants(WORLD),
        "levels": (*levels, config.cluster.levels[-1]),
    }
    chunked = fit_chunks(records, config.cluster)
    update |= {name: None if chunked is None else getattr(chunked, name) for name in ("overlap", "wave_ms")}
    cluster = config.cluster.model_copy(update=update)
    if not config.ranks.on_this_host:
        cluster = with_measured_links(cluster)
    body = yaml.safe_dump(cluster.model_dump(mode="json", exclude_none=True), sort_keys=False, width=1000)
    write_whole(config.path, f"# Written by `hiermoe calibrate`. Timings: record {config.run_id}.\n{body}".encode())
    return cluster


def with_measured_links(cluster: Cluster, measured: Container[Peers] | None = None) -> Cluster:
    """A calibrated cluster whose links carry what they did in the calibration, where nobody has stated their rates.

    Of n bytes at each GPU, (k-1)/k leave it in an AlltoAll among k sub-groups, over the link that the GPUs of a
    sub-group share. An AlltoAll does not exceed its links, so they may be faster than this.

    Args:
        cluster: calibrated.
        measured: AlltoAlls that were; None for all.
    """
    hierarchy, levels = cluster.hierarchy, []
    for number, level in enumerate(cluster.levels, start=1):
        exchange = Peers.of_siblings(number, hierarchy)
        if measured is not None and exchange not in measured:
            levels.append(level)
            continue
        siblings, beta = exchange.size(hierarchy), cluster.constants(exchange).beta_ms_per_byte
        assert beta > 0, "a calibration whose AlltoAlls take no longer for more bytes has failed"
        gb_per_s = hierarchy.lanes(number) * (siblings - 1) / siblings / beta * 1e-6  # bytes a ms
        levels.append(level.model_copy(update={"link_gb_per_s": gb_per_s}))
    return cluster.model_copy(update={"levels": tuple(levels)})


def calibration_table(records: pd.DataFrame, title: str, cluster: Cluster) -> Table:
    """Fitted constants of every AlltoAll, for the eye."""
    table = Table(title=title, title_justify="left")
    table.add_column("AlltoAll", no_wrap=True)
    for column, unit in (("ranks", ""), ("alpha", "ms"), ("beta", "ms/B"), ("1/beta", "MB/s"), ("r²", ""), ("n", "MB")):
        table.add_column(f"{column}\n{unit}", justify="right", no_wrap=True)
    measured = timings(records)
    for exchange, fit in fit_exchanges(records, cluster).items():
        sizes = measured.loc[measured["stage"] == str(exchange), "bytes"]
        table.add_row(
            str(exchange),
            str(exchange.size(cluster.hierarchy)),
            f"{fit.alpha_ms:.2f}",
            f"{fit.beta_ms_per_byte:.3g}",
            f"{1e-3 / fit.beta_ms_per_byte:.1f}" if fit.beta_ms_per_byte > 0 else "",
            f"{fit.r2:.4f}" + ("" if fit.r2 >= GOOD_R2 else " !"),
            f"{sizes.min() / 1e6:.3f}-{sizes.max() / 1e6:.1f}",
        )
    table.caption = (
        f"n: bytes at a rank, its own share included. Times: slowest rank, median of "
        f"{measured['n'].min()} repeats. !: r² below {GOOD_R2}, calibrate again on an idle machine."
    )
    if (chunked := fit_chunks(records, cluster)) is not None:
        table.caption += (
            f" Of two stages in chunks {chunked.overlap:.0%} of the shorter passes beside the longer, and a wave of "
            f"chunks takes {chunked.wave_ms:.3g} ms at least (error {chunked.error:.0%}"
            + (")." if chunked.error <= GOOD_ERROR else " !: calibrate again).")
        )
    return table
