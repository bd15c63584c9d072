"""Wiring of the training coordinator, and its command line."""

import asyncio
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
from millrace_api.training.v1 import training_pb2_grpc
from millrace_kit.bus import open_bus
from millrace_kit.clock import Clock, IdSource, SystemClock, uuid7
from millrace_kit.content import ContentStore
from millrace_kit.entry import run_service
from millrace_kit.outbox import Relay
from millrace_kit.server import Service
from millrace_kit.sql import open_engine

from millrace_training_coordinator import retrain
from millrace_training_coordinator.changes import Changes
from millrace_training_coordinator.cluster import ClusterLimits, KubernetesExecutor
from millrace_training_coordinator.cluster_settings import KubernetesSettings
from millrace_training_coordinator.codetrees import CodeTrees
from millrace_training_coordinator.convert import run_changed
from millrace_training_coordinator.coordinator import Coordinator
from millrace_training_coordinator.executor import Executor
from millrace_training_coordinator.kubeapi import KubeApi, from_kubeconfig, in_cluster
from millrace_training_coordinator.manifest import Limits
from millrace_training_coordinator.processes import ProcessExecutor
from millrace_training_coordinator.record import hardware
from millrace_training_coordinator.retrain_store import RetrainStore
from millrace_training_coordinator.retrain_worker import RetrainWorker
from millrace_training_coordinator.runner import Runner, RunnerLimits
from millrace_training_coordinator.runs import NewRun, PipelineVersion, RunRequest
from millrace_training_coordinator.scheduler import Backoff, Claim
from millrace_training_coordinator.schema import OUTBOX
from millrace_training_coordinator.servicer import TrainingServicer
from millrace_training_coordinator.settings import TrainingSettings
from millrace_training_coordinator.store import Store
from millrace_training_coordinator.watch import Follower
from millrace_training_coordinator.workstore import WorkStore

SERVICE = "millrace_api.training.v1.TrainingService"


async def build(settings: TrainingSettings, *, clock: Clock | None = None, new_id: IdSource = uuid7) -> Service:
    """The coordinator as `settings` describe it.

    Raises:
        WorkDirTakenError: another coordinator owns the work folder.
        OSError: the lock file cannot be read, or this is to be a cluster's coordinator and there is no cluster.
    """
    clock = clock or SystemClock()
    if settings.lock_file:
        Path(settings.lock_file).read_bytes()  # a wrong path must show at the start, not at the first run
    parts = await (_cluster(settings, settings.kubernetes) if settings.kubernetes else _machine(settings))
    trees = parts.trees
    await asyncio.to_thread(trees.clean)
    engine = open_engine(settings.database_url)
    store = await asyncio.to_thread(Store, engine, run_changed, max_unfinished=settings.max_queued_runs)
    bus = await open_bus(settings.bus)
    relay = Relay(engine, OUTBOX, bus)
    changes = Changes()
    runner = Runner(
        store,
        parts.executor,
        limits=_runner_limits(settings),
        peers=_peers(settings),
        changes=changes,
        clock=clock,
    )

    def wake() -> None:
        runner.wake()
        relay.wake()

    coordinator = Coordinator(
        store,
        trees,
        limits=_stage_limits(settings),
        lock_file=settings.lock_file,
        hardware=parts.hardware,
        changes=changes,
        wake=wake,
        clock=clock,
        new_id=new_id,
    )

    def make_run(version: PipelineVersion, finding: retrain.Finding) -> NewRun:
        policy = version.manifest.retrain
        assert policy is not None
        request_id = f"drift:{finding.id}:{version.name}"
        cause = f"drift finding {finding.id}: {finding.summary}"
        request = RunRequest(version.name, retrain.parameters(policy, finding), None, request_id, cause)
        return coordinator.new_run(version, request)

    def started() -> None:
        changes.bump()
        wake()

    retrain_store = RetrainStore(store, make_run, min_interval_s=settings.retrain_min_interval_s)
    retrainer = RetrainWorker(bus, retrain_store, started, clock)
    follower = Follower(store, parts.executor, changes, max_watchers=settings.max_watchers)
    servicer = TrainingServicer(coordinator, follower)

    def add(server: grpc.aio.Server) -> None:
        training_pb2_grpc.add_TrainingServiceServicer_to_server(servicer, server)

    async def close() -> None:
        await bus.close()
        engine.dispose()
        if parts.api is not None:
            await parts.api.close()
        parts.executor.release()

    return Service("training-coordinator", [add], [SERVICE], [runner.worker, relay.worker, retrainer.worker], [close])


@dataclass(frozen=True, slots=True)
class _Parts:
    """What differs between one machine and a cluster."""

    executor: Executor
    trees: CodeTrees
    hardware: Callable[[], dict[str, str]]
    api: KubeApi | None = None


async def _machine(settings: TrainingSettings) -> _Parts:
    work_dir = Path(settings.work_dir).absolute()
    content = ContentStore((work_dir / "content").as_uri())
    trees = CodeTrees(work_dir / "code", content, settings.code_limit_mib << 20)
    executor = ProcessExecutor(
        work_dir,
        trees,
        content,
        gpus=settings.gpus,
        stop_grace_s=settings.stop_grace_s,
        orphan_grace_s=settings.orphan_grace_s,
        log_limit_mib=settings.log_limit_mib,
    )
    await executor.acquire()
    return _Parts(executor, trees, hardware)


async def _cluster(settings: TrainingSettings, cluster: KubernetesSettings) -> _Parts:
    work_dir = Path(settings.work_dir).absolute()
    connection = from_kubeconfig(cluster.kubeconfig) if cluster.kubeconfig else in_cluster(os.environ)
    api = KubeApi(connection, cluster.request_timeout_s)
    store = await asyncio.to_thread(WorkStore, cluster.work_url)
    limits = ClusterLimits(settings.log_limit_mib, settings.code_limit_mib << 20, settings.stop_grace_s)
    namespace = cluster.namespace or connection.namespace
    executor = KubernetesExecutor(api, namespace, cluster, store=store, work_dir=work_dir, limits=limits)
    await executor.acquire()
    trees = CodeTrees(work_dir / "code", store.content, settings.code_limit_mib << 20)
    # Stages run on machines that are not known yet; what is known is what they run in.
    return _Parts(executor, trees, lambda: {"executor": "kubernetes", "image": cluster.image}, api)


def _stage_limits(settings: TrainingSettings) -> Limits:
    if (cluster := settings.kubernetes) is not None:
        return Limits(cluster.max_cpus, cluster.max_memory_mib, cluster.max_gpus, settings.max_timeout_s, in_pods=True)
    return Limits(settings.cpus, settings.memory_mib, settings.gpus, settings.max_timeout_s)


def _budget(settings: TrainingSettings) -> Claim:
    """What running stages may claim together; in a cluster its scheduler decides on that."""
    if settings.kubernetes is not None:
        return Claim(math.inf, sys.maxsize, sys.maxsize)
    return Claim(settings.cpus, settings.memory_mib, settings.gpus)


def _runner_limits(settings: TrainingSettings) -> RunnerLimits:
    return RunnerLimits(
        budget=_budget(settings),
        max_stages=settings.kubernetes.max_concurrent_stages if settings.kubernetes else sys.maxsize,
        backoff=Backoff(settings.retry_backoff_s, settings.retry_backoff_max_s),
        max_active_runs=settings.max_active_runs,
        max_unfinished_runs=settings.max_queued_runs,
        output_limit_bytes=settings.output_limit_mib << 20,
        keep_finished_runs=settings.keep_finished_runs,
        stop_grace_s=settings.stop_grace_s,
        terminate_on_stop=settings.on_stop == "terminate" or (settings.on_stop == "auto" and not settings.kubernetes),
    )


def _peers(settings: TrainingSettings) -> dict[str, str]:
    return {
        "MILLRACE_INGESTION_ADDRESS": settings.ingestion_address,
        "MILLRACE_FEATURE_ADDRESS": settings.feature_address,
        "MILLRACE_REGISTRY_ADDRESS": settings.registry_address,
        "MILLRACE_TRAINING_ADDRESS": settings.training_address or settings.listen,
        "MILLRACE_DRIFT_ADDRESS": settings.drift_address,
    }


def main() -> None:
    """`millrace-training-coordinator --config FILE [--check]`."""
    run_service("training-coordinator", TrainingSettings, build)
