"""How many requests the gates of a manifest need, and how long that is: the gates' own tests, played many times. Pure.

Only what a test decides is planned: queries and throughput are single readings, and a comparison of predictions or of answers to copies depends on
distributions nobody can name beforehand, so these are left out, with the reason (`unplanned`). Comparisons of latencies take them for log-normal.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from millrace_kit.power import Claim, needed, values_needed

from millrace.unplanned import SPREAD, learning, reason, slower_shares

BASELINES: Mapping[str, float] = {"errorRate": 0.01, "outcome/accuracy": 0.8, "outcome/brier": 0.15, SPREAD: 0.5}
"""What stable is taken to be where nobody says."""
VALUES = ("outcome/mae", "outcome/rmse")
"""Metrics of any unit beside `business/…`."""
SLOW_SHARES: Mapping[str, float] = {"latencyP50Ms": 0.5, "latencyP95Ms": 0.05, "latencyP99Ms": 0.01}
SLOWER = 3.0
"""Times the allowed share of slow requests at which a latency bound is to fail; half of it is where it is to pass."""
DEFAULT_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is known or assumed about the model in use."""

    rate: float | None = None
    """Requests a second of all versions together; None tells no times."""
    outcome_share: float = 1.0
    """Part of the requests whose outcome becomes known."""
    baselines: Mapping[str, float] | None = None
    """Stable's mean by metric, in place of `BASELINES`."""
    deviations: Mapping[str, float] | None = None
    """Standard deviation of one value, by metric of any unit."""


@dataclass(frozen=True, slots=True)
class Need:
    """What one gate needs at one step, in candidate requests of the whole rollout so far."""

    step: int
    """From 1."""
    weight: float
    gate: str
    required: str
    passing: int | None
    """Until four of five rollouts of an equal version have passed; None when millions are not enough."""
    failing: int | None
    """Until four of five rollouts with a loss of the margin's size have failed."""
    seconds: float | None
    """Time until `passing` at the traffic, were all of it gathered at this step's weight."""
    given: int
    """Candidate requests that this step and those before it ask for."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Of one manifest."""

    needs: tuple[Need, ...]
    warnings: tuple[str, ...]


def plan(spec: Mapping[str, Any], traffic: Traffic) -> Plan:
    """Needs of every step and gate, and the steps whose `minRequests` cannot decide their gates.

    Args:
        spec: of a ModelDeployment that was found to be right.
        traffic: rate, share of outcomes and what stable is like.
    """
    rollout = spec.get("rollout") or {}
    steps = [step for step in _steps(rollout) if step[0] < 100]
    needs: list[Need] = []
    warnings: list[str] = []
    gates = list(rollout.get("gates") or ())
    for index, gate in enumerate(gates):
        if _is_value(gate) and gate["metric"] in (traffic.deviations or {}):
            found = [_value_need(number, steps, gate, traffic) for number in range(len(steps))]
            needs += found
            if warning := _too_few(index, gate, found, decided=[step[2] for step in steps]):
                warnings.append(warning)
            continue
        if _is_value(gate):
            warnings.append(
                f"spec.rollout.gates[{index}]: {text(gate)} is not planned without what its values are like: "
                f"--baseline {gate['metric']}=MEAN:DEVIATION"
            )
            continue
        if gate.get("metric") in SLOW_SHARES and rollout.get("countedBy") == "Servers":
            why = "with countedBy: Servers nobody knows percentiles, it stays undecided"
            warnings.append(f"spec.rollout.gates[{index}]: {text(gate)} is not planned: {why}")
            continue
        claim = _claim(gate, len(steps) + 1)
        if claim is None:
            warnings.append(f"spec.rollout.gates[{index}]: {text(gate)} is not planned: {reason(gate)}")
            continue
        found = [_need(number, steps, gate, claim, traffic) for number in range(len(steps))]
        needs += found
        if warning := _too_few(index, gate, found, decided=[step[2] for step in steps]):
            warnings.append(warning)
    return Plan(tuple(sorted(needs, key=lambda need: need.step)), tuple(warnings))


def _steps(rollout: Mapping[str, Any]) -> Iterator[tuple[float, int, bool]]:
    """Weight, requests asked for, and whether the step waits for its gates anyway."""
    match rollout.get("strategy", "Canary"):
        case "Canary":
            for step in rollout.get("steps") or ():
                decided = step.get("until") == "Decided"
                yield float(step["weight"]), int(step.get("minRequests", 0)), decided
        case "BlueGreen":
            block = rollout.get("blueGreen") or {}
            if mirror := float(block.get("mirrorPercent", 0)):
                yield min(mirror, 99.0), int(block.get("minRequests", 0)), False
        case "ABTest":
            block = rollout.get("abTest") or {}
            yield float(block.get("split", 50)), int(block.get("minRequests", 0)), False
        case "Shadow":
            block = rollout.get("shadow") or {}
            yield min(float(block.get("mirrorPercent", 100)), 99.0), int(block.get("minRequests", 0)), False


def text(gate: Mapping[str, Any]) -> str:
    """The gate as the controller writes it."""
    subject = gate.get("metric") or "promql"
    by = f" by {gate['segment']}" if gate.get("segment") else ""
    if gate.get("compare"):
        return f"{subject} notWorseThanStable (margin {gate['margin']:g}){by}"
    return f"{subject} <= {gate['max']:g}{by}" if "max" in gate else f"{subject} >= {gate.get('min', 0):g}{by}"


def _is_value(gate: Mapping[str, Any]) -> bool:
    metric = gate.get("metric") or ""
    return metric.startswith("business/") or metric in VALUES


def _value_need(number: int, steps: list[tuple[float, int, bool]], gate: Mapping[str, Any], traffic: Traffic) -> Need:
    """What a gate on values of any unit needs, by the test in the limit; with a `valueRange` it is about as many."""
    weight, metric = steps[number][0], gate["metric"]
    alpha = 1.0 - float(gate.get("confidence", DEFAULT_CONFIDENCE))
    mean, deviation = (traffic.baselines or {}).get(metric, 0.0), (traffic.deviations or {})[metric]
    if gate.get("compare"):
        room, ratio = float(gate["margin"]), weight / (100.0 - weight)
    else:
        bound = float(gate["max"] if "max" in gate else gate["min"])
        room, ratio = (bound - mean if "max" in gate else mean - bound), 0.0
    found = values_needed(room, deviation, ratio, alpha) if room > 0 else None
    failing = found
    if gate.get("compare"):
        failing = values_needed(room, deviation, ratio, alpha, beyond=room)
    passing, failing = _requests(found, traffic.outcome_share), _requests(failing, traffic.outcome_share)
    seconds = passing / (traffic.rate * weight / 100.0) if traffic.rate and passing is not None else None
    given = sum(step[1] for step in steps[: number + 1])
    return Need(number + 1, weight, text(gate), gate.get("required", "EveryStep"), passing, failing, seconds, given)


def _claim(gate: Mapping[str, Any], steps: int) -> Claim | None:
    metric = gate.get("metric", "")
    alpha = 1.0 - float(gate.get("confidence", DEFAULT_CONFIDENCE))
    if metric in SLOW_SHARES and gate.get("compare"):
        # The margin is in what counts as slow.
        return Claim(margin=0.0, alpha=alpha, steps=steps, most=gate.get("maxSamples"))
    if metric in SLOW_SHARES:
        return Claim(bound=SLOW_SHARES[metric], alpha=alpha, steps=steps)
    if metric not in BASELINES:
        return None
    better, binary = metric == "outcome/accuracy", metric != "outcome/brier"
    if gate.get("compare"):
        margin, most = float(gate["margin"]), gate.get("maxSamples")
        return Claim(
            margin=margin, higher_is_better=better, binary=binary, alpha=alpha, steps=steps, most=most
        )  # fmt: skip
    bound = float(gate["max"] if "max" in gate else gate["min"])
    return Claim(bound=bound, higher_is_better=better, binary=binary, alpha=alpha, steps=steps)


def _need(
    number: int, steps: list[tuple[float, int, bool]], gate: Mapping[str, Any], claim: Claim, traffic: Traffic
) -> Need:
    weight = steps[number][0]
    metric = gate["metric"]
    good, bad, stable = _means(gate, claim, {**BASELINES, **(traffic.baselines or {})})
    # A bound does not look at stable: its answer is the same at every weight.
    share = weight / 100.0 if claim.bound is None else 0.5
    passing, failing = _played(claim, good, bad, stable, share)
    if metric in SLOW_SHARES and claim.bound is None:
        known = learning(SLOW_SHARES[metric], weight)
        passing, failing = (None if found is None else found + known for found in (passing, failing))
    part = traffic.outcome_share if metric.startswith("outcome/") else 1.0
    passing, failing = _requests(passing, part), _requests(failing, part)
    seconds = None
    if traffic.rate and passing is not None:
        seconds = passing / (traffic.rate * weight / 100.0)
    given = sum(step[1] for step in steps[: number + 1])
    return Need(
        number + 1, weight, text(gate), gate.get("required", "EveryStep"), passing, failing, seconds, given
    )  # fmt: skip


def _means(gate: Mapping[str, Any], claim: Claim, baselines: Mapping[str, float]) -> tuple[float, float, float]:
    """A good candidate's mean, a bad one's, and stable's."""
    if claim.bound is None and (slow := SLOW_SHARES.get(gate["metric"])) is not None:
        good, bad = slower_shares(slow, float(gate["margin"]), baselines[SPREAD])
        return good, bad, slow
    if claim.bound is None:
        stable = baselines[gate["metric"]]
        loss = -(claim.margin or 0.0) if claim.higher_is_better else claim.margin or 0.0
        return stable, min(max(stable + loss, 0.0), 1.0), stable
    if gate["metric"] in SLOW_SHARES:
        return claim.bound / 2.0, min(claim.bound * SLOWER, 0.99), claim.bound
    stable = baselines[gate["metric"]]
    # As far beyond the bound as a good version is inside it.
    return stable, min(max(2.0 * claim.bound - stable, 0.0), 1.0), stable


@cache
def _played(claim: Claim, good: float, bad: float, stable: float, share: float) -> tuple[int | None, int | None]:
    return needed(claim, good, stable, share, "pass"), needed(claim, bad, stable, share, "fail")


def _requests(values: int | None, part: float) -> int | None:
    return None if values is None else math.ceil(values / part)


def _too_few(index: int, gate: Mapping[str, Any], needs: list[Need], *, decided: list[bool]) -> str:
    """The first step whose requests cannot decide the gate that it requires."""
    required = gate.get("required", "EveryStep")
    if required == "Never" or not needs:
        return ""
    for number, need in enumerate(needs):
        last = number == len(needs) - 1
        if (required == "Promotion" and not last) or decided[number]:
            continue
        if need.passing is None or need.given < need.passing:
            wanted = "more than millions" if need.passing is None else f"about {need.passing:,}"
            return (
                f"spec.rollout.gates[{index}]: {need.gate} needs {wanted} candidate requests to pass when the versions are equal; "
                f"up to step {need.step} ({need.weight:g} %) minRequests asks for {need.given:,}, so that step will wait for the gate"
            )
    return ""


def duration(seconds: float | None) -> str:
    """A time as people say it."""
    if seconds is None:
        return "-"
    for limit, unit, letter in ((120.0, 1.0, "s"), (7200.0, 60.0, "m"), (172_800.0, 3600.0, "h")):
        if seconds < limit:
            return f"{math.ceil(seconds / unit)}{letter}"
    return f"{math.ceil(seconds / 86_400.0)}d"


COLUMNS = ("STEP", "WEIGHT", "GATE", "REQUIRED", "TO PASS WHEN EQUAL", "TO FAIL AT THE LOSS", "TIME TO PASS")


def rows(found: Plan) -> list[tuple[str, ...]]:
    """A plan as rows in the order of `COLUMNS`; numbers are candidate requests."""
    return [
        (
            str(need.step),
            f"{need.weight:g}%",
            need.gate,
            need.required,
            _number(need.passing),
            _number(need.failing),
            duration(need.seconds),
        )
        for need in found.needs
    ]


def _number(value: int | None) -> str:
    return "millions" if value is None else f"{value:,}"
