"""The stream worker: bus messages in, windows closed, in a loop that loses nothing however it ends.

Replicas share the partitions. Positions are kept with the effects in one transaction, which goes through only while they are the ones its
messages were read from; so a partition that moved to another replica meanwhile is not counted twice.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence

from millrace_kit.bus import PREDICTIONS, Bus, Message, Subscription, TopicPartition, records_topic
from millrace_kit.clock import Clock
from millrace_kit.errors import MillraceError, UnavailableError

from millrace_drift_monitor import metrics
from millrace_drift_monitor.closing import Closed, Closer
from millrace_drift_monitor.convert import MalformedError, decode_outcomes, decode_predictions, now_micros
from millrace_drift_monitor.ledger import Known
from millrace_drift_monitor.records import MICROS, OutcomeBatch, OutcomeSpec, PredictionBatch
from millrace_drift_monitor.store import Applied, Store

log = logging.getLogger(__name__)

GROUP = "drift-monitor"
FETCH_TIMEOUT_S = 0.2
RETRY_MIN_S = 0.1
RETRY_MAX_S = 5.0
LAG_INTERVAL_S = 5.0


def count_applied(applied: Applied) -> None:
    """Add what a committed transaction did to the metrics."""
    taken = applied.taken
    metrics.PREDICTIONS.inc(len(taken.predictions))
    metrics.NOT_EVIDENCE.inc(taken.not_evidence)
    metrics.OUTCOMES.inc(taken.outcomes)
    metrics.JOINED.inc(len(taken.joined))
    metrics.LATE.inc(applied.late)
    metrics.DUPLICATES.labels("prediction").inc(taken.duplicate_predictions)
    metrics.DUPLICATES.labels("batch").inc(taken.duplicate_batches)


def count_closed(closed: Sequence[Closed]) -> None:
    """Add closed windows to the metrics and the log."""
    for window in closed:
        metrics.WINDOWS.inc()
        for verdict in window.findings:
            metrics.FINDINGS.labels(verdict.kind.value).inc()
        log.info(
            "window of %s %s closed: %d tests, %d findings",
            window.model,
            window.version,
            window.tests,
            len(window.findings),
        )


class Monitor:
    """Follows predictions and outcomes.

    Args:
        bus: where both come from.
        store: where they go; it keeps the positions too.
        closer: closes windows.
        clock: wall clock.
        fetch_messages: messages in one transaction.
        max_ahead_s: how far in the future an event time may lie.
    """

    def __init__(
        self,
        bus: Bus,
        store: Store,
        closer: Closer,
        clock: Clock,
        *,
        fetch_messages: int,
        max_ahead_s: float,
    ) -> None:
        self._bus = bus
        self._store = store
        self._closer = closer
        self._clock = clock
        self._fetch_messages = fetch_messages
        self._max_ahead_us = int(max_ahead_s * MICROS)
        self._known = Known()
        self._positions: dict[TopicPartition, int] = {}
        self._mine: dict[TopicPartition, int] = {}
        self._next_lag = 0.0

    async def run(self, stop: asyncio.Event) -> None:
        """Follow until `stop` is set; what fails for a while is tried again, from the positions last committed."""
        retry_s = RETRY_MIN_S
        while not stop.is_set():
            try:
                await self._follow(stop)
                retry_s = RETRY_MIN_S
            except MillraceError as error:
                metrics.RETRIES.labels("stream").inc()
                log.warning("stream interrupted, again in %.1f s: %s", retry_s, error)
                try:
                    await asyncio.wait_for(stop.wait(), retry_s)
                except TimeoutError:
                    retry_s = min(RETRY_MAX_S, retry_s * 2)

    async def _follow(self, stop: asyncio.Event) -> None:
        """Read with one set of topics until it has to change."""
        self._known = await asyncio.to_thread(self._store.known)
        topics = self._topics()
        subscription = await self._bus.subscribe(topics, group=GROUP, starts=self._starts)
        try:
            while not stop.is_set():
                messages = await subscription.fetch(max_messages=self._fetch_messages, timeout_s=FETCH_TIMEOUT_S)
                if messages:
                    applied = await asyncio.to_thread(self._apply, messages)
                    if applied is None:
                        return
                    count_applied(applied)
                if len(messages) < self._fetch_messages:
                    await self._close_due()
                await self._measure_lag(subscription)
                known = await asyncio.to_thread(self._store.known)
                if known.specs.keys() != self._known.specs.keys():
                    return
                self._known = known
        finally:
            await subscription.close()

    def _starts(self, _places: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Where to begin in partitions that just came."""
        self._positions = self._store.positions()
        self._mine.clear()
        return self._positions

    def _topics(self) -> list[str]:
        contracts = {spec.contract for spec in self._known.specs.values() if spec.contract}
        return [PREDICTIONS, *(records_topic(contract) for contract in sorted(contracts))]

    def _apply(self, messages: Sequence[Message]) -> Applied | None:
        now_us = now_micros(self._clock.now())
        predictions: list[PredictionBatch] = []
        outcomes: list[OutcomeBatch] = []
        positions: dict[TopicPartition, int] = {}
        for message in messages:
            positions[message.place] = message.offset + 1
            try:
                if message.topic == PREDICTIONS:
                    batch, bad = decode_predictions(message.topic, message.value, now_us, self._max_ahead_us)
                    predictions.append(batch)
                    metrics.MALFORMED.labels("prediction").inc(bad)
                else:
                    specs, columns = self._outcome_specs(message.topic)
                    batches, bad = decode_outcomes(message.topic, message.value, specs, columns)
                    outcomes += batches
                    metrics.MALFORMED.labels("outcomes").inc(bad)
            except MalformedError as error:
                metrics.MALFORMED.labels("message").inc()
                log.warning("message %s/%d/%d left out: %s", message.topic, message.partition, message.offset, error)
        applied = self._store.apply(predictions, outcomes, positions, self._known, now_us, starts=self._positions)
        if applied is not None:
            self._positions.update(positions)
            self._mine.update(positions)
        return applied

    def _outcome_specs(self, topic: str) -> tuple[list[OutcomeSpec], dict[str, set[str]]]:
        """Whose outcomes a topic has, and by source the columns that are tracked."""
        specs: list[OutcomeSpec] = []
        columns: dict[str, set[str]] = {}
        for model, spec in self._known.specs.items():
            if spec.contract and records_topic(spec.contract) == topic:
                specs.append(spec)
                wanted = columns.setdefault(spec.source, set())
                wanted.update(*(value.columns for value in self._known.tracked.get(model, ())))
        return specs, columns

    async def _close_due(self) -> None:
        now_us = now_micros(self._clock.now())
        closed = await asyncio.to_thread(self._closer.close_due, now_us, self._known.specs.__contains__)
        count_closed(closed)

    async def _measure_lag(self, subscription: Subscription) -> None:
        now = self._clock.monotonic()
        if now < self._next_lag:
            return
        self._next_lag = now + LAG_INTERVAL_S
        positions = await asyncio.to_thread(self._store.positions)
        lags: dict[str, int] = {}
        for place, end in (await subscription.end_offsets()).items():
            lags[place.topic] = lags.get(place.topic, 0) + max(0, end - positions.get(place, 0))
        for topic, lag in lags.items():
            metrics.LAG.labels(topic).set(lag)
        await self._tell_bus(subscription)

    async def _tell_bus(self, subscription: Subscription) -> None:
        """The bus too knows the positions, for those who watch or scale by the group's lag; nobody reads from there."""
        mine, self._mine = self._mine, {}
        if not mine:
            return
        try:
            await subscription.commit(mine)
        except UnavailableError as error:
            log.info("the bus did not take the group's positions: %s", error.message)
