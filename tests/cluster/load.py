"""Steady client load through the gateway's Service, and what every call came to."""

import asyncio
import math
import threading
import time
from collections import Counter
from types import TracebackType
from typing import Self

import grpc.aio
from tritonclient.grpc import service_pb2

METHOD = "/inference.GRPCInferenceService/ModelInfer"
CHANNELS = 4
TIMEOUT_S = 30.0
MAX_RUNNING = 64
OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


def infer_request(model: str, width: int) -> bytes:
    """One V2 ModelInfer with a row of zeros."""
    request = service_pb2.ModelInferRequest(model_name=model)
    tensor = request.inputs.add(name="features", datatype="FP32", shape=[1, width])
    tensor.contents.fp32_contents.extend([0.0] * width)
    return bytes(request.SerializeToString())


class Load(threading.Thread):
    """Calls `rate` times a second, each caller with its own sticky key; the clients do not retry."""

    def __init__(self, target: str, model: str, width: int, *, rate: float = 40.0) -> None:
        super().__init__(daemon=True)
        self.answers: list[tuple[float, str]] = []
        """When (monotonic seconds) a call was made and which version answered it."""
        self.errors: list[tuple[float, str]] = []
        self._target = target
        self._model = model
        self._body = infer_request(model, width)
        self._rate = rate
        self._ended = threading.Event()

    def run(self) -> None:
        """The thread."""
        asyncio.run(self._run())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self.join(TIMEOUT_S + 5)

    def count(self, since: float, until: float = math.inf) -> Counter[str]:
        """Answers by version to calls made in a span of time."""
        return Counter(version for at, version in list(self.answers) if since <= at < until)

    def wait_for(self, answers: int, timeout_s: float = 120.0) -> Counter[str]:
        """Wait until so many more calls are answered; returns them by version."""
        began, have = time.monotonic(), len(self.answers)
        while len(self.answers) < have + answers:
            assert time.monotonic() - began < timeout_s, f"{len(self.answers) - have} of {answers}: {self.errors[-3:]}"
            time.sleep(0.05)
        return Counter(version for _, version in self.answers[have : have + answers])

    async def _run(self) -> None:
        channels = [grpc.aio.insecure_channel(self._target, options=OPTIONS) for _ in range(CHANNELS)]
        calls = [channel.unary_unary(METHOD) for channel in channels]
        running: set[asyncio.Task[None]] = set()
        number, began = 0, time.monotonic()
        while not self._ended.is_set():
            if len(running) < MAX_RUNNING:
                task = asyncio.create_task(self._one(calls[number % CHANNELS], number))
                running.add(task)
                task.add_done_callback(running.discard)
                number += 1
            await asyncio.sleep(max(0.0, began + number / self._rate - time.monotonic()))
        await asyncio.gather(*running)
        for channel in channels:
            await channel.close()

    async def _one(self, call: grpc.aio.UnaryUnaryMultiCallable, number: int) -> None:
        began = time.monotonic()
        metadata = (("x-millrace-model", self._model), ("x-user-id", f"user-{number}"))
        answer = call(self._body, metadata=metadata, timeout=TIMEOUT_S)
        try:
            await answer
            headers = dict(await answer.initial_metadata())
        except grpc.aio.AioRpcError as error:
            self.errors.append((began, f"{error.code().name}: {error.details()}"))
            return
        self.answers.append((began, str(headers.get("x-millrace-version", ""))))


def within_binomial(hits: int, trials: int, weight: float, *, error: float = 1e-4) -> bool:
    """Whether so many hits are possible at this weight: two-sided exact binomial test at level `error`."""
    from scipy.stats import binomtest

    return bool(binomtest(hits, trials, weight).pvalue >= error)
