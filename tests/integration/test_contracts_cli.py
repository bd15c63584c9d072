"""`millrace contracts`, `letters`, `quarantine`, `quality` and `table-versions` against a real ingestion service."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from millrace.cli.main import main
from millrace.contracts import contract_document, load_contract
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_api.ingestion.v1.ingestion_pb2_grpc import IngestionServiceStub
from millrace_ingestion.app import build
from millrace_ingestion.settings import IngestionSettings
from millrace_kit.client import open_channel
from millrace_kit.errors import InvalidArgumentError
from millrace_kit.server import running
from millrace_kit.settings import BusSettings

CONTRACT = """
name: flights
compatibility: full
columns:
- {name: id, type: string}
- {name: departure, type: timestamp, max_ahead_s: 60}
- {name: arrival, type: timestamp, nullable: true}
- {name: delay, type: double, nullable: true, max: 100, max_null_rate: 0.5, policies: {range: reject, null_rate: quarantine}}
- {name: gate, type: int64, nullable: true, allowed_numbers: [1, 2]}
event_id_column: id
event_time_column: departure
key_columns: [id]
comparisons:
- {name: in_order, check: arrival >= departure, policy: warn}
- {name: late, check: delay < 99.5}
expectations:
- {name: size, statistic: row_count, max: 1000, policy: warn}
"""

Millrace = Callable[..., Awaitable[Result]]


@pytest.fixture
async def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[IngestionServiceStub]:
    settings = IngestionSettings(
        state_dir=str(tmp_path / "state"), bus=BusSettings(path=str(tmp_path / "bus.sqlite")), drain_s=2.0
    )
    async with running(await build(settings), settings) as address, open_channel(address, timeout_s=30) as channel:
        monkeypatch.setenv("MILLRACE_INGESTION_ADDRESS", address)
        yield IngestionServiceStub(channel)


async def millrace(*arguments: object, code: int = 0) -> str:
    done = await asyncio.to_thread(CliRunner().invoke, main, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done.stdout


def test_a_file_says_the_same_after_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "contract.yaml"
    path.write_text(CONTRACT)
    first = load_contract(path)
    path.write_text(yaml.safe_dump(contract_document(first)))
    assert load_contract(path) == first
    assert first.comparisons[0].column == "departure"
    assert first.comparisons[1].number == 99.5
    assert first.columns[3].policies["null_rate"] == pb.CHECK_POLICY_QUARANTINE


@pytest.mark.parametrize(
    ("field", "old", "new"),
    [
        ("columns[0].type", "type: string", "type: text"),
        ("columns[3].policies.range", "range: reject", "range: maybe"),
        ("comparisons[0].check", "arrival >= departure", "arrival"),
        ("expectations[0].statistic", "row_count", "rows"),
        ("compatibility", "full", "some"),
    ],
)
def test_a_wrong_word_is_refused_by_field(tmp_path: Path, field: str, old: str, new: str) -> None:
    path = tmp_path / "contract.yaml"
    path.write_text(CONTRACT.replace(old, new, 1))
    with pytest.raises(InvalidArgumentError) as caught:
        load_contract(path)
    assert caught.value.field == f"contract.yaml: {field}"


async def test_contracts_are_checked_before_they_are_registered(stub: IngestionServiceStub, tmp_path: Path) -> None:
    path = tmp_path / "contract.yaml"
    path.write_text(CONTRACT)
    assert "contract/flights is new" in await millrace("contracts", "diff", "-f", path)
    assert await millrace("contracts", "register", "-f", path) == "contract/flights version 1 registered\n"
    assert await millrace("contracts", "register", "-f", path) == "contract/flights version 1 unchanged\n"
    assert (await millrace("contracts", "list")).splitlines()[1].split() == ["flights", "1", "full", "5", "3"]
    assert yaml.safe_load(await millrace("contracts", "show", "flights"))["compatibility"] == "full"
    path.write_text(CONTRACT.replace("max: 100,", "max: 200,"))
    shown = await millrace("contracts", "diff", "-f", path)
    assert shown.splitlines()[1].split() == ["delay", "max", "is", "looser", "yes", "no", "yes"]
    refused = await millrace("contracts", "check", "-f", path, code=1)
    assert "column 'delay': max is looser (compatibility FULL with version 1)" in refused
    await millrace("contracts", "register", "-f", path, code=1)
    path.write_text(CONTRACT.replace("columns:\n", "columns:\n- {name: note, type: string, nullable: true}\n"))
    assert "is compatible (1 changes to version 1)" in await millrace("contracts", "check", "-f", path)


async def test_records_that_did_not_land_are_looked_at_and_sent_again(
    stub: IngestionServiceStub, tmp_path: Path
) -> None:
    path = tmp_path / "contract.yaml"
    path.write_text(CONTRACT.replace("full", "none"))
    await millrace("contracts", "register", "-f", path)
    rows = [
        b'{"id": "a", "departure": 5, "arrival": 4, "delay": 1}\n{"id": "b", "departure": 5, "delay": 500}',
        b'{"id": "c", "departure": 5}',
    ]
    for offset, lines in enumerate(rows, start=1):
        batch = pb.RecordBatch(contract="flights", source="s", offset=offset, json_lines=lines)
        await stub.Write(pb.WriteRequest(batch=batch))
    assert "OUT_OF_RANGE" in await millrace("letters", "list", "flights", "--column", "delay")
    assert await millrace("letters", "replay", "flights", "--dry-run") == "0 would pass, 1 refused\n"
    path.write_text(CONTRACT.replace("full", "none").replace("max: 100,", "").replace("99.5", "999"))
    await millrace("contracts", "register", "-f", path)
    assert await millrace("letters", "replay", "flights", "--dry-run") == "1 would pass, 0 refused\n"
    assert await millrace("letters", "replay", "flights") == "1 landed, 0 refused\n"
    assert await millrace("letters", "discard", "flights", "--yes") == "1 removed\n"
    held = await millrace("quarantine", "list", "flights")
    assert held.splitlines()[1].split()[:5] == ["1", "s/2", "1", "held", "delay"]
    assert "1 batches released: 1 landed" in await millrace("quarantine", "release", "flights", 1)
    assert "0 batches discarded" in await millrace("quarantine", "discard", "flights", 1)
    shown = await millrace("quality", "flights")
    assert ["in_order", "comparison", "warn", "1"] in [line.split() for line in shown.splitlines()]
    assert await millrace("table-versions", "pin", "flights", "--owner", "me", "--expires", "2999-01-01")
    assert "me" in await millrace("table-versions", "list", "flights")
    assert await millrace("table-versions", "unpin", "flights", "--owner", "me") == "1 pins removed\n"
