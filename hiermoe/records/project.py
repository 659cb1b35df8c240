"""Where things are: what is shipped with the suite, and what is made with it."""

import os
from pathlib import Path

CODE = Path(__file__).resolve().parents[2]  # the packages lie in it: a checkout of the repository, or site-packages
_IN_WHEEL = CODE / "hiermoe" / "shipped"  # setup.py puts there what is beside the packages in the repository
IS_CHECKOUT = not _IN_WHEEL.is_dir()
HOME_VARIABLE = "HIERMOE_HOME"

SHIPPED = CODE if IS_CHECKOUT else _IN_WHEEL  # only to be read
CONF = SHIPPED / "conf"
SWEEPS = SHIPPED / "sweeps"
PUBLISHED = SHIPPED / "results" / "published.csv"
TRACES = SHIPPED / "results" / "traces"
RULES = SHIPPED / "reports" / "claims.yaml"
STATEMENTS = SHIPPED / "results" / "published_statements.csv"  # of others, on systems with copies of experts
STATEMENT_RULES = SHIPPED / "reports" / "statements.yaml"
TEMPLATES = SHIPPED / "reports" / "templates"


def _workplace() -> Path:
    told = os.environ.get(HOME_VARIABLE)
    if told:
        return Path(told).expanduser().absolute()
    return CODE if IS_CHECKOUT and os.access(CODE, os.W_OK) else Path.cwd()


WORKPLACE = _workplace()  # HIERMOE_HOME; else the checkout; installed, or in a checkout that is read-only, the folder
RUNS = WORKPLACE / "results" / "runs"  # that the command was started in
CLUSTERS = WORKPLACE / "results" / "clusters"  # calibrated ones
JOBS = WORKPLACE / "results" / "jobs"  # of Slurm
REPORTS = WORKPLACE / "reports"
PUBLIC = WORKPLACE / ".cache" / "public"  # traces of public sets that were fetched
SCRATCH = WORKPLACE / ".cache" / "scratch"  # what ranks of one run share, gone after it


def find_file(path: str | Path) -> Path:
    """A file that somebody names: from the folder that the command was started in, else one that is made or shipped.

    Returns:
        The first that is there; where none is, as seen from the folder of the command.
    """
    named = Path(path).expanduser()
    here = Path.cwd() / named
    return next((each for each in (here, WORKPLACE / named, SHIPPED / named) if each.exists()), here)


def in_workplace(path: str | Path) -> Path:
    """A path as given if absolute, else among what is made with the suite, wherever the command was started."""
    return WORKPLACE / Path(path).expanduser()


def shown(path: Path) -> str:
    """The other way round, for messages: a path among what is made or shipped as one from there."""
    root = next((root for root in (WORKPLACE, SHIPPED) if path.is_relative_to(root)), None)
    return str(path if root is None else path.relative_to(root))
