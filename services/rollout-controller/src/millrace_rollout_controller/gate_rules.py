"""Rules of one gate, and of what it shares with the goal of an A/B test. `kubernetes/crd_gate_rules.py` says the same in CEL; change both."""

import re
from typing import TYPE_CHECKING

from millrace_kit.errors import InvalidArgumentError

from millrace_rollout_controller.value_gates import Valued, is_root

if TYPE_CHECKING:
    from millrace_rollout_controller.manifest import Gate

PLACEHOLDERS = ("model", "candidate", "stable", "namespace")
"""What a query may name as `{{name}}`."""
_FORMS: dict[str, tuple[str, ...]] = {
    "errorRate": ("max", "compare"),
    "latencyP50Ms": ("max", "compare"),
    "latencyP95Ms": ("max", "compare"),
    "latencyP99Ms": ("max", "compare"),
    "throughput": ("min",),
    "outcome/accuracy": ("min", "compare"),
    "outcome/brier": ("max", "compare"),
    "outcome/mae": ("max", "compare"),
    "outcome/rmse": ("max", "compare"),
    "drift/prediction": ("max",),
    "shadow/labelFlipRate": ("max",),
    "shadow/scoreShift": ("max",),
    "shadow/maxAbsDiff": ("max",),
}
"""How each metric may be bounded."""


def check_gate(gate: "Gate", where: str) -> None:
    """Raise InvalidArgumentError that names the first field of a gate that does not fit the others."""
    if (gate.metric is None) == (gate.promql is None):
        raise InvalidArgumentError(where, "needs exactly one of metric and promql")
    allowed = _FORMS.get(gate.metric or "", ("max", "min", "compare")) if gate.metric else ("max", "min")
    given = [form for form in ("max", "min", "compare") if getattr(gate, form) is not None]
    if len(given) != 1:
        raise InvalidArgumentError(where, f"needs exactly one of {', '.join(allowed)}")
    if given[0] not in allowed:
        subject = gate.metric or "promql"
        raise InvalidArgumentError(f"{where}.{given[0]}", f"does not fit {subject}; use {' or '.join(allowed)}")
    if gate.tensor is not None and gate.metric != "shadow/maxAbsDiff":
        raise InvalidArgumentError(f"{where}.tensor", "belongs to shadow/maxAbsDiff")
    if (gate.margin is not None) != (gate.compare is not None):
        raise InvalidArgumentError(f"{where}.margin", "belongs to compare, and compare needs it")
    _check_looks(gate, where)
    _check_value(gate, where)
    if gate.is_reading and gate.confidence is not None:
        raise InvalidArgumentError(f"{where}.confidence", "belongs to a test; queries and throughput have failureLimit")
    if gate.promql is not None:
        _check_query(gate, where)
        return
    if gate.failure_limit is not None and not gate.is_reading:
        raise InvalidArgumentError(f"{where}.failureLimit", "belongs to promql and throughput")
    _check_bound(gate, where, given[0])


def _check_looks(gate: "Gate", where: str) -> None:
    if gate.max_samples is not None and (gate.compare is None or gate.required != "Promotion"):
        raise InvalidArgumentError(f"{where}.maxSamples", "belongs to compare with required: Promotion")
    if gate.max_samples is not None and (gate.is_asymptotic or gate.segment is not None):
        raise InvalidArgumentError(
            f"{where}.maxSamples", "needs valueRange for such a metric, and does not fit segment"
        )
    if gate.max_samples is not None and is_root(gate):
        raise InvalidArgumentError(f"{where}.maxSamples", "does not fit outcome/rmse: its looks are about means")


def check_values(valued: Valued, where: str, metric: str = "metric", *, oriented: bool = True) -> None:
    """Raise InvalidArgumentError where `better`, `valueRange` or `segment` do not fit the metric.

    Args:
        valued: a gate or a goal.
        where: it stands.
        metric: name of the field with the metric.
        oriented: a business/ metric has to say which values are the good ones.
    """
    name = valued.metric or ""
    of = "" if metric == "metric" else f" a {metric}"
    if valued.segment is not None and not name.startswith(("outcome/", "business/")):
        raise InvalidArgumentError(f"{where}.segment", f"belongs to{of} outcome/ and business/")
    if (valued.better is not None) != (name.startswith("business/") and oriented):
        raise InvalidArgumentError(f"{where}.better", f"belongs to{of or ' compare of'} business/, which needs it")
    if valued.value_range is None:
        return
    if not valued.is_value:
        raise InvalidArgumentError(f"{where}.valueRange", f"belongs to{of} business/, outcome/mae and outcome/rmse")
    lowest, highest = valued.value_range
    if lowest >= highest:
        raise InvalidArgumentError(f"{where}.valueRange", "needs the smallest value and then a larger one")
    if lowest != 0 and name.startswith("outcome/"):
        raise InvalidArgumentError(f"{where}.valueRange", "must begin with 0: errors do")


def _check_value(gate: "Gate", where: str) -> None:
    check_values(gate, where, oriented=gate.compare is not None)
    if gate.margin is not None and gate.margin >= 1 and not gate.is_value:
        raise InvalidArgumentError(f"{where}.margin", "must be less than 1")
    if gate.value_range is None:
        return
    lowest, highest = gate.value_range
    if gate.margin is not None and gate.margin >= highest - lowest:
        raise InvalidArgumentError(f"{where}.margin", "must be less than the width of valueRange")
    for form, bound in (("max", gate.max), ("min", gate.min)):
        if bound is not None and not lowest < bound < highest:
            raise InvalidArgumentError(f"{where}.{form}", "must lie inside valueRange")


def _check_query(gate: "Gate", where: str) -> None:
    for name in re.findall(r"\{\{(.*?)\}\}", gate.promql or "", re.DOTALL):
        if name not in PLACEHOLDERS:
            known = ", ".join(f"{{{{{known}}}}}" for known in PLACEHOLDERS)
            raise InvalidArgumentError(f"{where}.promql", f"names {{{{{name[:50]}}}}}; known are {known}")


def _check_bound(gate: "Gate", where: str, form: str) -> None:
    bound = gate.max if gate.max is not None else gate.min
    if bound is None:
        return
    if gate.metric == "throughput":
        if not 0 < bound <= 1e9:
            raise InvalidArgumentError(f"{where}.min", "must be more than 0 and at most 1e9 (requests a second)")
    elif (gate.metric or "").startswith("latency"):
        if not 0 < bound <= 600_000:
            raise InvalidArgumentError(f"{where}.max", "must be more than 0 and at most 600000 (milliseconds)")
    elif gate.metric == "shadow/maxAbsDiff":
        if not 0 < bound <= 1e9:
            raise InvalidArgumentError(f"{where}.max", "must be more than 0 and at most 1e9")
    elif gate.is_value:
        if not abs(bound) <= 1e12 or (bound <= 0 and (gate.metric or "").startswith("outcome/")):
            raise InvalidArgumentError(f"{where}.{form}", "must be at most 1e12 from 0, and of an error more than 0")
    elif not 0 < bound < 1:
        raise InvalidArgumentError(f"{where}.{form}", "must be between 0 and 1, both left out")
