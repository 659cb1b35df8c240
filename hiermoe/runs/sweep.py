"""Sweeps: every file in sweeps/ is a Hydra multirun; here they are expanded, run on all cores, and resumed."""

import ctypes
import hashlib
import json
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Generic

import hydra
import torch
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel
from typing_extensions import TypeVar

from hiermoe.ranks.launch import end_with_parent
from hiermoe.records.keep import Outcome
from hiermoe.records.project import CLUSTERS, CONF, PROJECT_ROOT, SWEEPS, to_root
from hiermoe.records.store import RunStore, write_whole
from hiermoe.runs.execute import execute
from hiermoe.runs.run_config import RunConfig, parse, register_search_path

CACHE = PROJECT_ROOT / ".cache" / "sweeps"
_M_MMAP_THRESHOLD = -3  # as in malloc.h
_LARGE_BLOCK_BYTES = 2**22

C = TypeVar("C", bound=BaseModel, default=RunConfig)


@dataclass(frozen=True)
class Cell(Generic[C]):
    """One run of a sweep: its own overrides, and the configuration that they give."""

    overrides: tuple[str, ...]
    config: C


def sweep_names() -> list[str]:
    """Names of all sweeps, in alphabetical order."""
    return sorted(path.stem for path in SWEEPS.glob("*.yaml"))


def large_sweep_names() -> list[str]:
    """Names of the sweeps that take minutes by themselves and run only where they are named."""
    return sorted(f"large/{path.stem}" for path in (SWEEPS / "large").glob("*.yaml"))


def large_so_far(store: RunStore) -> dict[str, list[Cell]]:
    """Runs of large sweeps that have a record, by the name of the sweep that they go on from."""
    found: dict[str, list[Cell]] = {}
    for name in large_sweep_names():
        done = [cell for cell in expand(name) if store.status(cell.config.run_id) is not None]
        found[name.removeprefix("large/")] = done
    return found


def expand(name: str) -> list[Cell]:
    """All runs of a sweep, as ``hiermoe run -m +sweeps=<name>`` would run them.

    Raises:
        ValueError: no such sweep, or a configuration that breaks a rule.
    """
    path = SWEEPS / f"{name}.yaml"
    if not path.exists():
        raise ValueError(f"sweep {name!r} is unknown; choose from {', '.join([*sweep_names(), *large_sweep_names()])}")
    return expand_file(path, "config", RunConfig)


def expand_file(
    path: Path, config_name: str, schema: type[C], instead: Mapping[str, str] | None = None
) -> list[Cell[C]]:
    """All runs of a sweep's file.

    Hydra takes a tenth of a second for each, so the result is kept in .cache/ for as long as no file of conf/, sweeps/
    and results/clusters/ changes.

    Args:
        path: below sweeps/.
        config_name: primary configuration in conf/.
        schema: of that configuration.
        instead: values in the place of those that the file gives.

    Raises:
        ValueError: a configuration that breaks a rule, or a name that no file has.
    """
    group = path.parent.relative_to(SWEEPS.parent).as_posix()
    named = "-".join([*path.relative_to(SWEEPS).with_suffix("").parts, *(instead or {}).values()])
    cache = CACHE / f"{named}-{_configuration_digest()}.json"
    if not cache.exists():
        cells = _compose(path, f"+{group}={path.stem}", config_name, instead or {})
        write_whole(cache, json.dumps(cells).encode())
    return [
        Cell(tuple(cell["overrides"]), parse(DictConfig(cell["config"]), schema))
        for cell in json.loads(cache.read_bytes())
    ]


def _configuration_digest() -> str:
    """Hash of everything that composition reads."""
    digest = hashlib.sha256(hydra.__version__.encode())
    for path in sorted([*CONF.rglob("*.yaml"), *SWEEPS.rglob("*.yaml"), *CLUSTERS.glob("*.yaml")]):
        digest.update(path.as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _compose(path: Path, chosen: str, config_name: str, instead: Mapping[str, str]) -> list[dict[str, Any]]:
    """Let Hydra compose every run of a sweep."""
    params = {**OmegaConf.load(path).hydra.sweeper.params, **instead}
    overrides = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    (batch,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    with _one_line(path), composing() as compose:
        return [
            {"overrides": cell, "config": OmegaConf.to_container(compose(config_name, [chosen, *cell]), resolve=True)}
            for cell in batch
        ]


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except HydraException as error:
        raise ValueError(f"{to_root(path)}: {str(error).splitlines()[0]}") from error


@contextmanager
def composing() -> Iterator[Callable[..., DictConfig]]:
    """Hydra's compose API on the project's configuration, leaving Hydra's global state as it was."""
    register_search_path()
    previous = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="hiermoe"):
        yield hydra.compose
    GlobalHydra.instance().hydra = previous


def run_all(
    configs: Iterable[RunConfig],
    workers: int,
    finished: Callable[[Outcome], None],
    store: RunStore | None = None,
) -> list[Outcome]:
    """Run configurations in worker processes, each on one core; those with a record are skipped.

    Runs that share their routing go to the same worker one after another, so that it is made once.

    Args:
        configs: what to run; the same run may occur twice and is run once.
        workers: processes.
        finished: called in this process with every outcome.
        store: where records are.

    Returns:
        All outcomes.

    Raises:
        ValueError: a worker was killed.
        Exception: whatever a worker could not turn into a failed record, e.g. a full disk; nothing further is started.
    """
    store = store or RunStore()
    unique = {config.run_id: config for config in configs}
    groups: dict[str, list[RunConfig]] = {}
    outcomes = []
    for run_id, config in unique.items():
        if store.is_done(run_id):
            outcomes.append(execute(config, store))
            finished(outcomes[-1])
        else:
            groups.setdefault(config.routing_key, []).append(config)
    if not groups:
        return outcomes
    context = get_context("forkserver")
    context.set_forkserver_preload(["hiermoe.runs.sweep"])
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        queue = sorted(groups.values(), key=len, reverse=True)
        running: dict[Future[Outcome], list[RunConfig]] = {}
        try:
            while queue or running:
                while queue and len(running) < workers:
                    group = queue.pop(0)
                    running[pool.submit(execute, group[0], store)] = group[1:]
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    rest = running.pop(future)
                    outcomes.append(future.result())
                    finished(outcomes[-1])
                    if rest:
                        running[pool.submit(execute, rest[0], store)] = rest[1:]
        except BrokenProcessPool as error:
            raise ValueError(
                f"a simulating process was killed, most likely for want of memory: {workers} of them ran, --workers 1 "
                "takes less. Finished runs are kept"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return outcomes


def _start_worker() -> None:
    """One core a worker, and none outlives the process that it works for, however that ends."""
    torch.set_num_threads(1)
    _give_large_blocks_back()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    end_with_parent()


def _give_large_blocks_back() -> None:
    """Let memory that large tensors leave go back to the system.

    glibc would keep it, and put the small ones that stay (counts) into its middle: in worlds of thousands of GPUs a
    worker grew to twenty times what it held.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc alone
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)
