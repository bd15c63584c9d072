"""Evidence of one deployment: differences of the gateways' and the drift monitor's running sums, and what the gates made of them.

All of it is plain values that are stored with the status in one transaction, so a restarted controller counts nothing twice and forgets
nothing. A source that does not answer adds nothing; a gateway that restarted counts from zero again; a source seen for the first time, or
whose sums fell, only sets the mark to count from.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from pydantic import BaseModel

from millrace_rollout_controller import experiments, gates, shadow_pairs
from millrace_rollout_controller.comparisons import Comparison
from millrace_rollout_controller.counts import Counts
from millrace_rollout_controller.gate_state import GateState, begin_step
from millrace_rollout_controller.idleness import GatewayActivity, Quiet
from millrace_rollout_controller.manifest import Gate
from millrace_rollout_controller.ratio import Ratio
from millrace_rollout_controller.value_gates import Goal, values_minus

RATE_MEMORY_S = 60.0
"""Time constant of the traffic's estimate."""
STILL = 0.01
"""Requests a second below which a model counts as unused."""


@dataclass(frozen=True, slots=True)
class GatewayFigures:
    """One gateway's answer: running sums of a model's versions since the process began."""

    instance_id: str
    versions: Mapping[str, Counts]


@dataclass(frozen=True, slots=True)
class Poll:
    """What answered this time, about one model."""

    gateways: Mapping[str, GatewayFigures] = field(default_factory=dict)
    """By address; a gateway that did not answer is absent."""
    outcomes: Mapping[str, Counts] | None = None
    """By version; None when the drift monitor did not answer."""
    answers: Mapping[str, float | None] = field(default_factory=dict)
    """Of the gates' queries, by their final text; None for no answer, or one that is not a number."""
    activity: Mapping[str, GatewayActivity] = field(default_factory=dict)
    """By address of the gateway."""


class Cursor(BaseModel):
    """What was last seen of one gateway."""

    instance_id: str
    versions: dict[str, Counts]


class Evidence(BaseModel):
    """Marks to count from, and the current trial's evidence."""

    cursors: dict[str, Cursor] = {}
    outcomes: dict[str, Counts] | None = None
    trial: int = 0
    step: int = 0
    gates_key: str = ""
    gates: list[GateState] = []
    candidate: Counts = Counts()
    stable: Counts = Counts()
    step_candidate: Counts = Counts()
    comparisons: dict[str, Comparison] = {}
    """By the goals' keys."""
    ratio: Ratio = Ratio()
    polled_at: datetime | None = None
    """When gateways last answered; stands still for a model without traffic."""
    rate: float = 0.0
    """Requests a second of the whole model."""
    quiet: Quiet = Quiet()
    """Of versions that may go to sleep."""


def advance(
    evidence: Evidence,
    poll: Poll,
    *,
    trial: int,
    step: int,
    candidate: str,
    stable: str,
    wanted: Sequence[Gate],
    gateways: Sequence[str],
    compared: Sequence[Goal] = (),
    answers: Mapping[int, float | None] | None = None,
    now: datetime | None = None,
    split: float | None = None,
) -> Evidence:
    """Evidence after one poll.

    Args:
        evidence: what was known before.
        poll: what answered.
        trial: the status's trial; a new one starts from nothing.
        step: the status's step; a new one starts a step's own figures.
        candidate: version on trial; empty when there is none, then only the marks move.
        stable: version it is compared with.
        wanted: the manifest's gates.
        gateways: sources in use, model servers that count too; marks of others are forgotten.
        compared: what is to be compared.
        answers: to gates' queries, by the gate's index.
        now: time of the poll; None tells no rates.
        split: the candidate's share while requests have to arrive in that ratio.
    """
    evidence = _restart(evidence, trial, step, wanted)
    difference: dict[str, Counts] = {}
    whole = bool(gateways) and all(address in poll.gateways and address in evidence.cursors for address in gateways)
    cursors = {address: cursor for address, cursor in evidence.cursors.items() if address in gateways}
    for address, figures in poll.gateways.items():
        for version, counts in _gateway_difference(cursors.get(address), figures).items():
            difference[version] = difference.get(version, Counts()).plus(counts)
        cursors[address] = Cursor(instance_id=figures.instance_id, versions=dict(figures.versions))
    outcomes = evidence.outcomes
    if poll.outcomes is not None:
        for version, counts in _outcome_difference(outcomes, poll.outcomes).items():
            difference[version] = difference.get(version, Counts()).plus(counts)
        outcomes = dict(poll.outcomes)
    update: dict[str, object] = {"cursors": cursors, "outcomes": outcomes}
    elapsed_s = _elapsed(evidence, now) if poll.gateways else None
    if poll.gateways and now is not None:
        update |= _traffic(
            evidence, sum(counts.requests for counts in difference.values()), elapsed_s, now, bool(candidate)
        )
    if candidate:
        new, old = difference.get(candidate, Counts()), difference.get(stable, Counts())
        states = [gates.absorb(gate, s, new, old) for gate, s in zip(wanted, evidence.gates, strict=True)]
        for index, answer in (answers or {}).items():
            states[index] = gates.hear(wanted[index], states[index], answer)
        if poll.gateways:
            states = [
                gates.fill(gate, s, elapsed_s if whole else None, new.requests - new.errors)
                if gate.metric == "throughput"
                else s
                for gate, s in zip(wanted, states, strict=True)
            ]
        if split is not None:
            update["ratio"] = evidence.ratio.plus(split, new.requests, old.requests)
        update["comparisons"] = experiments.absorb(evidence.comparisons, new, old, compared)
        new, old = (counts.model_copy(update={"scores": {}, "values": {}}) for counts in (new, old))
        update |= {
            "candidate": evidence.candidate.plus(new),
            "stable": evidence.stable.plus(old),
            "step_candidate": evidence.step_candidate.plus(new),
            "gates": states,
        }
    return evidence.model_copy(update=update)


def _elapsed(evidence: Evidence, now: datetime | None) -> float | None:
    if now is None or evidence.polled_at is None:
        return None
    return max(0.0, (now - evidence.polled_at).total_seconds()) or None


def _traffic(
    evidence: Evidence, requests: int, elapsed_s: float | None, now: datetime, on_trial: bool
) -> dict[str, object]:
    """The rate so far; a model without traffic changes nothing, so that nothing has to be stored."""
    if not requests and not evidence.rate and not on_trial:
        return {}
    if elapsed_s is None:
        return {"polled_at": now}
    fresh = requests / elapsed_s
    part = 1.0 - math.exp(-elapsed_s / RATE_MEMORY_S)
    rate = evidence.rate + part * (fresh - evidence.rate) if evidence.rate else fresh
    return {"polled_at": now, "rate": rate if rate >= STILL else 0.0}


def _restart(evidence: Evidence, trial: int, step: int, wanted: Sequence[Gate]) -> Evidence:
    key = repr([gate.model_dump() for gate in wanted])
    if evidence.trial != trial or evidence.gates_key != key:
        states = [begin_step(GateState()) for _ in wanted]
        nothing = {
            "candidate": Counts(),
            "stable": Counts(),
            "step_candidate": Counts(),
            "comparisons": {},
            "ratio": Ratio(),
        }
        update = {"trial": trial, "step": step, "gates_key": key, "gates": states}
        return evidence.model_copy(update=update | nothing)
    if evidence.step != step:
        states = [begin_step(state) for state in evidence.gates]
        return evidence.model_copy(update={"step": step, "gates": states, "step_candidate": Counts()})
    return evidence


def _gateway_difference(cursor: Cursor | None, figures: GatewayFigures) -> dict[str, Counts]:
    if cursor is None:
        return {}
    if cursor.instance_id != figures.instance_id:
        return dict(figures.versions)
    return {v: _minus(counts, cursor.versions.get(v, Counts())) for v, counts in figures.versions.items()}


def _outcome_difference(before: Mapping[str, Counts] | None, now: Mapping[str, Counts]) -> dict[str, Counts]:
    if before is None:
        return {}
    # A tracked value that nobody had before only sets the mark; of a version that nobody had before, everything counts.
    tracked = {key for counts in before.values() for key in counts.values}
    found: dict[str, Counts] = {}
    for version, counts in now.items():
        old = before.get(version, Counts())
        fresh = {
            key: values_minus(sums, old.values.get(key, {})) for key, sums in counts.values.items() if key in tracked
        }
        found[version] = _minus(counts, old).model_copy(update={"values": fresh})
    return found


def _minus(now: Counts, before: Counts) -> Counts:
    """The difference, or nothing where a sum fell: then the source began anew and this is the mark to count from."""
    latency = {edge: count - before.latency.get(edge, 0) for edge, count in now.latency.items()}
    scores = {bucket: count - before.scores.get(bucket, 0) for bucket, count in now.scores.items()}
    whole = (
        now.requests - before.requests,
        now.errors - before.errors,
        now.outcomes - before.outcomes,
        now.correct - before.correct,
    )
    squares = now.brier_square_sum - before.brier_square_sum
    if (
        min(*whole, *latency.values(), *scores.values(), 0) < 0
        or now.brier_sum - before.brier_sum < -1e-6
        or squares < -1e-6
    ):
        return Counts()
    return Counts(
        requests=whole[0],
        errors=min(whole[1], whole[0]),
        latency=latency,
        scores={bucket: count for bucket, count in scores.items() if count},
        shadow=shadow_pairs.minus(now.shadow, before.shadow),
        outcomes=whole[2],
        correct=min(whole[3], whole[2]),
        brier_sum=min(max(now.brier_sum - before.brier_sum, 0.0), float(whole[2])),
        brier_square_sum=min(max(squares, 0.0), float(whole[2])),
    )
