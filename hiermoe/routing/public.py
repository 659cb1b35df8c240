"""Routing of published models that others made public: which sets there are, and a run on one that was fetched."""

from pathlib import Path

from pydantic import PositiveInt

from hiermoe.records.groups import files_of, read_named
from hiermoe.records.project import PUBLIC
from hiermoe.records.status import NotApplicable
from hiermoe.records.strict import Strict
from hiermoe.routing.resampled import Resampled, open_resampled
from hiermoe.routing.step import RoutingRequest


class PublicSet(Strict):
    """One file in conf/public/.

    Attributes:
        name: of the set.
        what: it is, in words.
        url: of its repository, for git.
        commit: of the repository; None for its newest.
        path: of the set in the repository; None for all of it.
        form: name of the importer.
        licence: in words.
        model: name of its file in conf/model/, where there is one.
        num_experts: E; None where the set has several models.
        topk: K; None where the set has several models.
        first_layer: number of the first layer, for copies of the set that number none.
        needs: what somebody has to do before it can be had; None where git alone brings it.
    """

    name: str
    what: str
    url: str
    commit: str | None
    path: str | None
    form: str
    licence: str
    model: str | None
    num_experts: PositiveInt | None
    topk: PositiveInt | None
    first_layer: int | None
    needs: str | None


def public_sets() -> dict[str, PublicSet]:
    """All sets by name.

    Raises:
        ValueError: a file breaks a rule.
    """
    return {name: public_set(name) for name in files_of("public")}


def public_set(name: str) -> PublicSet:
    """A set by its name.

    Raises:
        ValueError: there is none of that name, or its file breaks a rule.
    """
    return read_named("public", name, PublicSet)


def public_trace(name: str) -> Path:
    """Where the trace of a set is, once it was fetched."""
    return PUBLIC / f"{name}.trace"


def open_public(request: RoutingRequest, name: str, layer: int = 0) -> Resampled:
    """A fetched set to draw sequences from.

    Args:
        request: G, T, E and K of the run.
        name: of the set.
        layer: position of the layer in the trace.

    Raises:
        NotApplicable: it was not fetched.
        ValueError: there is no such set, or its E or K is not the model's.
    """
    known = public_set(name)
    if not (path := public_trace(name)).exists():
        raise NotApplicable(f"the public set {name} is not here; bring it by: hiermoe trace fetch {name}")
    if known.num_experts not in (None, request.num_experts):
        hint = f"; it is of model={known.model}" if known.model else ""
        raise ValueError(f"{name} has num_experts={known.num_experts}, the model has {request.num_experts}{hint}")
    return open_resampled(request, str(path), layer)
