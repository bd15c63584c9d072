"""Pipelines and runs as values: what the store keeps and everything else passes around."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache

from millrace_training_coordinator.manifest import Limits, Manifest, parse_manifest
from millrace_training_coordinator.record import Record, collect
from millrace_training_coordinator.results import Output, StageResult
from millrace_training_coordinator.scheduler import PlannedStage, RunState, RunStatus, StageState

UNLIMITED = Limits(timeout_s=float("inf"))


@dataclass(frozen=True, slots=True)
class PipelineVersion:
    """A registered manifest with its code."""

    name: str
    manifest_yaml: str
    code_hash: str
    archive_digest: str

    @property
    def pipeline_hash(self) -> str:
        """SHA-256 over manifest and code."""
        manifest = hashlib.sha256(self.manifest_yaml.encode()).hexdigest()
        return hashlib.sha256(f"manifest {manifest}\ncode {self.code_hash}\n".encode()).hexdigest()

    @property
    def manifest(self) -> Manifest:
        """The parsed manifest; it was checked when it was registered."""
        return _parsed(self.manifest_yaml)


@lru_cache(maxsize=256)
def _parsed(manifest_yaml: str) -> Manifest:
    return parse_manifest(manifest_yaml, UNLIMITED)


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What a caller asked for: overrides on top of a pipeline."""

    pipeline: str
    parameters: Mapping[str, str]
    seed: int | None
    request_id: str
    cause: str

    @property
    def digest(self) -> str:
        """Equal for two requests that ask for the same run."""
        content = [self.pipeline, sorted(self.parameters.items()), self.seed]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class NewRun:
    """A run to be kept."""

    id: str
    pipeline: str
    pipeline_hash: str
    plan: tuple[PlannedStage, ...]
    parameters: Mapping[str, str]
    seed: int
    cause: str
    created_at: datetime
    code_hash: str
    lock_hash: str
    hardware: Mapping[str, str]
    request_id: str = ""
    request_digest: str = ""
    reproduction_of: str = ""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as it stands. `sequence` rises with each run, `revision` with each change of one."""

    new: NewRun
    sequence: int
    revision: int
    status: RunStatus
    results: Mapping[str, StageResult] = field(default_factory=dict)
    outputs: tuple[Output, ...] = ()

    @property
    def id(self) -> str:
        """The run's id."""
        return self.new.id

    @property
    def state(self) -> RunState:
        """The run's state."""
        return self.status.state

    @property
    def record(self) -> Record:
        """What the run was made of so far."""
        ended = [self.results[stage.name] for stage in self.new.plan if stage.name in self.results]
        return collect(ended, self.outputs)

    @property
    def failure(self) -> str:
        """Why the run failed: the stages that did, with their reasons."""
        failed = [f"{n}: {s.failure}" for n, s in self.status.stages.items() if s.state is StageState.FAILED]
        return "; ".join(failed)


def plan_of(manifest: Manifest, *, effects: bool = True) -> tuple[PlannedStage, ...]:
    """The stages for the state machine; without `effects`, those that have effects or need one that has are left out."""
    left_out: set[str] = set()
    plan = []
    for stage in manifest.stages:
        if not effects and (stage.effects or left_out.intersection(stage.depends_on)):
            left_out.add(stage.name)
        else:
            plan.append(PlannedStage(stage.name, stage.depends_on, stage.retries))
    return tuple(plan)


def ancestors(manifest: Manifest, name: str) -> tuple[str, ...]:
    """Every stage that `name` depends on, directly or not, in the plan's order."""
    needed = set(manifest.stage(name).depends_on)
    for stage in reversed(manifest.stages):
        if stage.name in needed:
            needed.update(stage.depends_on)
    return tuple(stage.name for stage in manifest.stages if stage.name in needed)
