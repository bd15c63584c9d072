"""Whether an experiment's split is the one it was given: a sequential test of the sample ratio. Pure.

When requests do not arrive in the given ratio, one version loses callers (crashes, time-outs, a sticky header that is missing for some), and the
rest cannot be compared. The test is a beta-binomial mixture against the given share, an e-process, so it may be read after every request. It says
nothing about ratios closer to the given one than a part of the smaller share: callers that send many requests each move the ratio by chance more
than the test knows.
"""

import math

from pydantic import BaseModel

ALPHA = 0.001
"""Chance of calling a right split wrong, over the whole experiment."""
TOLERANCE = 0.1
"""Part of the smaller share by which the ratio may be off."""
PRIOR = 100.0
"""Requests the prior is worth; it is centred at the given share."""


class Ratio(BaseModel):
    """Requests since the split was in force."""

    share: float = 0.0
    """The candidate's, as given; 0 while there is no experiment."""
    candidate: int = 0
    stable: int = 0

    def plus(self, share: float, candidate: int, stable: int) -> "Ratio":
        """After some more requests; another share starts over."""
        if share != self.share:
            return Ratio(share=share, candidate=candidate, stable=stable)
        return Ratio(share=share, candidate=self.candidate + candidate, stable=self.stable + stable)


def mismatch(ratio: Ratio) -> str:
    """What is wrong with the ratio, for people; empty when nothing is, or not enough is known."""
    n = ratio.candidate + ratio.stable
    if not n or not ratio.share:
        return ""
    seen = ratio.candidate / n
    off = abs(seen - ratio.share) / min(ratio.share, 1.0 - ratio.share)
    against = log_evidence(ratio.candidate, n, ratio.share)
    if off <= TOLERANCE or against < -math.log(ALPHA):
        return ""
    return (
        f"the candidate got {seen:.2%} of {n} requests instead of {ratio.share:.2%} "
        f"(e-value {math.exp(min(against, 690.0)):.3g}, {1 / ALPHA:.0f} needed): the versions are not compared on equal callers"
    )


def log_evidence(hits: int, n: int, share: float, prior: float = PRIOR) -> float:
    """Logarithm of the beta-binomial mixture against "the share of hits is `share`"."""
    a, b = prior * share, prior * (1.0 - share)
    mixture = math.lgamma(hits + a) + math.lgamma(n - hits + b) - math.lgamma(n + a + b)
    start = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return mixture - start - hits * math.log(share) - (n - hits) * math.log(1.0 - share)
