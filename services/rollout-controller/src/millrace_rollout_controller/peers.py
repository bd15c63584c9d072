"""The other services as this one sees them: the registry's versions and artifacts, the gateways' figures, the drift monitor's outcomes."""

import asyncio
import hashlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path

import grpc
import grpc.aio
from millrace_api.drift.v1 import drift_pb2, drift_pb2_grpc
from millrace_api.prediction.v1 import prediction_pb2, prediction_pb2_grpc
from millrace_api.registry.v1 import registry_pb2, registry_pb2_grpc
from millrace_kit.clock import Clock
from millrace_kit.errors import DataLossError, InvalidArgumentError, MillraceError, UnavailableError

from millrace_rollout_controller import convert
from millrace_rollout_controller.counts import Counts
from millrace_rollout_controller.evidence import GatewayFigures, Poll
from millrace_rollout_controller.metrics import POLL_FAILURES
from millrace_rollout_controller.reconciler import Refusal
from millrace_rollout_controller.state import ArtifactRef, Bundle, VersionRef
from millrace_rollout_controller.value_gates import Tracked

log = logging.getLogger(__name__)
REFUSAL_TTL_S = 2.0
"""How long an answer like "no such version" is believed."""
MAX_CACHED = 1000
CHUNK_BYTES = 1 << 20
_STATES = {grpc.StatusCode.NOT_FOUND: "VersionNotFound", grpc.StatusCode.DATA_LOSS: "DataLoss"}


class Registry:
    """Versions by name, remembered: they never change once registered."""

    def __init__(self, channel: grpc.aio.Channel, clock: Clock, *, timeout_s: float, artifact_timeout_s: float) -> None:
        self._stub = registry_pb2_grpc.RegistryServiceStub(channel)
        self._clock = clock
        self._timeout_s = timeout_s
        self._artifact_timeout_s = artifact_timeout_s
        self._known: dict[tuple[str, str], VersionRef] = {}
        self._refused: dict[tuple[str, str], tuple[float, Refusal]] = {}

    async def version(self, model: str, version: str) -> VersionRef | Refusal | None:
        """The version, why there is none, or None while the registry does not answer."""
        name = model, version
        if (known := self._known.get(name)) is not None:
            return known
        since, refusal = self._refused.get(name, (0.0, None))
        if refusal is not None and self._clock.monotonic() - since < REFUSAL_TTL_S:
            return refusal
        try:
            request = registry_pb2.GetVersionRequest(model=model, version=version)
            found = await self._stub.GetVersion(request, timeout=self._timeout_s)
            owner = await self._stub.GetModel(registry_pb2.GetModelRequest(name=model), timeout=self._timeout_s)
            ref = convert.version_ref(found.version, owner.model)
        except grpc.aio.AioRpcError as error:
            if error.code() not in _STATES:
                log.warning("registry: %s %s: %s", model, version, error.details())
                return None
            refusal = Refusal(_STATES[error.code()], MillraceError.from_rpc(error).message, permanent=False)
        except InvalidArgumentError as error:
            # A registered version never changes.
            refusal = Refusal("InvalidPlan", error.message, permanent=True)
        if refusal is not None:
            self._refused = dict(list(self._refused.items())[-MAX_CACHED:])
            self._refused[name] = (self._clock.monotonic(), refusal)
            return refusal
        self._known = dict(list(self._known.items())[-MAX_CACHED:])
        self._known[name] = ref
        return ref

    async def put(self, bundle: Bundle) -> bool:
        """Keep the evidence of a rollout as an artifact, linked from its version; False while the registry does not take it."""
        content = bundle.text.encode()

        async def parts() -> AsyncIterator[registry_pb2.PutArtifactRequest]:
            header = registry_pb2.PutArtifactHeader(sha256=bundle.sha256, size_bytes=len(content))
            yield registry_pb2.PutArtifactRequest(header=header)
            for at in range(0, len(content), CHUNK_BYTES):
                yield registry_pb2.PutArtifactRequest(chunk=content[at : at + CHUNK_BYTES])

        try:
            await self._stub.PutArtifact(parts(), timeout=self._artifact_timeout_s)
        except grpc.aio.AioRpcError as error:
            log.warning("registry: evidence %s is not kept yet: %s", bundle.sha256[:12], error.details())
            return False
        return await self._link(bundle)

    async def _link(self, bundle: Bundle) -> bool:
        try:
            await self._stub.RecordRollout(convert.rollout_record(bundle), timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            # A version that the registry does not know (any more) will not be linked by trying again; the bundle is kept.
            final = error.code() in {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT}
            log.warning("registry: evidence %s is not linked: %s", bundle.sha256[:12], error.details())
            return final
        return True

    async def fetch(self, artifact: ArtifactRef, target: Path) -> None:
        """See `ArtifactSource.fetch`."""
        digest, size = hashlib.sha256(), 0
        scratch = target.with_name(f".{target.name}.part")
        call = self._stub.GetArtifact(
            registry_pb2.GetArtifactRequest(sha256=artifact.sha256), timeout=self._artifact_timeout_s
        )
        try:
            with scratch.open("wb") as file:
                async for part in call:
                    size += len(part.chunk)
                    if size > artifact.size_bytes:
                        break
                    digest.update(part.chunk)
                    await asyncio.to_thread(file.write, part.chunk)
            _prove(artifact, digest.hexdigest(), size)
            scratch.rename(target)
        except grpc.aio.AioRpcError as error:
            failure = MillraceError.from_rpc(error)
            if failure.code is grpc.StatusCode.DATA_LOSS:
                raise DataLossError(failure.reason, failure.message, failure.metadata) from error
            raise UnavailableError(
                "ARTIFACT_UNAVAILABLE", f"{artifact.path}: {failure.message}", {"path": artifact.path}
            ) from error
        finally:
            call.cancel()
            scratch.unlink(missing_ok=True)


def _prove(artifact: ArtifactRef, digest: str, size: int) -> None:
    if digest != artifact.sha256 or size != artifact.size_bytes:
        message = f"artifact {artifact.path} came with digest {digest} and {size} bytes, not {artifact.sha256} and {artifact.size_bytes}"
        raise DataLossError("DIGEST_MISMATCH", message, {"path": artifact.path, "found": digest})


class Figures:
    """Polls every gateway and the drift monitor; who does not answer in time is left out.

    Args:
        fixed: addresses of gateways that are always asked.
        live: addresses of gateways that are connected now.
        open_gateway: makes a channel to one.
        drift: channel to the drift monitor.
        timeout_s: deadline of each question.
    """

    def __init__(
        self,
        fixed: Sequence[str],
        live: Callable[[], Sequence[str]],
        open_gateway: Callable[[str], grpc.aio.Channel],
        drift: grpc.aio.Channel,
        *,
        timeout_s: float,
    ) -> None:
        self._fixed = fixed
        self._live = live
        self._open = open_gateway
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._drift = drift_pb2_grpc.DriftServiceStub(drift)
        self._tracked: dict[str, frozenset[Tracked]] = {}
        self._timeout_s = timeout_s

    @property
    def addresses(self) -> list[str]:
        """The gateways asked."""
        return sorted({*self._fixed, *self._live()})

    def track(self, model: str, values: Iterable[Tracked]) -> None:
        """Say which values of a model's outcomes its gates want; the drift monitor is told with the next poll."""
        self._tracked[model] = frozenset(values)

    async def poll(self, models: Sequence[str]) -> dict[str, Poll]:
        """What each model's sources say now."""
        addresses = self.addresses
        await self._close_all_but(addresses)
        answers, outcomes = await asyncio.gather(
            asyncio.gather(*(self._ask_gateway(address) for address in addresses)),
            asyncio.gather(*(self._ask_drift(model) for model in models)),
        )
        polls: dict[str, Poll] = {}
        for model, found in zip(models, outcomes, strict=True):
            gateways = {
                address: GatewayFigures(answer.instance_id, convert.gateway_counts(answer, model))
                for address, answer in zip(addresses, answers, strict=True)
                if answer is not None and answer.instance_id
            }
            activity = {
                address: convert.gateway_activity(answer, model)
                for address, answer in zip(addresses, answers, strict=True)
                if answer is not None and answer.instance_id
            }
            polls[model] = Poll(gateways, found, activity=activity)
        return polls

    async def samples(self, model: str, limit: int) -> list[bytes]:
        """See `RequestSource.samples`: from every gateway some, so that no one caller's requests are all of them."""
        addresses = self.addresses
        answers = await asyncio.gather(*(self._ask_samples(address, model, limit) for address in addresses))
        return list(itertools.islice(_in_turn(answers), limit))

    async def _ask_samples(self, address: str, model: str, limit: int) -> list[bytes]:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = self._open(address)
        request = prediction_pb2.GetRequestSamplesRequest(model=model, limit=limit)
        try:
            stub = prediction_pb2_grpc.GatewayServiceStub(channel)
            return list((await stub.GetRequestSamples(request, timeout=self._timeout_s)).requests)
        except grpc.aio.AioRpcError:
            # A gateway of the release before has none; zeros do instead.
            return []

    async def _close_all_but(self, addresses: Sequence[str]) -> None:
        for address in self._channels.keys() - set(addresses):
            await self._channels.pop(address).close()

    async def close(self) -> None:
        """Close the channels to gateways."""
        await self._close_all_but(())

    async def _ask_gateway(self, address: str) -> prediction_pb2.GetFiguresResponse | None:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = self._open(address)
        stub = prediction_pb2_grpc.GatewayServiceStub(channel)
        try:
            answer: prediction_pb2.GetFiguresResponse = await stub.GetFigures(
                prediction_pb2.GetFiguresRequest(), timeout=self._timeout_s
            )
        except grpc.aio.AioRpcError:
            POLL_FAILURES.labels(address).inc()
            return None
        return answer

    async def _ask_drift(self, model: str) -> dict[str, Counts] | None:
        try:
            request = drift_pb2.GetOutcomesRequest(model=model)
            answer = await self._drift.GetOutcomes(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError:
            POLL_FAILURES.labels("drift").inc()
            return None
        await self._say_tracked(model, frozenset(convert.tracked_value(each.value) for each in answer.tracked))
        return convert.outcome_counts(answer, model)

    async def _say_tracked(self, model: str, kept: frozenset[Tracked]) -> None:
        """Tell the drift monitor what gates want, where it keeps something else; one of the release before keeps nothing, and its figures still count."""
        wanted = self._tracked.get(model, frozenset())
        if not wanted or wanted == kept:
            return
        values = [convert.tracked_message(value) for value in sorted(wanted, key=lambda value: value.key)]
        try:
            request = drift_pb2.SetTrackedValuesRequest(model=model, values=values)
            await self._drift.SetTrackedValues(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            POLL_FAILURES.labels("drift").inc()
            log.warning("drift monitor: values of %s are not tracked yet: %s", model, error.details())


def _in_turn(lists: Sequence[Sequence[bytes]]) -> Iterator[bytes]:
    """The first of each, then the second of each, and so on."""
    for row in itertools.zip_longest(*lists):
        yield from (body for body in row if body is not None)
