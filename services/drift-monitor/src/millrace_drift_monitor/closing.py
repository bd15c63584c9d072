"""Closes windows: judges the counts, keeps the findings and enqueues the message that tells of them, in one transaction."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from millrace_api.events.v1 import events_pb2
from millrace_kit.bus import DRIFT, Outgoing
from millrace_kit.clock import IdSource
from millrace_kit.outbox import enqueue
from sqlalchemy import Connection, insert, select, update

from millrace_drift_monitor.convert import finding_message
from millrace_drift_monitor.settings import Thresholds
from millrace_drift_monitor.sketches import pack, unpack
from millrace_drift_monitor.store import Store
from millrace_drift_monitor.tables import EVENT_WINDOW, FINDING, OUTBOX
from millrace_drift_monitor.verdicts import Verdict, WindowCounts, judge, summarize
from millrace_drift_monitor.windows import ClosingRule, rebuild_sketch


@dataclass(frozen=True, slots=True)
class Closed:
    """A window that was closed just now."""

    model: str
    version: str
    start_us: int
    end_us: int
    tests: int
    findings: Sequence[Verdict]


class Closer:
    """Closes windows that are over.

    Args:
        store: the drift monitor's database.
        rule: when a window is over.
        thresholds: what counts as a finding.
        min_count: rows a window needs to be tested.
        new_id: ids of findings.
    """

    def __init__(
        self, store: Store, rule: ClosingRule, thresholds: Thresholds, min_count: int, new_id: IdSource
    ) -> None:
        self._store = store
        self._rule = rule
        self._thresholds = thresholds
        self._min_count = min_count
        self._new_id = new_id

    def close_due(self, now_us: int, ready: Callable[[str], bool]) -> list[Closed]:
        """Close every window that is over."""
        due = self._rule.due(self._store.open_windows(), now_us, ready)
        return [closed for seq in due if (closed := self._close(seq, now_us)) is not None]

    def close_all(self, model: str, now_us: int) -> list[Closed]:
        """Close every open window of `model`, over or not."""
        windows = sorted(self._store.open_windows(model), key=lambda w: (w.start_us, w.seq))
        return [closed for w in windows if (closed := self._close(w.seq, now_us)) is not None]

    def _close(self, seq: int, now_us: int) -> Closed | None:
        with self._store.write() as connection:
            query = select(EVENT_WINDOW).where(EVENT_WINDOW.c.seq == seq, EVENT_WINDOW.c.closed_us.is_(None))
            window = connection.execute(query).first()
            if window is None:
                return None
            verdicts = self._judge(connection, window)
            findings = [verdict for verdict in verdicts if verdict.is_finding]
            closing = update(EVENT_WINDOW).where(EVENT_WINDOW.c.seq == seq)
            connection.execute(closing.values(closed_us=now_us, tests=len(verdicts)))
            self._keep(connection, window, findings, now_us)
        return Closed(window.model, window.version, window.start_us, window.end_us, len(verdicts), findings)

    def _judge(self, connection: Connection, window: Any) -> list[Verdict]:
        profile = self._store.profile(connection, window.model, window.version)
        if profile is None:
            return []
        if window.sketch is None:
            key = (window.model, window.version, window.start_us)
            sketch = rebuild_sketch(connection, profile, key, window.end_us)
            changed = update(EVENT_WINDOW).where(EVENT_WINDOW.c.seq == window.seq).values(sketch=pack(sketch))
            connection.execute(changed)
        else:
            sketch = unpack(window.sketch)
        counts = WindowCounts(sketch, window.outcomes, window.positives, window.correct)
        return judge(profile, counts, self._thresholds, self._min_count)

    def _keep(self, connection: Connection, window: Any, findings: Sequence[Verdict], now_us: int) -> None:
        if not findings:
            return
        rows = [self._row(window, verdict, now_us) for verdict in findings]
        kept = connection.execute(insert(FINDING).returning(*FINDING.c, sort_by_parameter_order=True), rows).all()
        message = events_pb2.DriftFound(
            model=window.model, version=window.version, findings=[finding_message(row) for row in kept]
        )
        enqueue(connection, OUTBOX, [Outgoing(DRIFT, window.model, message.SerializeToString())])

    def _row(self, window: Any, verdict: Verdict, now_us: int) -> dict[str, object]:
        comparison = verdict.comparison
        return {
            "id": self._new_id(),
            "model": window.model,
            "version": window.version,
            "start_us": window.start_us,
            "end_us": window.end_us,
            "kind": verdict.kind.value,
            "feature": verdict.feature,
            "test": verdict.test,
            "statistic": comparison.statistic,
            "p_value": verdict.adjusted_p,
            "effect": comparison.effect,
            "threshold": verdict.threshold,
            "reference_count": comparison.reference_count,
            "window_count": comparison.window_count,
            "found_us": now_us,
            "summary": summarize(verdict),
        }
