"""Registration, what may follow what, dead letters and their replay, limits, and bad input to every RPC."""

import asyncio

import grpc
import grpc.aio
import pytest
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_kit.errors import MillraceError

from .harness import Client, batch, contract, lines, records, row, serving

STRING, INT64 = pb.COLUMN_TYPE_STRING, pb.COLUMN_TYPE_INT64


async def error_of(call) -> MillraceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return MillraceError.from_rpc(caught.value)


def register(client: Client, message: pb.DataContract):
    return client.stub.RegisterContract(pb.RegisterContractRequest(contract=message))


async def test_an_equal_contract_is_found_again(client: Client) -> None:
    answer = await register(client, contract())
    assert (answer.created, answer.contract.version) == (False, 1)
    listed = (await client.stub.ListContracts(pb.ListContractsRequest())).contracts
    assert list(listed) == [(await client.stub.GetContract(pb.GetContractRequest(name="flights"))).contract]


@pytest.mark.parametrize(
    "changes",
    [
        {"gate": {"type": STRING, "nullable": True}},
        {"carrier": {"pattern": ""}},
        {"delay": {"min": -200}},
        {"delay": {"max": None}},
        {"carrier": {"nullable": True}},
    ],
)
async def test_loosening_makes_a_version(client: Client, changes) -> None:
    answer = await register(client, contract(**changes))
    assert (answer.created, answer.contract.version) == (True, 2)


@pytest.mark.parametrize(
    ("column", "changes"),
    [
        ("gate", {"gate": {"type": STRING}}),
        ("seats", {"seats": None}),
        ("delay", {"delay": {"min": -50}}),
        ("delay", {"delay": {"nullable": False}}),
        ("seats", {"seats": {"max": 9}}),
        ("seats", {"seats": {"type": pb.COLUMN_TYPE_DOUBLE}}),
        ("carrier", {"carrier": {"pattern": "[A-Z]{2}"}}),
        ("carrier", {"carrier": {"allowed": ["UA"]}}),
    ],
)
async def test_anything_else_is_refused_by_column(client: Client, column: str, changes) -> None:
    error = await error_of(register(client, contract(**changes)))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "INCOMPATIBLE_CONTRACT")
    assert error.metadata["column"] == column


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("contract.name", contract("Bad-Name")),
        ("contract.columns", pb.DataContract(name="a")),
        (
            "contract.columns[0].name",
            contract(event_id=None, at=None, carrier=None, delay=None, seats=None, _x={"type": 1}),
        ),
        ("contract.columns[5].type", contract(x={"type": 0})),
        ("contract.columns[5].type", contract(x={"type": 77})),
        ("contract.columns[5].name", contract(SEATS={"type": INT64})),
        ("contract.columns[5].min", contract(x={"type": STRING, "min": 1})),
        ("contract.columns[5].max", contract(x={"type": INT64, "max": float("inf")})),
        ("contract.columns[5].min", contract(x={"type": INT64, "min": 2, "max": 1})),
        ("contract.columns[5].allowed", contract(x={"type": INT64, "allowed": ["a"]})),
        ("contract.columns[5].pattern", contract(x={"type": STRING, "pattern": "("})),
        ("contract.event_id_column", contract(event_id=None)),
        ("contract.event_time_column", contract(at={"nullable": True})),
        ("contract.key_columns[0]", contract(carrier=None)),
    ],
)
async def test_a_wrong_contract_is_refused_by_field(client: Client, field: str, message) -> None:
    error = await error_of(register(client, message))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.metadata["field"] == field


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("GetContract", pb.GetContractRequest(name="é"), "name"),
        ("GetTable", pb.GetTableRequest(), "contract"),
        ("ListDeadLetters", pb.ListDeadLettersRequest(), "contract"),
        ("ListDeadLetters", pb.ListDeadLettersRequest(contract="a", reason="x"), "reason"),
        ("ListDeadLetters", pb.ListDeadLettersRequest(contract="a", page_size=-1), "page_size"),
        ("ListDeadLetters", pb.ListDeadLettersRequest(contract="a", page_token="x"), "page_token"),
        ("CountDeadLetters", pb.CountDeadLettersRequest(contract="A"), "contract"),
        ("ReplayDeadLetters", pb.ReplayDeadLettersRequest(), "contract"),
        ("Write", pb.WriteRequest(), "batch.contract"),
        ("Write", pb.WriteRequest(batch=pb.RecordBatch(contract="flights")), "batch.source"),
        ("Write", pb.WriteRequest(batch=pb.RecordBatch(contract="flights", source="_x")), "batch.source"),
        ("Write", pb.WriteRequest(batch=pb.RecordBatch(contract="flights", source="a\0")), "batch.source"),
        ("Write", pb.WriteRequest(batch=pb.RecordBatch(contract="flights", source="s")), "batch.offset"),
        ("Write", pb.WriteRequest(batch=pb.RecordBatch(contract="flights", source="s", offset=-1)), "batch.offset"),
        ("Write", pb.WriteRequest(batch=pb.RecordBatch(contract="flights", source="s", offset=1)), "batch.payload"),
        ("Write", pb.WriteRequest(batch=pb.RecordBatch(contract="flights", source="s", offset=1, arrow_ipc=b"x")), "batch.arrow_ipc"),
    ],
)  # fmt: skip
async def test_bad_input_is_refused_by_field(client: Client, method: str, request_, field: str) -> None:
    error = await error_of(getattr(client.stub, method)(request_))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.metadata["field"] == field


async def test_a_bad_stream_request_is_refused_by_field(client: Client) -> None:
    async def requests():
        yield pb.WriteStreamRequest()

    error = await error_of(anext(aiter(client.stub.WriteStream(requests()))))
    assert (error.code, error.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "batch.contract")


async def test_dead_letters_are_listed_in_pages(client: Client) -> None:
    await client.write(1, lines(*(row(f"x{i}", carrier="?") for i in range(5)), row("y", seats=0)))
    found, token = [], ""
    while True:
        request = pb.ListDeadLettersRequest(
            contract="flights", reason="PATTERN_MISMATCH", page_size=2, page_token=token
        )
        page = await client.stub.ListDeadLetters(request)
        found += [(letter.column, letter.record_json, letter.replayed) for letter in page.dead_letters]
        token = page.next_page_token
        if not token:
            break
    assert found == [("carrier", lines(row(f"x{i}", carrier="?")).decode(), False) for i in range(5)]
    assert await client.counts() == {"PATTERN_MISMATCH": 5, "OUT_OF_RANGE": 1}


async def test_a_replay_lands_what_the_new_contract_accepts_once(tmp_path) -> None:
    async with serving(tmp_path, replay_rows=2) as client:
        await client.register()
        await client.write(1, lines(*(row(f"x{i}", seats=-i) for i in range(5)), "{", row("ok")))
        replay = pb.ReplayDeadLettersRequest(contract="flights")
        answer = await client.stub.ReplayDeadLetters(replay)
        assert (answer.replayed, answer.still_rejected) == (0, 6)
        await client.register(contract(seats={"min": -3}))
        answers = await asyncio.gather(*(client.stub.ReplayDeadLetters(replay) for _ in range(2)))
        assert sorted(answer.replayed for answer in answers) == [0, 4]
        assert {answer.still_rejected for answer in answers} == {2}
        table = client.lake()
        assert sorted(table["event_id"].to_pylist()) == ["ok", "x0", "x1", "x2", "x3"]
        assert set(table["_source"].to_pylist()) == {"s", "_dead_letters"}
        counts = (await client.stub.CountDeadLetters(pb.CountDeadLettersRequest(contract="flights"))).counts
        assert [(c.reason, c.count, c.replayed) for c in counts] == [("MALFORMED_JSON", 1, 0), ("OUT_OF_RANGE", 5, 4)]
    async with serving(tmp_path) as client:
        answer = await client.stub.ReplayDeadLetters(replay)
        assert (answer.replayed, answer.still_rejected) == (0, 2)
        assert client.lake().num_rows == 5


@pytest.mark.parametrize(
    ("limit", "settings", "payload"),
    [
        ("max_batch_rows", {"max_batch_rows": 9}, records(0, 10)),
        ("max_batch_rows", {"max_batch_rows": 1}, lines(row("a"), row("b"))),
        ("max_batch_mib", {"max_batch_mib": 1}, b" " * (1 << 20) + b"x"),
        ("max_dead_letters", {"max_dead_letters": 1}, b"1\n2"),
    ],
)
async def test_limits_are_named(tmp_path, limit: str, settings, payload) -> None:
    async with serving(tmp_path, **settings) as client:
        await client.register()
        error = await error_of(client.write(1, payload))
        assert (error.code, error.metadata["limit"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, limit)
        assert client.lake().num_rows == 0


async def test_a_full_queue_refuses_writes_and_makes_streams_wait(tmp_path) -> None:
    async with serving(tmp_path, max_queued_batches=2, linger_ms=100.0) as client:
        await client.register()
        calls = [client.write(1, records(i, 1), source=f"s{i}") for i in range(10)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        refused = [a for a in answers if isinstance(a, grpc.aio.AioRpcError)]
        assert {MillraceError.from_rpc(a).metadata["limit"] for a in refused} == {"max_queued_batches"}
        assert 2 <= 10 - len(refused) < 10

        async def requests():
            for i in range(10):
                yield pb.WriteStreamRequest(batch=batch(i + 1, records(100 + i, 1), "stream"))

        assert len([answer async for answer in client.stub.WriteStream(requests())]) == 10
        assert client.lake().num_rows == 20 - len(refused)


async def test_a_lake_that_fails_answers_unavailable_and_recovers(tmp_path) -> None:
    async with serving(tmp_path) as client:
        await client.register()
        await fails_and_recovers(client, tmp_path)


async def fails_and_recovers(client: Client, tmp_path) -> None:
    await client.write(1, records(0, 1))
    folder = tmp_path / "lake" / "flights"
    away = tmp_path / "away"
    folder.rename(away)
    folder.write_text("in the way")
    error = await error_of(client.write(2, records(1, 1)))
    assert error.code is grpc.StatusCode.UNAVAILABLE
    folder.unlink()
    away.rename(folder)
    async with asyncio.timeout(30):
        while True:
            try:
                answer = await client.write(2, records(1, 1))
                break
            except grpc.aio.AioRpcError as again:
                if again.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(0.05)
    assert answer.accepted == 1
    assert sorted(client.lake()["event_id"].to_pylist()) == ["e0", "e1"]
