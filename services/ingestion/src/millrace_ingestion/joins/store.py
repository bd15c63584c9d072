"""How far joins are, in SQL. Every method blocks; callers use a thread.

A step is kept as a plan before its first record lands and done after its last one has: a process that takes over does the very same step
again, and the records that had landed are duplicates by their event ids.
"""

from dataclasses import dataclass

from millrace_kit.sql import reading, writing
from sqlalchemy import Engine, select

from millrace_ingestion.joins.position import Position
from millrace_ingestion.joins.tables import JOIN_POSITION


@dataclass(frozen=True)
class Kept:
    """What is stored of a join."""

    contract: str
    identity: str
    position: Position
    plan: Position | None
    """Where the step leads that was begun and may have landed in part."""


class JoinStore:
    """Positions of joins.

    Args:
        engine: the service's database.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def find(self, name: str) -> Kept | None:
        """What is stored of a join, removed or not.

        Raises:
            UnavailableError: the database does not answer; so do the others.
        """
        with reading(self._engine) as connection:
            row = connection.execute(select(JOIN_POSITION).where(JOIN_POSITION.c.name == name)).one_or_none()
        if row is None:
            return None
        plan = Position.decoded(row.plan) if row.plan else None
        return Kept(row.contract, row.identity, Position.decoded(row.position), plan)

    def begin(self, name: str, contract: str, identity: str, position: Position) -> None:
        """Keep where a join begins."""
        row = {"name": name, "contract": contract, "identity": identity, "position": position.encoded(), "plan": ""}
        with writing(self._engine) as connection:
            connection.execute(JOIN_POSITION.insert(), row)

    def plan(self, name: str, plan: Position) -> None:
        """Keep where the step leads that begins now."""
        self._update(name, plan=plan.encoded())

    def done(self, name: str, position: Position) -> None:
        """Keep that a step has landed."""
        self._update(name, position=position.encoded(), plan="")

    def _update(self, name: str, **values: str) -> None:
        with writing(self._engine) as connection:
            connection.execute(JOIN_POSITION.update().where(JOIN_POSITION.c.name == name).values(**values))
