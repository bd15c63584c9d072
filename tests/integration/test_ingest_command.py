"""`millrace ingest` against a real ingestion process."""

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result
from millrace import Client, Endpoints
from millrace.cli import main
from millrace.loading import columns_of, load_file
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_kit.errors import MillraceError
from millrace_kit.record_files import ChunkLimits, find_files

from tests.stack import eventually, free_port_base

CONTRACT = pb.DataContract(
    name="orders",
    columns=[
        pb.Column(name="id", type=pb.COLUMN_TYPE_STRING),
        pb.Column(name="at", type=pb.COLUMN_TYPE_TIMESTAMP),
        pb.Column(name="amount", type=pb.COLUMN_TYPE_DOUBLE, nullable=True, min=0),
    ],
    event_id_column="id",
    event_time_column="at",
    key_columns=["id"],
)


@dataclass
class Ingestion:
    """A real process that can be killed and started again."""

    folder: Path
    port_base: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoints(self) -> Endpoints:
        return Endpoints.local(self.port_base)

    def start(self) -> None:
        config = self.folder / "ingestion.yaml"
        settings = {
            "listen": self.endpoints.ingestion,
            "state_dir": str(self.folder / "state"),
            "lake_url": str(self.folder / "lake"),
            "bus": {"path": str(self.folder / "bus.sqlite")},
            "source_locations": [str(self.folder)],
            "source_poll_s": 0.1,
            "telemetry": {"log_level": "WARNING"},
        }
        config.write_text(yaml.safe_dump(settings))
        command = [str(Path(sys.executable).parent / "millrace-ingestion"), "--config", str(config)]
        self.process = subprocess.Popen(command)

    def answers(self) -> bool | None:
        """Whether it can register the contract; None when not yet."""
        with Client(self.endpoints) as client, contextlib.suppress(MillraceError):
            client.ingestion.register_contract(CONTRACT)
            return True
        return None

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def ids(self) -> list[str]:
        from deltalake import DeltaTable

        return sorted(DeltaTable(str(self.folder / "lake" / "orders")).to_pyarrow_table()["id"].to_pylist())


@pytest.fixture(scope="module")
def ingestion(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ingestion]:
    one = Ingestion(tmp_path_factory.mktemp("ingest"), free_port_base())
    one.start()
    eventually("ingestion answers", one.answers, timeout_s=120)
    yield one
    one.kill()


def run(ingestion: Ingestion, *arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(main, ["--port-base", str(ingestion.port_base), "ingest", *arguments], input=text)


def orders(first: int, count: int) -> pa.Table:
    places = range(first, first + count)
    at = pa.array([1_700_000_000_000_000 + i for i in places], pa.timestamp("us", "UTC"))
    return pa.table({"id": [f"o{i}" for i in places], "at": at, "amount": [float(i) for i in places]})


def line(name: str, **values: object) -> str:
    return json.dumps({"id": name, "at": "2026-01-01T00:00:00Z", "amount": 1, **values})


def test_files_of_every_format_are_loaded_once_and_the_bad_are_named(ingestion: Ingestion, tmp_path: Path) -> None:
    pq.write_table(orders(0, 100), tmp_path / "a.parquet", row_group_size=30)
    pa_csv.write_csv(orders(100, 50), tmp_path / "b.csv")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress("\n".join([line("c1"), "", line("c2", amount=-1)]).encode()))
    (tmp_path / "d.csv").write_text("id,at\nd1\n")
    done = run(ingestion, "load", "orders", str(tmp_path))
    assert done.exit_code == 1, done.output
    assert "a.parquet: 100 accepted, 0 duplicates, 0 rejected" in done.output
    assert "c.jsonl.gz: 1 accepted, 0 duplicates, 1 rejected" in done.output
    assert "d.csv: line 1: CSV parse error: Row #2: Expected 2 columns, got 1" in done.stderr
    assert "next: millrace dead-letters orders" in done.stderr
    (tmp_path / "d.csv").unlink()
    again = run(ingestion, "load", "orders", f"{tmp_path}/*.parquet", f"{tmp_path}/b.csv")
    assert again.exit_code == 0, again.output
    assert "a.parquet: 0 accepted, 0 duplicates, 0 rejected, 100 had landed before" in again.output
    assert len(ingestion.ids()) == len(set(ingestion.ids())) == 151
    for arguments, problem in (
        (("load", "orders", str(tmp_path / "none.csv")), "there is no such file"),
        (("load", "nothing", str(tmp_path / "b.csv")), "no contract named 'nothing'"),
        (("load", "orders", str(tmp_path / "a.parquet"), "--format", "csv"), "a.parquet: line 1"),
    ):
        failed = run(ingestion, *arguments)
        assert failed.exit_code == 1
        assert problem in failed.stderr


def test_lines_are_written_after_what_landed(ingestion: Ingestion) -> None:
    first = run(ingestion, "write", "orders", "--source", "w", "--batch-records", "2", text="\n".join(map(line, "xyz")))
    assert first.output.startswith("3 accepted"), first.output
    second = run(ingestion, "write", "orders", "--source", "w", text=line("z") + "\n" + line("w", amount="?"))
    assert second.stdout == "0 accepted, 1 duplicates, 1 rejected\n"


def test_a_load_goes_on_after_the_service_was_killed(ingestion: Ingestion, tmp_path: Path) -> None:
    pq.write_table(orders(10_000, 3_000), tmp_path / "big.parquet", row_group_size=700)
    (file,) = find_files(str(tmp_path / "big.parquet"), limit=10)
    seen: list[int] = []

    def report(answer: pb.WriteResponse, _read: int) -> None:
        seen.append(answer.offset)
        if len(seen) == 5:
            ingestion.kill()
            ingestion.start()

    with Client(ingestion.endpoints) as client:
        limits = ChunkLimits(records=100, bytes=1 << 20)
        loaded = load_file(
            client,
            "orders",
            file,
            columns_of(client, "orders"),
            report=report,
            limits=limits,
            wait=lambda _s: eventually("ingestion answers again", ingestion.answers, timeout_s=120) and None,
        )
    assert seen[-1] == 3_000
    assert loaded.rejected == loaded.duplicates == 0
    assert [name for name in ingestion.ids() if name.startswith("o1") and len(name) == 6] == sorted(
        f"o{i}" for i in range(10_000, 13_000)
    )


def test_ctrl_c_keeps_what_landed(ingestion: Ingestion, tmp_path: Path) -> None:
    fifo = tmp_path / "slow.jsonl"
    os.mkfifo(fifo)
    command = [str(Path(sys.executable).parent / "millrace"), "--port-base", str(ingestion.port_base), "ingest"]
    command += ["write", "orders", str(fifo), "--batch-records", "1", "--source", "slow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writing:
        with fifo.open("w") as pipe:
            pipe.write(line("slow1") + "\n")
            pipe.flush()
            eventually("the first line landed", lambda: "slow1" in ingestion.ids() or None)
            writing.send_signal(signal.SIGINT)
            writing.wait(30)
        assert writing.returncode != 0
    assert ingestion.ids().count("slow1") == 1


def test_sources_are_looked_after_by_the_command(ingestion: Ingestion, tmp_path: Path) -> None:
    drop = ingestion.folder / "drop"
    drop.mkdir()
    pq.write_table(orders(20_000, 10), drop / "a.parquet")
    source = {"name": "drop", "contract": "orders", "files": {"urls": [f"{drop}/*.parquet"], "cron": "0 3 * * *"}}
    file = tmp_path / "drop.yaml"
    file.write_text(yaml.safe_dump(source))
    added = run(ingestion, "sources", "add", "-f", str(file))
    assert added.stdout == "source/drop registered (version 1)\n", added.output

    def shown(wanted: str) -> str | None:
        text = run(ingestion, "sources", "list", "drop").stdout
        return text if wanted in text else None

    text = eventually("the file landed", lambda: shown("last look: 1 new files, 10 records"))
    assert text.splitlines()[0].split() == [
        "NAME",
        "KIND",
        "CONTRACT",
        "STATE",
        "LAG",
        "ACCEPTED",
        "REJECTED",
        "LAST",
        "RUN",
        "NEXT",
        "RUN",
    ]
    assert text.splitlines()[1].split()[:7] == ["drop", "files", "orders", "Running", "-", "10", "0"]
    assert run(ingestion, "sources", "add", "-f", str(file)).stdout == "source/drop unchanged (version 1)\n"
    assert run(ingestion, "sources", "pause", "drop").exit_code == 0
    assert shown("Paused")
    assert run(ingestion, "sources", "run", "drop").exit_code == 1
    assert run(ingestion, "sources", "resume", "drop").exit_code == 0
    assert shown("Running")
    listed = json.loads(run(ingestion, "sources", "list", "-o", "json").stdout)
    assert listed[0]["source"]["files"]["cron"] == "0 3 * * *"
    assert run(ingestion, "sources", "remove", "drop").exit_code == 0
    assert run(ingestion, "sources", "list", "drop").exit_code == 1
    file.write_text("name: drop\ncontract: orders\nfiles: {urls: [/x], wrong: 1}\n")
    refused = run(ingestion, "sources", "add", "-f", str(file))
    assert refused.exit_code == 1
    assert "wrong" in refused.stderr
