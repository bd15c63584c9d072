"""The walk back from a prediction, over answers made by hand."""

from types import SimpleNamespace
from typing import cast

import grpc
import pytest
from millrace import Client, MillraceError
from millrace.lineage import trace_prediction
from millrace_api.common.v1.common_pb2 import TableVersion
from millrace_api.drift.v1.drift_pb2 import GetPredictionResponse
from millrace_api.feature.v1.feature_pb2 import TrainingSet
from millrace_api.registry.v1.registry_pb2 import Lineage, ModelVersion
from millrace_api.training.v1.training_pb2 import Run
from millrace_kit.errors import NotFoundError

LINEAGE = Lineage(run_id="run", training_set_digest="set", definitions_hash="definitions", seed=7)


def client(*, answered: str = "digest", run_is_gone: bool = False) -> Client:
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
                version=lambda m, v: ModelVersion(model=m, version=v, digest="digest", lineage=LINEAGE)
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
        "prediction", "model version", "run", "training set", "table", "table", "definitions",
    ]  # fmt: skip
    assert found.depths() == [0, 1, 2, 3, 4, 4, 4]
    assert found.links[4].identity == "flights @ version 5"
    assert not found.gaps


def test_a_step_that_cannot_be_taken_is_a_gap_and_the_rest_is_still_told() -> None:
    found = trace_prediction(client(run_is_gone=True), "p")
    assert len(found.gaps) == 1
    assert "run" in found.gaps[0]
    assert found.links[-1].identity == "definitions"


def test_another_digest_than_the_registrys_is_data_loss() -> None:
    with pytest.raises(MillraceError, match="but other answered") as caught:
        trace_prediction(client(answered="other"), "p")
    assert caught.value.code is grpc.StatusCode.DATA_LOSS
