"""The loader beside a real Triton: orders from the file and by call, memory, bad artifacts, and restarts of either process."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import grpc.aio
import pytest
import tritonclient.grpc.aio as tritonclient
from millrace_api.rollout.v1 import loader_pb2, loader_pb2_grpc
from millrace_kit.errors import FailedPreconditionError
from millrace_kit.server import running
from millrace_rollout_controller import memory, triton
from millrace_rollout_controller.app import open_pod
from millrace_rollout_controller.kept_files import KeptFiles
from millrace_rollout_controller.kubernetes import loader
from millrace_rollout_controller.kubernetes.order import Order, Orders
from millrace_rollout_controller.kubernetes.settings import FetchSettings, KubernetesSettings
from millrace_rollout_controller.settings import RolloutSettings
from parts.certificates import Authority, write

from . import pods
from .peers import Peers, serving
from .pods import Pod
from .support import Files, onnx_model, until, version_ref
from .test_shared_servers import answer, calling, right

WEIGHTS = {"1.0.0": 0.1, "1.1.0": 0.2, "1.2.0": 0.3}


@pytest.fixture
async def peers() -> AsyncIterator[Peers]:
    contents = {version: onnx_model(weight) for version, weight in WEIGHTS.items()}
    async with serving(Peers(contents=contents | {"1.3.0": b"no graph"})) as made:
        yield made


def order(version: str, peers: Peers) -> Order:
    ref = version_ref(version, peers.contents[version])
    return Order(
        ref=ref, max_batch_size=8, instances=1, queue_delay_us=0, backend="pythonOnnx", threads=1, gpu=False, warmup=5,
        placement="Shared",
    )  # fmt: skip


def orders(revision: int, *versions: Order) -> Orders:
    return Orders(revision=revision, versions=versions)


async def until_held(pod: Pod, wanted: dict[str, tuple[bool, str]]) -> None:
    async def there() -> bool:
        return await pod.held() == wanted

    try:
        await until(there, 60)
    except AssertionError:
        raise AssertionError(f"{wanted} not held: {await pod.hold()}") from None


async def answers(pod: Pod, version: str) -> float:
    async with tritonclient.InferenceServerClient(pod.endpoint) as client:
        return await answer(client, version)


READY = (True, "")


async def test_versions_come_and_go_and_stable_notices_nothing(tmp_path: Path, peers: Peers) -> None:
    parts = await asyncio.to_thread(triton.Triton.prepare, tmp_path / "triton")
    stable, candidate, bad, broken = (order(version, peers) for version in peers.contents)
    peers.tampered.add("1.2.0")
    pod = pods.make(tmp_path / "pod", parts, peers.address, set())
    async with pods.running(pod, orders(10, stable).model_dump_json()):
        # A pod needs its file alone.
        await until(pod.ready, 60, "the pod is ready")
        assert await pod.held() == {"1.0.0": READY}
        before = pod.stubs()
        async with calling(pod.endpoint, "1.0.0") as callers:
            # Told by the controller, long before the kubelet brings the file.
            told = await pod.hold(orders(11, stable, candidate))
            assert told is not None
            assert told.revision == 11
            await until_held(pod, {"1.0.0": READY, "1.1.0": READY})
            assert await answers(pod, "1.1.0") == pytest.approx(right("1.1.0"))
            assert before < pod.stubs()

            # An older word changes nothing, by call or by file.
            old = await pod.hold(orders(9, stable))
            assert old is not None
            assert old.revision == 11

            # What cannot be loaded is said, and takes no pod out.
            await pod.hold(orders(12, stable, candidate, bad, broken))
            refused = {"1.2.0": (False, "DataLoss"), "1.3.0": (False, "LoadFailed")}
            await until_held(pod, {"1.0.0": READY, "1.1.0": READY} | refused)
            assert await pod.ready()

            # The loader goes and comes back; what was ordered away meanwhile goes, the rest was never touched.
            await pod.kill_loader()
            pod.order(orders(15, stable).model_dump_json())
            await pod.start_loader()
            await until_held(pod, {"1.0.0": READY})
            await until(lambda: pod.stubs() == before, 60, "the candidate's process is gone")
        assert callers.problems == []
        assert callers.answers > 100

        # The server goes and comes back, and the registry is away: the pod has the files.
        await pod.hold(orders(16, stable, candidate))
        await until_held(pod, {"1.0.0": READY, "1.1.0": READY})
        peers.tampered |= {"1.0.0", "1.1.0"}
        await pod.kill_server()
        await until(lambda: _not(pod.ready), 60, "the pod is not ready")
        pod.start_server()
        await until(pod.ready, 60, "the pod is ready again")
        # Ready means that everything ordered was tried, not stable alone.
        assert await pod.held() == {"1.0.0": READY, "1.1.0": READY}
        assert await answers(pod, "1.1.0") == pytest.approx(right("1.1.0"))

        # Promoted: what was the candidate is stable, and the old one goes.
        await pod.hold(orders(17, candidate))
        await until_held(pod, {"1.1.0": READY})
        assert await pod.ready()


async def _not(condition: Callable[[], object]) -> bool:
    found = condition()
    return not (await found if asyncio.iscoroutine(found) else found)


async def test_only_the_controller_tells_a_loader(tmp_path: Path, peers: Peers) -> None:
    authority = Authority.new()

    def settings(name: str) -> RolloutSettings:
        fetch = FetchSettings(controller_tls_name="millrace-rollout-controller")
        tls = write(tmp_path / name, authority, name)
        return RolloutSettings(tls=tls, kubernetes=KubernetesSettings(fetch=fetch), drain_s=0.0)

    place = loader.Place(tmp_path / "orders.json", tmp_path / "models", server_port=1, listen_port=0, probes_port=0)
    place.orders.write_text(orders(1, order("1.0.0", peers)).model_dump_json())
    mine = loader.adapted(settings("model-server.millrace.ml"), place)
    service = await loader.build(mine, place)
    # Its answer is of interest, not its server.
    async with running(replace(service, workers=[]), mine) as address:
        answers = {}
        for name in ("millrace-rollout-controller", "millrace-console"):
            async with open_pod(settings(name), address, "model-server.millrace.ml") as channel:
                try:
                    found = await loader_pb2_grpc.LoaderServiceStub(channel).Hold(loader_pb2.HoldRequest(), timeout=5)
                    answers[name] = str(found.revision)
                except grpc.aio.AioRpcError as error:
                    answers[name] = error.code().name
    assert answers == {"millrace-rollout-controller": "1", "millrace-console": "PERMISSION_DENIED"}


async def test_kept_files_are_proved_each_time(tmp_path: Path) -> None:
    content = onnx_model(0.1)
    (artifact,) = version_ref("1.0.0", content).artifacts
    files = Files()
    files.add(content)
    kept = KeptFiles(tmp_path / "kept", files)
    await kept.fetch(artifact, tmp_path / "one")
    await kept.fetch(artifact, tmp_path / "two")
    assert (tmp_path / "two").read_bytes() == content
    assert files.fetched == 1
    (tmp_path / "kept" / artifact.sha256).write_bytes(b"something else")
    await kept.fetch(artifact, tmp_path / "three")
    assert (tmp_path / "three").read_bytes() == content
    assert files.fetched == 2
    kept.forget_all_but([])
    assert list((tmp_path / "kept").iterdir()) == []


METRICS = """\
# HELP nv_gpu_memory_total_bytes GPU total memory, in bytes
# TYPE nv_gpu_memory_total_bytes gauge
nv_gpu_memory_total_bytes{gpu_uuid="GPU-1c5bd7f4-5c9b-4f7d-a1c0-0e2f6f7f0a11"} 150754820096.000000
nv_gpu_memory_total_bytes{gpu_uuid="GPU-9d2b6a70-11e7-4b8e-93a5-2f0d3a1b4c22"} 150754820096.000000
# HELP nv_gpu_memory_used_bytes GPU used memory, in bytes
# TYPE nv_gpu_memory_used_bytes gauge
nv_gpu_memory_used_bytes{gpu_uuid="GPU-1c5bd7f4-5c9b-4f7d-a1c0-0e2f6f7f0a11"} 1127219200.000000
nv_gpu_memory_used_bytes{gpu_uuid="GPU-9d2b6a70-11e7-4b8e-93a5-2f0d3a1b4c22"} 140754820096.000000
# HELP nv_gpu_utilization GPU utilization rate [0.0 - 1.0)
# TYPE nv_gpu_utilization gauge
nv_gpu_utilization{gpu_uuid="GPU-1c5bd7f4-5c9b-4f7d-a1c0-0e2f6f7f0a11"} 0.000000
"""


async def test_memory_of_the_fullest_gpu_counts() -> None:
    page = METRICS

    async def metrics(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET /metrics ")
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + page.encode())
        writer.close()

    async with await asyncio.start_server(metrics, "127.0.0.1", 0) as server:
        place = loader.Place(server_port=server.sockets[0].getsockname()[1] - 1)
        assert await asyncio.to_thread(loader.free_bytes, 0, place, gpu=True) == 10_000_000_000
        page = "# TYPE nv_inference_count counter\n"
        with pytest.raises(FailedPreconditionError, match="have no nv_gpu_memory_total_bytes") as caught:
            await asyncio.to_thread(loader.free_bytes, 0, place, gpu=True)
    assert caught.value.reason == "InsufficientMemory"
    assert memory.gpu_free_bytes(METRICS.replace("GPU-9", "MIG-9")) == 10_000_000_000
