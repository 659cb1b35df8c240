"""The page, the figure and the table of what is predicted of others' measurements."""

from pathlib import Path

import pandas as pd

from hiermoe.analysis.figures.beyond import held_against_others
from hiermoe.analysis.others.foretold import foretell, to_table
from hiermoe.analysis.others.measurement_rules import load_measurement_rules
from hiermoe.analysis.others.published_rows import load_measurements
from hiermoe.analysis.others.trust import Held, Trust
from hiermoe.analysis.render import environment
from hiermoe.analysis.report import small_copy
from hiermoe.records.project import REPORTS
from hiermoe.records.whole_file import write_whole

NAME = "published_measurements"
KIND_WORDS = {
    "ratio": "how many times as fast (ratios)",
    "absolute": "times and bandwidths (absolute)",
    "order": "whole steps",
}


REACH_WORDS = {
    "across": "several nodes",
    "inside": "one node, or one NVLink domain",
    "small": "128 tokens, or up to 1 MiB",
    "unassumed": "all of these whose source states everything",
}
REACH_IN_TITLE = {"across": "between nodes", "inside": "inside a node or rack", "small": "for small messages"}


def hold_against_others() -> Held:
    """Predict every row that can be.

    Raises:
        ValueError: the rows or their rules are broken.
    """
    rules = load_measurement_rules()
    predicted, listed = foretell(load_measurements(), rules)
    return Held.of(predicted, listed, rules)


def write_held(held: Held, folder: Path = REPORTS, how_to_read: str = "../docs/published.md") -> Path:
    """Write published_measurements.md, its table as CSV, and figures/published_measurements.png.

    Returns:
        The page.
    """
    table = to_table(held.predicted)
    write_whole(folder / f"{NAME}.csv", with_listed(table, held).round(6).to_csv(index=False).encode())
    title = title_of(held)
    held_against_others.save(table, title, folder / "figures" / f"{NAME}.png")
    text = (
        environment()
        .get_template(f"{NAME}.md.j2")
        .render(
            title=title,
            lead=in_one_sentence(held),
            how_to_read=how_to_read,
            targets=held.rules.targets,
            verdict=verdict(held.kind("ratio"), held),
            kinds=[one for one in held.kinds if one.name != ("order",)],
            kind_words=KIND_WORDS,
            order=held.kind("order"),
            slower=sum(one.published < 1 for one in held.predicted if one.kind == "order"),
            sources=held.sources,
            fabrics=held.fabrics,
            reaches=[*held.reaches, *filter(None, [held.unassumed])],
            reach_words=REACH_WORDS,
            looks=looks(held),
            second=held.second_look,
            far_off_factor=held.rules.far_off,
            causes=held.causes,
            unexplained=held.unexplained,
            listed=held.listed,
            reasons=held.reasons,
            total=len(held.predicted) + len(held.listed),
        )
    )
    page = folder / f"{NAME}.md"
    write_whole(page, text.encode())
    return page


def write_held_reference(folder: Path = REPORTS) -> Path:
    """The page and its figure, made smaller, for committing."""
    reference = folder / "reference"
    text = (folder / f"{NAME}.md").read_text().replace("(../docs/", "(../../docs/")
    write_whole(reference / f"{NAME}.md", text.encode())
    write_whole(reference / f"{NAME}.csv", (folder / f"{NAME}.csv").read_bytes())
    small_copy(folder / "figures" / f"{NAME}.png", reference / "figures" / f"{NAME}.png")
    return reference / f"{NAME}.md"


def title_of(held: Held) -> str:
    """What the figure shows, as a sentence."""
    medians = [
        f"{words} within {one.median:.2f}"
        for reach, words in REACH_IN_TITLE.items()
        for one in held.reaches
        if one.name[1] == reach
    ]
    if not medians:
        return f"{len(held.predicted)} published measurements and what is predicted of them"
    if (ratio := held.kind("ratio")) is not None:
        medians.append(f"ratios of times within {ratio.median:.2f}")
    return f"Published times are predicted, in the median, {', '.join(medians)}"


def in_one_sentence(held: Held) -> str:
    """The result."""
    parts = [
        f"Of {len(held.predicted) + len(held.listed)} rows that others published, {len(held.predicted)} are predicted"
    ]
    for name, words in (("ratio", "ratios"), ("absolute", "times")):
        if (one := held.kind(name)) is not None:
            across = [f" ({one.median:.2f} between nodes)" for one in held.reaches if one.name == (name, "across")]
            parts.append(
                f"{words} within a factor of {one.median:.2f} in the median{''.join(across)} and {one.most:.2f} in 90 %"
            )
    if (order := held.kind("order")) is not None:
        parts.append(f"which of two systems has the faster step in {order.right} of {len(order.rows)}")
    return f"{parts[0]}: {', '.join(parts[1:])}."


def verdict(ratio: Trust | None, held: Held) -> str:
    """Whether ratio rows are as close as was asked."""
    if ratio is None:
        return "There is no such row."
    targets = held.rules.targets
    met = ratio.median <= targets.median and ratio.within >= targets.share
    found = f"the median is {ratio.median:.2f}, and {100 * ratio.within:.0f} % are within {targets.within:g}"
    return f"{'Both hold' if met else 'That is not reached'}: {found}."


def looks(held: Held) -> list[tuple[str, list[Trust]]]:
    """Rows as predicted, and with the start-up of the second look: absolute ones, then whole steps."""
    second, within = held.second_look, held.rules.targets.within
    if second is None:
        return []
    found = []
    for words, rows in (("as predicted", second.before), ("with the start-up", second.after)):
        of_kind = {kind: [one for one in rows if one.kind == kind] for kind in ("absolute", "order")}
        found.append((words, [Trust.of((kind,), some, within) for kind, some in of_kind.items() if some]))
    return found


def with_listed(table: pd.DataFrame, held: Held) -> pd.DataFrame:
    """The rows that are predicted, then the others with the reason why they are not."""
    listed = pd.DataFrame([{"id": one.row.id, "source": one.row.source, "reason": one.reason} for one in held.listed])
    return pd.concat([table, listed], ignore_index=True)
