"""Listens to drift findings and starts retraining runs; writes down why a finding started none."""

import asyncio
import logging
from collections.abc import Callable

from google.protobuf.message import DecodeError
from millrace_api.events.v1.events_pb2 import DriftFound
from millrace_kit.bus import DRIFT, Bus, Message
from millrace_kit.clock import Clock
from millrace_kit.errors import MillraceError
from millrace_kit.server import Worker
from millrace_kit.telemetry import consumer_span

from millrace_training_coordinator import metrics
from millrace_training_coordinator.convert import to_finding
from millrace_training_coordinator.retrain import Verdict
from millrace_training_coordinator.retrain_store import Decided, RetrainStore

log = logging.getLogger(__name__)

GROUP = "training-coordinator"
FETCH_S = 0.5
RETRY_S = 1.0


class RetrainWorker:
    """Reads `millrace.drift`.

    Args:
        bus: where findings come from.
        store: decides and keeps the positions.
        started: called on the event loop after runs were started.
        clock: source of the time.
    """

    def __init__(self, bus: Bus, store: RetrainStore, started: Callable[[], None], clock: Clock) -> None:
        self._bus = bus
        self._store = store
        self._started = started
        self._clock = clock

    @property
    def worker(self) -> Worker:
        """The background task for a `Service`."""
        return Worker("retrain", self.run)

    async def run(self, stop: asyncio.Event) -> None:
        """Read until `stop` is set; a bus that does not answer is asked again."""
        while not stop.is_set():
            try:
                await self._read(stop)
            except MillraceError as error:
                log.warning("drift findings cannot be read, trying again in %.0f s: %s", RETRY_S, error)
                await asyncio.sleep(RETRY_S)

    async def _read(self, stop: asyncio.Event) -> None:
        positions = await asyncio.to_thread(self._store.positions, DRIFT)
        subscription = await self._bus.subscribe([DRIFT], group=GROUP, at=positions)
        try:
            while not stop.is_set():
                for message in await subscription.fetch(timeout_s=FETCH_S):
                    with consumer_span("retrain", message.headers):
                        await self.handle(message)
        finally:
            await subscription.close()

    async def handle(self, message: Message) -> None:
        """Decide on one message; one that cannot be read is passed and counted."""
        event = DriftFound()
        try:
            event.ParseFromString(message.value)
        except DecodeError:
            log.exception("message %d of %s is no DriftFound; passed", message.offset, message.topic)
            metrics.RETRAIN.labels(Verdict.UNUSABLE.value).inc()
            event.Clear()
        findings = [to_finding(finding, event.model) for finding in event.findings]
        decided = await asyncio.to_thread(
            self._store.take, message.place, message.offset + 1, findings, self._clock.now()
        )
        for decision in decided:
            self._tell(decision)
        heard = {decision.finding.id for decision in decided}
        for finding in findings:
            if finding.id not in heard:
                metrics.RETRAIN.labels("unheard").inc()
                log.info("drift finding %s: no pipeline retrains model %s, or seen before", finding.id, finding.model)
        if any(decision.verdict is Verdict.STARTED for decision in decided):
            self._started()

    def _tell(self, decision: Decided) -> None:
        metrics.RETRAIN.labels(decision.verdict.value).inc()
        if decision.verdict is Verdict.STARTED:
            log.info("drift finding %s: run %s of %s started", decision.finding.id, decision.run_id, decision.pipeline)
        else:
            log.info(
                "drift finding %s: %s not retrained (%s): %s",
                decision.finding.id, decision.pipeline, decision.verdict.value, decision.reason,
            )  # fmt: skip
