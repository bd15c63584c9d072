"""Asks the registry about models and versions that were predicted with, until it answers; nothing waits for it meanwhile."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import grpc
import grpc.aio
from millrace_api.registry.v1 import registry_pb2, registry_pb2_grpc
from millrace_kit.clock import Clock
from millrace_kit.errors import MillraceError
from prometheus_client import Counter

from millrace_drift_monitor.convert import now_micros
from millrace_drift_monitor.records import OutcomeSpec
from millrace_drift_monitor.store import Applied, Store

log = logging.getLogger(__name__)

# Names whose next question is remembered; the rest are asked about in the next round.
MAX_WAITING = 1000
# Questions in one round.
MAX_ROUND = 50
FAILURES = Counter("millrace_drift_registry_failures_total", "Questions the registry did not answer.", ["reason"])


class Catalog:
    """Learns outcome specifications and feature names.

    Args:
        store: where answers are kept, for good: a model's specification and a version's signature never change.
        channel: to the registry; its calls have a deadline.
        clock: wall clock.
        retry_s: wait before asking about the same name again.
        on_joined: told of outcomes that were joined by what was learned.
    """

    def __init__(
        self,
        store: Store,
        channel: grpc.aio.Channel,
        clock: Clock,
        retry_s: float,
        on_joined: Callable[[Applied], None],
    ) -> None:
        self._store = store
        self._registry = registry_pb2_grpc.RegistryServiceStub(channel)
        self._clock = clock
        self._retry_s = retry_s
        self._on_joined = on_joined
        self._next_try: dict[tuple[str, str], float] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Ask until `stop` is set."""
        while not stop.is_set():
            await self.ask()
            try:
                await asyncio.wait_for(stop.wait(), min(self._retry_s, 1.0))
            except TimeoutError:
                continue

    async def ask(self) -> None:
        """One round: ask about every name that is unknown and not waiting for its next try."""
        models = [(model, "") for model in await asyncio.to_thread(self._store.unknown_models)]
        versions = await asyncio.to_thread(self._store.unknown_versions)
        now = self._clock.monotonic()
        due = [key for key in [*models, *versions] if self._next_try.get(key, 0.0) <= now]
        for model, version in due[:MAX_ROUND]:
            question = self._learn_version(model, version) if version else self._learn_model(model)
            if not await self._answered(model, version, question):
                if len(self._next_try) >= MAX_WAITING:
                    self._next_try.clear()
                self._next_try[model, version] = self._clock.monotonic() + self._retry_s

    async def _answered(self, model: str, version: str, question: Awaitable[None]) -> bool:
        try:
            await question
        except grpc.aio.AioRpcError as error:
            reason = MillraceError.from_rpc(error).reason
            FAILURES.labels(reason).inc()
            log.warning("registry: nothing about %s %s: %s", model, version, reason)
            return False
        return True

    async def _learn_model(self, model: str) -> None:
        answer = await self._registry.GetModel(registry_pb2.GetModelRequest(name=model))
        outcome = answer.model.outcome
        spec = OutcomeSpec(
            outcome.contract, outcome.subject_column, outcome.label_column, outcome.threshold, outcome.numeric
        )
        now_us = now_micros(self._clock.now())
        self._on_joined(await asyncio.to_thread(self._store.learn_model, model, spec, now_us))
        log.info("model %s: outcomes from %s", model, spec.source or "nowhere")

    async def _learn_version(self, model: str, version: str) -> None:
        answer = await self._registry.GetVersion(registry_pb2.GetVersionRequest(model=model, version=version))
        found = answer.version
        names = [*found.signature.feature_names]
        await asyncio.to_thread(self._store.learn_version, model, version, found.digest, names)
