"""Requests and errors as the model servers count them, of callers too who go around the gateways (`rollout.countedBy: Servers`).

Triton keeps running sums for each model and serves them as metrics: requests that succeeded and that failed, and how long they took in all.
Sums tell no percentiles, so there are no latencies here. Every call that passed a gateway is in the servers' sums as well; so a deployment is
counted by one of the two, never by both.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from millrace_rollout_controller.counts import Counts
from millrace_rollout_controller.evidence import GatewayFigures, Poll
from millrace_rollout_controller.metrics import POLL_FAILURES

SUCCEEDED, FAILED = "nv_inference_request_success", "nv_inference_request_failure"
FAILED_ANSWERS = "millrace_failed_answers"
"""Of `triton_model`: answers that are errors, which Triton's Python backend counts as successes."""
GIVEN_UP = "CANCELED"
"""Reason of a failure that is the caller's doing."""
MAX_PAGE_BYTES = 4 << 20
"""Largest page of metrics that is read."""
Servers = Mapping[str, Sequence[str]]
"""Endpoints by version."""


class ServerFigures:
    """Asks model servers for their metrics; who does not answer in time is left out.

    Args:
        timeout_s: deadline of each question.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def poll(self, wanted: Mapping[str, Servers]) -> dict[str, dict[str, GatewayFigures]]:
        """What the servers of each model say, by `source` of the endpoint."""
        asked = [(model, version, end) for model, servers in wanted.items() for version, end in _apart(servers)]
        answers = await asyncio.gather(*(self._ask(endpoint, model) for model, _, endpoint in asked))
        found: dict[str, dict[str, GatewayFigures]] = {model: {} for model in wanted}
        for (model, version, endpoint), counts in zip(asked, answers, strict=True):
            if counts is not None:
                # A server that began anew is known by sums that fell.
                found[model][source(endpoint)] = GatewayFigures("", {version: counts})
        return found

    async def _ask(self, endpoint: str, model: str) -> Counts | None:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout)
        try:
            async with self._session.get(f"http://{metrics_address(endpoint)}/metrics") as response:
                response.raise_for_status()
                page = await response.content.read(MAX_PAGE_BYTES)
        except (aiohttp.ClientError, TimeoutError):
            POLL_FAILURES.labels("servers").inc()
            return None
        return counts(page.decode(errors="replace"), model)

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None


def counts(page: str, model: str) -> Counts | None:
    """Requests and errors of one model in a server's metrics; None where the model is not told of."""
    sums = {SUCCEEDED: 0, FAILED: 0, FAILED_ANSWERS: 0}
    known = False
    for name, labels, value in _samples(page, sums):
        if labels.get("model") == model and labels.get("reason") != GIVEN_UP:
            sums[name] += int(value)
            known = known or name == SUCCEEDED
    if not known:
        return None
    requests = sums[SUCCEEDED] + sums[FAILED]
    return Counts(requests=requests, errors=min(requests, sums[FAILED] + sums[FAILED_ANSWERS]))


def _samples(page: str, names: Iterable[str]) -> Iterable[tuple[str, Mapping[str, str], float]]:
    """Only the lines that are asked for: a page has many more, and is read often."""
    lines = [line for line in page.splitlines() if line.startswith(tuple(names))]
    for family in text_string_to_metric_families("\n".join([*lines, ""])):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


def metrics_address(endpoint: str) -> str:
    """Where a server tells its metrics: at the port after its gRPC port, as Triton's own 8002 and 8001."""
    host, _, port = endpoint.rpartition(":")
    return f"{host}:{int(port) + 1}"


def source(endpoint: str) -> str:
    """Name of a server among the sources of evidence."""
    return f"server {endpoint}"


def sources(servers: Servers) -> list[str]:
    """Every server that counts."""
    return [source(endpoint) for _, endpoint in _apart(servers)]


def _apart(servers: Servers) -> list[tuple[str, str]]:
    """Version and endpoint of servers with one version; of a server with several it is not known whose calls it counts."""
    versions: dict[str, set[str]] = {}
    for version, endpoints in servers.items():
        for endpoint in endpoints:
            versions.setdefault(endpoint, set()).add(version)
    return [(version, endpoint) for endpoint, (version, *others) in sorted(versions.items()) if not others]


def counted_by_servers(poll: Poll, servers: Mapping[str, GatewayFigures]) -> Poll:
    """The poll with the servers' requests and errors instead of the gateways', who keep only what nobody else knows."""
    nothing = {"requests": 0, "errors": 0, "latency": {}}
    gateways = {
        address: replace(
            figures, versions={v: known.model_copy(update=nothing) for v, known in figures.versions.items()}
        )
        for address, figures in poll.gateways.items()
    }
    return replace(poll, gateways={**gateways, **servers})
