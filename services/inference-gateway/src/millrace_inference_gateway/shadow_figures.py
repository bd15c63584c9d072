"""Answers of a version that gets copies beside those its callers got: decoded, compared row by row, summed up by segment."""

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from millrace_inference_gateway.payload import Rows, output_rows

MAX_VERSIONS = 100
MAX_SEGMENTS = 16
"""Of one version; rows of later ones are in the segment `OTHERS`."""
OTHERS = "(others)"
MAX_TENSORS = 8
"""Output tensors of one version whose differences are kept apart."""
WHOLE = ""
"""All segments, and all tensors, together."""
LABEL_THRESHOLD = 0.5
"""A single score is the label "yes" from here on."""
# Edges 9 % apart from 1e-9 to 1e12: a difference is known to a tenth of itself.
EDGES = tuple(1e-9 * 1.09**i for i in range(math.ceil(math.log(1e21) / math.log(1.09)) + 1))

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(slots=True)
class ShadowCounts:
    """Sums of one version and segment since this process's start."""

    pairs: int = 0
    flips: int = 0
    shift_sum: float = 0.0
    shift_square_sum: float = 0.0
    differences: dict[str, dict[float, int]] = field(default_factory=dict)
    """Rows by tensor and upper edge of their largest absolute difference."""

    def add(self, found: "Differences") -> None:
        """Count the rows of one request."""
        self.pairs += len(found.flips)
        self.flips += int(found.flips.sum())
        self.shift_sum += float(found.shifts.sum())
        self.shift_square_sum += float(np.square(found.shifts).sum())
        for tensor, values in found.tensors.items():
            if tensor not in self.differences and len(self.differences) > MAX_TENSORS:
                continue
            buckets = self.differences.setdefault(tensor, {})
            for value in values:
                edge = bucket(float(value))
                buckets[edge] = buckets.get(edge, 0) + 1


@dataclass(frozen=True, slots=True)
class Differences:
    """Rows of one request that both versions answered."""

    flips: Flags
    shifts: Floats
    """Absolute difference of the score, at most 1."""
    tensors: Mapping[str, Floats]
    """Largest absolute difference of each row, by tensor."""


def bucket(difference: float) -> float:
    """Upper edge of the bucket a difference belongs to; 0 for none at all."""
    if difference <= 0:
        return 0.0
    at = bisect_left(EDGES, difference)
    return EDGES[at] if at < len(EDGES) else math.inf


def compare(stable: bytes, candidate: bytes, score: str) -> Differences | None:
    """How two answers to one request differ; None when they cannot be read as the same rows.

    Args:
        stable: serialized `ModelInferResponse` the caller got.
        candidate: the shadow's.
        score: output tensor with the score; the first of floats when it is not among them.

    The label is an output of whole numbers where there is one; else "score at least 0.5", or the largest of several scores.
    """
    one, two = output_rows(stable), output_rows(candidate)
    if not one or not two or one.keys() != two.keys():
        return None
    if any(one[name].rows.shape != two[name].rows.shape for name in one):
        return None
    if len({len(tensor.rows) for tensor in one.values()}) != 1:
        return None
    tensors = {name: _largest(one[name].rows, two[name].rows) for name in one}
    named = dict(tensors) if len(tensors) > 1 else {}
    named[WHOLE] = np.maximum.reduce(list(tensors.values()))
    floats = [name for name, tensor in one.items() if not tensor.whole]
    whole = [name for name, tensor in one.items() if tensor.whole]
    name = score if score in floats else next(iter(floats), "")
    flips = np.zeros(len(named[WHOLE]), dtype=bool)
    shifts = np.zeros(len(flips))
    if name:
        flips, shifts = _scores(one[name].rows, two[name].rows)
    if whole:
        flips = np.logical_or.reduce([(one[n].rows != two[n].rows).any(axis=1) for n in whole])
    return Differences(flips, shifts, named)


def _largest(one: Rows, two: Rows) -> Floats:
    with np.errstate(invalid="ignore"):
        gaps = np.abs(one - two)
    # Equal infinities and two NaNs are no difference, one of them is the largest there is.
    gaps[(one == two) | (np.isnan(one) & np.isnan(two))] = 0.0
    gaps[np.isnan(gaps)] = np.inf
    found: Floats = gaps.max(axis=1)
    return found


def _scores(one: Rows, two: Rows) -> tuple[Flags, Floats]:
    if one.shape[1] == 1:
        flips = (one[:, 0] >= LABEL_THRESHOLD) != (two[:, 0] >= LABEL_THRESHOLD)
        mine, theirs = one[:, :1], two[:, :1]
    else:
        label = one.argmax(axis=1)
        flips = label != two.argmax(axis=1)
        at = label[:, None]
        mine, theirs = np.take_along_axis(one, at, 1), np.take_along_axis(two, at, 1)
    return flips, np.minimum(_largest(mine, theirs), 1.0)


class ShadowFigures:
    """Sums by model, version and segment."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], dict[str, ShadowCounts]] = {}
        self.unpaired = 0

    def add(self, model: str, version: str, segment: str, found: Differences) -> None:
        """Count the rows of one request, for all together and for its segment."""
        segments = self._counts.pop((model, version), None)
        if segments is None:
            segments = {WHOLE: ShadowCounts()}
        self._counts[(model, version)] = segments
        if len(self._counts) > MAX_VERSIONS:
            del self._counts[next(iter(self._counts))]
        segments[WHOLE].add(found)
        if segment:
            known = segment in segments or len(segments) <= MAX_SEGMENTS
            segments.setdefault(segment if known else OTHERS, ShadowCounts()).add(found)

    def of(self, model: str, version: str) -> Mapping[str, ShadowCounts]:
        """A version's sums by segment; nothing where nothing was compared."""
        return self._counts.get((model, version), {})
