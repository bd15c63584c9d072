"""A client of Prometheus' instant queries: one number or nothing.

Asked in a thread through the standard library, with a deadline for the whole answer and a limit for its size.
"""

import asyncio
import json
import logging
import math
from collections.abc import Iterable
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from millrace_kit.clock import Clock
from millrace_kit.settings import Settings
from pydantic import Field

from millrace_rollout_controller.metrics import POLL_FAILURES

log = logging.getLogger(__name__)
MAX_ANSWER_BYTES = 1 << 20
MAX_QUERIES_AT_ONCE = 8


class PrometheusSettings(Settings):
    """Where gates with `promql` ask."""

    url: str = Field(default="", pattern=r"^(|https?://[^\s?#]+)$")
    """Base address, for example http://prometheus.monitoring:9090; empty for none, then such gates stay undecided."""
    bearer_token: str = ""
    """Sent as `Authorization: Bearer`; empty for none."""
    timeout_s: float = Field(default=5.0, gt=0, le=60)
    """Deadline of one query, answer included."""
    interval_s: float = Field(default=10.0, gt=0, le=3600)
    """Time between two answers to the same query; at least the scrape interval, or a failure limit counts one sample twice."""


class Prometheus:
    """Asks each query at most once an interval."""

    def __init__(self, settings: PrometheusSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._asked: dict[str, float] = {}
        self._slots = asyncio.Semaphore(MAX_QUERIES_AT_ONCE)

    async def answers(self, queries: Iterable[str]) -> dict[str, float | None]:
        """Answers to the queries that are due; None where there is no single number in time."""
        wanted = set(queries)
        self._asked = {query: at for query, at in self._asked.items() if query in wanted}
        if not self._settings.url:
            return {}
        now = self._clock.monotonic()
        due = [q for q in sorted(wanted) if q not in self._asked or now - self._asked[q] >= self._settings.interval_s]
        self._asked |= dict.fromkeys(due, now)
        found = await asyncio.gather(*(self._ask(query) for query in due))
        return dict(zip(due, found, strict=True))

    async def _ask(self, query: str) -> float | None:
        async with self._slots:
            try:
                async with asyncio.timeout(self._settings.timeout_s):
                    return await asyncio.to_thread(self._fetch, query)
            except (OSError, ValueError, TimeoutError) as error:
                # HTTPError is an OSError; what Prometheus says about the query is in its body.
                POLL_FAILURES.labels("prometheus").inc()
                log.warning("prometheus: %s: %s", query, _reason(error))
                return None

    def _fetch(self, query: str) -> float | None:
        form = urlencode({"query": query, "timeout": f"{self._settings.timeout_s:g}s"}).encode()
        request = Request(f"{self._settings.url.rstrip('/')}/api/v1/query", data=form)  # noqa: S310 - http(s) by the settings
        if self._settings.bearer_token:
            request.add_header("Authorization", f"Bearer {self._settings.bearer_token}")
        with urlopen(request, timeout=self._settings.timeout_s) as response:  # noqa: S310
            body = response.read(MAX_ANSWER_BYTES + 1)
        if len(body) > MAX_ANSWER_BYTES:
            raise ValueError(f"the answer is larger than {MAX_ANSWER_BYTES} bytes")
        return single_value(json.loads(body))


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"{error.code} {error.read(500).decode(errors='replace')}"
    return str(error) or type(error).__name__


def single_value(answer: Any) -> float | None:
    """The one number of an instant query's answer; None for an empty one and for NaN or infinity.

    Raises:
        ValueError: it has another form, or more than one value.
    """
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, dict) or data.get("resultType") not in {"vector", "scalar"}:
        raise ValueError("the answer is neither a vector nor a scalar")
    result = data.get("result")
    if data["resultType"] == "vector":
        if not isinstance(result, list) or len(result) > 1:
            raise ValueError("the query gives more than one value; aggregate it, for example with sum()")
        if not result:
            return None
        result = result[0].get("value")
    if not isinstance(result, list) or len(result) != 2:
        raise ValueError("the answer has no value")
    value = float(result[1])
    return value if math.isfinite(value) else None
