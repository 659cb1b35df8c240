"""What Hydra finds beside conf/: sweeps as the group ``sweeps``, calibrated clusters in the group ``cluster``."""

from pathlib import Path
from typing import Any

from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from omegaconf import OmegaConf

from hiermoe.records.project import SWEEPS
from hiermoe.topology.cluster_files import cluster_file, cluster_names

_GROUPS = ("cluster", "sweeps")


class ProjectSource(ConfigSource):
    """Two groups, and no more: a folder as a source would have ``--help`` walk through all that is below it."""

    @staticmethod
    def scheme() -> str:
        """Of this source's address in Hydra's search path."""
        return "hiermoe"

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a file.

        Raises:
            ConfigLoadError: there is none of this name.
        """
        path = _find(config_path)
        if path is None:
            raise ConfigLoadError(f"Config not found : {config_path}")
        text = path.read_text(encoding="utf-8")
        return ConfigResult(
            config=OmegaConf.create(text),
            path=self.full_path(),
            provider=self.provider,
            header=self._get_header_dict(text[:512]),
        )

    def available(self) -> bool:
        """Always."""
        return True

    def is_group(self, config_path: str) -> bool:
        """Whether it is one of the two, their root, or a folder of sweeps."""
        path = config_path.strip("/")
        return path in ("", *_GROUPS) or (path.startswith("sweeps/") and (SWEEPS.parent / path).is_dir())

    def is_config(self, config_path: str) -> bool:
        """Whether there is such a file."""
        return _find(config_path) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> Any:
        """Choices, for help and error messages."""
        group = config_path.strip("/")
        if group == "":
            return [] if results_filter == ObjectType.CONFIG else list(_GROUPS)
        if group == "cluster":
            return [] if results_filter == ObjectType.GROUP else cluster_names()
        folder = SWEEPS.parent / group
        files = [] if results_filter == ObjectType.GROUP else [path.stem for path in folder.glob("*.yaml")]
        folders = (
            [] if results_filter == ObjectType.CONFIG else [path.name for path in folder.iterdir() if path.is_dir()]
        )
        return sorted([*files, *folders])


def _find(config_path: str) -> Path | None:
    group, _, name = config_path.partition("/")
    if group == "cluster" and name:
        return cluster_file(name)
    path = SWEEPS / f"{name.removesuffix('.yaml')}.yaml"
    return path if group == "sweeps" and path.is_file() else None
