"""Placement policies under the same dispatch: time over iterations, gain on held-out tokens, moves, bounds."""

import math
from collections.abc import Iterator, Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.figures.tables import complete, over_fixed, published, unmoved
from hiermoe.analysis.figures.words import ROUTING_WORDS, headline, per_model, saves, span
from hiermoe.analysis.frames import Results, Run
from hiermoe.analysis.whole_step import FULL_STATE_AT_LINK
from hiermoe.analysis.wording import with_interval
from hiermoe.planner.bounds import any_placement_rows, busiest_rows

FIXED = "hd_moe"  # HierD-AlltoAll, experts fixed
SMART = ("smartmoe", "hd2_moe_smart", "hd_moe_smart")  # one policy, each under another dispatch


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per system, model, routing and iteration; rows of GPUs are per token that a GPU holds."""
    parts = []
    for run in results.find("placement", status="ok"):
        fixed = unmoved(run, "placement", results)
        if fixed is not None:
            moving, still = (
                published(claims, where="Fig. 11", system=s, model=run.config.model.name, baseline="megatron")[0]
                for s in ("hiermoe", "hd_moe")
            )
            parts.append(_iterations(run, fixed, results).assign(published_gain=moving / still))
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    return complete(table, {FIXED, "hiermoe"}, ["model", "routing"])


def _hierd(table: pd.DataFrame) -> pd.DataFrame:
    """Placements under HierD-AlltoAll."""
    return table[table["fixed"] == FIXED]


def _iterations(run: Run, fixed: Run, results: Results) -> pd.DataFrame:
    steps, static, routing, stages = (
        results.rows(*of, counted_only=False).set_index("iteration")
        for of in ((run, "step"), (fixed, "step"), (run, "routing"), (run, "dispatch"))
    )
    hierarchy, config = run.config.cluster.hierarchy, run.config
    tokens = steps["pairs"] / config.model.topk
    held = tokens / hierarchy.num_ranks
    columns = ["routing_iteration", "counted", "dimension", "predicted_ms", "moved_experts"]
    found = steps[[*columns, "modelled_gain_ms", "recounted_gain_ms", "realised_gain_ms"]].assign(
        source=run.source,
        system=run.system,
        label=config.system.label,
        fixed=fixed.system,
        dispatch=fixed.config.system.label,
        model=config.model.name,
        routing=run.routing,
        router_groups=config.model.router.num_groups or 0,
        static_ms=static["predicted_ms"],
        migration_ms=FULL_STATE_AT_LINK.of(steps),
    )
    outer = stages[stages["stage"].str.endswith("inter1")]["rows"]
    for name, level, busiest in (
        ("node", 1, outer.reindex(steps.index)),
        ("gpu", hierarchy.depth, stages["rows"].groupby(level=0).last()),
    ):
        distinct = routing.loc[routing["dimension"] == level, "rows"]
        bound = [
            any_placement_rows(int(n), config.model.topk, config.model.num_experts, hierarchy, level) for n in tokens
        ]
        found[f"{name}_rows"] = distinct / tokens
        found[f"{name}_rows_any_placement"] = bound / tokens
        found[f"busiest_{name}_rows"] = busiest / held
        found[f"busiest_{name}_rows_even"] = [busiest_rows(int(n), hierarchy.num_ranks) for n in distinct] / held
    return found.reset_index()


def draw(table: pd.DataFrame, title: str) -> Figure:
    """A column per model, on its leading routing: time, and time over that with experts fixed."""
    models = list(per_model(_hierd(table)))
    figure, panels = style.grid(title, 2, len(models), (12, 8), sharex=True)
    names: dict[str, str] = {}
    for (model, rows), upper, lower in zip(models, panels[: len(models)], panels[len(models) :], strict=True):
        window = rows.loc[rows["counted"], "iteration"]
        for panel in (upper, lower):
            panel.axvspan(window.min() - 0.5, window.max() + 0.5, color="#EFEFEF", zorder=0)
            panel.set_xlim(-1, rows["iteration"].max() + 1)
        for system, line in rows.groupby("system", sort=False):
            names[str(system)], tone = style.placement(str(system))
            look = {"color": tone, "linewidth": 2.4 if system == "hiermoe_multi" else 1.9}
            upper.plot(line["iteration"], line["predicted_ms"], **look)
            lower.plot(line["iteration"], line["predicted_ms"] / line["static_ms"], **look)
        upper.set_title(f"{model}, {style.ROUTINGS[rows['routing'].iloc[0]][1]}")
        lower.set_xlabel("iteration")
    panels[0].set_ylabel("four AlltoAlls of one layer, ms\n(axis does not start at 0)")
    panels[len(models)].set_ylabel("the same over fixed experts")
    lines = [
        Line2D([], [], color=style.placement(system)[1], linewidth=2.4, label=name) for system, name in names.items()
    ]
    style.legend(figure, [], with_published=False, extra=lines)
    return figure


def words(table: pd.DataFrame) -> Words:
    """Who gains what on held-out tokens, for how many moves, and how far that is from the bounds."""
    held_out = table[table["counted"]]
    lead = headline(table)
    paragraphs = [" ".join(_of_model(model, rows, table)) for model, rows in per_model(held_out)]
    paragraphs += [" ".join(_smart_elsewhere(held_out)), " ".join([*_on_uniform(held_out), *_certainty(table)])]
    paragraphs.append(" ".join(_bounds(held_out)))

    def gains(system: str) -> str:
        rows = held_out[(held_out["routing"] == lead) & (held_out["system"] == system)]
        return " and ".join(
            f"{over_fixed(own).value:.3f}× ({style.model(str(model))})"
            for model, own in rows.groupby("model", sort=False)
        )

    smart = f", SmartMoE placement {gains('hd_moe_smart')}" if "hd_moe_smart" in set(held_out["system"]) else ""
    return Words(
        f"On held-out {lead} routing HierD-ES makes AlltoAll {gains('hiermoe')} as fast as with experts fixed{smart}",
        "The same dispatch (HierD-AlltoAll) under every placement. Shaded: the held-out iterations, "
        f"n = {span(held_out.groupby(['model', 'routing'])['iteration'].nunique(), 0)}, on tokens that no decision has "
        "seen; the policies go on deciding there, each for the next step. Below: intervals are 95 % over held-out "
        "iterations (block bootstrap, paired), rows are per token that a GPU holds, migration is full state at the "
        "link's rate. Predicted times, nothing measured.",
        ("\n\n".join(filter(None, paragraphs)),),
        tuple(_summary(table)),
    )


def _saved(rows: pd.DataFrame) -> float:
    return float((rows["static_ms"] - rows["predicted_ms"]).mean())


def _of_model(model: str, rows: pd.DataFrame, table: pd.DataFrame) -> Iterator[str]:
    """What the policies gain and cost on the leading routing, beside the published gain."""
    routing = rows["routing"].iloc[0]
    policies = {str(s): own for s, own in _hierd(rows).groupby("system", sort=False) if s != FIXED}
    known = rows["published_gain"].iloc[0]
    yield (
        f"{model}, {ROUTING_WORDS[routing]} routing: HierD-ES over fixed experts is "
        f"{with_interval(over_fixed(policies['hiermoe']))}, published {known:.3f} (Fig. 11)."
    )
    if not any(over_fixed(own).low > 1 for own in policies.values()):
        promised_ms = policies["hiermoe"]["modelled_gain_ms"].mean()
        promise = f", though a swap promised {promised_ms:.2f} ms a step on the tokens that it was chosen from"
        yield f"No policy is faster than experts left in order{promise if promised_ms > 0 else ''}."
        return
    yield "A step and layer: " + "; ".join(
        f"{style.placement(system)[0]} {saves(_saved(own))} and moves {own['moved_experts'].mean():.1f} experts, for "
        f"{own['migration_ms'].mean():.2f} ms"
        for system, own in policies.items()
    ) + "."  # fmt: skip
    net = {system: _saved(own) - own["migration_ms"].mean() for system, own in policies.items()}
    best = max(net, key=net.__getitem__)
    yield f"Net of migration {style.placement(best)[0]} comes out best, with {net[best]:+.2f} ms."
    own = table[
        (table["system"] == "hiermoe") & (table["routing"] == routing) & (table["model"] == rows["model"].iloc[0])
    ]
    yield from _returns(own)


def _returns(own: pd.DataFrame) -> Iterator[str]:
    """What happens where a run goes back to the first recorded step."""
    over_fixed = (own["predicted_ms"] / own["static_ms"]).to_numpy()
    back = [i for i, step in enumerate(own["routing_iteration"].diff()) if step < 0 and 4 <= i <= len(own) - 4]
    rises = [100 * (over_fixed[i : i + 4].mean() - over_fixed[i - 4 : i].mean()) for i in back]
    if rises and min(rises) > 0:
        where = " and ".join(str(own["iteration"].iloc[i]) for i in back)
        yield (
            f"Where the run goes back to the first recorded step, at iteration {where}, HierD-ES's time over fixed "
            f"experts rises by {span(rises, 1)} percentage points (mean of four steps): part of what a placement gains "
            "is for the routing of its time only."
        )


def _smart_elsewhere(held_out: pd.DataFrame) -> Iterator[str]:
    """SmartMoE's placement under each dispatch, and what it does to what tokens need."""
    for model, rows in per_model(held_out):
        parts = ", ".join(
            f"{over_fixed(own).value:.3f} under {own['dispatch'].iloc[0]}'s"
            for system in SMART
            if len(own := rows[rows["system"] == system])
        )
        if parts:
            yield f"SmartMoE's placement on {model}, over fixed experts with the same dispatch: {parts}."
        needs = rows.groupby("system")["node_rows"].mean()
        if "hd_moe_smart" in needs and needs["hd_moe_smart"] > 1.01 * needs["hd_moe"]:
            why = ", since its router takes experts of few groups of neighbours, which experts in order keep together"
            yield (
                f"Packed by token counts, a token's experts are on {needs['hd_moe_smart']:.2f} nodes instead of "
                f"{needs['hd_moe']:.2f}{why if rows['router_groups'].iloc[0] else ''}."
            )


def _on_uniform(held_out: pd.DataFrame) -> Iterator[str]:
    rows = held_out[(held_out["routing"] == "uniform") & held_out["system"].str.startswith("hiermoe")]
    if len(rows) and headline(held_out) != "uniform":
        gains = [over_fixed(own).value for _, own in rows.groupby(["model", "system"])]
        moved = rows.groupby(["model", "system"])["moved_experts"].mean()
        yield (
            f"On uniform routing there is nothing to learn: HierD-ES and its variants are {span(gains, 3)} over fixed "
            f"experts, and still move {span(moved, 1)} experts a step: a gate that weighs the gain on one step's "
            "tokens against the migration lets noise pass."
        )


def _certainty(table: pd.DataFrame) -> Iterator[str]:
    """How much of what several swaps save their model sees."""
    known = table.dropna(subset=["recounted_gain_ms"])
    if len(known):
        share = known["modelled_gain_ms"].sum() / known["recounted_gain_ms"].sum()
        each = known["modelled_gain_ms"] / known["recounted_gain_ms"]
        yield (
            f"Several swaps in one update ({len(known)} updates, all routings): their gain is modelled from counts of "
            "pairs of experts, exact where no group exchanges more than one expert, else from an upper bound on what "
            f"groups need. In sum the model saw {share:.0%} of what a recount of the same tokens finds (in one update "
            f"{each.min():.0%} to {each.max():.0%})."
        )


def _bounds(held_out: pd.DataFrame) -> Iterator[str]:
    """How far the fastest placement is from what no placement can beat."""
    for model, rows in per_model(_hierd(held_out)):
        means = {str(system): own.mean(numeric_only=True) for system, own in rows.groupby("system")}
        fastest = min(means, key=lambda system: means[system]["predicted_ms"])
        best, fixed = means[fastest], means[FIXED]
        text = (
            f"{model}: under the fastest placement ({style.placement(fastest)[0]}) a token needs "
            f"{best['node_rows']:.2f} nodes, under no placement less than {best['node_rows_any_placement']:.0f} (a "
            "loose bound, for which all experts of every token are neighbours)"
        )
        if fastest != FIXED:
            text += f", with experts fixed {fixed['node_rows']:.2f}"
        between, last = (
            [x[f"busiest_{where}_rows"] / x[f"busiest_{where}_rows_even"] for x in (best, fixed)]
            for where in ("node", "gpu")
        )
        if not math.isnan(between[0]):
            text += (
                f". The busiest GPU gets {_beside_fixed(between, fastest)} times an even share of that between nodes"
            )
        yield (
            f"{text}, and {_beside_fixed(last, fastest)} times an even share of the last stage's rows: so much perfect "
            "balance could still save."
        )


def _beside_fixed(best_and_fixed: list[float], fastest: str) -> str:
    best, fixed = best_and_fixed
    return f"{best:.3f}" if fastest == FIXED else f"{best:.3f} (fixed {fixed:.3f})"


def _summary(table: pd.DataFrame) -> Iterator[tuple[str, ...]]:
    """The table below the figure."""
    yield (
        "model", "routing", "placement", "ms a step", "speed-up over fixed experts", "updates, experts moved",
        "of them held-out", "gain an update modelled, realised in the next step, ms", "migration, ms a step",
        "nodes a token needs (bound)",
        "busiest GPU's rows between nodes (even share)", "in the last stage (even share)",
    )  # fmt: skip
    for (model, routing, system), rows in _hierd(table).groupby(["model", "routing", "system"], sort=False):  # type: ignore[misc]
        late = rows[rows["counted"]]
        moved, moved_late = rows["moved_experts"], late["moved_experts"]
        yield (
            style.model(str(model)),
            ROUTING_WORDS[str(routing)],
            style.placement(str(system))[0],
            f"{late['predicted_ms'].mean():.2f}",
            "1" if system == FIXED else with_interval(over_fixed(late)),
            f"{(moved > 0).sum()}, {moved.sum():.0f}",
            f"{(moved_late > 0).sum()}, {moved_late.sum():.0f}",
            _gains(rows),
            f"{late['migration_ms'].mean():.2f}",
            f"{late['node_rows'].mean():.2f} ({late['node_rows_any_placement'].mean():.0f})",
            f"{late['busiest_node_rows'].mean():.2f} ({late['busiest_node_rows_even'].mean():.2f})"
            if late["busiest_node_rows"].notna().all()
            else "no such stage",
            f"{late['busiest_gpu_rows'].mean():.2f} ({late['busiest_gpu_rows_even'].mean():.2f})",
        )


def _gains(rows: pd.DataFrame) -> str:
    """Means over all updates; the model is of the tokens that the update was decided from."""
    updates = rows.dropna(subset=["realised_gain_ms"])
    if updates.empty:
        return ""
    modelled = updates["modelled_gain_ms"].mean()
    return f"{'no model' if math.isnan(modelled) else f'{modelled:.3f}'}, {updates['realised_gain_ms'].mean():.3f}"


FIGURE = FigureSpec("placement", "Placement: what each policy gains", "placement", table, draw, words)
