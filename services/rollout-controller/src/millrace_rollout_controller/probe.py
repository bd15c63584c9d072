"""Questions to one model server over its own V2 protocol: is it ready, and does it answer steadily?"""

import time
from statistics import fmean

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from millrace_rollout_controller.server_versions import number
from millrace_rollout_controller.state import Tensor, VersionRef

_BYTES = {
    "BOOL": 1, "INT8": 1, "UINT8": 1, "INT16": 2, "FP16": 2, "INT32": 4, "FP32": 4, "INT64": 8, "FP64": 8,
}  # fmt: skip
WINDOW = 10
"""Requests of one warm-up window."""
STEADY = 1.5
"""Warm when the slowest of the last three windows' means is at most this many times the fastest."""


class Probe:
    """One channel to one server.

    Args:
        endpoint: `host:port` of its gRPC.
        ref: the version it is asked about.
        shared: whether it may hold other versions of the model too.
    """

    def __init__(self, endpoint: str, ref: VersionRef, *, shared: bool = False) -> None:
        self._ref = ref
        self._number = number(ref.version) if shared else ""
        options = [("grpc.min_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 250)]
        self._channel = grpc.aio.insecure_channel(
            endpoint, options=[*options, ("grpc.initial_reconnect_backoff_ms", 50)]
        )
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def ready(self, timeout_s: float) -> bool:
        """Whether the server has the model loaded."""
        request = service_pb2.ModelReadyRequest(name=self._ref.model, version=self._number)
        try:
            return bool((await self._stub.ModelReady(request, timeout=timeout_s)).ready)
        except grpc.aio.AioRpcError:
            return False

    async def warm_up(self, *, requests: int, seconds: float, timeout_s: float) -> None:
        """Send requests until latency is steady, at most `requests` and about `seconds`.

        Raises:
            grpc.aio.AioRpcError: the model does not answer its own signature.
        """
        request = sample_request(self._ref)
        request.model_version = self._number
        end = time.monotonic() + seconds
        windows: list[float] = []
        for _ in range(max(1, requests // WINDOW)):
            times = []
            for _ in range(WINDOW):
                began = time.perf_counter()
                await self._stub.ModelInfer(request, timeout=timeout_s)
                times.append(time.perf_counter() - began)
                if time.monotonic() > end:
                    return
            windows.append(fmean(times))
            if len(windows) >= 3 and max(windows[-3:]) <= STEADY * min(windows[-3:]):
                return

    async def live(self, timeout_s: float) -> bool:
        """Whether the server answers, whatever it holds."""
        try:
            return bool((await self._stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=timeout_s)).live)
        except grpc.aio.AioRpcError:
            return False

    async def load(self, timeout_s: float) -> None:
        """Have the server bring the model's versions to those that are in its repository; those that are there already stay untouched.

        Raises:
            grpc.aio.AioRpcError: a version cannot be loaded.
        """
        await self._stub.RepositoryModelLoad(
            service_pb2.RepositoryModelLoadRequest(model_name=self._ref.model), timeout=timeout_s
        )

    async def unload(self, timeout_s: float, *, model: str = "") -> None:
        """Have the server let go of all of the model's versions, or of another `model`'s.

        Raises:
            grpc.aio.AioRpcError: it does not.
        """
        await self._stub.RepositoryModelUnload(
            service_pb2.RepositoryModelUnloadRequest(model_name=model or self._ref.model), timeout=timeout_s
        )

    async def models(self, timeout_s: float) -> set[str]:
        """Every model that the server has anything of in its memory.

        Raises:
            grpc.aio.AioRpcError: the server does not answer.
        """
        index = await self._stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=timeout_s)
        return {model.name for model in index.models if model.state not in {"UNAVAILABLE", ""}}

    async def held(self, timeout_s: float) -> bool:
        """Whether anything of the version is in the server's memory.

        Raises:
            grpc.aio.AioRpcError: the server does not answer.
        """
        index = await self._stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=timeout_s)
        mine = [m for m in index.models if m.name == self._ref.model and m.version == self._number]
        return any(model.state not in {"UNAVAILABLE", ""} for model in mine)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


def sample_request(ref: VersionRef) -> service_pb2.ModelInferRequest:
    """One row of zeros for every input; open dimensions get size 1."""
    request = service_pb2.ModelInferRequest(model_name=ref.model)
    for tensor in ref.inputs:
        shape = [1, *(max(1, size) for size in tensor.shape)]
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
        request.raw_input_contents.append(bytes(_size(tensor, shape)))
    return request


def _size(tensor: Tensor, shape: list[int]) -> int:
    size = _BYTES[tensor.datatype]
    for length in shape:
        size *= length
    return size
