"""Contracts, batches and dead letters in SQL. Every method blocks; callers use a thread.

A group is written before its Delta commit (the intent: `table_version` is null) and completed after it. What belongs to an intent is
invisible to readers until then, and goes when the intent is discarded.
"""

from datetime import UTC, datetime, timedelta

from millrace_kit.clock import Clock
from millrace_kit.errors import ConflictError
from millrace_kit.sql import reading, writing
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import IntegrityError

from millrace_ingestion.held_store import hold, unhold
from millrace_ingestion.letter_rows import letter_rows
from millrace_ingestion.models import Entry, Group, Outcome
from millrace_ingestion.tables import BATCH, COMMIT, CONTRACT, DEAD_LETTER

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# Parameters of one statement stay below every database's limit.
_IDS_PER_STATEMENT = 1_000


class Store:
    """The service's database.

    Args:
        engine: where it is; the schema is there.
        clock: time of registrations and dead letters.
    """

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock

    def _now_us(self) -> int:
        return (self._clock.now() - _EPOCH) // _MICROSECOND

    def contracts(self) -> list[tuple[int, bytes]]:
        """Version and body of each contract's newest version, by name."""
        newest = select(CONTRACT.c.name, func.max(CONTRACT.c.version).label("version")).group_by(CONTRACT.c.name)
        found = newest.subquery()
        query = (
            select(CONTRACT.c.version, CONTRACT.c.body)
            .join(found, (CONTRACT.c.name == found.c.name) & (CONTRACT.c.version == found.c.version))
            .order_by(CONTRACT.c.name)
        )
        with reading(self._engine) as connection:
            return [(row.version, bytes(row.body)) for row in connection.execute(query)]

    def versions(self, name: str) -> list[tuple[int, bytes]]:
        """Version and body of every version of one contract, oldest first."""
        query = select(CONTRACT.c.version, CONTRACT.c.body).where(CONTRACT.c.name == name).order_by(CONTRACT.c.version)
        with reading(self._engine) as connection:
            return [(row.version, bytes(row.body)) for row in connection.execute(query)]

    def add_contract(self, name: str, version: int, body: bytes) -> None:
        """Keep a new version.

        Raises:
            ConflictError: somebody else registered that version first.
        """
        row = {"name": name, "version": version, "body": body, "registered_at_us": self._now_us()}
        try:
            with writing(self._engine) as connection:
                connection.execute(CONTRACT.insert(), row)
        except IntegrityError:
            metadata = {"contract": name, "version": str(version)}
            message = f"version {version} of contract {name!r} was registered meanwhile"
            raise ConflictError("CONTRACT_CHANGED", message, metadata) from None

    def last_offset(self, contract: str, source: str) -> int:
        """Offset of the source's last batch that landed; 0 for none."""
        query = select(func.max(BATCH.c.offset)).where(BATCH.c.contract == contract, BATCH.c.source == source)
        with reading(self._engine) as connection:
            return int(connection.execute(query).scalar() or 0)

    def outcome(self, contract: str, source: str, offset: int) -> Outcome | None:
        """What became of a batch the first time."""
        query = (
            select(BATCH, COMMIT.c.table_version)
            .join(COMMIT, BATCH.c.group_id == COMMIT.c.id)
            .where(BATCH.c.contract == contract, BATCH.c.source == source, BATCH.c.offset == offset)
        )
        with reading(self._engine) as connection:
            row = connection.execute(query).one_or_none()
        if row is None or row.table_version is None:
            return None
        return Outcome(
            contract,
            source,
            offset,
            row.accepted,
            row.duplicates,
            row.rejected,
            row.table_version,
            replayed=True,
            quarantined=row.quarantined,
        )

    def record(self, group: Group, table_version: int | None) -> None:
        """Keep a group with its batches and dead letters; without a version it is an intent."""
        now = self._now_us()
        batches = [_batch_row(group, entry) for entry in group.entries]
        letters = [row for entry in group.entries for row in letter_rows(group, entry, now)]
        landed = [letter for entry in group.entries for letter in entry.landed_letters]
        with writing(self._engine) as connection:
            connection.execute(
                COMMIT.insert(),
                {
                    "id": group.id,
                    "contract": group.contract,
                    "contract_version": group.contract_version,
                    "base_version": group.base_version,
                    "table_version": table_version,
                    "created_at_us": now,
                },
            )
            connection.execute(BATCH.insert(), batches)
            if letters:
                connection.execute(DEAD_LETTER.insert(), letters)
            hold(connection, group, now)
            for start in range(0, len(landed), _IDS_PER_STATEMENT):
                ids = landed[start : start + _IDS_PER_STATEMENT]
                connection.execute(
                    DEAD_LETTER.update().where(DEAD_LETTER.c.id.in_(ids)).values(replay_group_id=group.id)
                )

    def finish(self, group_id: str, table_version: int) -> None:
        """Complete an intent: its Delta commit is done and its records are on the bus."""
        with writing(self._engine) as connection:
            connection.execute(COMMIT.update().where(COMMIT.c.id == group_id).values(table_version=table_version))

    def discard(self, group_id: str) -> None:
        """Forget an intent whose Delta commit never happened."""
        with writing(self._engine) as connection:
            connection.execute(BATCH.delete().where(BATCH.c.group_id == group_id))
            connection.execute(DEAD_LETTER.delete().where(DEAD_LETTER.c.group_id == group_id))
            connection.execute(
                DEAD_LETTER.update().where(DEAD_LETTER.c.replay_group_id == group_id).values(replay_group_id=None)
            )
            unhold(connection, group_id)
            connection.execute(COMMIT.delete().where(COMMIT.c.id == group_id))

    def intents(self, contract: str) -> list[Group]:
        """Groups that were not completed, oldest first."""
        query = (
            select(COMMIT)
            .where(COMMIT.c.contract == contract, COMMIT.c.table_version.is_(None))
            .order_by(COMMIT.c.base_version, COMMIT.c.created_at_us)
        )
        with reading(self._engine) as connection:
            rows = connection.execute(query).all()
        return [Group(row.id, row.contract, row.contract_version, row.base_version) for row in rows]


def _batch_row(group: Group, entry: Entry) -> dict[str, object]:
    return {
        "contract": group.contract,
        "source": entry.source,
        "offset": entry.offset,
        "group_id": group.id,
        "accepted": entry.accepted,
        "duplicates": entry.duplicates,
        "rejected": entry.rejected,
        "quarantined": entry.quarantined,
    }
