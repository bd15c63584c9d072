"""The rollout controller with 200 ModelDeployments on a real API server: time, memory and processor time. `make perf AREA=controller`.

The control plane is real; a hand plays the kubelet and makes the pods ready. The controller is its own process, as in its pod.
"""

import asyncio
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "services/rollout-controller/tests"
COUNT = 200
IDLE_S = 20.0
sys.path.insert(0, str(ROOT / "tools"))


def _tests() -> tuple[ModuleType, ModuleType, ModuleType]:
    """The service's own test parts: a hand for the kubelet, a registry, a gateway."""
    spec = importlib.util.spec_from_file_location(
        "rollout_tests", TESTS / "__init__.py", submodule_search_locations=[str(TESTS)]
    )
    assert spec is not None
    sys.modules["rollout_tests"] = importlib.util.module_from_spec(spec)
    names = ("cluster", "peers", "support")
    cluster, peers, support = (importlib.import_module(f"rollout_tests.{name}") for name in names)
    return cluster, peers, support


async def measure(folder: Path, kubeconfig: Path) -> dict[str, Any]:
    """Everything, in a namespace of its own."""
    cluster, peers, support = _tests()
    contents = {version: support.onnx_model(0.1) for version in ("1.0.0", "1.1.0")}
    async with peers.serving(peers.Peers(contents=contents)) as around, cluster.world(kubeconfig) as world:
        wanted = cluster.settings(kubeconfig, world.namespace, folder, around)
        values = json.loads(wanted.model_dump_json(exclude_defaults=True))
        values |= {"listen": "127.0.0.1:0", "tick_s": 0.25, "poll_s": 1.0, "max_deployments": 1000}
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(values))
        program = [str(Path(sys.executable).with_name("millrace-rollout-controller")), "--config", str(config)]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(program, stdout=log, stderr=log)
        kubelet = asyncio.create_task(world.kubelet())
        try:
            return await _rollouts(world, psutil.Process(process.pid))
        finally:
            kubelet.cancel()
            process.terminate()
            process.wait(60)


async def _rollouts(world: Any, process: psutil.Process) -> dict[str, Any]:
    await asyncio.sleep(3)
    empty = process.memory_info().rss
    found: dict[str, Any] = {"deployments": COUNT, "rss_mib_empty": round(empty / 2**20, 1)}
    for version in ("1.0.0", "1.1.0"):
        began = time.monotonic()
        for start in range(0, COUNT, 20):
            names = [f"model-{index}" for index in range(start, start + 20)]
            await asyncio.gather(*(world.apply(version, name=name, model=name) for name in names))
        applied = time.monotonic()
        while await _promoted(world, version) < COUNT:  # noqa: ASYNC110 - another process does the work
            await asyncio.sleep(0.5)
        found[f"apply_s_{version}"] = round(applied - began, 1)
        found[f"promoted_s_{version}"] = round(time.monotonic() - began, 1)
        found[f"rss_mib_{version}"] = round(process.memory_info().rss / 2**20, 1)
    used = sum(process.cpu_times()[:2])
    await asyncio.sleep(IDLE_S)
    found["idle_cpu_share"] = round((sum(process.cpu_times()[:2]) - used) / IDLE_S, 3)
    found["rss_mib"] = round(process.memory_info().rss / 2**20, 1)
    return found


async def _promoted(world: Any, version: str) -> int:
    items = await world.list("modeldeployments")
    statuses = [item.get("status") or {} for item in items]
    return sum(s.get("phase") == "Promoted" and s.get("stableVersion") == version for s in statuses)


def main() -> None:
    """Measure and write build/perf/controller.json."""
    from cluster.controlplane import start_control_plane

    with tempfile.TemporaryDirectory() as folder:
        server = start_control_plane(Path(folder) / "plane")
        try:
            found = asyncio.run(measure(Path(folder), Path(server.address)))
        finally:
            server.stop()
    target = ROOT / "build/perf/controller.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for name, value in found.items():
        print(f"{name:24} {value}")


if __name__ == "__main__":
    main()
