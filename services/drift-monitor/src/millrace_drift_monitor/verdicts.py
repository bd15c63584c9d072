"""Decides what a closed window shows: pure, from counts to verdicts.

A finding needs both: significance after false-discovery control over all tests of the window, and an effect at least as large as
the threshold. The threshold is the setting's, raised to what the reference's own windows show as natural.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np

from millrace_drift_monitor.comparisons import (
    Comparison,
    accuracy_drop,
    benjamini_hochberg,
    chi_square,
    ks,
    psi,
    range_exits,
    rate_change,
)
from millrace_drift_monitor.profiles import DISTANCE, NULLS, PSI, RANGE, Profile
from millrace_drift_monitor.settings import Thresholds
from millrace_drift_monitor.sketches import Counts, Floats


class Kind(Enum):
    """What kind of change."""

    COVARIATE = "covariate"
    PREDICTION = "prediction"
    LABEL = "label"
    PERFORMANCE = "performance"
    QUALITY = "quality"


@dataclass(frozen=True, slots=True)
class WindowCounts:
    """Everything known about a window when it is judged.

    Args:
        sketch: counts in the reference's layout.
        outcomes: scored predictions whose outcome is known.
        positives: of these, true outcomes.
        correct: of these, predictions on the right side of the threshold.
    """

    sketch: Counts
    outcomes: int
    positives: int
    correct: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """One test of one window."""

    kind: Kind
    feature: str
    test: str
    comparison: Comparison
    adjusted_p: float
    threshold: float
    natural: float
    is_finding: bool


@dataclass(frozen=True, slots=True)
class _Test:
    kind: Kind
    feature: str
    test: str
    comparison: Comparison
    threshold: float
    natural: float


def judge(profile: Profile, window: WindowCounts, thresholds: Thresholds, min_count: int) -> list[Verdict]:
    """Run every test the window has enough rows for (`min_count`), control false discoveries over all of them, and decide."""
    tests = [
        *_column_tests(profile, window, thresholds, min_count),
        *_outcome_tests(profile, window, thresholds, min_count),
    ]
    adjusted = benjamini_hochberg(np.array([test.comparison.p_value for test in tests]))
    return [
        Verdict(
            test.kind,
            test.feature,
            test.test,
            test.comparison,
            float(p_value),
            test.threshold,
            test.natural,
            bool(p_value <= thresholds.false_discovery_rate and test.comparison.effect >= test.threshold),
        )
        for test, p_value in zip(tests, adjusted, strict=True)
    ]


def _column_tests(profile: Profile, window: WindowCounts, thresholds: Thresholds, min_count: int) -> Iterator[_Test]:
    margin = thresholds.natural_margin
    for index, bins in enumerate(profile.layout.columns):
        is_output = index == profile.output
        name = "" if is_output else profile.feature_names[index]
        kind = Kind.PREDICTION if is_output else Kind.COVARIATE
        reference, seen = profile.part(index), profile.layout.part(window.sketch, index)
        a, b = reference[: bins.size], seen[: bins.size]
        natural = profile.natural[index]
        if a.sum() and b.sum() >= min_count:
            if bins.discrete:
                threshold = natural_threshold(thresholds.cramers_v, natural[DISTANCE], margin)
                yield _Test(kind, name, "chi2", chi_square(a, b), threshold, natural[DISTANCE])
            else:
                threshold = natural_threshold(thresholds.ks_distance, natural[DISTANCE], margin)
                yield _Test(kind, name, "ks", ks(a, b), threshold, natural[DISTANCE])
            threshold = max(thresholds.psi, float(natural[PSI]) * (1 + margin))
            yield _Test(kind, name, "psi", psi(a, b), threshold, natural[PSI])
        if is_output:
            continue
        yield from _quality_tests(name, reference, seen, natural, thresholds, min_count=min_count)


def _quality_tests(
    name: str, reference: Counts, seen: Counts, natural: Floats, thresholds: Thresholds, *, min_count: int
) -> Iterator[_Test]:
    nulls, outside = float(natural[NULLS]), float(natural[RANGE])
    rows, present = int(seen[:-1].sum()), int(seen[:-2].sum())
    margin = thresholds.natural_margin
    # A test without a single hit on either side can never reject, whatever happens: it is no test.
    if rows >= min_count and reference[-2] + seen[-2] > 0:
        comparison = rate_change(int(reference[-2]), int(reference[:-1].sum()), int(seen[-2]), rows)
        threshold = natural_threshold(thresholds.rate_difference, nulls, margin)
        yield _Test(Kind.QUALITY, name, "null_rate", comparison, threshold, nulls)
    if present >= min_count and seen[-1] > 0 and reference[:-2].sum() > 0:
        comparison = range_exits(int(reference[:-2].sum()), int(seen[-1]), present)
        threshold = natural_threshold(thresholds.rate_difference, outside, margin)
        yield _Test(Kind.QUALITY, name, "range", comparison, threshold, outside)


def _outcome_tests(profile: Profile, window: WindowCounts, thresholds: Thresholds, min_count: int) -> Iterator[_Test]:
    if window.outcomes < min_count:
        return
    if profile.labels:
        comparison = rate_change(profile.positives, profile.labels, window.positives, window.outcomes)
        natural = profile.natural_label
        threshold = natural_threshold(thresholds.rate_difference, natural, thresholds.natural_margin)
        yield _Test(Kind.LABEL, "", "label_rate", comparison, threshold, natural)
    if profile.accuracy is not None:
        comparison = accuracy_drop(profile.accuracy, profile.predictions, window.correct, window.outcomes)
        natural = profile.natural_accuracy
        threshold = natural_threshold(thresholds.accuracy_drop, natural, thresholds.natural_margin)
        yield _Test(Kind.PERFORMANCE, "", "accuracy", comparison, threshold, natural)


def natural_threshold(base: float, natural: float, margin: float) -> float:
    """Effect at which a change counts, for effects that end at 1.

    `base`, or above the `natural` effect by `margin` of itself, at most by `margin` of what is left to 1.
    """
    return max(base, float(min(natural * (1 + margin), natural + margin * (1 - natural))))


_MEASURES = {
    "ks": "Kolmogorov-Smirnov distance",
    "chi2": "Cramer's V",
    "psi": "population stability index",
    "null_rate": "change of the null rate",
    "range": "share of values outside the reference's range",
    "label_rate": "change of the label rate",
    "accuracy": "loss of accuracy",
}


def summarize(verdict: Verdict) -> str:
    """One sentence for people, with the figures behind the verdict."""
    subject = verdict.feature or {
        Kind.PREDICTION: "the predictions",
        Kind.LABEL: "the outcomes",
        Kind.PERFORMANCE: "the predictions against their outcomes",
    }.get(verdict.kind, "the window")
    comparison = verdict.comparison
    natural = ""
    if verdict.natural > 0:
        natural = f", up to {verdict.natural:.3g} is natural in the reference"
    against = (
        f"against {comparison.reference_count} of the reference"
        if comparison.reference_count
        else "against the stated one"
    )
    return (
        f"{_MEASURES[verdict.test]} of {subject} is {comparison.effect:.3g} (counts from {verdict.threshold:.3g}{natural}) "
        f"in {comparison.window_count} rows {against}; adjusted p {verdict.adjusted_p:.2g}."
    )
