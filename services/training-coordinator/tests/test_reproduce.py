"""A run made again: bit-equal or not, and why."""

import asyncio
from pathlib import Path

import grpc
import pytest
from millrace_api.training.v1 import training_pb2 as pb
from millrace_kit.errors import MillraceError

from .conftest import Client, coordinator, manifest, stage, stages, until

TRAIN = """
import json, os, pathlib, random
out = pathlib.Path(os.environ["MILLRACE_OUTPUT_DIR"])
random.seed(int(os.environ["MILLRACE_SEED"]))
(out / "model.bin").write_bytes(random.randbytes(100) + os.environ["MILLRACE_PARAMETERS"].encode())
(out / "order.txt").write_text(str({"a", "b", "c", "d", "e"}))
of = os.environ.get("MILLRACE_REPRODUCTION_OF", "")
(out / "result.json").write_text(json.dumps({"of": of, "table_versions": [{"table": "t", "version": 2 if of else 1}]}))
"""
REGISTER = "import pathlib; p = pathlib.Path({file!r}); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"


def pipeline(tmp_path: Path, train: str = TRAIN, outputs: tuple[str, ...] = ("model.bin", "order.txt")) -> str:
    return manifest(
        parameters={"a": "1"},
        stages=[
            stage("train", train, outputs=list(outputs)),
            stage("register", REGISTER.format(file=str(tmp_path / "registered")), depends_on=["train"], effects=True),
        ],
    )


async def test_bit_equal(client: Client, tmp_path: Path) -> None:
    run = await client.run(pipeline(tmp_path), seed=5, parameters={"a": "2"})
    answer = await client.stub.Reproduce(pb.ReproduceRequest(run_id=run.id), timeout=60)
    assert answer.bit_equal
    assert [(o.path, o.equal) for o in answer.outputs] == [("train/model.bin", True), ("train/order.txt", True)]
    assert all(o.sha256_original == o.sha256_reproduction != "" for o in answer.outputs)
    assert answer.environment_differences == {"table_version.t": "1 -> 2"}
    again = await client.get(answer.reproduction_run_id)
    assert (again.seed, again.parameters["a"], again.record.code_hash) == (5, "2", run.record.code_hash)
    assert f'"of": "{run.id}"' in stages(again)["train"].result_json
    assert [s.name for s in again.stages] == ["train"]
    assert (tmp_path / "registered").read_text() == "x", "the effect happened once"


async def test_not_equal_and_what_differs(settings, tmp_path: Path) -> None:
    train = TRAIN.replace('"MILLRACE_SEED"', '"MILLRACE_SEED"') + "(out / 'same.txt').write_text('same')\n"
    train = train.replace("random.randbytes(100)", "os.urandom(100)")
    async with coordinator(settings) as client:
        run = await client.run(pipeline(tmp_path, train, ("model.bin", "same.txt")))
        Path(settings.lock_file).write_text("numpy==3.0.0\n")
        answer = await client.stub.Reproduce(pb.ReproduceRequest(run_id=run.id), timeout=60)
        assert not answer.bit_equal
        assert {o.path: o.equal for o in answer.outputs} == {"train/model.bin": False, "train/same.txt": True}
        assert answer.environment_differences["lock_hash"].startswith(run.record.lock_hash + " -> ")


async def test_a_broken_off_call_takes_up_the_same_reproduction(client: Client, tmp_path: Path) -> None:
    slow = (
        TRAIN
        + f"""
import time
end = pathlib.Path({str(tmp_path / "go")!r})
while of and not end.exists():
    time.sleep(0.02)
"""
    )
    run = await client.run(pipeline(tmp_path, slow))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.stub.Reproduce(pb.ReproduceRequest(run_id=run.id), timeout=0.7)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    calls = [asyncio.create_task(_reproduce(client, run.id)) for _ in range(2)]
    listed = (await client.stub.ListRuns(pb.ListRunsRequest())).runs
    assert len(listed) == 2, "one original, one reproduction"
    (tmp_path / "go").touch()
    first, second = await asyncio.gather(*calls)
    assert first == second
    assert first.bit_equal
    assert first.reproduction_run_id == listed[0].id
    third = await _reproduce(client, run.id)
    assert third.reproduction_run_id != first.reproduction_run_id


async def test_a_reproduction_that_ended_while_nobody_listened_is_told(client: Client, tmp_path: Path) -> None:
    slow = TRAIN + "import time\nif of: time.sleep(0.5)\n"
    run = await client.run(pipeline(tmp_path, slow))
    with pytest.raises(grpc.aio.AioRpcError):
        await client.stub.Reproduce(pb.ReproduceRequest(run_id=run.id), timeout=0.2)
    [again] = [r for r in (await client.stub.ListRuns(pb.ListRunsRequest())).runs if r.id != run.id]
    await client.ended(again.id)
    assert (await _reproduce(client, run.id)).reproduction_run_id == again.id


async def test_a_failed_reproduction_says_so(client: Client, tmp_path: Path) -> None:
    run = await client.run(pipeline(tmp_path, TRAIN + "if of: raise SystemExit(78)\n"))
    with pytest.raises(MillraceError, match=r"train: exit code 78") as caught:
        await _reproduce(client, run.id)
    assert caught.value.reason == "REPRODUCTION_FAILED"
    assert (await client.get(caught.value.metadata["run_id"])).state == pb.RUN_STATE_FAILED


async def test_cancelling_the_reproduction_ends_the_call(client: Client, tmp_path: Path) -> None:
    run = await client.run(pipeline(tmp_path, TRAIN + "import time\nif of: time.sleep(1000)\n"))
    call = asyncio.create_task(_reproduce(client, run.id))

    async def listed() -> bool:
        return len((await client.stub.ListRuns(pb.ListRunsRequest())).runs) == 2

    await until(listed, "the reproduction")
    await client.cancel((await client.stub.ListRuns(pb.ListRunsRequest())).runs[0].id)
    with pytest.raises(MillraceError, match="CANCELLED"):
        await call


async def _reproduce(client: Client, run_id: str) -> pb.ReproduceResponse:
    try:
        return await client.stub.Reproduce(pb.ReproduceRequest(run_id=run_id), timeout=60)
    except grpc.aio.AioRpcError as error:
        raise MillraceError.from_rpc(error) from None
