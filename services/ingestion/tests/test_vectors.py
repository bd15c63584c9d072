"""Columns of lists: embeddings, from Arrow and JSON to the lake."""

import json
import math
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_ingestion.arrow_records import check_table
from millrace_ingestion.checks import Checked
from millrace_ingestion.contracts import Column, ColumnType, Contract
from millrace_ingestion.json_records import reader_for
from millrace_ingestion.quality import figures_of
from millrace_ingestion.rules import Expectation, Policy, Statistic
from millrace_ingestion.validation import validate
from millrace_kit.errors import InvalidArgumentError

from .harness import contract, from_ipc, landed, lines, records, row, serving

AT = datetime(2026, 1, 1, tzinfo=UTC)


def articles(**changes: Any) -> Contract:
    vector = {"nullable": True, "min_length": 3, "max_length": 3, **changes}
    columns = (
        Column("id", ColumnType.STRING), Column("at", ColumnType.TIMESTAMP), Column("v", ColumnType.FLOAT_LIST, **vector),
    )  # fmt: skip
    return Contract("articles", 1, columns, "id", "at")


def reasons(checked: Checked) -> list[tuple[int, str]]:
    return [(reject.row, reject.failure.reason) for reject in checked.rejects]


VALUES: list[Any] = [
    [1.0, 2.0, 0.1],
    None,
    [1.0],
    [],
    [1.0, None, 3.0],
    [1.0, math.nan, 0.0],
    [1.0, 1e39, 0.0],
    [3, 2, 1],
]
BAD = [(2, "WRONG_LENGTH"), (3, "WRONG_LENGTH"), (4, "OUT_OF_RANGE"), (5, "OUT_OF_RANGE"), (6, "OUT_OF_RANGE")]


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.large_list(pa.float64())], ids=str)
def test_arrow_lists_are_checked(kind: pa.DataType) -> None:
    ids, times = [f"e{i}" for i in range(len(VALUES))], [AT] * len(VALUES)
    table = pa.table({"id": ids, "at": pa.array(times, pa.timestamp("us", "UTC")), "v": pa.array(VALUES, kind)})
    # A part of a table whose lists do not begin at the column's first number.
    for checked, shift in (
        (check_table(articles(), table, max_bytes=1 << 20), 0),
        (check_table(articles(), table.slice(1), max_bytes=1 << 20), 1),
    ):
        assert reasons(checked) == [(row - shift, reason) for row, reason in BAD]
    good = check_table(articles(), table, max_bytes=1 << 20).table
    assert good.schema.field("v").type == pa.list_(pa.float32())
    assert good.column("v").to_pylist() == [
        pa.scalar([1.0, 2.0, 0.1], pa.list_(pa.float32())).as_py(),
        None,
        [3.0, 2.0, 1.0],
    ]


def test_other_lists_are_refused() -> None:
    base = {"id": ["a"], "at": pa.array([AT], pa.timestamp("us", "UTC"))}
    for values in (pa.array([["1", "2", "3"]]), pa.array(["[1, 2, 3]"]), pa.array([1.5]), pa.array([[[1.0]]])):
        assert reasons(check_table(articles(), pa.table({**base, "v": values}), max_bytes=1 << 20)) == [
            (0, "WRONG_TYPE")
        ]
    fixed = pa.table({**base, "v": pa.array([[1, 2, 3]], pa.list_(pa.int32(), 3))})
    assert check_table(articles(), fixed, max_bytes=1 << 20).table.column("v").to_pylist() == [[1.0, 2.0, 3.0]]


def test_json_arrays_are_checked() -> None:
    values: list[Any] = [[1, 2.5, 3], None, [1], ["1", 2, 3], [1, None, 3], [1e39, 0, 0], "text"]
    lines = [json.dumps({"id": f"e{i}", "at": AT.isoformat(), "v": value}) for i, value in enumerate(values)]
    checked = reader_for(articles()).check("\n".join(lines).encode(), max_rows=100)
    assert reasons(checked) == [
        (2, "WRONG_LENGTH"), (3, "WRONG_TYPE"), (4, "WRONG_TYPE"), (5, "OUT_OF_RANGE"), (6, "WRONG_TYPE"),
    ]  # fmt: skip
    assert checked.table.column("v").to_pylist() == [[1.0, 2.5, 3.0], None]


def test_checks_that_lists_cannot_have_are_refused() -> None:
    def refused(given: Contract) -> str:
        with pytest.raises(InvalidArgumentError) as caught:
            validate(given, "contract")
        return caught.value.field

    assert validate(articles(), "contract")
    assert refused(articles(unique=True)) == "contract.columns[2].unique"
    assert refused(articles(minimum=1.0)) == "contract.columns[2].min"
    keyed = Contract("articles", 1, articles().columns, "id", "at", ("v",))
    assert refused(keyed) == "contract.key_columns[0]"
    counted = Expectation("many", Statistic.DISTINCT, "v", None, 1.0, None, 1, Policy.REJECT)
    assert refused(Contract("articles", 1, articles().columns, "id", "at", expectations=(counted,))).endswith(".column")


def test_figures_of_lists_are_counts() -> None:
    table = pa.table({"v": pa.array([[1.0], None], pa.list_(pa.float32()))})
    figures = figures_of([table], 1, [], 1).columns["v"]
    assert (figures.values, figures.nulls, figures.sampled) == (1, 1, 0)


async def test_a_column_of_lists_is_added_and_lands(tmp_path) -> None:
    async with serving(tmp_path) as client:
        await client.register()
        await client.write(1, lines(row("a")))
        await client.register(contract(v={"type": pb.COLUMN_TYPE_FLOAT_LIST, "nullable": True, "max_length": 2}))
        await client.write(2, lines(row("b", v=[0.5, 1]), row("c", v=[1, 2, 3])))
        given = records(1, 2).append_column("v", pa.array([[0.25], None], pa.list_(pa.float32())))
        await client.write(3, given)
        table = client.lake().sort_by("event_id")
        told = [from_ipc(landed(message).arrow_ipc).num_rows for message in await client.messages()]
        assert await client.counts() == {"WRONG_LENGTH": 1}
    assert table.column("event_id").to_pylist() == ["a", "b", "e1", "e2"]
    assert table.column("v").to_pylist() == [None, [0.5, 1.0], [0.25], None]
    assert told == [1, 1, 2]
