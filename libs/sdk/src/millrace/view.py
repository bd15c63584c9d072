"""View models of ModelDeployments: the same rows for the table, the watch and the tests."""

import json
from collections.abc import Sequence
from datetime import datetime

from google.protobuf.json_format import MessageToDict
from millrace_api.rollout.v1.rollout_pb2 import ComparisonResult, Decision, Deployment, PoolPlace, Verdict

COLUMNS = ("NAME", "READY", "STABLE", "CANDIDATE", "WEIGHT", "STEP", "AGE")
WIDE_COLUMNS = (*COLUMNS, "PHASE", "GENERATION", "POOL", "GATES")


def age(created_at: str, now: datetime) -> str:
    """Age as kubectl writes it: 42s, 3m, 5h, 2d."""
    if not created_at:
        return "-"
    seconds = max(0, int((now - datetime.fromisoformat(created_at)).total_seconds()))
    for limit, unit, letter in ((120, 1, "s"), (7200, 60, "m"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds // unit}{letter}"
    return f"{seconds // 86_400}d"


def verdict_word(verdict: int) -> str:
    """The verdict as people write it: pass, fail or undecided."""
    return Verdict.Name(verdict).removeprefix("VERDICT_").lower()  # type: ignore[arg-type]


def comparison_name(result: ComparisonResult) -> str:
    """The metric, and the group of predictions if it is about one."""
    return f"{result.metric} of {result.segment!r}" if result.segment else result.metric


def comparison_words(result: ComparisonResult) -> str:
    """One comparison as a sentence: both values, the bounds of their difference, what they say and how they came about."""
    evidence = f"; {result.evidence}" if result.evidence else ""
    return (
        f"candidate {result.candidate:g} over {result.candidate_samples}, stable {result.stable:g} over {result.stable_samples}, "
        f"difference {result.lower:+g} to {result.upper:+g} at {result.confidence:.0%}: {result.better}{evidence}"
    )


HISTORY_COLUMNS = ("REVISION", "AT", "VERSION", "DECISION", "WEIGHT", "MESSAGE")


def history_text(decisions: Sequence[Decision], output: str) -> str:
    """Decisions as a table, wide with a line for every gate, every comparison and the evidence bundle under each, or as JSON."""
    if output == "json":
        data = [MessageToDict(one, preserving_proto_field_name=True) for one in decisions]
        return json.dumps(data, indent=2, ensure_ascii=False)
    rows = [
        (str(one.revision or "-"), one.at, one.version, one.decision, f"{one.weight:g}%", one.message)
        for one in decisions
    ]
    lines = table(HISTORY_COLUMNS, rows).splitlines()
    if output != "wide":
        return "\n".join(lines)
    shown = [lines[0]]
    for line, one in zip(lines[1:], decisions, strict=True):
        shown.append(line)
        shown += [f"    {verdict_word(gate.verdict)}: {gate.gate}: {gate.evidence}" for gate in one.gates]
        shown += [f"    {comparison_name(result)}: {comparison_words(result)}" for result in one.comparisons]
        if one.bundle_sha256:
            shown.append(f"    evidence: artifact {one.bundle_sha256}")
    return "\n".join(shown)


def deployment_row(deployment: Deployment, now: datetime, *, wide: bool = False) -> tuple[str, ...]:
    """One row in the order of `COLUMNS` (or `WIDE_COLUMNS`)."""
    moving = bool(deployment.candidate_version)
    row = (
        deployment.name,
        str(deployment.ready),
        deployment.stable_version or "-",
        deployment.candidate_version or "-",
        f"{deployment.candidate_weight:g}%" if moving else "-",
        f"{min(deployment.step + 1, deployment.steps)}/{deployment.steps}" if moving and deployment.steps else "-",
        age(deployment.created_at, now),
    )
    if not wide:
        return row
    gates = ", ".join(f"{gate.gate}: {verdict_word(gate.verdict)}" for gate in deployment.gates) or "-"
    return (*row, deployment.phase, str(deployment.generation), _pool_words(deployment.pool), gates)


def _pool_words(place: PoolPlace) -> str:
    """For example "small: Resident"; of several versions each with its own state."""
    if not place.pool:
        return "-"
    several = len(place.versions) > 1
    states = (f"{one.version} {one.state}" if several else one.state for one in place.versions)
    return f"{place.pool}: {', '.join(states) or 'Unknown'}"


def pool_lines(place: PoolPlace) -> list[str]:
    """A deployment's place in its pool: the pool as a whole, then each of its own versions. Nothing without a pool."""
    if not place.pool:
        return []
    of = f" of {place.capacity_mib}" if place.capacity_mib else ""
    whole = f"{place.resident} resident, {place.waiting} waiting, {place.set_aside_mib}{of} MiB set aside"
    own = [
        f"{one.version:<12} {one.state}, {one.memory_mib} MiB" + (f": {one.waiting}" if one.waiting else "")
        for one in place.versions
    ]
    return [f"{place.pool:<12} {whole}", *own]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, three spaces apart, as kubectl prints them."""
    widths = [max(len(row[index]) for row in (columns, *rows)) for index in range(len(columns))]
    lines = ("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (columns, *rows))
    return "\n".join(line.rstrip() for line in lines)
