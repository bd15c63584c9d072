"""The drift monitor's database: every transaction that changes what the stream, the registry or a reference say.

Writers take turns (`write`), in one process and over all replicas, so a check and the insert that follows it cannot be interleaved.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from millrace_kit.bus import TopicPartition, records_topic
from millrace_kit.errors import AlreadyExistsError
from millrace_kit.sql import migrate, open_engine, reading, take_turn, writing
from sqlalchemy import Connection, Engine, and_, insert, select, update

from millrace_drift_monitor import tracking
from millrace_drift_monitor.ledger import Known, Taken, adopt, take_outcomes, take_predictions
from millrace_drift_monitor.profiles import Profile, dump_profile, load_profile
from millrace_drift_monitor.records import OutcomeBatch, OutcomeSpec, PredictionBatch
from millrace_drift_monitor.tables import (
    FIGURE_TOTAL,
    MODEL_INFO,
    POSITION,
    REFERENCE,
    VERSION_INFO,
)
from millrace_drift_monitor.tracking import Tracked
from millrace_drift_monitor.windows import OpenWindow, WindowCounter, open_windows

MIGRATIONS = Path(__file__).parent / "migrations"
WRITE_LOCK = 0x64726966
# Profiles held in memory; a reference never changes, so a copy is never stale.
PROFILE_CACHE = 64


@dataclass(frozen=True, slots=True)
class Applied:
    """What one transaction of the stream did."""

    taken: Taken
    late: int


class Store:
    """Everything the drift monitor keeps.

    Args:
        engine: the database, at the newest schema.
        window_us: length of a window.
    """

    def __init__(self, engine: Engine, window_us: int) -> None:
        self.engine = engine
        self._window_us = window_us
        self._lock = threading.Lock()
        self._profiles: OrderedDict[tuple[str, str], Profile] = OrderedDict()

    @classmethod
    def open(cls, url: str, window_us: int) -> "Store":
        """Open the database and bring its schema up to date."""
        engine = open_engine(url)
        migrate(engine, MIGRATIONS)
        return cls(engine, window_us)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that changes something; they take turns."""
        with self._lock, writing(self.engine) as connection:
            take_turn(connection, WRITE_LOCK)
            yield connection

    # The stream.

    def positions(self) -> dict[TopicPartition, int]:
        """Next offset to read of every log."""
        with reading(self.engine) as connection:
            return {TopicPartition(r.topic, r.partition): r.next_offset for r in connection.execute(select(POSITION))}

    def apply(
        self,
        predictions: Sequence[PredictionBatch],
        outcomes: Sequence[OutcomeBatch],
        positions: Mapping[TopicPartition, int],
        known: Known,
        now_us: int,
        *,
        starts: Mapping[TopicPartition, int],
    ) -> Applied | None:
        """Take in what was fetched, and the positions after it, in one transaction.

        Returns None and changes nothing when another model than those of `known` became known since the messages were decoded (its
        outcomes may have to be read from the beginning), when other values are tracked now, or when a position is no longer the one in `starts` that was read from
        (another replica reads that partition now): the caller starts over.
        """
        taken = Taken()
        with self.write() as connection:
            now_known = known_of(connection)
            if now_known.specs.keys() != known.specs.keys() or now_known.tracked != known.tracked:
                return None
            if not _stand_at(connection, {p: starts.get(p, 0) for p in positions}):
                return None
            take_predictions(connection, predictions, now_known, now_us, taken)
            for batch in outcomes:
                take_outcomes(connection, batch, now_known, now_us, taken)
            late = self._add_to_windows(connection, taken, now_us)
            for place, offset in positions.items():
                _keep_position(connection, place, offset)
        return Applied(taken, late)

    def _add_to_windows(self, connection: Connection, taken: Taken, now_us: int) -> int:
        def profile_of(model: str, version: str) -> Profile | None:
            return self.profile(connection, model, version)

        return WindowCounter(connection, self._window_us, profile_of, now_us).add(taken.predictions, taken.joined)

    def open_windows(self, model: str = "") -> list[OpenWindow]:
        """Windows not closed yet."""
        with reading(self.engine) as connection:
            return open_windows(connection, model)

    # What the registry said.

    def known(self) -> Known:
        """Outcome specification, and tracked values, of every model that has them."""
        with reading(self.engine) as connection:
            return known_of(connection)

    def track(self, model: str, values: Sequence[Tracked]) -> None:
        """Keep sums of these values of the model's outcomes from now on, and of no others."""
        with self.write() as connection:
            tracking.replace(connection, model, values)

    def unknown_models(self) -> list[str]:
        """Models that were predicted with but that the registry was not asked about yet."""
        query = select(FIGURE_TOTAL.c.model).distinct().where(FIGURE_TOTAL.c.model.not_in(select(MODEL_INFO.c.model)))
        with reading(self.engine) as connection:
            return sorted(connection.execute(query).scalars())

    def unknown_versions(self) -> list[tuple[str, str]]:
        """The same for versions."""
        joined = FIGURE_TOTAL.outerjoin(
            VERSION_INFO,
            and_(VERSION_INFO.c.model == FIGURE_TOTAL.c.model, VERSION_INFO.c.version == FIGURE_TOTAL.c.version),
        )
        query = (
            select(FIGURE_TOTAL.c.model, FIGURE_TOTAL.c.version)
            .select_from(joined)
            .where(VERSION_INFO.c.model.is_(None))
            .order_by(FIGURE_TOTAL.c.model, FIGURE_TOTAL.c.version)
        )
        with reading(self.engine) as connection:
            return [(row.model, row.version) for row in connection.execute(query)]

    def learn_model(self, model: str, spec: OutcomeSpec, now_us: int) -> Applied:
        """Keep a model's outcome specification and join what came before it.

        Outcomes that were read for other models with other columns are read again from the beginning for this one.
        """
        taken = Taken()
        with self.write() as connection:
            known = known_of(connection)
            if model in known.specs:
                return Applied(taken, 0)
            values = {
                "contract": spec.contract,
                "subject_column": spec.subject_column,
                "label_column": spec.label_column,
                "threshold": spec.threshold,
                "numeric": spec.numeric,
            }
            connection.execute(insert(MODEL_INFO), {"model": model, **values})
            if spec.source and spec.source not in {other.source for other in known.specs.values()}:
                topic = records_topic(spec.contract)
                connection.execute(update(POSITION).where(POSITION.c.topic == topic).values(next_offset=0))
            adopt(connection, model, Known({**known.specs, model: spec}, known.tracked), taken)
            late = self._add_to_windows(connection, taken, now_us)
        return Applied(taken, late)

    def learn_version(self, model: str, version: str, digest: str, feature_names: Sequence[str]) -> None:
        """Keep what the registry says of a version."""
        with self.write() as connection:
            here = (VERSION_INFO.c.model == model) & (VERSION_INFO.c.version == version)
            if connection.execute(select(VERSION_INFO.c.model).where(here)).first() is None:
                row = {
                    "model": model,
                    "version": version,
                    "digest": digest,
                    "feature_names": json.dumps([*feature_names]),
                }
                connection.execute(insert(VERSION_INFO), row)

    # References.

    def profile(self, connection: Connection, model: str, version: str) -> Profile | None:
        """The reference of a version; None when it has none yet."""
        key = (model, version)
        if key not in self._profiles:
            query = select(REFERENCE.c.profile).where(REFERENCE.c.model == model, REFERENCE.c.version == version)
            content = connection.execute(query).scalar()
            if content is None:
                return None
            self._profiles[key] = load_profile(bytes(content))
            if len(self._profiles) > PROFILE_CACHE:
                self._profiles.popitem(last=False)
        return self._profiles[key]

    def find_reference(self, model: str, version: str, request_sha256: str) -> tuple[int, int] | None:
        """(rows, features) of the version's reference when the same request made it; None when it has none.

        Raises:
            AlreadyExistsError: another request made it; a reference is frozen.
        """
        with reading(self.engine) as connection:
            return _same_reference(connection, model, version, request_sha256)

    def keep_reference(
        self,
        model: str,
        version: str,
        profile: Profile,
        *,
        training_set_digest: str,
        request_sha256: str,
        now_us: int,
    ) -> None:
        """Freeze a version's reference; the first of two equal requests wins, a different one is refused."""
        with self.write() as connection:
            if _same_reference(connection, model, version, request_sha256) is not None:
                return
            row = {
                "model": model,
                "version": version,
                "training_set_digest": training_set_digest,
                "request_sha256": request_sha256,
                "rows": profile.rows,
                "features": len(profile.feature_names),
                "profile": dump_profile(profile),
                "stored_us": now_us,
            }
            connection.execute(insert(REFERENCE), row)


def known_of(connection: Connection) -> Known:
    """Everything known of models."""
    return Known(specs_of(connection), tracking.tracked_of(connection))


def specs_of(connection: Connection) -> dict[str, OutcomeSpec]:
    """Outcome specification of every model known so far."""
    return {
        row.model: OutcomeSpec(row.contract, row.subject_column, row.label_column, row.threshold, row.numeric)
        for row in connection.execute(select(MODEL_INFO))
    }


def _stand_at(connection: Connection, positions: Mapping[TopicPartition, int]) -> bool:
    """Whether the stored positions are these."""
    stored = {TopicPartition(r.topic, r.partition): r.next_offset for r in connection.execute(select(POSITION))}
    return all(stored.get(place, 0) == offset for place, offset in positions.items())


def _keep_position(connection: Connection, place: TopicPartition, offset: int) -> None:
    here = (POSITION.c.topic == place.topic) & (POSITION.c.partition == place.partition)
    if connection.execute(update(POSITION).where(here).values(next_offset=offset)).rowcount == 0:
        row = {"topic": place.topic, "partition": place.partition, "next_offset": offset}
        connection.execute(insert(POSITION), row)


def _same_reference(connection: Connection, model: str, version: str, request_sha256: str) -> tuple[int, int] | None:
    columns = (REFERENCE.c.request_sha256, REFERENCE.c.training_set_digest, REFERENCE.c.rows, REFERENCE.c.features)
    query = select(*columns).where(REFERENCE.c.model == model, REFERENCE.c.version == version)
    row = connection.execute(query).first()
    if row is None:
        return None
    if row.request_sha256 != request_sha256:
        difference = f"it was made from training set {row.training_set_digest} with other contents of the request"
        raise AlreadyExistsError("reference", f"{model} {version}", difference)
    return row.rows, row.features
