"""What the registry keeps, as plain frozen values."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum


class Stage(StrEnum):
    """Where a version stands on its way to users."""

    DEVELOPMENT = "Development"
    TESTING = "Testing"
    STAGING = "Staging"
    PRODUCTION = "Production"
    ARCHIVED = "Archived"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor in terms of the V2 inference protocol; the shape has no batch dimension and -1 is variable."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """What callers send and receive."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    feature_names: tuple[str, ...] = ()
    rules: str = ""
    """What values may be: `ValueRules` as JSON, checked; empty for none."""


@dataclass(frozen=True, slots=True)
class TableVersion:
    """One exact snapshot of a lake table."""

    table: str
    version: int


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a version came from."""

    run_id: str = ""
    training_set_digest: str = ""
    definitions_hash: str = ""
    table_versions: tuple[TableVersion, ...] = ()
    code_hash: str = ""
    lock_hash: str = ""
    seed: int = 0
    parent_version: str = ""


@dataclass(frozen=True, slots=True)
class OutcomeSpec:
    """How outcomes are joined to predictions."""

    contract: str
    subject_column: str
    label_column: str
    threshold: float
    numeric: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """A named line of versions."""

    name: str
    description: str = ""
    feature_service: str = ""
    outcome: OutcomeSpec | None = None
    created_at: datetime | None = None


@dataclass(frozen=True, slots=True, order=True)
class Artifact:
    """A file of a version; its content is found by its digest."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Approval:
    """Somebody's consent to a stage."""

    actor: str
    to_stage: Stage
    comment: str
    approved_at: datetime


@dataclass(frozen=True, slots=True)
class Rollout:
    """How one rollout of a version ended."""

    deployment: str
    decision: str
    against: str
    evidence: Artifact
    """The evidence bundle."""
    ended_at: datetime


@dataclass(frozen=True, slots=True)
class Content:
    """What a version is: it never changes."""

    model: str
    version: str
    artifacts: tuple[Artifact, ...]
    platform: str
    signature: Signature = Signature()
    lineage: Lineage = Lineage()
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Hex SHA-256 over the sorted "path sha256 size" lines of the artifacts: the version's identity."""
        lines = [f"{a.path} {a.sha256} {a.size_bytes}\n" for a in sorted(self.artifacts)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def difference(self, other: "Content") -> str:
        """Names of the parts in which two contents differ, for people; empty when they are equal."""
        parts = ("digest", "platform", "signature", "lineage", "metrics", "tags")
        return ", ".join(part for part in parts if getattr(self, part) != getattr(other, part))


@dataclass(frozen=True, slots=True)
class Version:
    """A registered version: its content and what happened to it since."""

    content: Content
    stage: Stage
    created_at: datetime
    revision: int
    approvals: tuple[Approval, ...] = ()
    spent_approvals: int = 0
    """How many of the oldest approvals an earlier promotion has used up."""
    rollouts: tuple[Rollout, ...] = ()
    """Oldest first; the newest of them."""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One thing that happened; each entry's hash covers the one before."""

    id: int
    at: datetime
    actor: str
    action: str
    model: str
    version: str
    detail: str
