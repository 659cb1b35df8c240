"""A system: how tokens move, where experts sit, and whose code moves them. One file in conf/system/ each."""

from importlib import import_module
from typing import Any, Literal, Self

from pydantic import Field

from hiermoe.planner.scheme import DispatchScheme
from hiermoe.policies.protocol import PlacementPolicy, StaticPolicy
from hiermoe.policies.tokens_choose import TokensChooseCopies
from hiermoe.records.groups import read_named
from hiermoe.records.status import NotApplicable
from hiermoe.records.strict import Strict
from hiermoe.topology.hierarchy import Hierarchy

Executor = Literal["staged", "stock", "reordered", "flex"]


class SystemConfig(Strict):
    """A scheme (or several to choose from), a placement policy, and what executes them.

    ``schemes`` and ``policy`` name what builds them in ``_target_``; their other entries are its arguments.

    Attributes:
        name: also of its file.
        label: in figures and tables.
        color: of everything that figures show of it.
        placement_label: its policy, where placements under one dispatch are compared; None for ``label``.
        placement_color: likewise; None for ``color``.
        entrant: whether it joins every sweep that compares systems.
        migration: when experts that are to move do: ``at_once``, between two steps; ``background``, beside the forward
            and backward passes of the next one.
        copy_choice: of experts in more than one place: ``source``, tokens use the copies that the policy says for their
            GPU; ``token``, a token leaves these for copies with which it goes to fewer nodes, then to fewer groups of
            each deeper level, down to GPUs.
        executor: ``staged``: the suite's own exchange runs the scheme. ``stock``, ``reordered`` (stock with each rank's
            tokens in reverse, a control that only reorders sums) and ``flex``: Megatron's classes; the scheme only
            describes them.
    """

    name: str
    label: str
    color: str = Field(default="#7A5195", pattern=r"^#[0-9A-Fa-f]{6}$")
    placement_label: str | None = None
    placement_color: str | None = None
    entrant: bool = False
    schemes: dict[str, Any]
    policy: dict[str, Any]
    migration: Literal["at_once", "background"] = "at_once"
    copy_choice: Literal["source", "token"] = "source"
    executor: Executor = "staged"

    def build_schemes(self, hierarchy: Hierarchy) -> tuple[DispatchScheme, ...]:
        """The candidate schemes on a hierarchy; the cheapest is used in every step.

        Raises:
            NotApplicable: the hierarchy has too few levels.
            ValueError: a bad target or bad arguments.
        """
        return build(self.schemes, hierarchy=hierarchy)

    def build_policy(self) -> PlacementPolicy:
        """A placement policy for one layer.

        Raises:
            ValueError: a bad target or bad arguments, or tokens that choose copies where there are none.
        """
        policy = build(self.policy)
        return policy if self.copy_choice == "source" else TokensChooseCopies(policy)

    @property
    def moves(self) -> bool:
        """Whether its policy may move experts."""
        return not isinstance(self.build_policy(), StaticPolicy)

    @property
    def makes_copies(self) -> bool:
        """Whether its policy keeps experts in more than one place."""
        return self.build_policy().copies is not None

    def refuse_copies(self) -> None:
        """To be called by what moves experts with their training state.

        Raises:
            NotApplicable: its policy keeps experts in more than one place.
        """
        if self.makes_copies:
            raise NotApplicable(
                f"system {self.name} keeps experts in more than one place: it is simulated and replayed, but training "
                "sums no gradients of copies"
            )

    @classmethod
    def named(cls, name: str) -> Self:
        """The system of conf/system/<name>.yaml.

        Raises:
            ValueError: there is none, or it breaks a rule.
        """
        return read_named("system", name, cls)


def build(spec: dict[str, Any], **context: Any) -> Any:
    """Call what ``_target_`` names with the other entries and the context as arguments.

    Raises:
        ValueError: no such target, or arguments that it does not take.
    """
    arguments = dict(spec)
    target = arguments.pop("_target_", None)
    if target is None:
        raise ValueError(f"{spec}: _target_ is missing")
    module, _, name = str(target).rpartition(".")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"_target_={target} cannot be imported: {error}") from error
    try:
        return function(**arguments, **context)
    except TypeError as error:
        raise ValueError(f"{target}: {error}") from error
