"""What others published of systems with copies of experts, as rows with verdicts; they count apart from the paper's."""

from dataclasses import dataclass

from hiermoe.analysis.claims import Rules, load_claims, load_rules
from hiermoe.analysis.frames import Results
from hiermoe.analysis.verdicts import Judged, judge_all
from hiermoe.analysis.wording import cell, in_words, system_labels
from hiermoe.records.project import STATEMENT_RULES, STATEMENTS

ROUTINGS = {  # in the order of the table's columns
    "recorded": "recorded",
    "public": "real model",
    "resampled": "resampled",
    "uniform": "uniform",
    "stress_hot_adjacent": "hot neighbours",
    "stress_rotating": "hot, moving on",
}


@dataclass(frozen=True)
class Statements:
    """A table for the report.

    Attributes:
        columns: routings, for readers.
        rows: source, statement in words, what was published, and a cell for each routing.
        judged: all of them, case by case.
        rules: that they were judged by.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, str, str, tuple[str, ...]], ...]
    judged: tuple[Judged, ...]
    rules: Rules


def statements(results: Results) -> Statements | None:
    """The statements that some run in the arena answers; None where there is no such run.

    Args:
        results: simulated ones.
    """
    claims, rules = load_claims(STATEMENTS), load_rules(STATEMENT_RULES)
    judged = [one for one in judge_all(claims, rules, results) if _is_answered(one)]
    if not any(one.estimate.n for one in judged):
        return None
    labels = system_labels(results)
    found = [routing for routing in ROUTINGS if any(one.routing == routing for one in judged)]
    rows = []
    for claim in claims:
        own = [one for one in judged if one.claim == claim]
        if own:
            cells = tuple(cell([one for one in own if one.routing == routing]) for routing in found)
            said = f"{in_words(claim, labels)}{f' ({claim.note})' if claim.note else ''}"
            rows.append((claim.where, said, claim.published, cells))
    return Statements(tuple(ROUTINGS[routing] for routing in found), tuple(rows), tuple(judged), rules)


def _is_answered(one: Judged) -> bool:
    """Whether its runs are there, though simulation may have no answer."""
    return one.case is not None and not one.case.obstacle
