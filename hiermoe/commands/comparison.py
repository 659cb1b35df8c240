"""Several runs of one command: each is run, and the tables that `hiermoe run -m` ends with have them side by side."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hiermoe.analysis.expert_time import TFLOPS, expert_ms
from hiermoe.analysis.frames import typical_ms
from hiermoe.ranks.places import PLACES, RanksConfig
from hiermoe.ranks.server import RankFailedError
from hiermoe.records.store import RunStore
from hiermoe.runs.measured_cells import together
from hiermoe.runs.run_config import RunConfig
from hiermoe.runs.single import run_and_print, simulate_and_print
from hiermoe.runs.summary import dimensions_of
from hiermoe.runs.sweep import run_all

_WIDTH = 80  # in a file; a terminal may be narrower


@dataclass(frozen=True)
class Composed:
    """One run of several.

    Attributes:
        overrides: what it was asked to be, beyond what all were.
        config: None where these make no configuration.
        error: why they make none, or why the run came to nothing, in one line; else empty.
    """

    overrides: tuple[str, ...]
    config: RunConfig | None
    error: str = ""


@dataclass(frozen=True)
class _Numbers:
    """Of one run: milliseconds of one AlltoAll and of the four of a step and layer, and the stages used.

    Also what experts in more than one place cost and bring: the four AlltoAlls with weights and gradients; of a
    predicted one these and the busiest GPU's experts, its expert rows over the mean, and GB of slots, else NaN.
    """

    alltoall_ms: float
    total_ms: float
    dimensions: str
    net_ms: float
    layer_ms: float
    busiest: float
    slots_gb: float

    @property
    def has_copies(self) -> bool:
        """Whether anything was kept or sent for copies."""
        return self.slots_gb > 0 or self.net_ms > self.total_ms * (1 + 1e-9)  # sums in another order round otherwise


@dataclass(frozen=True)
class _Line:
    """A run with its predicted and its measured numbers, as far as there are any."""

    run: Composed
    predicted: _Numbers | None
    measured: _Numbers | None


def run_all_and_print(composed: Sequence[Composed]) -> list[Composed]:
    """Run and print what could be composed: what differs in its system alone interleaved, if it is measured.

    None ends the others. What was measured on shaped links or GPUs is predicted too.

    Returns:
        The same, each with what went wrong.
    """
    console, said = Console(highlight=False, soft_wrap=True), dict[str, str]()
    for one in composed:
        if one.error:
            console.print(f"[red]failed[/red] {escape(' '.join(one.overrides))}: {escape(one.error)}")

    def attempt(run: Callable[..., object], *configs: RunConfig) -> None:
        try:
            run(*configs)
        except (ValueError, OSError, RankFailedError) as failure:
            said.update({config.run_id: str(failure).splitlines()[0] for config in configs})

    configs = [one.config for one in composed if one.config is not None]
    simulated = [config for config in configs if config.ranks is None]
    if simulated:
        attempt(simulate_and_print, *simulated)
    for group in together(config for config in configs if config.ranks is not None):
        attempt(run_and_print, *group)
    store, ended = RunStore(), list[Composed]()
    shaped = [config for config in configs if config.ranks is not None and config.ranks.source != "local"]
    twins = [_predicted(config) for config in shaped if config.measure == "replay"]
    if missing := [twin for twin in twins if not store.is_done(twin.run_id)]:
        with console.status("what is predicted of these runs"):
            attempt(lambda *some: run_all(some, os.cpu_count() or 1, lambda _: None, store), *missing)
    for one in composed:
        status, reason = "failed", one.error
        if one.config is not None:
            status, reason = store.ended(one.config.run_id) or (
                "failed",
                said.get(one.config.run_id, "no record of it"),
            )
        ended.append(replace(one, error=reason if status == "failed" else ""))
    return ended


def print_comparison(ended: Sequence[Composed], store: RunStore, console: Console) -> None:
    """Print the table, plain and at most 80 columns wide in a file."""
    if not console.is_terminal:
        console = Console(file=console.file, width=min(_WIDTH, console.width), no_color=True, highlight=False)
    for table in comparison(ended, store):
        console.print(table)


def comparison(ended: Sequence[Composed], store: RunStore) -> list[Table]:
    """One line a run: what varied, then predicted and measured numbers, which never share a column.

    A predicted run has the measured one of its setting beside it where the store has that, and the other way round.

    Args:
        ended: runs in their order.
        store: where their records are.

    Returns:
        The AlltoAlls of all runs, and where something was kept or sent for copies of experts a table of these.
    """
    lines = [_Line(one, *_both(one, store)) for one in ended]
    sources = sorted({s for one in ended if one.config is not None for s in _measured_sources(one.config, store)})
    tables = [_alltoalls(lines, ", ".join(sources))]
    if any(numbers is not None and numbers.has_copies for line in lines for numbers in (line.predicted, line.measured)):
        tables.append(_copies(lines))
    for one in ended:
        if why := one.error or _not_applicable(one, store):
            tables[-1].caption = f"{tables[-1].caption}\n{escape(' '.join(one.overrides))}: {escape(why)}"
    return tables


def _table(title: str, caption: str) -> Table:
    look = {"box": box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", **look)
    table.add_column("what varied", overflow="fold")
    return table


def _varied(lines: Sequence[_Line]) -> list[str]:
    """What each run was asked to be beyond what all were."""
    overrides = [line.run.overrides for line in lines]
    common = set.intersection(*map(set, overrides)) if len(lines) > 1 else set[str]()
    return [escape(" ".join(x.partition("=")[2] for x in own if x not in common) or "-") for own in overrides]


def _alltoalls(lines: Sequence[_Line], sources: str) -> Table:
    """Predicted and measured times of the AlltoAlls; those of one are left out where both kinds stand side by side."""
    both = any(line.predicted for line in lines) and any(line.measured for line in lines)
    caption = "ms; four: the four AlltoAlls of a step and layer, " + (
        f"mean of predicted, median of measured times of the busiest rank ({sources})"
        if any(line.measured for line in lines)
        else "mean of the iterations that count"
    )
    numbers = [one for line in lines for one in (line.predicted, line.measured) if one is not None]
    cut = " d* 2x4: two stages, passed in 4 chunks." if any("x" in one.dimensions for one in numbers) else ""
    table = _table("All runs", f"{caption}. Times as fast: as the first system of the same setting.{cut}")
    columns: list[list[str]] = []
    for kind in ("predicted", "measured"):
        found = [getattr(line, kind) for line in lines]
        if not any(found):
            continue
        for what in ("d*", *(() if both else ("one\nAlltoAll",)), "four,\ntotal", "times\nas fast"):
            head = f"{kind if what[0] == 'f' else ''}\n{what}" if what != "d*" else what
            table.add_column(head, justify="right", no_wrap=True)
        first: dict[str, float] = {}  # total of the first system, by setting
        cells = []
        for line, numbers in zip(lines, found, strict=True):
            if numbers is None:
                cells.append([""] * (3 if both else 4))
                continue
            base = first.setdefault(_setting(line.run), numbers.total_ms)
            one_ms = () if both else (numbers.alltoall_ms,)
            values = (*one_ms, numbers.total_ms, base / numbers.total_ms)
            cells.append([numbers.dimensions, *(f"{value:.2f}" for value in values)])
        columns.append(cells)
    for varied, *cells in zip(_varied(lines), *columns, strict=True):
        table.add_row(varied, *(cell for kind in cells for cell in kind))
    return table


def _copies(lines: Sequence[_Line]) -> Table:
    """What copies of experts cost and bring."""
    is_measured = any(line.measured for line in lines)
    table = _table(
        "With what copies of experts need",
        "ms. Net: the four AlltoAlls, weights sent to copies of experts and gradients sent back, predicted at the rate "
        "of the link, measured one after the other, both as if nothing hid them; moves of experts to another home are "
        f"not in it. With experts: and those of the busiest GPU, at {TFLOPS:g} TFLOP/s, an assumption. Rows: expert "
        "rows of that GPU over the mean. Slots: weights, gradients and training state of copies, at a GPU, all layers.",
    )
    measured = ("measured\nnet",) if is_measured else ()
    for what in ("predicted\nnet", *measured, "predicted\nwith experts", "rows,\nmost / mean", "slots,\nGB"):
        table.add_column(what, justify="right", no_wrap=True)
    for varied, line in zip(_varied(lines), lines, strict=True):
        one = line.predicted
        found: list[float | None] = [None] * 4
        if one is not None:
            found = [one.net_ms, one.layer_ms, one.busiest, one.slots_gb]
        if is_measured:
            found.insert(1, line.measured.net_ms if line.measured else None)
        table.add_row(varied, *("" if value is None else f"{value:.2f}" for value in found))
    return table


def _not_applicable(one: Composed, store: RunStore) -> str:
    """Why a run has no meaning; empty where it has."""
    status, reason = (one.config and store.ended(one.config.run_id)) or ("ok", "")
    return f"not applicable, {reason}" if status == "not_applicable" else ""


def _setting(one: Composed) -> str:
    """Everything but the system."""
    return json.dumps([value for value in one.overrides if not value.startswith("system")])


def _both(one: Composed, store: RunStore) -> tuple[_Numbers | None, _Numbers | None]:
    """Predicted and measured numbers of a setting, as far as there are any."""
    if one.config is None or one.config.system is None:
        return None, None
    predicted = _numbers(_predicted(one.config), store)
    measured = (_numbers(config, store) for config in _measured(one.config))
    return predicted, next((found for found in measured if found is not None), None)


def _measured_sources(config: RunConfig, store: RunStore) -> Iterator[str]:
    if config.system is not None:
        yield from (one.ranks.source for one in _measured(config) if one.ranks and store.has(one.run_id))


def _predicted(config: RunConfig) -> RunConfig:
    """The run itself, or if it is measured its twin."""
    return config.model_copy(update={"measure": "predict", "ranks": None}) if config.ranks is not None else config


def _measured(config: RunConfig) -> Iterator[RunConfig]:
    """The run itself, or if it is predicted what would be measured in each place that has a file."""
    if config.ranks is not None:
        yield config
    elif config.measure == "predict":
        for name in PLACES:
            yield config.model_copy(update={"measure": "replay", "ranks": RanksConfig.named(name)})


def _numbers(config: RunConfig, store: RunStore) -> _Numbers | None:
    """Of the iterations that count; None where there is no record of it, or none with AlltoAlls."""
    if not store.is_done(config.run_id):
        return None
    rows: pd.DataFrame = store.read(config.run_id)
    counted = rows[rows["counted"]]
    steps, calls = counted[counted["phase"] == "step"], counted[counted["phase"] == "dispatch"]
    if steps.empty or calls.empty or calls["dimension"].isna().all():
        return None
    net_ms = layer_ms = busiest = slots_gb = float("nan")
    if rows["source"].iloc[0] == "simulated":
        net_ms, slots_gb = float(steps["net_ms"].mean()), float(steps["slots_gb"].max())
        layer_ms = net_ms + float(expert_ms(steps["expert_rows_max"], config.sizes.expert_parameters).mean())
        busiest = float((steps["expert_rows_max"] / steps["expert_rows_mean"]).mean())
        one_ms = calls.groupby("iteration")["predicted_ms"].sum().mean()
    else:
        net_ms = float(steps.groupby("iteration")["net_ms"].max().median())
        one_ms = calls[calls["stage"] == "all"].groupby("iteration")["dispatch_ms"].max().median()
    total_ms, used = float(typical_ms(steps).iloc[0]), ",".join(sorted(dimensions_of(calls).unique()))
    return _Numbers(float(one_ms), total_ms, used, net_ms, layer_ms, busiest, slots_gb)
