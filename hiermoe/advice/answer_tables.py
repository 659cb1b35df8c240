"""The answer as tables: what page, figures and terminal show, and what is written as CSV."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from hiermoe.advice.assessment import Assessed, Assessment
from hiermoe.advice.recommendation import Constants, Option, Recommendation, constants_of, option, recommend
from hiermoe.advice.sensitivity import published_times, sensitivity, tokens_needed
from hiermoe.advice.systems import BASELINE
from hiermoe.advice.whole_model import pays
from hiermoe.analysis.others.on_fabric import OnFabric
from hiermoe.analysis.whole_step import PUBLISHED_SHARES, step_speedup
from hiermoe.topology.cluster import Cluster
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
        options = [
            option(one, case.cluster, whole_ms=assessment.whole_ms(one, case.cluster)) for one in assessment.systems
        ]
        return cls(assessment, recommend(options, constants_of(case.cluster), assessment.share(case.cluster)))

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
    def own(self) -> Assessed:
        """The system that the answer speaks of."""
        return self.assessment.named(self.found.followed)

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

    def speedup(self, name: str) -> str:
        """AlltoAll's under a system, with its interval where there is one, as a table's cell."""
        if name == BASELINE:
            return "1"
        return f"{self.assessment.named(name).speedup.value:.2f}{self.mark}{self.interval(name)}"

    def interval(self, name: str) -> str:
        """Of AlltoAll's speed-up under a system; empty where iterations are too few for one."""
        estimate = self.assessment.named(name).speedup
        return f" [{estimate.low:.2f}, {estimate.high:.2f}]" if self.assessment.has_intervals else ""

    def step(self, name: str, share: float) -> str:
        """Speed-up of a step of which AlltoAll takes a share now."""
        return f"{step_speedup(share, self.communication(name)):.2f}"

    def step_now(self, name: str) -> str:
        """Speed-up of the user's step, or over the paper's range of shares."""
        own = self.own_step(name)
        steps = [self.step(name, share) for share in PUBLISHED_SHARES] if own is None else [f"{own:.2f}"]
        return " to ".join(steps) + self.mark

    @property
    def share(self) -> float | None:
        """Of the AlltoAlls in the user's step now, as stated or computed; None where it is not known."""
        return self.assessment.share(self.assessment.case.cluster)

    def own_step(self, name: str) -> float | None:
        """Speed-up of the user's step under a system; None where nothing is known of it."""
        return self.assessment.step_speedup(self.assessment.named(name), self.communication(name))

    @property
    def of_what(self) -> str:
        """What a time is of: a step and one layer, or a step and all of them."""
        count = len(self.assessment.layers)
        return f"a step, {count} layers" if count else "a step and layer"

    @property
    def shares(self) -> list[float]:
        """Of AlltoAll in a step, for tables: some round ones and the user's."""
        own = self.share
        return sorted({0.1, 0.2, 0.3, 0.4, 0.5, 0.6} | ({own} if own is not None else set()))

    @cached_property
    def systems(self) -> pd.DataFrame:
        """One row per system, by rising time."""
        cluster = self.assessment.case.cluster
        rows = []
        for one in self.assessment.systems:
            candidate, estimate = one.candidate, one.speedup
            shares = one.held_out.dimensions(cluster)
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
                    "dimensions": ", ".join(f"{d}" if x == 1 else f"{d} ({x:.0%})" for d, x in shares.items()),
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
    def copies(self) -> pd.DataFrame:
        """Systems with copies of experts beside some without, by rising time; empty where not asked for."""
        found = self.assessment.copies
        return found if found.empty else found.sort_values("layer_ms", kind="stable", ignore_index=True)

    @cached_property
    def updates(self) -> pd.DataFrame:
        """What updates bring, all systems that move experts; empty where there is none."""
        return pd.concat([one.updates for one in self.assessment.systems], ignore_index=True)

    @property
    def milestones(self) -> pd.DataFrame:
        """Of `updates` the rows that a reader is shown."""
        updates = self.updates["updates"]
        return self.updates[
            updates.isin([8, 32]) | (updates == updates.groupby(self.updates["system"]).transform("max"))
        ]

    @cached_property
    def mover(self) -> str:
        """The system that the answer speaks of if it moves experts, else the fastest that does; else the former."""
        movers = [x for x in self.assessment.systems if x.candidate.moves and not x.candidate.lossy]
        if self.own.candidate.moves or not movers:
            return self.found.followed
        return min(movers, key=lambda x: self.option(x.candidate.name).mean_ms).candidate.name

    @cached_property
    def layers(self) -> pd.DataFrame:
        """One row per layer of the whole model: what the `mover` brings there; empty for one layer.

        Columns:
            layer: number in the model.
            flat_ms, fixed_ms, moved_ms: AlltoAll of a held-out step: flat, and under the mover with experts in their
                first places and moved.
            dispatch: speed-up of its dispatch with experts in their first places over the flat AlltoAll.
            placement: what moving experts adds to that.
            moves: whether it has paid within `HORIZON_STEPS`, so that the plan has it.
            moved_experts, migration_ms: what moving takes, once.
            break_even_steps: until it has paid; infinite where it saves nothing.
            dimensions: d*, of what the plan has.
            duplication: at the outermost level.
        """
        cluster = self.assessment.case.cluster
        rows = []
        for layer in self.assessment.layers:
            own = layer.named(self.mover)
            planned = own.held_out if pays(own, layer) else own.fixed
            flat_ms, fixed_ms, moved_ms = (
                float(x.step_ms(cluster).mean()) for x in (layer.flat.held_out, own.fixed, own.held_out)
            )
            last = own.updates.iloc[-1] if len(own.updates) else None
            rows.append(
                {
                    "layer": layer.case.layer,
                    "flat_ms": flat_ms,
                    "fixed_ms": fixed_ms,
                    "moved_ms": moved_ms,
                    "dispatch": flat_ms / fixed_ms,
                    "placement": fixed_ms / moved_ms,
                    "moves": pays(own, layer),
                    "moved_experts": 0 if last is None else int(last["moved_experts"]),
                    "migration_ms": own.moved_ms,
                    "break_even_steps": math.inf if last is None else float(last["break_even_steps"]),
                    "dimensions": ", ".join(map(str, planned.dimensions(cluster))),
                    "duplication": float(layer.levels["duplication"].iloc[0]),
                }
            )
        return pd.DataFrame(rows)

    @cached_property
    def crossing(self) -> pd.DataFrame:
        """Bytes that one GPU sends across every level in one AlltoAll, mean over GPUs: a column per system."""
        cluster = self.assessment.case.cluster
        table = self.assessment.levels[["level", "name"]].copy()
        for name in dict.fromkeys([BASELINE, self.best_still, self.found.followed]):
            held_out = self.assessment.named(name).held_out
            table[name] = held_out.crossing(cluster) / cluster.hierarchy.num_ranks
        return table

    @cached_property
    def published_times(self) -> OnFabric | None:
        """What others published of this fabric, over what is predicted of it."""
        return published_times(self.assessment.case.cluster)

    @property
    def published_range(self) -> str:
        """AlltoAll's speed-up where the dispatch takes as long as what others published of this fabric."""
        held, value = self.published_times, self.own.speedup.value
        return f"{value / held.high:.2f} to {value / held.low:.2f}" if held else ""

    @cached_property
    def sensitivity(self) -> pd.DataFrame:
        """The answer under other assumptions."""
        return sensitivity(self.assessment, self.found)

    @cached_property
    def tokens_needed(self) -> int | None:
        """Fewest tokens a GPU with which the followed system is worth it."""
        return tokens_needed(self.assessment, self.found.followed)

    @cached_property
    def end_to_end(self) -> pd.DataFrame:
        """Speed-up of the step against the share that AlltoAll has of it now: a column per system.

        The paper's two-stage system is there for comparison, where it applies.
        """
        shares = np.linspace(0.0, 0.8, 81)
        papers = [x.candidate.name for x in self.assessment.systems if "HD2-MoE" in x.candidate.labels]
        names = dict.fromkeys([self.found.followed, self.best_still, *papers])
        curves = {name: step_speedup(shares, self.communication(name)) for name in names}
        return pd.DataFrame({"alltoall_share": shares, **curves})


def exchange_words(peers: Peers, cluster: Cluster) -> str:
    """Who exchanges with whom."""
    if peers == WORLD:
        return "among all GPUs"
    level = cluster.levels[peers.level - 1]
    return f"between {level.label}" if peers.kind == "inter" else f"inside a {level.name}"
