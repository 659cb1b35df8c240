"""What is in a trace: loads, duplication, and the traffic that a system makes of it."""

from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from hiermoe.model import RowBytes
from hiermoe.planner.cost import choose_scheme
from hiermoe.planner.counts import count_routing, sort_choices
from hiermoe.policies.system import SystemConfig
from hiermoe.routing.collapse import collapsed_layers
from hiermoe.routing.independent import drawn_independently
from hiermoe.routing.trace import RecordedRouting, RoutingTrace
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement


def show(trace: RoutingTrace, cluster: Cluster) -> list[Table]:
    """Tables of what a trace holds, and of its loads and duplication in every layer.

    Raises:
        ValueError: fewer experts than GPUs.
    """
    meta, shape = trace.metadata, trace.expert_ids.shape
    about = Table(title=meta.model, title_justify="left", show_header=False)
    named = zip(("iterations", "layers", "ranks", "tokens a rank", "experts a token"), shape, strict=True)
    sizes = " x ".join(f"{size} {name}" for name, size in named)
    for name, value in {
        "shape": sizes,
        "tokens": f"{int(trace.num_tokens.sum(dtype=np.int64))} in each layer"
        + ("" if (trace.num_tokens == shape[3]).all() else ", unequally many on ranks"),
        "experts": f"{meta.num_experts}, of which the router chooses {meta.topk}",
        "layers": ", ".join(map(str, meta.layers)),
        "router": meta.router,
        "corpus": meta.corpus,
        "seed": "unknown" if meta.seed is None else str(meta.seed),
        "how made": meta.how_made,
        "notes": meta.notes,
        **({"left out": "; ".join(meta.left_out)} if meta.left_out else {}),
    }.items():
        about.add_row(name, value.replace("[", "\\["))
    hierarchy = cluster.hierarchy
    rows = Table(
        title=f"max/mean load of experts, and duplication rate on {cluster.name} with experts in their first places; "
        "in brackets of equal loads, a token's experts drawn independently",
        title_justify="left",
    )
    levels = [f"{n} {name}s" for name, n in zip(hierarchy.names, hierarchy.groups, strict=True)]
    for column in ("layer", "load of a step: mean", "max", "whole trace", "never chosen", *levels):
        rows.add_column(column, justify="right")
    for position, layer in enumerate(meta.layers):
        rows.add_row(str(layer), *_of_layer(trace, position, hierarchy))
    if collapsed := collapsed_layers(trace):
        rows.caption, rows.caption_justify = "\n".join(collapsed), "left"
    return [about, rows]


def _of_layer(trace: RoutingTrace, position: int, hierarchy: Hierarchy) -> list[str]:
    routing, first_places = (
        RecordedRouting(trace, position, trace.metadata.topk),
        Placement.first(trace.metadata.num_experts, hierarchy.num_ranks),
    )
    loads_IE, rng = [], np.random.default_rng(0)
    distinct_D, independent_D = np.zeros(hierarchy.depth), np.zeros(hierarchy.depth)
    for iteration in range(routing.num_distinct):
        ids_NK = routing.step(iteration).expert_ids_NK
        loads_IE.append(torch.bincount(ids_NK.flatten(), minlength=trace.metadata.num_experts).numpy())
        distinct_D += _distinct(ids_NK, first_places, hierarchy)
        independent_D += _distinct_if_independent(ids_NK, first_places, hierarchy, rng)
    loads = np.stack(loads_IE).astype(float)
    used = loads[loads.sum(1) > 0]
    ratios, total = used.max(1) / used.mean(1), loads.sum(0)
    figures = [ratios.mean(), ratios.max(), total.max() / total.mean()]
    pairs = zip(1 - distinct_D / total.sum(), 1 - independent_D / total.sum(), strict=True)
    duplication = [f"{x:.1%}\n({'-' if np.isnan(drawn) else f'{100 * drawn:.1f}'})" for x, drawn in pairs]
    return [*(f"{x:.2f}" for x in figures), str(int((total == 0).sum())), *duplication]


def _distinct(ids_NK: torch.Tensor, placement: Placement, hierarchy: Hierarchy) -> np.ndarray:
    """Rows that a step needs on each level, without duplicates: [depth]."""
    whole_step = torch.zeros(len(ids_NK), dtype=torch.int64)
    needed = sort_choices(ids_NK, placement, hierarchy).distinct(whole_step, 1, hierarchy)
    return np.array([float(tokens.sum()) for tokens in needed])


def _distinct_if_independent(
    ids_NK: torch.Tensor, placement: Placement, hierarchy: Hierarchy, rng: np.random.Generator
) -> np.ndarray:
    try:
        return _distinct(torch.from_numpy(drawn_independently(ids_NK.numpy(), rng)), placement, hierarchy)
    except ValueError:  # there is no such draw
        return np.full(hierarchy.depth, np.nan)


def traffic_matrices(
    trace: RoutingTrace,
    cluster: Cluster,
    system: SystemConfig,
    *,
    row_bytes: int,
    tokens_per_rank: int,
    iteration: int = 0,
    layer: int = 0,
    topk: int | None = None,
) -> list[np.ndarray]:
    """Bytes of every stage of the dispatch of one step, before any expert has moved.

    Args:
        trace: the routing.
        cluster: G, and what the system's choice among several schemes goes by.
        system: whose scheme.
        row_bytes: of a token.
        tokens_per_rank: T; the trace's tokens are regrouped over G x T.
        iteration: of the regrouped trace.
        layer: position in the trace.
        topk: K; None for the router's.

    Returns:
        int64 [source, destination] for each stage, own shares on the diagonal.

    Raises:
        ValueError: sizes that do not fit the trace.
        NotApplicable: the cluster has too few levels for the system.
    """
    if row_bytes < 1:
        raise ValueError(f"row_bytes={row_bytes} must be at least 1")
    hierarchy = cluster.hierarchy
    first_places = Placement.first(trace.metadata.num_experts, hierarchy.num_ranks)
    regrouped = trace.reshard(hierarchy.num_ranks, tokens_per_rank)
    routing = RecordedRouting(regrouped, layer, topk or trace.metadata.topk)
    if not 0 <= iteration < routing.num_distinct:
        raise ValueError(f"iteration={iteration} is outside 0..{routing.num_distinct - 1}")
    counts = count_routing(routing.step(iteration).over_slots(), first_places, hierarchy)
    price = choose_scheme(system.build_schemes(hierarchy), counts, cluster, RowBytes.alike(row_bytes))
    return [stage.numpy() * row_bytes for stage in price.traffic.rows_SGG]


def write_matrices(output: Path, matrices: list[np.ndarray]) -> list[tuple[Path, np.ndarray]]:
    """Write a file for every stage, in the form of nccl-tests: whitespace between bytes, a line a sender.

    nccl-tests knows the variable by this name since it has matrix files in its own repository; versions before that
    called it ALLTOALLV_MATRIX_FILE and some counted in KiB. It rounds every entry down to 16 bytes.

    Returns:
        Path and matrix of every stage.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for number, matrix in enumerate(matrices, 1):
        path = output if len(matrices) == 1 else output.with_suffix(f".stage{number}{output.suffix}")
        np.savetxt(path, matrix, fmt="%d")
        written.append((path, matrix))
    return written
