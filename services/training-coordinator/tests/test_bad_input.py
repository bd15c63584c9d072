"""Bad input to every RPC: INVALID_ARGUMENT and the field's name; states that forbid a call are told apart."""

import random

import grpc
import pytest
from millrace_api.training.v1 import training_pb2 as pb
from millrace_kit.errors import MillraceError

from .conftest import Client, archive, coordinator, manifest, stage

GOOD = manifest(parameters={"a": "1"}, stages=[stage("s", "pass")])
CODE = archive({"main.py": "pass"})
BAD = [
    ("RegisterPipeline", pb.RegisterPipelineRequest(code_tar_gz=CODE), "manifest_yaml"),
    ("RegisterPipeline", pb.RegisterPipelineRequest(manifest_yaml=GOOD), "code_tar_gz"),
    ("RegisterPipeline", pb.RegisterPipelineRequest(manifest_yaml=GOOD, code_tar_gz=b"x"), "code_tar_gz"),
    (
        "RegisterPipeline",
        pb.RegisterPipelineRequest(manifest_yaml=manifest(stages=[stage("s", "pass", retries=9)]), code_tar_gz=CODE),
        "manifest_yaml.stages[0].retries",
    ),
    (
        "RegisterPipeline",
        pb.RegisterPipelineRequest(
            manifest_yaml=manifest(stages=[stage("s", "pass", resources={"cpus": 99})]), code_tar_gz=CODE
        ),
        "manifest_yaml.stages[0].resources.cpus",
    ),
    ("StartRun", pb.StartRunRequest(), "pipeline"),
    ("StartRun", pb.StartRunRequest(pipeline="demo", parameters={"b": "1"}), "parameters['b']"),
    ("StartRun", pb.StartRunRequest(pipeline="demo", parameters={"": "1"}), "parameters"),
    ("StartRun", pb.StartRunRequest(pipeline="demo", parameters={"a": "x" * 5000}), "parameters['a']"),
    ("StartRun", pb.StartRunRequest(pipeline="demo", parameters={"a": "\0"}), "parameters['a']"),
    ("StartRun", pb.StartRunRequest(pipeline="demo", request_id="x" * 200), "request_id"),
    ("StartRun", pb.StartRunRequest(pipeline="demo", request_id="a\0b"), "request_id"),
    ("StartRun", pb.StartRunRequest(pipeline="demo", cause="a\0b"), "cause"),
    ("GetRun", pb.GetRunRequest(), "id"),
    ("GetRun", pb.GetRunRequest(id="\0"), "id"),
    ("ListRuns", pb.ListRunsRequest(page_size=-1), "page_size"),
    ("ListRuns", pb.ListRunsRequest(page_size=1001), "page_size"),
    ("ListRuns", pb.ListRunsRequest(pipeline="NO"), "pipeline"),
    ("CancelRun", pb.CancelRunRequest(), "id"),
    ("WatchRun", pb.WatchRunRequest(), "id"),
    ("Reproduce", pb.ReproduceRequest(), "run_id"),
]


async def call(client: Client, method: str, request) -> None:
    try:
        if method == "WatchRun":
            _ = [event async for event in client.stub.WatchRun(request)]
        else:
            await getattr(client.stub, method)(request, timeout=20)
    except grpc.aio.AioRpcError as error:
        raise MillraceError.from_rpc(error) from None


async def test_bad_requests_name_the_field(client: Client) -> None:
    await client.register(GOOD)
    for method, request, field in BAD:
        with pytest.raises(MillraceError) as caught:
            await call(client, method, request)
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT, (method, request, caught.value)
        assert caught.value.metadata["field"] == field, (method, request)
    assert not (await client.stub.ListRuns(pb.ListRunsRequest())).runs


async def test_what_the_state_forbids(client: Client) -> None:
    await client.register(GOOD)
    run = await client.ended((await client.start(request_id="once")).id)
    failed = await client.run(manifest("bad", stages=[stage("s", "raise SystemExit(78)")]))
    cases = [
        ("StartRun", pb.StartRunRequest(pipeline="none"), "NOT_FOUND", "PIPELINE_NOT_FOUND"),
        (
            "StartRun",
            pb.StartRunRequest(pipeline="demo", request_id="once", seed=3),
            "ALREADY_EXISTS",
            "REQUEST_EXISTS",
        ),
        ("GetRun", pb.GetRunRequest(id="none"), "NOT_FOUND", "RUN_NOT_FOUND"),
        ("CancelRun", pb.CancelRunRequest(id="none"), "NOT_FOUND", "RUN_NOT_FOUND"),
        ("CancelRun", pb.CancelRunRequest(id=run.id), "FAILED_PRECONDITION", "RUN_ENDED"),
        ("WatchRun", pb.WatchRunRequest(id="none"), "NOT_FOUND", "RUN_NOT_FOUND"),
        ("Reproduce", pb.ReproduceRequest(run_id="none"), "NOT_FOUND", "RUN_NOT_FOUND"),
        ("Reproduce", pb.ReproduceRequest(run_id=failed.id), "FAILED_PRECONDITION", "RUN_NOT_SUCCEEDED"),
        ("Reproduce", pb.ReproduceRequest(run_id=run.id), "FAILED_PRECONDITION", "NOTHING_TO_COMPARE"),
    ]
    for method, request, code, reason in cases:
        with pytest.raises(MillraceError) as caught:
            await call(client, method, request)
        assert (caught.value.code.name, caught.value.reason) == (code, reason), (method, request)


async def test_limits_are_named(settings) -> None:
    limited = settings.model_copy(update={"max_queued_runs": 1, "max_watchers": 1})
    async with coordinator(limited) as client:
        await client.register(manifest(stages=[stage("s", "import time; print('on', flush=True); time.sleep(100)")]))
        run_id = (await client.start()).id
        with pytest.raises(MillraceError) as caught:
            await call(client, "StartRun", pb.StartRunRequest(pipeline="demo"))
        assert (caught.value.code.name, caught.value.metadata["limit"]) == ("RESOURCE_EXHAUSTED", "max_queued_runs")
        first = client.stub.WatchRun(pb.WatchRunRequest(id=run_id))
        await first.read()
        with pytest.raises(MillraceError) as caught:
            await call(client, "WatchRun", pb.WatchRunRequest(id=run_id))
        assert (caught.value.code.name, caught.value.metadata["limit"]) == ("RESOURCE_EXHAUSTED", "max_watchers")
        first.cancel()
        await client.cancel(run_id)


async def test_random_bytes_and_messages_never_break_it(client: Client) -> None:
    source = random.Random(11)
    allowed = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION"}
    methods = ("RegisterPipeline", "StartRun", "GetRun", "ListRuns", "CancelRun", "WatchRun", "Reproduce")
    for round_ in range(140):
        method = methods[round_ % len(methods)]
        path = f"/millrace_api.training.v1.TrainingService/{method}"
        # A field of each wire type with random content: mostly readable messages of unreadable meaning.
        text = "".join(chr(source.choice((0, 9, 34, 45, 92, 233, 120, 0x1F600))) for _ in range(source.randint(0, 30)))
        body = text.encode()
        message = bytes([source.choice((10, 18, 26, 34, 42)), len(body)]) + body
        raw = message if round_ % 2 else source.randbytes(source.randint(0, 60))
        code = await _code(client, path, raw)
        assert code in allowed, (method, raw, code)
    await client.register(GOOD)


async def _code(client: Client, path: str, raw: bytes) -> str:
    """The status a request of raw bytes gets."""
    try:
        if path.endswith("WatchRun"):
            _ = [event async for event in client.channel.unary_stream(path)(raw, timeout=20)]
        else:
            await client.channel.unary_unary(path)(raw, timeout=20)
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"
