"""From what the user gives to a case: routing on the cluster's GPUs, and the sizes of the model."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hiermoe.advice.advice_config import AdviceConfig, ComputeConfig
from hiermoe.advice.case import Case, Kind, Question
from hiermoe.analysis.whole_step import Compute
from hiermoe.model import LayerSizes, ModelConfig
from hiermoe.policies.system import build
from hiermoe.records.groups import files_of
from hiermoe.records.status import NotApplicable
from hiermoe.records.strict import BrokenRules
from hiermoe.routing.load_table import read_loads
from hiermoe.routing.loads import IndependentLoads
from hiermoe.routing.step import RoutingRequest, RoutingSource, num_slots
from hiermoe.routing.trace import RecordedRouting, RoutingTrace, TraceMetadata, recorded_path, trace_file
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.scaling import laid_out

DEFAULT_ELEMENT_BYTES = 2  # bf16
SIZES = {
    "num_experts": "E, experts of a layer",
    "topk": "K, experts of a token",
    "hidden_size": "M, width of a token",
    "moe_ffn_hidden_size": "inner width of an expert",
}
"""What an answer needs, of routing or of the model; everything else has a default."""
# Tokens to walk through where the number of iterations is left open: some 20 s for all systems on one core.
WALKED_TOKENS = 64 * 32 * 1024
FEWEST_ITERATIONS, MOST_ITERATIONS = 16, 128


@dataclass(frozen=True)
class _Opened:
    """Routing, and what it says of itself."""

    kind: Kind
    name: str
    words: str
    sources: tuple[RoutingSource, ...]  # of each layer
    judged_on: tuple[RoutingSource | None, ...]
    layers: tuple[int, ...]
    num_experts: int
    topk: int
    notes: tuple[str, ...] = ()


def resolve(config: AdviceConfig) -> Question:
    """Everything that the assessment needs.

    Raises:
        ValueError: what is given does not fit together, in one line.
        OSError: a file is missing.
    """
    cluster = config.cluster if config.ep_size is None else laid_out(config.cluster, config.ep_size, config.across)
    files, model = [], config.model
    if config.loads is not None:
        loads = Path(config.loads)
        files = sorted(each for each in loads.iterdir() if each.is_file()) if loads.is_dir() else [loads]
        opened = _from_loads(config, loads, cluster)
    elif config.routing is not None and "path" not in config.routing.source:
        opened = _synthetic(config, cluster)
    else:
        files = _trace_files(config, cluster)
        traces = [RoutingTrace.load(path) for path in files]
        model = model or model_of(traces[0].metadata)
        opened = _recorded(config, files, traces, model, cluster)
    hidden, ffn = _sizes(config, model, opened.words, "hidden_size", "moe_ffn_hidden_size")
    element_bytes = _value(config, model, "element_bytes") or DEFAULT_ELEMENT_BYTES
    compute = _compute(config.compute, model, 3 * hidden * ffn)
    iterations = WALKED_TOKENS // (cluster.hierarchy.num_ranks * config.tokens_per_rank * len(opened.layers))
    cases = tuple(
        Case(
            name=_name(config, opened, model, cluster),
            kind=opened.kind,
            routing_words=opened.words if len(opened.layers) == 1 else f"{opened.words}, layer {layer}",
            source=source,
            judged_on=judged_on,
            layer=layer,
            cluster=cluster,
            model_words=f"{_whose_sizes(config, model)}: M = {hidden}, expert FFN {ffn}",
            sizes=LayerSizes(
                opened.num_experts,
                opened.topk,
                hidden,
                element_bytes,
                expert_parameters=3 * hidden * ffn,
                wire=config.wire,
            ),
            tokens_per_rank=config.tokens_per_rank,
            iterations=config.iterations or min(max(iterations, FEWEST_ITERATIONS), MOST_ITERATIONS),
            share=config.share,
            compute=compute,
            notes=(*opened.notes, *_left_aside(config, opened.kind, model, cluster, opened.num_experts)),
        )
        for source, judged_on, layer in zip(opened.sources, opened.judged_on, opened.layers, strict=True)
    )
    return Question(cases, opened.words, tuple(files), model and model.num_layers)


def _compute(config: ComputeConfig, model: ModelConfig | None, expert_parameters: int) -> Compute | None:
    if config.tflops is None or config.mfu is None:
        return None
    dense = config.dense_parameters
    if dense is None:
        if model is None or model.lacking:
            whose = (
                "without a model" if model is None else f"model {model.name} does not say {', '.join(model.lacking)}"
            )
            raise ValueError(f"compute.dense_parameters=... is missing, weights beside experts: {whose}")
        dense = model.dense_parameters
    dense_tflops, expert_tflops = (config.tflops * mfu for mfu in (config.mfu, config.expert_mfu or config.mfu))
    return Compute(dense, expert_parameters, dense_tflops, expert_tflops, config.hidden)


def _name(config: AdviceConfig, opened: _Opened, model: ModelConfig | None, cluster: Cluster) -> str:
    """Of the output folder: legible, and another one for every other question."""
    asked = config.model_dump_json(exclude={"output", "picture"})
    parts = [opened.name, *([] if model is None else [model.name]), cluster.name]
    parts += [] if config.layer is None else [f"layer{config.layer}"]
    digest = hashlib.sha256(asked.encode()).hexdigest()[:8]
    return re.sub(r"[^\w.-]", "_", "-".join([*dict.fromkeys(parts), digest]))


def _value(config: AdviceConfig, model: ModelConfig | None, key: str) -> int | None:
    """A size as stated, else the model's."""
    return getattr(config, key) or (model and getattr(model, key))


def _sizes(config: AdviceConfig, model: ModelConfig | None, whose: str, *keys: str) -> list[int]:
    """Sizes that neither the routing nor a default has: as stated, else the model's.

    Raises:
        BrokenRules: all that are missing.
    """
    found = [_value(config, model, key) for key in keys]
    missing = [key for key, value in zip(keys, found, strict=True) if value is None]
    if missing:
        raise BrokenRules(
            [f"{key}=... (or model=...) is missing, {SIZES[key]}: {whose} does not say it" for key in missing]
        )
    return [value for value in found if value is not None]


def _whose_sizes(config: AdviceConfig, model: ModelConfig | None) -> str:
    if model is None:
        return "sizes as stated"
    stated = [
        key for key in ("hidden_size", "moe_ffn_hidden_size", "element_bytes") if getattr(config, key) is not None
    ]
    return f"sizes of {model.name}" + (f", {' and '.join(stated)} as stated" if stated else "")


def _left_aside(
    config: AdviceConfig, kind: Kind, model: ModelConfig | None, cluster: Cluster, num_experts: int
) -> Iterator[str]:
    """What is taken for granted, and what the user's cluster and the model's router have that the case has not."""
    assumed = [f"{config.tokens_per_rank} tokens a GPU (tokens_per_rank)"]
    if _value(config, model, "element_bytes") is None:
        assumed.append(f"{DEFAULT_ELEMENT_BYTES} bytes an element (element_bytes)")
    if config.ep_size is None:
        assumed.append(f"one expert-parallel group of all {cluster.hierarchy.num_ranks} GPUs (ep_size)")
    yield f"Unless you say otherwise: {', '.join(assumed)}."
    if cluster is not config.cluster:
        yield (
            f"{cluster.hierarchy.num_ranks} GPUs ({' x '.join(map(str, cluster.hierarchy.groups))} groups) of the kind "
            f"of {config.cluster.name}, whose file has {config.cluster.hierarchy.num_ranks}: constants of data sheets "
            "are derived for so many; published and measured ones are kept, less what no longer leaves a group."
        )
    experts, ranks = num_experts, cluster.hierarchy.num_ranks
    if experts % ranks:
        fewest, with_more = divmod(experts, ranks)
        yield (
            f"{experts} experts on {ranks} GPUs: {fewest + 1} on {with_more} of them, {fewest} and an empty slot on "
            "the others; what moves experts may fill it."
        )
    obeyed = kind == "recorded" or (config.routing is not None and config.routing.name == "group_limited")
    if model is not None and model.router.num_groups is not None and not obeyed:
        yield (
            f"The router of {model.name} lets a token use {model.router.group_topk} of {model.router.num_groups} "
            "groups of experts, which lowers traffic; this routing ignores it."
        )


def model_of(metadata: TraceMetadata) -> ModelConfig | None:
    """The model whose routing a trace is, if conf/model/ has it; of a narrow sibling, the model that it stands for."""
    for name in (metadata.model.removesuffix("_narrow"), metadata.model):
        if name in files_of("model"):
            return ModelConfig.named(name)
    return None


def _trace_files(config: AdviceConfig, cluster: Cluster) -> list[Path]:
    """Of trace=, or of routing=; those of judged_on= behind."""
    if config.trace is None:
        assert config.routing is not None
        if config.model is None:
            raise ValueError(f"model=... is missing: routing={config.routing.name} is that of a model")
        request = _request(config, config.model.num_experts, config.model.topk, cluster)
        return [recorded_path(config.routing.source["path"], request)]
    return [trace_file(name) for name in (*_names(config.trace), *_names(config.judged_on))]


def _names(given: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if given is None else (given,) if isinstance(given, str) else given


def _recorded(
    config: AdviceConfig, files: list[Path], traces: list[RoutingTrace], model: ModelConfig | None, cluster: Cluster
) -> _Opened:
    meta, ranks = traces[0].metadata, cluster.hierarchy.num_ranks
    if config.num_experts not in (None, meta.num_experts):
        raise ValueError(f"num_experts={config.num_experts}: the trace has num_experts={meta.num_experts}")
    for key in ("num_experts", "topk"):
        mine, theirs = getattr(meta, key), getattr(model, key, None)
        if model is not None and theirs != mine and getattr(config, key) is None:
            raise ValueError(
                f"the trace has {key}={mine}, model {model.name} has {theirs}: name the trace's model, or state "
                f"{key}={mine} to use the sizes of {model.name} alone"
            )
    num_slots(meta.num_experts, ranks)  # or some GPUs have no expert
    regrouped = [trace.reshard(ranks, config.tokens_per_rank) for trace in traces]
    judges = len(_names(config.judged_on))
    decided = RoutingTrace.joined(regrouped[: len(regrouped) - judges])
    judged = RoutingTrace.joined(regrouped[-judges:]) if judges else None
    if judged is not None:
        decided.check_alike(judged)
    topk, count = config.topk or meta.topk, len(decided.num_tokens)
    positions = range(len(meta.layers)) if config.layer is None else [config.layer]
    sources = tuple(RecordedRouting(decided.only(layer), 0, topk) for layer in positions)
    if judged is None and count < 2:
        raise ValueError(
            f"trace of {meta.model} has one iteration of {ranks} x {config.tokens_per_rank} tokens; at least two are "
            "needed, one of them held out: take fewer tokens_per_rank, or a longer trace"
        )
    layers = tuple(meta.layers[position] for position in positions)
    words = f"recorded routing of {meta.model}, "
    words += f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers"
    return _Opened(
        "recorded",
        "-".join(path.stem for path in files),
        words,
        sources,
        tuple(judged and RecordedRouting(judged.only(layer), 0, topk) for layer in positions),
        layers,
        meta.num_experts,
        topk,
        tuple(_notes_on_trace(config, files, traces, decided, judged, topk)),
    )


def _notes_on_trace(
    config: AdviceConfig,
    files: list[Path],
    traces: list[RoutingTrace],
    decided: RoutingTrace,
    judged: RoutingTrace | None,
    topk: int,
) -> Iterator[str]:
    meta, (ranks, tokens) = traces[0].metadata, traces[0].expert_ids.shape[2:4]
    if meta.model.endswith("_narrow"):
        yield (
            f"The trace is of a narrow sibling ({meta.model}): real routing, but not that of the model at its full "
            "width."
        )
    if judged is not None:
        judges = len(_names(config.judged_on))
        first, last = (", ".join(path.name for path in some) for some in (files[:-judges], files[-judges:]))
        yield f"Placements are decided on {first} ({len(decided.num_tokens)} iterations) and judged on {last}."
    if len(traces) > 1 or decided is not traces[0]:
        into_ranks, into_tokens = decided.expert_ids.shape[2:4]
        yield (
            f"The trace's {ranks} ranks of {tokens} tokens are regrouped in their order to {into_ranks} of "
            f"{into_tokens}: {len(decided.num_tokens)} iterations."
        )
    if topk != meta.topk:
        yield f"K = {topk} cuts or extends the ranking of a router that was trained with {meta.topk}."
    if config.layer is not None and len(meta.layers) > 1:
        number = meta.layers[config.layer]
        yield (
            f"One of the trace's {len(meta.layers)} layers: layer={config.layer} is number {number}; layer=null takes "
            "all."
        )


def _from_loads(config: AdviceConfig, path: Path, cluster: Cluster) -> _Opened:
    stated = _value(config, config.model, "num_experts")
    table = read_loads(path, stated, config.layer or 0)
    load_E = table.load_E
    topk, *_ = _sizes(config, config.model, f"loads of {path.name}", "topk", "hidden_size", "moe_ffn_hidden_size")
    source = IndependentLoads(_request(config, len(load_E), topk, cluster), load_E)
    assert len(source.rates_E)  # impossible loads end here, before anything is computed
    layer = "" if table.layer is None else f", layer {table.layer}"
    words = f"loads of {path.name}{layer}, experts independent"
    number = (table.layer or 0,)
    return _Opened("loads", path.stem, words, (source,), (None,), number, len(load_E), topk, table.notes)


def _synthetic(config: AdviceConfig, cluster: Cluster) -> _Opened:
    routing = config.routing
    assert routing is not None
    num_experts, topk, *_ = _sizes(config, config.model, f"routing={routing.name}", *SIZES)
    request = _request(config, num_experts, topk, cluster)
    try:
        source = build(routing.source, request=request)
    except NotApplicable as error:
        raise ValueError(f"routing={routing.name}: {error}") from None
    words = f"synthetic routing: {routing.name.replace('_', '-')}"
    return _Opened("synthetic", routing.name, words, (source,), (None,), (0,), num_experts, topk)


def _request(config: AdviceConfig, num_experts: int, topk: int, cluster: Cluster) -> RoutingRequest:
    num_slots(num_experts, cluster.hierarchy.num_ranks)  # or some GPUs have no expert
    router = config.model.router if config.model else None
    return RoutingRequest(
        trace=config.model.trace if config.model else "",
        num_experts=num_experts,
        topk=topk,
        num_ranks=cluster.hierarchy.num_ranks,
        tokens_per_rank=config.tokens_per_rank,
        seed=config.seed,
        num_groups=router and router.num_groups,
        group_topk=router and router.group_topk,
    )
