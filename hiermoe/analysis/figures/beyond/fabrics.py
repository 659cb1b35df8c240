"""What figures beyond the paper's testbed share: names of routings, and speed-ups of worlds of one size."""

from collections.abc import Iterator
from typing import Any

from hiermoe.analysis.figures.tables import row_of
from hiermoe.analysis.frames import Results, Run
from hiermoe.analysis.quantities import speedup

ROUTINGS = {"recorded": "recorded", "resampled": "recorded sequences, resampled", "uniform": "uniform"}


def worlds(results: Results, sweep: str) -> Iterator[dict[str, Any]]:
    """Every run of a sweep that has numbers, the flat ones too, beside the flat AlltoAll of the same world."""
    keys = ("source", "model", "cluster", "routing", "world_size")
    flat: dict[tuple[Any, ...], Run] = {
        tuple(run.value(key) for key in keys): run for run in results.find(sweep, system="megatron", status="ok")
    }
    for run in results.find(sweep, status="ok"):
        baseline = flat.get(tuple(run.value(key) for key in keys))
        if baseline is None:
            continue
        steps = results.rows(run, "step")
        used = steps["dimension"].value_counts(normalize=True)
        config = run.config
        yield row_of(
            run,
            speedup(run, baseline, results),
            fabric=config.cluster.name.partition("@")[0],
            from_data_sheets=config.cluster.from_data_sheets,
            world_size=config.world_size,
            ep_size=run.num_ranks,
            ep_groups=config.ep_groups,
            step_ms=steps["predicted_ms"].mean(),
            alpha_share=alpha_share(run, results),
            dimension=int(used.index[0]),
            dimension_share=used.iloc[0],
            stages=stages_of(run, int(used.index[0])),
        )


def alpha_share(run: Run, results: Results) -> float:
    """The part of the time that does not depend on bytes: of constants from data sheets, the less certain one."""
    stages, cluster = results.rows(run, "dispatch"), run.config.cluster
    alpha_ms = stages["stage"].map(lambda stage: cluster.constants(cluster.exchange_of(str(stage))).alpha_ms)
    return alpha_ms.sum() / stages["predicted_ms"].sum()


def stages_of(run: Run, dimension: int) -> str:
    """What a deduplicating AlltoAll of d dimensions splits at, e.g. ``node``; empty for d = 1."""
    return ", ".join(run.config.cluster.hierarchy.names[: dimension - 1])
