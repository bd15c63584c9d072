"""`millrace tune` with real Triton servers, a registry and a gateway: a bad block is beaten within the bound, and nothing stays behind."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import yaml
from millrace_kit.clock import SystemClock
from millrace_kit.errors import MillraceError
from millrace_rollout_controller.manifest import parse
from millrace_rollout_controller.probe import sample_request
from millrace_rollout_controller.settings import RolloutSettings
from millrace_rollout_controller.tuning import command
from millrace_rollout_controller.tuning.bench import Method

from .peers import Peers, serving
from .support import onnx_model, until, version_ref

# Every request waits 100 ms for others that never come: whatever the machine does, no call is faster than that.
BAD = """\
apiVersion: millrace.dev/v1alpha1
kind: ModelDeployment
metadata: {name: flight-delay}
spec:
  model: flight-delay
  version: 1.0.0
  server:
    queueDelayUs: 100000  # for large batches
    timeoutMs: 5000
"""
BOUND_MS = 3000.0
QUICK = Method(window_s=0.3, min_requests=5, max_windows=6, share=20.0)
"""Windows too short to trust, and called steady on any machine: the difference is of many times."""


@pytest.fixture
async def peers() -> AsyncIterator[Peers]:
    async with serving(Peers(contents={"1.0.0": onnx_model(0.1)})) as made:
        made.samples = [sample_request(version_ref("1.0.0", b"")).SerializeToString()] * 3
        yield made


def settings(folder: Path, peers: Peers) -> dict[str, object]:
    return {
        "state_dir": str(folder / "state"), "registry_address": peers.address, "gateway_addresses": [peers.address],
        "triton": {"warmup_s": 0.5, "stop_timeout_s": 5.0},
    }  # fmt: skip


def options(folder: Path) -> command.Options:
    path = folder / "manifest.yaml"
    path.write_text(BAD)
    return command.Options(path, BOUND_MS, max_concurrency=2, max_instances=1, max_trials=2, method=QUICK, write=True)


def left(folder: Path) -> list[psutil.Process]:
    found = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or ())]
    return [p for p in found if p.status() != psutil.STATUS_ZOMBIE]


async def start(folder: Path, peers: Peers, *words: str) -> asyncio.subprocess.Process:
    """The tuner as a process of its own."""
    (folder / "config.yaml").write_text(yaml.safe_dump(settings(folder, peers)))
    program = [sys.executable, "-m", "millrace_rollout_controller.tuning", "--config", str(folder / "config.yaml")]
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*program, *words, stdout=pipe, stderr=pipe)


async def test_a_bad_block_is_beaten_within_the_bound_and_the_manifest_says_so(tmp_path: Path, peers: Peers) -> None:
    made = await command.tune(
        options(tmp_path), RolloutSettings.model_validate_json(json.dumps(settings(tmp_path, peers))), SystemClock()
    )
    bad, good = made.trials
    assert bad.closest(BOUND_MS) is not None
    assert all(point.within(BOUND_MS) for point in bad.points), "the bad block holds the bound too: it is only slow"
    assert min(point.p50_ms for point in bad.points) >= 100.0
    assert made.decision.verdict == "better", made.text()
    assert made.decision.rounds is not None
    assert made.decision.rounds.gain > 0.5, made.text()
    assert made.decision.rounds.best.point.p99_ms <= BOUND_MS
    assert good.points[-1].usage.memory_mib > 10
    assert good.points[-1].usage.cpu > 0
    assert made.machine.triton.startswith("2.")
    assert "3 requests that callers sent" in made.requests
    written = (tmp_path / "manifest.yaml").read_text()
    assert written == BAD.replace("100000", "0")
    assert parse(written).spec.server.queue_delay_us == 0
    assert left(tmp_path) == []


async def test_whoever_interrupts_it_leaves_no_server_and_the_manifest_as_it_was(tmp_path: Path, peers: Peers) -> None:
    path = options(tmp_path).manifest
    process = await start(tmp_path, peers, "-f", str(path), "--p99", "1s", "--write")
    folder = tmp_path / "state" / "tuning"
    await until(lambda: len(list(folder.glob("servers/logs/*.log"))) == 1, what="a server was started")
    # From the terminal, and again from the command that started it.
    process.send_signal(signal.SIGINT)
    await until(lambda: not list(folder.glob("servers/*.json")) or process.send_signal(signal.SIGTERM))
    _, said = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, said.splitlines()[-1]) == (130, b"stopped; nothing is written")
    assert path.read_text() == BAD
    assert left(tmp_path) == []


async def test_tampered_bytes_are_never_measured(tmp_path: Path, peers: Peers) -> None:
    peers.tampered.add("1.0.0")
    chosen = options(tmp_path)
    with pytest.raises(MillraceError, match="digest"):
        await command.tune(
            chosen, RolloutSettings.model_validate_json(json.dumps(settings(tmp_path, peers))), SystemClock()
        )
    assert left(tmp_path) == []
