"""Warms new servers up: replays requests, window by window, in the background. The rule is `warm_gate`'s."""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
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


@dataclass(frozen=True, slots=True)
class _Judged:
    """One window and what all so far came to."""

    verdict: Verdict
    evidence: str
    requests: int
    over: bool


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
                if known.wanted == work or (known.wanted.trial == work.trial and _ended(known.seen)):
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
            async for one in self._warm_one(endpoint, wanted, bodies):
                sent += one.requests
                # One warm server of several is not a verdict yet.
                whole = one.verdict if one.verdict == "fail" or number == len(wanted.endpoints) else "undecided"
                text = f"server {number} of {len(wanted.endpoints)} {one.evidence}; {words}"
                self._works[name].seen = seen = WarmSeen(wanted.trial, whole, text, sent, over=one.over)
                if _ended(seen):
                    return

    async def _warm_one(self, endpoint: str, wanted: WarmServers, bodies: Iterator[bytes]) -> AsyncIterator[_Judged]:
        """Window after window until there is a verdict, or there have been enough."""
        beside = next(iter(wanted.stable_endpoints), None)
        mine: list[Window] = []
        theirs: list[Window] = []
        async with contextlib.AsyncExitStack() as stack:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(endpoint))
            other = await stack.enter_async_context(grpc.aio.insecure_channel(beside)) if beside else None
            verdict: Verdict = "undecided"
            while verdict == "undecided" and len(mine) < wanted.block.max_trials:
                asked = [_Asked(channel, wanted.naming)]
                asked += [_Asked(other, wanted.stable_naming)] if other is not None else []
                await self._window(asked, bodies, wanted.block)
                mine.append(asked[0].window(wanted.block))
                theirs += [one.window(wanted.block) for one in asked[1:]]
                verdict, evidence = judge(mine, theirs, wanted.block)
                over = verdict == "undecided" and len(mine) >= wanted.block.max_trials
                yield _Judged(verdict, evidence, mine[-1].requests, over)

    async def _window(self, asked: "Sequence[_Asked]", bodies: Iterator[bytes], block: Warmup) -> None:
        """Requests by `concurrency` callers, each of whom sends its next when the last was answered: `requests` at least, and for
        `windowSeconds` at least. Each goes to every server; who is asked first changes from one to the next.
        """
        began = self._clock.monotonic()
        sent = 0

        async def work() -> None:
            nonlocal sent
            while sent < block.requests or self._clock.monotonic() - began < block.window_seconds:
                number, sent = sent, sent + 1
                await asyncio.sleep(max(0.0, began + number / block.max_rate - self._clock.monotonic()))
                body = next(bodies)
                for one in asked if number % 2 == 0 else reversed(asked):
                    await self._ask(one, body)

        await asyncio.gather(*(work() for _ in range(block.concurrency)))

    async def _ask(self, server: "_Asked", body: bytes) -> None:
        began = self._clock.monotonic()
        try:
            await server.call(body + server.naming, timeout=REQUEST_TIMEOUT_S)
            server.latencies_ms.append((self._clock.monotonic() - began) * 1000)
        except grpc.aio.AioRpcError as error:
            server.failures, server.problem = server.failures + 1, f"{error.code().name} {error.details()}"[:200]


class _Asked:
    """One server in one window."""

    def __init__(self, channel: grpc.aio.Channel, naming: bytes) -> None:
        self.call = channel.unary_unary(METHOD)
        self.naming = naming
        self.latencies_ms: list[float] = []
        self.failures = 0
        self.problem = ""

    def window(self, block: Warmup) -> Window:
        """What it was. Its length is the time it had requests: it waits while another server is asked."""
        busy_s = sum(self.latencies_ms) / 1000.0 / block.concurrency
        return Window(tuple(self.latencies_ms), busy_s, self.failures, self.problem)


def _ended(seen: WarmSeen) -> bool:
    return seen.verdict != "undecided" or seen.over
