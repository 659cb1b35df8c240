"""Which systems there are to choose from: every file of conf/system/ that means something on the cluster."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from hiermoe.planner.cost import check_overlap
from hiermoe.planner.scheme import DispatchScheme
from hiermoe.policies.system import SystemConfig
from hiermoe.records.groups import files_of
from hiermoe.records.project import CONF
from hiermoe.records.status import NotApplicable
from hiermoe.topology.cluster import Cluster

BASELINE = "megatron"  # the flat AlltoAll, what everybody has
WITHOUT_COPIES = (BASELINE, "hd_moe", "hiermoe")  # what systems with copies are held against
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


def candidates_with_copies(cluster: Cluster, names: Sequence[str] | None = None) -> list[Candidate]:
    """Systems that keep experts in more than one place, after those without that they are held against.

    Args:
        cluster: hierarchy.
        names: only these; None for all of conf/system/. Those that make no copies, or do not apply, are left out.

    Returns:
        The systems; none at all where nothing makes copies.

    Raises:
        ValueError: an unknown name, or a file that breaks a rule.
    """
    found = []
    for system in map(SystemConfig.named, dict.fromkeys([*WITHOUT_COPIES, *(names or files_of("system"))])):
        if system.name in WITHOUT_COPIES or system.makes_copies:
            with suppress(NotApplicable):
                schemes = system.build_schemes(cluster.hierarchy)
                found.append(Candidate(system, (system.label,), schemes, system.moves))
    return found if any(one.system.makes_copies for one in found) else []


def candidates(cluster: Cluster, names: Sequence[str] | None = None) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """All systems on a cluster with one place for every expert, equal ones together, the flat AlltoAll first.

    Args:
        cluster: hierarchy, and whether its stages are known to overlap.
        names: only these, and the flat AlltoAll; None for all of conf/system/.

    Returns:
        The systems that apply, and label and reason of those that do not.

    Raises:
        ValueError: an unknown name, a file that breaks a rule, or none of the systems applies.
    """
    left_out: list[tuple[str, str]] = []
    alike: dict[str, list[tuple[SystemConfig, tuple[DispatchScheme, ...]]]] = {}
    if names is None:  # of equal ones, those that come with the suite stand for all: people know them
        files = files_of("system")
        names = sorted(files, key=lambda name: files[name].parent != CONF / "system")
    for system in map(SystemConfig.named, dict.fromkeys([BASELINE, *names])):
        if system.executor == CONTROL:
            continue
        if system.migration == "background":
            left_out.append((system.label, "what a step hides of its moves has no price here"))
            continue
        try:
            if system.makes_copies:
                raise NotApplicable("keeps experts in more than one place; copies=true prices that")
            schemes = system.build_schemes(cluster.hierarchy)
            for scheme in schemes:
                check_overlap(scheme, cluster)
        except NotApplicable as error:
            left_out.append((system.label, str(error)))
            continue
        rows = [(scheme.stages, scheme.padding, scheme.chunks) for scheme in schemes]
        alike.setdefault(f"{rows} {json.dumps(system.policy, sort_keys=True)}", []).append((system, schemes))
    found = [
        Candidate(
            system, tuple(dict.fromkeys([system.label, *(one.label for one, _ in others)])), schemes, system.moves
        )
        for (system, schemes), *others in alike.values()
    ]
    if len(found) == 1:
        why = "; ".join(f"{label} {reason}" for label, reason in left_out)
        raise ValueError("there is no system to compare with the flat AlltoAll" + f": {why}" * bool(why))
    return found, left_out
