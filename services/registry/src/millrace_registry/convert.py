"""Between protobuf messages and the registry's values; requests are checked on the way in."""

import re
from collections.abc import Iterable, Mapping

from millrace_api.common.v1 import common_pb2
from millrace_api.registry.v1 import registry_pb2
from millrace_kit import check
from millrace_kit.errors import InvalidArgumentError
from millrace_kit.value_rules import check_rules, read_rules, rules_text

from millrace_registry.models import (
    Artifact,
    AuditEntry,
    Content,
    Lineage,
    Model,
    OutcomeSpec,
    Rollout,
    Signature,
    Stage,
    TableVersion,
    TensorSpec,
    Version,
)

MAX_ACTOR = 256
MAX_ARTIFACTS = 1000
MAX_PATH = 255
MAX_FEATURES = 20_000
MAX_TENSORS = 256
MAX_RANK = 32
MAX_TABLES = 1000
MAX_METRICS = 1000
MAX_TAGS = 200
MAX_TAG_NAME = 128
MAX_ID = 256
MAX_INT32 = (1 << 31) - 1
DATATYPES = frozenset(
    {
        "BOOL",
        "UINT8",
        "UINT16",
        "UINT32",
        "UINT64",
        "INT8",
        "INT16",
        "INT32",
        "INT64",
        "FP16",
        "FP32",
        "FP64",
        "BF16",
        "BYTES",
    }
)
# Parts joined by "/", none of them "." or ".."; so a path can neither leave its folder nor forge a line of the digest.
_PATH = re.compile(r"(?!\.\.?(/|$))[A-Za-z0-9_.+=@-]+(/(?!\.\.?(/|$))[A-Za-z0-9_.+=@-]+)*")

_STAGES: Mapping[registry_pb2.Stage.ValueType, Stage] = {
    registry_pb2.STAGE_DEVELOPMENT: Stage.DEVELOPMENT,
    registry_pb2.STAGE_TESTING: Stage.TESTING,
    registry_pb2.STAGE_STAGING: Stage.STAGING,
    registry_pb2.STAGE_PRODUCTION: Stage.PRODUCTION,
    registry_pb2.STAGE_ARCHIVED: Stage.ARCHIVED,
}
_NUMBERS = {stage: number for number, stage in _STAGES.items()}


def stage_in(value: registry_pb2.Stage.ValueType, field: str) -> Stage:
    """A stage that is set and known."""
    stage = _STAGES.get(value)
    if stage is None:
        names = ", ".join(registry_pb2.Stage.Name(number) for number in _STAGES)
        raise InvalidArgumentError(field, f"needs one of {names}")
    return stage


def stage_out(stage: Stage) -> registry_pb2.Stage.ValueType:
    """The stage's number."""
    return _NUMBERS[stage]


def actor_in(value: str) -> str:
    """Who asks."""
    return check.text(value, "actor", limit=MAX_ACTOR)


def model_in(message: registry_pb2.Model) -> Model:
    """A model to create."""
    outcome = None
    if message.HasField("outcome"):
        outcome = OutcomeSpec(
            check.table(message.outcome.contract, "model.outcome.contract"),
            check.text(message.outcome.subject_column, "model.outcome.subject_column", limit=MAX_ID),
            check.text(message.outcome.label_column, "model.outcome.label_column", limit=MAX_ID),
            check.finite(message.outcome.threshold, "model.outcome.threshold"),
            message.outcome.numeric,
        )
    service = message.feature_service
    return Model(
        name=check.name(message.name, "model.name"),
        description=check.optional_text(message.description, "model.description"),
        feature_service=check.text(service, "model.feature_service", limit=MAX_ID) if service else "",
        outcome=outcome,
    )


def model_out(model: Model) -> registry_pb2.Model:
    """A model as it is answered."""
    message = registry_pb2.Model(name=model.name, description=model.description, feature_service=model.feature_service)
    if model.outcome is not None:
        message.outcome.contract = model.outcome.contract
        message.outcome.subject_column = model.outcome.subject_column
        message.outcome.label_column = model.outcome.label_column
        message.outcome.threshold = model.outcome.threshold
        message.outcome.numeric = model.outcome.numeric
    if model.created_at is not None:
        message.created_at.FromDatetime(model.created_at)
    return message


def content_in(message: registry_pb2.ModelVersion) -> Content:
    """A version to register; what the service sets itself is not read."""
    _at_most(len(message.metrics), MAX_METRICS, "version.metrics")
    _at_most(len(message.tags), MAX_TAGS, "version.tags")
    metrics = {
        check.text(name, "version.metrics", limit=MAX_ID): check.finite(value, f"version.metrics[{name}]")
        for name, value in message.metrics.items()
    }
    tags = {
        check.text(name, "version.tags", limit=MAX_TAG_NAME): check.optional_text(value, f"version.tags[{name}]")
        for name, value in message.tags.items()
    }
    return Content(
        model=check.name(message.model, "version.model"),
        version=check.semver(message.version, "version.version"),
        artifacts=_artifacts_in(message),
        platform=check.text(message.platform, "version.platform", limit=MAX_ID),
        signature=_signature_in(message.signature),
        lineage=_lineage_in(message.lineage),
        metrics=metrics,
        tags=tags,
    )


def _artifacts_in(message: registry_pb2.ModelVersion) -> tuple[Artifact, ...]:
    if not message.artifacts:
        raise InvalidArgumentError("version.artifacts", "needs at least one file")
    _at_most(len(message.artifacts), MAX_ARTIFACTS, "version.artifacts")
    found: dict[str, Artifact] = {}
    for index, artifact in enumerate(message.artifacts):
        field = f"version.artifacts[{index}]"
        path = artifact.path
        if len(path) > MAX_PATH or not _PATH.fullmatch(path):
            problem = f"needs a relative path of at most {MAX_PATH} letters, digits and _.+=@-/ without . or .. parts"
            raise InvalidArgumentError(f"{field}.path", problem)
        if path in found:
            raise InvalidArgumentError(f"{field}.path", f"{path} is named twice")
        if artifact.size_bytes < 0:
            raise InvalidArgumentError(f"{field}.size_bytes", "must not be negative")
        found[path] = Artifact(path, check.sha256(artifact.sha256, f"{field}.sha256"), artifact.size_bytes)
    return tuple(sorted(found.values()))


def _signature_in(message: registry_pb2.Signature) -> Signature:
    names = tuple(message.feature_names)
    _at_most(len(names), MAX_FEATURES, "version.signature.feature_names")
    for index, name in enumerate(names):
        check.text(name, f"version.signature.feature_names[{index}]", limit=MAX_ID)
    if len(set(names)) < len(names):
        raise InvalidArgumentError("version.signature.feature_names", "names a feature twice")
    check_rules(message.rules, "version.signature.rules", frozenset(names))
    return Signature(
        _tensors_in(message.inputs, "version.signature.inputs"),
        _tensors_in(message.outputs, "version.signature.outputs"),
        names,
        rules_text(message.rules),
    )


def _tensors_in(messages: Iterable[registry_pb2.TensorSpec], field: str) -> tuple[TensorSpec, ...]:
    tensors = tuple(messages)
    if not tensors:
        raise InvalidArgumentError(field, "needs at least one tensor")
    _at_most(len(tensors), MAX_TENSORS, field)
    for index, tensor in enumerate(tensors):
        check.text(tensor.name, f"{field}[{index}].name", limit=MAX_ID)
        if tensor.datatype not in DATATYPES:
            raise InvalidArgumentError(f"{field}[{index}].datatype", f"needs one of {', '.join(sorted(DATATYPES))}")
        _at_most(len(tensor.shape), MAX_RANK, f"{field}[{index}].shape")
        if any(size < -1 or size == 0 or size > MAX_INT32 for size in tensor.shape):
            raise InvalidArgumentError(f"{field}[{index}].shape", "needs sizes of at least 1, or -1 for variable")
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise InvalidArgumentError(field, "names a tensor twice")
    return tuple(TensorSpec(t.name, t.datatype, tuple(t.shape)) for t in tensors)


def _lineage_in(message: registry_pb2.Lineage) -> Lineage:
    _at_most(len(message.table_versions), MAX_TABLES, "version.lineage.table_versions")
    tables = []
    for index, table in enumerate(message.table_versions):
        field = f"version.lineage.table_versions[{index}]"
        if table.version < 0:
            raise InvalidArgumentError(f"{field}.version", "must not be negative")
        tables.append(TableVersion(check.table(table.table, f"{field}.table"), table.version))
    texts = {
        name: check.optional_text(getattr(message, name), f"version.lineage.{name}", limit=MAX_ID)
        for name in ("run_id", "training_set_digest", "definitions_hash", "code_hash", "lock_hash")
    }
    parent = message.parent_version
    return Lineage(
        **texts,
        table_versions=tuple(tables),
        seed=message.seed,
        parent_version=check.semver(parent, "version.lineage.parent_version") if parent else "",
    )


def version_out(version: Version) -> registry_pb2.ModelVersion:
    """A version as it is answered and announced."""
    content = version.content
    lineage = content.lineage
    message = registry_pb2.ModelVersion(
        model=content.model,
        version=content.version,
        stage=stage_out(version.stage),
        artifacts=[
            common_pb2.Artifact(path=a.path, sha256=a.sha256, size_bytes=a.size_bytes) for a in content.artifacts
        ],
        digest=content.digest,
        platform=content.platform,
        signature=registry_pb2.Signature(
            inputs=[_tensor_out(t) for t in content.signature.inputs],
            outputs=[_tensor_out(t) for t in content.signature.outputs],
            feature_names=content.signature.feature_names,
            rules=read_rules(content.signature.rules) if content.signature.rules else None,
        ),
        lineage=registry_pb2.Lineage(
            run_id=lineage.run_id,
            training_set_digest=lineage.training_set_digest,
            definitions_hash=lineage.definitions_hash,
            table_versions=[common_pb2.TableVersion(table=t.table, version=t.version) for t in lineage.table_versions],
            code_hash=lineage.code_hash,
            lock_hash=lineage.lock_hash,
            seed=lineage.seed,
            parent_version=lineage.parent_version,
        ),
        metrics=content.metrics,
        tags=content.tags,
        revision=version.revision,
    )
    for approval in version.approvals:
        entry = message.approvals.add(
            actor=approval.actor, to_stage=stage_out(approval.to_stage), comment=approval.comment
        )
        entry.approved_at.FromDatetime(approval.approved_at)
    for rollout in version.rollouts:
        record = message.rollouts.add(
            deployment=rollout.deployment,
            decision=rollout.decision,
            against=rollout.against,
            evidence_sha256=rollout.evidence.sha256,
            evidence_size_bytes=rollout.evidence.size_bytes,
        )
        record.ended_at.FromDatetime(rollout.ended_at)
    message.created_at.FromDatetime(version.created_at)
    return message


def _tensor_out(tensor: TensorSpec) -> registry_pb2.TensorSpec:
    return registry_pb2.TensorSpec(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)


def rollout_in(message: registry_pb2.RolloutRecord) -> Rollout:
    """A rollout that ended."""
    if not message.HasField("ended_at"):
        raise InvalidArgumentError("rollout.ended_at", "is needed")
    size = message.evidence_size_bytes
    if size <= 0:
        raise InvalidArgumentError("rollout.evidence_size_bytes", "must be positive")
    return Rollout(
        deployment=check.name(message.deployment, "rollout.deployment"),
        decision=check.text(message.decision, "rollout.decision", limit=MAX_ID),
        against=check.semver(message.against, "rollout.against") if message.against else "",
        evidence=Artifact("evidence", check.sha256(message.evidence_sha256, "rollout.evidence_sha256"), size),
        ended_at=check.timestamp(message.ended_at, "rollout.ended_at"),
    )


def audit_out(entry: AuditEntry) -> registry_pb2.AuditEntry:
    """An audit entry as it is answered."""
    message = registry_pb2.AuditEntry(
        id=entry.id,
        actor=entry.actor,
        action=entry.action,
        model=entry.model,
        version=entry.version,
        detail=entry.detail,
    )
    message.at.FromDatetime(entry.at)
    return message


def _at_most(count: int, limit: int, field: str) -> None:
    if count > limit:
        raise InvalidArgumentError(field, f"has {count} entries; {limit} is the limit")
