"""Measures on an allocation: its processes become a crew, whose rank 0 calibrates and runs the measured sweeps."""

import os
import re
import signal
import time
import warnings
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal

from omegaconf import OmegaConf
from rich.console import Console

from hiermoe.ranks.crew import Crew
from hiermoe.ranks.places import RanksConfig
from hiermoe.records.keep import Outcome, kept
from hiermoe.records.project import CONF
from hiermoe.records.store import RunStore
from hiermoe.records.strict import checked
from hiermoe.runs.attempts import Attempts
from hiermoe.runs.calibration import CalibrationConfig, calibrate
from hiermoe.runs.compose import expand
from hiermoe.runs.execute import execute_together, num_steps, refuse
from hiermoe.runs.measured_cells import Amount, MeasuredCell, measured_cells, measured_so_far, together
from hiermoe.runs.run_config import RunConfig, WandbMode
from hiermoe.runs.slurm import SlurmConfig, run_job, slurm_job_name
from hiermoe.runs.training import TrainRunConfig, training_on
from hiermoe.topology.cluster import Cluster, Level
from hiermoe.topology.peers import AlphaBeta

# Bytes and rounds of a calibration, where conf/calibrate.yaml's are for slow links and two cores.
_ON_GPUS = {
    "largest_pair_bytes": 2**25,
    "largest_bytes": 2**28,
    "chunked_row_bytes": 8192,
    "warm_ups": 5,
    "repeats": 20,
}
_QUICK_ON_CPU = {"largest_pair_bytes": 2**18, "largest_bytes": 2**20, "repeats": 3}


def measure_in_allocation(
    device: Literal["cpu", "cuda"] | None = None,
    amount: Amount = "default",
    structure: str | None = None,
    name: str | None = None,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
) -> list[Outcome] | None:
    """Calibrate this allocation's cluster and measure. *Collective: every process of the allocation must call it.*

    Args:
        device: cuda: NCCL; cpu: gloo; None for what conf/ranks/allocation.yaml says.
        amount: how much is measured.
        structure: a cluster that has this one's levels, for levels inside of nodes; None for nodes and GPUs.
        name: of the cluster's file in results/clusters; None for Slurm's name of the cluster and the allocation's size.
        nodes: that the allocation must have; None for any number.
        gpus_per_node: likewise.

    Returns:
        On rank 0 all outcomes; None on others, which are through.

    Raises:
        ValueError: this is no allocation, it is not as asked for, or its calibration failed.
    """
    for package in ("megatron", "torch"):  # they say on every rank what they lack and what will be renamed
        warnings.filterwarnings("ignore", module=package)
    ranks = RanksConfig.named("allocation", device)

    def check(crew: Crew) -> None:
        shape = shape_of(crew.hosts)
        if (nodes, gpus_per_node) not in ((None, None), shape):
            raise ValueError(
                f"the allocation has {shape[0]} nodes x {shape[1]} processes, not {nodes} x {gpus_per_node}"
            )

    def program(crew: Crew | None) -> list[Outcome]:
        assert crew is not None
        store, shape = RunStore(), shape_of(crew.hosts)
        attempts = Attempts(store, slurm_job_name())
        signal.signal(signal.SIGTERM, attempts.excuse)  # scancel, or preemption
        say(f"{shape[0]} nodes x {shape[1]} processes joined over {'NCCL' if crew.device == 'cuda' else 'gloo'}")
        config = calibration_of(shape, ranks, amount, structure, name)
        cluster = _calibrated(config, store, attempts, crew)
        cells = measured_cells(amount, ranks, cluster.name)
        fitting = [cell for cell in cells if amount == "quick" or required_shape(cell) == shape]
        others = [cell for cell in cells if cell not in fitting]
        outcomes = [_wrong_size(cell, shape, store) for cell in others]
        for outcome in outcomes[:1]:
            say(f"{len(outcomes)} runs do not apply here: {outcome.reason}")
        outcomes += _measure(together(cell.measured.config for cell in fitting), store, attempts, crew)
        if crew.device == "cuda" and amount == "full":
            alone = [[cell.config] for cell in training_on(cluster, ranks)]
            outcomes += _measure(alone, store, attempts, crew)
        return outcomes

    return ranks.lead(program, check)


def reproduce_on_cluster(
    where: Literal["slurm", "allocation"],
    options: dict[str, Any],
    workers: int | None,
    wandb_mode: WandbMode,
    amount: Amount,
) -> None:
    """Measure on a cluster what has no record yet, write the report, and print the verdicts.

    Args:
        where: slurm: on the processes of a job that is submitted here; allocation: on those of the one that this
            process has a part of. All of them must call it then, and those but rank 0 return early.
        options: that are given: those of `measure_in_allocation`, and for slurm those of `SlurmConfig`.
        workers: processes of the simulation; None for one a core.
        wandb_mode: how the verdicts are mirrored in W&B, if any run is new.
        amount: how much is measured. All but quick simulates the paper's sweeps as well, here, after measuring.

    Raises:
        ValueError: bad options, or a job or runs that failed.
    """
    console, started = Console(soft_wrap=True), time.perf_counter()
    measuring = {name: options[name] for name in ("device", "structure", "name") if name in options}
    measuring["amount"] = amount
    if where == "slurm":
        asked = {name: value for name, value in options.items() if name not in ("structure", "name")}
        outcomes = run_job(measure_in_allocation, measuring, SlurmConfig.given(**asked), console)
    else:
        for name in ("partition", "account", "time_limit_min"):
            if name in options:
                raise ValueError(f"{name}={options[name]} is for ON=slurm; the allocation is there already")
        shape = {name: options[name] for name in ("nodes", "gpus_per_node") if name in options}
        measured = measure_in_allocation(**measuring, **shape)
        if measured is None:
            return
        outcomes = measured
    # Figures take seconds to import, and are not for every rank.
    from hiermoe.commands.reproduce_command import Session, finish, predict, simulate_all, simulated_sweeps

    session = Session(RunStore(), console, workers or os.cpu_count() or 1, started)
    outcomes = outcomes + predict(measured_so_far(session.store), session)
    cells = {name: expand(name) for name in simulated_sweeps(amount)}
    if amount != "quick":
        outcomes += simulate_all(cells, session)
    finish(outcomes, session, wandb_mode, cells)


def shape_of(hosts: Sequence[str]) -> tuple[int, int]:
    """Nodes and processes of each.

    Raises:
        ValueError: hosts have different numbers of processes, or their ranks are not one after another.
    """
    runs = [(host, len(list(ranks))) for host, ranks in groupby(hosts)]
    if len({host for host, _ in runs}) < len(runs):
        raise ValueError(f"ranks of host {hosts[0]} are not one after another: order the ranks by host (srun -m block)")
    if len({size for _, size in runs}) > 1:
        told = ", ".join(f"{host}: {size}" for host, size in runs)
        raise ValueError(f"hosts have different numbers of processes ({told}); ask for as many on each")
    return len(runs), runs[0][1]


def calibration_of(
    shape: tuple[int, int], ranks: RanksConfig, amount: Amount, structure: str | None, name: str | None
) -> CalibrationConfig:
    """What to calibrate.

    Raises:
        ValueError: the structure is unknown or of another size.
    """
    nodes, gpus = shape
    if structure is None:
        levels = {"gpu": nodes * gpus}
        if nodes > 1:
            levels = {"node": nodes, "gpu": nodes * gpus} if gpus > 1 else {"node": nodes}
    else:
        hierarchy = Cluster.named(structure).hierarchy
        levels = dict(zip(hierarchy.names, hierarchy.groups, strict=True))
        if hierarchy.num_ranks != nodes * gpus or levels.get("node", 1) != nodes:
            raise ValueError(
                f"cluster={structure} has {levels.get('node', 1)} nodes and {hierarchy.num_ranks} GPUs, the allocation "
                f"{nodes} nodes and {nodes * gpus}"
            )
    values: Any = OmegaConf.to_container(OmegaConf.load(CONF / "calibrate.yaml"))
    values = {key: value for key, value in values.items() if key not in ("defaults", "hydra")}
    if ranks.device == "cuda":
        values |= _ON_GPUS
    elif amount == "quick":
        values |= _QUICK_ON_CPU
    if name is None:
        slurms = re.sub(r"[^\w.-]", "_", os.environ.get("SLURM_CLUSTER_NAME", "cluster"))
        parts = [slurms, f"{nodes}x{gpus}", structure]
        parts += ["cpu" if ranks.device == "cpu" else None, "quick" if amount == "quick" else None]
        name = "_".join(part for part in parts if part)
    cluster = uncalibrated(name, f"{nodes} nodes x {gpus} {ranks.device} ranks", levels)
    return checked(values | {"cluster": cluster, "ranks": ranks, "name": name}, CalibrationConfig)


def uncalibrated(name: str, description: str, groups: dict[str, int]) -> Cluster:
    """A cluster of which only the levels are known; every constant is to be replaced by a calibration's."""
    unknown = AlphaBeta(alpha_ms=0, beta_ms_per_byte=0, source="not calibrated yet", published=False)
    levels = [Level(name=level, groups=n, link_gb_per_s=1, inter=unknown, intra=unknown) for level, n in groups.items()]
    levels[-1] = levels[-1].model_copy(update={"inter": None, "intra": None})
    return Cluster(name=name, description=description, world=unknown, levels=tuple(levels))


def required_shape(cell: MeasuredCell) -> tuple[int, int]:
    """Nodes and GPUs of each that a cell's sweep is about."""
    hierarchy = Cluster.named(cell.named_cluster.removesuffix("_calibrated")).hierarchy
    nodes = dict(zip(hierarchy.names, hierarchy.groups, strict=True)).get("node", 1)
    return nodes, hierarchy.num_ranks // nodes


def say(line: str) -> None:
    """To standard output, which a follower of the job reads."""
    print(line, flush=True)


def _calibrated(config: CalibrationConfig, store: RunStore, attempts: Attempts, crew: Crew) -> Cluster:
    if store.is_done(config.run_id) and config.path.exists():
        say(f"calibration of {config.name}: kept from before")
        return Cluster.named(config.name)
    reason = attempts.reason_to_skip(config.run_id)
    if reason is not None:
        raise ValueError(f"calibration of {config.name} {reason}")
    say(f"calibrating {config.name}: {num_steps(config)} timings")
    with attempts.of([config.run_id]):
        cluster = calibrate(config, store, world=crew)
    for exchange in cluster.exchanges:
        constants = cluster.constants(exchange)
        say(f"  {exchange}: alpha {constants.alpha_ms:.3g} ms, beta {constants.beta_ms_per_byte:.3g} ms/B")
    return cluster


def _wrong_size(cell: MeasuredCell, shape: tuple[int, int], store: RunStore) -> Outcome:
    """Record that a run needs another allocation."""
    nodes, gpus = required_shape(cell)
    reason = f"{cell.sweep} is about {nodes} nodes x {gpus} GPUs, this allocation has {shape[0]} x {shape[1]}: ask for "
    config = cell.measured.config
    return kept(config.run_id, store) or refuse(
        config, "not_applicable", f"{reason}NODES={nodes} GPUS_PER_NODE={gpus}", store
    )


def _measure(
    groups: Sequence[Sequence[RunConfig | TrainRunConfig]], store: RunStore, attempts: Attempts, crew: Crew
) -> list[Outcome]:
    """Run group after group; what an earlier job died in goes alone, so that only the culprit is given up."""
    outcomes: list[Outcome] = []
    total = sum(map(len, groups))

    def tell(done: Sequence[Outcome], configs: Sequence[RunConfig | TrainRunConfig]) -> None:
        for outcome, config in zip(done, configs, strict=True):
            outcomes.append(outcome)
            how = "kept from before" if outcome.cached else f"{outcome.status}, {outcome.seconds:.1f} s"
            what = f"{config.model.name}, {config.routing.name if isinstance(config, RunConfig) else 'training'}"
            say(f"[{len(outcomes)}/{total}] {config.system.name} ({what}): {how}. {outcome.reason}".rstrip(". "))

    for group in groups:
        done = [config for config in group if store.is_done(config.run_id)]
        tell(execute_together(done, store, world=crew), done)
        missing = [config for config in group if config not in done]
        suspects = [config for config in missing if attempts.unfinished(config.run_id)]
        innocent = [config for config in missing if config not in suspects]
        for configs in [innocent, *([config] for config in suspects)]:
            run_ids = [config.run_id for config in configs]
            given_up = next(filter(None, map(attempts.reason_to_skip, run_ids)), None)  # only of one that is alone
            if given_up is not None:
                tell([refuse(configs[0], "failed", given_up, store)], configs)
            elif configs:
                with attempts.of(run_ids):
                    tell(execute_together(configs, store, world=crew), configs)
    return outcomes
