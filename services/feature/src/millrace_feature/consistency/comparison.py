"""Served values beside expected ones: pure, over whole columns."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from millrace_feature.tiles import Floats, Ints

Kind = Literal["mismatch", "missing", "extra"]
KINDS: tuple[Kind, ...] = ("mismatch", "missing", "extra")
ABSOLUTE = 1e-9
"""Differences up to this are none, whatever the values: sums that cancel leave as much."""


@dataclass(slots=True)
class Tally:
    """One feature over some answers."""

    compared: int = 0
    mismatched: int = 0
    missing: int = 0
    extra: int = 0
    pairs: int = 0
    """Values that both sides have."""
    error: float = 0.0
    """Sum of 2|s-e| / (|s|+|e|) over the pairs."""
    places: dict[Kind, list[int]] = field(default_factory=dict)
    """Rows of each kind, the worst mismatch first."""

    @property
    def smape(self) -> float:
        """Mean symmetric relative error of the pairs, 0 to 2; 0 without pairs."""
        return self.error / self.pairs if self.pairs else 0.0


def compare(served: Floats, expected: Floats, *, tolerance: float) -> Tally:
    """Compare one feature's values row by row; NaN is no value."""
    has_served, has_expected = ~np.isnan(served), ~np.isnan(expected)
    both = has_served & has_expected
    size = np.abs(served) + np.abs(expected)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Equal infinities differ by NaN, unequal ones by infinity.
        distance = np.where(served == expected, 0.0, np.abs(served - expected))
        relative = np.where(distance == 0.0, 0.0, np.where(np.isinf(size), 2.0, 2.0 * distance / size))
        larger = np.maximum(np.abs(served), np.abs(expected))
        near = (distance <= ABSOLUTE) | (distance <= tolerance * np.where(np.isinf(larger), 0.0, larger))
    mismatch, missing, extra = both & ~near, has_expected & ~has_served, has_served & ~has_expected
    worst = np.flatnonzero(mismatch)
    worst = worst[np.argsort(-relative[worst], kind="stable")]
    return Tally(
        compared=len(served),
        mismatched=len(worst),
        missing=int(missing.sum()),
        extra=int(extra.sum()),
        pairs=int(both.sum()),
        error=float(relative[both].sum()),
        places={
            "mismatch": worst.tolist(),
            "missing": np.flatnonzero(missing).tolist(),
            "extra": np.flatnonzero(extra).tolist(),
        },
    )


def in_windows(served_us: Sequence[int], window_us: int) -> list[tuple[int, Ints]]:
    """(start of the window, places of the rows served in it), oldest first."""
    starts = np.asarray(served_us, np.int64) // window_us * window_us
    return [(int(start), np.flatnonzero(starts == start)) for start in np.unique(starts)]
