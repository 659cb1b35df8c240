"""The interface of what is measured."""

from collections.abc import Sequence
from typing import Any, ClassVar

import pandas as pd

from hiermoe.ranks.world import Progress, Source


class Measurement:
    """One kind of measurement; a subclass says how it is done, in a file of its own.

    Attributes:
        command: of `hiermoe` that it belongs to.
        source: what records say of how its numbers came to be; None: what the ranks say.
        needs_ranks: whether it measures on ranks.
        needs_system: whether a system, a model and its routing enter.
    """

    command: ClassVar[str] = "run"
    source: Source | None = None
    needs_ranks: ClassVar[bool] = False
    needs_system: ClassVar[bool] = True

    @property
    def module(self) -> str:
        """Where the code begins that makes the numbers."""
        return type(self).__module__

    def prepare(self, config: Any) -> Any:
        """What `measure` works on, made from the configuration of a run.

        Raises:
            NotApplicable: the combination has no meaning or no data.
            ValueError: sizes that do not fit.
        """
        return config

    def num_steps(self, job: Any) -> int:
        """Times that progress will be told, for a job that `prepare` made."""
        return job.iterations

    def provenance(self, job: Any) -> dict[str, Any]:
        """What the record should tell of a job beside code, host and versions."""
        return {}

    def measure(self, jobs: Sequence[Any], world: Any, progress: Progress) -> list[pd.DataFrame]:
        """Measure, one job after another where the measurement says nothing else.

        Args:
            jobs: one, or several that differ in their system alone, to be measured together on the same ranks.
            world: the ranks (:class:`~hiermoe.ranks.world.World`); None where it needs none.
            progress: called with the number of every finished iteration.

        Returns:
            Rows of each job, without the run's own keys.

        Raises:
            NotApplicable: a job has no meaning.
            ValueError: a job that cannot be done.
            RunDied: a rank failed; the rows of all jobs have a column ``of``, the job's place in the list.
        """
        return [self.measure_one(job, world, progress) for job in jobs]

    def measure_one(self, job: Any, world: Any, progress: Progress) -> pd.DataFrame:
        """As `measure`, a single job."""
        raise NotImplementedError


def by_job(rows: pd.DataFrame, num_jobs: int) -> list[pd.DataFrame]:
    """The rows of each job, told apart by a column ``of``; where there is none, all rows are the one job's."""
    if "of" not in rows:
        return [rows] * num_jobs
    return [rows[rows["of"] == of].drop(columns="of") for of in range(num_jobs)]
