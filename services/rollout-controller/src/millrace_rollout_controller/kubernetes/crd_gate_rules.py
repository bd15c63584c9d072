"""CEL rules of gates, and of what the goal of an A/B test shares with them; the same as `gate_rules`."""

from millrace_rollout_controller.kubernetes.cel import Rule, demand

VALUE = "(self.metric.startsWith('business/') || self.metric in ['outcome/mae', 'outcome/rmse'])"
"""A gate's metric is about values of any unit."""
_GOAL = "(has(self.goal) ? self.goal : 'outcome/accuracy')"


def _forms(metric: str, *allowed: str) -> list[Rule]:
    refused = [form for form in ("max", "min", "compare") if form not in allowed]
    return [
        demand(
            f"!has(self.metric) || self.metric != '{metric}' || !has(self.{form})",
            f"does not fit {metric}; use {' or '.join(allowed)}",
            f".{form}",
        )
        for form in refused
    ]


def _bound(form: str) -> list[Rule]:
    rules = [
        demand(
            f"!has(self.metric) || !{VALUE} || !has(self.{form}) || (self.{form} >= -1e12 && self.{form} <= 1e12"
            f" && (self.{form} > 0.0 || self.metric.startsWith('business/')))",
            "must be at most 1e12 from 0, and of an error more than 0",
            f".{form}",
        ),
        demand(
            f"!has(self.valueRange) || self.valueRange.size() != 2 || !has(self.{form})"
            f" || (self.{form} > self.valueRange[0] && self.{form} < self.valueRange[1])",
            "must lie inside valueRange",
            f".{form}",
        ),
        demand(
            f"!has(self.metric) || self.metric.startsWith('latency') || self.metric == 'throughput'"
            f" || self.metric == 'shadow/maxAbsDiff' || {VALUE} || !has(self.{form})"
            f" || (self.{form} > 0.0 && self.{form} < 1.0)",
            "must be between 0 and 1, both left out",
            f".{form}",
        ),
    ]
    if form == "max":
        rules.append(
            demand(
                "!has(self.metric) || !self.metric.startsWith('latency') || !has(self.max)"
                " || (self.max > 0.0 && self.max <= 600000.0)",
                "must be more than 0 and at most 600000 (milliseconds)",
                ".max",
            )
        )
    else:
        rules.append(
            demand(
                "!has(self.metric) || self.metric != 'throughput' || !has(self.min)"
                " || (self.min > 0.0 && self.min <= 1000000000.0)",
                "must be more than 0 and at most 1e9 (requests a second)",
                ".min",
            )
        )
    return rules


def _range(from_anywhere: str) -> Rule:
    return demand(
        "!has(self.valueRange) || self.valueRange.size() != 2 || (self.valueRange[0] < self.valueRange[1]"
        f" && (self.valueRange[0] == 0.0 || {from_anywhere}))",
        "needs the smallest value (of errors 0) and then a larger one",
        ".valueRange",
    )


def goal_rules() -> list[Rule]:
    """Of the goal of an A/B test: how its values are known."""
    return [
        demand(
            f"!has(self.segment) || {_GOAL}.startsWith('outcome/') || {_GOAL}.startsWith('business/')",
            "belongs to a goal outcome/ and business/",
            ".segment",
        ),
        demand(
            f"has(self.better) == {_GOAL}.startsWith('business/')",
            "belongs to a goal business/, which needs it",
            ".better",
        ),
        demand(
            f"!has(self.valueRange) || {_GOAL}.startsWith('business/') || {_GOAL} in ['outcome/mae', 'outcome/rmse']",
            "belongs to a goal business/, outcome/mae and outcome/rmse",
            ".valueRange",
        ),
        _range(f"{_GOAL}.startsWith('business/')"),
    ]


GATES: dict[str, list[Rule]] = {
    "spec.rollout.gates.items": [
        demand("has(self.metric) != has(self.promql)", "needs exactly one of metric and promql"),
        demand(
            "[has(self.max), has(self.min), has(self.compare)].filter(given, given).size() == 1",
            "needs exactly one of max, min and compare",
        ),
        *_forms("errorRate", "max", "compare"),
        *_forms("latencyP50Ms", "max", "compare"),
        *_forms("latencyP95Ms", "max", "compare"),
        *_forms("latencyP99Ms", "max", "compare"),
        *_forms("throughput", "min"),
        *_forms("drift/prediction", "max"),
        *_forms("shadow/labelFlipRate", "max"),
        *_forms("shadow/scoreShift", "max"),
        *_forms("shadow/maxAbsDiff", "max"),
        demand(
            "!has(self.tensor) || (has(self.metric) && self.metric == 'shadow/maxAbsDiff')",
            "belongs to shadow/maxAbsDiff",
            ".tensor",
        ),
        demand(
            "!has(self.metric) || self.metric != 'shadow/maxAbsDiff' || !has(self.max)"
            " || (self.max > 0.0 && self.max <= 1000000000.0)",
            "must be more than 0 and at most 1e9",
            ".max",
        ),
        *_forms("outcome/accuracy", "min", "compare"),
        *_forms("outcome/brier", "max", "compare"),
        *_forms("outcome/mae", "max", "compare"),
        *_forms("outcome/rmse", "max", "compare"),
        demand(
            "!has(self.segment) || (has(self.metric)"
            " && (self.metric.startsWith('outcome/') || self.metric.startsWith('business/')))",
            "belongs to outcome/ and business/",
            ".segment",
        ),
        demand(
            "has(self.better) == (has(self.metric) && self.metric.startsWith('business/') && has(self.compare))",
            "belongs to business/ with compare, which needs it",
            ".better",
        ),
        demand(
            f"!has(self.margin) || self.margin < 1.0 || (has(self.metric) && {VALUE})",
            "must be less than 1",
            ".margin",
        ),
        demand(
            f"!has(self.valueRange) || (has(self.metric) && {VALUE})",
            "belongs to business/, outcome/mae and outcome/rmse",
            ".valueRange",
        ),
        _range("!has(self.metric) || self.metric.startsWith('business/')"),
        demand(
            "!has(self.margin) || !has(self.valueRange) || self.valueRange.size() != 2"
            " || self.margin < self.valueRange[1] - self.valueRange[0]",
            "must be less than the width of valueRange",
            ".margin",
        ),
        demand(
            f"!has(self.maxSamples) || (!has(self.segment) && (has(self.valueRange) || !has(self.metric) || !{VALUE}))",
            "needs valueRange for such a metric, and does not fit segment",
            ".maxSamples",
        ),
        demand(
            "!has(self.maxSamples) || !has(self.metric) || self.metric != 'outcome/rmse'",
            "does not fit outcome/rmse: its looks are about means",
            ".maxSamples",
        ),
        demand("!has(self.promql) || !has(self.compare)", "does not fit promql; use max or min", ".compare"),
        demand("has(self.margin) == has(self.compare)", "belongs to compare, and compare needs it", ".margin"),
        demand(
            "!has(self.failureLimit) || has(self.promql) || (has(self.metric) && self.metric == 'throughput')",
            "belongs to promql and throughput",
            ".failureLimit",
        ),
        demand(
            "!has(self.confidence) || (has(self.metric) && self.metric != 'throughput')",
            "belongs to a test; queries and throughput have failureLimit",
            ".confidence",
        ),
        demand(
            "!has(self.maxSamples) || (has(self.compare) && has(self.required) && self.required == 'Promotion')",
            "belongs to compare with required: Promotion",
            ".maxSamples",
        ),
        *_bound("max"),
        *_bound("min"),
    ],
    "spec.rollout.gates.items.promql": [
        demand(
            r"self.findAll('(?s)\\{\\{.*?\\}\\}').all(name,"
            " name in ['{{model}}', '{{candidate}}', '{{stable}}', '{{namespace}}'])",
            "names something else than {{model}}, {{candidate}}, {{stable}} and {{namespace}}",
        ),
    ],
}
"""Rules by the path of the schema they stand at."""
