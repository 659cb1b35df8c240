"""Where the project's folders are."""

from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[2]
RUNS = PROJECT_ROOT / "results" / "runs"
SCRATCH = PROJECT_ROOT / ".cache" / "scratch"  # what ranks of one run share, gone after it
CLUSTERS = PROJECT_ROOT / "results" / "clusters"  # calibrated ones
CONF = PROJECT_ROOT / "conf"
SWEEPS = PROJECT_ROOT / "sweeps"
REPORTS = PROJECT_ROOT / "reports"
PUBLISHED = PROJECT_ROOT / "results" / "published.csv"


def from_root(path: str | Path) -> Path:
    """A path as given if absolute, else below the project's root, wherever the command was started."""
    return PROJECT_ROOT / path


def to_root(path: Path) -> str:
    """The other way round: below the project's root as a path from there, elsewhere as it is."""
    return str(path.relative_to(PROJECT_ROOT) if path.is_relative_to(PROJECT_ROOT) else path)
