"""Gates with a query, up to a real Prometheus."""

import asyncio
import json
import socket
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any, ClassVar

import pytest
from millrace_kit.clock import FakeClock
from millrace_rollout_controller import gates, verdicts
from millrace_rollout_controller.gate_state import GateState, begin_step
from millrace_rollout_controller.manifest import Gate
from millrace_rollout_controller.prometheus import Prometheus, PrometheusSettings, single_value
from millrace_rollout_controller.queries import queries

from .peers import Peers, gateway, traffic
from .support import until
from .test_service import apply, background, controller, deployment, peers, phase, settings

__all__ = ["peers"]

GATE = Gate(promql="errors", max=1.0, failureLimit=3)
SUBJECT = {"model": "flight-delay", "candidate": "1.1.0-rc.1+x", "stable": "1.0.0", "namespace": "prod"}


def heard(*answers: float | None, gate: Gate = GATE) -> GateState:
    state = begin_step(GateState())
    for answer in answers:
        state = gates.hear(gate, state, answer)
    return state


@pytest.mark.parametrize(
    ("answers", "verdict"),
    [
        ((), "undecided"),
        ((None,), "undecided"),
        ((float("nan"),), "undecided"),
        ((float("inf"),), "undecided"),
        ((0.5,), "pass"),
        ((1.0,), "pass"),
        ((0.5, None), "undecided"),
        ((2.0,), "undecided"),
        ((2.0, 2.0), "undecided"),
        ((2.0, 2.0, 2.0), "fail"),
        ((2.0, None, 2.0, 2.0), "fail"),
        ((2.0, 2.0, 0.5, 2.0), "undecided"),
        ((2.0, 2.0, 0.5), "pass"),
    ],
)
def test_verdicts_of_answers(answers: tuple[float | None, ...], verdict: str) -> None:
    assert verdicts.judge(GATE, heard(*answers), 3).verdict == verdict


def test_a_lower_bound_and_the_value_in_words() -> None:
    gate = Gate(promql="throughput", min=10.0, failureLimit=1)
    assert verdicts.judge(gate, heard(12.0, gate=gate), 1).verdict == "pass"
    view = verdicts.judge(gate, heard(3.5, gate=gate), 1)
    assert view.verdict == "fail"
    assert "value 3.5" in view.evidence
    assert view.gate == "promql throughput >= 10"


def test_an_answer_of_the_step_before_passes_no_step() -> None:
    assert verdicts.judge(GATE, begin_step(heard(0.5)), 2).verdict == "undecided"


def test_placeholders() -> None:
    wanted = [
        Gate(metric="errorRate", max=0.1),
        Gate(promql='a{m="{{model}}",v="{{candidate}}",o="{{stable}}"}', max=1),
    ]
    assert queries(wanted, SUBJECT) == {1: 'a{m="flight-delay",v="1.1.0-rc.1+x",o="1.0.0"}'}


@pytest.mark.parametrize(
    "answer",
    [
        [], {}, {"data": []}, {"data": {"resultType": "matrix", "result": []}}, {"data": {"resultType": "scalar", "result": 5}},
        {"data": {"resultType": "vector", "result": [{"value": [0, "1"]}, {"value": [0, "1"]}]}},
        {"data": {"resultType": "vector", "result": [{"value": [0, "many"]}]}},
    ],
)  # fmt: skip
def test_an_answer_of_another_form_is_no_number(answer: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        single_value(answer)


class _Page(BaseHTTPRequestHandler):
    body: ClassVar[bytes] = b""
    wait: ClassVar[Event | None] = None

    def do_POST(self) -> None:
        if self.wait is not None:
            self.wait.wait(10)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def page() -> Iterator[tuple[type[_Page], str]]:
    handler = type("Page", (_Page,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("body", [b"", b"{", b"x" * (2 << 20), b'{"data": null}'])
async def test_rubbish_is_no_answer(page: tuple[type[_Page], str], body: bytes) -> None:
    handler, url = page
    handler.body = body
    assert await Prometheus(PrometheusSettings(url=url), FakeClock()).answers(["up"]) == {"up": None}


async def test_a_prometheus_that_is_slow_or_down_is_no_answer(page: tuple[type[_Page], str]) -> None:
    handler, url = page
    release = handler.wait = Event()
    clock = FakeClock()
    try:
        slow = Prometheus(PrometheusSettings(url=url, timeout_s=0.2), clock)
        async with asyncio.timeout(5):
            assert await slow.answers(["up"]) == {"up": None}
    finally:
        release.set()
    down = Prometheus(PrometheusSettings(url="http://127.0.0.1:1"), clock)
    assert await down.answers(["up"]) == {"up": None}
    assert await Prometheus(PrometheusSettings(), clock).answers(["up"]) == {}


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Prometheus that scrapes itself."""
    folder: Path = tmp_path_factory.mktemp("prometheus")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    scrape = {"job_name": "self", "static_configs": [{"targets": [address]}]}
    config = {"global": {"scrape_interval": "200ms", "scrape_timeout": "200ms"}, "scrape_configs": [scrape]}
    (folder / "config.yml").write_text(json.dumps(config))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus", f"--config.file={folder}/config.yml", f"--web.listen-address={address}",
                f"--storage.tsdb.path={folder}/data", "--log.level=error",
            ],
            stdout=log,
            stderr=log,
        )  # fmt: skip
        yield f"http://{address}"
        process.terminate()
        process.wait(20)


@pytest.mark.prometheus
async def test_a_real_prometheus(prometheus: str) -> None:
    clock = FakeClock()
    client = Prometheus(PrometheusSettings(url=prometheus, interval_s=10), clock)

    async def scraped() -> bool:
        clock.advance(10)
        return (await client.answers(['up{job="self"}'])) == {'up{job="self"}': 1.0}

    await until(scraped, what="Prometheus scrapes itself")
    asked = {
        "vector(3.5)": 3.5,
        "scalar(vector(2))": 2.0,
        "42": 42.0,
        "0 / 0": None,
        "1 / 0": None,
        'up{job="nobody"}': None,
        "prometheus_http_requests_total or up": None,
        "sum(": None,
        '"text"': None,
    }
    assert await client.answers(asked) == asked
    assert await client.answers(asked) == {}, "not due yet"
    clock.advance(10)
    assert await client.answers(["42"]) == {"42": 42.0}


@pytest.mark.prometheus
async def test_a_rollout_by_the_answers_of_a_real_prometheus(prometheus: str, tmp_path: Path, peers: Peers) -> None:
    def rollout(promql: str) -> dict[str, object]:
        return {"steps": [{"weight": 20}], "gates": [{"promql": promql, "max": 1, "failureLimit": 2}]}

    asked = PrometheusSettings(url=prometheus, interval_s=0.2)
    async with (
        controller(settings(tmp_path, peers, prometheus=asked)) as (stub, address),
        background(gateway(peers, address), traffic(peers)),
    ):
        await apply(stub, "1.0.0")
        await phase(stub, "Promoted")
        await apply(
            stub, "1.1.0", rollout=rollout('vector(5) unless absent(up{job="self"}) unless up{v="{{candidate}}"}')
        )
        back = await phase(stub, "RolledBack", "1.0.0")
        event = next(e for e in back.events if e.reason == "GateFailed")
        assert "value 5; beyond the bound 2 times in a row" in event.message

        await apply(stub, "1.1.0", rollout=rollout('nothing{version="{{candidate}}"}'))
        await phase(stub, "Progressing")
        sent = peers.requests["1.1.0"]
        await until(lambda: peers.requests["1.1.0"] > sent + 100, what="traffic of the candidate")
        held = await deployment(stub)
        assert held.candidate_weight == 20
        assert "is undecided: no answer that is a number" in held.waiting

        await apply(stub, "1.1.0", rollout=rollout("vector(0.5)"))
        await phase(stub, "Promoted", "1.1.0")
    assert peers.problems == []
