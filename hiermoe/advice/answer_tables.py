"""The answer as tables: what page, figures and terminal show, and what is written as CSV."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from hiermoe.advice.assessment import Assessed, Assessment
from hiermoe.advice.recommendation import Constants, Option, Recommendation, constants_of, option, recommend
from hiermoe.advice.sensitivity import end_to_end_shares, sensitivity, tokens_needed
from hiermoe.advice.systems import BASELINE
from hiermoe.analysis.whole_step import step_speedup
from hiermoe.topology.peers import WORLD, Peers

INDEPENDENT = "†"  # beside every number that takes experts to be drawn independently


@dataclass(frozen=True)
class Answer:
    """An assessment and what follows from it."""

    assessment: Assessment
    found: Recommendation

    @classmethod
    def of(cls, assessment: Assessment) -> "Answer":
        """Apply the rules."""
        case = assessment.case
        options = [option(one, case.cluster) for one in assessment.systems]
        return cls(assessment, recommend(options, constants_of(case.cluster), case.share))

    @property
    def constants(self) -> Constants:
        """Where alpha and beta come from."""
        return constants_of(self.assessment.case.cluster)

    @property
    def mark(self) -> str:
        """What stands beside every number that depends on which experts share tokens, where that is assumed."""
        return INDEPENDENT if self.assessment.case.kind == "loads" else ""

    @property
    def flat_ms(self) -> float:
        """Of a step under the flat AlltoAll."""
        return self.option(BASELINE).mean_ms

    @property
    def followed(self) -> str:
        """The system that figures speak of: the recommended one, else the fastest."""
        return self.found.fastest if self.found.outcome in ("stay", "unresolved") else self.found.chosen

    @cached_property
    def best_still(self) -> str:
        """The fastest system that moves no experts and drops no tokens, apart from the flat AlltoAll."""
        still = [x for x in self.assessment.systems[1:] if not x.candidate.moves and not x.candidate.lossy]
        fastest = min(still, key=lambda x: self.option(x.candidate.name).mean_ms, default=self.assessment.flat)
        return fastest.candidate.name

    def label(self, name: str) -> str:
        """Of a system."""
        return self.assessment.named(name).candidate.label

    def color(self, name: str) -> str:
        """Of a system, as its file says."""
        return self.assessment.named(name).candidate.system.color

    def option(self, name: str) -> Option:
        """A system as the rules see it."""
        return option(self.assessment.named(name), self.assessment.case.cluster)

    def communication(self, name: str) -> float:
        """AlltoAll and migration of a system over the flat AlltoAll."""
        return self.option(name).mean_ms / self.flat_ms

    @cached_property
    def systems(self) -> pd.DataFrame:
        """One row per system, by rising time."""
        cluster = self.assessment.case.cluster
        rows = []
        for one in self.assessment.systems:
            candidate, estimate = one.candidate, one.speedup
            rows.append(
                {
                    "system": candidate.name,
                    "label": candidate.label,
                    "also": ", ".join(candidate.labels[1:]),
                    "step_ms": float(one.held_out.step_ms(cluster).mean()),
                    "speedup": estimate.value,
                    "low": estimate.low if self.assessment.has_intervals else np.nan,
                    "high": estimate.high if self.assessment.has_intervals else np.nan,
                    "n": estimate.n,
                    "dimensions": _dimensions(one, self.assessment),
                    "updates": int(one.updates["updates"].iloc[-1]) if len(one.updates) else 0,
                    "moved_ms": one.moved_ms,
                    "communication": self.communication(candidate.name),
                    "moves": candidate.moves,
                    "lossy": candidate.lossy,
                    **{f"{peers}_ms": ms for peers, ms in one.held_out.mean_stages(cluster).items()},
                }
            )
        return pd.DataFrame(rows).sort_values("step_ms", kind="stable", ignore_index=True)

    @cached_property
    def updates(self) -> pd.DataFrame:
        """What updates bring, all systems that move experts; empty where there is none."""
        found = [one.updates for one in self.assessment.systems if len(one.updates)]
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame()

    @cached_property
    def crossing(self) -> pd.DataFrame:
        """Bytes that one GPU sends across every level in one AlltoAll, mean over GPUs: a column per system."""
        cluster = self.assessment.case.cluster
        table = self.assessment.levels[["level", "name"]].copy()
        for name in dict.fromkeys([BASELINE, self.best_still, self.followed]):
            held_out = self.assessment.named(name).held_out
            table[name] = held_out.crossing(cluster) / cluster.hierarchy.num_ranks
        return table

    @cached_property
    def sensitivity(self) -> pd.DataFrame:
        """The answer under other assumptions."""
        return sensitivity(self.assessment, self.found)

    @cached_property
    def tokens_needed(self) -> int | None:
        """Fewest tokens a GPU with which the followed system is worth it."""
        return tokens_needed(self.assessment, self.followed)

    @cached_property
    def end_to_end(self) -> pd.DataFrame:
        """Speed-up of the step against the share that AlltoAll has of it now: a column per system."""
        shares = end_to_end_shares()
        names = dict.fromkeys([self.followed, self.best_still, *self._paper_systems()])
        curves = {name: step_speedup(shares, self.communication(name)) for name in names}
        return pd.DataFrame({"alltoall_share": shares, **curves})

    def _paper_systems(self) -> Iterator[str]:
        """The paper's two-stage system, for comparison, where it applies."""
        for one in self.assessment.systems:
            if "HD2-MoE" in one.candidate.labels:
                yield one.candidate.name

    def stage_words(self) -> dict[Peers, str]:
        """Every kind of exchange that a shown system has, in words."""
        return {peers: exchange_words(peers, self.assessment) for peers in self.assessment.case.cluster.exchanges}


def exchange_words(peers: Peers, assessment: Assessment) -> str:
    """Who exchanges with whom."""
    if peers == WORLD:
        return "among all GPUs"
    name = assessment.case.cluster.levels[peers.level - 1].name
    return f"between {groups_of(name)}" if peers.kind == "inter" else f"inside a {name}"


def _dimensions(one: Assessed, assessment: Assessment) -> str:
    shares = one.held_out.dimensions(assessment.case.cluster)
    return ", ".join(f"{d}" if share == 1 else f"{d} ({share:.0%})" for d, share in shares.items())


def groups_of(name: str) -> str:
    """Several groups of a level: ``nodes``, ``halves``, ``GPUs``."""
    return {"half": "halves", "gpu": "GPUs", "switch": "switches"}.get(name, f"{name}s")
