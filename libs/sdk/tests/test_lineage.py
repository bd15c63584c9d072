"""The walk back from a prediction, over answers made by hand."""

import hashlib
import json
from types import SimpleNamespace
from typing import cast

import grpc
import pytest
from millrace import Client, MillraceError
from millrace.lineage import trace_prediction, trace_version
from millrace_api.common.v1.common_pb2 import TableVersion
from millrace_api.drift.v1.drift_pb2 import GetPredictionResponse
from millrace_api.feature.v1.feature_pb2 import TrainingSet
from millrace_api.registry.v1.registry_pb2 import Lineage, ModelVersion, RolloutRecord
from millrace_api.training.v1.training_pb2 import Run
from millrace_kit.errors import DataLossError, NotFoundError

BUNDLE = json.dumps(
    {
        "format": "millrace.rollout-evidence/1",
        "decisions": [
            {"at": "t1", "decision": "StepPassed", "weight": 5.0, "message": "enough", "gates": []},
            {"at": "t2", "decision": "Promoted", "weight": 100.0, "message": "all of it",
             "gates": [{"gate": "errorRate <= 0.05", "verdict": "pass"}],
             "comparisons": [
                 {"metric": "business/revenue", "segment": "UA", "better": "candidate", "lower": 0.5, "upper": 2.0},
                 {"metric": "business/revenue", "segment": "DL", "better": "undecided", "lower": -0.5, "upper": 1.0}]},
        ],
    }
).encode()  # fmt: skip
SHA = hashlib.sha256(BUNDLE).hexdigest()
LINEAGE = Lineage(run_id="run", training_set_digest="set", definitions_hash="definitions", seed=7)


ROLLOUT = RolloutRecord(deployment="d", decision="Promoted", against="0.9.0", evidence_sha256=SHA)


def client(*, answered: str = "digest", run_is_gone: bool = False, evidence: bytes = BUNDLE) -> Client:
    def read_artifact(sha256: str) -> bytes:
        if hashlib.sha256(evidence).hexdigest() != sha256:
            raise DataLossError("DIGEST_MISMATCH", f"{sha256} is not what it was")
        return evidence

    def run(_run_id: str) -> Run:
        if run_is_gone:
            raise NotFoundError("run", "run")
        return Run(id="run", cause="asked for")

    return cast(
        "Client",
        SimpleNamespace(
            drift=SimpleNamespace(
                prediction=lambda i: GetPredictionResponse(prediction_id=i, model="m", version="1.0.0", digest=answered)
            ),
            registry=SimpleNamespace(
                version=lambda m, v: ModelVersion(
                    model=m, version=v or "1.0.0", digest="digest", lineage=LINEAGE, rollouts=[ROLLOUT]
                ),
                read_artifact=read_artifact,
            ),
            training=SimpleNamespace(run=run),
            features=SimpleNamespace(
                training_set=lambda digest: TrainingSet(
                    digest=digest,
                    rows=3,
                    table_versions=[TableVersion(table=t, version=5) for t in ("flights", "weather")],
                )
            ),
        ),
    )


def test_the_whole_chain() -> None:
    found = trace_prediction(client(), "p")
    assert [link.kind for link in found.links] == [
        "prediction", "model version", "rollout", "run", "training set", "table", "table", "definitions",
    ]  # fmt: skip
    assert found.depths() == [0, 1, 2, 2, 3, 4, 4, 4]
    assert found.links[5].identity == "flights @ version 5"
    assert not found.gaps


def test_a_version_leads_to_the_decisions_of_its_rollouts() -> None:
    found = trace_version(client(), "m")
    assert [link.kind for link in found.links][:3] == ["model version", "rollout", "run"]
    assert found.depths()[:3] == [0, 1, 1]
    rollout = found.links[1]
    assert rollout.identity == "d: Promoted"
    assert rollout.facts["decision 1"] == "t1 StepPassed at 5 %: enough"
    assert rollout.facts["decision 2"] == (
        "t2 Promoted at 100 %: all of it (errorRate <= 0.05: pass; business/revenue of 'UA': candidate is better (+0.5 to +2))"
    )


def test_evidence_that_is_not_what_it_was_is_a_gap() -> None:
    found = trace_version(client(evidence=b"{}"), "m")
    assert len(found.gaps) == 1
    assert SHA in found.gaps[0]
    assert not [name for name in found.links[1].facts if name.startswith("decision")]


def test_a_step_that_cannot_be_taken_is_a_gap_and_the_rest_is_still_told() -> None:
    found = trace_prediction(client(run_is_gone=True), "p")
    assert len(found.gaps) == 1
    assert "run" in found.gaps[0]
    assert found.links[-1].identity == "definitions"


def test_another_digest_than_the_registrys_is_data_loss() -> None:
    with pytest.raises(MillraceError, match="but other answered") as caught:
        trace_prediction(client(answered="other"), "p")
    assert caught.value.code is grpc.StatusCode.DATA_LOSS
