"""Whether a version's values are what its signature says: compiled once for each version, applied before a model is called.

What is wrong with a value is named, the value never is.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from millrace_api.common.v1 import common_pb2
from millrace_kit.errors import InvalidArgumentError
from prometheus_client import Counter

VALUES = Counter(
    "millrace_gateway_values_not_allowed_total",
    "Values that a version's signature does not allow, by what was done.",
    ["model", "version", "problem", "outcome"],
)
REASON = "VALUE_REFUSED"

Problem = common_pb2.ValueProblem
Finding = common_pb2.ValueFinding
Findings = Sequence[Finding]
Rule = common_pb2.ValueRule
Values = tuple[float, ...]

_TEXTS = {
    Problem.VALUE_PROBLEM_MISSING: "is needed",
    Problem.VALUE_PROBLEM_NAN: "is NaN; leave it out where there is no value",
    Problem.VALUE_PROBLEM_INFINITE: "is infinite",
    Problem.VALUE_PROBLEM_BELOW_MIN: "is below the smallest value allowed",
    Problem.VALUE_PROBLEM_ABOVE_MAX: "is above the largest value allowed",
    Problem.VALUE_PROBLEM_NOT_ALLOWED: "is none of the values allowed",
    Problem.VALUE_PROBLEM_WRONG_TYPE: "is of another type than the model takes",
    Problem.VALUE_PROBLEM_OUT_OF_TYPE: "has no place in the model's datatype",
}
# Whatever the policy, the model cannot be given these.
_ALWAYS_REFUSED = frozenset({Problem.VALUE_PROBLEM_WRONG_TYPE, Problem.VALUE_PROBLEM_OUT_OF_TYPE})
_NO_RULE = Rule()


@dataclass(frozen=True, slots=True)
class Column:
    """What one feature may be, as the model's datatype and the rule leave it."""

    name: str
    rule: Rule
    low: float
    high: float
    whole: bool
    allowed: frozenset[float]
    required: bool

    def problem(self, value: float) -> "Problem.ValueType | None":
        """What is wrong with it; None where nothing is."""
        if math.isnan(value):
            return Problem.VALUE_PROBLEM_MISSING if self.required else None
        if self.allowed:
            return None if value in self.allowed else Problem.VALUE_PROBLEM_NOT_ALLOWED
        if self.whole and math.isfinite(value) and value != math.floor(value):
            return Problem.VALUE_PROBLEM_WRONG_TYPE
        if self.low <= value <= self.high:
            return None
        if math.isinf(value) and not self.rule.allow_infinite:
            return Problem.VALUE_PROBLEM_INFINITE
        if self.rule.HasField("min") and value < self.rule.min:
            return Problem.VALUE_PROBLEM_BELOW_MIN
        if self.rule.HasField("max") and value > self.rule.max:
            return Problem.VALUE_PROBLEM_ABOVE_MAX
        return Problem.VALUE_PROBLEM_OUT_OF_TYPE

    def clipped(self, value: float) -> float | None:
        """The bound to use instead; None where there is none on that side."""
        if value < self.low and self.rule.HasField("min"):
            return self.low
        return self.high if value > self.high and self.rule.HasField("max") else None


class Checks:
    """One version's rules; two are the same when they are the same object.

    Args:
        model: whose.
        version: whose.
        rules: what is declared.
        names: the features, in the model's order.
        kind: numpy's type of the input tensor.
        given: whether features come from the caller, not from a feature service.
    """

    def __init__(
        self,
        model: str,
        version: str,
        rules: common_pb2.ValueRules,
        names: Sequence[str],
        kind: "np.dtype[np.generic]",
        *,
        given: bool,
    ) -> None:
        self.version = version
        self._model = model
        self._given = given
        declared = {rule.name: rule for rule in rules.features}
        self._inputs = {rule.name: rule for rule in rules.inputs}
        self._allowed_texts = {rule.name: frozenset(rule.allowed_texts) for rule in rules.inputs}
        self._declared = declared if given else self._inputs
        self._columns = [_column(name, declared.get(name), kind, given=given) for name in names]
        self._places = {name: index for index, name in enumerate(names)}
        columns = self._columns
        self._low = np.array([column.low for column in columns])
        self._high = np.array([column.high for column in columns])
        required = np.array([column.required for column in columns], np.bool_)
        self._required: npt.NDArray[np.bool_] | None = required if required.any() else None
        self._whole = any(column.whole for column in columns)
        self._sets = [(index, column.allowed) for index, column in enumerate(columns) if column.allowed]
        self._idle = not (
            self._whole or self._sets or required.any() or np.isfinite(self._low).any() or np.isfinite(self._high).any()
        )

    def inputs(self, inputs: Mapping[str, common_pb2.Value], odd: Iterable[tuple[str, float]]) -> Findings:
        """Check what a caller sends; `odd` are its numbers that are NaN or infinite.

        Raises:
            InvalidArgumentError: names the input and what is wrong with it.
        """
        found: list[Finding] = []
        for name, value in odd:
            rule = self._declared.get(name, _NO_RULE)
            if math.isnan(value) and not rule.allow_nan:
                found.append(self._judged(f"inputs[{name!r}]", Problem.VALUE_PROBLEM_NAN, rule.policy))
            elif math.isinf(value) and not rule.allow_infinite and not self._given:
                # Of a feature that the caller gives, the column says it: it may be clipped.
                found.append(self._judged(f"inputs[{name!r}]", Problem.VALUE_PROBLEM_INFINITE, rule.policy))
        for name, rule in self._inputs.items():
            problem = self._input_problem(rule, inputs.get(name))
            if problem is not None:
                found.append(self._judged(f"inputs[{name!r}]", problem, rule.policy))
        return found

    def features(self, values: Values) -> tuple[Values, Findings]:
        """The values the model gets, NaN where missing, and what was found out about them.

        Raises:
            InvalidArgumentError: names the feature, its place and what is wrong with it.
        """
        if self._idle:
            return values, ()
        row = np.array(values)
        wrong = (row < self._low) | (row > self._high)
        if self._required is not None:
            wrong |= np.isnan(row) & self._required
        if self._whole:
            wrong |= row != np.floor(row)
        for index, allowed in self._sets:
            if values[index] not in allowed:
                wrong[index] = True
        return self._sorted_out(values, np.flatnonzero(wrong)) if wrong.any() else (values, ())

    def refused(self, field: str, problem: "Problem.ValueType", name: str = "") -> InvalidArgumentError:
        """The error for a value of the feature `name`, counted."""
        self._count(problem, "refused")
        error = InvalidArgumentError(field, _TEXTS[problem], REASON)
        error.metadata["problem"] = Problem.Name(problem).removeprefix("VALUE_PROBLEM_")
        if name in self._places:
            error.metadata["index"] = str(self._places[name])
        return error

    def _sorted_out(self, values: Values, places: "npt.NDArray[np.intp]") -> tuple[Values, Findings]:
        used, found = list(values), []
        for place in places.tolist():
            column = self._columns[place]
            problem = column.problem(values[place])
            if problem is None:
                continue
            kind = "inputs" if self._given else "features"
            field = f"{kind}[{column.name!r}]"
            if column.rule.policy == common_pb2.VALUE_POLICY_CLIP:
                bound = column.clipped(values[place])
                if bound is None:
                    raise self.refused(field, problem, column.name)
                used[place] = bound
                self._count(problem, "clipped")
                found.append(Finding(field=field, problem=problem, clipped=True))
            else:
                # No whole number says that there is none.
                policy = column.rule.policy if not (column.whole and math.isnan(values[place])) else 0
                found.append(self._judged(field, problem, policy, column.name))
        return tuple(used), found

    def _judged(self, field: str, problem: "Problem.ValueType", policy: int, name: str = "") -> Finding:
        if policy != common_pb2.VALUE_POLICY_WARN or problem in _ALWAYS_REFUSED:
            raise self.refused(field, problem, name)
        self._count(problem, "used")
        return Finding(field=field, problem=problem)

    def _input_problem(self, rule: Rule, value: common_pb2.Value | None) -> "Problem.ValueType | None":
        if value is None:
            return Problem.VALUE_PROBLEM_MISSING if rule.required else None
        kind = value.WhichOneof("kind")
        texts = self._allowed_texts[rule.name]
        wants_number = rule.HasField("min") or rule.HasField("max") or bool(rule.allowed)
        if kind == "string_value":
            if texts:
                return None if value.string_value in texts else Problem.VALUE_PROBLEM_NOT_ALLOWED
            return Problem.VALUE_PROBLEM_WRONG_TYPE if wants_number else None
        if kind is None or kind == "timestamp_value":
            return Problem.VALUE_PROBLEM_WRONG_TYPE if wants_number or texts else None
        number = float(getattr(value, kind))
        if not wants_number:
            return Problem.VALUE_PROBLEM_WRONG_TYPE if texts else None
        if rule.allowed:
            return None if number in rule.allowed else Problem.VALUE_PROBLEM_NOT_ALLOWED
        if rule.HasField("min") and number < rule.min:
            return Problem.VALUE_PROBLEM_BELOW_MIN
        return Problem.VALUE_PROBLEM_ABOVE_MAX if rule.HasField("max") and number > rule.max else None

    def _count(self, problem: "Problem.ValueType", outcome: str) -> None:
        name = Problem.Name(problem).removeprefix("VALUE_PROBLEM_").lower()
        VALUES.labels(self._model, self.version, name, outcome).inc()


def _column(name: str, rule: Rule | None, kind: "np.dtype[np.generic]", *, given: bool) -> Column:
    whole = kind.kind in "biu"
    low, high = _ends(kind)
    if not whole and (rule.allow_infinite if rule is not None else not given):
        low, high = -math.inf, math.inf
    if rule is not None and rule.HasField("min"):
        low = max(low, math.ceil(rule.min) if whole else rule.min)
    if rule is not None and rule.HasField("max"):
        high = min(high, math.floor(rule.max) if whole else rule.max)
    rule = rule or _NO_RULE
    return Column(name, rule, low, high, whole, frozenset(rule.allowed), rule.required or whole)


def _ends(kind: "np.dtype[np.generic]") -> tuple[float, float]:
    """The smallest and the largest number of the type, as float64 has them."""
    if kind.kind == "b":
        return 0.0, 1.0
    if kind.kind in "iu":
        whole = np.iinfo(kind.str)
        # The float next to 2^63 is one too many.
        return float(whole.min), math.nextafter(float(whole.max), 0.0) if whole.bits == 64 else float(whole.max)
    real = np.finfo(kind.str)
    return float(real.min), float(real.max)


NO_CHECKS = Checks("", "", common_pb2.ValueRules(), (), np.dtype("<f4"), given=False)
