"""A calibration from the command line: measure, print the constants, write the cluster's file, draw its Fig. 9."""

from rich.console import Console

from hiermoe.planner.fit import fit_exchanges
from hiermoe.records.project import shown
from hiermoe.records.store import RunStore
from hiermoe.runs.calibration import CalibrationConfig, calibration_table, write_cluster
from hiermoe.runs.single import present


def calibrate_and_print(config: CalibrationConfig) -> None:
    """Calibrate, and print what came out and where it is.

    Raises:
        ValueError: the calibration cannot be done or failed.
    """
    title = f"Calibration · {config.cluster.name} · ranks={config.ranks.name}"
    present([config], [title], lambda records, title: calibration_table(records, title, config.cluster))
    from hiermoe.analysis.figures.measured import calibrated as calibration  # a second to import

    store = RunStore()
    cluster, records = write_cluster(config, store), store.read(config.run_id)
    r2 = {exchange: fit.r2 for exchange, fit in fit_exchanges(records, cluster).items()}
    figure = config.path.with_suffix(".png")
    named = f"What an AlltoAll costs on {config.cluster.name}, measured (ranks={config.ranks.name})"
    calibration.save(calibration.table(records, cluster, r2), named, figure)
    console = Console(soft_wrap=True)
    console.print(f"cluster: {shown(config.path)}, for other commands cluster={config.name}")
    console.print(f"figure: {shown(figure)}")
