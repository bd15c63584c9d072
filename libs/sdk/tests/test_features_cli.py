"""`millrace features consistency` against a server that answers what a feature service would."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import grpc
import pytest
from click.testing import CliRunner
from millrace.cli.main import main
from millrace.values import to_range, to_timestamp, to_values
from millrace_api.feature.v1 import feature_pb2 as pb
from millrace_api.feature.v1 import feature_pb2_grpc

AT = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Service(feature_pb2_grpc.FeatureServiceServicer):
    def __init__(self) -> None:
        self.asked: list[pb.GetConsistencyRequest] = []

    def GetConsistency(self, request, context):
        self.asked.append(request)
        window = pb.ConsistencyWindow(
            feature_service="main", feature="v__f", window=to_range(AT, AT.replace(hour=13)), compared=200, mismatched=3,
            missing=1, smape=0.25,
        )  # fmt: skip
        finding = pb.ConsistencyFinding(
            feature_service="main", feature="v__f", kind=pb.CONSISTENCY_KIND_MISMATCH, entity=to_values({"user": "u3"}),
            asked_for=to_timestamp(AT), expected=2, served=4,
        )  # fmt: skip
        return pb.GetConsistencyResponse(windows=[window], findings=[finding][: request.max_findings], waiting=7)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch):
    servicer = Service()
    server = grpc.server(ThreadPoolExecutor(2))
    feature_pb2_grpc.add_FeatureServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("MILLRACE_FEATURE_ADDRESS", f"127.0.0.1:{port}")
    yield servicer
    server.stop(None)


def test_a_table_and_examples_and_an_exit_code(service: Service) -> None:
    done = CliRunner().invoke(main, ["features", "consistency", "main", "--since", "2026-01-01"])
    assert done.exit_code == 1
    assert service.asked[0] == pb.GetConsistencyRequest(
        feature_service="main", time_range=to_range(datetime(2026, 1, 1, tzinfo=UTC), None), max_findings=5
    )
    lines = done.stdout.splitlines()
    assert lines[1].split() == ["main", "v__f", "2026-01-01", "12:00", "200", "2.00%", "3", "1", "0", "0.2500"]
    assert lines[2] == "mismatch: v__f of user=u3 at 2026-01-01T12:00:00Z: served 4, the lake says 2"
    assert done.stderr == "7 answers wait for their check\n"


def test_a_rate_below_the_alarm_is_well(service: Service) -> None:
    done = CliRunner().invoke(main, ["features", "consistency", "--alarm", "0.02", "--examples", "0", "-o", "json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["windows"][0]["missing"] == "1"
