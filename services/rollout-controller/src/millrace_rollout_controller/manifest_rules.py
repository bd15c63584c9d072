"""Rules of a manifest that concern more than one field. The CRD's CEL rules say the same; change both."""

import re
from typing import TYPE_CHECKING

from millrace_kit import cel_rules, check
from millrace_kit.errors import InvalidArgumentError

from millrace_rollout_controller.gate_rules import check_gate, check_values
from millrace_rollout_controller.server_block import check_server

if TYPE_CHECKING:
    from millrace_rollout_controller.manifest import ABTest, Rollout, Spec, Step

MAX_DURATION_S = 30 * 86_400
BLOCKS = {"Canary": "steps", "BlueGreen": "blueGreen", "ABTest": "abTest", "Shadow": "shadow"}
"""The block of each strategy."""
_DURATION = re.compile(r"(?=.)(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?")


def seconds(text: str, where: str) -> float:
    """Length of a duration like 1h30m; `where` is named when it is none."""
    match = _DURATION.fullmatch(text)
    if match is None or not any(match.groups()):
        raise InvalidArgumentError(where, "needs a duration like 30s, 10m or 1h30m")
    hours, minutes, rest = (int(part or 0) for part in match.groups())
    total = hours * 3600 + minutes * 60 + rest
    if not 0 < total <= MAX_DURATION_S:
        raise InvalidArgumentError(where, "must be more than 0 and at most 720h")
    return float(total)


def check_spec(spec: "Spec") -> None:
    """Raise InvalidArgumentError that names the first field that does not fit the others."""
    check.name(spec.model, "spec.model")
    check.semver(spec.version, "spec.version")
    check_server(spec.server)
    if (scaling := spec.server.autoscaling) is not None and scaling.idle_after is not None:
        seconds(scaling.idle_after, "spec.server.autoscaling.idleAfter")
    if spec.server.pool is not None:
        seconds(spec.server.pool.min_residence, "spec.server.pool.minResidence")
    for index, rule in enumerate(spec.routing.rules):
        cel_rules.check_rule(rule.when, f"spec.routing.rules[{index}].when")
        if rule.to == "candidate" and spec.rollout.strategy == "Shadow":
            raise InvalidArgumentError(
                f"spec.routing.rules[{index}].to", "cannot be candidate: a shadow answers nobody"
            )
    if spec.balancing == "ConsistentHash" and spec.routing.sticky is None:
        raise InvalidArgumentError(
            "spec.routing.sticky", "is needed by ConsistentHash: its header's value chooses the server"
        )
    if spec.rollout.counted_by == "Servers" and (field := _gateways_alone(spec)):
        raise InvalidArgumentError(
            "spec.rollout.countedBy", f"cannot be Servers with routing.{field}: servers know nothing of it"
        )
    if spec.rollout.counted_by == "Servers" and spec.server.holds_several:
        message = "cannot be Servers with server.placement Shared or server.pool: nobody reaches such servers but by the gateways"
        raise InvalidArgumentError("spec.rollout.countedBy", message)
    _check_strategy(spec)
    for index, gate in enumerate(spec.rollout.gates):
        check_gate(gate, f"spec.rollout.gates[{index}]")
        if (gate.metric or "").startswith("shadow/") and not _has_copies(spec.rollout):
            where = f"spec.rollout.gates[{index}].metric"
            raise InvalidArgumentError(where, "needs copies: rollout.shadow, or rollout.blueGreen.mirrorPercent")


def _gateways_alone(spec: "Spec") -> str:
    """What makes a server's count another one than the callers'; empty for nothing."""
    routing = spec.routing
    given = {
        "rules": routing.rules, "callers": routing.callers, "testers": routing.testers, "hedgeAfterMs": routing.hedge_after_ms,
    }  # fmt: skip
    return next((name for name, value in given.items() if value), "")


def _has_copies(rollout: "Rollout") -> bool:
    preview = rollout.blue_green is not None and rollout.blue_green.mirror_percent > 0
    return rollout.shadow is not None or rollout.strategy == "Shadow" or preview


def _check_strategy(spec: "Spec") -> None:
    rollout = spec.rollout
    given = {
        "steps": rollout.steps, "blueGreen": rollout.blue_green, "abTest": rollout.ab_test, "shadow": rollout.shadow,
    }  # fmt: skip
    for strategy, block in BLOCKS.items():
        first = rollout.strategy == "Canary" and block == "shadow"
        if strategy != rollout.strategy and given[block] is not None and not first:
            raise InvalidArgumentError(f"spec.rollout.{block}", f"belongs to {strategy}, not to {rollout.strategy}")
    _check_steps(rollout.steps or ())
    _check_guard(rollout)
    if rollout.advance == "OnEvidence" and rollout.strategy != "Canary":
        raise InvalidArgumentError("spec.rollout.advance", "OnEvidence belongs to Canary")
    _check_blue_green(rollout)
    _check_split(spec)
    _check_shadow(rollout)


def _check_steps(steps: "tuple[Step, ...]") -> None:
    before = 0.0
    for index, step in enumerate(steps):
        where = f"spec.rollout.steps[{index}]"
        if step.weight <= before:
            raise InvalidArgumentError(f"{where}.weight", "must be greater than the step's before")
        _check_decimals(step.weight, f"{where}.weight")
        before = step.weight
        if step.pause is not None and step.pause.duration is not None:
            seconds(step.pause.duration, f"{where}.pause.duration")
        if step.until is not None and step.max_requests is None:
            raise InvalidArgumentError(f"{where}.maxRequests", "is needed by until: Decided")
        for name, value in (("maxRequests", step.max_requests), ("onUndecided", step.on_undecided)):
            if value is not None and step.until is None:
                raise InvalidArgumentError(f"{where}.{name}", "belongs to until: Decided")
        if step.max_requests is not None and step.max_requests < step.min_requests:
            raise InvalidArgumentError(f"{where}.maxRequests", "must be at least minRequests")


def _check_guard(rollout: "Rollout") -> None:
    if (guard := rollout.guard) is None:
        return
    seconds(guard.window, "spec.rollout.guard.window")
    where = "spec.rollout.guard.holdBackPercent"
    _check_decimals(guard.hold_back_percent, where)
    if guard.hold_back_percent and rollout.strategy not in {"Canary", "ABTest"}:
        raise InvalidArgumentError(where, "belongs to Canary and ABTest")
    if guard.hold_back_percent and any(100 - guard.hold_back_percent < s.weight < 100 for s in rollout.steps or ()):
        raise InvalidArgumentError(where, "leaves less than a step's weight")


def _check_blue_green(rollout: "Rollout") -> None:
    if (block := rollout.blue_green) is None:
        return
    where = "spec.rollout.blueGreen"
    _check_decimals(block.mirror_percent, f"{where}.mirrorPercent")
    if block.pause is not None and block.pause.duration is not None:
        seconds(block.pause.duration, f"{where}.pause.duration")


def _check_split(spec: "Spec") -> None:
    if spec.rollout.strategy != "ABTest":
        return
    if spec.routing.sticky is None:
        raise InvalidArgumentError("spec.routing.sticky", "is needed by ABTest: a caller must stay on one version")
    if (block := spec.rollout.ab_test) is None:
        return
    _check_decimals(block.split, "spec.rollout.abTest.split")
    if block.duration is not None:
        seconds(block.duration, "spec.rollout.abTest.duration")
    if block.on_success == "Promote" and not block.min_requests and block.duration is None:
        raise InvalidArgumentError("spec.rollout.abTest.onSuccess", "Promote needs minRequests or duration")
    check_values(block.as_goal, "spec.rollout.abTest", metric="goal")
    _check_allocation(block)


def _check_allocation(block: "ABTest") -> None:
    where = "spec.rollout.abTest"
    if block.allocation != "Thompson":
        if block.bandit is not None:
            raise InvalidArgumentError(f"{where}.bandit", "belongs to allocation Thompson")
        return
    if block.goal == "latencyP99Ms":
        raise InvalidArgumentError(f"{where}.goal", "cannot be a percentile with allocation Thompson")
    if (bandit := block.bandit) is None:
        return
    _check_decimals(bandit.min_weight, f"{where}.bandit.minWeight")
    _check_decimals(bandit.max_change, f"{where}.bandit.maxChange")
    seconds(bandit.interval, f"{where}.bandit.interval")
    if not bandit.min_weight <= block.split <= 100 - bandit.min_weight:
        raise InvalidArgumentError(f"{where}.bandit.minWeight", "leaves no room for the split it starts at")


def _check_shadow(rollout: "Rollout") -> None:
    if (block := rollout.shadow) is None:
        return
    _check_decimals(block.mirror_percent, "spec.rollout.shadow.mirrorPercent")
    if block.duration is not None:
        seconds(block.duration, "spec.rollout.shadow.duration")
    if block.on_success == "Promote" and rollout.strategy == "Canary":
        raise InvalidArgumentError("spec.rollout.shadow.onSuccess", "belongs to Shadow; a Canary goes on to its steps")
    if block.on_success == "Promote" and not block.min_requests and not block.min_pairs and block.duration is None:
        raise InvalidArgumentError("spec.rollout.shadow.onSuccess", "Promote needs minRequests, minPairs or duration")


def _check_decimals(percent: float, where: str) -> None:
    if round(percent, 2) != percent:
        raise InvalidArgumentError(where, "has more than two decimals")
