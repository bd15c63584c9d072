"""Feast's gRPC services beside the native one: `feast.serving.ServingService`, which Feast's Java and Go servers have, and
`GrpcFeatureServer`, which its Python server has. Requests are read by our own copy of Feast's messages, answers are written as bytes.
"""

from importlib import metadata
from typing import Any

import grpc
import grpc.aio
from millrace_api.feature.v1 import feast_pb2
from millrace_kit.errors import MillraceError

from millrace_feature.feast_wire.message_answers import to_message
from millrace_feature.feast_wire.reads import FeastReads
from millrace_feature.feast_wire.requests import from_message
from millrace_feature.versioning.servicer import caller_of
from millrace_feature.wire_format import sized

SERVING_SERVICE = "feast.serving.ServingService"
PYTHON_SERVICE = "GrpcFeatureServer"
"""It stands in no package."""
CACHE_AGE = "millrace-cache-age-ms"
"""Trailing metadata of answers that were kept."""
READ_METHODS = (f"/{SERVING_SERVICE}/GetOnlineFeatures", f"/{PYTHON_SERVICE}/GetOnlineFeatures")


def _as_it_is(content: bytes) -> bytes:
    return content


class FeastGrpc:
    """Handlers of Feast's methods."""

    def __init__(self, reads: FeastReads) -> None:
        self._reads = reads
        self._info = sized(b"\x0a", metadata.version("feast").encode())

    def add_to(self, server: grpc.aio.Server) -> None:
        """Have `server` answer Feast's methods."""
        read = grpc.unary_unary_rpc_method_handler(
            self._get_online_features,
            request_deserializer=feast_pb2.FeastOnlineRequest.FromString,
            response_serializer=_as_it_is,
        )
        info = grpc.unary_unary_rpc_method_handler(self._get_info, _as_it_is, _as_it_is)
        refused = grpc.unary_unary_rpc_method_handler(self._refuse, _as_it_is, _as_it_is)
        serving = {"GetOnlineFeatures": read, "GetFeastServingInfo": info}
        python = {"GetOnlineFeatures": read, "Push": refused, "WriteToOnlineStore": refused}
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(SERVING_SERVICE, serving),
                grpc.method_handlers_generic_handler(PYTHON_SERVICE, python),
            )
        )

    async def _get_online_features(self, request: Any, context: grpc.aio.ServicerContext) -> bytes:
        content, age_ms = await self._reads.answer(from_message(request), to_message, caller_of(context))
        if age_ms:
            context.set_trailing_metadata(((CACHE_AGE, str(age_ms)),))
        return content

    async def _get_info(self, _request: bytes, _context: grpc.aio.ServicerContext) -> bytes:
        """`GetFeastServingInfoResponse`: the version of Feast whose format this is."""
        return self._info

    async def _refuse(self, _request: bytes, _context: grpc.aio.ServicerContext) -> bytes:
        message = (
            "records enter through ingestion (IngestionService, or `millrace ingest`), not through the feature server"
        )
        raise MillraceError(grpc.StatusCode.UNIMPLEMENTED, "UNIMPLEMENTED", message)
