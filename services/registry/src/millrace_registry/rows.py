"""Between rows and values."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, select

from millrace_registry.audit import from_us, to_us
from millrace_registry.models import (
    Approval,
    Artifact,
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
from millrace_registry.tables import APPROVAL, ARTIFACT, METRIC, MODEL, ROLLOUT, TAG, VERSION

MAX_ROLLOUTS = 100
"""Newest rollouts of a version that are told with it."""


def load_model(connection: Connection, name: str) -> Model | None:
    """The model of that name."""
    row = connection.execute(select(MODEL).where(MODEL.c.name == name)).one_or_none()
    return None if row is None else to_model(row)


def load_models(connection: Connection) -> Sequence[Model]:
    """Every model, by name."""
    return [to_model(row) for row in connection.execute(select(MODEL).order_by(MODEL.c.name))]


def insert_model(connection: Connection, model: Model) -> None:
    """Add a model that is not there."""
    assert model.created_at is not None
    connection.execute(
        MODEL.insert().values(
            name=model.name,
            description=model.description,
            feature_service=model.feature_service,
            outcome=None if model.outcome is None else json.dumps(asdict(model.outcome)),
            created_at_us=to_us(model.created_at),
        )
    )


def to_model(row: Row[Any]) -> Model:
    """A model from its row."""
    outcome = None if row.outcome is None else OutcomeSpec(**json.loads(row.outcome))
    return Model(row.name, row.description, row.feature_service, outcome, from_us(row.created_at_us))


def insert_version(connection: Connection, version: Version) -> None:
    """Add a version that is not there, with its files, metrics and tags."""
    content = version.content
    row = VERSION.insert().values(
        model=content.model,
        version=content.version,
        stage=version.stage.value,
        digest=content.digest,
        platform=content.platform,
        signature=json.dumps(asdict(content.signature)),
        lineage=json.dumps(asdict(content.lineage)),
        created_at_us=to_us(version.created_at),
        revision=version.revision,
        spent_approvals=version.spent_approvals,
    )
    version_id = connection.execute(row).inserted_primary_key[0]  # type: ignore[index]
    artifacts: list[dict[str, object]] = [{"version_id": version_id, **asdict(a)} for a in content.artifacts]
    connection.execute(ARTIFACT.insert(), artifacts)
    for table, values in ((METRIC, content.metrics), (TAG, content.tags)):
        if values:
            named = [{"version_id": version_id, "name": name, "value": value} for name, value in values.items()]
            connection.execute(table.insert(), named)


def load_versions(connection: Connection, which: ColumnElement[bool]) -> Sequence[Version]:
    """The versions `which` selects, oldest registration first, whole."""
    rows = connection.execute(select(VERSION).where(which).order_by(VERSION.c.id)).all()
    ids = select(VERSION.c.id).where(which)
    artifacts: Mapping[int, list[Artifact]] = defaultdict(list)
    for row in connection.execute(
        select(ARTIFACT).where(ARTIFACT.c.version_id.in_(ids)).order_by(ARTIFACT.c.version_id, ARTIFACT.c.path)
    ):
        artifacts[row.version_id].append(Artifact(row.path, row.sha256, row.size_bytes))
    metrics: Mapping[int, dict[str, float]] = defaultdict(dict)
    for row in connection.execute(select(METRIC).where(METRIC.c.version_id.in_(ids))):
        metrics[row.version_id][row.name] = row.value
    tags: Mapping[int, dict[str, str]] = defaultdict(dict)
    for row in connection.execute(select(TAG).where(TAG.c.version_id.in_(ids))):
        tags[row.version_id][row.name] = row.value
    approvals: Mapping[int, list[Approval]] = defaultdict(list)
    for row in connection.execute(select(APPROVAL).where(APPROVAL.c.version_id.in_(ids)).order_by(APPROVAL.c.id)):
        stage = Stage(row.to_stage)
        approvals[row.version_id].append(Approval(row.actor, stage, row.comment, from_us(row.approved_at_us)))
    rollouts = _rollouts(connection, which)
    return [
        Version(
            content=Content(
                model=row.model,
                version=row.version,
                artifacts=tuple(sorted(artifacts[row.id])),
                platform=row.platform,
                signature=_signature(json.loads(row.signature)),
                lineage=_lineage(json.loads(row.lineage)),
                metrics=metrics[row.id],
                tags=tags[row.id],
            ),
            stage=Stage(row.stage),
            created_at=from_us(row.created_at_us),
            revision=row.revision,
            approvals=tuple(approvals[row.id]),
            spent_approvals=row.spent_approvals,
            rollouts=tuple(rollouts[row.id][-MAX_ROLLOUTS:]),
        )
        for row in rows
    ]


def _rollouts(connection: Connection, which: ColumnElement[bool]) -> Mapping[int, list[Rollout]]:
    found: Mapping[int, list[Rollout]] = defaultdict(list)
    ids = select(VERSION.c.id).where(which)
    for row in connection.execute(
        select(ROLLOUT).where(ROLLOUT.c.version_id.in_(ids)).order_by(ROLLOUT.c.ended_at_us, ROLLOUT.c.id)
    ):
        evidence = Artifact("", row.evidence_sha256, row.evidence_size_bytes)
        found[row.version_id].append(
            Rollout(row.deployment, row.decision, row.against, evidence, from_us(row.ended_at_us))
        )
    return found


def insert_rollout(connection: Connection, which: ColumnElement[bool], rollout: Rollout) -> bool:
    """Add a rollout to the version `which` selects; False when one with the same evidence is there."""
    version_id = connection.execute(select(VERSION.c.id).where(which)).scalar_one()
    same = and_(ROLLOUT.c.version_id == version_id, ROLLOUT.c.evidence_sha256 == rollout.evidence.sha256)
    if connection.execute(select(ROLLOUT.c.id).where(same)).first() is not None:
        return False
    connection.execute(
        ROLLOUT.insert().values(
            version_id=version_id,
            deployment=rollout.deployment,
            decision=rollout.decision,
            against=rollout.against,
            evidence_sha256=rollout.evidence.sha256,
            evidence_size_bytes=rollout.evidence.size_bytes,
            ended_at_us=to_us(rollout.ended_at),
        )
    )
    return True


def _signature(fields: dict[str, Any]) -> Signature:
    def tensors(name: str) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(t["name"], t["datatype"], tuple(t["shape"])) for t in fields[name])

    return Signature(tensors("inputs"), tensors("outputs"), tuple(fields["feature_names"]), fields.get("rules", ""))


def _lineage(fields: dict[str, Any]) -> Lineage:
    tables = tuple(TableVersion(**t) for t in fields.pop("table_versions"))
    return Lineage(**fields, table_versions=tables)
