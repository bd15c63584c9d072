"""What a pod of a stage has to do, as JSON in the work store; its digest stands in the pod's command."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from millrace_training_coordinator.executor import Place
from millrace_training_coordinator.workstore import WorkStore, attempt_path

# Environment of a pod that its Job sets and `millrace-stage` reads.
ROOT_VARIABLE = "MILLRACE_STAGE_ROOT"
TERMINATION_VARIABLE = "MILLRACE_TERMINATION_FILE"
RENDEZVOUS_VARIABLE = "MILLRACE_RENDEZVOUS"
INDEX_VARIABLE = "JOB_COMPLETION_INDEX"


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One attempt, the same for all its pods."""

    run_id: str
    stage: str
    attempt: int
    command: tuple[str, ...]
    environment: Mapping[str, str]
    code_hash: str
    archive_digest: str
    code_limit_bytes: int
    inputs: Mapping[str, int]
    """Stages this one depends on, directly or not, and which attempt of each succeeded."""
    outputs: tuple[str, ...]
    """Declared outputs, which are kept for good."""
    timeout_s: float
    start_limit_s: float
    """How long pods wait for each other."""
    stop_grace_s: float
    checkpoint_every_s: float
    workers: int
    """Processes under torchrun in each pod; 0 runs the command itself."""
    pods: int
    threads: int
    """Threads of numeric libraries in each process."""

    @property
    def place(self) -> Place:
        """The attempt."""
        return Place(self.run_id, self.stage, self.attempt)

    def save(self, store: WorkStore) -> tuple[str, str]:
        """Write it to the store; returns its path there and its SHA-256."""
        path = f"{attempt_path(self.place)}/spec.json"
        return path, store.write_json(path, asdict(self))


def load_spec(store: WorkStore, path: str, sha256: str) -> StageSpec:
    """The spec at `path`.

    Raises:
        DataLossError: it is missing or does not have this digest.
    """
    raw: dict[str, Any] = store.read_proved(path, sha256)
    return StageSpec(**{**raw, "command": tuple(raw["command"]), "outputs": tuple(raw["outputs"])})
