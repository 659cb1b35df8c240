"""`hiermoe trace`: bring in routing that others recorded, look at a trace, hand its traffic to other benchmarks."""

import argparse
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from hiermoe.commands.arguments import Parser
from hiermoe.routing.collapse import collapsed_layers
from hiermoe.routing.importers import IMPORTERS, OF_SOME
from hiermoe.routing.importers.as_trace import to_trace
from hiermoe.routing.importers.detection import detected
from hiermoe.routing.importers.recording import Source
from hiermoe.routing.step import dividing
from hiermoe.routing.trace import RoutingTrace, trace_file

_TRACE = "a .trace file, or the name of one in results/traces/"


def main(arguments: list[str]) -> None:
    """Run a subcommand.

    Raises:
        ValueError: bad input, in one line.
        OSError: a file cannot be read or written.
    """
    chosen = _parser().parse_args(arguments)
    chosen.run(chosen)


def _parser() -> Parser:
    parser = Parser(prog="hiermoe trace", description="Routing traces.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    formats = "\n".join(f"  {name:10} {str(importer.__doc__).splitlines()[0]}" for name, importer in IMPORTERS.items())
    load = commands.add_parser(
        "import",
        help="make a trace of routing that others recorded",
        description="Make a trace of routing that others recorded. Formats, found out where none is named:\n" + formats,
        epilog="What one row means in each format: the head of its file in hiermoe/routing/importers/; docs/forms.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    load.add_argument(
        "format", nargs="?", choices=sorted(IMPORTERS), help="of the file: see above (default: what it looks like)"
    )
    load.add_argument("path", type=Path, help="a file; or a folder, where a form has one a rank, layer or request")
    load.add_argument("--output", type=Path, required=True, help="the trace to write")
    load.add_argument("--num-experts", type=_experts, help="E; or infer: the largest id + 1, up to a multiple of ranks")
    load.add_argument("--topk", type=int, help="K; needed where the format does not say it")
    load.add_argument("--layers", type=int, nargs="+", help="only these, numbered as in the trace")
    load.add_argument("--ranks", type=int, help="G to lay tokens out over (default: the file's ranks, else 1)")
    load.add_argument("--tokens-per-rank", type=int, help="T of an iteration (default: one iteration of all tokens)")
    load.add_argument("--tokens", type=int, help="only so many, the first ones")
    load.add_argument(
        "--pipeline", type=int, help="megatron: stages that the files' ranks are of, 1 for none; asked for where needed"
    )
    load.add_argument("--chunks", type=int, help="megatron: chunks of the model on a stage, 1 for none (interleaved)")
    load.add_argument(
        "--first-layer", type=int, help="number of the first layer in forms that count them by place (default: 0)"
    )
    load.add_argument(
        "--zeros", choices=("expert", "none"), help="what 0 is at K = 1, expert 0 or no routing; asked for"
    )
    load.add_argument("--model", help="name to state in the trace (default: the file's name)")
    load.set_defaults(run=_import)

    get = commands.add_parser(
        "fetch",
        help="bring what published models routed, from public sets; alone: list them",
        description="Bring a public set by git and make its trace, .cache/public/NAME.trace; without a name, list all.",
    )
    get.add_argument("name", nargs="?", help="of the set")
    get.add_argument("--from", dest="folder", type=Path, help="a folder that has it already, in place of the network")
    get.set_defaults(run=_fetch)

    show = commands.add_parser("show", help="shape, loads, and duplication at every level of a cluster")
    show.add_argument("trace", help=_TRACE)
    show.add_argument("--cluster", default="a6000_4x8", help="whose levels (default: a6000_4x8)")
    show.set_defaults(run=_show)

    export = commands.add_parser(
        "export-matrix",
        help="bytes from every GPU to every other in one step, for nccl-tests' alltoallv_perf",
        description="Bytes from every GPU to every other in the dispatch of one step, experts in their first places, "
        "for NCCL_TESTS_ALLTOALLV_MATRIX_FILE of nccl-tests' alltoallv_perf: a line a sender, a column a receiver.",
    )
    export.add_argument("trace", help=_TRACE)
    export.add_argument("--cluster", required=True, help="whose GPUs send, and what a choice of schemes goes by")
    export.add_argument("--system", required=True, help="whose scheme moves the tokens, megatron for instance")
    export.add_argument("--row-bytes", type=int, required=True, help="of a token: hidden size x bytes of an element")
    export.add_argument("--output", type=Path, required=True, help="one file a stage: .stage1, .stage2 if several")
    export.add_argument("--tokens-per-rank", type=int, default=1024, help="T of the step (default: 1024)")
    export.add_argument("--iteration", type=int, default=0, help="of the regrouped trace (default: 0)")
    export.add_argument("--layer", type=int, default=0, help="position of the layer in the trace (default: 0)")
    export.add_argument("--topk", type=int, help="K (default: the router's)")
    export.set_defaults(run=_export)
    return parser


def _experts(text: str) -> int | str:
    if text == "infer":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor infer") from None


def _import(chosen: argparse.Namespace) -> None:
    source = Source(
        path=chosen.path,
        layers=None if chosen.layers is None else tuple(chosen.layers),
        topk=chosen.topk,
        ranks=chosen.ranks,
        tokens_per_rank=chosen.tokens_per_rank,
        max_tokens=chosen.tokens,
        pipeline=chosen.pipeline,
        chunks=chosen.chunks,
        first_layer=chosen.first_layer,
        zeros=chosen.zeros,
    )
    if isinstance(chosen.num_experts, int) and chosen.num_experts < 1:
        raise ValueError(f"num_experts={chosen.num_experts} must be at least 1")
    console = Console(highlight=False, soft_wrap=True)
    form, words = chosen.format, None
    if form is None:
        form, words = detected(chosen.path)
    for name, only in OF_SOME.items():
        if getattr(chosen, name) is not None and form not in only:
            raise ValueError(f"{name}={getattr(chosen, name)} is of the format {' or '.join(only)}, not of {form}")
    recording = IMPORTERS[form].read(source)
    model = chosen.model or chosen.path.name.split(".")[0]
    command = shlex.join(["hiermoe", "trace", *sys.argv[1:]])
    trace = to_trace(recording, source, form, model, chosen.num_experts, command)
    trace.save(chosen.output)
    if words is not None:
        console.print(escape(f"{chosen.path}: {words} (form {form})"))
    iterations, layers, ranks, tokens, topk = trace.expert_ids.shape
    console.print(
        f"{chosen.output}: {iterations} iterations x {layers} layers x {ranks} ranks x {tokens} tokens x {topk} of "
        f"{trace.metadata.num_experts} experts"
    )
    for each in trace.metadata.left_out:
        console.print(escape(f"  left out: {each}"))
    for each in collapsed_layers(trace):
        console.print(f"  {each}")


def _fetch(chosen: argparse.Namespace) -> None:
    from hiermoe.routing.fetching import fetch
    from hiermoe.routing.public import public_set, public_sets, public_trace

    console = Console(highlight=False, soft_wrap=True)
    if chosen.name is not None:
        fetch(public_set(chosen.name), chosen.folder, public_trace(chosen.name), lambda x: console.print(escape(x)))
        return
    if chosen.folder is not None:
        raise ValueError(f"from={chosen.folder}: name the set that it has")
    for known in public_sets().values():
        here = "here" if public_trace(known.name).is_file() else known.needs or "not here yet"
        sizes = f"E={known.num_experts or 'several'} K={known.topk or 'several'}"
        console.print(escape(f"{known.name}: {known.what}; {sizes}; {known.url}; licence: {known.licence}; {here}"))


def _show(chosen: argparse.Namespace) -> None:
    from hiermoe.commands.trace_views import show
    from hiermoe.topology.cluster import Cluster

    for table in show(RoutingTrace.load(trace_file(chosen.trace)), Cluster.named(chosen.cluster)):
        Console().print(table)


def _export(chosen: argparse.Namespace) -> None:
    from hiermoe.commands.trace_views import traffic_matrices, write_matrices
    from hiermoe.policies.system import SystemConfig
    from hiermoe.topology.cluster import Cluster

    trace, cluster = RoutingTrace.load(trace_file(chosen.trace)), Cluster.named(chosen.cluster)
    matrices = traffic_matrices(
        trace,
        cluster,
        SystemConfig.named(chosen.system),
        row_bytes=chosen.row_bytes,
        tokens_per_rank=chosen.tokens_per_rank,
        iteration=chosen.iteration,
        layer=chosen.layer,
        topk=chosen.topk,
    )
    console = Console(highlight=False, soft_wrap=True)
    experts, gpus = trace.metadata.num_experts, cluster.hierarchy.num_ranks
    if experts % gpus:
        console.print(
            f"{experts} experts do not divide over {gpus} GPUs: {experts // gpus + 1} on {experts % gpus} of them, "
            f"{experts // gpus} on the others; {dividing(experts)} divide them"
        )
    for path, matrix in write_matrices(chosen.output, matrices):
        # Buffers of the test hold the largest sum of a row or column.
        largest = int(max(matrix.sum(0).max(), matrix.sum(1).max()))
        console.print(f"{path}: {matrix.sum() / 1e6:.3f} MB among {len(matrix)} GPUs")
        console.print(
            f"  NCCL_TESTS_ALLTOALLV_MATRIX_FILE={path} alltoallv_perf -b {largest} -e {largest} -a 3", style="dim"
        )
