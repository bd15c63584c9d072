"""Predict's first call: features from the feature service.

Look-ups that come while others are under way share the next call, so that a busy gateway asks seldom and for many rows. A look-up
alone is sent at once: nobody waits for company.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.common.v1 import common_pb2
from millrace_api.feature.v1 import feature_pb2
from millrace_kit.errors import InvalidArgumentError, MillraceError, UnavailableError
from millrace_kit.telemetry import trace_headers

from millrace_inference_gateway.feature_calls import FeatureCalls, Trace
from millrace_inference_gateway.predict import Vector, ordered
from millrace_inference_gateway.routes import Route

_ROW = "rows[0].values"
_MIN_CALL_S = 0.001

Inputs = Mapping[str, common_pb2.Value]
_Group = tuple[str, bytes, str]


@dataclass(slots=True)
class _Waiting:
    """One look-up."""

    row: Inputs
    until: float
    trace: Trace
    future: "asyncio.Future[_Found]"


@dataclass(frozen=True, slots=True)
class _Found:
    names: Sequence[str]
    vector: feature_pb2.FeatureVector
    definitions_hash: str
    views: Sequence[str]


class FeatureReads:
    """The feature service, asked for groups of rows: at most `at_once` calls under way, at most `max_rows` rows in each."""

    def __init__(self, calls: FeatureCalls, *, at_once: int, max_rows: int) -> None:
        self._calls = calls
        self._at_once = at_once
        self._max_rows = max_rows
        self._running = 0
        self._waiting: dict[_Group, list[_Waiting]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def vector(
        self, route: Route, row: Inputs, event_time: Timestamp | None, timeout_s: float, definitions: str = ""
    ) -> Vector:
        """The model's features for `row` at `event_time`, by the definitions of that hash, else by those in force.

        Raises:
            InvalidArgumentError: an input is missing or wrong; names it as `inputs[…]`.
            UnavailableError: the feature service does not answer in time.
            MillraceError: any other answer of the feature service.
        """
        loop = asyncio.get_running_loop()
        group = (route.feature_service, event_time.SerializeToString() if event_time is not None else b"", definitions)
        waiting = _Waiting(row, time.monotonic() + timeout_s, trace_headers(), loop.create_future())
        self._waiting.setdefault(group, []).append(waiting)
        if self._running < self._at_once:
            self._running += 1
            # One turn of the loop later, so that calls which came in the same turn go together.
            loop.call_soon(self._send)
        # Instead of `asyncio.timeout`, which costs several times as much.
        late = loop.call_later(timeout_s, _give_up, waiting)
        try:
            found = await waiting.future
        except TimeoutError:
            raise _away(timeout_s, "no answer") from None
        except MillraceError as error:
            raise _feature_error(error, timeout_s) from None
        finally:
            late.cancel()
        vector = found.vector
        values = ordered(route, found.names, vector.values)
        expired: frozenset[str] = frozenset()
        if feature_pb2.FEATURE_STATUS_EXPIRED in (statuses := tuple(vector.statuses)):
            marked = zip(found.names, statuses, strict=False)
            expired = frozenset(name for name, status in marked if status == feature_pb2.FEATURE_STATUS_EXPIRED)
        ages = [
            common_pb2.FeatureAge(view=view, age_ms=age_ms)
            for view, age_ms in zip(found.views, vector.view_ages_ms, strict=False)
            if age_ms >= 0
        ]
        # The call's own figure is of all its rows, among them those of other callers.
        oldest_ms = max((one.age_ms for one in ages), default=0) if found.views else vector.max_age_ms
        return Vector(values, oldest_ms, found.definitions_hash, expired, tuple(ages))

    def _send(self) -> None:
        """Ask for the oldest group, or leave the place to whoever comes next."""
        for group in list(self._waiting):
            taken = self._take(group)
            if taken:
                task = asyncio.get_running_loop().create_task(self._ask(group, taken))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                return
        self._running -= 1

    def _take(self, group: _Group) -> list[_Waiting]:
        waiting = [one for one in self._waiting.pop(group) if not one.future.done()]
        if len(waiting) > self._max_rows:
            self._waiting[group] = waiting[self._max_rows :]
        return waiting[: self._max_rows]

    async def _ask(self, group: _Group, taken: list[_Waiting]) -> None:
        try:
            await self._answer(group, taken)
        finally:
            # The place goes to those that have waited meanwhile.
            self._send()

    async def _answer(self, group: _Group, taken: list[_Waiting]) -> None:
        request = _request(group, [one.row for one in taken])
        timeout_s = max(one.until for one in taken) - time.monotonic()
        try:
            answer = await self._calls.read(request, max(_MIN_CALL_S, timeout_s), taken[0].trace)
            response = _checked(answer, len(taken))
        except MillraceError as error:
            if len(taken) > 1 and not _is_everybodys(error):
                # One row is wrong, and only its caller may hear of it: the halves are asked again.
                middle = len(taken) // 2
                await asyncio.gather(self._answer(group, taken[:middle]), self._answer(group, taken[middle:]))
                return
            for one in taken:
                _settle(one, error=error)
            return
        for one, vector in zip(taken, response.vectors, strict=True):
            _settle(one, _Found(response.feature_names, vector, response.definitions_hash, response.view_names))


def _request(group: _Group, rows: Sequence[Inputs]) -> bytes:
    service, event_time, definitions = group
    request = feature_pb2.GetOnlineFeaturesRequest(
        feature_service=service,
        rows=[feature_pb2.EntityRow(values=row) for row in rows],
        definitions_hash=definitions,
        with_view_ages=True,
    )
    if event_time:
        request.event_time.ParseFromString(event_time)
    return request.SerializeToString()


def _give_up(one: _Waiting) -> None:
    _settle(one, error=TimeoutError())


def _settle(one: _Waiting, found: _Found | None = None, error: Exception | None = None) -> None:
    if one.future.done():
        return
    if error is not None:
        one.future.set_exception(error)
    elif found is not None:
        one.future.set_result(found)


def _checked(answer: bytes, rows: int) -> feature_pb2.GetOnlineFeaturesResponse:
    try:
        response = feature_pb2.GetOnlineFeaturesResponse.FromString(answer)
    except DecodeError:
        raise _bad_answer("did not answer a message of its method") from None
    width = len(response.feature_names)
    if len(response.vectors) != rows or any(len(vector.values) != width for vector in response.vectors):
        raise _bad_answer("did not answer one whole vector a row")
    return response


def _bad_answer(problem: str) -> MillraceError:
    return MillraceError(grpc.StatusCode.INTERNAL, "BAD_FEATURE_ANSWER", f"the feature service {problem}")


def _is_everybodys(error: MillraceError) -> bool:
    """Whether the error would meet every row alike."""
    return error.code is not grpc.StatusCode.INVALID_ARGUMENT


def _away(timeout_s: float, problem: str) -> UnavailableError:
    text = f"the feature service does not answer within {timeout_s * 1000:.0f} ms: {problem}"
    return UnavailableError("FEATURE_SERVICE_UNAVAILABLE", text)


def _feature_error(found: MillraceError, timeout_s: float) -> MillraceError:
    """As this look-up's caller hears of it; `found` may be that of several."""
    if found.code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
        return _away(timeout_s, found.message)
    if found.code is grpc.StatusCode.INVALID_ARGUMENT:
        # The caller wrote `inputs`; that is where the field is for it.
        field = found.metadata.get("field", _ROW)
        problem = found.message.removeprefix(f"{field}: ")
        return InvalidArgumentError(field.replace(_ROW, "inputs", 1), problem, found.reason)
    return MillraceError(found.code, found.reason, found.message, found.metadata)
