"""What several runs of one command came to, side by side: the table that `hiermoe run -m` ends with."""

import json
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
        return self.slots_gb > 0 or self.net_ms > self.total_ms


def run_all_and_print(composed: Sequence[Composed]) -> list[Composed]:
    """Run and print what could be composed: what differs in its system alone interleaved, if it is measured.

    None ends the others.

    Returns:
        The same, each with what went wrong.
    """
    console, said = Console(highlight=False, soft_wrap=True), dict[str, str]()
    for one in composed:
        if one.error:
            console.print(f"[red]failed[/red] {escape(' '.join(one.overrides))}: {escape(one.error)}")

    def attempt(run: Callable[..., None], *configs: RunConfig) -> None:
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
    console.print(comparison(ended, store))


def comparison(ended: Sequence[Composed], store: RunStore) -> Table:
    """One line a run: what varied, then predicted and measured numbers, which never share a column.

    A predicted run has the measured one of its setting beside it where the store has that, and the other way round.

    Args:
        ended: runs in their order.
        store: where their records are.
    """
    lines = [(one, *_both(one, store)) for one in ended]
    kinds = [kind for i, kind in enumerate(("predicted", "measured"), start=1) if any(line[i] for line in lines)]
    look = {"box": box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(title="All runs", title_justify="left", caption_justify="left", **look)
    table.add_column("what varied", overflow="fold")
    has_copies = any(numbers is not None and numbers.has_copies for _, *both in lines for numbers in both)
    whats = ("one\nAlltoAll", "four,\ntotal", "times\nas fast")[has_copies:]  # one is a fourth of four
    for kind in kinds:
        table.add_column("d*", justify="right", no_wrap=True)
        for what in whats:
            table.add_column(f"{kind if what[0] == 'f' else ''}\n{what}", justify="right", no_wrap=True)
        if has_copies and kind == "measured":
            table.add_column("\n\nnet", justify="right", no_wrap=True)
    if has_copies:
        for what in ("net\nms", "with\nexperts", "rows,\nmost /\nmean", "slots,\nGB"):
            table.add_column(what, justify="right", no_wrap=True)
    common = set.intersection(*(set(one.overrides) for one in ended)) if len(ended) > 1 else set[str]()
    first: dict[tuple[str, str], float] = {}  # total of the first system, by kind and setting
    for one, *numbers in lines:
        cells = []
        for kind, found in zip(("predicted", "measured"), numbers, strict=True):
            if kind in kinds and found is None:
                cells += [""] * (1 + len(whats) + (has_copies and kind == "measured"))
            elif found is not None:
                base = first.setdefault((kind, _setting(one)), found.total_ms)
                ms = (f"{found.alltoall_ms:.2f}", f"{found.total_ms:.2f}", f"{base / found.total_ms:.2f}")
                net = [f"{found.net_ms:.2f}"] if has_copies and kind == "measured" else []
                cells += [found.dimensions, *ms[has_copies:], *net]
        if has_copies:
            predicted = numbers[0]
            ends = predicted and (predicted.net_ms, predicted.layer_ms, predicted.busiest, predicted.slots_gb)
            cells += [f"{value:.2f}" for value in ends] if ends else [""] * 4
        table.add_row(escape(" ".join(x.partition("=")[2] for x in one.overrides if x not in common) or "-"), *cells)
    sources = sorted({s for one in ended if one.config is not None for s in _measured_sources(one.config, store)})
    table.caption = "ms; four: the four AlltoAlls of a step and layer, " + (
        f"mean of predicted, median of measured times of the busiest rank ({', '.join(sources)})"
        if "measured" in kinds
        else "mean of the iterations that count"
    )
    table.caption += ". Times as fast: as the first system of the same setting."
    if has_copies:
        table.caption += (
            " Net: the four, weights sent to copies of experts and gradients sent back, predicted at the rate of the "
            "link, measured one after the other, both as if nothing hid them; moves of experts to another home are not "
            f"in it. With experts: and those of the busiest GPU, at {TFLOPS:g} TFLOP/s, an assumption. Rows: expert "
            "rows of that GPU "
            "over the mean. Slots: weights, gradients and training state of copies, at a GPU, all layers."
        )
    for one in ended:
        if why := one.error or _not_applicable(one, store):
            table.caption += f"\n{escape(' '.join(one.overrides))}: {escape(why)}"
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
    used = sorted(int(d) for d in calls["dimension"].dropna().unique())
    total_ms, dimensions = float(typical_ms(steps).iloc[0]), ",".join(map(str, used))
    return _Numbers(float(one_ms), total_ms, dimensions, net_ms, layer_ms, busiest, slots_gb)
