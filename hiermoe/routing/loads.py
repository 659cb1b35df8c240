"""Expert loads alone, as routing: every token draws its experts independently of what fires together.

From loads nobody can know how often experts share a token. Drawing them independently is an assumption, and whatever
rests on it is marked.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hiermoe.routing.synthetic import Endless, weighted_choices


def inclusion_rates(load_E: np.ndarray, topk: int) -> np.ndarray:
    """Rates of a race whose K first experts have, each, close to the given share of the choices.

    An expert with share s of all choices is in a token's K with probability p = K s. In a race of exponential arrival
    times with rates -log(1 - p), all experts that arrive before time 1 would be chosen with exactly these
    probabilities, and K of them on average; taking the K first instead changes them little (Rosén 1997, order sampling
    with fixed inclusion probabilities).

    Args:
        load_E: float64 [E], at least 0.
        topk: K.

    Raises:
        ValueError: an expert would be in more than all tokens, or fewer than K experts have any load.
    """
    wanted = topk * load_E / load_E.sum()
    if wanted.max() > 1 + 1e-9:
        raise ValueError(
            f"expert {int(wanted.argmax())} has {load_E.max() / load_E.sum():.1%} of the load; with topk={topk} "
            f"distinct experts a token no expert can have more than {1 / topk:.1%}"
        )
    if (wanted > 0).sum() < topk:
        raise ValueError(f"{(wanted > 0).sum()} experts have any load; topk={topk} needs as many")
    with np.errstate(divide="ignore"):  # an expert of every token arrives at once
        return -np.log1p(-np.minimum(wanted, 1.0))


@dataclass(frozen=True)
class IndependentLoads(Endless):
    """K distinct experts a token, each with its own probability, whatever the others are.

    Attributes:
        load_E: float64 [E], how often each expert is chosen, in any unit.
    """

    family = "independent_loads"
    load_E: np.ndarray

    @cached_property
    def rates_E(self) -> Tensor:
        """Rate of each expert's arrival: float32 [E]."""
        return torch.from_numpy(inclusion_rates(self.load_E, self.request.topk)).float()

    def choices(self, rng: np.random.Generator) -> Tensor:
        """Experts of all tokens of a step: int64 [N, K]."""
        return weighted_choices(rng, self.rates_E, self.num_tokens, self.request.topk)
