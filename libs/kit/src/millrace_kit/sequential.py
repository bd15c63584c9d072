r"""Tests that may be read after every request: e-processes for means of values in [0, 1].

An e-process is a running product that starts at 1 and, while its null hypothesis holds, is at most 1 in expectation at every stopping
time. By Ville's inequality it ever reaches 1/alpha with probability at most alpha, however often somebody looks.

One arm against a bound b. With mean at most b (slope > 0) or at least b (slope < 0), `1 + slope (x - b)` has mean at most 1.

Two arms, null "candidate = stable + shift or further on the null's side". For a batch with n_c and n_s values, pick an alternative
(a, s) beforehand and the point (t + shift, t) of the null's border with `n_c g_c + n_s g_s = 0`, where
`g_c = (a - t_c) / (t_c (1 - t_c))` and `g_s = (s - t_s) / (t_s (1 - t_s))` (for 0/1 values this is the likelihood ratio to the null's nearest
point: Turner, Ly and Grünwald 2024). The batch multiplies by `prod(1 + g_c (x_i - t_c)) prod(1 + g_s (y_j - t_s))`. With both arms' batch means u
above the border point its expectation is, by the inequality of means, at most `(1 + u (n_c g_c + n_s g_s) / n) ^ n = 1`, and the signs of the
slopes make it smaller inside the null. So the test is exact, needs no independence between batches, and a change that moves both arms
alike (weather, hour of day) cancels. The alternatives form a grid whose mean is again an e-process.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Ratios of the odds of the alternatives to the odds at the border.
ODDS_ABOVE: Array = np.array([1.15, 1.3, 1.6, 2.2, 4.0, 10.0, 50.0])
ODDS_BELOW: Array = 1.0 / ODDS_ABOVE
# Alternatives stay this far from 0 and 1.
EDGE = 1e-4
_BISECTIONS = 44


@dataclass(frozen=True, slots=True)
class Sample:
    """`n` values in [0, 1] with their sum and sum of squares; arrays of equal shape hold many samples at once."""

    n: Array
    total: Array
    square: Array
    binary: bool = True
    """Every value is 0 or 1; then the test needs no bound on its logarithm."""

    @classmethod
    def of(cls, n: float, total: float, square: float | None = None) -> "Sample":
        """One sample; without `square` the values are 0 or 1."""
        squares = total if square is None else square
        return cls(np.asarray(float(n)), np.asarray(float(total)), np.asarray(float(squares)), square is None)


def odds_shift(mean: Array, ratios: Array) -> Array:
    """`mean` moved by each ratio of odds, one more axis at the end."""
    odds = mean[..., None] / (1.0 - mean[..., None]) * ratios
    return np.asarray(np.clip(odds / (1.0 + odds), EDGE / 10, 1.0 - EDGE / 10))


def log_growth(sample: Sample, center: Array, slope: Array) -> Array:
    """`sum(log(1 + slope (x - center)))`, or for values between 0 and 1 a lower bound of it from the sums alone.

    The bound is Fan, Grama and Liu's (2015): `log(1 + z) >= z + z^2 (log(1 - c) + c) / c^2` for `z >= -c`.
    """
    n, total = sample.n[..., None], sample.total[..., None]
    if sample.binary:
        hit = np.log(np.maximum(1.0 + slope * (1.0 - center), 1e-300))
        miss = np.log(np.maximum(1.0 - slope * center, 1e-300))
        return np.asarray(total * hit + (n - total) * miss)
    c = np.clip(np.where(slope > 0, slope * center, -slope * (1.0 - center)), 1e-9, 1.0 - 1e-9)
    square = sample.square[..., None] - 2.0 * center * total + n * center**2
    psi = -np.log1p(-c) - c
    return np.asarray(slope * (total - n * center) - slope**2 * square * psi / c**2)


def one_arm(sample: Sample, bound: float, ratios: Array) -> Array:
    """Logarithms by which each alternative's product grows; ratios above 1 test "mean <= bound", below 1 "mean >= bound"."""
    center = np.asarray(float(bound))
    alternative = odds_shift(center, ratios)
    slope = (alternative - center) / (center * (1.0 - center))
    return log_growth(sample, center, slope)


def two_arms(candidate: Sample, stable: Sample, stable_mean: Array, shift: float, ratios: Array) -> Array:
    """Logarithms by which each alternative's product grows with one batch.

    Args:
        candidate: the batch of the candidate, n >= 1.
        stable: the batch of stable, n >= 1.
        stable_mean: what stable's mean is believed to be, from earlier batches only.
        shift: the null's border is `candidate = stable + shift`.
        ratios: above 1 the null is "candidate <= stable + shift", below 1 ">=".
    """
    low, high = max(EDGE, EDGE - shift), min(1.0 - EDGE, 1.0 - EDGE - shift)
    mean = np.clip(stable_mean, low, high)
    alternative = odds_shift(mean + shift, ratios)
    n_c, n_s = candidate.n[..., None], stable.n[..., None]
    believed = np.broadcast_to(mean[..., None], alternative.shape)
    if shift == 0.0:
        border = (n_c * alternative + n_s * believed) / (n_c + n_s)
    else:
        border = _border(alternative, believed, n_c, n_s, shift)
    other = border + shift
    slope_c = (alternative - other) / (other * (1.0 - other))
    slope_s = (believed - border) / (border * (1.0 - border))
    return log_growth(candidate, other, slope_c) + log_growth(stable, border, slope_s)


def _border(alternative: Array, believed: Array, n_c: Array, n_s: Array, shift: float) -> Array:
    """Where `n_c g_c + n_s g_s` is 0, by bisection between the two believed means; the sum falls from one to the other."""
    lowest, highest = max(EDGE / 20, EDGE / 20 - shift), min(1.0 - EDGE / 20, 1.0 - EDGE / 20 - shift)
    one, two = np.clip(believed, lowest, highest), np.clip(alternative - shift, lowest, highest)
    left, right = np.minimum(one, two), np.maximum(one, two)
    for _ in range(_BISECTIONS):
        middle = (left + right) / 2.0
        other = middle + shift
        slope = n_c * (alternative - other) / (other * (1.0 - other)) + n_s * (believed - middle) / (
            middle * (1.0 - middle)
        )
        right = np.where(slope < 0, middle, right)
        left = np.where(slope < 0, left, middle)
    return np.asarray((left + right) / 2.0)


def log_mean(logs: Array) -> Array:
    """Logarithm of the mean of the products, along the last axis."""
    top = np.max(logs, axis=-1, keepdims=True)
    return np.asarray(top[..., 0] + np.log(np.mean(np.exp(logs - top), axis=-1)))
