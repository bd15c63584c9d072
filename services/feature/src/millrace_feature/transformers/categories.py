"""Categories to numbers: one-hot, ordinal, frequency and target encoding. A missing value is a category of its own where rows had one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from millrace_feature.transformers.columns import MISSING, NAN, Column, Floats, Ints, Rows, as_categories
from millrace_feature.transformers.steps import Parameters, State, Step, per_input

MAX_CATEGORIES = 100_000
"""Most categories of one input; an input with more is hashed instead."""
MAX_ONEHOT = 4096
"""Most outputs of one one-hot encoded input."""
OTHER = "<other>"
"""Name of the output for categories that are too rare or not known."""
MAX_FOLDS = 20


class UnknownCategoryError(ValueError):
    """A category that the rows a step was fitted on did not hold, where that is to be an error."""


def _counted(rows: Rows) -> list[dict[str | None, int]]:
    """Rows by category, per input.

    Raises:
        ValueError: an input has more than MAX_CATEGORIES.
    """
    counts: list[dict[str | None, int]] = [{} for _ in rows.inputs]
    for batch in rows.batches():
        for seen, column, name in zip(counts, batch.columns, rows.inputs, strict=True):
            for category in as_categories(column):
                seen[category] = seen.get(category, 0) + 1
            if len(seen) > MAX_CATEGORIES:
                raise ValueError(f"input {name!r} has more than {MAX_CATEGORIES} categories; use kind 'hash'")
    return counts


def _in_order(categories: Sequence[str | None] | Mapping[str | None, Any]) -> list[str | None]:
    """Texts in code point order, numbers by value, the missing one last."""

    def key(category: str | None) -> tuple[bool, float, str]:
        if category is None:
            return True, 0.0, ""
        try:
            return False, float(category), category
        except ValueError:
            return False, math.inf, category

    plain = [c for c in categories if c is not None]
    numeric = all(_is_number(c) for c in plain)
    return sorted(categories, key=key if numeric else lambda c: (c is None, 0.0, c or ""))


def _is_number(text: str) -> bool:
    try:
        return not math.isnan(float(text))
    except ValueError:
        return False


def _codes(categories: Sequence[str | None], places: Mapping[str | None, int]) -> list[int]:
    """Place of each row's category, -1 for an unknown one."""
    return [places.get(category, -1) for category in categories]


class _Encoder(Step):
    """A step that knows a list of categories per input."""

    def __init__(self, names: Sequence[str], base: str, parameters: Any, state: State) -> None:
        self._places = [{c: i for i, c in enumerate(learned["categories"])} for learned in state["inputs"]]
        super().__init__(names, base, parameters, state)

    def codes(self, place: int, column: Column) -> list[int]:
        """Place of each row's category in the list of input `place`, -1 for an unknown one."""
        return _codes(as_categories(column), self._places[place])

    def refuse_unknown(self, place: int, codes: Sequence[int], column: Column) -> None:
        """Raises UnknownCategoryError naming the first unknown category."""
        if -1 in codes:
            category = as_categories(column)[codes.index(-1)]
            raise UnknownCategoryError(f"input {self.names[place]!r} holds {category!r}, which was not fitted")


class OneHotParameters(Parameters):
    """Of kind `onehot`."""

    min_rows: int = Field(default=1, ge=1)
    """Categories of fewer rows share the output `<other>`."""
    max_categories: int = Field(default=256, ge=1, le=MAX_ONEHOT)
    """So many of the most frequent ones get an output of their own; of equally frequent ones the first in order."""
    unknown: Literal["zeros", "other", "error"] = "zeros"
    """What a category that was not fitted becomes: 0 everywhere, the output `<other>`, or an error of the read."""


class OneHot(_Encoder):
    """One output a category, `<name>=<category>`."""

    kind = "onehot"
    Given: ClassVar[type[Parameters]] = OneHotParameters

    @classmethod
    def fit(cls, parameters: Any, rows: Rows) -> State:
        """The categories that get an output."""
        learned = []
        for seen in _counted(rows):
            order = _in_order(seen)
            often = [(-seen[c], i) for i, c in enumerate(order) if seen[c] >= parameters.min_rows]
            kept = [order[i] for _rows, i in sorted(often)[: parameters.max_categories]]
            rare = [c for c in order if c not in set(kept)]
            learned.append({"categories": _in_order(kept), "rare": rare})
        return {"inputs": learned}

    def __init__(self, names: Sequence[str], base: str, parameters: Any, state: State) -> None:
        self._rare = [frozenset(learned["rare"]) for learned in state["inputs"]]
        super().__init__(names, base, parameters, state)

    def apply(self, columns: Sequence[Column], folds: Sequence[int] | None = None) -> list[Floats]:
        """One column a category, input by input."""
        del folds
        outputs: list[Floats] = []
        for place, column in enumerate(columns):
            codes = self.codes(place, column)
            known = len(self._places[place])
            out = np.zeros((known + self._has_other(place), len(codes)))
            if -1 in codes:
                categories = as_categories(column)
                for row, code in enumerate(codes):
                    if code == -1 and (categories[row] in self._rare[place] or self.given.unknown == "other"):
                        codes[row] = known
                if self.given.unknown == "error":
                    self.refuse_unknown(place, codes, column)
            rows = [row for row, code in enumerate(codes) if code >= 0]
            out[[codes[row] for row in rows], rows] = 1.0
            outputs.extend(out)
        return outputs

    def _has_other(self, place: int) -> bool:
        return bool(self._rare[place]) or self.given.unknown == "other"

    def _named(self) -> tuple[str, ...]:
        names: list[str] = []
        for place, learned in enumerate(self.state["inputs"]):
            labels = [MISSING if c is None else c for c in learned["categories"]]
            labels += [OTHER] if self._has_other(place) else []
            names += [f"{self.root(place)}={label}" for label in labels]
        return tuple(names)


class OrdinalParameters(Parameters):
    """Of kind `ordinal`."""

    categories: tuple[str, ...] = Field(default=(), max_length=MAX_CATEGORIES, strict=False)
    """In this order instead of in that of the alphabet (numbers: by value)."""
    unknown: Literal["missing", "error"] = "missing"
    """What a category that was not fitted becomes."""


class Ordinal(_Encoder):
    """The category's place in the order, from 0; a missing value stays missing."""

    kind = "ordinal"
    Given: ClassVar[type[Parameters]] = OrdinalParameters

    @classmethod
    def fit(cls, parameters: Any, rows: Rows) -> State:
        """The order."""
        if parameters.categories:
            if len(set(parameters.categories)) < len(parameters.categories):
                raise ValueError("categories holds one twice")
            return {"inputs": [{"categories": list(parameters.categories)} for _ in rows.inputs]}
        return {"inputs": [{"categories": _in_order([c for c in seen if c is not None])} for seen in _counted(rows)]}

    def column(self, place: int, column: Column) -> Floats:
        """Places in the order."""
        categories = as_categories(column)
        codes = _codes(categories, self._places[place])
        if self.given.unknown == "error":
            self.refuse_unknown(
                place, [0 if c is None else code for c, code in zip(categories, codes, strict=True)], column
            )
        return np.array([NAN if code < 0 else code for code in codes], np.float64)


class FrequencyParameters(Parameters):
    """Of kind `frequency`."""

    share: bool = True
    """Part of the rows, 0 to 1; else their number."""


class Frequency(_Encoder):
    """How frequent the category was; 0 for one that was not fitted."""

    kind = "frequency"
    Given: ClassVar[type[Parameters]] = FrequencyParameters

    @classmethod
    def fit(cls, parameters: Any, rows: Rows) -> State:
        """Rows by category."""
        del parameters
        learned = []
        for seen in _counted(rows):
            order = _in_order(seen)
            learned.append({"categories": order, "rows": [seen[c] for c in order]})
        return {"inputs": learned}

    def column(self, place: int, column: Column) -> Floats:
        """The frequencies."""
        rows = per_input(self.state, place)["rows"]
        total = sum(rows) if self.given.share else 1
        values = np.array([*(n / total for n in rows), 0.0])
        return values[self.codes(place, column)]


class TargetParameters(Parameters):
    """Of kind `target`."""

    smooth: float | Literal["auto"] = Field(default="auto", union_mode="left_to_right")
    """How many rows of the overall mean a category's mean is mixed with; `auto` takes the category's variance for it (empirical Bayes)."""
    folds: int = Field(default=5, ge=2, le=MAX_FOLDS)
    """Parts of the fitted rows: each is encoded from the others, so that no row's feature holds its own label."""


class Target(_Encoder):
    """The label's mean over the category; the overall mean for one that was not fitted.

    Rows that it was fitted on get the mean over the other folds. A row's fold is a hash of its join value, so all rows of one subject
    are in one fold and it is the same fold whenever the set is built.
    """

    kind = "target"
    Given: ClassVar[type[Parameters]] = TargetParameters

    @classmethod
    def fit(cls, parameters: Any, rows: Rows) -> State:
        """Encodings over all rows, and over all rows but those of each fold."""
        folds = parameters.folds
        if parameters.smooth != "auto" and parameters.smooth < 0:
            raise ValueError("smooth must not be negative")
        # (rows, sum of labels, sum of squares around `centre`) by fold, so that a part is left out without a subtraction.
        centre = _label_mean(rows)
        sums: list[dict[str | None, Floats]] = [{} for _ in rows.inputs]
        for batch in rows.batches():
            for seen, column in zip(sums, batch.columns, strict=True):
                _add(seen, as_categories(column), batch.folds % folds, batch.label - centre, folds)
            if any(len(seen) > MAX_CATEGORIES for seen in sums):
                raise ValueError(f"an input of kind 'target' has more than {MAX_CATEGORIES} categories")
        learned = []
        for seen in sums:
            order = _in_order(seen)
            cells = np.stack([seen[c] for c in order])
            parts = [[f for f in range(folds) if f != left_out] for left_out in range(folds)]
            encoded = [
                _encoded(cells[:, chosen].sum(axis=1), centre, parameters.smooth) for chosen in [range(folds), *parts]
            ]
            learned.append(
                {
                    "categories": order,
                    "values": encoded[0][0],
                    "mean": encoded[0][1],
                    "folds": [{"values": values, "mean": mean} for values, mean in encoded[1:]],
                }
            )
        return {"inputs": learned}

    def __init__(self, names: Sequence[str], base: str, parameters: Any, state: State) -> None:
        super().__init__(names, base, parameters, state)
        # Per input: encodings by (-1 or fold) and code, the overall mean last, where code -1 finds it.
        self._tables = [
            np.array([[*t["values"], t["mean"]] for t in (learned, *learned["folds"])]) for learned in state["inputs"]
        ]

    def apply(self, columns: Sequence[Column], folds: Sequence[int] | None = None) -> list[Floats]:
        """The encodings; for fitted rows those without their own fold."""
        outputs: list[Floats] = []
        for place, column in enumerate(columns):
            codes = np.array(self.codes(place, column), np.int64)
            known = np.asarray(folds if folds is not None else np.full(len(codes), -1), np.int64)
            rows = np.where(known < 0, 0, known % self.given.folds + 1)
            outputs.append(self._tables[place][rows, codes])
        return outputs


def _add(
    seen: dict[str | None, Floats], categories: Sequence[str | None], part: Ints, label: Floats, folds: int
) -> None:
    """Add rows to the (fold, 3) sums of their categories."""
    places: dict[str | None, int] = {}
    codes = np.array([places.setdefault(category, len(places)) for category in categories], np.int64)
    cells = codes * folds + part
    size = len(places) * folds
    weights = (np.ones_like(label), label, label * label)
    found = [np.bincount(cells, weight, size).astype(np.float64) for weight in weights]
    for category, place in places.items():
        new = np.stack([values[place * folds : (place + 1) * folds] for values in found], axis=1)
        seen[category] = seen[category] + new if category in seen else new


def _label_mean(rows: Rows) -> float:
    count, sums = 0, []
    for batch in rows.batches():
        if not np.isfinite(batch.label).all():
            raise ValueError("kind 'target' needs a label of finite numbers or booleans")
        count += len(batch.label)
        sums.append(float(batch.label.sum()))
    if count == 0:
        raise ValueError("the training set has no rows")
    return math.fsum(sums) / count


def _encoded(cells: Floats, centre: float, smooth: float | str) -> tuple[list[float], float]:
    """(encoding per category, overall mean) from (rows, sum, squares) per category, sums around `centre`.

    Micci-Barreca, A preprocessing scheme for high-cardinality categorical attributes, SIGKDD Explorations 3 (2001), equations 3 and 5.
    """
    counts, totals, squares = cells.T
    rows = float(counts.sum())
    mean = float(totals.sum()) / rows if rows else 0.0
    variance = float(squares.sum()) / rows - mean * mean if rows else 0.0
    seen = np.maximum(counts, 1.0)
    means = totals / seen
    if smooth == "auto":
        within = np.maximum(squares / seen - means * means, 0.0)  # the category's variance
        share = variance * counts + within
        weight = np.divide(variance * counts, share, out=np.zeros_like(share), where=share > 0)
        encoded = weight * means + (1 - weight) * mean
    else:
        weight = counts + float(smooth)
        encoded = np.divide(totals + float(smooth) * mean, weight, out=np.full_like(weight, mean), where=weight > 0)
    return (encoded + centre).tolist(), mean + centre
