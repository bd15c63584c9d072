"""The loaders in the pods as the controller sees them: each is told what its server should hold, and asked what it does."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import grpc.aio
from millrace_api.rollout.v1 import loader_pb2, loader_pb2_grpc

from millrace_rollout_controller.plans import Refusal

log = logging.getLogger(__name__)
FIRST_S = 3.0
"""Longest wait for the first answers of the pods that are there when a controller starts."""


@dataclass(frozen=True, slots=True)
class Told:
    """One pod, and what its server should hold."""

    uid: str
    address: str
    """`host:port` of the loader."""
    document: str = ""
    """Empty only asks."""


@dataclass(frozen=True, slots=True)
class Held:
    """One version in one pod."""

    loaded: bool
    ready: bool
    refusal: Refusal | None = None


@dataclass(slots=True)
class _Follower:
    told: Told
    channel: grpc.aio.Channel
    news: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    held: Mapping[str, Held] | None = None
    """By version; None before the first answer. The last answer stays, for a loader that restarts changes nothing in the server."""
    trouble: str = ""
    asked: asyncio.Event = field(default_factory=asyncio.Event)


class Loaders:
    """One follower a pod.

    Args:
        open_channel: makes a channel to an address.
        poll_s: time between two questions.
        timeout_s: deadline of each.
        changed: called when an answer differs from the one before.
    """

    def __init__(
        self,
        open_channel: Callable[[str], grpc.aio.Channel],
        *,
        poll_s: float,
        timeout_s: float,
        changed: Callable[[], None],
    ) -> None:
        self._open = open_channel
        self._poll_s = poll_s
        self._timeout_s = timeout_s
        self._changed = changed
        self._followers: dict[str, _Follower] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def converge(self, told: Mapping[str, Told]) -> None:
        """Follow exactly these pods, by name; returns at once."""
        for name, follower in list(self._followers.items()):
            wanted = told.get(name)
            if wanted is None or (wanted.uid, wanted.address) != (follower.told.uid, follower.told.address):
                self._end(self._followers.pop(name))
        for name, one in told.items():
            known = self._followers.get(name)
            if known is None:
                made = self._followers[name] = _Follower(one, self._open(one.address))
                made.task = asyncio.create_task(self._follow(made), name=f"loader of {name}")
            elif known.told != one:
                known.told = one
                known.news.set()

    async def first(self) -> None:
        """Wait until every pod was asked once, at most `FIRST_S`."""
        waits = [follower.asked.wait() for follower in self._followers.values()]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*waits), FIRST_S)

    def held(self, pod: str) -> Mapping[str, Held]:
        """What the pod's server holds, by version, as last heard."""
        follower = self._followers.get(pod)
        return (follower.held if follower else None) or {}

    def trouble(self, pod: str) -> str:
        """Why the pod's loader did not answer the last question; empty when it did."""
        follower = self._followers.get(pod)
        return follower.trouble if follower else ""

    async def close(self) -> None:
        """Ask no more."""
        self.converge({})
        await asyncio.gather(*self._ending, return_exceptions=True)

    def _end(self, follower: _Follower) -> None:
        if follower.task is not None:
            follower.task.cancel()
            self._ending.add(follower.task)
            follower.task.add_done_callback(self._ending.discard)

    async def _follow(self, follower: _Follower) -> None:
        stub = loader_pb2_grpc.LoaderServiceStub(follower.channel)
        try:
            while True:
                follower.news.clear()
                before = follower.held, follower.trouble
                try:
                    request = loader_pb2.HoldRequest(document=follower.told.document)
                    answer = await stub.Hold(request, timeout=self._timeout_s)
                    follower.held, follower.trouble = {one.version: _held(one) for one in answer.versions}, ""
                except grpc.aio.AioRpcError as error:
                    follower.trouble = f"{error.code().name}: {error.details()}"
                follower.asked.set()
                if (follower.held, follower.trouble) != before:
                    self._changed()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(follower.news.wait(), self._poll_s)
        finally:
            await follower.channel.close()


def _held(one: loader_pb2.HeldVersion) -> Held:
    refusal = Refusal(one.reason, one.message, permanent=one.permanent) if one.reason else None
    return Held(one.loaded, one.ready, refusal)
