"""The audit trail: a chain of hashes, so that a changed, removed or inserted row shows.

Every change of the registry takes the trail's head first, which also puts all changes in one order. The chain protects against
edits of rows; somebody who may rewrite the whole table and its head can still forge it, unless `last_hash` is kept elsewhere too.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from millrace_kit.errors import DataLossError
from sqlalchemy import Connection, Row, select

from millrace_registry.models import AuditEntry
from millrace_registry.tables import AUDIT, AUDIT_HEAD

GENESIS = "0" * 64
VERIFY_PAGE = 1000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass
class Head:
    """The end of the trail inside one transaction."""

    registry_id: str
    last_id: int
    last_hash: str


def to_us(moment: datetime) -> int:
    """Whole microseconds since 1970."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def from_us(value: int) -> datetime:
    """The instant `value` microseconds after 1970 (UTC)."""
    return _EPOCH + timedelta(microseconds=value)


def lock_head(connection: Connection) -> Head:
    """The head, held by this transaction until it ends: changes happen one after the other."""
    row = connection.execute(select(AUDIT_HEAD).with_for_update()).one()
    return Head(row.registry_id, row.last_id, row.last_hash)


def append(
    connection: Connection, head: Head, *, at: datetime, actor: str, action: str, model: str, version: str, detail: str
) -> int:
    """Add an entry and move the head; returns its id, which is also the number of the change."""
    entry_id = head.last_id + 1
    fields = {
        "id": entry_id, "at_us": to_us(at), "actor": actor, "action": action, "model": model, "version": version,
        "detail": detail, "previous_hash": head.last_hash,
    }  # fmt: skip
    digest = entry_hash(fields)
    connection.execute(AUDIT.insert().values(**fields, hash=digest))
    connection.execute(AUDIT_HEAD.update().values(last_id=entry_id, last_hash=digest))
    head.last_id, head.last_hash = entry_id, digest
    return entry_id


def entry_hash(fields: dict[str, object]) -> str:
    """Hex SHA-256 over the entry's fields, the previous hash among them, in one unambiguous form."""
    names = ("id", "at_us", "actor", "action", "model", "version", "detail", "previous_hash")
    return hashlib.sha256(json.dumps([fields[name] for name in names]).encode()).hexdigest()


def page(connection: Connection, *, model: str, after: int, limit: int) -> Sequence[AuditEntry]:
    """Entries with an id above `after`, oldest first; empty `model` takes every model's.

    Raises:
        DataLossError: an entry or the one before it was changed or removed.
    """
    before = AUDIT.alias("before")
    query = (
        select(AUDIT, before.c.hash.label("hash_before"))
        .outerjoin(before, before.c.id == AUDIT.c.id - 1)
        .where(AUDIT.c.id > after)
        .order_by(AUDIT.c.id)
        .limit(limit)
    )
    if model:
        query = query.where(AUDIT.c.model == model)
    return [_checked(row) for row in connection.execute(query)]


def verify(connection: Connection) -> int:
    """Check the whole chain up to its head; returns how many entries it has.

    Raises:
        DataLossError: an entry was changed, removed or inserted.
    """
    head = connection.execute(select(AUDIT_HEAD)).one()
    expected = 0
    while True:
        rows = page(connection, model="", after=expected, limit=VERIFY_PAGE)
        for row in rows:
            expected += 1
            if row.id != expected:
                raise _broken(expected)
        if len(rows) < VERIFY_PAGE:
            break
    newest = connection.execute(select(AUDIT.c.hash).where(AUDIT.c.id == expected)).scalar() or GENESIS
    if (head.last_id, head.last_hash) != (expected, newest):
        raise _broken(expected + 1)
    return expected


def _checked(row: Row[tuple[object, ...]]) -> AuditEntry:
    fields = row._asdict()
    before = fields["hash_before"] if fields["id"] > 1 else GENESIS
    if fields["previous_hash"] != before or fields["hash"] != entry_hash(fields):
        raise _broken(fields["id"])
    return AuditEntry(
        id=fields["id"],
        at=from_us(fields["at_us"]),
        actor=fields["actor"],
        action=fields["action"],
        model=fields["model"],
        version=fields["version"],
        detail=fields["detail"],
    )


def _broken(entry_id: int) -> DataLossError:
    message = f"the audit trail was changed at entry {entry_id}: its chain of hashes is broken"
    return DataLossError("AUDIT_TAMPERED", message, {"entry": str(entry_id)})
