"""The gRPC edge: check the request, call the domain, convert the answer."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_api.ingestion.v1.ingestion_pb2_grpc import IngestionServiceServicer
from millrace_kit import check
from millrace_kit.errors import InvalidArgumentError, NotFoundError, UnavailableError

from millrace_ingestion import convert
from millrace_ingestion.contract_messages import contract_from, contract_to
from millrace_ingestion.ingestor import Ingestor
from millrace_ingestion.models import Outcome
from millrace_ingestion.quality_messages import bucket_to
from millrace_ingestion.quality_monitor import merged
from millrace_ingestion.table_versions import TableVersions

_Answer = asyncio.Future[Outcome] | Exception | None
# An answer of `ListDeadLetters` stays below gRPC's message limit whatever the records' size.
_PAGE_BYTES = 16 << 20


class IngestionServicer(IngestionServiceServicer):
    """The service's RPCs.

    Args:
        ingestor: the domain.
        versions: versions of the tables.
        stream_window: unanswered batches of one stream.
    """

    def __init__(self, ingestor: Ingestor, versions: TableVersions, *, stream_window: int) -> None:
        self._versions = versions
        self._ingestor = ingestor
        self._stream_window = stream_window

    async def RegisterContract(
        self, request: pb.RegisterContractRequest, context: grpc.aio.ServicerContext
    ) -> pb.RegisterContractResponse:
        contract, created = await self._ingestor.register(contract_from(request.contract, "contract"))
        return pb.RegisterContractResponse(contract=contract_to(contract), created=created)

    async def GetContract(
        self, request: pb.GetContractRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetContractResponse:
        contract = self._ingestor.contract(check.table(request.name, "name"))
        if request.version < 0:
            raise InvalidArgumentError("version", "must not be negative")
        if request.version not in {0, contract.version}:
            versions = await self._ingestor.versions(request.name)
            found = next((version for version in versions if version.version == request.version), None)
            if found is None:
                raise NotFoundError("contract version", f"{request.name}@{request.version}")
            contract = found
        return pb.GetContractResponse(contract=contract_to(contract))

    async def ListContracts(
        self, request: pb.ListContractsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListContractsResponse:
        return pb.ListContractsResponse(contracts=map(contract_to, self._ingestor.contracts()))

    async def CheckContract(
        self, request: pb.CheckContractRequest, context: grpc.aio.ServicerContext
    ) -> pb.CheckContractResponse:
        contract = contract_from(request.contract, "contract")
        return convert.comparison_to(await self._ingestor.compare(contract))

    async def Write(self, request: pb.WriteRequest, context: grpc.aio.ServicerContext) -> pb.WriteResponse:
        return convert.outcome_to(await self._ingestor.write(convert.incoming_from(request.batch, "batch")))

    async def WriteStream(
        self, request_iterator: AsyncIterator[pb.WriteStreamRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WriteStreamResponse]:
        answers: asyncio.Queue[_Answer] = asyncio.Queue(self._stream_window)
        reading = asyncio.create_task(self._read_stream(request_iterator, answers))
        try:
            while (answer := await answers.get()) is not None:
                if isinstance(answer, Exception):
                    raise answer
                yield pb.WriteStreamResponse(result=convert.outcome_to(await answer))
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading

    async def _read_stream(
        self, request_iterator: AsyncIterator[pb.WriteStreamRequest], answers: asyncio.Queue[_Answer]
    ) -> None:
        """Queue each batch's answer, then None; an error is the last one queued, so the answers before it still go out."""
        epochs: dict[str, int] = {}
        stopping = asyncio.create_task(self._ingestor.stopped())
        iterator = aiter(request_iterator)
        try:
            while True:
                request = await _next(iterator, stopping)
                if request is None:
                    await answers.put(None)
                    return
                incoming = convert.incoming_from(request.batch, "batch")
                if incoming.contract not in epochs:
                    epochs[incoming.contract] = self._ingestor.epoch(incoming.contract)
                await answers.put(await self._ingestor.accept(incoming, epoch=epochs[incoming.contract]))
        except Exception as error:
            await answers.put(error)
        finally:
            stopping.cancel()

    async def ListDeadLetters(
        self, request: pb.ListDeadLettersRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListDeadLettersResponse:
        choice = convert.choice_from(request)
        limit = check.page_size(request.page_size, "page_size")
        after = check.page_token(request.page_token, "page_token")
        letters = await self._ingestor.letters(choice, after=after, limit=limit)
        page = pb.ListDeadLettersResponse()
        size = 0
        for letter in letters:
            message = convert.letter_to(letter)
            size += message.ByteSize()
            if page.dead_letters and size > _PAGE_BYTES:
                break
            page.dead_letters.append(message)
        if page.dead_letters and (len(page.dead_letters) < len(letters) or len(letters) == limit):
            page.next_page_token = str(page.dead_letters[-1].id)
        return page

    async def CountDeadLetters(
        self, request: pb.CountDeadLettersRequest, context: grpc.aio.ServicerContext
    ) -> pb.CountDeadLettersResponse:
        contract = check.table(request.contract, "contract") if request.contract else ""
        return pb.CountDeadLettersResponse(counts=map(convert.count_to, await self._ingestor.counts(contract)))

    async def ReplayDeadLetters(
        self, request: pb.ReplayDeadLettersRequest, context: grpc.aio.ServicerContext
    ) -> pb.ReplayDeadLettersResponse:
        choice, limit = convert.choice_from(request), convert.limit_from(request.limit, "limit")
        replayed, refused = await self._ingestor.replay(choice, limit=limit, dry_run=request.dry_run)
        return pb.ReplayDeadLettersResponse(replayed=replayed, still_rejected=refused)

    async def DiscardDeadLetters(
        self, request: pb.DiscardDeadLettersRequest, context: grpc.aio.ServicerContext
    ) -> pb.DiscardDeadLettersResponse:
        choice, limit = convert.choice_from(request), convert.limit_from(request.limit, "limit")
        return pb.DiscardDeadLettersResponse(discarded=await self._ingestor.discard_letters(choice, limit=limit))

    async def ListQuarantine(
        self, request: pb.ListQuarantineRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListQuarantineResponse:
        contract = check.table(request.contract, "contract")
        limit = check.page_size(request.page_size, "page_size")
        after = check.page_token(request.page_token, "page_token")
        found = await self._ingestor.held(contract, after=after, limit=limit, settled=request.settled)
        token = str(found[-1].id) if len(found) == limit else ""
        return pb.ListQuarantineResponse(batches=map(convert.held_to, found), next_page_token=token)

    async def ReleaseQuarantine(
        self, request: pb.ReleaseQuarantineRequest, context: grpc.aio.ServicerContext
    ) -> pb.ReleaseQuarantineResponse:
        contract = check.table(request.contract, "contract")
        done = await self._ingestor.release(contract, convert.ids_from(request.ids, "ids"))
        return pb.ReleaseQuarantineResponse(
            batches=done.batches, accepted=done.accepted, duplicates=done.duplicates, rejected=done.rejected
        )

    async def DiscardQuarantine(
        self, request: pb.DiscardQuarantineRequest, context: grpc.aio.ServicerContext
    ) -> pb.DiscardQuarantineResponse:
        contract = check.table(request.contract, "contract")
        ids = convert.ids_from(request.ids, "ids")
        if not ids:
            raise InvalidArgumentError("ids", "needs at least one")
        return pb.DiscardQuarantineResponse(batches=await self._ingestor.discard_held(contract, ids))

    async def GetQuality(
        self, request: pb.GetQualityRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetQualityResponse:
        if request.table_version < 0:
            raise InvalidArgumentError("table_version", "must not be negative")
        found = await self._ingestor.quality(
            check.table(request.contract, "contract"),
            since_us=convert.instant_from(request, "since"),
            until_us=convert.instant_from(request, "until"),
            version=request.table_version or None,
            limit=check.page_size(request.max_buckets, "max_buckets", default=100),
        )
        if request.merge:
            total = merged(found)
            found = [] if total is None else [total]
        return pb.GetQualityResponse(buckets=map(bucket_to, found))

    async def GetTable(self, request: pb.GetTableRequest, context: grpc.aio.ServicerContext) -> pb.GetTableResponse:
        contract = check.table(request.contract, "contract")
        version, instant = None, None
        match request.WhichOneof("as_of"):
            case "version":
                version = convert.version_from(request.version, "version")
            case "instant":
                instant = check.timestamp(request.instant, "instant")
        return convert.table_to(await self._ingestor.table(contract, version=version, instant=instant))

    async def ListTableVersions(
        self, request: pb.ListTableVersionsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListTableVersionsResponse:
        contract = check.table(request.contract, "contract")
        limit = check.page_size(request.page_size, "page_size")
        before = check.page_token(request.page_token, "page_token") if request.page_token else None
        entries, pins = await self._versions.newest(contract, before=before, limit=limit)
        page = pb.ListTableVersionsResponse(
            versions=[convert.version_to(entry, pins.get(entry.version, [])) for entry in entries]
        )
        if len(entries) == limit and entries[-1].version > 0:
            page.next_page_token = str(entries[-1].version)
        return page

    async def PinTableVersion(
        self, request: pb.PinTableVersionRequest, context: grpc.aio.ServicerContext
    ) -> pb.PinTableVersionResponse:
        contract = check.table(request.contract, "contract")
        owner = convert.owner_from(request.owner, "owner")
        version = convert.version_from(request.version, "version") if request.HasField("version") else None
        expires = check.timestamp(request.expires_at, "expires_at") if request.HasField("expires_at") else None
        pin = await self._versions.pin(contract, version, owner, expires)
        return pb.PinTableVersionResponse(pin=convert.pin_to(pin))

    async def UnpinTableVersion(
        self, request: pb.UnpinTableVersionRequest, context: grpc.aio.ServicerContext
    ) -> pb.UnpinTableVersionResponse:
        contract = check.table(request.contract, "contract")
        owner = convert.owner_from(request.owner, "owner")
        version = convert.version_from(request.version, "version") if request.HasField("version") else None
        return pb.UnpinTableVersionResponse(removed=await self._versions.unpin(contract, version, owner))


async def _next(
    iterator: AsyncIterator[pb.WriteStreamRequest], stopping: asyncio.Task[None]
) -> pb.WriteStreamRequest | None:
    """The next request, None at the end.

    Raises:
        UnavailableError: the service stops.
    """
    following = asyncio.create_task(_read(iterator))
    try:
        await asyncio.wait([following, stopping], return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not following.done():
            following.cancel()
    if stopping.done() and not following.done():
        raise UnavailableError("STOPPING", "the service stops; go on from the first unanswered batch")
    return await following


async def _read(iterator: AsyncIterator[pb.WriteStreamRequest]) -> pb.WriteStreamRequest | None:
    return await anext(iterator, None)
