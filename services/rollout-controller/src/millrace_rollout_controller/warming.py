"""Warms new servers up: replays requests, window by window, in the background. The rule is `warm_gate`'s."""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import grpc
import grpc.aio
from millrace_kit.clock import Clock

from millrace_rollout_controller.manifest import Warmup
from millrace_rollout_controller.plans import WarmSeen, WarmServers
from millrace_rollout_controller.probe import sample_request
from millrace_rollout_controller.state import Verdict
from millrace_rollout_controller.warm_gate import Window, judge

log = logging.getLogger(__name__)
MAX_SAMPLES = 64
"""Different requests that are replayed."""
REQUEST_TIMEOUT_S = 30.0
"""Deadline of one replayed request; the first one of a model may compile kernels."""
METHOD = "/inference.GRPCInferenceService/ModelInfer"


class RequestSource(Protocol):
    """Where requests come from that a model has answered."""

    async def samples(self, model: str, limit: int) -> list[bytes]:
        """Serialized `ModelInferRequest`s, at most `limit`; none when nobody has any."""
        ...


@dataclass
class _Work:
    wanted: WarmServers
    task: asyncio.Task[None]
    seen: WarmSeen


class Warmer:
    """One background task for each deployment whose candidate is to be warmed.

    Args:
        source: requests to replay; the signature's own inputs (zeros) where it has none.
        clock: for latencies and deadlines.
    """

    def __init__(self, source: RequestSource, clock: Clock) -> None:
        self._source = source
        self._clock = clock
        self._works: dict[str, _Work] = {}

    def converge(self, wanted: Mapping[str, WarmServers]) -> None:
        """Begin what is new, by deployment; end what nobody wants any more. What has a verdict is not begun again."""
        for name in self._works.keys() - wanted.keys():
            self._works.pop(name).task.cancel()
        for name, work in wanted.items():
            known = self._works.get(name)
            if known is not None:
                # Other servers or other bounds: what was measured so far says nothing about these.
                if known.wanted == work or (known.wanted.trial == work.trial and known.seen.verdict != "undecided"):
                    continue
                known.task.cancel()
            seen = WarmSeen(work.trial, "undecided", "replaying begins", 0)
            self._works[name] = _Work(work, asyncio.create_task(self._run(name, work), name=f"warm-up of {name}"), seen)

    def seen(self, deployment: str) -> WarmSeen | None:
        """What is known of a deployment's candidate; None when nothing is under way."""
        work = self._works.get(deployment)
        return None if work is None else work.seen

    def close(self) -> None:
        """End all of it."""
        self.converge({})

    async def _run(self, name: str, wanted: WarmServers) -> None:
        limit_s = wanted.block.timeout_seconds
        try:
            async with asyncio.timeout(limit_s):
                await self._warm_all(name, wanted)
        except TimeoutError:
            last = self._works[name].seen
            evidence = f"not warm within {limit_s} s: {last.evidence}"
            self._works[name].seen = WarmSeen(wanted.trial, "fail", evidence, last.requests)
        except Exception as error:
            log.exception("warm-up of %s", name)
            self._works[name].seen = WarmSeen(wanted.trial, "fail", f"it broke off: {type(error).__name__}", 0)

    async def _warm_all(self, name: str, wanted: WarmServers) -> None:
        """Each server after the other: two at once would measure each other."""
        logged = (await self._source.samples(wanted.ref.model, MAX_SAMPLES))[:MAX_SAMPLES]
        words = f"{len(logged)} logged requests" if logged else "zeros by the signature, no request is logged"
        bodies = itertools.cycle(logged or [sample_request(wanted.ref).SerializeToString()])
        sent = 0
        for number, endpoint in enumerate(wanted.endpoints, 1):
            async for verdict, evidence in self._warm_one(endpoint, wanted, bodies):
                sent += wanted.block.requests
                # One warm server of several is not a verdict yet.
                whole = verdict if verdict == "fail" or number == len(wanted.endpoints) else "undecided"
                text = f"server {number} of {len(wanted.endpoints)} {evidence}; {words}"
                self._works[name].seen = WarmSeen(wanted.trial, whole, text, sent)
                if verdict == "fail":
                    return

    async def _warm_one(
        self, endpoint: str, wanted: WarmServers, bodies: Iterator[bytes]
    ) -> AsyncIterator[tuple[Verdict, str]]:
        """Window after window until there is a verdict; one of stable after each, so that both see the same machine."""
        beside = next(iter(wanted.stable_endpoints), None)
        mine: list[Window] = []
        theirs: list[Window] = []
        async with contextlib.AsyncExitStack() as stack:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(endpoint))
            other = await stack.enter_async_context(grpc.aio.insecure_channel(beside)) if beside else None
            verdict: Verdict = "undecided"
            while verdict == "undecided":
                mine.append(await self._window(channel, bodies, wanted.block, wanted.naming))
                if other is not None:
                    theirs.append(await self._window(other, bodies, wanted.block, wanted.stable_naming))
                verdict, evidence = judge(mine, theirs, wanted.block)
                yield verdict, evidence

    async def _window(self, channel: grpc.aio.Channel, bodies: Iterator[bytes], block: Warmup, naming: bytes) -> Window:
        """`requests` requests by `concurrency` callers, each of whom sends its next when the last was answered."""
        call = channel.unary_unary(METHOD)
        left, failures, problem = block.requests, 0, ""
        latencies: list[float] = []

        async def work() -> None:
            nonlocal left, failures, problem
            while left > 0:
                left -= 1
                began = self._clock.monotonic()
                try:
                    await call(next(bodies) + naming, timeout=REQUEST_TIMEOUT_S)
                    latencies.append((self._clock.monotonic() - began) * 1000)
                except grpc.aio.AioRpcError as error:
                    failures, problem = failures + 1, f"{error.code().name} {error.details()}"[:200]

        began = self._clock.monotonic()
        await asyncio.gather(*(work() for _ in range(block.concurrency)))
        return Window(tuple(latencies), self._clock.monotonic() - began, failures, problem)
