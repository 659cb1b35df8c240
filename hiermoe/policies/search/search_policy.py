"""The search as a placement policy: decided from sums over ranks."""

import torch
from torch import Tensor

from hiermoe.planner.cost import ALLTOALLS_PER_STEP
from hiermoe.planner.token_sets import TokenSets
from hiermoe.policies.protocol import PlacementPolicy, PlacementUpdate, StepContext, refuse_copies
from hiermoe.policies.search.align import aligned
from hiermoe.policies.search.descent import Budget, SwapTable, approach
from hiermoe.policies.search.objective import Objective
from hiermoe.policies.search.search import MAXIMUM, search
from hiermoe.policies.search.sketch import Sketch
from hiermoe.topology.hierarchy import Hierarchy
from hiermoe.topology.placement import Placement

WEIGHED_SETS = 16384  # that bounded moves are ordered by
_TENSORS = ("ids_NK", "weight_N", "step_N", "tokens_S")  # of remembered sets


class SearchPolicy(PlacementPolicy):
    """Remember a sample of the last steps' expert sets, search on it, and move towards what was found.

    With neither ``interval`` nor ``max_moved`` it is the offline search: one search, one migration. With both it
    follows the routing online, a few experts a step.

    It searches a number of steps with a seed, not for a time: the same sketches lead to the same placement, whoever
    searches.
    """

    def __init__(
        self,
        first_search: int = 16,
        interval: int | None = None,
        window: int = 16,
        max_moved: int | None = None,
        steps: int = 250,
        cells: int = 8192,
        seed: int = 0,
    ) -> None:
        """Set the policy up for one layer.

        Args:
            first_search: iterations after which it searches for the first time.
            interval: iterations from one search to the next; None: there is one only.
            window: iterations that a search sees, the last ones.
            max_moved: experts that may move after one iteration, at least 2; None: all at once.
            steps: of a search, each an evaluation of all swaps of two experts.
            cells: of the sketch that ranks sum, 4 * (K + 1) bytes each.
            seed: of samples, partitions and kicks.

        Raises:
            ValueError: a limit below its smallest value, or cells that are no power of two.
        """
        if min(first_search, window, steps, 1 if interval is None else interval) < 1:
            raise ValueError(
                f"first_search={first_search}, interval={interval}, window={window}, steps={steps}: all must be at "
                "least 1"
            )
        if max_moved is not None and max_moved < 2:
            raise ValueError(f"max_moved={max_moved}: experts move in pairs, so at least 2")
        self.first_search, self.interval, self.window = first_search, interval, window
        self.max_moved, self.steps, self.seed = max_moved, steps, seed
        self._sketch = Sketch(cells)
        self._remembered: list[TokenSets] = []  # of one step each, the latest last
        self._target: Placement | None = None

    def measure(
        self, expert_ids_NK: Tensor, source_N: Tensor, placement: Placement, hierarchy: Hierarchy, iteration: int
    ) -> Tensor | None:
        """A sketch of the expert sets, in iterations that a search will see."""
        if not self._sees(iteration):
            return None
        refuse_copies(self, placement)  # a sketch merges equal sets of all sources, which may use different copies
        return self._sketch.measure(expert_ids_NK)

    def decides_after(self, iteration: int) -> bool:
        """From the first iteration that a search sees to the last; where moves are bounded, ever after."""
        bounded = self.max_moved is not None and iteration >= self.first_search
        return bounded or self._sees(iteration)

    def decide(self, summed: Tensor | None, placement: Placement, context: StepContext) -> PlacementUpdate | None:
        """Search if it is time, and move towards the latest target."""
        if summed is not None:
            step = self._sketch.read(summed, placement.num_experts)
            self._sketch = self._sketch.adapted(summed)
            if step.tokens:  # none where every cell has collisions
                self._remembered = [*self._remembered, step][-self.window :]
        since = context.iteration + 1 - self.first_search
        due = since == 0 or (since > 0 and self.interval is not None and since % self.interval == 0)
        if not self._remembered or not (due or self._target is not None):
            return None
        objective = Objective(context.cluster, (context.scheme,), context.row_bytes)
        sets = TokenSets.joined(self._remembered)
        if due:
            found = search(sets, objective, Budget(None, self.steps), self.seed, self._target or placement)
            better = found.modelled_ms < objective.step_ms(sets, placement)
            self._target = aligned(found.placement, placement, context.cluster.hierarchy) if better else None
        update = self._towards_target(sets, objective, placement)
        if self.interval is None and self._target is None:
            self._remembered = []
        return update

    def _sees(self, iteration: int) -> bool:
        """Whether a search will see an iteration."""
        return iteration >= self.first_search - self.window and (
            self.interval is not None or iteration < self.first_search
        )

    def _towards_target(self, sets: TokenSets, objective: Objective, placement: Placement) -> PlacementUpdate | None:
        """The next part of the way."""
        target, ranks = self._target, objective.cluster.hierarchy.num_ranks
        if target is None:
            return None
        if self.max_moved is None:
            new, gain_ms = target, objective.step_ms(sets, placement) - objective.step_ms(sets, target)
        else:
            generator = torch.Generator().manual_seed(self.seed)
            table = SwapTable(sets.sample(WEIGHED_SETS, generator).pooled(), placement, objective.cluster)
            priced = objective.schemes[0], objective.row_bytes
            before_ms = table.now_ms(*priced)
            new = approach(table, target, self.max_moved, *priced, MAXIMUM)
            gain_ms = ALLTOALLS_PER_STEP * (before_ms - table.now_ms(*priced))
        if torch.equal(new.rank_of(ranks), target.rank_of(ranks)):
            self._target = None
        if torch.equal(new.rank_of(ranks), placement.rank_of(ranks)):
            return None
        return PlacementUpdate(new, gain_ms)

    def state_dict(self) -> dict[str, Tensor]:
        """Remembered sets, the target, and the sketch's size."""
        state = {"zero_bits": torch.tensor(self._sketch.zero_bits)}
        if self._target is not None:
            state["target_E"] = self._target.slot_E
        if self._remembered:
            sets = TokenSets.joined(self._remembered)
            state |= {name: getattr(sets, name) for name in _TENSORS} | {"num_experts": torch.tensor(sets.num_experts)}
        return state

    def shared_state(self) -> dict[str, Tensor]:
        """The sketch's size: one rank decides, and it alone remembers sets."""
        return {"zero_bits": torch.tensor(self._sketch.zero_bits)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            ValueError: the state of another policy.
        """
        known = {"zero_bits", "target_E", "num_experts", *_TENSORS}
        if state.keys() - known or "zero_bits" not in state:
            raise ValueError(f"SearchPolicy remembers {', '.join(sorted(known))}; the state has {', '.join(state)}")
        self._sketch = Sketch(self._sketch.cells, int(state["zero_bits"]))
        self._target = Placement.of_slots(state["target_E"]) if "target_E" in state else None
        self._remembered = []
        if "ids_NK" in state:
            tensors = {name: state[name] for name in _TENSORS}
            sets = TokenSets(**tensors, num_experts=int(state["num_experts"]))
            self._remembered = sets.by_step()
