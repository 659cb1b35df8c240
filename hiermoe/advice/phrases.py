"""The answer in plain words: headline, conditions, titles of figures. All of it from the tables."""

import math

from hiermoe.advice import recommendation
from hiermoe.advice.answer_tables import Answer, exchange_words
from hiermoe.advice.systems import BASELINE
from hiermoe.analysis.render import environment
from hiermoe.analysis.whole_step import PUBLISHED_SHARES


def headline(answer: Answer) -> str:
    """The recommendation and what to expect of it; whether that is due to routing that has collapsed."""
    collapsed = answer.assessment.collapsed
    caution = "" if collapsed is None else f" But this routing has collapsed: {collapsed}; a healthy router gains less."
    return _recommendation(answer) + caution


def _recommendation(answer: Answer) -> str:
    name = answer.found.followed
    label, *also = answer.own.candidate.labels
    named = f"{label} (to this model the same as {', '.join(also)})" if also else label
    speedup = f"{_speedup(answer)}{answer.interval(name)}"
    if answer.found.outcome == "stay":
        return f"Stay with the flat AlltoAll: the fastest alternative, {named}, makes it {speedup} as fast."
    if answer.found.outcome == "unresolved":
        return (
            f"What {named} gains here is within what the model cannot resolve: AlltoAll {speedup} as fast is "
            "predicted. Calibrate the cluster and measure before you change anything."
        )
    share, own_step = answer.share, answer.own_step(name)
    if share is None or own_step is None:
        low, high = PUBLISHED_SHARES
        condition = f"if AlltoAll is {low:.0%} to {high:.0%}"
        step = f"{answer.step(name, low)} to {answer.step(name, high)}×{answer.mark} {condition}"
    else:
        step = f"{own_step:.2f}×{answer.mark} with AlltoAll at {share:.0%}"
    advice = f"Use {_dispatch(answer)}{_placement(answer)}"
    return f"{advice} Expect AlltoAll to be {speedup} as fast, and the step {step} of it."


def _speedup(answer: Answer) -> str:
    return f"{answer.own.speedup.value:.2f}×{answer.mark}"


def _dispatch(answer: Answer) -> str:
    """How tokens move; where that is one scheme, who exchanges with whom in its stages."""
    candidate, cluster = answer.own.candidate, answer.assessment.case.cluster
    chosen = answer.own.held_out.schemes_used(cluster)
    if len(chosen) > 1:
        names = " or ".join(scheme.name for scheme in chosen)
        return f"{names} dispatch, whichever each step's routing makes cheaper,"
    (scheme,) = chosen
    words = f"{scheme.name if scheme.deduplicates else candidate.label} dispatch"
    if scheme.stages == answer.assessment.flat.candidate.schemes[0].stages:
        words = "the flat AlltoAll that you have"
    stages = ", then ".join(exchange_words(stage.peers, cluster) for stage in scheme.stages)
    return f"{words} ({stages}; {'a token once per group' if scheme.deduplicates else 'a copy per expert'})"


def _placement(answer: Answer) -> str:
    """Where experts sit, as the end of a sentence."""
    candidate, updates = answer.own.candidate, answer.own.updates
    if not candidate.moves:
        others = ", ".join(label for label in candidate.labels if label != candidate.schemes[0].name)
        return f", and leave the experts where they are{f' (system {others})' if others else ''}."
    last = updates.iloc[-1]
    bring = f"{last['updates']:.0f} updates in {last['step']:.0f} steps bring"
    if last["updates"] <= 1:
        bring = f"one update in {last['step']:.0f} steps brings"
    cost = "moves nothing"
    if last["moved_ms"]:
        seconds = last["moved_ms"] / 1000
        amount = f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"
        cost = f"costs {amount} {'for all layers' if answer.assessment.layers else 'a layer'} once"
        if math.isfinite(last["break_even_steps"]):
            cost += f" and has paid after {last['break_even_steps']:.0f} steps"
    return (
        f", and place experts by {candidate.label}: {bring} {last['value']:.2f}×{answer.mark} the speed of the same "
        f"dispatch with fixed experts; moving them {cost}."
    )


def conditions(answer: Answer) -> list[str]:
    """What the answer rests on, and what it cannot know."""
    template = environment().get_template("advice_conditions.j2")
    return template.render(answer=answer, rules=recommendation, why_no_files=why_no_files(answer)).splitlines()


def why_no_files(answer: Answer) -> str:
    """Why no file can say where the answer's experts are; empty where one can."""
    placements, experts = answer.own.placements, answer.assessment.case.sizes.num_experts
    if any(placement.num_slots != experts for placement in placements.values()):
        return f"{experts} experts leave slots empty on some GPUs, for which their form has no word"
    if 0 in placements:
        return "they count layers from 1, and nobody says which layer this is (`hiermoe trace import --first-layer 1`)"
    return ""


def title_of_overview(answer: Answer) -> str:
    """The overview's title: the answer as a sentence."""
    case, label, speedup = answer.assessment.case, answer.own.candidate.label, _speedup(answer)
    said = {
        "stay": f"Stay with the flat AlltoAll: at best {label}, {speedup}",
        "unresolved": f"{label}'s {speedup} is within what the model cannot resolve",
    }.get(answer.found.outcome, f"Predicted: {label} makes AlltoAll {speedup} as fast")
    return f"{said} ({case.cluster.name}, {case.routing_words})"


def title_of_layers(answer: Answer) -> str:
    """Where in the model dispatch gains most and least, and in how many layers moving experts pays."""
    table = answer.layers.sort_values("dispatch", kind="stable")
    worst, best = table.iloc[0], table.iloc[-1]
    said = (
        f"Dispatch makes AlltoAll {worst['dispatch']:.2f} (layer {worst['layer']}) to {best['dispatch']:.2f} times "
        f"(layer {best['layer']}) as fast"
    )
    if not answer.assessment.named(answer.mover).candidate.moves:
        return said
    gains = table["placement"][table["moves"]]
    recommended = answer.found.outcome == "placement"
    verb, adds = ("pays", "adds") if recommended else ("would pay", "add")
    more = f" and {adds} {gains.min() - 1:.0%} to {gains.max() - 1:.0%}" if len(gains) else ""
    in_all = ", too little in all to recommend it" if answer.found.outcome == "dispatch" and len(gains) else ""
    return f"{said}; moving experts {verb} in {len(gains)} of {len(table)} layers{more}{in_all}"


def title_of_systems(answer: Answer) -> str:
    """Where the time of the fastest goes."""
    cluster, fastest = answer.assessment.case.cluster, answer.systems[~answer.systems["lossy"]].iloc[0]
    stage_ms = answer.assessment.named(fastest["system"]).held_out.mean_stages(cluster)
    longest = max(stage_ms, key=stage_ms.__getitem__)
    return (
        f"{fastest['label']} is the fastest of {len(answer.systems)} systems; "
        f"{stage_ms[longest] / fastest['step_ms']:.0%} of its time is {exchange_words(longest, cluster)}"
    )


def title_of_traffic(answer: Answer) -> str:
    """What deduplication saves on the outermost level."""
    outer, crossing = answer.assessment.levels.iloc[0], answer.crossing.iloc[0]
    groups = answer.assessment.case.cluster.levels[0].label
    saved = 1 - crossing[answer.best_still] / crossing[BASELINE]
    return (
        f"{outer['duplication']:.0%}{answer.mark} of the copies to {outer['groups']} {groups} are duplicates; "
        f"{answer.label(answer.best_still)} sends {saved:.0%}{answer.mark} less between {groups}"
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
    flips = answer.sensitivity["flips"].iloc[1:]
    if flips.any():
        return f"{flips.sum()} of {len(flips)} other assumptions would change the answer"
    return f"None of {len(flips)} other assumptions changes whether to leave the flat AlltoAll"
