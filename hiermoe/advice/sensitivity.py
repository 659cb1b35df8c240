"""What would change the answer: the same rules under other constants and fewer tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from hiermoe.advice.assessment import Assessment
from hiermoe.advice.recommendation import STAY_BELOW_GAIN, Recommendation, constants_of, option, recommend
from hiermoe.analysis.others.on_fabric import OnFabric, held_on
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.peers import WORLD, Peers

FEWER_TOKENS = 8  # times
SMALLEST_TOKENS = 16


@dataclass(frozen=True)
class Assumption:
    """One way in which the case may be otherwise.

    Attributes:
        words: what is otherwise.
        cluster: its constants.
        share_of_bytes: of the tokens.
    """

    words: str
    cluster: Cluster
    share_of_bytes: float = 1.0


def assumptions(cluster: Cluster, tokens_per_rank: int) -> Iterator[Assumption]:
    """As given, then one change at a time."""
    deep = cluster.hierarchy.depth > 1
    outer = f"link of a {cluster.levels[0].name}" if deep else "links"
    yield Assumption("as given", cluster)
    yield Assumption(f"{outer} half as fast (β × 2)", _scaled(cluster, outer_beta=2.0))
    yield Assumption(f"{outer} twice as fast (β × 0.5)", _scaled(cluster, outer_beta=0.5))
    if deep:
        yield Assumption(f"links inside a {cluster.levels[0].name} half as fast", _scaled(cluster, inner_beta=2.0))
    yield Assumption("every start-up twice as long (α × 2)", _scaled(cluster, alpha=2.0))
    yield Assumption("flat AlltoAll 20 % faster than modelled", _scaled(cluster, world=0.8))
    if deep and (held := published_times(cluster)) is not None and held.high > 1:
        words = f"other dispatch {held.high:.2f} times as slow as modelled, as some published on this fabric is"
        yield Assumption(words, _scaled(cluster, world=1 / held.high))
    if tokens_per_rank >= FEWER_TOKENS:
        words = f"{tokens_per_rank // FEWER_TOKENS} tokens a GPU, not {tokens_per_rank}"
        yield Assumption(words, cluster, 1 / FEWER_TOKENS)


def published_times(cluster: Cluster) -> OnFabric | None:
    """What others published of this fabric, over what is predicted of it; None where nobody did."""
    return held_on(cluster.name.partition("@")[0])


def _scaled(
    cluster: Cluster, outer_beta: float = 1.0, inner_beta: float = 1.0, alpha: float = 1.0, world: float = 1.0
) -> Cluster:
    """Constants multiplied: of what crosses the outermost level, of what stays inside, start-ups, the flat AlltoAll.

    Those that are derived from data sheets are stated from here on.
    """
    levels = list(cluster.levels)
    for number, level in enumerate(levels[:-1], start=1):
        inter, intra = (cluster.constants(Peers(kind, number)) for kind in ("inter", "intra"))
        beta = outer_beta if number == 1 else inner_beta
        changed = {"inter": inter.times(alpha, beta), "intra": intra.times(alpha, inner_beta)}
        levels[number - 1] = level.model_copy(update=changed)
    flat = cluster.constants(WORLD).times(alpha * world, outer_beta * world)
    wave_ms = None if cluster.wave_ms is None else cluster.wave_ms * alpha
    return cluster.model_copy(update={"world": flat, "levels": tuple(levels), "wave_ms": wave_ms})


def sensitivity(assessment: Assessment, base: Recommendation) -> pd.DataFrame:
    """The answer under every assumption, the first row as given.

    Columns:
        assumption: in words.
        outcome, chosen: what the rules say then.
        flips: whether that is another answer: stay for another dispatcher or the other way round, or unresolved.
        value: speed-up of AlltoAll then, of the system that is recommended (or the fastest) as given.
    """
    case = assessment.case
    rows = []
    for one in assumptions(case.cluster, case.tokens_per_rank):
        options = [
            option(x, one.cluster, one.share_of_bytes, assessment.whole_ms(x, one.cluster, one.share_of_bytes))
            for x in assessment.systems
        ]
        share = assessment.share(one.cluster, one.share_of_bytes)
        found = recommend(options, constants_of(case.cluster), share)
        flat, own = options[0], next(x for x in options if x.name == base.followed)
        rows.append(
            {
                "assumption": one.words,
                "outcome": found.outcome,
                "chosen": found.chosen,
                "flips": _answer(found) != _answer(base),
                "value": own.speedup(flat).value,
            }
        )
    return pd.DataFrame(rows)


def _answer(found: Recommendation) -> str:
    """Which placement or how many stages does not matter here, only whether to leave the flat AlltoAll."""
    return "use" if found.outcome in ("dispatch", "placement") else found.outcome


def tokens_needed(assessment: Assessment, name: str) -> int | None:
    """Fewest tokens a GPU (a power of two) from which on a system saves `STAY_BELOW_GAIN` of the AlltoAll time.

    Bytes are scaled, the unevenness of the routing stays as it is; with fewer tokens it grows.

    Returns:
        The number; None where that many tokens are more than the case has.
    """
    case, tokens = assessment.case, SMALLEST_TOKENS
    while tokens <= case.tokens_per_rank:
        part = tokens / case.tokens_per_rank
        flat, own = (option(x, case.cluster, part) for x in (assessment.flat, assessment.named(name)))
        if 1 - 1 / own.speedup(flat).value >= STAY_BELOW_GAIN:
            return tokens
        tokens *= 2
    return None
