"""How long each version has been without requests, as far as every gateway proves it. Pure.

Only what all gateways in use have said counts as quiet. A gateway that does not answer, that started anew, or that came or went since
the last look may have had requests nobody knows of; then the time begins again.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from pydantic import BaseModel


class Used(BaseModel):
    """A version's use through one gateway."""

    started: int
    """Requests so far."""
    running: int
    held: int = 0
    """Of those, how many wait because the version is asleep: its servers know nothing of them."""


@dataclass(frozen=True, slots=True)
class GatewayActivity:
    """One gateway's answer; a version that is absent is of unknown activity."""

    instance_id: str
    versions: Mapping[str, Used] = field(default_factory=dict)


class Mark(BaseModel):
    """What one gateway said last."""

    instance_id: str
    started: dict[str, int]


class Quiet(BaseModel):
    """Since when nothing has been asked of each version."""

    marks: dict[str, Mark] = {}
    """By gateway."""
    since: dict[str, datetime] = {}
    calm: dict[str, datetime] = {}
    """Since when nothing has been with the servers of each version; held calls are not."""
    running: list[str] = []
    """Versions whose servers had something under way at the last look, or may have had."""


def whole(answers: Mapping[str, GatewayActivity], gateways: Sequence[str]) -> bool:
    """Whether every gateway has answered: only then a time without requests is one."""
    return bool(gateways) and all(address in answers for address in gateways)


def look(
    quiet: Quiet,
    answers: Mapping[str, GatewayActivity],
    gateways: Sequence[str],
    versions: Collection[str],
    now: datetime,
) -> Quiet:
    """What is known after one poll.

    Args:
        quiet: what was known before.
        answers: by address, of the gateways that answered.
        gateways: addresses in use; those that are not among the answers hold everything up.
        versions: the versions in question.
        now: time of the poll.
    """
    if not answers and quiet.marks.keys() <= set(gateways):
        return quiet
    busy: set[str] = set()
    served: set[str] = set()
    running: set[str] = set()
    if quiet.marks.keys() - set(gateways):
        busy.update(versions)
        served.update(versions)
    marks = {address: mark for address, mark in quiet.marks.items() if address in gateways}
    for address in gateways:
        answer = answers.get(address)
        if answer is None:
            running.update(versions)
            continue
        mark = marks.get(address)
        known = mark.started if mark is not None and mark.instance_id == answer.instance_id else {}
        for version in versions:
            used = answer.versions.get(version)
            moved = used is None or used.started != known.get(version)
            if moved or used is None or used.running:
                busy.add(version)
            if used is None or used.running > used.held:
                running.add(version)
            if moved or version in running:
                served.add(version)
        marks[address] = Mark(
            instance_id=answer.instance_id,
            started={version: used.started for version, used in answer.versions.items() if version in versions},
        )
    since = {version: now if version in busy else quiet.since.get(version, now) for version in versions}
    calm = {version: now if version in served else quiet.calm.get(version, now) for version in versions}
    return Quiet(marks=marks, since=since, calm=calm, running=sorted(running))
