"""Which systems there are to choose from: every file of conf/system/ that means something on the cluster."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hiermoe.planner.scheme import DispatchScheme
from hiermoe.policies.system import SystemConfig
from hiermoe.records.project import CONF
from hiermoe.records.status import NotApplicable
from hiermoe.topology.hierarchy import Hierarchy

BASELINE = "megatron"  # the flat AlltoAll, what everybody has
CONTROL = "reordered"  # executor of a control that only reorders sums


@dataclass(frozen=True)
class Candidate:
    """A system, and those that no count of rows tells from it.

    Attributes:
        system: that stands for all of them.
        labels: of all of them, its own first.
        schemes: the cheapest is used in every step.
        moves: whether its policy may move experts.
    """

    system: SystemConfig
    labels: tuple[str, ...]
    schemes: tuple[DispatchScheme, ...]
    moves: bool

    @property
    def name(self) -> str:
        """Of its file in conf/system/."""
        return self.system.name

    @property
    def label(self) -> str:
        """Of the system that stands for all."""
        return self.labels[0]

    @property
    def lossy(self) -> bool:
        """Whether it may drop token-expert pairs."""
        return any(scheme.lossy for scheme in self.schemes)


def candidates(
    hierarchy: Hierarchy, names: Sequence[str] | None = None
) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """All systems on a hierarchy, equal ones together, the flat AlltoAll first.

    Args:
        hierarchy: groups of GPUs.
        names: only these, and the flat AlltoAll; None for all of conf/system/.

    Returns:
        The systems that apply, and label and reason of those that do not.

    Raises:
        ValueError: an unknown name, or a file that breaks a rule.
    """
    left_out: list[tuple[str, str]] = []
    alike: dict[str, list[tuple[SystemConfig, tuple[DispatchScheme, ...]]]] = {}
    for system in _systems(names):
        try:
            schemes = system.build_schemes(hierarchy)
        except NotApplicable as error:
            left_out.append((system.label, str(error)))
            continue
        rows = [(scheme.stages, scheme.padding) for scheme in schemes]
        alike.setdefault(f"{rows} {json.dumps(system.policy, sort_keys=True)}", []).append((system, schemes))
    found = []
    for same in alike.values():
        system, schemes = same[0]
        labels = tuple(dict.fromkeys(one.label for one, _ in same))
        found.append(Candidate(system, labels, schemes, system.moves))
    return found, left_out


def _systems(names: Sequence[str] | None) -> Iterator[SystemConfig]:
    """The flat AlltoAll first, then by name."""
    every = sorted(path.stem for path in (CONF / "system").glob("*.yaml")) if names is None else names
    systems = (SystemConfig.named(name) for name in dict.fromkeys([BASELINE, *every]))
    return (system for system in systems if system.executor != CONTROL)
