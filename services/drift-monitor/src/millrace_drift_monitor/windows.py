"""Windows of event time: counting into them, closing them, judging what closed."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from sqlalchemy import Connection, Row, insert, select, update

from millrace_drift_monitor.ledger import CHUNK, Joined
from millrace_drift_monitor.profiles import Profile
from millrace_drift_monitor.records import Prediction
from millrace_drift_monitor.sketches import Counts, pack, unpack
from millrace_drift_monitor.tables import EVENT_WINDOW, PREDICTION

Key = tuple[str, str, int]
Profiles = Callable[[str, str], Profile | None]


@dataclass(frozen=True, slots=True)
class OpenWindow:
    """An open window, as far as closing it is concerned."""

    seq: int
    model: str
    start_us: int
    end_us: int
    max_event_us: int
    touched_us: int


@dataclass(frozen=True, slots=True)
class ClosingRule:
    """When a window is over; all in microseconds."""

    lateness_us: int
    horizon_us: int
    idle_us: int

    def due(self, windows: Sequence[OpenWindow], now_us: int, ready: Callable[[str], bool]) -> list[int]:
        """Sequence numbers of the windows to close now, oldest first.

        A window is over when a prediction of its model (any version) lies past its end and the lateness, but not further than
        the horizon; or when the wall clock does and nothing was added for a while. `ready` says whether a model's outcomes
        are being read; without them only the second rule counts.
        """
        events: dict[str, list[int]] = defaultdict(list)
        for window in windows:
            events[window.model].append(window.max_event_us)
        due = []
        for window in windows:
            over_us = window.end_us + self.lateness_us
            passed = ready(window.model) and any(
                over_us <= event_us < over_us + self.horizon_us for event_us in events[window.model]
            )
            idle = now_us >= over_us and now_us - window.touched_us >= self.idle_us
            if passed or idle:
                due.append((window.start_us, window.seq))
        return [seq for _start, seq in sorted(due)]


@dataclass(frozen=True, slots=True)
class WindowCounter:
    """Counts into windows inside one transaction.

    Args:
        connection: the transaction.
        window_us: length of a window.
        profiles: reference of a version, None while it has none.
        now_us: wall clock.
    """

    connection: Connection
    window_us: int
    profiles: Profiles
    now_us: int

    def add(self, predictions: Sequence[Prediction], joined: Sequence[Joined]) -> int:
        """Count new predictions and outcomes into their windows; returns how many predictions came after theirs had closed."""
        rows: dict[Key, list[Prediction]] = defaultdict(list)
        outcomes: dict[Key, list[Joined]] = defaultdict(list)
        for p in predictions:
            rows[p.model, p.version, p.event_us // self.window_us * self.window_us].append(p)
        for j in joined:
            if j.score is not None:
                outcomes[j.model, j.version, j.event_us // self.window_us * self.window_us].append(j)
        keys = sorted(rows.keys() | outcomes.keys())
        return sum(self._add_to_window(key, rows.get(key, []), outcomes.get(key, [])) for key in keys)

    def _add_to_window(self, key: Key, rows: Sequence[Prediction], outcomes: Sequence[Joined]) -> int:
        model, version, start_us = key
        query = select(EVENT_WINDOW).where(
            EVENT_WINDOW.c.model == model, EVENT_WINDOW.c.version == version, EVENT_WINDOW.c.start_us == start_us
        )
        window = self.connection.execute(query).first()
        if window is None:
            if not rows:
                return 0  # its window went with old rows
            window = _open_window(self.connection, key, self.window_us, self.now_us)
        if window.closed_us is not None:
            return len(rows)
        values: dict[str, object] = {
            "max_event_us": max([window.max_event_us, *(p.event_us for p in rows)]),
            "touched_us": self.now_us,
            "predictions": window.predictions + len(rows),
            "outcomes": window.outcomes + len(outcomes),
            "positives": window.positives + sum(j.label for j in outcomes),
            "correct": window.correct + sum(j.is_correct for j in outcomes),
        }
        profile = self.profiles(model, version)
        if profile is not None:
            if window.sketch is None:
                values["sketch"] = pack(rebuild_sketch(self.connection, profile, key, window.end_us))
            elif rows:
                added = count_rows(profile, [(p.features, p.score) for p in rows])
                values["sketch"] = pack(unpack(window.sketch) + added)
        self.connection.execute(update(EVENT_WINDOW).where(EVENT_WINDOW.c.seq == window.seq).values(values))
        return 0


def _open_window(connection: Connection, key: Key, window_us: int, now_us: int) -> Row[tuple[object, ...]]:
    model, version, start_us = key
    row = {
        "model": model,
        "version": version,
        "start_us": start_us,
        "end_us": start_us + window_us,
        "max_event_us": start_us,
        "touched_us": now_us,
        "predictions": 0,
        "outcomes": 0,
        "positives": 0,
        "correct": 0,
        "tests": 0,
    }
    return connection.execute(insert(EVENT_WINDOW).returning(*EVENT_WINDOW.c), row).one()


def count_rows(profile: Profile, rows: Sequence[tuple[bytes, float | None]]) -> Counts:
    """Sketch of rows given as (features as float64 bytes, score).

    Rows whose features were not sampled, or that have another length than the reference, count for the output alone.
    """
    sketch = profile.layout.empty()
    width = profile.output
    whole = [features for features, _score in rows if len(features) == 8 * width]
    matrix = np.frombuffer(b"".join(whole), dtype="<f8").reshape(len(whole), width)
    for index in range(width):
        profile.layout.part(sketch, index)[:] = profile.layout.columns[index].count(matrix[:, index])
    scores = np.array([score for _features, score in rows if score is not None], dtype=np.float64)
    profile.layout.part(sketch, width)[:] = profile.layout.columns[width].count(scores)
    return sketch


def rebuild_sketch(connection: Connection, profile: Profile, key: Key, end_us: int) -> Counts:
    """Sketch of a window from the stored predictions: for those that came before their version's reference."""
    model, version, start_us = key
    sketch = profile.layout.empty()
    query = (
        select(PREDICTION.c.features, PREDICTION.c.score)
        .where(PREDICTION.c.model == model, PREDICTION.c.version == version)
        .where(PREDICTION.c.event_us >= start_us, PREDICTION.c.event_us < end_us)
        .where(PREDICTION.c.pinned.is_(False), PREDICTION.c.cached.is_(False))
        .execution_options(yield_per=CHUNK)
    )
    for part in connection.execute(query).partitions():
        sketch = sketch + count_rows(profile, [(row.features, row.score) for row in part])
    return sketch


def open_windows(connection: Connection, model: str = "") -> list[OpenWindow]:
    """Windows that are not closed, of one model or all."""
    columns = [EVENT_WINDOW.c[name] for name in ("seq", "model", "start_us", "end_us", "max_event_us", "touched_us")]
    query = select(*columns).where(EVENT_WINDOW.c.closed_us.is_(None))
    if model:
        query = query.where(EVENT_WINDOW.c.model == model)
    return [OpenWindow(*row) for row in connection.execute(query)]
