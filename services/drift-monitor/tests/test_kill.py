"""The process is killed again and again while predictions and outcomes flow; nothing is lost and nothing counts twice."""

import asyncio
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from millrace_api.drift.v1 import drift_pb2, drift_pb2_grpc
from millrace_api.events.v1 import events_pb2
from millrace_kit.bus import DRIFT
from millrace_kit.client import open_channel
from parts.server import free_port

BATCHES, ROWS, DAYS = 36, 50, 3


def start(config, port: int) -> subprocess.Popen:
    config.write_text(config.read_text().replace("PORT", str(port)), encoding="utf-8")
    code = "from millrace_drift_monitor.app import main; main()"
    with config.with_suffix(".log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-c", code, "--config", str(config)], stdout=log, stderr=log)


@pytest.mark.slow
async def test_kill_9_at_any_time(world, helpers, tmp_path) -> None:
    rng = random.Random(11)
    port = free_port()
    config = tmp_path / "drift.yaml"
    config.write_text(
        f"listen: 127.0.0.1:{port}\n"
        f"database_url: {world.settings.database_url}\n"
        f"registry_address: {world.registry_address}\n"
        "registry_retry_s: 0.05\nlateness_s: 3600\nfetch_messages: 5\nmin_count: 100\n"
        f"bus: {{path: {world.settings.bus.path}}}\n"
    )
    async with world.monitor() as stub:
        await stub.SetReference(world.training_set())
    x = helpers.draw(np.random.default_rng(3), BATCHES * ROWS, shift=2.0)
    made = helpers.predictions(x, helpers.july, span=helpers.day * DAYS, scores=np.linspace(0, 1, len(x)))
    process = start(config, port)
    kills = 0
    try:
        deadline = time.monotonic() + 120
        for batch in range(BATCHES):
            part = made[batch * ROWS : (batch + 1) * ROWS]
            labels = {p.subject: True for p in part}
            if batch % 2:
                await world.land(labels)
            await world.predict(part, offset=batch + 1)
            if batch % 7 == 0:
                await world.predict(part, offset=batch + 1)
            if not batch % 2:
                await world.land(labels)
            if batch % 6 == 5:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                process = start(config, port)
                # Let it come up to a random point, so that kills hit start-up, migration and work alike.
                await asyncio.sleep(rng.uniform(0.2, 2.5))
        await world.predict(helpers.predictions(x[:1], helpers.july + helpers.day * (DAYS + 1), prefix="end"))
        async with open_channel(f"127.0.0.1:{port}") as channel:
            stub = drift_pb2_grpc.DriftServiceStub(channel)

            async def windows():
                try:
                    found = (await stub.ListWindows(drift_pb2.ListWindowsRequest())).windows
                except Exception:
                    return None
                return found if len(found) == DAYS else None

            reports = await helpers.until(windows, deadline_s=deadline - time.monotonic())
            [total] = (await stub.GetOutcomes(drift_pb2.GetOutcomesRequest(model="flight-delay"))).versions
            found = {f.id for r in reports for f in r.findings}
            # The outbox is emptied by a worker of the process: published soon after, not with the window.
            subscription = await world.bus.subscribe([DRIFT], group="test")
            published: set[str] = set()

            async def all_published():
                for message in await subscription.fetch(timeout_s=0.2):
                    published.update(f.id for f in events_pb2.DriftFound.FromString(message.value).findings)
                return published >= found or None

            await helpers.until(all_published, deadline_s=deadline - time.monotonic())
            await subscription.close()
    finally:
        process.kill()
        process.wait()
    assert kills >= 5
    count = BATCHES * ROWS
    assert (total.predictions, total.outcomes, total.correct) == (count + 1, count, count // 2)
    assert sum(r.predictions for r in reports) == count
    for report in reports:
        ks = next(f for f in report.findings if f.test == "ks" and f.feature == "delay")
        assert ks.window_count == report.predictions == count // DAYS
