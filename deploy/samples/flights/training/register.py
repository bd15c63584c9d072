"""Stage register: records the version with its lineage, and gives the drift monitor what it looked like in training."""

import os

import numpy as np
from common import FEATURE_SERVICE, LABEL, MODEL, THRESHOLD, Stage, read_json
from millrace import Client
from millrace_api.drift.v1.drift_pb2 import SetReferenceRequest
from millrace_api.feature.v1.feature_pb2 import TrainingSet
from millrace_api.registry.v1 import registry_pb2

PLATFORM = "onnxruntime_onnx"


def main() -> None:
    """Create the model on the first run, register the version, set the drift reference. Running it again changes nothing."""
    stage = Stage.from_environment()
    made = TrainingSet.FromString((stage.inputs["validate"] / "training_set.binpb").read_bytes())
    evaluation = read_json(stage.inputs["evaluate"] / "evaluation.json")
    measured = evaluation["candidates"][evaluation["chosen"]]
    scores = np.load(stage.inputs["evaluate"] / "predictions.npy")
    held_out = np.load(stage.inputs["validate"] / "labels.npy")[-len(scores) :]
    with Client.from_environment() as client:
        client.registry.create_model(_model())
        version = stage.parameters.get("version") or _next(client, stage.run_id)
        described = registry_pb2.ModelVersion(
            model=MODEL,
            version=version,
            platform=PLATFORM,
            signature=signature(list(made.feature_names)),
            lineage=_lineage(stage, made),
            metrics={**measured, "rows": float(evaluation["rows"])},
            tags={
                "columns": stage.parameters.get("columns", "all"),
                "candidate": evaluation["chosen"],
                "run": stage.run_id,
            },
        )
        files = {"model.onnx": stage.inputs["export"] / "model.onnx"}
        registered = client.registry.register_version(described, files, actor=f"pipeline:{stage.run_id}")
        client.drift.set_reference(
            SetReferenceRequest(
                model=MODEL,
                version=version,
                training_set_digest=made.digest,
                data=made.data,
                store_url=made.store_url,
                feature_names=made.feature_names,
                label_column=LABEL,
                reference_predictions=scores,
                reference_accuracy=measured["accuracy"],
                reference_correct=(scores >= THRESHOLD) == (held_out > 0),
            )
        )
    print(f"{MODEL} {version} is registered, digest {registered.digest}", flush=True)
    stage.result(model=MODEL, model_version=version, digest=registered.digest)


def signature(names: list[str]) -> registry_pb2.Signature:
    """One FP32 vector in, one probability out; the same for every version."""
    return registry_pb2.Signature(
        inputs=[registry_pb2.TensorSpec(name="features", datatype="FP32", shape=[len(names)])],
        outputs=[registry_pb2.TensorSpec(name="probability", datatype="FP32", shape=[1])],
        feature_names=names,
    )


def _model() -> registry_pb2.Model:
    return registry_pb2.Model(
        name=MODEL,
        description="Will a flight from New York arrive more than 15 minutes late, asked at its scheduled departure",
        feature_service=FEATURE_SERVICE,
        outcome=registry_pb2.OutcomeSpec(
            contract="outcomes", subject_column="flight_id", label_column=LABEL, threshold=THRESHOLD
        ),
    )


def _lineage(stage: Stage, made: TrainingSet) -> registry_pb2.Lineage:
    return registry_pb2.Lineage(
        run_id=stage.run_id,
        training_set_digest=made.digest,
        definitions_hash=made.definitions_hash,
        table_versions=made.table_versions,
        code_hash=os.environ.get("MILLRACE_CODE_HASH", ""),
        lock_hash=os.environ.get("MILLRACE_LOCK_HASH", ""),
        seed=stage.seed,
    )


def _next(client: Client, run_id: str) -> str:
    """The version this run registered before, else a new one."""
    versions = client.registry.versions(MODEL)
    for known in versions:
        if known.lineage.run_id == run_id:
            return str(known.version)
    production = [known.version for known in versions if known.stage == registry_pb2.STAGE_PRODUCTION]
    return next_version([known.version for known in versions], production[0] if production else "")


def next_version(versions: list[str], production: str) -> str:
    """The next free patch of the version in Production, else of the newest: the same kind of model, learnt anew.

    Args:
        versions: every version there is, newest first.
        production: the one in Production; empty when there is none.
    """
    if not versions:
        return "1.0.0"
    major, minor = (production or versions[0]).split(".")[:2]
    patches = [version.removeprefix(f"{major}.{minor}.") for version in versions]
    return f"{major}.{minor}.{max(int(patch) for patch in patches if patch.isdigit()) + 1}"


if __name__ == "__main__":
    main()
