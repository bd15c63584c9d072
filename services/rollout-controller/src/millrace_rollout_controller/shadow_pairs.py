"""Rows that the candidate and stable were both asked, as running sums by segment. Pure."""

from collections.abc import Mapping

from pydantic import BaseModel

WHOLE = ""
"""All segments, and all tensors, together."""


class Pairs(BaseModel):
    """Sums over rows that both versions answered."""

    pairs: int = 0
    flips: int = 0
    """Rows with another label."""
    shift_sum: float = 0.0
    shift_square_sum: float = 0.0
    """Of the absolute difference of the score, at most 1 each."""
    differences: dict[str, dict[str, int]] = {}
    """Rows by tensor and upper edge of their largest absolute difference (`inf` for the last)."""

    def plus(self, other: "Pairs") -> "Pairs":
        """The sum."""
        names = self.differences.keys() | other.differences.keys()
        return Pairs(
            pairs=self.pairs + other.pairs,
            flips=self.flips + other.flips,
            shift_sum=self.shift_sum + other.shift_sum,
            shift_square_sum=self.shift_square_sum + other.shift_square_sum,
            differences={
                name: _combined(self.differences.get(name, {}), other.differences.get(name, {}), 1) for name in names
            },
        )


def plus(one: Mapping[str, Pairs], other: Mapping[str, Pairs]) -> dict[str, Pairs]:
    """The sum by segment."""
    return {name: one.get(name, Pairs()).plus(other.get(name, Pairs())) for name in one.keys() | other.keys()}


def minus(now: Mapping[str, Pairs], before: Mapping[str, Pairs]) -> dict[str, Pairs]:
    """The difference by segment; nothing of a segment whose sums fell: then the source began anew, and this is the mark to count from."""
    found = {}
    for name, pairs in now.items():
        old = before.get(name, Pairs())
        differences = {
            tensor: _combined(buckets, old.differences.get(tensor, {}), -1)
            for tensor, buckets in pairs.differences.items()
        }
        fell = any(count < 0 for buckets in differences.values() for count in buckets.values())
        if fell or pairs.pairs < old.pairs or pairs.flips < old.flips:
            continue
        more = pairs.pairs - old.pairs
        if more:
            found[name] = Pairs(
                pairs=more,
                flips=min(pairs.flips - old.flips, more),
                shift_sum=min(max(pairs.shift_sum - old.shift_sum, 0.0), float(more)),
                shift_square_sum=min(max(pairs.shift_square_sum - old.shift_square_sum, 0.0), float(more)),
                differences=differences,
            )
    return found


def _combined(one: Mapping[str, int], other: Mapping[str, int], sign: int) -> dict[str, int]:
    edges = one.keys() | other.keys()
    sums = {edge: one.get(edge, 0) + sign * other.get(edge, 0) for edge in edges}
    return {edge: count for edge, count in sums.items() if count}
