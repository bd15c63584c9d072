"""Embeddings in a model's vector: which stored feature `embedding__3` is a number of, and taking the numbers out of a row."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from millrace_feature.plan import LatestView, View
from millrace_feature.vectors import unpack

NAN = float("nan")
Unpack = Callable[[bytes], list[float]]


def readers_of(view: View) -> Mapping[str, Unpack]:
    """By name of an embedding what reads its stored value."""
    fields = view.vectors if isinstance(view, LatestView) else ()
    return {field.feature: partial(unpack, is_wide=field.is_wide) for field in fields}


def whole_feature(name: str, known: Sequence[str], views: Sequence[View]) -> str | None:
    """The feature that `name` is, or is a number of; None when it is neither.

    Args:
        name: a feature, or `embedding__3`.
        known: features of the part of a service.
        views: the view behind it, or nothing for a computed part.
    """
    if name in known:
        return name
    base, _separator, number = name.rpartition("__")
    fields = [field for view in views if isinstance(view, LatestView) for field in view.vectors]
    is_element = number.isascii() and number.isdigit() and number == str(int(number))
    return next((f.feature for f in fields if is_element and f.feature == base and int(number) < f.length), None)


class ElementPicker:
    """Takes numbers of one embedding out of a row's values.

    Args:
        place: of the embedding among the row's values.
        read: unpacks it.
        numbers: which of its numbers, in order.
    """

    def __init__(self, place: int, read: Unpack, numbers: Sequence[int]) -> None:
        self._place = place
        self._read = read
        self._numbers = numbers
        self._are_first = list(numbers) == list(range(len(numbers)))
        self._missing = [NAN] * len(numbers)

    def __call__(self, row: Sequence[Any]) -> list[float]:
        """The numbers, NaN where the row has no embedding."""
        value = row[self._place]
        if not isinstance(value, bytes):
            return self._missing
        found = self._read(value)
        return found[: len(self._numbers)] if self._are_first else [found[i] for i in self._numbers]
