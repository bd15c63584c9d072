"""The registry's state in SQL: each change, its audit entry and its message are one transaction.

All changes go one after the other (they take the audit trail's head first), so a check and the change that relies on it can never
be split by another writer, in SQLite and PostgreSQL alike.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Protocol

from millrace_kit.bus import Outgoing
from millrace_kit.check import semver_key
from millrace_kit.clock import Clock
from millrace_kit.errors import (
    AlreadyExistsError,
    ConflictError,
    FailedPreconditionError,
    NotFoundError,
    ResourceExhaustedError,
)
from millrace_kit.outbox import enqueue
from millrace_kit.sql import reading, writing
from sqlalchemy import ColumnElement, Connection, Engine, and_, func, select

from millrace_registry import audit, rows
from millrace_registry.models import Approval, AuditEntry, Content, Model, Rollout, Stage, Version
from millrace_registry.stages import check_transition, open_approvals
from millrace_registry.tables import APPROVAL, MODEL, OUTBOX, VERSION


class Announce(Protocol):
    """Makes the message that tells of a change."""

    def __call__(
        self, *, registry_id: str, sequence: int, at: datetime, change: str, actor: str, version: Version
    ) -> Outgoing:
        """`sequence` is the number of the change in the registry `registry_id`."""
        ...


class SqlStore:
    """Models, versions, approvals, audit and outbox in one database.

    Args:
        engine: a database at the newest migration.
        clock: time of the changes.
        announce: makes the message of a change.
        max_models: models taken at most.
        max_versions: versions a model takes at most.
    """

    def __init__(
        self, engine: Engine, clock: Clock, announce: Announce, *, max_models: int = 10_000, max_versions: int = 5_000
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._announce = announce
        self._max_models = max_models
        self._max_versions = max_versions

    def create_model(self, model: Model) -> tuple[Model, bool]:
        """Add a model, unless an equal one is there; returns it and whether it is new.

        Raises:
            AlreadyExistsError: a model of that name differs.
            ResourceExhaustedError: there are `max_models`.
        """
        with self._changing() as (connection, head):
            known = rows.load_model(connection, model.name)
            if known is not None:
                wanted = replace(model, created_at=known.created_at)
                if known != wanted:
                    parts = ("description", "feature_service", "outcome")
                    difference = ", ".join(p for p in parts if getattr(known, p) != getattr(wanted, p))
                    raise AlreadyExistsError("model", model.name, difference)
                return known, False
            if connection.execute(select(func.count()).select_from(MODEL)).scalar_one() >= self._max_models:
                raise ResourceExhaustedError("max_models", f"the registry takes {self._max_models} models")
            made = replace(model, created_at=self._now())
            rows.insert_model(connection, made)
            audit.append(
                connection,
                head,
                at=self._now(),
                actor="",
                action="CreateModel",
                model=model.name,
                version="",
                detail="",
            )
            return made, True

    def model(self, name: str) -> Model:
        """The model of that name.

        Raises:
            NotFoundError: there is none.
        """
        with self._reading() as connection:
            return _known_model(connection, name)

    def models(self) -> Sequence[Model]:
        """Every model, by name."""
        with self._reading() as connection:
            return rows.load_models(connection)

    def register(self, content: Content, actor: str) -> tuple[Version, bool]:
        """Add a version in Development, unless an equal one is there; returns it and whether it is new.

        Raises:
            NotFoundError: no such model.
            AlreadyExistsError: the version is there with other content.
            ResourceExhaustedError: the model has `max_versions`.
        """
        with self._changing() as (connection, head):
            _known_model(connection, content.model)
            known = _find_version(connection, content.model, content.version)
            if known is not None:
                if difference := known.content.difference(content):
                    raise AlreadyExistsError("version", f"{content.model} {content.version}", difference)
                return known, False
            count = select(func.count()).where(VERSION.c.model == content.model)
            if connection.execute(count).scalar_one() >= self._max_versions:
                raise ResourceExhaustedError("max_versions_per_model", f"a model takes {self._max_versions} versions")
            version = Version(content, Stage.DEVELOPMENT, self._now(), revision=1)
            rows.insert_version(connection, version)
            self._record(
                connection,
                head,
                version,
                change="Registered",
                action="RegisterVersion",
                actor=actor,
                detail=f"digest {content.digest}",
            )
            return version, True

    def version(self, model: str, version: str) -> Version:
        """The version, or with empty `version` the one promoted to Production last.

        Raises:
            NotFoundError: no such model or version, or none in Production.
        """
        with self._reading() as connection:
            if version:
                return _known_version(connection, model, version)
            _known_model(connection, model)
            newest = select(func.max(VERSION.c.promoted)).where(VERSION.c.model == model).scalar_subquery()
            found = rows.load_versions(connection, and_(VERSION.c.model == model, VERSION.c.promoted == newest))
            if not found:
                raise NotFoundError("version", f"{model} in Production")
            return found[0]

    def versions(self, model: str) -> Sequence[Version]:
        """Every version of the model, newest semantic version first.

        Raises:
            NotFoundError: no such model.
        """
        with self._reading() as connection:
            _known_model(connection, model)
            found = rows.load_versions(connection, VERSION.c.model == model)
        return sorted(found, key=lambda v: semver_key(v.content.version), reverse=True)

    def approve(self, model: str, version: str, to_stage: Stage, actor: str, comment: str) -> Version:
        """Record consent to a stage; the same consent given twice counts once.

        Raises:
            NotFoundError: no such version.
            FailedPreconditionError: the version is archived.
        """
        with self._changing() as (connection, head):
            known = _known_version(connection, model, version)
            if known.stage is Stage.ARCHIVED:
                metadata = {"model": model, "version": version}
                raise FailedPreconditionError("VERSION_ARCHIVED", f"{model} {version} is archived", metadata)
            given = {(a.actor, a.to_stage, a.comment) for a in open_approvals(known)}
            if (actor, to_stage, comment) in given:
                return known
            approval = Approval(actor, to_stage, comment, self._now())
            version_id = select(VERSION.c.id).where(_is(model, version)).scalar_subquery()
            connection.execute(
                APPROVAL.insert().values(
                    version_id=version_id,
                    actor=actor,
                    to_stage=to_stage.value,
                    comment=comment,
                    approved_at_us=audit.to_us(approval.approved_at),
                )
            )
            changed = replace(known, approvals=(*known.approvals, approval), revision=known.revision + 1)
            connection.execute(VERSION.update().where(_is(model, version)).values(revision=changed.revision))
            self._record(
                connection,
                head,
                changed,
                change="Approved",
                action="Approve",
                actor=actor,
                detail=f"{to_stage}: {comment}",
            )
            return changed

    def transition(self, model: str, version: str, to_stage: Stage, actor: str, expected_revision: int) -> Version:
        """Move the version to a stage; a version that is there already stays as it is.

        Args:
            model: its model.
            version: its semantic version.
            to_stage: where to.
            actor: who moves it.
            expected_revision: the revision the caller saw; 0 takes any.

        Raises:
            NotFoundError: no such version.
            ConflictError: the version has another revision than `expected_revision`.
            FailedPreconditionError: no such step from its stage, or an approval is missing.
        """
        with self._changing() as (connection, head):
            known = _known_version(connection, model, version)
            if expected_revision not in {0, known.revision}:
                message = f"{model} {version} has revision {known.revision}, not {expected_revision}; read it again"
                metadata = {"revision": str(known.revision), "expected_revision": str(expected_revision)}
                raise ConflictError("REVISION_CHANGED", message, metadata)
            if known.stage is to_stage:
                return known
            check_transition(known, to_stage)
            promoted = to_stage is Stage.PRODUCTION
            changed = replace(
                known,
                stage=to_stage,
                revision=known.revision + 1,
                spent_approvals=len(known.approvals) if promoted else known.spent_approvals,
            )
            detail = f"{known.stage} -> {to_stage}"
            sequence = self._record(
                connection, head, changed, change="StageChanged", action="TransitionStage", actor=actor, detail=detail
            )
            connection.execute(
                VERSION.update()
                .where(_is(model, version))
                .values(
                    stage=to_stage.value,
                    revision=changed.revision,
                    spent_approvals=changed.spent_approvals,
                    promoted=sequence if promoted else None,
                )
            )
            return changed

    def record_rollout(self, model: str, version: str, rollout: Rollout, actor: str) -> bool:
        """Link the evidence of a rollout that ended to its version; False when it was linked already.

        It is no change of the version: its revision stays, and nothing is announced.

        Raises:
            NotFoundError: no such version.
        """
        with self._changing() as (connection, head):
            _known_version(connection, model, version)
            if not rows.insert_rollout(connection, _is(model, version), rollout):
                return False
            audit.append(
                connection,
                head,
                at=self._now(),
                actor=actor,
                action="RecordRollout",
                model=model,
                version=version,
                detail=f"{rollout.deployment}: {rollout.decision}, evidence {rollout.evidence.sha256}",
            )
            return True

    def audit_page(self, model: str, after: int, limit: int) -> Sequence[AuditEntry]:
        """Entries with an id above `after`, oldest first; empty `model` takes every model's.

        Raises:
            DataLossError: an entry was tampered with.
        """
        with self._reading() as connection:
            return audit.page(connection, model=model, after=after, limit=limit)

    def verify_audit(self) -> int:
        """Check the whole audit trail; returns its length.

        Raises:
            DataLossError: an entry was tampered with.
        """
        with self._reading() as connection:
            return audit.verify(connection)

    def _record(
        self,
        connection: Connection,
        head: audit.Head,
        version: Version,
        *,
        change: str,
        action: str,
        actor: str,
        detail: str,
    ) -> int:
        """The audit entry and the message of one change; returns its number."""
        now = self._now()
        model, name = version.content.model, version.content.version
        sequence = audit.append(
            connection, head, at=now, actor=actor, action=action, model=model, version=name, detail=detail
        )
        message = self._announce(
            registry_id=head.registry_id, sequence=sequence, at=now, change=change, actor=actor, version=version
        )
        enqueue(connection, OUTBOX, [message])
        return sequence

    def _now(self) -> datetime:
        return self._clock.now()

    @contextmanager
    def _changing(self) -> Iterator[tuple[Connection, audit.Head]]:
        with writing(self._engine) as connection:
            yield connection, audit.lock_head(connection)

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with reading(self._engine) as connection:
            yield connection


def _is(model: str, version: str) -> ColumnElement[bool]:
    return and_(VERSION.c.model == model, VERSION.c.version == version)


def _known_model(connection: Connection, name: str) -> Model:
    model = rows.load_model(connection, name)
    if model is None:
        raise NotFoundError("model", name)
    return model


def _find_version(connection: Connection, model: str, version: str) -> Version | None:
    found = rows.load_versions(connection, _is(model, version))
    return found[0] if found else None


def _known_version(connection: Connection, model: str, version: str) -> Version:
    found = _find_version(connection, model, version)
    if found is None:
        _known_model(connection, model)
        raise NotFoundError("version", f"{model} {version}")
    return found
