"""Searched placements beside one swap a step: held-out time against updates, and what no placement can beat."""

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.figures.tables import complete, over_fixed
from hiermoe.analysis.figures.words import per_model, saves, span
from hiermoe.analysis.frames import Results, Run
from hiermoe.analysis.whole_step import FULL_STATE_AT_LINK
from hiermoe.analysis.wording import with_interval

SWEEP, BOUND_SWEEP = "search", "search_bound"
BOUND = "no placement beats"


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per system, model, length of the run and held-out iteration."""
    parts = []
    for run in results.find(SWEEP, status="ok"):
        same = {key: run.value(key) for key in ("model", "routing", "iterations")}
        fixed = results.find(SWEEP, system="hd_moe", status="ok", **same)
        bound = results.find(BOUND_SWEEP, status="ok", model=same["model"], routing=same["routing"])
        if fixed and bound:
            parts.append(_held_out(run, fixed[0], bound[0], results))
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    return complete(table, {"hd_moe", "hiermoe", "hiermoe_search"}, ["model", "routing"])


def _held_out(run: Run, fixed: Run, bound: Run, results: Results) -> pd.DataFrame:
    steps, static, least = (
        results.rows(of, "step", counted_only=False).set_index("iteration") for of in (run, fixed, bound)
    )
    least_ms = least[least["counted"]].set_index("routing_iteration")["predicted_ms"]
    late, early = steps[steps["counted"]], steps[~steps["counted"]]
    moved = early["moved_experts"]
    return (
        late[["routing_iteration", "predicted_ms", "moved_experts"]]
        .assign(
            source=run.source,
            system=run.system,
            model=run.config.model.name,
            routing=run.routing,
            router_groups=run.config.model.router.num_groups or 0,
            iterations_before=len(early),
            updates_before=float((moved > 0).sum()),
            moved_before=float(moved.sum()),
            largest_before=float(moved.max()),
            migration_before_ms=float(FULL_STATE_AT_LINK.of(early).sum()),
            migration_ms=FULL_STATE_AT_LINK.of(late),
            static_ms=static.loc[late.index, "predicted_ms"],
            bound_ms=late["routing_iteration"].map(least_ms),
        )
        .reset_index()
    )


def draw(table: pd.DataFrame, title: str) -> Figure:
    """A column per model: time over that with experts fixed against updates; then all times from 0, with the bound."""
    models = list(per_model(table))
    figure, panels = style.grid(title, 2, len(models), (12, 8.4), height_ratios=(1, 1.05))
    upper, lower = panels[: len(models)], panels[len(models) :]
    for (model, rows), above, below in zip(models, upper, lower, strict=True):
        _against_updates(above, rows)
        above.set_title(f"{model}, {style.ROUTINGS[rows['routing'].iloc[0]][1]}")
        _from_zero(below, rows)
    for panel in upper[1:]:
        panel.sharey(upper[0])
    upper[0].set_ylabel("held-out AlltoAll time\nover experts fixed (axis not from 0)")
    return figure


def _against_updates(panel: Axes, rows: pd.DataFrame) -> None:
    """A line per policy that updates again and again, a star for the one search; SmartMoE would hide them."""
    means = _means(rows[~rows["system"].isin(["hd_moe", "hd_moe_smart"])])
    means["over_fixed"] = means["predicted_ms"] / means["static_ms"]
    fixed, grey = style.placement("hd_moe")
    panel.axhline(1, color=grey, linewidth=1.5, linestyle=(0, (4, 2)))
    for system, every in means.groupby("system", sort=False):
        name, tone = style.placement(str(system))
        own = every.sort_values("updates_before")
        if system == "hiermoe_search":
            panel.plot(own["updates_before"], own["over_fixed"], "*", color=tone, markersize=16, zorder=5, label=name)
        else:
            line = [0.0, *own["updates_before"]], [1.0, *own["over_fixed"]]
            panel.plot(*line, "-o", color=tone, markersize=7, zorder=4, label=name)
    panel.plot(0, 1, "o", color=grey, markersize=9, zorder=6, label=fixed)
    panel.set_xlabel("updates before the held-out steps")
    panel.margins(x=0.06, y=0.12)
    if panel.get_subplotspec().is_first_col():  # type: ignore[union-attr]
        panel.legend(loc="best", fontsize=11)


def _from_zero(panel: Axes, rows: pd.DataFrame) -> None:
    shown: dict[str, tuple[float, dict[str, Any]]] = {}
    for row in _means(rows).to_dict("records"):
        name, tone = style.placement(row["system"])
        after = f" after {row['updates_before']:.0f}" if row["system"] == "hiermoe" else ""
        shown.setdefault(name + after, (row["predicted_ms"], {"color": tone}))  # of equal names the shortest run
    shown[BOUND] = float(rows["bound_ms"].mean()), {"color": "#DDDDDD", "hatch": "///", "edgecolor": "#888888"}
    for position, (time_ms, look) in enumerate(shown.values()):
        panel.barh(position, time_ms, height=0.66, **look)
        panel.text(time_ms, position, f" {time_ms:.1f}", va="center", fontsize=11.5)
    panel.set_yticks(range(len(shown)), list(shown))
    panel.invert_yaxis()
    panel.set_xlim(0, 1.17 * max(time_ms for time_ms, _ in shown.values()))
    panel.grid(axis="y", visible=False)
    panel.set_xlabel("four AlltoAlls of a held-out step, ms")


def _means(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per system and length of the run, in the order of the sweep, shorter runs first."""
    means = rows.groupby(["system", "iterations_before"], as_index=False).mean(numeric_only=True)
    order = list(rows["system"].unique())
    return means.sort_values("system", key=lambda x: x.map(order.index), kind="stable")


def words(table: pd.DataFrame) -> Words:
    """What search gains over one swap a step, what moving costs, and how much could be left."""
    models = dict(per_model(table))
    searches = {model: over_fixed(_of(rows, "hiermoe_search")).value for model, rows in models.items()}
    gains = " and ".join(f"{gain:.3f}× ({model})" for model, gain in searches.items())
    longest = [_of(rows, "hiermoe", longest=True) for rows in models.values()]
    swaps = " and ".join(f"{over_fixed(rows).value:.3f}×" for rows in longest)
    updates = span([rows["updates_before"].iloc[0] for rows in longest], 0)
    paragraphs = ["".join(_of_model(model, rows)) for model, rows in models.items()]
    return Words(
        f"One searched migration makes held-out AlltoAll {gains} as fast as experts left in order; HierD-ES after "
        f"{updates} swaps {swaps}",
        "The same dispatch (HierD-AlltoAll) under every placement, on "
        f"n = {span(table.groupby(['model', 'system', 'iterations_before'])['iteration'].nunique(), 0)} held-out steps "
        "that no decision has seen when it acts; all but the one search go on deciding there. Above: each point is a "
        f"run with so many updates before them. Below: runs with {table['iterations_before'].min()} iterations before "
        "them, of HierD-ES all, by updates, and a lower bound. "
        "Predicted times, nothing measured.",
        (
            *paragraphs,
            "The bound holds for every placement, even one made anew for each step's own tokens: every expert takes "
            "the mates that suit its tokens best, whether or not they take it, and fractions of mates, and all GPUs "
            "have equal shares of a stage's rows. So it is loose: what lies between it and the best placement found is "
            "the most that could be left, not what is.",
        ),
        tuple(_summary(table)),
    )


def _of(rows: pd.DataFrame, system: str, longest: bool = False) -> pd.DataFrame:
    """Held-out steps of one system's shortest or longest run."""
    own = rows[rows["system"] == system]
    length = own["iterations_before"].max() if longest else own["iterations_before"].min()
    return own[own["iterations_before"] == length]


def _of_model(model: str, rows: pd.DataFrame) -> Iterator[str]:
    search = _of(rows, "hiermoe_search")
    saved_ms = float((search["static_ms"] - search["predicted_ms"]).mean())
    yield f"{model}: over fixed experts the searched placement is {with_interval(over_fixed(search))}"
    swaps = [_of(rows, "hiermoe", longest) for longest in (False, True)]
    yield "; HierD-ES is " + " and ".join(
        f"{over_fixed(own).value:.3f} after {own['updates_before'].iloc[0]:.0f} updates" for own in swaps
    )
    for system in ("hiermoe_search_online", "hd_moe_smart"):
        if system in set(rows["system"]):
            yield f", {style.placement(system)[0]} {over_fixed(_of(rows, system)).value:.3f}"
    yield "."
    if over_fixed(search).low <= 1:
        yield " That is no gain that these steps can tell from none."
    groups = rows["router_groups"].iloc[0]
    if groups and saved_ms < 0.02 * float(search["static_ms"].mean()):
        yield (
            f" Its router takes experts of few of {groups:.0f} groups of neighbours, which experts in order keep "
            "together already."
        )
    cost_ms, moved = search["migration_before_ms"].iloc[0], search["moved_before"].iloc[0]
    if over_fixed(search).low > 1:
        yield (
            f" The search moves {moved:.0f} experts once, {cost_ms:.0f} ms of full state at the link's rate, which "
            f"{cost_ms / saved_ms:.0f} steps pay back"
        )
        late = _of(rows, "hiermoe", longest=True)
        gain_ms = float((late["static_ms"] - late["predicted_ms"]).mean())
        yield (
            f"; HierD-ES goes on moving {late['moved_experts'].mean():.1f} experts a step for "
            f"{late['migration_ms'].mean():.2f} ms and {saves(gain_ms)} of AlltoAll by it."
        )
    best_ms = _means(rows)["predicted_ms"].min()
    yield (
        f" No placement gets below {rows['bound_ms'].mean():.1f} ms: the best one found is at most "
        f"{best_ms / rows['bound_ms'].mean():.2f} times what is possible."
    )


def _summary(table: pd.DataFrame) -> Iterator[tuple[str, ...]]:
    """The table below the figure."""
    yield (
        "model", "placement", "iterations before", "updates", "experts moved", "at most at once", "held-out ms a step",
        "speed-up over fixed experts", "migration, ms: before in all", "then a step", "over the bound",
    )  # fmt: skip
    for (model, system, length), rows in table.groupby(["model", "system", "iterations_before"], sort=False):  # type: ignore[misc]
        first = rows.iloc[0]
        yield (
            style.model(str(model)),
            style.placement(str(system))[0],
            f"{length}",
            f"{first['updates_before']:.0f}",
            f"{first['moved_before']:.0f}",
            f"{first['largest_before']:.0f}",
            f"{rows['predicted_ms'].mean():.2f}",
            "1" if system == "hd_moe" else with_interval(over_fixed(rows)),
            f"{first['migration_before_ms']:.0f}",
            f"{rows['migration_ms'].mean():.2f}",
            f"{rows['predicted_ms'].mean() / rows['bound_ms'].mean():.2f}",
        )


FIGURE = FigureSpec("search", "Placement: search beside one swap a step", SWEEP, table, draw, words)
