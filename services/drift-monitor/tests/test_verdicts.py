"""Verdicts: few false findings on quiet windows, also when windows differ by nature, and real changes found."""

import numpy as np
import pytest
from millrace_drift_monitor.profiles import Profile, group_rows, profile_column
from millrace_drift_monitor.settings import Thresholds
from millrace_drift_monitor.sketches import Layout
from millrace_drift_monitor.verdicts import Kind, WindowCounts, judge, natural_threshold, summarize
from millrace_drift_monitor.windows import ClosingRule, OpenWindow, count_rows

DAY = 86_400
# Every test counts, however small its effect: what is left is false-discovery control.
NO_THRESHOLDS = Thresholds(
    false_discovery_rate=0.05, ks_distance=0, cramers_v=0, psi=0, rate_difference=0, accuracy_drop=0, natural_margin=0
)


def profile_of(x: np.ndarray, *, times=None, labels=None, scores=None, accuracy=None) -> Profile:
    groups, count = group_rows(times, DAY, 100, 10)
    owner = groups if groups is not None else np.full(len(x), -1)
    columns = [profile_column(x[:, i], owner, count) for i in range(x.shape[1])]
    columns.append(profile_column(np.empty(0) if scores is None else scores, np.empty(0, dtype=np.int64), 0))
    labels = np.empty(0) if labels is None else labels
    return Profile(
        feature_names=tuple(f"f{i}" for i in range(x.shape[1])),
        layout=Layout.of([c.bins for c in columns]),
        sketch=np.concatenate([c.counts for c in columns]),
        rows=len(x),
        labels=len(labels),
        positives=int(labels.sum()),
        accuracy=accuracy,
        predictions=0 if scores is None else len(scores),
        natural=np.stack([c.natural for c in columns]),
        natural_label=0.0,
        natural_accuracy=0.0,
        natural_windows=count,
    )


def window_of(profile: Profile, x: np.ndarray, *, scores=None, outcomes=0, positives=0, correct=0) -> WindowCounts:
    given = [None] * len(x) if scores is None else scores
    rows = [(row.astype("<f8").tobytes(), score) for row, score in zip(x, given, strict=True)]
    return WindowCounts(count_rows(profile, rows), outcomes, positives, correct)


def mixed(rng: np.random.Generator, n: int, features: int = 30) -> np.ndarray:
    x = rng.normal(size=(n, features))
    x[:, 10:20] = np.exp(x[:, 10:20])
    x[:, 20:] = rng.integers(0, 12, (n, features - 20))
    x[rng.random(n) < 0.03, :5] = np.nan
    return x


@pytest.mark.parametrize(
    ("reference", "window", "runs"), [(20_000, 300, 60), (50_000, 5000, 30), (200_000, 200_000, 3)]
)
def test_share_of_quiet_windows_with_a_finding(reference: int, window: int, runs: int) -> None:
    """30 features without change, every effect counts: at most 5 % of windows have any finding."""
    rng = np.random.default_rng(window)
    profile = profile_of(mixed(rng, reference))
    alarms = 0
    for _ in range(runs):
        verdicts = judge(profile, window_of(profile, mixed(rng, window)), NO_THRESHOLDS, 200)
        assert len(verdicts) >= 60
        alarms += any(v.is_finding for v in verdicts)
    assert alarms / runs <= 0.05 + 3.29 * np.sqrt(0.05 * 0.95 / runs)


def test_a_shift_of_a_fifth_of_a_standard_deviation_is_significant_and_named() -> None:
    rng = np.random.default_rng(1)
    profile = profile_of(mixed(rng, 50_000))
    for _ in range(10):
        x = mixed(rng, 2000)
        x[:, 7] += 0.2
        found = {(v.feature, v.test) for v in judge(profile, window_of(profile, x), NO_THRESHOLDS, 200) if v.is_finding}
        assert ("f7", "ks") in found
        assert len({feature for feature, _test in found}) <= 3


def test_significant_is_not_enough() -> None:
    """The same shift with the default thresholds: beyond doubt, and too small to matter."""
    rng = np.random.default_rng(2)
    profile = profile_of(mixed(rng, 50_000))
    x = mixed(rng, 20_000)
    x[:, 7] += 0.2
    verdicts = judge(profile, window_of(profile, x), Thresholds(), 200)
    shifted = next(v for v in verdicts if v.feature == "f7" and v.test == "ks")
    assert shifted.adjusted_p < 1e-20
    assert not any(v.is_finding for v in verdicts)


def test_large_is_not_enough() -> None:
    rng = np.random.default_rng(3)
    profile = profile_of(rng.normal(size=(1000, 1)))
    few = window_of(profile, rng.normal(1, 1, (8, 1)))
    verdicts = judge(profile, few, Thresholds(false_discovery_rate=1e-9), 1)
    assert max(v.comparison.effect for v in verdicts) > 0.3
    assert not any(v.is_finding for v in verdicts)


def seasonal(rng: np.random.Generator, days: int, rows: int, *, level: float = 0.0) -> np.ndarray:
    """Three features that wander from day to day (autocorrelated) and one that does not."""
    x = np.empty((days * rows, 4))
    wander = np.zeros(3)
    for day in range(days):
        wander = 0.7 * wander + rng.normal(size=3)
        x[day * rows : (day + 1) * rows, :3] = wander + rng.normal(0, 0.3, (rows, 3)) + level
    x[:, 3] = rng.normal(size=days * rows)
    return x


def test_days_that_differ_by_nature_are_no_findings_and_a_new_level_is() -> None:
    """Day-to-day autocorrelated features: naive thresholds call nearly every day a drift, natural ones do not."""
    rng = np.random.default_rng(4)
    days, rows = 150, 300
    x = seasonal(rng, days, rows)
    times = np.repeat(np.arange(days) * DAY, rows)
    natural, naive = profile_of(x, times=times), profile_of(x)
    assert (natural.natural_windows, naive.natural_windows) == (days, 0)
    later = seasonal(rng, 40, rows)
    quiet = [later[day * rows : (day + 1) * rows] for day in range(40)]

    def days_with_findings(profile: Profile, windows: list[np.ndarray]) -> int:
        return sum(any(v.is_finding for v in judge(profile, window_of(profile, w), Thresholds(), 200)) for w in windows)

    assert days_with_findings(naive, quiet) >= 35
    assert days_with_findings(natural, quiet) <= 3
    new_level = seasonal(rng, 10, rows, level=6.0)
    moved = [new_level[day * rows : (day + 1) * rows] for day in range(10)]
    assert days_with_findings(natural, moved) >= 9


def test_each_kind_of_change_gets_its_kind() -> None:
    rng = np.random.default_rng(5)
    x, scores = rng.normal(size=(20_000, 3)), rng.beta(2, 6, 20_000)
    profile = profile_of(x, labels=(rng.random(20_000) < 0.2).astype(float), scores=scores, accuracy=0.85)

    def found(x: np.ndarray, scores: np.ndarray, **outcomes: int) -> set[tuple[Kind, str, str]]:
        verdicts = judge(profile, window_of(profile, x, scores=list(scores), **outcomes), Thresholds(), 200)
        for verdict in verdicts:
            assert str(verdict.comparison.window_count) in summarize(verdict)
        return {(v.kind, v.feature, v.test) for v in verdicts if v.is_finding}

    quiet, calm = rng.normal(size=(1000, 3)), rng.beta(2, 6, 1000)
    assert found(quiet, calm, outcomes=1000, positives=200, correct=850) == set()
    assert found(quiet, calm, outcomes=1000, positives=200, correct=700) == {(Kind.PERFORMANCE, "", "accuracy")}
    assert found(quiet, calm, outcomes=1000, positives=450, correct=850) == {(Kind.LABEL, "", "label_rate")}
    assert found(quiet, rng.beta(6, 2, 1000)) == {(Kind.PREDICTION, "", "ks"), (Kind.PREDICTION, "", "psi")}
    nulls = quiet.copy()
    nulls[:200, 1] = np.nan
    assert found(nulls, calm) == {(Kind.QUALITY, "f1", "null_rate")}
    beyond = quiet.copy()
    beyond[:150, 2] = 1000.0
    assert found(beyond, calm) == {(Kind.QUALITY, "f2", "range")}
    shifted = quiet.copy()
    shifted[:, 0] += 1.0
    assert found(shifted, calm) == {(Kind.COVARIATE, "f0", "ks"), (Kind.COVARIATE, "f0", "psi")}


def test_natural_thresholds_rise_but_stay_reachable() -> None:
    assert natural_threshold(0.2, 0.0, 0.1) == 0.2
    assert natural_threshold(0.2, 0.19, 0.1) == pytest.approx(0.209)
    assert natural_threshold(0.2, 0.8, 0.1) == pytest.approx(0.82)
    assert natural_threshold(0.2, 0.999, 0.1) < 1


def window(seq: int, start: int, max_event: int, *, touched: int = 0, model: str = "m") -> OpenWindow:
    return OpenWindow(seq, model, start, start + 100, max_event, touched)


def test_when_windows_close() -> None:
    rule = ClosingRule(lateness_us=50, horizon_us=1000, idle_us=10_000)

    def due(*windows: OpenWindow, now: int = 0, ready: bool = True) -> list[int]:
        return rule.due(windows, now, lambda _model: ready)

    first, second = window(1, 0, 90), window(2, 100, 149)
    assert due(first, second) == []  # lateness is not over
    assert due(first, window(2, 100, 150)) == [1]
    assert due(window(2, 100, 150), first) == [1]
    assert due(first, window(2, 100, 150, model="other")) == []  # another model's time says nothing
    assert due(first, window(2, 100, 150), ready=False) == []  # its outcomes are not read yet
    assert due(first, window(9, 5000, 5001)) == []  # live traffic beside a replay closes nothing of the replay
    assert due(first, now=20_000) == [1]  # nothing came for long
    assert due(window(1, 0, 90, touched=15_000), now=20_000) == []
    assert due(window(1, 19_900, 19_950, touched=0), now=20_000) == []  # idle, but not over
