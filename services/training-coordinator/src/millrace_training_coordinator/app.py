"""Wiring of the training coordinator, and its command line."""

import asyncio
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
from millrace_training_coordinator.codetrees import CodeTrees
from millrace_training_coordinator.convert import run_changed
from millrace_training_coordinator.coordinator import Coordinator
from millrace_training_coordinator.manifest import Limits
from millrace_training_coordinator.processes import ProcessExecutor
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

SERVICE = "millrace_api.training.v1.TrainingService"


async def build(settings: TrainingSettings, *, clock: Clock | None = None, new_id: IdSource = uuid7) -> Service:
    """The coordinator as `settings` describe it.

    Raises:
        WorkDirTakenError: another coordinator owns the work folder.
        OSError: the lock file cannot be read.
    """
    clock = clock or SystemClock()
    if settings.lock_file:
        Path(settings.lock_file).read_bytes()  # a wrong path must show at the start, not at the first run
    work_dir = Path(settings.work_dir).absolute()
    executor = ProcessExecutor(
        work_dir,
        gpus=settings.gpus,
        stop_grace_s=settings.stop_grace_s,
        orphan_grace_s=settings.orphan_grace_s,
        log_limit_mib=settings.log_limit_mib,
    )
    await executor.acquire()
    content = ContentStore((work_dir / "content").as_uri())
    trees = CodeTrees(work_dir / "code", content, settings.code_limit_mib << 20)
    await asyncio.to_thread(trees.clean)
    engine = open_engine(settings.database_url)
    store = await asyncio.to_thread(Store, engine, run_changed, max_unfinished=settings.max_queued_runs)
    bus = await open_bus(settings.bus)
    relay = Relay(engine, OUTBOX, bus)
    changes = Changes()
    runner = Runner(
        store,
        executor,
        trees,
        content,
        limits=_runner_limits(settings),
        peers=_peers(settings),
        changes=changes,
        clock=clock,
    )

    def wake() -> None:
        runner.wake()
        relay.wake()

    limits = Limits(settings.cpus, settings.memory_mib, settings.gpus, settings.max_timeout_s)
    coordinator = Coordinator(
        store,
        trees,
        limits=limits,
        lock_file=settings.lock_file,
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
    follower = Follower(store, executor, changes, max_watchers=settings.max_watchers)
    servicer = TrainingServicer(coordinator, follower)

    def add(server: grpc.aio.Server) -> None:
        training_pb2_grpc.add_TrainingServiceServicer_to_server(servicer, server)

    async def close() -> None:
        await bus.close()
        engine.dispose()
        executor.release()

    return Service("training-coordinator", [add], [SERVICE], [runner.worker, relay.worker, retrainer.worker], [close])


def _runner_limits(settings: TrainingSettings) -> RunnerLimits:
    return RunnerLimits(
        budget=Claim(settings.cpus, settings.memory_mib, settings.gpus),
        backoff=Backoff(settings.retry_backoff_s, settings.retry_backoff_max_s),
        max_active_runs=settings.max_active_runs,
        max_unfinished_runs=settings.max_queued_runs,
        output_limit_bytes=settings.output_limit_mib << 20,
        keep_finished_runs=settings.keep_finished_runs,
        stop_grace_s=settings.stop_grace_s,
        terminate_on_stop=settings.on_stop == "terminate",
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
