"""Numbers to numbers: scaling, logarithms, Box-Cox, filling gaps. A missing number stays missing unless `impute` fills it."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from millrace_feature.transformers.columns import NAN, Column, Floats, Rows, as_floats, by_value
from millrace_feature.transformers.steps import Parameters, State, Step, per_input

GOLDEN = (math.sqrt(5) - 1) / 2
LAMBDA_LOW, LAMBDA_HIGH = -5.0, 5.0
LAMBDA_WIDTH = 1e-9


def _totals(rows: Rows, centres: Sequence[float]) -> list[tuple[int, float, float]]:
    """(numbers, sum of differences, sum of squared differences) from a centre, per input."""
    counts = [0] * len(centres)
    sums: list[list[float]] = [[] for _ in centres]
    squares: list[list[float]] = [[] for _ in centres]
    for batch in rows.batches():
        for i, column in enumerate(batch.columns):
            numbers = _finite(as_floats(column), rows.inputs[i]) - centres[i]
            counts[i] += len(numbers)
            sums[i].append(float(numbers.sum()))
            squares[i].append(float((numbers * numbers).sum()))
    return [(n, math.fsum(s), math.fsum(q)) for n, s, q in zip(counts, sums, squares, strict=True)]


def _finite(values: Floats, name: str) -> Floats:
    known = values[~np.isnan(values)]
    if not np.isfinite(known).all():
        raise ValueError(f"input {name!r} holds infinite numbers")
    return known


def _or_one(scale: float, centre: float) -> float:
    """A scale to divide by; a constant column is not scaled."""
    tiny = 10 * np.finfo(np.float64).eps * max(abs(centre), 1.0)
    return scale if scale > tiny else 1.0


class Keep(Step):
    """The numbers as they are: an input that stays in the vector beside what other steps make of it."""

    kind = "keep"

    def column(self, place: int, column: Column) -> Floats:
        """The same numbers."""
        del place
        return as_floats(column)


class StandardParameters(Parameters):
    """Of kind `standard`."""

    with_mean: bool = True
    """Subtract the mean."""
    with_std: bool = True
    """Divide by the standard deviation (of the population)."""


class _Linear(Step):
    """(x - centre) / scale."""

    def column(self, place: int, column: Column) -> Floats:
        """The scaled numbers."""
        learned = per_input(self.state, place)
        scaled: Floats = (as_floats(column) - learned["centre"]) / learned["scale"]
        return scaled


class Standard(_Linear):
    """Mean 0, deviation 1 over the rows it was fitted on."""

    kind = "standard"
    Given: ClassVar[type[Parameters]] = StandardParameters

    @classmethod
    def fit(cls, parameters: Any, rows: Rows) -> State:
        """Means and deviations in two passes."""
        first = _totals(rows, [0.0] * len(rows.inputs))
        means = [_mean(name, n, total) for name, (n, total, _squares) in zip(rows.inputs, first, strict=True)]
        learned = []
        for mean, (n, shift, squares) in zip(means, _totals(rows, means), strict=True):
            deviation = math.sqrt(max(squares / n - (shift / n) ** 2, 0.0))
            centre = mean + shift / n if parameters.with_mean else 0.0
            learned.append({"centre": centre, "scale": _or_one(deviation, mean) if parameters.with_std else 1.0})
        return {"inputs": learned}


def _mean(name: str, count: int, total: float) -> float:
    if count == 0:
        raise ValueError(f"input {name!r} holds no number")
    return total / count


class MinMaxParameters(Parameters):
    """Of kind `minmax`."""

    low: float = 0.0
    """What the smallest number becomes."""
    high: float = 1.0
    """What the greatest number becomes."""
    clip: bool = False
    """Keep later numbers between the two."""


class MinMax(Step):
    """The smallest and the greatest number to a given range."""

    kind = "minmax"
    Given: ClassVar[type[Parameters]] = MinMaxParameters

    @classmethod
    def fit(cls, parameters: Any, rows: Rows) -> State:
        """Smallest and greatest numbers."""
        if not parameters.low < parameters.high:
            raise ValueError("low must lie below high")
        lows, highs = [math.inf] * len(rows.inputs), [-math.inf] * len(rows.inputs)
        for batch in rows.batches():
            for i, column in enumerate(batch.columns):
                numbers = _finite(as_floats(column), rows.inputs[i])
                if len(numbers):
                    lows[i], highs[i] = min(lows[i], float(numbers.min())), max(highs[i], float(numbers.max()))
        for name, low, high in zip(rows.inputs, lows, highs, strict=True):
            _mean(name, 1 if low <= high else 0, 0.0)
        return {"inputs": [{"low": low, "high": high} for low, high in zip(lows, highs, strict=True)]}

    def column(self, place: int, column: Column) -> Floats:
        """The moved numbers."""
        learned = per_input(self.state, place)
        low, high = self.given.low, self.given.high
        scale = (high - low) / _or_one(learned["high"] - learned["low"], 0.0)
        moved: Floats = (as_floats(column) - learned["low"]) * scale + low
        return np.clip(moved, low, high) if self.given.clip else moved


class RobustParameters(Parameters):
    """Of kind `robust`."""

    low: float = Field(default=25.0, ge=0, le=100)
    """Lower percentile of the range that becomes 1."""
    high: float = Field(default=75.0, ge=0, le=100)
    """Upper percentile."""


class Robust(_Linear):
    """Median 0, and the range between two percentiles 1: outliers have no say."""

    kind = "robust"
    Given: ClassVar[type[Parameters]] = RobustParameters

    @classmethod
    def fit(cls, parameters: Any, rows: Rows) -> State:
        """Exact percentiles."""
        if not parameters.low < parameters.high:
            raise ValueError("low must lie below high")
        learned = []
        for i, name in enumerate(rows.inputs):
            numbers = _finite(rows.numbers(i), name)
            _mean(name, len(numbers), 0.0)
            low, middle, high = np.percentile(numbers, [parameters.low, 50.0, parameters.high]).tolist()
            learned.append({"centre": middle, "scale": _or_one(high - low, 0.0)})
        return {"inputs": learned}


class LogParameters(Parameters):
    """Of kind `log`."""

    offset: float = Field(default=1.0, ge=0)
    """Added before the natural logarithm is taken."""


class Log(Step):
    """ln(x + offset); missing where that is not defined."""

    kind = "log"
    Given: ClassVar[type[Parameters]] = LogParameters

    def column(self, place: int, column: Column) -> Floats:
        """The logarithms."""
        del place
        offset = self.given.offset
        return by_value(math.log1p if offset == 1.0 else lambda x: math.log(x + offset), as_floats(column))


class BoxCoxParameters(Parameters):
    """Of kind `boxcox`."""

    power: float | None = Field(default=None, ge=LAMBDA_LOW, le=LAMBDA_HIGH)
    """Lambda; None finds the one under which the numbers look most normal."""


class BoxCox(Step):
    """(x^lambda - 1) / lambda, ln x for lambda 0; for positive numbers, missing for others."""

    kind = "boxcox"
    Given: ClassVar[type[Parameters]] = BoxCoxParameters

    @classmethod
    def fit(cls, parameters: Any, rows: Rows) -> State:
        """Lambda of greatest likelihood per input."""
        if parameters.power is not None:
            return {"inputs": [{"power": parameters.power} for _ in rows.inputs]}
        learned = []
        for i, name in enumerate(rows.inputs):
            numbers = _finite(rows.numbers(i), name)
            if len(numbers) < 2 or numbers.min() <= 0 or numbers.min() == numbers.max():
                raise ValueError(f"input {name!r} needs at least two different numbers, all above 0")
            learned.append({"power": _best_power(np.log(numbers))})
        return {"inputs": learned}

    def column(self, place: int, column: Column) -> Floats:
        """The transformed numbers."""
        power = per_input(self.state, place)["power"]

        def one(x: float) -> float:
            if x <= 0:
                return NAN
            return math.expm1(power * math.log(x)) / power if power else math.log(x)

        return by_value(one, as_floats(column))


def _best_power(logs: Floats) -> float:
    """Maximum of the log-likelihood of Box and Cox (1964) by golden section."""
    total = float(logs.sum())
    # Shifted by the greatest exponent, so that no power overflows; the shift leaves the likelihood as it is.
    centred = logs - logs.mean()

    def likelihood(power: float) -> float:
        values = np.expm1(power * centred) / power if abs(power) > 1e-12 else centred
        variance = float(values.var())
        if not 0 < variance < math.inf:
            return -math.inf
        # Centring multiplies the values by exp(-power * mean), which the variance must get back.
        return (power - 1) * total - len(logs) / 2 * (math.log(variance) + 2 * power * float(logs.mean()))

    low, high = LAMBDA_LOW, LAMBDA_HIGH
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = likelihood(left), likelihood(right)
    while high - low > LAMBDA_WIDTH:
        if at_left < at_right:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = likelihood(right)
        else:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = likelihood(left)
    return round((low + high) / 2, 9)


class ImputeParameters(Parameters):
    """Of kind `impute`."""

    strategy: Literal["mean", "median", "most_frequent", "constant"] = "mean"
    """What a missing number becomes; of equally frequent ones the smallest."""
    value: float = 0.0
    """For `constant`."""
    indicator: bool = False
    """A second output a number, `<name>_missing`: 1 where it was missing."""


class Impute(Step):
    """Fills gaps."""

    kind = "impute"
    Given: ClassVar[type[Parameters]] = ImputeParameters

    @classmethod
    def fit(cls, parameters: Any, rows: Rows) -> State:
        """The value that fills, per input."""
        strategy = parameters.strategy
        if strategy == "constant":
            return {"inputs": [{"fill": parameters.value} for _ in rows.inputs]}
        learned = []
        for i, name in enumerate(rows.inputs):
            numbers = _finite(rows.numbers(i), name)
            _mean(name, len(numbers), 0.0)
            if strategy == "mean":
                fill = math.fsum(numbers.tolist()) / len(numbers)
            elif strategy == "median":
                fill = float(np.median(numbers))
            else:
                values, counts = np.unique(numbers, return_counts=True)
                fill = float(values[counts.argmax()])
            learned.append({"fill": fill})
        return {"inputs": learned}

    def apply(self, columns: Sequence[Column], folds: Sequence[int] | None = None) -> list[Floats]:
        """The filled numbers, each followed by its indicator."""
        del folds
        outputs: list[Floats] = []
        for i, column in enumerate(columns):
            numbers = as_floats(column)
            missing = np.isnan(numbers)
            numbers[missing] = per_input(self.state, i)["fill"]
            outputs.append(numbers)
            if self.given.indicator:
                outputs.append(missing.astype(np.float64))
        return outputs

    def _named(self) -> tuple[str, ...]:
        roots = [self.root(i) for i in range(len(self.names))]
        return tuple(
            name for root in roots for name in ((root, f"{root}_missing") if self.given.indicator else (root,))
        )
