"""Fig. 13: every dimension with and without deduplication, on four nodes and on one."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from hiermoe.analysis.claims import Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.spec import FigureSpec, Words
from hiermoe.analysis.figures.tables import complete, row_of
from hiermoe.analysis.figures.words import counted, headline, per_routing
from hiermoe.analysis.frames import Results
from hiermoe.analysis.statistics import bootstrap

PLAIN, DEDUPLICATED = ("h2", "h3", "h4"), ("hd1", "hd2", "hd3", "hd4")


def table(results: Results, claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per scheme, cluster and routing: mean time of a step's AlltoAlls, and the dimension used most."""
    rows = []
    for run in results.find("fig13", status="ok"):
        steps = results.rows(run, "step")
        mean = bootstrap(lambda x: x.mean(-1), steps["predicted_ms"].to_numpy(float))
        shares = steps["dimension"].value_counts(normalize=True)
        more = {"dimension": shares.index[0], "dimension_share": shares.iloc[0], "num_ranks": run.num_ranks}
        rows.append(row_of(run, mean, published=float("nan"), **more))
    return complete(pd.DataFrame(rows), {"h1", "h2", "hd1", "hd2", "hd_moe"}, ["cluster", "routing"])


def draw(table: pd.DataFrame, title: str) -> Figure:
    """A panel per cluster, a row per scheme."""
    clusters = table.sort_values("num_ranks", ascending=False)["cluster"].unique()
    figure, panels = style.grid(title, 1, len(clusters), (12, 5.8))
    for panel, cluster in zip(panels, clusters, strict=True):
        rows = table[table["cluster"] == cluster]
        labels = dict(zip(rows["system"], rows["label"], strict=True))
        style.dot_rows(panel, rows, list(labels), labels)
        chosen = rows[rows["system"] == "hd_moe"]
        for _, row in chosen[chosen["routing"] == headline(chosen)].iterrows():
            note = f"d* = {row['dimension']:.0f} in {row['dimension_share']:.0%} of steps"
            style.note(panel, note, (row["value"], len(labels) - 1), (14, 0), va="center")
        panel.set_title(f"{rows['num_ranks'].iloc[0]} GPUs")
        panel.set_xlabel("four AlltoAlls of one layer, ms per step")
        panel.set_xlim(left=0)
    style.legend(figure, table["routing"], with_published=False)
    return figure


def words(table: pd.DataFrame) -> Words:
    """Best plain hierarchy and best deduplicating one against H1, per cluster and routing."""
    best = []
    for (cluster, num_ranks, routing), rows in table.groupby(["cluster", "num_ranks", "routing"], sort=False):
        ms = rows.set_index("system")["value"]
        deduplicated = rows[rows["system"].isin(DEDUPLICATED)].sort_values("value")
        best.append(
            {
                "cluster": cluster, "num_ranks": num_ranks, "routing": routing,
                "plain": ms["h1"] / ms[ms.index.isin(PLAIN)].min(),
                "deduplicated": ms["h1"] / deduplicated["value"].iloc[0],
                "which": deduplicated["label"].iloc[0],
                "gain_over_worst": deduplicated["value"].iloc[-1] / ms["hd_moe"],
            }
        )  # fmt: skip
    summary = pd.DataFrame(best)
    text = [
        f"{ranks} GPUs: the best of the hierarchies without deduplication reaches {per_routing(rows, 'plain')} times "
        f"H1's speed, the best with deduplication ({rows['which'].iloc[0]}) {per_routing(rows, 'deduplicated')}; "
        f"choosing d instead of fixing it badly is worth up to {per_routing(rows, 'gain_over_worst')} times."
        for ranks, rows in summary.groupby("num_ranks", sort=False)
    ]
    lead = summary[summary["routing"] == headline(summary)].sort_values("num_ranks").iloc[-1]
    return Words(
        f"On {lead['routing']} routing and {lead['num_ranks']} GPUs hierarchy alone "
        f"{'does not pay' if lead['plain'] < 1 else 'pays'} ({lead['plain']:.2f}× H1), deduplication "
        f"{'does' if lead['deduplicated'] > 1 else 'does not'} ({lead['which']}: {lead['deduplicated']:.2f}×)",
        "That HD-MoE is the best of HD1 … HD4 holds by construction. Mean over the measured iterations. "
        f"{counted(table)}",
        tuple(text),
    )


FIGURE = FigureSpec("fig13", "Fig. 13: dimensions", "fig13", table, draw, words)
