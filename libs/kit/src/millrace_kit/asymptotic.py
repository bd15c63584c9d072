r"""Tests of means without bounds on the values, that may be read after every one once enough are there.

For values of any size no test can be exact at every look, however few there are. Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas (2024)
show that Robbins' normal mixture, with the variance estimated as one goes, is a confidence sequence in the limit: what a confidence interval by the
central limit theorem is to a fixed sample. In the form of evidence against "the mean of the sum's terms is at most 0", for a sum S with
variance V and a constant h > 0:

`2 sqrt(h / (V + h)) exp(S^2 / (2 (V + h))) Phi(S / sqrt(V + h))`

It starts at 1 for V = 0. `h` says for which V the test is sharpest, and must be fixed before what it is used on.
"""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
START = 200
"""Values of each arm before the first claim; the limit has to be near. Skewed values with rare large ones (purchases) need about so many."""
SHARPEST = 5.0
"""Times the variance at the start where the test is sharpest."""
_PEAK = 7.9
"""V + h is about so many times h at the sharpest V, for alpha of 0.05 (the paper's equation for rho)."""
_LOWEST_Z = -30.0


def tuned(variance_at_start: Array) -> Array:
    """`h` for a test whose sum has this variance when it starts."""
    return np.asarray(variance_at_start * SHARPEST / _PEAK)


def log_evidence(total: Array, variance: Array, h: Array) -> Array:
    """Logarithm of the evidence against "the terms' mean is at most 0"; 0 where the variance is 0, as nothing is known of the values' size.

    Args:
        total: the sum's value.
        variance: of the sum, estimated.
        h: from `tuned`, at the start.
    """
    total, variance, h = np.broadcast_arrays(
        np.asarray(total, float), np.asarray(variance, float), np.asarray(h, float)
    )
    known = (variance > 0.0) & (h > 0.0)
    whole = np.where(known, variance + h, 1.0)
    z = np.maximum(total / np.sqrt(whole), _LOWEST_Z)
    below = np.array([0.5 * math.erfc(-each / math.sqrt(2.0)) for each in z.ravel()]).reshape(z.shape)
    logs = math.log(2.0) + 0.5 * np.log(np.where(known, h, 1.0) / whole) + z**2 / 2.0 + np.log(below)
    # Far below 0 the square and the logarithm of the share cancel; there is no evidence either way.
    return np.asarray(np.where(known, np.where(z > _LOWEST_Z / 2, logs, np.minimum(logs, 0.0)), 0.0))


def value_variance(n: Array, total: Array, square: Array) -> Array:
    """Estimated variance of one of `n` values with this sum and sum of squares."""
    n, total, square = np.asarray(n, float), np.asarray(total, float), np.asarray(square, float)
    return np.asarray(np.maximum(square - total**2 / np.maximum(n, 1.0), 0.0) / np.maximum(n - 1.0, 1.0))
