"""Training on the cluster: stages are Jobs, a distributed one goes on from its checkpoint when a worker's pod is killed."""

import io
import json
import tarfile
import textwrap
from collections.abc import Mapping
from typing import Any

from millrace_api.training.v1 import training_pb2 as pb

from tests.cluster.release import Release, eventually

RESOURCES = {"cpus": 0.2, "memory_mib": 1024}
STAGE_TIMEOUT_S = 600.0

MAKE = """
    import json, os, pathlib
    from millrace import Client
    with Client.from_environment() as client:
        print("models:", len(list(client.registry.models())), flush=True)
    out = pathlib.Path(os.environ["MILLRACE_OUTPUT_DIR"])
    (out / "model.bin").write_bytes(b"model")
"""
USE = """
    import json, os, pathlib
    made = pathlib.Path(json.loads(os.environ["MILLRACE_INPUTS"])["make"])
    assert (made / "model.bin").read_bytes() == b"model"
    print("the model is here", flush=True)
"""
LEARN = """
    import json, os, pathlib, time
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    rank, first = dist.get_rank(), os.environ["MILLRACE_ATTEMPT"] == "1"
    folder = pathlib.Path(os.environ["MILLRACE_CHECKPOINT_DIR"])
    state = folder / "state.json"
    start = json.loads(state.read_text())["step"] if state.exists() else 0
    print("rank", rank, "from step", start, flush=True)
    for step in range(start, 6):
        total = torch.ones(1) * (rank + 1)
        dist.all_reduce(total)
        assert total.item() == 3.0
        if rank == 0:
            (folder / "state.tmp").write_text(json.dumps({"step": step + 1}))
            os.rename(folder / "state.tmp", state)
            print("step", step + 1, flush=True)
        while first and step == 2 and rank == 1:
            time.sleep(0.1)
    dist.destroy_process_group()
"""


def archive(files: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in files.items():
            content = textwrap.dedent(text).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def stage(name: str, **fields: Any) -> dict[str, Any]:
    return {
        "name": name, "command": ["python", f"{name}.py"], "resources": RESOURCES, "timeout_s": STAGE_TIMEOUT_S, **fields,
    }  # fmt: skip


def test_a_stage_is_a_job_and_its_outputs_reach_the_next(release: Release) -> None:
    stages = [stage("make", outputs=["model.bin"]), stage("use", depends_on=["make"])]
    with release.client() as client:
        manifest = json.dumps({"name": "jobs", "stages": stages})
        client.training.register_pipeline(manifest, archive({"make.py": MAKE, "use.py": USE}))
        handle = client.training.start("jobs")
        events = list(handle.watch())
    run = events[-1].run
    lines = [event.log.text for event in events if event.HasField("log")]
    assert run.state == pb.RUN_STATE_SUCCEEDED, (run, lines)
    assert "the model is here" in lines
    assert [output.path for output in run.record.outputs] == ["make/model.bin"]
    jobs = release.get("jobs", "-l", f"millrace.dev/run={run.id}")["items"]
    assert {job["metadata"]["labels"]["millrace.dev/stage"] for job in jobs} == {"make", "use"}


def test_a_killed_worker_goes_on_from_the_checkpoint(release: Release) -> None:
    learn = stage("learn", retries=2, distributed={"workers": 2})
    learn["resources"] = {"cpus": 0.4, "memory_mib": 3072}
    with release.client() as client:
        client.training.register_pipeline(json.dumps({"name": "two", "stages": [learn]}), archive({"learn.py": LEARN}))
        handle = client.training.start("two")
        selector = f"millrace.dev/run={handle.id},millrace.dev/attempt=1"

        def stepped() -> bool | None:
            pods = release.pods(selector)
            first = [p for p in pods if p["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] == "0"]
            if not first:
                return None
            log = release.call("kubectl", "-n", release.namespace, "logs", first[0]["metadata"]["name"])
            return True if "step 3" in log.stdout else None

        eventually("three steps", stepped, STAGE_TIMEOUT_S, lambda: release.pods(selector))
        pods = release.pods(selector)
        assert len(pods) == 2
        [second] = [p for p in pods if p["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] == "1"]
        # Its last word is a SIGTERM's: every pod stores the checkpoint before it goes.
        release.kubectl("delete", "pod", second["metadata"]["name"], "--wait=false")
        events = list(handle.watch())
    run = events[-1].run
    lines = [event.log.text for event in events if event.HasField("log")]
    assert (run.state, run.stages[0].attempts) == (pb.RUN_STATE_SUCCEEDED, 2), (run, lines)
    assert "[default0]:rank 0 from step 3" in lines, lines
    assert "[default1]:rank 1 from step 3" in lines, lines
    assert "was deleted" in run.stages[0].failure
