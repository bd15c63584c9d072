"""What Kubernetes says about pods, in the words it uses, and what is made of it."""

import json
from typing import Any

import pytest
from millrace_training_coordinator.executor import Ending, Exit, Place
from millrace_training_coordinator.jobs import job_name
from millrace_training_coordinator.podstates import PodEnd, attempt_end, pod_end, record_end, waiting
from millrace_training_coordinator.results import classify
from millrace_training_coordinator.scheduler import Outcome

FAILED = {"status": {"conditions": [{"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}]}}


def pod(index: int = 0, phase: str = "Failed", terminated: dict | None = None, **status: Any) -> dict:
    state = {} if terminated is None else {"terminated": {"finishedAt": "2026-01-01T00:00:05Z", **terminated}}
    return {
        "metadata": {"name": f"pod-{index}", "annotations": {"batch.kubernetes.io/job-completion-index": str(index)}},
        "status": {"phase": phase, "containerStatuses": [{"name": "stage", "state": state}], **status},
    }


def message(ending: str, code: int = 0, at: float = 1.0, detail: str = "") -> str:
    return json.dumps({"ending": ending, "code": code, "detail": detail, "at": at})


@pytest.mark.parametrize(
    ("made", "ending", "outcome"),
    [
        (pod(terminated={"exitCode": 137, "reason": "OOMKilled"}), Ending.MEMORY, Outcome.RETRYABLE),
        (pod(terminated={"exitCode": 1, "message": message("memory")}), Ending.MEMORY, Outcome.RETRYABLE),
        (pod(reason="DeadlineExceeded", terminated={"exitCode": 143}), Ending.TIMEOUT, Outcome.RETRYABLE),
        (pod(reason="Evicted", message="The node was low on resource: memory"), Ending.LOST, Outcome.INTERRUPTED),
        (
            pod(reason="Evicted", message='Usage of EmptyDir volume "work" exceeds the limit "64Mi"'),
            Ending.EXITED,
            Outcome.RETRYABLE,
        ),
        (
            pod(
                terminated={"exitCode": 137, "reason": "Error"},
                conditions=[{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}],
            ),
            Ending.LOST,
            Outcome.INTERRUPTED,
        ),
        (pod(reason="OutOfnvidia.com/gpu"), Ending.LOST, Outcome.INTERRUPTED),
        (
            pod(terminated={"exitCode": 128, "reason": "StartError", "message": "millrace-stage: not found"}),
            Ending.NOT_STARTED,
            Outcome.PERMANENT,
        ),
        (pod(terminated={"exitCode": 78, "message": message("exited", 78)}), Ending.EXITED, Outcome.PERMANENT),
        (pod(terminated={"exitCode": 137, "reason": "Error"}), Ending.EXITED, Outcome.RETRYABLE),
    ],
)
def test_one_pod(made: dict, ending: Ending, outcome: Outcome) -> None:
    end = pod_end(made)
    assert end is not None
    assert (end.exit.ending, classify(attempt_end(FAILED, [end], 1))[0]) == (ending, outcome)


def test_a_running_pod_has_no_end() -> None:
    assert pod_end(pod(phase="Running")) is None


def test_a_message_that_is_no_json_counts_as_none() -> None:
    end = pod_end(pod(terminated={"exitCode": 3, "message": "oops"}))
    assert end is not None
    assert end.exit == Exit(Ending.EXITED, 3)


def ends(*told: tuple[int, float, Exit]) -> list[PodEnd]:
    return [PodEnd(*one) for one in told]


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        # The first failure is the cause; the second noticed its absence.
        (ends((0, 5.0, Exit(Ending.EXITED, 1)), (1, 4.0, Exit(Ending.MEMORY))), Exit(Ending.MEMORY)),
        # Deleted first, by somebody else than the Job's controller.
        (
            ends((0, 5.0, Exit(Ending.EXITED, 1)), (1, 4.0, Exit(Ending.STOPPED))),
            Exit(Ending.LOST, detail="pod 1 was deleted"),
        ),
        # Deleted by the Job's controller, because pod 0 had failed.
        (ends((0, 4.0, Exit(Ending.EXITED, 3)), (1, 5.0, Exit(Ending.STOPPED))), Exit(Ending.EXITED, 3)),
        # A code with a meaning counts whenever it came.
        (ends((0, 4.0, Exit(Ending.EXITED, 1)), (1, 5.0, Exit(Ending.EXITED, 78))), Exit(Ending.EXITED, 78)),
        # A node went without a word, and pod 0 failed for want of its peer.
        (ends((0, 4.0, Exit(Ending.EXITED, 1))), Exit(Ending.LOST, detail="pod 1 vanished without a word")),
        (ends((0, 4.0, Exit(Ending.TIMEOUT))), Exit(Ending.TIMEOUT)),
        ([], Exit(Ending.LOST, detail="pod 0 vanished without a word")),
    ],
)
def test_which_pod_of_two_counts(told: list[PodEnd], expected: Exit) -> None:
    assert attempt_end(FAILED, told, 2) == expected


def test_a_complete_job_succeeded() -> None:
    done = {"status": {"conditions": [{"type": "Complete", "status": "True"}]}}
    assert attempt_end(done, [], 2) == Exit(Ending.EXITED, 0)


def test_a_record_that_makes_no_sense_is_no_word() -> None:
    assert record_end(1, {"ending": "bored"}) is None


def test_what_a_pod_waits_for() -> None:
    nowhere = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes have GPUs"}]
    assert waiting([pod(phase="Pending", conditions=nowhere)], 1) == (
        "pod-0: Unschedulable: 0/3 nodes have GPUs",
        False,
    )
    assert waiting([], 2)[0].startswith("the cluster made 0 of 2 pods")
    wrong = pod(phase="Pending")
    wrong["status"]["containerStatuses"][0]["state"] = {"waiting": {"reason": "InvalidImageName", "message": "a b"}}
    assert waiting([wrong], 1) == ("pod-0: InvalidImageName: a b", True)
    assert waiting([pod(terminated={"exitCode": 0})], 1) == ("", False)


def test_names_are_dns_labels_and_differ() -> None:
    run = "01a1fcaa-38cf-7000-b0c0-776c3563b9c0"
    assert job_name(Place(run, "train", 3)) == "run-3563b9c0-train-3"
    names = {job_name(Place(run, stage, 1)) for stage in ("train_a", "train-a", "x" * 63, "x" * 62)}
    assert len(names) == 4
    assert all(len(f"{name}-63") <= 63 and name.replace("-", "").isalnum() for name in names)
