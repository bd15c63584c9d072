"""Has ingestion keep the table versions that training sets name, so that a set can be rebuilt after a vacuum.

A build holds its versions under an owner of its own that expires, so a build that is killed holds nothing for good; a finished set has one
owner for as long as `keep_days` says. Every call may be repeated: an owner is made of what the set is, and pinning again replaces.
"""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import grpc
import grpc.aio
from millrace_api.feature.v1 import feature_pb2
from millrace_api.ingestion.v1.ingestion_pb2 import PinTableVersionRequest, UnpinTableVersionRequest
from millrace_kit.clock import Clock
from millrace_kit.errors import FailedPreconditionError, MillraceError, UnavailableError

from millrace_feature.catalog import Catalog
from millrace_feature.lake import NO_TABLE
from millrace_feature.settings import SetPinSettings

log = logging.getLogger(__name__)

NO_CONTRACT = "CONTRACT_NOT_FOUND"
"""Ingestion's reason where it does not know the contract."""
RETRY_MIN_S = 0.1
RETRY_MAX_S = 5.0


class IngestionCalls(Protocol):
    """Ingestion's side, as its generated stub has it."""

    PinTableVersion: Callable[..., Awaitable[Any]]
    UnpinTableVersion: Callable[..., Awaitable[Any]]


class SetPins:
    """Pins of training sets.

    Args:
        ingestion: whom to ask; None where no address is set, then nothing is pinned.
        catalog: the training sets there are.
        settings: limits and waits.
        clock: what expires when.
        pause: waits that many seconds.
    """

    def __init__(
        self,
        ingestion: IngestionCalls | None,
        catalog: Catalog,
        settings: SetPinSettings,
        clock: Clock,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._ingestion = ingestion
        self._catalog = catalog
        self._settings = settings
        self._clock = clock
        self._pause = pause

    async def hold(self, request: feature_pb2.BuildTrainingSetRequest) -> None:
        """Keep the versions of `request`, which names them all, while its set is built.

        Raises:
            UnavailableError: ingestion does not answer.
            FailedPreconditionError: ingestion does not keep a version any more, or never had it.
        """
        until = self._clock.now() + timedelta(hours=self._settings.build_hours)
        await self._pin(request, f"training-build-{_identity(request)}", until)

    async def keep(self, training_set: feature_pb2.TrainingSet) -> str:
        """Keep the versions of a finished set instead; returns the pins' owner, empty where there was nothing to pin.

        Raises:
            UnavailableError: ingestion does not answer.
            FailedPreconditionError: ingestion does not keep a version any more.
        """
        if self._ingestion is None:
            return ""
        request = training_set.request
        owner = f"training-set-{_identity(request)}"
        until = None
        if self._settings.keep_days:
            until = training_set.created_at.ToDatetime(UTC) + timedelta(days=self._settings.keep_days)
        is_over = until is not None and until <= self._clock.now()
        pinned = 0 if is_over else await self._pin(request, owner, until)
        await self._let_go(request)
        return owner if pinned or is_over else ""

    async def run(self, stop: asyncio.Event) -> None:
        """Pin the sets that were built before there were pins; then there is nothing more to do.

        Raises:
            UnavailableError: ingestion or the database does not answer; run it again.
        """
        for digest in await asyncio.to_thread(self._catalog.training_sets):
            if stop.is_set():
                return
            record = await asyncio.to_thread(self._catalog.training_set, digest)
            found = feature_pb2.TrainingSet.FromString(record)
            if found.pin_owner:
                continue
            try:
                found.pin_owner = await self.keep(found)
            except UnavailableError:
                raise
            except MillraceError as error:  # its versions are gone, or ingestion refuses: no reason to stop serving
                log.warning("training set %s is not pinned: %s", digest, error.message)
                continue
            await asyncio.to_thread(self._catalog.replace_training_set, digest, found.SerializeToString())
        await stop.wait()

    async def _pin(self, request: feature_pb2.BuildTrainingSetRequest, owner: str, until: datetime | None) -> int:
        """Pin every table of `request`; returns how many."""
        if self._ingestion is None:
            return 0
        pinned = 0
        for table, version in _versions(request).items():
            pin = PinTableVersionRequest(contract=table, version=version, owner=owner)
            if until is not None:
                pin.expires_at.FromDatetime(until)
            try:
                await self._repeated(self._ingestion.PinTableVersion, pin)
                pinned += 1
            except MillraceError as error:
                if error.reason == NO_CONTRACT:
                    log.info("table %s is not ingestion's, which deletes nothing of it", table)
                    continue
                if error.code is not grpc.StatusCode.NOT_FOUND:
                    raise
                message = f"ingestion does not keep {table}@{version}, so the set could not be rebuilt: {error.message}"
                raise FailedPreconditionError(
                    "TABLE_VERSION_LOST", message, {"table": table, "version": str(version)}
                ) from None
        return pinned

    async def _let_go(self, request: feature_pb2.BuildTrainingSetRequest) -> None:
        """Remove the build's own pins; those of a build that did not get here expire."""
        if self._ingestion is None:
            return
        owner = f"training-build-{_identity(request)}"
        for table, version in _versions(request).items():
            try:
                unpin = UnpinTableVersionRequest(contract=table, version=version, owner=owner)
                await self._ingestion.UnpinTableVersion(unpin, timeout=self._settings.timeout_s)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    log.info("pins of %s stay until they expire: %s", owner, error.details())
                    return

    async def _repeated(self, method: Callable[..., Awaitable[Any]], request: Any) -> None:
        """Call until ingestion answers, for `retry_s` at most: pinning twice is pinning once."""
        until, wait_s = self._clock.monotonic() + self._settings.retry_s, RETRY_MIN_S
        while True:
            try:
                await method(request, timeout=self._settings.timeout_s)
            except grpc.aio.AioRpcError as error:
                found = MillraceError.from_rpc(error)
                if found.code not in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
                    raise found from None
                if self._clock.monotonic() + wait_s > until:
                    message = f"ingestion did not pin {request.contract}@{request.version}: {found.message}"
                    raise UnavailableError("PINS_UNAVAILABLE", message, {"table": request.contract}) from None
                await self._pause(wait_s)
                wait_s = min(RETRY_MAX_S, 2 * wait_s)
            else:
                return


def _versions(request: feature_pb2.BuildTrainingSetRequest) -> Mapping[str, int]:
    """Versions that can be pinned: a table that was not there yet has none."""
    return {item.table: item.version for item in request.table_versions if item.version != NO_TABLE}


def _identity(request: feature_pb2.BuildTrainingSetRequest) -> str:
    """The same for the same request with the same versions."""
    return hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest()[:32]
