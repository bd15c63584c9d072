"""An answer's blocks as columns, which both formats write."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from millrace_feature.feast_wire.selection import Block
from millrace_feature.feast_wire.values import CONVERTERS, NOT_FOUND, OUTSIDE_MAX_AGE, PRESENT, doubles
from millrace_feature.float_parts import FloatPart
from millrace_feature.serving import Part


@dataclass(frozen=True, slots=True)
class Columns:
    """One block's content."""

    values: Sequence[Sequence[Any]]
    """Per feature one value a row, NaN or None where missing."""
    statuses: Sequence[int]
    """Per row."""
    times_us: Sequence[int | None]
    """Per row."""


def statuses(part: Part | FloatPart) -> list[int]:
    """Feast's status of each row."""
    if isinstance(part, FloatPart) and part.is_whole:
        return [PRESENT] * len(part.instants)
    if part.expired:
        found = [PRESENT if values is not None else NOT_FOUND for values in part.values]
        for row in part.expired:
            found[row] = OUTSIDE_MAX_AGE
        return found
    return [PRESENT if values is not None else NOT_FOUND for values in part.values]


def columns(block: Block, part: Part | FloatPart) -> Columns:
    """The block's features of every row."""
    nothing = (None,) * len(block.names)
    picked = [nothing if values is None else block.picker(values) for values in part.values]
    if len(picked) == 1:
        return Columns(_single(block, picked[0]), statuses(part), part.times_us)
    by_feature = zip(*picked, strict=True)
    values = [CONVERTERS[kind](column) for kind, column in zip(block.kinds, by_feature, strict=True)]
    return Columns(values, statuses(part), part.times_us)


def _single(block: Block, row: Sequence[Any]) -> list[list[Any]]:
    if block.is_all_double:
        return [[value] for value in doubles(row)]
    return [CONVERTERS[kind]((value,)) for kind, value in zip(block.kinds, row, strict=True)]
