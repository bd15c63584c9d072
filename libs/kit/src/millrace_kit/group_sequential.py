r"""A test with a few looks at a declared maximum: Lan and DeMets' (1983) spending of alpha, shaped like O'Brien and Fleming's.

Where the most that will ever be seen is known beforehand, a few looks cost far less power than a look at every request. The test spends
`alpha(t) = 2 - 2 Phi(z / sqrt(t))`, `z` the normal quantile at `1 - alpha / 2`, of its error by the fraction t of the maximum, so early looks
pass only on very strong evidence and the last one almost as a test of fixed size. Boundaries are found one after another from the
informations really seen, by numerical integration (Armitage, McPherson and Rowe 1969), so looks may fall where they like.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LOOKS = 5
"""Looks of a test, at equal fractions of the maximum."""
_POINTS = 401
_SPAN = 8.0
"""Standard deviations the integration reaches to; beyond is less than 1e-15."""


def spent(fraction: float, alpha: float) -> float:
    """Error that may be spent up to a fraction of the maximum."""
    if fraction <= 0.0:
        return 0.0
    normal = NormalDist()
    return 2.0 - 2.0 * normal.cdf(normal.inv_cdf(1.0 - alpha / 2.0) / math.sqrt(min(fraction, 1.0)))


def next_boundary(informations: Sequence[float], boundaries: Sequence[float], increment: float) -> float:
    """The z that the newest look must reach.

    Args:
        informations: inverse variances of the estimate at every look so far, rising, the newest last.
        boundaries: of the looks before the newest.
        increment: chance, under the null, that this look is the first one to reach its boundary.
    """
    scale = informations[-1]
    times = [information / scale for information in informations]
    grid, density = _start(times[0])
    for before, now, boundary in zip(times, times[1:], boundaries, strict=False):
        grid, density = _step(grid, density, boundary * math.sqrt(before), now - before, now)
    # The chance to lie at or above each point of the grid, by the trapezoid rule from the top.
    cells = np.diff(grid) * (density[1:] + density[:-1]) / 2.0
    above = np.concatenate([np.cumsum(cells[::-1])[::-1], [0.0]])
    return float(np.interp(-increment, -above, grid))


def _start(time: float) -> tuple[Array, Array]:
    width = math.sqrt(time)
    grid = np.linspace(-_SPAN * width, _SPAN * width, _POINTS)
    return grid, _normal(grid, time)


def _step(grid: Array, density: Array, bound: float, gained: float, time: float) -> tuple[Array, Array]:
    """Density of the sum at the next look, over the paths that stayed below `bound` at this one."""
    gained = max(gained, 1e-9)
    inside = np.linspace(grid[0], min(bound, grid[-1]), _POINTS)
    values = np.interp(inside, grid, density)
    weights = np.full(_POINTS, inside[1] - inside[0])
    weights[[0, -1]] /= 2.0
    width = math.sqrt(time)
    after = np.linspace(-_SPAN * width, _SPAN * width, _POINTS)
    kernel = _normal(after[:, None] - inside[None, :], gained)
    return after, np.asarray(kernel @ (values * weights))


def _normal(distance: Array, variance: float) -> Array:
    return np.asarray(np.exp(-(distance**2) / (2.0 * variance)) / math.sqrt(2.0 * math.pi * variance))


def planned_boundaries(alpha: float, looks: int = LOOKS) -> list[float]:
    """Boundaries of looks at equal fractions of the maximum."""
    found: list[float] = []
    for look in range(1, looks + 1):
        increment = spent(look / looks, alpha) - spent((look - 1) / looks, alpha)
        found.append(next_boundary([part / looks for part in range(1, look + 1)], found, increment))
    return found


def standard_error(candidate: tuple[Array, ...], stable: tuple[Array, ...], ratio: Array, shift: float) -> Array:
    """Of the mean over batches of the difference of two arms' means in [0, 1], weighted by the candidate's count, where the null is true.

    Variances are taken at means that differ by `shift` exactly (as Farrington and Manning 1990 do for shares): an arm that looks good by chance
    otherwise also looks sure.

    Args:
        candidate: count, sum and sum of squares of its values.
        stable: the same.
        ratio: sum over batches of the candidate's count squared by stable's.
        shift: candidate minus stable at the null's border.
    """
    (n, *_), (m, *_) = candidate, stable
    (own, own_variance), (other, other_variance) = _moments(*candidate), _moments(*stable)
    middle = np.clip((n * (own - shift) + m * other) / (n + m), max(0.0, -shift), min(1.0, 1.0 - shift))
    here, there = _spread(middle + shift), _spread(middle)
    own_variance = own_variance * np.maximum(here, 1e-9) / np.maximum(_spread(own), 1e-9)
    other_variance = other_variance * np.maximum(there, 1e-9) / np.maximum(_spread(other), 1e-9)
    return np.asarray(np.sqrt(np.maximum(own_variance * n + other_variance * ratio, 1e-12)) / n)


def _moments(n: Array, total: Array, square: Array) -> tuple[Array, Array]:
    """Mean and variance of one value; with one value of doubt, so that the variance is never 0."""
    mean = (total + 0.5) / (n + 1.0)
    return mean, np.maximum((square + 0.5) / (n + 1.0) - mean**2, 1e-12)


def _spread(mean: Array) -> Array:
    return np.asarray(mean * (1.0 - mean))
