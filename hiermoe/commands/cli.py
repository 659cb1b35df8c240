"""The ``hiermoe`` command: run, calibrate, train, record, reproduce, report."""

import os
import re
import shlex
import sys
from collections.abc import Callable
from typing import NoReturn

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape

from hiermoe.commands.arguments import Parser
from hiermoe.commands.help_text import help_text
from hiermoe.commands.plain_letters import print_plain_letters_where_needed
from hiermoe.records.choices import unknown
from hiermoe.records.interrupts import Interrupted, is_interrupted
from hiermoe.records.project import CONF, WORKPLACE
from hiermoe.records.strict import BrokenRules, Schema, checked

USAGE = """hiermoe: does HierMoE's communication hold, and would it help your model on your cluster?

  hiermoe run         one system on one cluster with one model's routing (hiermoe run --help lists the choices)
  hiermoe run -m ...  several: hiermoe run -m +sweeps=fig11, or system=megatron,hiermoe model=qwen3_30b_a3b,deepseek_v3
  hiermoe calibrate   measure what an AlltoAll costs among all groups of a cluster, and write the cluster's file
  hiermoe train       train a narrow model under one system on this machine's ranks; -m as above
  hiermoe reproduce   all sweeps of the paper on all cores, then the report; what is done is skipped
  hiermoe report      the report from the records that are there
  hiermoe records     what records there are: printed, filtered, exported for pandas, every column explained
  hiermoe record      train a narrow model on real text and record what its routers choose
  hiermoe advise      would it help your model on your cluster? From a trace, expert loads or a profile: a page
  hiermoe published   what is predicted of measurements that others published, and how far off that is
  hiermoe trace       import routing that others recorded, show a trace, export its traffic (hiermoe trace --help)
  hiermoe doctor      what this machine can run, and what each missing thing would take
"""


def main() -> None:
    """Entry point of the ``hiermoe`` script. Exits with 0, or with 1 or 2 after one line that says what is wrong."""
    print_plain_letters_where_needed()
    commands: dict[str, Callable[[], None]] = {
        "run": _run,
        "calibrate": _calibrate,
        "train": _train,
        "record": _record,
        "reproduce": _reproduce,
        "report": _report,
        "records": _records,
        "advise": _advise,
        "published": _published,
        "trace": _trace,
        "doctor": _doctor,
    }
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print(USAGE)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    command = sys.argv.pop(1)
    if command not in commands:
        _fail(unknown("command", command, commands))
    sys.argv[0] = f"hiermoe {command}"  # in provenance, of worker processes too
    sys.path.append(str(WORKPLACE))  # for what a user's own conf/ names in _target_
    try:
        commands[command]()
    except (ValueError, OSError) as error:
        _fail(error)


def _fail(error: object) -> NoReturn:
    """Say what is wrong in one line, or where several values break rules in one for each, and end."""
    if is_interrupted():
        raise Interrupted
    lines = [str(error).splitlines()[0]]
    if isinstance(error, BrokenRules) and len(error.lines) > 1:
        of = f" of {error.origin}" if error.origin else ""
        lines = [f"{len(error.lines)} values{of} break a rule:", *(f"  {line}" for line in error.lines)]
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/red] {escape(chr(10).join(lines))}")
    sys.exit(2)


def _run() -> None:
    from hiermoe.commands.comparison import Composed, print_comparison, run_all_and_print
    from hiermoe.records.store import RunStore
    from hiermoe.runs.run_config import RunConfig
    from hiermoe.runs.single import run_and_print

    composed: list[Composed] = []
    _composed("config", RunConfig, run_and_print, lambda *one: composed.append(Composed(*one)))
    if not composed:
        return
    ended = run_all_and_print(composed)
    print_comparison(ended, RunStore(), Console())
    if failed := [one for one in ended if one.error]:
        _fail(f"{len(failed)} of {len(ended)} runs failed; the table says which and why")


def _calibrate() -> None:
    if any(re.match(r"\+*from[.=]", argument) for argument in sys.argv[1:]) or "--commands" in sys.argv:
        from hiermoe.commands.calibrate_from_command import FromFilesConfig, calibrate_from_and_print

        sys.argv = ["commands=true" if argument == "--commands" else argument for argument in sys.argv]
        _composed("calibrate_from", FromFilesConfig, calibrate_from_and_print)
        return
    if any(re.match(r"\+*topology=", argument) for argument in sys.argv[1:]):
        from hiermoe.commands.calibrate_topology_command import TopologyConfig, profile_and_print

        _composed("calibrate_topology", TopologyConfig, profile_and_print)
        return
    from hiermoe.commands.calibrate_command import CalibrationConfig, calibrate_and_print

    _composed("calibrate", CalibrationConfig, calibrate_and_print)


def _train() -> None:
    from hiermoe.runs.training import TrainRunConfig, train_all_and_print, train_and_print

    several: list[TrainRunConfig] = []

    def collect(_: tuple[str, ...], config: TrainRunConfig | None, error: str) -> None:
        if config is None:
            raise ValueError(error)
        several.append(config)

    _composed("train", TrainRunConfig, train_and_print, collect)
    train_all_and_print(several)


def _record() -> None:
    from hiermoe.narrow.record import RecordConfig, record

    _composed("record", RecordConfig, lambda config: record(config, shlex.join(["hiermoe", "record", *sys.argv[1:]])))


def _advise() -> None:
    from hiermoe.commands.advise_command import AdviceConfig, advise_and_print

    _composed("advise", AdviceConfig, advise_and_print)


def _composed(
    config_name: str,
    schema: type[Schema],
    run: Callable[[Schema], object],
    collect: Callable[[tuple[str, ...], Schema | None, str], object] | None = None,
) -> None:
    """Let Hydra compose what the command line says, and run it; under ``-m`` several.

    Args:
        config_name: primary file in conf/.
        schema: of the configuration.
        run: what is done with it.
        collect: is given each of several instead: its own overrides, its configuration, None if there is none, and what
            is wrong. None: they are run one after another, and the first that fails ends the command.
    """
    from hydra.core.hydra_config import HydraConfig

    from hiermoe.ranks.server import RankFailedError
    from hiermoe.runs.compose import REFUSED, plain, refusal, register

    if {"-h", "--help"} & set(sys.argv):
        print(help_text(config_name))
        return
    register(sys.argv[1:])
    later = collect if {"-m", "--multirun"} & set(sys.argv) else None
    os.environ["HYDRA_FULL_ERROR"] = "1"  # it raises what it refuses, and prints nothing of its own

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
    def task(composed: DictConfig) -> None:
        try:
            config, error = checked(plain(composed), schema), ""
            if later is None:
                run(config)
        except (ValueError, OSError, RankFailedError) as failure:  # of which Hydra would print a traceback
            if later is None:
                _fail(failure)
            config, error = None, str(failure).splitlines()[0]
        if later is not None:
            later(tuple(HydraConfig.get().overrides.task), config, error)

    try:
        task()
    except REFUSED as error:
        overrides = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
        raise refusal(config_name, overrides, error) from error


def _reproduce() -> None:
    from hiermoe.commands.reproduce_command import reproduce
    from hiermoe.runs.compose import sweep_names

    parser = Parser(
        prog="hiermoe reproduce",
        description="All sweeps of the paper, measured runs where there can be any, report.",
    )
    add = parser.add_argument
    add("--sweeps", nargs="+", metavar="NAME", help=f"only these, and nothing measured: {', '.join(sweep_names())}")
    add("--workers", type=int, default=None, help="processes of the simulation (default: one a core)")
    add("--wandb", choices=("offline", "online", "disabled"), default="offline", help="mirror of verdicts")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--quick", action="store_true", help="measure little")
    amount.add_argument("--full", action="store_true", help="measure all")
    cluster = parser.add_argument_group("measured on a cluster")
    add = cluster.add_argument
    add(
        "--on",
        choices=("slurm", "allocation"),
        help="slurm: submit a job, follow it and report, from a login node. allocation: in one that is there, on each "
        "of its processes, as srun or torchrun start them. All must share the file system of the project's folder",
    )
    add("--nodes", type=int, help="of the allocation; required with slurm")
    add("--gpus-per-node", type=int, help="GPUs, or with --device cpu processes, of each; required with slurm")
    add("--device", choices=("cuda", "cpu"), help="cuda (default): NCCL. cpu: gloo, and no GPUs are asked for")
    add("--partition", help="of Slurm")
    add("--account", help="of Slurm")
    add("--time-limit-min", type=int, help="of the job, minutes; what is missing then, the next job does")
    add("--cluster", dest="structure", metavar="NAME", help="levels of this cluster of the same size, e.g. node halves")
    add("--cluster-name", dest="name", help="of the calibrated cluster's file in results/clusters")
    arguments = vars(parser.parse_args())
    general = {key: arguments.pop(key) for key in ("sweeps", "workers")}
    quick, full, where = (arguments.pop(key) for key in ("quick", "full", "on"))
    general |= {"wandb_mode": arguments.pop("wandb"), "amount": "quick" if quick else "full" if full else "default"}
    given = {key: value for key, value in arguments.items() if value is not None}
    if where is None:
        if given:
            parser.error(f"--{next(iter(given)).replace('_', '-')} needs --on slurm or --on allocation")
        reproduce(**general)
        return
    if general.pop("sweeps"):
        parser.error(f"--sweeps chooses simulated sweeps; --on {where} measures")
    from hiermoe.commands.on_cluster import reproduce_on_cluster

    reproduce_on_cluster(where, given, **general)


def _report() -> None:
    from hiermoe.analysis.report import write_reference, write_report
    from hiermoe.commands.records_command import print_damaged, print_stale
    from hiermoe.records.store import RunStore
    from hiermoe.runs.indexing import index_runs
    from hiermoe.runs.stale import stale_in_place_of

    parser = Parser(prog="hiermoe report", description="The report from the records there are.")
    parser.add_argument("--reference", action="store_true", help="also the small copy that is committed")
    arguments = parser.parse_args()
    store = RunStore()
    index = index_runs(store)
    stale = stale_in_place_of(index, store)
    report = write_report(index, store, stale=stale)
    print_stale(stale, Console(highlight=False))
    print_damaged(report.damaged, Console(highlight=False))
    print(f"{report.page}{'' if report.is_new else ' is current: nothing it shows has changed'}")
    if arguments.reference:
        print(write_reference())


def _records() -> None:
    from hiermoe.commands.records_command import main as records

    records(sys.argv[1:])


def _published() -> None:
    from hiermoe.commands.published_command import main as published

    published(sys.argv[1:])


def _trace() -> None:
    from hiermoe.commands.trace_command import main as trace

    trace(sys.argv[1:])


def _doctor() -> None:
    from hiermoe.commands.doctor_command import examine_and_print

    parser = Parser(prog="hiermoe doctor", description="What this machine can run.")
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    sys.exit(examine_and_print(parser.parse_args().json))
