"""Where the files of clusters are: shipped ones in conf/, calibrated ones in results/."""

from pathlib import Path

from hiermoe.records.project import CLUSTERS, CONF


def cluster_file(name: str) -> Path | None:
    """The file of a cluster.

    Args:
        name: of a file in conf/cluster/, else of one in results/clusters/, where `hiermoe calibrate` writes, without
            ``.yaml``; else the path of any file that ends so, from the working directory.

    Returns:
        The path; None where there is no such file.
    """
    candidates = [folder / f"{name}.yaml" for folder in (CONF / "cluster", CLUSTERS)]
    if name.endswith(".yaml"):
        candidates.append(Path(name))
    return next((path for path in candidates if path.is_file()), None)


def cluster_names() -> list[str]:
    """Names of all clusters, in alphabetical order."""
    return sorted({path.stem for folder in (CONF / "cluster", CLUSTERS) for path in folder.glob("*.yaml")})
