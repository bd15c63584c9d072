"""The local executor with the real Triton server and a real, tiny ONNX model."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc.aio as tritonclient
from millrace_kit.clock import SystemClock
from millrace_kit.errors import InvalidArgumentError
from millrace_rollout_controller import manifest, repository, triton
from millrace_rollout_controller.executor import Wanted
from millrace_rollout_controller.local_executor import LocalExecutor
from millrace_rollout_controller.manifest import Server
from millrace_rollout_controller.settings import TritonSettings

from .support import Files, onnx_model, until, version_ref

NAME = "flights", "1.0.0"
QUICK = TritonSettings(backoff_s=0.05, warmup_s=1.0, probe_s=0.3, stop_timeout_s=5.0)


@asynccontextmanager
async def executor(
    folder: Path, files: Files, *, stop: bool = True, settings: TritonSettings = QUICK
) -> AsyncIterator[LocalExecutor]:
    made = LocalExecutor(folder, settings, files, SystemClock(), drain_s=0.2, stop_on_close=stop)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


def want(content: bytes, replicas: int = 1, version: str = "1.0.0", server: Server | None = None) -> Wanted:
    return Wanted("flights", version_ref(version, content), replicas, server or Server())


async def ready(
    made: LocalExecutor, wanted: Wanted, count: int, in_use: frozenset[str] = frozenset()
) -> tuple[str, ...]:
    async def look() -> tuple[str, ...] | None:
        await made.converge([wanted], in_use)
        seen = made.seen().get(("flights", wanted.ref.version))
        return seen.ready if seen and len(seen.ready) == count else None

    found = await until(look, what=f"{count} ready servers; {made.seen()}")
    assert isinstance(found, tuple)
    return found


async def infer(endpoint: str, rows: np.ndarray) -> np.ndarray:
    async with tritonclient.InferenceServerClient(endpoint) as client:
        tensor = tritonclient.InferInput("features", list(rows.shape), "FP32")
        tensor.set_data_from_numpy(rows)
        answer = await client.infer("flight-delay", [tensor], client_timeout=10)
        return answer.as_numpy("probability")


def servers(folder: Path) -> list[psutil.Process]:
    """Processes (servers and stubs) that belong to this test's folder."""
    marks = {path.stem for path in (folder / "servers").glob("*.json")}
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if str(folder) in line or any(mark in line for mark in marks):
            found.append(process)
    return [p for p in found if p.status() != psutil.STATUS_ZOMBIE]


async def test_serves_answers_right_restarts_after_a_crash_and_leaves_nothing(tmp_path: Path, tiny: bytes) -> None:
    files = Files()
    files.add(tiny)
    async with executor(tmp_path, files) as made:
        wanted = want(tiny, 2)
        endpoints = await ready(made, wanted, 2)
        rows = np.random.default_rng(1).normal(size=(7, 4)).astype(np.float32)
        expected = 1 / (1 + np.exp(-0.1 * rows.sum(axis=1, keepdims=True)))
        for endpoint in endpoints:
            np.testing.assert_allclose(await infer(endpoint, rows), expected, rtol=1e-5)
        # Many small requests at once are answered as one batch, each with its own rows.
        answers = await asyncio.gather(*(infer(endpoints[0], rows[i : i + 1]) for i in range(7)))
        np.testing.assert_allclose(np.concatenate(answers), expected, rtol=1e-5)

        victim = next(r for r in made._replicas.values() if r.endpoint == endpoints[0])
        pid = victim.record.pid
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not victim.ready, what="the crash is seen")
        # Same port again, so no gateway has to learn anything.
        assert await ready(made, wanted, 2) == endpoints
        assert victim.record.pid != pid
        np.testing.assert_allclose(await infer(endpoints[0], rows), expected, rtol=1e-5)

        # Only what no gateway may still send to is stopped.
        one = replace(wanted, replicas=1)
        keep = await ready(made, one, 1, in_use=frozenset(endpoints))
        assert made.seen()[NAME].servers == 2
        await until(lambda: _few(made, one), what="the surplus server is gone")
        assert made.seen()[NAME].ready == keep
        ids = [replica.record.id for replica in made._replicas.values()]
    assert servers(tmp_path) == []
    assert not [path for path in Path("/dev/shm").iterdir() if path.name.startswith(tuple(ids))]


async def _few(made: LocalExecutor, wanted: Wanted) -> bool:
    await made.converge([wanted], frozenset())
    return made.seen()[NAME].servers == 1


async def test_adopts_servers_of_a_controller_that_was_killed(tmp_path: Path, tiny: bytes) -> None:
    files = Files()
    files.add(tiny)
    async with executor(tmp_path, files, stop=False) as first:
        endpoints = await ready(first, want(tiny), 1)
        pid = next(iter(first._replicas.values())).record.pid
    assert psutil.pid_exists(pid)
    record = next((tmp_path / "servers").glob("*.json"))
    # Killed between starting the process and noting its number: found by the id on its command line.
    record.write_text(record.read_text().replace(f'"pid": {pid}', '"pid": 0'))
    async with executor(tmp_path, files) as second:
        assert await ready(second, want(tiny), 1) == endpoints
        assert next(iter(second._replicas.values())).record.pid == pid
        assert files.fetched == 1
    assert servers(tmp_path) == []


async def test_stops_left_servers_nobody_wants(tmp_path: Path, tiny: bytes) -> None:
    files = Files()
    files.add(tiny)
    async with executor(tmp_path, files, stop=False) as first:
        await ready(first, want(tiny), 1)
    async with executor(tmp_path, files) as second:
        await second.converge([], None)
        assert second.seen()[NAME].servers == 1, "a gateway may still use it"

        async def none_left() -> bool:
            await second.converge([], frozenset())
            return not second.seen()

        await until(none_left)
    assert servers(tmp_path) == []


async def test_a_tampered_artifact_is_never_loaded(tmp_path: Path, tiny: bytes) -> None:
    files = Files()
    files.add(tiny)
    files.contents = {name: content[:-1] + b"\0" for name, content in files.contents.items()}
    async with executor(tmp_path, files) as made:

        async def refused() -> bool:
            await made.converge([want(tiny)], frozenset())
            refusal = made.seen()[NAME].refusal
            return refusal is not None and refusal.permanent

        await until(refused)
        refusal = made.seen()[NAME].refusal
        assert refusal is not None
        assert refusal.reason == "DataLoss"
        assert servers(tmp_path) == []
        assert not list(tmp_path.rglob("model.onnx"))


async def test_a_changed_repository_is_written_anew(tmp_path: Path, tiny: bytes) -> None:
    files = Files()
    files.add(tiny)
    async with executor(tmp_path, files) as made:
        await ready(made, want(tiny), 1)
        path = next(tmp_path.rglob("model.onnx"))
        path.write_bytes(onnx_model(5.0))
        replica = next(iter(made._replicas.values()))
        os.kill(replica.record.pid, signal.SIGKILL)
        await until(lambda: not replica.ready)
        endpoint = (await ready(made, want(tiny), 1))[0]
        assert path.read_bytes() == tiny
        assert files.fetched == 2
        np.testing.assert_allclose(
            await infer(endpoint, np.ones((1, 4), np.float32)), [[1 / (1 + np.exp(-0.4))]], rtol=1e-5
        )


async def test_the_runtime_refuses_content_that_is_not_the_version(tmp_path: Path, tiny: bytes) -> None:
    """Even when the files change between the check and the load."""
    ref = version_ref("1.0.0", tiny)
    files = Files()
    files.add(tiny)
    root = tmp_path / "repository"
    await repository.write(root, ref, Server(), repository.Flavour(), files, max_bytes=1 << 20)
    (root / "flight-delay" / "1" / "model.onnx").write_bytes(onnx_model(5.0))
    parts = triton.Triton.prepare(tmp_path / "triton")
    log = tmp_path / "log"
    child = parts.start("mrtest", root, "127.0.0.1", triton.free_port("127.0.0.1", frozenset()), log)
    assert await asyncio.to_thread(child.wait, 30) != 0
    assert "not loaded" in log.read_text()
    triton.sweep(0, 0.0, "mrtest")


async def test_a_model_that_does_not_answer_its_signature_says_why(tmp_path: Path, tiny: bytes) -> None:
    files = Files()
    files.add(tiny)
    wrong = version_ref("1.0.0", tiny)
    wrong = wrong.model_copy(update={"inputs": (wrong.inputs[0].model_copy(update={"shape": (5,)}),)})
    async with executor(tmp_path, files) as made:

        async def explained() -> bool:
            await made.converge([Wanted("flights", wrong, 1, Server())], frozenset())
            refusal = made.seen()[NAME].refusal
            return refusal is not None and "signature" in refusal.message

        await until(explained)
        assert made.seen()[NAME].ready == ()


async def test_the_registry_being_down_only_waits(tmp_path: Path, tiny: bytes) -> None:
    files = Files()
    files.add(tiny)
    files.down = True
    async with executor(tmp_path, files) as made:

        async def refused() -> bool:
            await made.converge([want(tiny)], frozenset())
            return made.seen()[NAME].refusal is not None

        await until(refused)
        refusal = made.seen()[NAME].refusal
        assert refusal is not None
        assert not refusal.permanent
        files.down = False
        await ready(made, want(tiny), 1)


async def test_another_batch_size_replaces_servers_without_a_gap(tmp_path: Path, tiny: bytes) -> None:
    files = Files()
    files.add(tiny)
    async with executor(tmp_path, files) as made:
        old = await ready(made, want(tiny), 1)
        changed = want(tiny, server=Server(maxBatchSize=8))
        seen_ready: list[int] = []

        async def replaced() -> bool:
            await made.converge([changed], frozenset(old))
            now = made.seen()[NAME].ready
            seen_ready.append(len(now))
            return bool(now) and old[0] not in now

        await until(replaced)
        assert min(seen_ready) >= 1
        assert made.seen()[NAME].servers == 2, "the old one waits for the gateways"


def test_what_this_machine_cannot_give_is_refused(tmp_path: Path) -> None:
    made = LocalExecutor(tmp_path, QUICK, Files(), SystemClock(), drain_s=0, stop_on_close=True)
    spec = manifest.parse(
        "apiVersion: millrace.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {name: a}\n"
        "spec: {model: a, version: 1.0.0, server: {resources: {limits: {nvidia.com/gpu: 1}}}}"
    ).spec
    with pytest.raises(InvalidArgumentError, match=r"spec.server.resources.limits\[nvidia.com/gpu\]"):
        made.check(spec)
