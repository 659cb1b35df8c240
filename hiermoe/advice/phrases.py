"""The answer in plain words: headline, conditions, titles of figures. All of it from the tables."""

import math
from collections.abc import Iterator

from hiermoe.advice.answer_tables import Answer, exchange_words, groups_of
from hiermoe.advice.assessment import FEWEST_FOR_INTERVALS, Assessed
from hiermoe.advice.recommendation import HORIZON_STEPS
from hiermoe.analysis.whole_step import PUBLISHED_SHARES, step_speedup
from hiermoe.planner.scheme import DispatchScheme

CONSTANTS = {
    "calibrated": "α and β were measured on this cluster (`hiermoe calibrate`).",
    "published": "α and β are the ones published for the paper's testbed, not measured on your cluster: run `hiermoe "
    "calibrate`.",
    "data sheet": "α and β come from data sheets; nobody has calibrated them: run `hiermoe calibrate`.",
    "derived": "Some of α and β are derived from others, not measured: run `hiermoe calibrate`.",
}
LEAVES_OUT = (
    "Left out: overlap of AlltoAll with compute or with itself, contention with other traffic, packing, kernel time.\n"
    "Every time is α + n·β of the busiest GPU's exact rows; speed-ups measured on emulated clusters were as predicted "
    "or smaller, the smaller the more ranks shared a core."
)


def headline(answer: Answer) -> str:
    """The recommendation and what to expect of it."""
    own = answer.assessment.named(answer.followed)
    speedup = f"{own.speedup.value:.2f}×{answer.mark}{_interval(answer, own)}"
    if answer.found.outcome == "stay":
        return f"Stay with the flat AlltoAll: the fastest alternative, {_named(own)}, makes it {speedup} as fast."
    if answer.found.outcome == "unresolved":
        return (
            f"What {_named(own)} gains here is within what the model cannot resolve: AlltoAll {speedup} as fast is "
            "predicted. Calibrate the cluster and measure before you change anything."
        )
    return f"{_advice(answer, own)} Expect AlltoAll to be {speedup} as fast{_step(answer)}."


def why(answer: Answer) -> str:
    """The rule that ended the ladder."""
    return f"Why: {answer.found.why}."


def _named(own: Assessed) -> str:
    also = own.candidate.labels[1:]
    return own.candidate.label + (f" (to this model the same as {', '.join(also)})" if also else "")


def _advice(answer: Answer, own: Assessed) -> str:
    schemes = own.candidate.schemes
    if len(schemes) == 1:
        dispatch = f"{schemes[0].name if schemes[0].deduplicates else own.candidate.label} dispatch"
    else:
        dimensions = own.held_out.dimensions(answer.assessment.case.cluster)
        chosen = [scheme.name for scheme in schemes if scheme.dimension in dimensions]
        dispatch = f"{' or '.join(chosen)} dispatch, whichever each step's routing makes cheaper,"
        if len(chosen) == 1:
            dispatch = f"{chosen[0]} dispatch"
    if [scheme.stages for scheme in schemes] == [x.stages for x in answer.assessment.flat.candidate.schemes]:
        dispatch = "the flat AlltoAll that you have"
    where = _stages(answer, schemes if len(schemes) == 1 else [s for s in schemes if f"{s.name} dispatch" == dispatch])
    if not own.candidate.moves:
        others = [label for label in own.candidate.labels if label != schemes[0].name]
        names = f" (system {', '.join(others)})" if others else ""
        return f"Use {dispatch}{where}, and leave the experts where they are{names}."
    last = own.updates.iloc[-1]
    updates = f"{last['updates']:.0f} updates" if last["updates"] > 1 else "one update"
    pays = last["break_even_steps"]
    gain = f"{last['value']:.2f}×{answer.mark} the speed of the same dispatch with fixed experts"
    cost = (
        "moves nothing"
        if not last["moved_ms"]
        else f"costs {_ms(last['moved_ms'])} a layer once and has paid after {pays:.0f} steps"
    )
    if math.isinf(pays):
        cost = f"costs {_ms(last['moved_ms'])} a layer once"
    return (
        f"Use {dispatch}{where}, and place experts by {own.candidate.label}: {updates} in "
        f"{last['step']:.0f} steps bring{'' if last['updates'] > 1 else 's'} {gain}; moving them {cost}."
    )


def _stages(answer: Answer, schemes: list[DispatchScheme] | tuple[DispatchScheme, ...]) -> str:
    """How one scheme's stages go, in brackets."""
    if len(schemes) != 1:
        return ""
    scheme = schemes[0]
    stages = ", then ".join(exchange_words(stage.peers, answer.assessment) for stage in scheme.stages)
    once = "a token once per group" if scheme.deduplicates else "a copy per expert"
    return f" ({stages}; {once})"


def _interval(answer: Answer, own: Assessed) -> str:
    if not answer.assessment.has_intervals:
        return ""
    return f" [{own.speedup.low:.2f}, {own.speedup.high:.2f}]"


def _step(answer: Answer) -> str:
    """What the step gains, at the user's share or over the paper's range."""
    communication, share = answer.communication(answer.followed), answer.assessment.case.share
    if share is not None:
        return (
            f", and the step {step_speedup(share, communication):.2f}×{answer.mark} with AlltoAll at {share:.0%} of it"
        )
    low, high = (float(step_speedup(share, communication)) for share in PUBLISHED_SHARES)
    return (
        f", and the step {low:.2f} to {high:.2f}×{answer.mark} if AlltoAll is {PUBLISHED_SHARES[0]:.0%} to "
        f"{PUBLISHED_SHARES[1]:.0%} of it"
    )


def conditions(answer: Answer) -> Iterator[str]:
    """What the answer rests on, and what it cannot know."""
    assessment, case = answer.assessment, answer.assessment.case
    yield CONSTANTS[answer.constants]
    yield (
        f"With such constants a predicted gain counts from {answer.found.resolution:.0%} on, and a migration must "
        f"pay within {HORIZON_STEPS} steps."
    )
    if case.kind == "loads":
        yield (
            f"{answer.mark} Only loads are known. Experts are drawn independently with these loads (met within a few "
            "per cent). Which experts fire together, and so duplication beyond chance and what placement by affinity "
            "brings, cannot be known from loads; nor how loads change over time. Intervals cover the drawing alone."
        )
    elif case.kind == "synthetic":
        yield (
            f"Routing is synthetic ({case.routing_words.split(': ')[1]}): it shows what such routing would do, not "
            "what your model's routers do. Intervals cover the drawing alone."
        )
    if not assessment.has_intervals:
        yield (
            f"Only {assessment.num_held_out} held-out iterations: no intervals (they need {FEWEST_FOR_INTERVALS}). A "
            "longer trace, or fewer tokens_per_rank, gives more."
        )
    if case.share is None:
        yield "AlltoAll's share of your step is not known; state share= (from a profile) for the gain of your step."
    flips = answer.sensitivity[answer.sensitivity["flips"]]
    if len(flips):
        yield f"Another answer if: {'; '.join(flips['assumption'])}."
    else:
        yield "None of the other assumptions tried below changes whether to leave the flat AlltoAll."
    needed = answer.tokens_needed
    if answer.found.outcome != "stay" and needed is not None:
        yield f"{answer.label(answer.followed)} saves 5 % or more from about {needed} tokens a GPU on."
    yield from case.notes


def title_of_overview(answer: Answer) -> str:
    """The overview's title: the answer as a sentence."""
    assessment, own = answer.assessment, answer.assessment.named(answer.followed)
    where = f"{assessment.case.cluster.name}, {assessment.case.routing_words}"
    speedup = f"{own.speedup.value:.2f}×{answer.mark}"
    return {
        "stay": f"Stay with the flat AlltoAll: at best {own.candidate.label}, {speedup} ({where})",
        "unresolved": f"{own.candidate.label}'s {speedup} is within what the model cannot resolve ({where})",
    }.get(answer.found.outcome, f"Predicted: {own.candidate.label} makes AlltoAll {speedup} as fast ({where})")


def title_of_systems(answer: Answer) -> str:
    """Where the time of the fastest goes."""
    fastest = answer.systems[~answer.systems["lossy"]].iloc[0]
    stages = {peers: fastest.get(f"{peers}_ms", math.nan) for peers in answer.stage_words()}
    peers, ms = max(stages.items(), key=lambda one: -1.0 if math.isnan(one[1]) else float(one[1]))
    return (
        f"{fastest['label']} is the fastest of {len(answer.systems)} systems; {ms / fastest['step_ms']:.0%} of its "
        f"time is {exchange_words(peers, answer.assessment)}"
    )


def title_of_traffic(answer: Answer) -> str:
    """What deduplication saves on the outermost level."""
    outer, crossing = answer.assessment.levels.iloc[0], answer.crossing.iloc[0]
    saved = 1 - crossing[answer.best_still] / crossing["megatron"]
    return (
        f"{outer['duplication']:.0%}{answer.mark} of the copies to {outer['groups']} {groups_of(outer['name'])} are "
        "duplicates; "
        f"{answer.label(answer.best_still)} sends {saved:.0%}{answer.mark} less between {groups_of(outer['name'])}"
    )


def title_of_placement(answer: Answer) -> str:
    """The largest gain of any policy over its own dispatch."""
    last = answer.updates.groupby("system", sort=False).last()
    best = last.sort_values("value").iloc[-1]
    if best["value"] < 1.005:
        return "No placement policy makes AlltoAll faster on steps that it has not seen"
    paid = "" if math.isinf(best["break_even_steps"]) else f", paid back after {best['break_even_steps']:.0f} steps"
    return (
        f"{best['label']} makes AlltoAll {best['value'] - 1:.1%}{answer.mark} faster than fixed experts after "
        f"{best['updates']:.0f} updates{paid}"
    )


def title_of_sensitivity(answer: Answer) -> str:
    """What would change the answer."""
    rows = answer.sensitivity.iloc[1:]
    flips = rows[rows["flips"]]
    if len(flips):
        return f"{len(flips)} of {len(rows)} other assumptions would change the answer"
    return f"None of {len(rows)} other assumptions changes whether to leave the flat AlltoAll"


def _ms(value: float) -> str:
    return f"{value / 1e3:.3g} s" if value >= 1000 else f"{value:.0f} ms"
