"""Who needs which table version. Every method blocks."""

from datetime import UTC, datetime, timedelta

from millrace_kit.clock import Clock
from millrace_kit.sql import reading, writing
from sqlalchemy import Engine, or_, select

from millrace_ingestion.models import Pin
from millrace_ingestion.tables import PIN

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class PinStore:
    """Pins in SQL; expired ones are invisible, and removed when somebody pins.

    Args:
        engine: the service's database.
        clock: what has expired.
    """

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock

    def _now_us(self) -> int:
        return (self._clock.now() - _EPOCH) // _MICROSECOND

    def put(self, pin: Pin) -> None:
        """Keep a pin in place of the owner's earlier one of the same version.

        Raises:
            UnavailableError: the database does not answer; so do the others.
        """
        now_us = self._now_us()
        place = (PIN.c.contract == pin.contract, PIN.c.version == pin.version, PIN.c.owner == pin.owner)
        values = {
            "contract": pin.contract,
            "version": pin.version,
            "owner": pin.owner,
            "expires_at_us": None if pin.expires_at is None else (pin.expires_at - _EPOCH) // _MICROSECOND,
            "pinned_at_us": now_us,
        }
        with writing(self._engine) as connection:
            connection.execute(PIN.delete().where(PIN.c.expires_at_us <= now_us))
            connection.execute(PIN.delete().where(*place))
            connection.execute(PIN.insert(), values)

    def remove(self, contract: str, version: int | None, owner: str) -> int:
        """Remove an owner's pins, of one version or of all; returns how many."""
        query = PIN.delete().where(PIN.c.contract == contract, PIN.c.owner == owner)
        if version is not None:
            query = query.where(PIN.c.version == version)
        with writing(self._engine) as connection:
            return connection.execute(query).rowcount

    def pins(self, contract: str) -> list[Pin]:
        """Pins that hold, by version and owner."""
        holds = or_(PIN.c.expires_at_us.is_(None), PIN.c.expires_at_us > self._now_us())
        query = select(PIN).where(PIN.c.contract == contract, holds).order_by(PIN.c.version, PIN.c.owner)
        with reading(self._engine) as connection:
            return [
                Pin(
                    row.contract,
                    row.version,
                    row.owner,
                    None if row.expires_at_us is None else _EPOCH + row.expires_at_us * _MICROSECOND,
                )
                for row in connection.execute(query)
            ]
