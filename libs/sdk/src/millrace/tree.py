"""The tree of one rollout: deployment → versions → servers, gates with their evidence, results, events. Pure; printing is another matter."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import yaml
from millrace_api.rollout.v1.rollout_pb2 import (
    ARM_ROLE_CANDIDATE,
    ARM_ROLE_STABLE,
    VERDICT_FAIL,
    VERDICT_PASS,
    Arm,
    ComparisonResult,
    Deployment,
)

from millrace.view import age, comparison_name

Tone = Literal["plain", "good", "bad", "moving", "muted"]
SHOWN_EVENTS = 5
BAR = 20
"""Width of the bar of the candidate's weight."""
_ROLES = {ARM_ROLE_STABLE: "stable", ARM_ROLE_CANDIDATE: "candidate"}
_TONES: dict[str, Tone] = {
    "Idle": "good",
    "Promoted": "good",
    "Preparing": "moving",
    "Progressing": "moving",
    "Promoting": "moving",
    "Paused": "moving",
    "RollingBack": "bad",
    "RolledBack": "bad",
    "Degraded": "bad",
}
MARKS: dict[Tone, str] = {"plain": "", "good": "✔ ", "bad": "✖ ", "moving": "◌ ", "muted": ""}


@dataclass(frozen=True, slots=True)
class Pod:
    """One model server."""

    name: str
    version: str
    state: str
    """Phase, or why it does not run."""
    ready: bool
    restarts: int
    created_at: str
    """RFC 3339."""
    node: str


@dataclass(frozen=True, slots=True)
class Node:
    """One line and what hangs on it."""

    text: str
    tone: Tone = "plain"
    children: tuple["Node", ...] = ()

    @property
    def label(self) -> str:
        """The line with its mark, so that it says the same without colour."""
        return f"{MARKS[self.tone]}{self.text}"


def rollout_tree(deployment: Deployment, pods: Sequence[Pod], now: datetime) -> Node:
    """Everything about one deployment.

    Args:
        deployment: as its API or its resource shows it.
        pods: its model servers; none on one machine.
        now: for ages.
    """
    phase = deployment.phase or "Unknown"
    said = f"{deployment.name}  {phase}  {deployment.strategy or 'Canary'}  model {deployment.model}"
    if deployment.observed_generation < deployment.generation:
        said += f"  (generation {deployment.generation} is not looked at yet)"
    tone = _TONES.get(phase, "plain")
    if tone == "good" and not deployment.ready:
        tone = "moving"
    children = [
        *_position(deployment),
        *_arms(deployment.arms, pods, now),
        *_group("gates", _gates(deployment)),
        *_group("result", (_comparison(one) for one in deployment.comparisons)),
        *_group("conditions", _conditions(deployment)),
        *_group("events", _events(deployment, now)),
    ]
    return Node(said, tone, tuple(children))


def plain(node: Node) -> str:
    """The tree as text, branches drawn."""
    return "\n".join([node.label, *_lines(node.children, "")])


def _lines(nodes: Sequence[Node], indent: str) -> Iterator[str]:
    for number, node in enumerate(nodes):
        last = number == len(nodes) - 1
        yield f"{indent}{'└── ' if last else '├── '}{node.label}"
        yield from _lines(node.children, indent + ("    " if last else "│   "))


def _group(name: str, nodes: Iterable[Node]) -> Iterator[Node]:
    if children := tuple(nodes):
        yield Node(name, "plain", children)


def _position(deployment: Deployment) -> Iterator[Node]:
    """The steps with the present one marked, the weight as a bar, and why nothing moves."""
    if deployment.candidate_version:
        filled = round(deployment.candidate_weight / 100 * BAR)
        bar = "█" * filled + "░" * (BAR - filled)
        yield Node(f"weight {bar} {deployment.candidate_weight:g}%")
        weights = _steps(deployment.manifest_yaml)
        if weights and deployment.phase != "Preparing":  # no step is entered before the servers are ready
            shown = [
                f"{weight:g} ✔"
                if number < deployment.step
                else f"[{weight:g}]"
                if number == deployment.step
                else f"{weight:g}"
                for number, weight in enumerate(weights)
            ]
            yield Node(f"step {min(deployment.step + 1, deployment.steps)}/{deployment.steps}: {' → '.join(shown)}")
    if deployment.waiting:
        yield Node(f"waiting: {deployment.waiting}", "moving")


def _steps(manifest_yaml: str) -> list[float]:
    """Weights of a canary's steps; none for other strategies."""
    document = yaml.safe_load(manifest_yaml) if manifest_yaml else None
    steps = (((document or {}).get("spec") or {}).get("rollout") or {}).get("steps") or []
    return [float(step["weight"]) for step in steps]


def _arms(arms: Iterable[Arm], pods: Sequence[Pod], now: datetime) -> Iterator[Node]:
    seen = set()
    for arm in arms:
        seen.add(arm.version)
        role = _ROLES.get(arm.role, "leaving")
        text = f"{role} {arm.version}  {arm.weight:g}%  {len(arm.endpoints)} ready"
        if arm.mirror_percent:
            text += f"  mirrors {arm.mirror_percent:g}%"
        mine = tuple(_pod(pod, now) for pod in pods if pod.version == arm.version)
        tone: Tone = "muted" if role == "leaving" else "good" if arm.endpoints else "moving"
        yield Node(text, tone, mine)
    for version in sorted({pod.version for pod in pods} - seen):
        others = tuple(_pod(pod, now) for pod in pods if pod.version == version)
        yield Node(f"{version}  no traffic", "muted", others)


def _pod(pod: Pod, now: datetime) -> Node:
    text = f"{pod.name}  {pod.state}  {'ready' if pod.ready else 'not ready'}"
    if pod.restarts:
        text += f"  {pod.restarts} restart{'s' if pod.restarts > 1 else ''}"
    text += f"  {age(pod.created_at, now)}" + (f"  on {pod.node}" if pod.node else "")
    if pod.state == "Terminating":
        return Node(text, "muted")
    expected = pod.state in {"Running", "Succeeded"} or pod.state.startswith("Pending")
    return Node(text, "bad" if not expected else "good" if pod.ready else "moving")


def _gates(deployment: Deployment) -> Iterator[Node]:
    for gate in deployment.gates:
        tone: Tone = "good" if gate.verdict == VERDICT_PASS else "bad" if gate.verdict == VERDICT_FAIL else "moving"
        yield Node(f"{gate.gate}: {gate.evidence or 'no evidence yet'}", tone)


def _comparison(one: ComparisonResult) -> Node:
    text = (
        f"{comparison_name(one)}: candidate {one.candidate:.4g} ({one.candidate_samples}), stable {one.stable:.4g} ({one.stable_samples}), "
        f"difference in [{one.lower:.4g}, {one.upper:.4g}] with {one.confidence:.0%} confidence: "
    )
    return Node(text + (f"{one.better} is better" if one.better in {"candidate", "stable"} else "undecided"))


def _conditions(deployment: Deployment) -> Iterator[Node]:
    """Only those that say something is wrong."""
    for one in deployment.conditions:
        if (one.type, one.status) in {("Degraded", "True"), ("Ready", "False")}:
            yield Node(f"{one.type} {one.status}: {one.reason}: {one.message}", "bad")


def _events(deployment: Deployment, now: datetime) -> Iterator[Node]:
    for event in deployment.events[-SHOWN_EVENTS:]:
        tone: Tone = "bad" if event.type == "Warning" else "plain"
        yield Node(f"{age(event.at, now)} ago  {event.reason}: {event.message}", tone)
