"""Scores as counts of fixed buckets: eight to every power of two on either side of 0, so that any two sums of any two times can be compared.

A bucket is at most an eighth of its score wide. Buckets are numbered in the order of the scores, 0 for the score 0 and what is closest to it.
"""

import math

SMALLEST_EXPONENT = -40
"""Scores closer to 0 than two to this power are 0."""
LARGEST_EXPONENT = 60
PARTS = 8
"""Buckets to a power of two."""


def bucket(score: float) -> int:
    """Number of a finite score's bucket, at most `PARTS * (LARGEST_EXPONENT - SMALLEST_EXPONENT)` from 0 on either side."""
    mantissa, exponent = math.frexp(abs(score))
    if not mantissa or exponent <= SMALLEST_EXPONENT:
        return 0
    if exponent > LARGEST_EXPONENT:
        mantissa, exponent = 0.999, LARGEST_EXPONENT
    # The mantissa is 0.5 to 1.
    found = (exponent - SMALLEST_EXPONENT - 1) * PARTS + int((mantissa - 0.5) * 2 * PARTS) + 1
    return found if score > 0 else -found
