"""Chunks of files: every record once, from any position, and none larger than it may be."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from millrace_kit.errors import InvalidArgumentError
from millrace_kit.record_files import Chunk, ChunkLimits, find_files, read_chunks, unchanged

COLUMNS = {"id": "string", "n": "int64"}
LIMITS = ChunkLimits(records=7, bytes=1 << 20)
ROWS = 50


@pytest.fixture(params=["a.parquet", "a.csv", "a.jsonl"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    table = pa.table({"id": [f"r{i}" for i in range(ROWS)], "n": list(range(ROWS)), "more": ["x\ny"] * ROWS})
    path = tmp_path / request.param
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=20)
    elif path.suffix == ".csv":
        pa_csv.write_csv(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return path


def ids(chunk: Chunk) -> list[str]:
    if chunk.table is not None:
        assert chunk.table.column_names == ["id", "n"]
        return chunk.table["id"].to_pylist()
    return [json.loads(line)["id"] for line in (chunk.json_lines or b"").split(b"\n")]


def test_reading_goes_on_after_any_number_of_records(path: Path) -> None:
    (file,) = find_files(str(path), limit=1)
    for after in range(ROWS + 1):
        chunks = list(read_chunks(file, COLUMNS, LIMITS, after=after))
        assert [one for chunk in chunks for one in ids(chunk)] == [f"r{i}" for i in range(after, ROWS)]
        assert [place for chunk in chunks for place in chunk.places] == list(range(after + 1, ROWS + 1))
        assert all(len(ids(chunk)) <= LIMITS.records for chunk in chunks)
        assert [chunk.places[-1] for chunk in chunks] == [chunk.end for chunk in chunks]


def test_a_file_is_known_until_it_changes(path: Path) -> None:
    (file,) = find_files(str(path), limit=1)
    assert find_files(f"{path.parent}/*", limit=1) == find_files(str(path.parent), limit=1) == [file]
    assert unchanged(file)
    path.write_bytes(path.read_bytes() + b"\n")
    assert not unchanged(file)
    assert find_files(str(path), limit=1)[0].identity != file.identity


def test_wide_rows_make_short_chunks(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [str(i) * 10_000 for i in range(40)]}), tmp_path / "a.parquet", use_dictionary=False)
    (file,) = find_files(str(tmp_path), limit=1)
    chunks = list(read_chunks(file, COLUMNS, ChunkLimits(records=1000, bytes=50_000)))
    assert sum(chunk.table.num_rows for chunk in chunks) == 40
    assert max(chunk.table.nbytes for chunk in chunks) <= 60_000


def test_names_that_say_no_format_need_one(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("id,n\nx,1\n")
    with pytest.raises(InvalidArgumentError, match="says no format"):
        find_files(str(tmp_path / "data"), limit=1)
    assert find_files(str(tmp_path), limit=1) == []
    (file,) = find_files(str(tmp_path / "data"), "csv", limit=1)
    assert [ids(chunk) for chunk in read_chunks(file, COLUMNS, LIMITS)] == [["x"]]
    (tmp_path / "b.csv").write_text("")
    (tmp_path / "c.csv").write_text("id,n\n")
    assert [list(read_chunks(one, COLUMNS, LIMITS)) for one in find_files(str(tmp_path), limit=2)] == [[], []]
    with pytest.raises(InvalidArgumentError, match="more than 1 files"):
        find_files(str(tmp_path), limit=1)
