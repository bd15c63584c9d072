"""Finds the two answers to one request: the one its caller got and the one of the version that got a copy.

Both come by the access log, in any order and late; Predict's come from Predict itself. Only what was sampled can be paired. The halves that
wait are bounded in number, bytes and age; an answer to a copy that goes without its other half is counted.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from millrace_inference_gateway.routes import RouteTable
from millrace_inference_gateway.shadow_figures import ShadowFigures, compare

MAX_WAITING = 8192
MAX_WAITING_BYTES = 32 * 1024 * 1024
MAX_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class _Half:
    model: str
    version: str
    copied: bool
    answer: bytes
    segment: str
    since_s: float


class ShadowPairs:
    """Halves that wait for each other.

    Args:
        table: the routes; only of models with a version that gets copies is anything kept.
        figures: where comparisons are counted.
        monotonic: seconds that only rise.
    """

    def __init__(self, table: Callable[[], RouteTable], figures: ShadowFigures, monotonic: Callable[[], float]) -> None:
        self._table = table
        self._figures = figures
        self._monotonic = monotonic
        self._waiting: OrderedDict[str, _Half] = OrderedDict()
        self._bytes = 0

    def wants(self, model: str) -> bool:
        """Whether the model has a version that gets copies."""
        route = self._table().routes.get(model)
        return route is not None and any(arm.mirror for arm in route.arms)

    def answered(self, request_id: str, model: str, version: str, answer: bytes) -> None:
        """A caller got this serialized `ModelInferResponse`."""
        self._take(
            request_id, _Half(model, version, copied=False, answer=answer, segment="", since_s=self._monotonic())
        )

    def copied(self, request_id: str, model: str, version: str, answer: bytes, segment: str) -> None:
        """A copy was answered OK with this; empty when the answer was not kept."""
        if not answer:
            self._figures.unpaired += 1
            return
        half = _Half(model, version, copied=True, answer=answer, segment=segment, since_s=self._monotonic())
        self._take(request_id, half)

    def _take(self, request_id: str, half: _Half) -> None:
        route = self._table().routes.get(half.model)
        if not request_id or not half.answer or route is None:
            return
        shadow = next((arm.version for arm in route.arms if arm.mirror), "")
        if not shadow or (half.version == shadow) != half.copied:
            return
        other = self._waiting.pop(request_id, None)
        if other is not None:
            self._bytes -= len(other.answer)
            if other.copied != half.copied and other.model == half.model:
                self._pair(half, other, route.output_tensor)
                return
        self._waiting[request_id] = half
        self._bytes += len(half.answer)
        self._forget(half.since_s)

    def _pair(self, one: _Half, two: _Half, score: str) -> None:
        copy, answer = (one, two) if one.copied else (two, one)
        found = compare(answer.answer, copy.answer, score)
        if found is None:
            self._figures.unpaired += 1
        else:
            self._figures.add(copy.model, copy.version, copy.segment, found)

    def _forget(self, now_s: float) -> None:
        while self._waiting:
            oldest = next(iter(self._waiting.values()))
            full = len(self._waiting) > MAX_WAITING or self._bytes > MAX_WAITING_BYTES
            if not full and now_s - oldest.since_s < MAX_WAIT_S:
                return
            self._waiting.popitem(last=False)
            self._bytes -= len(oldest.answer)
            # Most requests are not copied; only a copy was meant to be compared.
            self._figures.unpaired += oldest.copied
