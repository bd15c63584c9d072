"""Registry and training."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import grpc
from millrace_api.common.v1.common_pb2 import Artifact
from millrace_api.registry.v1 import registry_pb2 as registry
from millrace_api.registry.v1.registry_pb2_grpc import RegistryServiceStub
from millrace_api.training.v1 import training_pb2 as training
from millrace_api.training.v1.training_pb2_grpc import TrainingServiceStub
from millrace_kit.content import CHUNK_BYTES, sha256_file
from millrace_kit.errors import DataLossError, ResourceExhaustedError

from millrace.transport import LONG_TIMEOUT_S, call, stream

MAX_READ_BYTES = 16 << 20
"""Largest file that is read into memory."""
ENDED = frozenset({training.RUN_STATE_SUCCEEDED, training.RUN_STATE_FAILED, training.RUN_STATE_CANCELLED})


class RegistryArea:
    """Models, versions, artifacts, stages."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub = RegistryServiceStub(channel)

    def create_model(self, model: registry.Model) -> registry.Model:
        """Create a model, or find the equal one."""
        answer: registry.CreateModelResponse = call(self.stub.CreateModel, registry.CreateModelRequest(model=model))
        return answer.model

    def model(self, name: str) -> registry.Model:
        """A model by name."""
        answer: registry.GetModelResponse = call(self.stub.GetModel, registry.GetModelRequest(name=name))
        return answer.model

    def models(self) -> Sequence[registry.Model]:
        """Every model."""
        answer: registry.ListModelsResponse = call(self.stub.ListModels, registry.ListModelsRequest())
        return answer.models

    def put_artifact(self, file: Path, path: str = "") -> Artifact:
        """Upload a file under its digest; uploading again is harmless."""
        artifact = Artifact(path=path or file.name, sha256=sha256_file(file), size_bytes=file.stat().st_size)

        def parts() -> Iterator[registry.PutArtifactRequest]:
            header = registry.PutArtifactHeader(sha256=artifact.sha256, size_bytes=artifact.size_bytes)
            yield registry.PutArtifactRequest(header=header)
            with file.open("rb") as content:
                while chunk := content.read(CHUNK_BYTES):
                    yield registry.PutArtifactRequest(chunk=chunk)

        call(self.stub.PutArtifact, parts(), LONG_TIMEOUT_S)
        return artifact

    def fetch_artifact(self, artifact: Artifact, target: Path) -> Path:
        """Download a file; it appears at `target` only when its digest is right.

        Raises:
            MillraceError: NOT_FOUND, or DATA_LOSS when the content is not what the digest says.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.part")
        request = registry.GetArtifactRequest(sha256=artifact.sha256)
        with scratch.open("wb") as file:
            for answer in stream(self.stub.GetArtifact, request, LONG_TIMEOUT_S):
                file.write(answer.chunk)
        found = sha256_file(scratch)
        if found != artifact.sha256:
            scratch.unlink()
            raise DataLossError(
                "DIGEST_MISMATCH", f"{artifact.path} arrived with digest {found}", {"sha256": artifact.sha256}
            )
        return scratch.replace(target)

    def read_artifact(self, sha256: str, *, limit_bytes: int = MAX_READ_BYTES) -> bytes:
        """The content of a small file.

        Raises:
            MillraceError: NOT_FOUND; DATA_LOSS when the content is not what the digest says; RESOURCE_EXHAUSTED when it is larger than `limit_bytes`.
        """
        content = bytearray()
        for answer in stream(self.stub.GetArtifact, registry.GetArtifactRequest(sha256=sha256), LONG_TIMEOUT_S):
            content += answer.chunk
            if len(content) > limit_bytes:
                raise ResourceExhaustedError("limit_bytes", f"{sha256} is larger than {limit_bytes} bytes")
        if (found := hashlib.sha256(content).hexdigest()) != sha256:
            raise DataLossError("DIGEST_MISMATCH", f"{sha256} arrived with digest {found}", {"sha256": sha256})
        return bytes(content)

    def register_version(
        self, version: registry.ModelVersion, files: Mapping[str, Path], *, actor: str
    ) -> registry.ModelVersion:
        """Upload `files` (path inside the model -> local file) and register the version with them."""
        artifacts = [self.put_artifact(file, path) for path, file in sorted(files.items())]
        whole = registry.ModelVersion()
        whole.CopyFrom(version)
        whole.artifacts.extend(artifacts)
        answer: registry.RegisterVersionResponse = call(
            self.stub.RegisterVersion, registry.RegisterVersionRequest(version=whole, actor=actor)
        )
        return answer.version

    def version(self, model: str, version: str = "") -> registry.ModelVersion:
        """A version; empty takes the one in Production."""
        answer: registry.GetVersionResponse = call(
            self.stub.GetVersion, registry.GetVersionRequest(model=model, version=version)
        )
        return answer.version

    def versions(self, model: str) -> Sequence[registry.ModelVersion]:
        """Every version, newest first."""
        answer: registry.ListVersionsResponse = call(self.stub.ListVersions, registry.ListVersionsRequest(model=model))
        return answer.versions

    def approve(
        self, model: str, version: str, to_stage: registry.Stage.ValueType, *, actor: str, comment: str
    ) -> registry.ModelVersion:
        """Record an approval for a stage."""
        request = registry.ApproveRequest(model=model, version=version, to_stage=to_stage, actor=actor, comment=comment)
        answer: registry.ApproveResponse = call(self.stub.Approve, request)
        return answer.version

    def transition(
        self, model: str, version: str, to_stage: registry.Stage.ValueType, *, actor: str, expected_revision: int = 0
    ) -> registry.ModelVersion:
        """Move a version to another stage."""
        request = registry.TransitionStageRequest(
            model=model, version=version, to_stage=to_stage, actor=actor, expected_revision=expected_revision
        )
        answer: registry.TransitionStageResponse = call(self.stub.TransitionStage, request)
        return answer.version


class RunHandle:
    """A training run under way."""

    def __init__(self, area: "TrainingArea", run_id: str) -> None:
        self._area = area
        self.id = run_id

    def status(self) -> training.Run:
        """The run as it is now."""
        return self._area.run(self.id)

    def watch(self) -> Iterator[training.WatchRunResponse]:
        """State changes and log lines until the run ends."""
        request = training.WatchRunRequest(id=self.id)
        yield from stream(self._area.stub.WatchRun, request, LONG_TIMEOUT_S)

    def wait(self) -> training.Run:
        """Wait for the run's end."""
        for _ in self.watch():
            pass
        return self.status()

    def cancel(self) -> training.Run:
        """Stop the run's stages."""
        answer: training.CancelRunResponse = call(self._area.stub.CancelRun, training.CancelRunRequest(id=self.id))
        return answer.run


class TrainingArea:
    """Pipelines and runs."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub = TrainingServiceStub(channel)

    def register_pipeline(self, manifest_yaml: str, code_tar_gz: bytes) -> training.RegisterPipelineResponse:
        """Register a pipeline with the code its stages run."""
        request = training.RegisterPipelineRequest(manifest_yaml=manifest_yaml, code_tar_gz=code_tar_gz)
        answer: training.RegisterPipelineResponse = call(self.stub.RegisterPipeline, request)
        return answer

    def start(
        self,
        pipeline: str,
        parameters: Mapping[str, str] | None = None,
        *,
        seed: int | None = None,
        request_id: str = "",
        cause: str = "",
    ) -> RunHandle:
        """Start a run."""
        request = training.StartRunRequest(
            pipeline=pipeline, parameters=parameters, seed=seed, request_id=request_id, cause=cause
        )
        answer: training.StartRunResponse = call(self.stub.StartRun, request)
        return RunHandle(self, answer.run.id)

    def run(self, run_id: str) -> training.Run:
        """A run by id."""
        answer: training.GetRunResponse = call(self.stub.GetRun, training.GetRunRequest(id=run_id))
        return answer.run

    def handle(self, run_id: str) -> RunHandle:
        """A handle of a run that somebody else started."""
        return RunHandle(self, run_id)

    def runs(self, pipeline: str = "", page_size: int = 0) -> Sequence[training.Run]:
        """Runs, newest first."""
        answer: training.ListRunsResponse = call(
            self.stub.ListRuns, training.ListRunsRequest(pipeline=pipeline, page_size=page_size)
        )
        return answer.runs

    def reproduce(self, run_id: str) -> training.ReproduceResponse:
        """Make a run again and compare its outputs bit by bit."""
        answer: training.ReproduceResponse = call(
            self.stub.Reproduce, training.ReproduceRequest(run_id=run_id), LONG_TIMEOUT_S
        )
        return answer
