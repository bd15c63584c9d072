"""The windows of a view as Feast's messages and our tags define them: hop, fresh head, bound of lateness, aggregations."""

import math
import re
from typing import Any

from millrace_kit.errors import InvalidArgumentError

from millrace_feature.canonical import FIELD
from millrace_feature.functions import KNOWN, canonical
from millrace_feature.plan import Aggregate

MAX_TILES_PER_WINDOW = 100_000
DEFAULT_HOP_US = 300_000_000
HEAD_TAG = "millrace.head"
"""`fresh` counts events up to the asked instant, `1m` up to the last whole minute; else up to the last complete slide."""
LATE_TAG = "millrace.late_by"
"""Rows that came in later than this after their event time do not count, anywhere."""
_UNITS_US = {"ms": 1_000, "s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000}


def hop_us_of(spec: Any) -> int:
    """The widest hop of which every slide of the view is a multiple, unless the view names one."""
    if spec.HasField("tiling_hop_size") and spec.enable_tiling:
        return int(spec.tiling_hop_size.ToMicroseconds())
    slides = [a.slide_interval.ToMicroseconds() for a in spec.aggregations if a.HasField("slide_interval")]
    if len(slides) < len(spec.aggregations):
        slides.append(DEFAULT_HOP_US)
    return math.gcd(*slides)


def head_us_of(view: str, text: str, hop_us: int) -> int:
    """Unit of a view's fresh head; 0 when it has none."""
    if text in {"", "hop"}:
        return 0
    unit_us = 1 if text == "fresh" else duration_us(view, HEAD_TAG, text)
    if not 0 < unit_us < hop_us or hop_us % unit_us:
        raise InvalidArgumentError(FIELD, f"view {view!r}: tag {HEAD_TAG} must be 'fresh' or a whole part of the hop")
    return unit_us


def duration_us(view: str, tag: str, text: str) -> int:
    """The time that a tag of a view says."""
    found = re.fullmatch(r"(\d{1,9})(ms|s|m|h|d)", text)
    if found is None or int(found.group(1)) == 0:
        raise InvalidArgumentError(
            FIELD, f"view {view!r}: tag {tag} must be a time such as 30s, 5m or 2h, not {text!r}"
        )
    return int(found.group(1)) * _UNITS_US[found.group(2)]


def aggregate_of(view: str, aggregation: Any, hop_us: int) -> Aggregate:
    """One of a view's aggregations.

    Raises:
        InvalidArgumentError: this service has no such function, or its window is no whole number of slides and hops.
    """
    window_us = aggregation.time_window.ToMicroseconds()
    slide_us = aggregation.slide_interval.ToMicroseconds() if aggregation.HasField("slide_interval") else hop_us
    name = aggregation.name or f"{aggregation.function}_{aggregation.column}_{window_us // 1_000_000}s"
    function = canonical(aggregation.function)
    if function is None:
        raise InvalidArgumentError(FIELD, f"{view}.{name}: function {aggregation.function!r} is none of {KNOWN}")
    if not aggregation.column:
        raise InvalidArgumentError(FIELD, f"{view}.{name} needs a column")
    if slide_us <= 0 or hop_us <= 0 or slide_us % hop_us:
        raise InvalidArgumentError(FIELD, f"{view}.{name}: slide_interval must be whole hops of the view")
    if window_us <= 0 or window_us % slide_us or window_us // hop_us > MAX_TILES_PER_WINDOW:
        problem = f"time_window must be whole slide_intervals, and at most {MAX_TILES_PER_WINDOW} hops"
        raise InvalidArgumentError(FIELD, f"{view}.{name}: {problem}")
    return Aggregate(name, aggregation.column, function, window_us, 0 if slide_us == hop_us else slide_us)
