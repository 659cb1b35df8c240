"""Puts into the wheel what lies beside the packages in the repository: everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# What commands read. Results, the reference report and tests stay out.
SHIPPED = (
    "conf/**/*.yaml",
    "sweeps/**/*.yaml",
    "reports/claims.yaml",
    "reports/measurements.yaml",
    "reports/statements.yaml",
    "reports/templates/*",
    "results/published.csv",
    "results/published_measurements.csv",
    "results/published_statements.csv",
    "results/traces/*.trace",
    "results/traces/README.md",
    "constraints.txt",
)


class WithShipped(build_py):
    """Copies them to hiermoe/shipped, where hiermoe/records/project.py looks for them."""

    def run(self) -> None:
        """Build, then copy; an editable install reads them where they are."""
        super().run()
        if self.editable_mode:
            return
        root = Path(__file__).parent
        for path in (path for pattern in SHIPPED for path in root.glob(pattern)):
            target = Path(self.build_lib) / "hiermoe" / "shipped" / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


setup(cmdclass={"build_py": WithShipped})
