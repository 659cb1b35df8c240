"""Alpha, beta and bends from timings of any sizes, with their uncertainty.

Small messages take other protocols than large ones, so one line does not do from a kilobyte to a gigabyte. The curve
is continuous and never falls, made of as few straight pieces as leave points close; errors are relative, or the largest
sizes alone would decide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from scipy.optimize import nnls

from hiermoe.topology.peers import AlphaBeta, Bend

MOST_BENDS = 3
CLOSE, FAIR = 0.01, 0.05  # relative errors: that nobody minds, and that timings of a quiet machine have
WORTH = 0.7  # a further piece must bring an error that is fair below so much of what it was; else below all of it
_RESAMPLES = 200


@dataclass(frozen=True)
class CurveFit:
    """A curve through timings.

    Attributes:
        constants: the curve.
        alpha_ms: lowest and highest value that 95 % of resampled residuals give.
        beta_ms_per_byte: likewise.
        residuals: float [n], measured over fitted, less 1.
    """

    constants: AlphaBeta
    alpha_ms: tuple[float, float]
    beta_ms_per_byte: tuple[float, float]
    residuals: np.ndarray


def fit_curve(size_bytes: np.ndarray, time_ms: np.ndarray, source: str) -> CurveFit:
    """Fit the curve.

    Args:
        size_bytes: float [n], bytes at the busiest GPU.
        time_ms: float [n].
        source: of the timings.

    Raises:
        ValueError: fewer than three different sizes, or a time that does not grow with them.
    """
    sizes = np.unique(size_bytes)
    if len(sizes) < 3:
        raise ValueError(f"{len(sizes)} different sizes: a line and what lies off it need three at least")
    knots: tuple[float, ...] = ()
    error = _error(size_bytes, time_ms, knots)
    places = sizes[1 : -1 : max(1, len(sizes) // 30)]  # about thirty, however many sizes there are
    for count in range(1, MOST_BENDS + 1):
        if error <= CLOSE or 2 * count + 3 > len(sizes):
            break
        more = min(combinations(places, count), key=lambda some: _error(size_bytes, time_ms, some))
        if (next_error := _error(size_bytes, time_ms, more)) >= (WORTH if error <= FAIR else 1.0) * error:
            break
        knots, error = more, next_error
    alpha, beta, bends = _curve(size_bytes, time_ms, knots)
    if beta <= 0:
        raise ValueError("more bytes took no longer")
    constants = AlphaBeta(alpha_ms=max(alpha, 0.0), beta_ms_per_byte=beta, bends=bends, source=source, published=False)
    fitted = constants.ms(size_bytes)
    residuals = time_ms / fitted - 1
    rng, again = np.random.default_rng(0), []
    for _ in range(_RESAMPLES):
        drawn = fitted * (1 + rng.choice(residuals, len(residuals)))
        again.append(_curve(size_bytes, drawn, knots)[:2])
    (alpha_low, beta_low), (alpha_high, beta_high) = np.percentile(np.array(again), [2.5, 97.5], axis=0)
    return CurveFit(constants, (float(alpha_low), float(alpha_high)), (float(beta_low), float(beta_high)), residuals)


def _error(size_bytes: np.ndarray, time_ms: np.ndarray, knots: Sequence[float]) -> float:
    """Root mean square of relative errors."""
    coefficients, pieces = solve(size_bytes, time_ms, knots)
    return float(np.sqrt(np.mean((pieces @ coefficients / time_ms - 1) ** 2)))


def solve(
    size_bytes: np.ndarray, time_ms: np.ndarray, knots: Sequence[float], power: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The curve that bends at these sizes whose errors, over a power of the times, have the least sum of squares.

    The first power: relative errors.

    Returns:
        Start-up and the slope of every piece, none negative: [1 + pieces]; and what they are multiplied by: [n, 1 +
        pieces].
    """
    ends = [0.0, *knots, np.inf]
    lengths = [np.clip(size_bytes - low, 0, high - low) for low, high in pairwise(ends)]
    pieces = np.column_stack([np.ones_like(size_bytes), *lengths])
    scale = pieces.max(0)  # for the solver's sake
    weights = np.abs(time_ms) ** -power
    coefficients, _ = nnls(pieces / scale * weights[:, None], time_ms * weights)
    return coefficients / scale, pieces


def _curve(
    size_bytes: np.ndarray, time_ms: np.ndarray, knots: Sequence[float]
) -> tuple[float, float, tuple[Bend, ...]]:
    """Alpha and beta of the last piece's line, and the bends below it."""
    (start, *slopes), _ = solve(size_bytes, time_ms, knots)
    changes = np.diff(slopes)  # by which each piece is steeper than the one before
    alpha = start - sum(change * knot for change, knot in zip(changes, knots, strict=True))
    bends = tuple(
        Bend(below_bytes=float(knot), ms_per_byte=float(change))
        for change, knot in zip(changes, knots, strict=True)
        if change
    )
    return float(alpha), float(slopes[-1]), bends
