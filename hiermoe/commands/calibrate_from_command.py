"""A calibration from files of nccl-tests: print the constants, write the cluster's file, draw the curves."""

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hiermoe.planner.nccl_exchanges import Exchanged, fit_exchanges_of
from hiermoe.records.project import shown
from hiermoe.runs.calibration_files import FromFilesConfig, commands, write_measured_cluster
from hiermoe.topology.cluster import Cluster
from hiermoe.topology.peers import AlphaBeta


def calibrate_from_and_print(config: FromFilesConfig) -> None:
    """Fit what the files measured, and print what came out and where it is.

    Raises:
        ValueError: a file cannot be read, or is of no AlltoAll of the cluster.
    """
    console = Console(soft_wrap=True, highlight=False)
    if config.commands:
        for peers, command in commands(config.cluster):
            console.print(f"# {peers}: {peers.size(config.cluster.hierarchy)} GPUs each\n{escape(command)}")
        return
    exchanges, notes = fit_exchanges_of(config.by_exchange(), config.cluster)
    Console().print(curve_table(exchanges, config.cluster))
    for note in notes:
        console.print(f"note: {escape(note)}")
    cluster = write_measured_cluster(config, exchanges)
    missing = [peers for peers in cluster.exchanges if peers not in {one.peers for one in exchanges}]
    if missing:
        console.print(
            f"[yellow]not measured[/yellow], taken from {config.cluster.name} and marked: "
            f"{', '.join(map(str, missing))}; hiermoe calibrate --commands cluster={config.cluster.name} says how to"
        )
    from hiermoe.analysis.figures.measured import curves  # a second to import

    figure = config.path.with_suffix(".png")
    curves.save(exchanges, f"What an AlltoAll costs on {config.name}, by nccl-tests", figure)
    console.print(f"cluster: {shown(config.path)}, for other commands cluster={config.name}")
    console.print(f"figure: {shown(figure)}")


def curve_table(exchanges: list[Exchanged], profile: Cluster) -> Table:
    """Fitted constants of every AlltoAll with 95 % intervals, for the eye."""
    table = Table(
        title=f"AlltoAlls of {profile.name} by nccl-tests", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("AlltoAll", no_wrap=True)
    for column in ("GPUs", "alpha\nus", "1/beta\nGB/s", "profile\nGB/s", "start\nus", "pieces\n", "error\n"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in exchanges:
        low, high = one.fit.alpha_ms
        slow, fast = (_gb_per_s(beta) for beta in reversed(one.fit.beta_ms_per_byte))
        fitted, own = one.fit.constants, profile.constants(one.peers)
        table.add_row(
            str(one.peers),
            str(len(one.tests[0].members) or "?"),
            f"{fitted.alpha_ms * 1e3:.1f}\n({low * 1e3:.1f}-{high * 1e3:.1f})",
            f"{_gb_per_s(fitted.beta_ms_per_byte):.0f}\n({slow:.0f}-{fast:.0f})",
            f"{_gb_per_s(own.beta_ms_per_byte):.0f}",
            f"{start_ms(fitted) * 1e3:.1f}",
            str(1 + len(fitted.bends)),
            f"{np.sqrt((one.fit.residuals**2).mean()):.1%}",
        )
    table.caption = (
        "t = alpha + beta n for large n (bytes of a GPU, its own share included), in brackets 95 % of resampled "
        "residuals. start: t of the smallest n; pieces: straight ones that the curve is made of, as small messages lie "
        "off the line; error: of the curve, root mean square."
    )
    table.caption_justify = "left"
    return table


def start_ms(constants: AlphaBeta) -> float:
    """What an AlltoAll of next to nothing takes."""
    return constants.ms(0.0)


def _gb_per_s(beta_ms_per_byte: float) -> float:
    return 1e-6 / beta_ms_per_byte if beta_ms_per_byte > 0 else float("inf")
