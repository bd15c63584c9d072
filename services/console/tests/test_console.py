"""The view model on made answers, the web server with every service down, and the page in a real browser."""

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest
import uvicorn
from millrace_api.drift.v1 import drift_pb2, drift_pb2_grpc
from millrace_api.feature.v1 import feature_pb2
from millrace_api.prediction.v1 import prediction_pb2
from millrace_api.registry.v1 import registry_pb2, registry_pb2_grpc
from millrace_api.rollout.v1 import rollout_pb2, rollout_pb2_grpc
from millrace_console.app import build
from millrace_console.settings import ConsoleSettings
from millrace_console.sources import SERVICES, Answers, Sources
from millrace_console.view import latency_quantile, page
from millrace_kit.server import Service, running
from millrace_kit.settings import ServiceSettings
from parts.server import free_port

EVIL = "<img src=x onerror=document.title='owned'>"


def answers() -> Answers:
    arms = [
        rollout_pb2.Arm(version="1.0.0", role=rollout_pb2.ARM_ROLE_STABLE, weight=80, endpoints=["a:1", "b:1"]),
        rollout_pb2.Arm(version="1.1.0", role=rollout_pb2.ARM_ROLE_CANDIDATE, weight=20, endpoints=["c:1"]),
    ]
    gate = rollout_pb2.GateResult(gate="errorRate <= 0.05", verdict=rollout_pb2.VERDICT_UNDECIDED, evidence=EVIL)
    deployment = rollout_pb2.Deployment(
        name="flight-delay", model="flight-delay", stable_version="1.0.0", candidate_version="1.1.0", candidate_weight=20, step=1, steps=4,
        phase="Progressing", ready=True, arms=arms, gates=[gate], strategy="Canary", waiting=EVIL, previous_version="0.9.0",
        comparisons=[
            rollout_pb2.ComparisonResult(
                metric="errorRate", segment="UA", lower=-0.1, upper=float("nan"), better="undecided", evidence="exact"
            )
        ],
    )  # fmt: skip
    buckets = [
        prediction_pb2.LatencyBucket(le_ms=le, count=count) for le, count in ((5, 90), (10, 9), (float("inf"), 1))
    ]
    return Answers(
        problems={"drift": "down for a test"},
        versions=[
            registry_pb2.ModelVersion(
                model="flight-delay",
                version="1.1.0",
                stage=registry_pb2.STAGE_PRODUCTION,
                digest="d" * 64,
                rollouts=[
                    registry_pb2.RolloutRecord(deployment="flight-delay", decision="Promoted", evidence_sha256="e" * 64)
                ],
            )
        ],
        deployments=rollout_pb2.ListDeploymentsResponse(deployments=[deployment]),
        figures=prediction_pb2.GetFiguresResponse(
            versions=[
                prediction_pb2.VersionFigures(
                    model="flight-delay", version="1.1.0", requests=100, errors=1, latency=buckets
                )
            ]
        ),
        outcomes=[drift_pb2.OutcomeFigures(model="flight-delay", version="1.1.0", outcomes=10, correct=8)],
    )


def test_view_model() -> None:
    shown = page(answers())
    assert shown["services"]["drift"] == {"up": False, "problem": "down for a test"}
    assert shown["services"]["gateway"]["up"]
    assert shown["deployments"][0]["step"] == 2
    assert shown["deployments"][0]["gates"][0]["verdict"] == "undecided"
    assert shown["deployments"][0]["strategy"] == "Canary"
    compared = shown["deployments"][0]["comparisons"][0]
    assert (compared["segment"], compared["upper"], compared["evidence"]) == ("UA", None, "exact")
    assert shown["versions"][0]["weight"] == 20
    assert shown["figures"][0]["accuracy"] == 0.8
    assert shown["facts"]["gateway"] == {"predictions": 100, "errors": 1}
    json.dumps(shown, allow_nan=False)


def test_what_json_or_this_build_has_no_word_for_breaks_nothing() -> None:
    """NaN and infinity have no place in JSON, and a newer service may send an enum value this console does not know."""
    given = answers()
    assert given.versions is not None
    assert given.deployments is not None
    given.versions[0].metrics["auc"] = float("nan")
    given.versions[0].stage = 99
    given.deployments.deployments[0].gates[0].verdict = 99
    finding = drift_pb2.Finding(model="m", kind=99, p_value=float("nan"), effect_size=float("inf"))
    finding.window.start.seconds = 1 << 60
    given.findings = drift_pb2.ListFindingsResponse(findings=[finding])
    shown = page(given)
    json.dumps(shown, allow_nan=False)
    assert shown["versions"][0]["metrics"] == {"auc": None}
    assert shown["versions"][0]["stage"] == "99"
    assert (shown["findings"][0]["kind"], shown["findings"][0]["effect"]) == ("99", None)


def test_features_that_differ_from_the_lake_come_first() -> None:
    def window(feature: str, **counts: int) -> feature_pb2.ConsistencyWindow:
        return feature_pb2.ConsistencyWindow(feature_service="main", feature=feature, **counts)

    given = Answers(
        progress=feature_pb2.GetProgressResponse(
            contracts=[feature_pb2.ContractProgress(contract="c", records=5, next_offset=3, end_offset=7)]
        ),
        consistency=feature_pb2.GetConsistencyResponse(
            windows=[window("a", compared=10), window("b", compared=10, missing=1), window("b", compared=30, extra=1)],
            findings=[
                feature_pb2.ConsistencyFinding(feature_service="main", feature="b", served=float("nan"), expected=2),
                feature_pb2.ConsistencyFinding(feature_service="main", feature="b", served=1, expected=1.5),
            ],
        ),
    )
    shown = page(given)
    assert shown["streams"] == [{"contract": "c", "records": 5, "watermark": "", "behind": 4}]
    first, second = shown["consistency"]
    assert (first["feature"], first["share"], first["missing"], first["extra"]) == ("b", 0.05, 1, 1)
    assert (first["served"], first["expected"]) == (None, 2)
    assert (second["feature"], second["share"], second["served"]) == ("a", 0, None)
    json.dumps(shown, allow_nan=False)


class Registry(registry_pb2_grpc.RegistryServiceServicer):
    async def ListModels(self, request, context):
        return registry_pb2.ListModelsResponse(models=[registry_pb2.Model(name="flight-delay")])

    async def ListVersions(self, request, context):
        version = registry_pb2.ModelVersion(model=request.model, version="1.0.0", stage=registry_pb2.STAGE_STAGING)
        return registry_pb2.ListVersionsResponse(versions=[version])


class Drift(drift_pb2_grpc.DriftServiceServicer):
    async def ListFindings(self, request, context):
        return drift_pb2.ListFindingsResponse(findings=[drift_pb2.Finding(model="flight-delay", effect_size=0.5)])

    async def GetOutcomes(self, request, context):
        return drift_pb2.GetOutcomesResponse(
            versions=[drift_pb2.OutcomeFigures(model=request.model, version="1.0.0", outcomes=4, correct=3)]
        )


async def test_answers_come_over_grpc_and_one_hanging_service_hides_nothing() -> None:
    class Hanging(rollout_pb2_grpc.RolloutServiceServicer):
        async def ListDeployments(self, request, context):
            await asyncio.Event().wait()

    def one(add) -> Service:
        return Service("fake", [add])

    services = {
        "registry": one(lambda s: registry_pb2_grpc.add_RegistryServiceServicer_to_server(Registry(), s)),
        "drift": one(lambda s: drift_pb2_grpc.add_DriftServiceServicer_to_server(Drift(), s)),
        "rollout": one(lambda s: rollout_pb2_grpc.add_RolloutServiceServicer_to_server(Hanging(), s)),
    }
    async with AsyncExitStack() as stack:
        addresses = {f"{name}_address": "127.0.0.1:1" for name in SERVICES}
        for name, service in services.items():
            addresses[f"{name}_address"] = await stack.enter_async_context(running(service, ServiceSettings(drain_s=0)))
        sources = Sources(ConsoleSettings(call_timeout_s=0.7, refresh_s=0.2, **addresses))
        stack.push_async_callback(sources.close)
        shown = page(await asyncio.wait_for(sources.latest(), 10))
    assert {name for name, service in shown["services"].items() if service["up"]} == {"registry", "drift"}
    assert shown["versions"][0]["stage"] == "Staging"
    assert shown["facts"]["drift"] == {"findings": 1, "outcomes": 4}
    assert shown["findings"][0]["effect"] == 0.5


def test_latency_quantile() -> None:
    figures = answers().figures
    assert figures is not None
    assert latency_quantile(figures.versions[0], 0.5) == 5
    assert latency_quantile(figures.versions[0], 0.99) == 10
    assert latency_quantile(figures.versions[0], 1.0) is None
    assert latency_quantile(prediction_pb2.VersionFigures(), 0.5) is None


async def test_services_that_are_down_are_shown_as_down() -> None:
    nobody = "127.0.0.1:1"
    settings = ConsoleSettings(call_timeout_s=0.5, **{f"{name}_address": nobody for name in SERVICES})
    sources = Sources(settings)
    found = await asyncio.wait_for(sources.latest(), 5)
    assert set(found.problems) == set(SERVICES)
    assert not any(service["up"] for service in page(found)["services"].values())
    await sources.close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    async def latest(self: Sources) -> Answers:
        return answers()

    monkeypatch.setattr(Sources, "latest", latest)
    port = free_port()
    web = uvicorn.Server(uvicorn.Config(build(ConsoleSettings()), host="127.0.0.1", port=port, log_config=None))
    thread = threading.Thread(target=web.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not web.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    web.should_exit = True
    thread.join(10)


@pytest.mark.browser
def test_page_in_a_browser(server: str) -> None:
    from playwright.sync_api import sync_playwright

    arguments = [
        "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync",
    ]  # fmt: skip
    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        tab = browser.new_page()
        problems: list[str] = []
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        tab.goto(server)
        tab.wait_for_selector("#rollouts .bar .candidate")
        assert "1.1.0" in tab.inner_text("#rollouts .bar .candidate")
        assert "down: drift" in tab.inner_text("#state")
        assert tab.locator("#node-drift.down").count() == 1
        assert EVIL in tab.inner_text("#rollouts"), "a service's text is shown as text"
        assert tab.title() == "Millrace"
        assert not problems
        browser.close()
