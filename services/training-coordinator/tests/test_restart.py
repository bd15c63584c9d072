"""The coordinator is killed, its supervisors are killed, it is stopped: nothing is lost, run twice or left behind."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from millrace_api.training.v1 import training_pb2 as pb
from millrace_kit.client import open_channel
from millrace_training_coordinator import processtree, supervisor

from .conftest import DEADLINE_S, Client, coordinator, manifest, stage, stages, until

# Appends a line per attempt, then waits until the test lets it go on.
GATED = """
import os, pathlib, sys, time
here = pathlib.Path({folder!r})
with open(here / (os.environ["MILLRACE_STAGE"] + ".starts"), "a") as file:
    file.write(os.environ["MILLRACE_ATTEMPT"] + " " + str(os.getpid()) + chr(10))
while not (here / "go").exists():
    time.sleep(0.02)
"""


class Process:
    """The real entry point in a process of its own."""

    def __init__(self, tmp_path: Path, **extra: object) -> None:
        self._settings = {
            "listen": "127.0.0.1:0",
            "database_url": f"sqlite:///{tmp_path}/training.sqlite",
            "work_dir": str(tmp_path / "work"),
            "bus": {"path": str(tmp_path / "bus.sqlite")},
            "cpus": 4,
            "stop_grace_s": 1,
            "retry_backoff_s": 0.05,
            **extra,
        }
        self._config = tmp_path / "coordinator.yaml"
        self._log = tmp_path / "coordinator.log"
        self.process: subprocess.Popen[bytes] | None = None

    @asynccontextmanager
    async def started(self) -> AsyncIterator[Client]:
        offset = self._log.stat().st_size if self._log.exists() else 0
        self._config.write_text(json.dumps(self._settings))
        program = Path(sys.executable).parent / "millrace-training-coordinator"
        with self._log.open("ab") as log:
            self.process = subprocess.Popen([program, "--config", self._config], stderr=log)
        try:
            address = ""

            def listens() -> bool:
                nonlocal address
                for line in self._log.read_bytes()[offset:].decode().splitlines():
                    message = json.loads(line)["message"]
                    if message.startswith("training-coordinator listens on"):
                        address = message.rpartition(" ")[2]
                return bool(address)

            await until(listens, f"the coordinator to listen: {self._log.read_text()}")
            async with open_channel(address, timeout_s=DEADLINE_S) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                await stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True)
                yield Client(channel)
        finally:
            if self.process.poll() is None:
                self.process.terminate()
                await asyncio.to_thread(self.process.wait, 20)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


def starts(folder: Path, name: str) -> list[tuple[int, int]]:
    """(attempt, pid) of every start of a stage."""
    file = folder / f"{name}.starts"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(int(line.split()[0]), int(line.split()[1])) for line in lines if line.count(" ") == 1]


def of_this_test(tmp_path: Path) -> list[psutil.Process]:
    """Every living process of an attempt below `tmp_path`, supervisors too."""
    found = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(processtree.MARK_VARIABLE, "")
            if mark.startswith(str(tmp_path)) or (
                supervisor.__name__ in process.cmdline() and str(tmp_path) in " ".join(process.cmdline())
            ):
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


async def test_kill_9_of_the_coordinator(tmp_path: Path) -> None:
    gated = GATED.format(folder=str(tmp_path))
    early = gated.replace('"go"', '"early"')
    text = manifest(
        stages=[
            stage("first", gated.replace('while not (here / "go").exists():', "while False:")),
            stage("long", gated + "print('the end', flush=True)", depends_on=["first"]),
            stage("ends-meanwhile", early, depends_on=["first"]),
            stage("last", "print('last')", depends_on=["long", "ends-meanwhile"]),
        ]
    )
    service = Process(tmp_path)
    async with service.started() as client:
        await client.register(text)
        run_id = (await client.start(request_id="r")).id
        await until(lambda: starts(tmp_path, "long") and starts(tmp_path, "ends-meanwhile"), "both branches")
        service.kill()
    assert of_this_test(tmp_path), "the stages run on without the coordinator"
    (tmp_path / "early").touch()
    await until(lambda: not psutil.pid_exists(starts(tmp_path, "ends-meanwhile")[0][1]), "one stage to end meanwhile")
    async with service.started() as client:
        assert (await client.start(request_id="r")).id == run_id
        await until(lambda: client.stage_is(run_id, "ends-meanwhile", pb.STAGE_STATE_SUCCEEDED), "its end to be seen")
        assert (await client.get(run_id)).state == pb.RUN_STATE_RUNNING
        (tmp_path / "go").touch()
        events = await client.watch(run_id)
    run = events[-1].run
    assert run.state == pb.RUN_STATE_SUCCEEDED, stages(run)
    assert {s.name: s.attempts for s in run.stages} == {"first": 1, "long": 1, "ends-meanwhile": 1, "last": 1}
    assert [len(starts(tmp_path, name)) for name in ("first", "long", "ends-meanwhile")] == [1, 1, 1]
    assert "the end" in [e.log.text for e in events if e.HasField("log")]
    assert not of_this_test(tmp_path)


@pytest.mark.slow
async def test_kill_9_at_many_moments_runs_every_stage_once(tmp_path: Path) -> None:
    chain = []
    for number in range(6):
        needs = {"depends_on": [f"s{number - 1}"]} if number else {}
        chain.append(stage(f"s{number}", GATED.format(folder=str(tmp_path)), **needs))
    (tmp_path / "go").touch()
    service = Process(tmp_path)
    async with service.started() as client:
        await client.register(manifest(stages=chain))
        run_id = (await client.start()).id
    kills = 0
    for delay_ms in (0, 60, 150, 300):
        async with service.started() as client:
            await asyncio.sleep(delay_ms / 1000)
            if (await client.get(run_id)).state == pb.RUN_STATE_SUCCEEDED:
                break
            service.kill()
            kills += 1
    async with service.started() as client:
        run = await client.ended(run_id)
    assert run.state == pb.RUN_STATE_SUCCEEDED, stages(run)
    assert kills >= 2
    for s in run.stages:
        # An attempt that had no supervisor yet is given up unstarted: its number is used, but nothing ran twice.
        assert len(starts(tmp_path, s.name)) == 1, (s, starts(tmp_path, s.name))
    assert not of_this_test(tmp_path)


async def test_everything_killed_runs_again_as_a_new_attempt(tmp_path: Path) -> None:
    service = Process(tmp_path)
    async with service.started() as client:
        await client.register(manifest(stages=[stage("long", GATED.format(folder=str(tmp_path)))]))
        run_id = (await client.start()).id
        await until(lambda: starts(tmp_path, "long"), "the stage")
        service.kill()
    for process in of_this_test(tmp_path):
        process.kill()
    await until(lambda: not of_this_test(tmp_path), "all to be dead")
    (tmp_path / "go").touch()
    async with service.started() as client:
        run = await client.ended(run_id)
    assert run.state == pb.RUN_STATE_SUCCEEDED
    assert stages(run)["long"].attempts == 2
    assert [attempt for attempt, _pid in starts(tmp_path, "long")] == [1, 2]
    assert "lost while the coordinator was away" in stages(run)["long"].failure


async def test_a_killed_supervisor_takes_its_stage_along(client: Client, tmp_path: Path) -> None:
    code = f"""
    import subprocess, sys
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    {GATED.format(folder=str(tmp_path)).strip().replace(chr(10), chr(10) + "    ")}
    """
    await client.register(manifest(stages=[stage("long", code)]))
    run_id = (await client.start()).id
    await until(lambda: starts(tmp_path, "long"), "the stage")
    first = {p.pid for p in of_this_test(tmp_path)}
    assert len(first) == 3
    [boss] = [p for p in of_this_test(tmp_path) if supervisor.__name__ in p.cmdline()]
    os.kill(boss.pid, signal.SIGKILL)
    await until(lambda: len(starts(tmp_path, "long")) == 2, "the second attempt")
    assert not first & {p.pid for p in of_this_test(tmp_path)}
    (tmp_path / "go").touch()
    run = await client.ended(run_id)
    assert (run.state, stages(run)["long"].attempts) == (pb.RUN_STATE_SUCCEEDED, 2)


async def test_an_orderly_stop_leaves_no_process(settings, tmp_path: Path) -> None:
    async with coordinator(settings) as client:
        await client.register(manifest(stages=[stage("long", GATED.format(folder=str(tmp_path)))]))
        run_id = (await client.start()).id
        await until(lambda: starts(tmp_path, "long"), "the stage")
    assert not of_this_test(tmp_path)
    (tmp_path / "go").touch()
    async with coordinator(settings) as client:
        run = await client.ended(run_id)
    assert (run.state, stages(run)["long"].attempts) == (pb.RUN_STATE_SUCCEEDED, 2)


async def test_an_orderly_stop_may_keep_stages(settings, tmp_path: Path) -> None:
    keeping = settings.model_copy(update={"on_stop": "keep"})
    async with coordinator(keeping) as client:
        await client.register(manifest(stages=[stage("long", GATED.format(folder=str(tmp_path)))]))
        run_id = (await client.start()).id
        await until(lambda: starts(tmp_path, "long"), "the stage")
    (tmp_path / "go").touch()
    async with coordinator(keeping) as client:
        run = await client.ended(run_id)
    assert (run.state, stages(run)["long"].attempts) == (pb.RUN_STATE_SUCCEEDED, 1)
    assert len(starts(tmp_path, "long")) == 1


async def test_stages_end_when_no_coordinator_comes_back(tmp_path: Path) -> None:
    service = Process(tmp_path, orphan_grace_s=1)
    async with service.started() as client:
        await client.register(manifest(stages=[stage("long", GATED.format(folder=str(tmp_path)))]))
        await client.start()
        await until(lambda: starts(tmp_path, "long"), "the stage")
        service.kill()
    await until(lambda: not of_this_test(tmp_path), "the orphans to end themselves")


async def test_cancel_survives_a_kill(tmp_path: Path) -> None:
    service = Process(tmp_path)
    async with service.started() as client:
        await client.register(manifest(stages=[stage("long", GATED.format(folder=str(tmp_path)))]))
        run_id = (await client.start()).id
        await until(lambda: starts(tmp_path, "long"), "the stage")
        await client.cancel(run_id)
        service.kill()
    async with service.started() as client:
        run = await client.ended(run_id)
    assert run.state == pb.RUN_STATE_CANCELLED
    assert not of_this_test(tmp_path)


async def test_a_second_coordinator_is_refused(settings, monkeypatch) -> None:
    from millrace_training_coordinator import ownership
    from millrace_training_coordinator.app import build

    monkeypatch.setattr(ownership, "LOCK_WAIT_S", 0.2)
    async with coordinator(settings):
        with pytest.raises(ownership.WorkDirTakenError, match="another running coordinator"):
            await build(settings)
