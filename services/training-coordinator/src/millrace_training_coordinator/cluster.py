"""The executor of a cluster: every attempt is a Kubernetes Job, found again by its name and labels.

The Job's name follows from the attempt, so that making it twice is making it once. All attempts are watched by two list calls every
`poll_s`, whatever their number; nothing depends on having seen an event. Pods say how they ended; see `podstates`.
"""

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from millrace_kit.errors import FailedPreconditionError, MillraceError

from millrace_training_coordinator import jobs, podstates
from millrace_training_coordinator.cluster_settings import KubernetesSettings
from millrace_training_coordinator.executor import Ending, Exit, Found, Launch, Place
from millrace_training_coordinator.kubeapi import (
    CONFLICT,
    NOT_FOUND,
    KubeApi,
    KubernetesError,
    KubernetesUnavailableError,
    patiently,
)
from millrace_training_coordinator.observer import Observer, View
from millrace_training_coordinator.ownership import WorkDirLock
from millrace_training_coordinator.podlogs import LOG, AttemptLog, PodLogs, cut_logs
from millrace_training_coordinator.results import RESULT_FILE, Output, StageFailedError
from millrace_training_coordinator.stagespec import StageSpec
from millrace_training_coordinator.workstore import WorkStore, attempt_path

log = logging.getLogger(__name__)

LOG_END_S = 15.0
# Every pod waits some seconds; the log speaks of longer waits.
QUIET_S = 5.0
# Statuses of a refusal that would be the same next time.
INVALID, BAD_REQUEST = 422, 400


@dataclass(frozen=True, slots=True)
class ClusterLimits:
    """What the executor keeps to besides its settings."""

    log_limit_mib: int
    code_limit_bytes: int
    stop_grace_s: float


class KubernetesExecutor:
    """Runs attempts as Jobs.

    Args:
        api: the API server.
        namespace: where Jobs are made.
        settings: of the cluster.
        store: the work store.
        work_dir: local folder for logs; `acquire` makes this coordinator its owner.
        limits: see there.
    """

    def __init__(
        self,
        api: KubeApi,
        namespace: str,
        settings: KubernetesSettings,
        *,
        store: WorkStore,
        work_dir: Path,
        limits: ClusterLimits,
    ) -> None:
        self._api = api
        self._namespace = namespace
        self._settings = settings
        self._store = store
        self._runs = work_dir / "runs"
        self._lock = WorkDirLock(work_dir)
        self._limits = limits
        self._observer = Observer(api, namespace, settings.poll_s)
        self._slots = asyncio.Semaphore(settings.max_log_followers)
        self._stopped: set[Place] = set()
        # Jobs that may have been made by calls that were never answered; they must not run beside the next attempt.
        self._doubtful: set[str] = set()

    async def acquire(self) -> None:
        """Become the owner of the work folder.

        Raises:
            WorkDirTakenError: another coordinator holds it.
        """
        await self._lock.acquire()
        await asyncio.to_thread(cut_logs, self._runs)

    def release(self) -> None:
        """Give the work folder up."""
        self._lock.release()

    async def start(self, launch: Launch) -> None:
        """Make the attempt's Job.

        Raises:
            OSError: the work store or the API server does not answer, or a quota refuses it.
            MillraceError: the cluster will never take such a Job.
        """
        stage, place = launch.stage, launch.place
        spec = StageSpec(
            run_id=place.run_id,
            stage=place.stage,
            attempt=place.attempt,
            command=stage.command,
            environment=launch.environment,
            code_hash=launch.code_hash,
            archive_digest=launch.archive_digest,
            code_limit_bytes=self._limits.code_limit_bytes,
            inputs={name: earlier.attempt for name, earlier in launch.inputs.items()},
            outputs=stage.outputs,
            timeout_s=stage.timeout_s,
            start_limit_s=self._settings.start_limit_s,
            stop_grace_s=min(self._limits.stop_grace_s, self._settings.termination_grace_s / 2),
            checkpoint_every_s=self._settings.checkpoint_every_s,
            workers=stage.workers // stage.pods,
            pods=stage.pods,
            threads=max(1, int(stage.resources.cpus / max(1, stage.workers))),
        )
        path, digest = await asyncio.to_thread(spec.save, self._store)
        manifest = jobs.job(launch, self._settings, path, digest)
        try:
            made = await self._create("batch/v1", "jobs", manifest)
            if jobs.needs_service(made):
                await self._create("v1", "services", jobs.service(made))
        except KubernetesUnavailableError as error:
            self._doubtful.add(jobs.job_name(place))
            raise OSError(f"the Kubernetes API does not answer: {error}") from error
        except KubernetesError as error:
            await self._remove(jobs.job_name(place))
            if error.status in {INVALID, BAD_REQUEST}:
                detail = {"stage": place.stage, "reason": error.reason}
                raise FailedPreconditionError("JOB_REFUSED", f"the cluster refuses its Job: {error}", detail) from error
            raise OSError(f"the cluster refuses its Job now: {error}") from error

    async def _create(self, version: str, kind: str, manifest: dict[str, Any]) -> dict[str, Any]:
        """Make an object; one of the same attempt that is there already is as good."""
        path = f"{_api_path(version)}/namespaces/{self._namespace}/{kind}"
        name = manifest["metadata"]["name"]
        try:
            made: dict[str, Any] = await patiently(
                lambda: self._api.call("POST", path, body=manifest), self._settings.patience_s
            )
        except KubernetesError as error:
            if error.status != CONFLICT:
                raise
            made = await patiently(lambda: self._api.call("GET", f"{path}/{name}"), self._settings.patience_s)
            if made["metadata"].get("labels", {}) != manifest["metadata"]["labels"]:
                raise KubernetesError(CONFLICT, "AlreadyExists", f"{kind} {name} is not of this attempt") from error
        return made

    async def recover(self, place: Place) -> Found:
        """Look for an attempt's Job; waits for the API server as long as it takes."""
        name = jobs.job_name(place)
        view = await self._observer.view(name, time.monotonic())
        if view.job is None or jobs.place_of(view.job) != place:
            return Found.LOST
        if jobs.needs_service(view.job) and not podstates.job_result(view.job)[0]:
            # The coordinator may have died between the two.
            with contextlib.suppress(KubernetesError, KubernetesUnavailableError):
                await self._create("v1", "services", jobs.service(view.job))
        return Found.ENDED if self._over(view) else Found.RUNNING

    def _over(self, view: View) -> bool:
        """Whether the attempt is over and none of its pods runs."""
        if view.job is None:
            return not any(not podstates.is_over(pod) for pod in view.pods)
        return bool(podstates.job_result(view.job)[0]) and all(podstates.is_over(pod) for pod in view.pods)

    async def wait(self, place: Place) -> Exit:
        """Wait until the Job is over and no pod of it runs."""
        name = jobs.job_name(place)
        attempt_log = AttemptLog(self._folder(place), self._limits.log_limit_mib)
        logs = PodLogs(self._api, self._namespace, attempt_log, self._slots)
        told, started = "", False
        placed: Exit | None = None
        after = time.monotonic()
        try:
            while True:
                view = await self._observer.view(name, after)
                await self._remove_doubtful()
                logs.look(view.pods)
                if self._over(view):
                    break
                # Once all have started, a pod that is missing has gone; it does not wait.
                if view.job is not None and placed is None and not started and not view.job["status"].get("failed"):
                    why, hopeless = podstates.waiting(view.pods, view.job["spec"]["completions"])
                    started = not why
                    waited_s = time.time() - _created_at(view.job)
                    placed = self._too_late(waited_s, why, hopeless)
                    if why and why != told and (waited_s > QUIET_S or placed is not None):
                        attempt_log.note(f"waiting: {why}")
                        told = why
                    if placed is not None:
                        await self._remove(name)
                after = time.monotonic()
                await asyncio.sleep(self._settings.poll_s)
            await logs.finish(LOG_END_S)
            exit_ = placed or await self._judge(place, view)
            await asyncio.to_thread(self._keep_log, place, attempt_log)
            return exit_
        finally:
            await logs.cancel()
            attempt_log.close()
            self._stopped.discard(place)

    def _too_late(self, waited_s: float, why: str, hopeless: bool) -> Exit | None:
        """The end of an attempt that waits too long for its pods to start."""
        if not why:
            return None
        if hopeless:
            return Exit(Ending.NOT_STARTED, detail=why)
        if waited_s > self._settings.start_limit_s:
            return Exit(Ending.NOT_PLACED, detail=f"{why} (waited {self._settings.start_limit_s:g} s)")
        return None

    async def _judge(self, place: Place, view: View) -> Exit:
        if view.job is None or place in self._stopped:
            if place in self._stopped:
                return Exit(Ending.STOPPED)
            return Exit(Ending.LOST, detail="its Job was deleted")
        pods = int(view.job["spec"]["completions"])
        ends = {end.index: end for pod in view.pods if (end := podstates.pod_end(pod)) is not None}
        for index in range(pods):
            if index not in ends and podstates.job_result(view.job)[0] == "Failed":
                record = await asyncio.to_thread(self._record, place, index)
                if record is not None:
                    ends[index] = record
        return podstates.attempt_end(view.job, list(ends.values()), pods)

    def _record(self, place: Place, index: int) -> podstates.PodEnd | None:
        try:
            raw = self._store.read_json(f"{attempt_path(place)}/end-{index}.json")
        except (OSError, ValueError) as error:
            log.warning("how pod %d of %s ended cannot be read: %s", index, place, error)
            return None
        return None if raw is None else podstates.record_end(index, raw)

    async def stop(self, place: Place) -> None:
        """Delete the Job; it is there until its pods are gone."""
        self._stopped.add(place)
        await self._remove(jobs.job_name(place))

    async def _remove(self, name: str) -> None:
        """Delete a Job with its pods; what cannot be deleted now is later."""
        path = f"{_api_path('batch/v1')}/namespaces/{self._namespace}/jobs/{name}"
        try:
            await self._api.call("DELETE", path, params={"propagationPolicy": "Foreground"})
        except KubernetesUnavailableError as error:
            log.warning("Job %s is deleted when the API server answers: %s", name, error)
            self._doubtful.add(name)
            return
        except KubernetesError as error:
            if error.status != NOT_FOUND:
                raise OSError(f"Job {name} cannot be deleted: {error}") from error
        self._doubtful.discard(name)

    async def _remove_doubtful(self) -> None:
        for name in list(self._doubtful):
            await self._remove(name)

    def result_folder(self, place: Place) -> Path:
        """A local folder with a copy of the attempt's `result.json`."""
        folder = self._folder(place) / "result"
        try:
            leaving = self._store.leaving(place)
            if leaving is not None and RESULT_FILE in leaving.files:
                wanted = {RESULT_FILE: leaving.files[RESULT_FILE]}
                self._store.fetch_folder(wanted, self._store.of_run(place.run_id), folder)
        except MillraceError as error:
            raise OSError(str(error)) from error
        return folder

    def keep(self, place: Place, declared: tuple[str, ...], limit_bytes: int) -> tuple[Output, ...]:
        """The declared outputs, which the pods have put into the content store already."""
        leaving = self._store.leaving(place)
        if leaving is None or not leaving.complete:
            raise OSError("the list of its outputs is not in the work store")
        kept = []
        for name in declared:
            file = leaving.files.get(name)
            if name in leaving.skipped:
                raise StageFailedError(f"declared output {name!r} is no regular file of the output folder")
            if file is None:
                raise StageFailedError(f"declared output {name!r} is missing")
            if file.size_bytes > limit_bytes:
                raise StageFailedError(f"declared output {name!r} is larger than {limit_bytes >> 20} MiB")
            try:
                if self._store.content.size(file.sha256) != file.size_bytes:
                    raise OSError(f"{name} has another size in the content store")
            except MillraceError as error:
                raise OSError(str(error)) from error
            kept.append(Output(f"{place.stage}/{name}", file.sha256, file.size_bytes))
        return tuple(kept)

    def read_log(self, place: Place, offset: int, limit: int) -> bytes:
        """At most `limit` bytes of the attempt's log from `offset`; a log that is not here any more comes from the work store."""
        path = self._folder(place) / LOG
        try:
            if not path.exists():
                kept = self._store.read(f"{attempt_path(place)}/log")
                if kept is None:
                    return b""
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(kept)
            with path.open("rb") as file:
                file.seek(offset)
                return file.read(limit)
        except OSError as error:
            log.warning("the log of %s cannot be read: %s", place, error)
            return b""

    def _keep_log(self, place: Place, attempt_log: AttemptLog) -> None:
        """Copy the log to the work store, where it survives this coordinator's folder."""
        attempt_log.mark()
        try:
            self._store.write(f"{attempt_path(place)}/log", (self._folder(place) / LOG).read_bytes())
        except OSError as error:
            log.warning("the log of %s stays here only: %s", place, error)

    async def forget(self, run_id: str) -> None:
        """Remove the run's Jobs, its part of the work store and its logs."""
        path = f"{_api_path('batch/v1')}/namespaces/{self._namespace}/jobs"
        selector = {"labelSelector": f"{jobs.SELECTOR},{jobs.RUN_LABEL}={run_id}"}
        try:
            found = await self._api.call("GET", path, params=selector)
        except (KubernetesError, KubernetesUnavailableError) as error:
            raise OSError(str(error)) from error
        for one in found["items"]:
            await self._remove(one["metadata"]["name"])
        await asyncio.to_thread(self._store.remove_run, run_id)
        await asyncio.to_thread(shutil.rmtree, self._runs / run_id, ignore_errors=True)

    def _folder(self, place: Place) -> Path:
        return self._runs / place.run_id / place.stage / str(place.attempt)


def _created_at(job: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(job["metadata"]["creationTimestamp"]).timestamp()


def _api_path(version: str) -> str:
    return f"/apis/{version}" if "/" in version else f"/api/{version}"
