"""Where the paper's numbers, its constants and our counts do not fit together: computed, then put into words."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from hiermoe.analysis.claims import TESTBED_RANKS, Claim
from hiermoe.analysis.figures import style
from hiermoe.analysis.figures.tables import counterpart, published
from hiermoe.analysis.figures.words import per_routing, span
from hiermoe.analysis.frames import Results, Run
from hiermoe.analysis.quantities import duplication_rate, speedup
from hiermoe.analysis.whole_step import share_needed
from hiermoe.planner.cost import ALLTOALLS_PER_STEP
from hiermoe.policies.price_of_moving import STATE_BYTES_PER_PARAMETER, WEIGHT_BYTES_PER_PARAMETER
from hiermoe.topology.peers import WORLD, Peers


def _models(claims: Sequence[Claim]) -> dict[str, str]:
    """The paper's models, by name, as readers know them."""
    names = dict.fromkeys(claim.model for claim in claims if claim.where == "Fig. 11" and claim.model != "both")
    return {name: style.model(name) for name in names}


@dataclass(frozen=True)
class Finding:
    """One thing that a reader of the paper should know."""

    title: str
    text: str


def findings(claims: Sequence[Claim], results: Results) -> list[Finding]:
    """All findings that the published numbers, and the records there are, allow."""
    parts: tuple[Callable[[Sequence[Claim], Results], Iterator[Finding]], ...] = (
        _swap_gain,
        _shares,
        _one_node,
        _group_count,
        _chance,
        _two_stages,
        _swap_price,
        _lane_average,
    )
    return [finding for part in parts for finding in part(claims, results)]


def _swap_gain(claims: Sequence[Claim], results: Results) -> Iterator[Finding]:
    """HierMoE over HD-MoE, as the paper's own tables have it."""
    ratios = [
        (_published(claims, "hiermoe", model) / _published(claims, "hd_moe", model), name)
        for model, name in _models(claims).items()
    ]
    table = [c for c in claims if c.where == "Table IV" and c.system == "hiermoe"]
    columns = [c.low / published(claims, where="Table IV", system="hd_moe", condition=c.condition)[0] for c in table]
    stated, _ = published(claims, where="Sec. V-E", condition="max=smooth")
    parts = ", ".join(f"{ratio:.3f} in Fig. 11, {name}" for ratio, name in ratios)
    gains = [
        {"model": run.config.model.name, "routing": run.routing, "value": speedup(run, fixed, results).value}
        for run in results.find("fig11", system="hiermoe", status="ok")
        if (fixed := counterpart(run, "hd_moe", "fig11", results)) is not None
    ]
    ours = "".join(
        f" Ours, {style.model(str(model))}: {per_routing(rows, digits=3)}."
        for model, rows in (pd.DataFrame(gains).groupby("model", sort=False) if gains else ())
    )
    yield Finding(
        "What a swap brings",
        f"By the paper's own numbers, HierMoE over HD-MoE is {parts}, {span(columns, 3)} over the columns of Table IV, "
        f"and {stated:g} in Sec. V-E for the same base case. The gain of expert swap alone is thus known to a few "
        f"percent only, and it is far smaller on DeepSeek-V3.{ours}",
    )


def _shares(claims: Sequence[Claim], results: Results) -> Iterator[Finding]:
    """Reading 6."""
    ends = published(claims, metric="e2e_speedup", system="hiermoe", baseline="megatron")
    over_hd2 = published(claims, metric="e2e_speedup", system="hiermoe", baseline="hd2_moe")
    stated = published(claims, metric="a2a_share_of_step")
    parts, others = [], []
    for model, name in _models(claims).items():
        ratio, of_hd2 = (_published(claims, system, model) for system in ("hiermoe", "hd2_moe"))
        parts.append(f"{name} {' or '.join(f'{share_needed(end, ratio):.0%}' for end in ends)}")
        others.append(f"{name} {' or '.join(f'{share_needed(end, ratio / of_hd2):.0%}' for end in over_hd2)}")
    yield Finding(
        "Which AlltoAll share the published speed-ups need",
        f"For HierMoE over Megatron-LM, {ends[0]:g} or {ends[1]:g} end to end and the AlltoAll ratios of Fig. 11 agree "
        f"if AlltoAll had this share of Megatron-LM's step: {'; '.join(parts)} (the paper "
        f"does not say which end belongs to which model; it states {stated[0]:.0%} to {stated[1]:.0%}). Over HD2-MoE "
        f"({over_hd2[0]:.2f} or {over_hd2[1]:.2f}), AlltoAll's share of HD2-MoE's step: {'; '.join(others)}.",
    )


def _one_node(claims: Sequence[Claim], results: Results) -> Iterator[Finding]:
    """HD-MoE over HD2-MoE on one node, published and priced."""
    stated = [published(claims, where="Table IV", system=s, condition="G=8")[0] for s in ("hd_moe", "hd2_moe")]
    rows = []
    for run in results.find("table4", system="hd_moe", experiment="table4_g8", status="ok"):
        if fixed := counterpart(run, "hd2_moe", "table4", results):
            same = (results.rows(run, "step")["dimension"] == 2).mean()
            rows.append({"routing": run.routing, "value": speedup(run, fixed, results).value, "same": same})
    if rows:
        table = pd.DataFrame(rows)
        yield Finding(
            "One node: HD2-MoE's published speed-up does not follow from the published constants",
            f"On 8 GPUs Table IV has {stated[1]:g} for HD2-MoE and {stated[0]:g} for HD-MoE, a ratio of "
            f"{stated[0] / stated[1]:.2f}. Priced with Fig. 9 the ratio is {per_routing(table)}: Algorithm 1 takes d = "
            f"2, the same as HD2-MoE, in {span(table['same'] * 100, 0)} % of steps. Either HD2-MoE splits one node in "
            "another way there, or the constants of Fig. 9 do not hold on one node alone.",
        )


def _group_count(claims: Sequence[Claim], results: Results) -> Iterator[Finding]:
    """HD2-MoE against K, published and priced."""
    stated = [published(claims, where="Table IV", system="hd2_moe", condition=f"K={k}")[0] for k in (6, 8, 10)]
    rows = []
    for run in results.find("table4", system="hd2_moe", status="ok"):
        megatron = counterpart(run, "megatron", "table4", results)
        if megatron and str(run.swept["experiment"]).startswith("table4_k"):
            ratio = speedup(run, megatron, results).value
            rows.append({"routing": run.routing, "topk": run.value("topk"), "value": ratio})
    if rows:
        table = pd.DataFrame(rows)
        parts = "; ".join(f"K={k} {per_routing(part)}" for k, part in table.groupby("topk"))
        yield Finding(
            "HD2-MoE against K: a jump in the paper, a slope in the model",
            f"Published: {stated[0]:.2f}, {stated[1]:.2f}, {stated[2]:.2f} for K = 6, 8, 10: a loss at 6, then a step "
            f"of {stated[1] / stated[0] - 1:.0%} and one of {stated[2] / stated[1] - 1:.0%}. Ours: {parts}. Duplicates "
            "grow smoothly with K (Table II), so nothing in the cost model makes such a jump.",
        )


def _chance(claims: Sequence[Claim], results: Results) -> Iterator[Finding]:
    """Table II beside uniform routing."""
    gaps = []
    for claim in claims:
        if claim.metric == "duplication_rate":
            groups = int(claim.condition.split()[0].removeprefix("groups="))
            runs = results.find("table2", system="megatron", routing="uniform", status="ok", **claim.wanted)
            gaps += [duplication_rate(run, groups, results).value - claim.low for run in runs]
    if gaps:
        yield Finding(
            "Table II is what chance gives",
            f"Experts drawn uniformly give duplication rates {min(gaps) * 100:+.1f} to {max(gaps) * 100:+.1f} "
            f"percentage points from the published ones in all {len(gaps)} cells. So the published rates need no "
            "structure in the routing; any that recorded routing has comes on top.",
        )


def _two_stages(claims: Sequence[Claim], results: Results) -> Iterator[Finding]:
    """Tutel-2DH's ratio on perfectly even traffic, from the constants alone."""
    parts = []
    for model, name in _models(claims).items():
        run = _base_run(results, model)
        if run is not None:
            flat_ms = _even_ms(run, WORLD)
            two_ms = _even_ms(run, Peers("inter", 1)) + _even_ms(run, Peers("intra", 1))
            parts.append(f"{name} {flat_ms / two_ms:.2f} (published {_published(claims, 'tutel_2dh', model):g})")
    if parts:
        yield Finding(
            "Tutel-2DH's loss follows from the constants",
            "On perfectly even traffic the constants of Fig. 9 alone give Tutel-2DH over Megatron-LM: "
            f"{'; '.join(parts)}. The paper does not say how Tutel was configured; an unpadded two-stage AlltoAll "
            "fits, one padded to the largest count is slower (Fig. 11).",
        )


def _swap_price(claims: Sequence[Claim], results: Results) -> Iterator[Finding]:
    """Reading 7: what one expert weighs against what the paper says that swapping gains."""
    for model, name in _models(claims).items():
        run = _base_run(results, model)
        if run is None:
            continue
        cluster, parameters = run.config.cluster, run.config.model.expert_parameters
        full, fixed = (_published(claims, system, model) for system in ("hiermoe", "hd_moe"))
        gain_ms = ALLTOALLS_PER_STEP * _even_ms(run, WORLD) * (1 / fixed - 1 / full)
        link_ms_per_byte = 1 / (cluster.levels[0].link_gb_per_s * 1e6)
        alltoall_ms_per_byte = cluster.constants(Peers("inter", 1)).beta_ms_per_byte
        full_ms = [STATE_BYTES_PER_PARAMETER * parameters * rate for rate in (link_ms_per_byte, alltoall_ms_per_byte)]
        costs = ", ".join(
            f"{what} ({parameters * size / 1e6:.0f} MB) {parameters * size * link_ms_per_byte:.1f} ms at the link's "
            f"rate and {parameters * size * alltoall_ms_per_byte:.0f} ms at the AlltoAll's"
            for what, size in (("full state", STATE_BYTES_PER_PARAMETER), ("weights alone", WEIGHT_BYTES_PER_PARAMETER))
        )
        yield Finding(
            f"A swap's cost against its gain, {name}",
            f"Moving one expert between nodes costs: {costs}. The published gain of HierMoE over HD-MoE is about "
            f"{gain_ms:.1f} ms per layer and step (its ratios, on an evenly loaded Megatron-LM AlltoAll). A swap in "
            f"every step that moves full state thus costs {full_ms[0] / gain_ms:.1f} to {full_ms[1] / gain_ms:.1f} "
            "times what the paper gains with it; moving weights alone would let the optimizer's masters undo the swap.",
        )


def _lane_average(claims: Sequence[Claim], results: Results) -> Iterator[Finding]:
    """Reading 1: rows that Q counts against rows that are priced."""
    rows = []
    for run in [run for system in ("hd_moe", "hiermoe") for run in results.find("fig11", system=system, status="ok")]:
        stages, cluster = results.rows(run, "dispatch"), run.config.cluster
        constants = (cluster.constants(cluster.exchange_of(stage)) for stage in stages["stage"])
        beta = np.array([one.beta_ms_per_byte for one in constants])
        missing_ms = (beta * (stages["rows"] - stages["group_rows"]) * run.config.model.token_bytes).sum()
        rows.append({"routing": run.routing, "value": missing_ms / stages["predicted_ms"].sum() * 100})
    if rows:
        table = pd.DataFrame(rows)
        yield Finding(
            "What Q leaves out",
            "Q divides a group's tokens evenly among its GPUs, times are priced at the busiest GPU (reading 1). "
            "Priced on Q's counts, the AlltoAll of HD-MoE and HierMoE would be shorter by this many percent: "
            f"{per_routing(table)}, over both models.",
        )


def _published(claims: Sequence[Claim], system: str, model: str) -> float:
    """AlltoAll over Megatron-LM's in Fig. 11."""
    return published(claims, where="Fig. 11", system=system, model=model, baseline="megatron")[0]


def _base_run(results: Results, model: str) -> Run | None:
    """Any run of the base case: only its configuration is used."""
    return next(iter(results.find("fig11", model=model, num_ranks=TESTBED_RANKS)), None)


def _even_ms(run: Run, peers: Peers) -> float:
    """Time of one exchange of all token-expert pairs, evenly spread."""
    constants = run.config.cluster.constants(peers)
    size = run.config.tokens_per_rank * run.config.model.topk * run.config.model.token_bytes
    return constants.ms(size)
