"""An attempt as a Kubernetes Job: names, labels and manifests. Values only, no calls."""

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

from millrace_training_coordinator.cluster_settings import KubernetesSettings
from millrace_training_coordinator.executor import Launch, Place
from millrace_training_coordinator.stagespec import RENDEZVOUS_VARIABLE, ROOT_VARIABLE

MANAGED_BY = "millrace-training-coordinator"
RUN_LABEL, STAGE_LABEL, ATTEMPT_LABEL, PIPELINE_LABEL = (
    "millrace.dev/run", "millrace.dev/stage", "millrace.dev/attempt", "millrace.dev/pipeline",
)  # fmt: skip
SELECTOR = f"app.kubernetes.io/managed-by={MANAGED_BY}"
CONTAINER = "stage"
ROOT = "/work"
TLS_FOLDER = "/etc/millrace/tls"
RENDEZVOUS_PORT = 29400
USER = 65532
# A pod's host name, `<job>-<index>`, has at most 63 characters.
MAX_SLUG = 36
MAX_COMMAND_CHARS = 1000


def job_name(place: Place) -> str:
    """`run-<id>-<stage>-<attempt>`, a DNS label; the last eight digits of the run's id stand for all."""
    slug = re.sub(r"[^a-z0-9-]", "-", place.stage)
    if slug != place.stage or len(slug) > MAX_SLUG:
        digest = hashlib.sha256(place.stage.encode()).hexdigest()[:5]
        slug = f"{slug[: MAX_SLUG - 6].rstrip('-')}-{digest}"
    run = re.sub(r"[^a-z0-9]", "", place.run_id.lower())[-8:]
    return f"run-{run}-{slug}-{place.attempt}"


def labels(place: Place, pipeline: str, settings: KubernetesSettings) -> dict[str, str]:
    """Labels of everything an attempt makes."""
    return {
        **settings.labels,
        "app.kubernetes.io/name": "training-stage",
        "app.kubernetes.io/part-of": "millrace",
        "app.kubernetes.io/managed-by": MANAGED_BY,
        RUN_LABEL: place.run_id,
        STAGE_LABEL: place.stage,
        ATTEMPT_LABEL: str(place.attempt),
        PIPELINE_LABEL: pipeline,
    }


def place_of(job: Mapping[str, Any]) -> Place | None:
    """The attempt a Job was made for; None when its labels do not say."""
    found = job["metadata"].get("labels", {})
    try:
        return Place(found[RUN_LABEL], found[STAGE_LABEL], int(found[ATTEMPT_LABEL]))
    except (KeyError, ValueError):
        return None


def job(launch: Launch, settings: KubernetesSettings, spec_path: str, spec_sha256: str) -> dict[str, Any]:
    """The Job of an attempt.

    Args:
        launch: the attempt.
        settings: of the cluster.
        spec_path: where in the work store its spec lies.
        spec_sha256: digest of the spec.
    """
    stage, name = launch.stage, job_name(launch.place)
    own = labels(launch.place, launch.pipeline, settings)
    deadline = stage.timeout_s + settings.transfer_limit_s + settings.termination_grace_s
    pod = _pod(launch, settings, ["--work-url", settings.work_url, "--spec", spec_path, "--sha256", spec_sha256])
    # From when a kubelet took the pod; the command's own limit is kept inside the pod, to the tenth of a second.
    pod["activeDeadlineSeconds"] = math.ceil(deadline)
    spec: dict[str, Any] = {
        # The coordinator decides on retries: it counts attempts, waits between them, and writes them down.
        "backoffLimit": 0,
        # From when the Job was made, waiting included: the belt for a coordinator that never comes back.
        "activeDeadlineSeconds": math.ceil(deadline + settings.start_limit_s),
        "ttlSecondsAfterFinished": settings.ttl_s,
        "completions": stage.pods,
        "parallelism": stage.pods,
        "podReplacementPolicy": "Failed",
        # An eviction or a lost node ends the attempt, and the Job says that it was no failure of the program.
        "podFailurePolicy": {
            "rules": [{"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
        },
        "template": {"metadata": {"labels": own}, "spec": pod},
    }
    if stage.workers:
        spec["completionMode"] = "Indexed"
    command = " ".join(stage.command)[:MAX_COMMAND_CHARS]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": own, "annotations": {"millrace.dev/command": command}},
        "spec": spec,
    }


def service(owner: Mapping[str, Any]) -> dict[str, Any]:
    """The headless Service by which the pods of a distributed attempt find pod 0; it goes with its Job."""
    meta = owner["metadata"]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": meta["name"],
            "labels": meta["labels"],
            "ownerReferences": [
                {"apiVersion": "batch/v1", "kind": "Job", "name": meta["name"], "uid": meta["uid"], "controller": True}
            ],
        },
        "spec": {
            "clusterIP": "None",
            # Pods meet before they are ready: they are never ready, they have no probes.
            "publishNotReadyAddresses": True,
            "selector": {"batch.kubernetes.io/job-name": meta["name"]},
            "ports": [{"name": "rendezvous", "port": RENDEZVOUS_PORT}],
        },
    }


def needs_service(made: Mapping[str, Any]) -> bool:
    """Whether a Job's pods have to find each other."""
    return bool(made["spec"].get("completionMode") == "Indexed" and made["spec"].get("completions", 1) > 1)


def _pod(launch: Launch, settings: KubernetesSettings, arguments: list[str]) -> dict[str, Any]:
    stage, name, asked = launch.stage, job_name(launch.place), launch.stage.pod
    selector = {**settings.node_selector, **(settings.gpu_node_selector if stage.resources.gpus else {})}
    tolerations = [*(t.model_dump() for t in settings.tolerations), *(t.model_dump() for t in asked.tolerations)]
    volumes, mounts = _volumes(settings)
    container = {
        "name": CONTAINER,
        "image": asked.image or settings.image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["millrace-stage"],
        "args": [argument.replace("$", "$$") for argument in arguments],
        "env": _environment(name, settings),
        "envFrom": [{"secretRef": {"name": secret}} for secret in settings.env_from_secrets],
        "resources": _resources(launch, settings),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "serviceAccountName": settings.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": settings.termination_grace_s,
        "nodeSelector": {**selector, **asked.node_selector},
        "tolerations": [{key: value for key, value in one.items() if value} for one in tolerations],
        "imagePullSecrets": [{"name": secret} for secret in settings.image_pull_secrets],
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }
    if stage.pods > 1:
        pod["subdomain"] = name
    if asked.runtime_class or settings.runtime_class:
        pod["runtimeClassName"] = asked.runtime_class or settings.runtime_class
    if asked.priority_class or settings.priority_class:
        pod["priorityClassName"] = asked.priority_class or settings.priority_class
    return pod


def _resources(launch: Launch, settings: KubernetesSettings) -> dict[str, Any]:
    """One pod's share of what the stage claims."""
    stage, pods = launch.stage, launch.stage.pods
    milli_cpus = math.ceil(stage.resources.cpus * 1000 / pods)
    memory = f"{math.ceil(stage.resources.memory_mib / pods)}Mi"
    gpus = {}
    if stage.resources.gpus:
        gpus = {stage.resources.gpu_resource or settings.gpu_resource: str(stage.resources.gpus // pods)}
    requested = max(1, math.floor(milli_cpus * settings.cpu_request_share))
    return {
        "requests": {"cpu": f"{requested}m", "memory": memory, **gpus},
        "limits": {"cpu": f"{milli_cpus}m", "memory": memory, **gpus},
    }


def _environment(name: str, settings: KubernetesSettings) -> list[dict[str, str]]:
    env = {key: value.replace("$", "$$") for key, value in settings.env.items()}
    env[ROOT_VARIABLE] = ROOT
    env[RENDEZVOUS_VARIABLE] = f"{name}-0.{name}:{RENDEZVOUS_PORT}"
    env["HOME"] = ROOT
    if settings.tls_secret:
        env["MILLRACE_TLS_CERT"] = f"{TLS_FOLDER}/tls.crt"
        env["MILLRACE_TLS_KEY"] = f"{TLS_FOLDER}/tls.key"
        env["MILLRACE_TLS_CA"] = f"{TLS_FOLDER}/ca.crt"
    return [{"name": key, "value": value} for key, value in env.items()]


def _volumes(settings: KubernetesSettings) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    size, shm = f"{settings.work_size_mib}Mi", f"{settings.shm_mib}Mi"
    volumes: list[dict[str, Any]] = [
        {"name": "work", "emptyDir": {"sizeLimit": size}},
        {"name": "tmp", "emptyDir": {"sizeLimit": size}},
        # torch's workers hand each other tensors there; containers get 64 MiB by default.
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shm}},
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "work", "mountPath": ROOT},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - a volume of the pod's own
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - the same
    ]
    if settings.tls_secret:
        volumes.append({"name": "tls", "secret": {"secretName": settings.tls_secret, "defaultMode": 0o440}})
        mounts.append({"name": "tls", "mountPath": TLS_FOLDER, "readOnly": True})
    if settings.work_claim:
        volumes.append({"name": "store", "persistentVolumeClaim": {"claimName": settings.work_claim}})
        mounts.append({"name": "store", "mountPath": settings.work_url.removeprefix("file://")})
    return volumes, mounts
