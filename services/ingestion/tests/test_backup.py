"""Backup and restore with the commands users type: a consistent point while records land, and producers that send again afterwards."""

import asyncio
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from deltalake import DeltaTable
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_ingestion.backup import command
from millrace_ingestion.settings import IngestionSettings
from millrace_kit.sql import open_engine
from sqlalchemy import text

from .harness import PLACES, Client, contract, lines, records, row, serving, settings_for


def config(folder: Path, settings: IngestionSettings) -> str:
    path = folder / "ingestion.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return str(path)


async def run(*arguments: str) -> int:
    return await asyncio.to_thread(command.run, arguments)


async def fill(client: Client) -> None:
    held = contract(delay={"max_null_rate": 0.5, "policies": {"null_rate": pb.CHECK_POLICY_QUARANTINE}})
    await client.register(held)
    await client.register(contract("other"))
    for offset in range(1, 5):
        await client.write(offset, records(offset * 10, 5))
    await client.write(5, lines(row("bad", carrier="?"), row("good")))
    await client.write(6, lines(row("held", delay=None)))


async def test_a_restored_service_answers_what_it_knew_and_lands_what_came_after(
    place: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    backups = str(tmp_path_factory.mktemp("backups"))
    async with serving(place) as client:
        await fill(client)
        assert await run("backup", "--config", config(place, client.settings), "--to", backups) == 0
        at_backup = client.lake()
        await client.write(7, records(1000, 3))
    assert await run("verify", "--from", backups) == 0
    folder = tmp_path_factory.mktemp("restored")
    if place in PLACES:  # the same kind of place again, emptied
        PLACES[folder] = {**PLACES[place], "lake_url": f"{PLACES[place]['lake_url']}/restored"}
        engine = open_engine(PLACES[place]["database_url"])
        with engine.begin() as connection:
            connection.execute(text("DROP SCHEMA public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
        engine.dispose()
    try:
        await restored_service(folder, backups, at_backup)
    finally:
        PLACES.pop(folder, None)


async def restored_service(folder: Path, backups: str, at_backup: pa.Table) -> None:
    assert await run("restore", "--config", config(folder, settings_for(folder)), "--from", backups) == 0
    async with serving(folder) as client:
        assert client.lake().equals(at_backup)
        again = await client.write(4, records(40, 5))
        assert (again.replayed, again.accepted) == (True, 5)
        # Lost with the old place, so it lands now; its ids and those of the backup are known all the same.
        assert (await client.write(7, records(1000, 3))).replayed is False
        assert (await client.write(8, records(38, 4))).duplicates == 2
        assert await client.counts() == {"PATTERN_MISMATCH": 1}
        released = await client.stub.ReleaseQuarantine(pb.ReleaseQuarantineRequest(contract="flights"))
        assert released.accepted == 1
        assert {c.name for c in (await client.stub.ListContracts(pb.ListContractsRequest())).contracts} == {
            "flights",
            "other",
        }
        await client.write(1, records(0, 1), name="other")
        await client.write(9, lines(row("worse", carrier="?")))
        letters = (await client.stub.ListDeadLetters(pb.ListDeadLettersRequest(contract="flights"))).dead_letters
        assert [letter.id for letter in letters] == [1, 2]


async def test_a_backup_while_records_land_is_one_point(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    backups = str(tmp_path_factory.mktemp("backups"))
    async with serving(tmp_path, linger_ms=0.0) as client:
        await client.register()
        written = asyncio.create_task(_write_all(client, range(1, 25)))
        while not written.done():
            assert await run("backup", "--config", config(tmp_path, client.settings), "--to", backups) == 0
        await written
    taken = _ids(backups)
    for backup in {taken[0], taken[len(taken) // 2], taken[-1]}:
        folder = tmp_path_factory.mktemp("restored")
        restored = ("restore", "--config", config(folder, settings_for(folder)), "--from", backups, "--backup", backup)
        assert await run(*restored) == 0
        async with serving(folder) as client:
            await _write_all(client, range(1, 25))
            table = client.lake()
            assert sorted(table["event_id"].to_pylist()) == sorted(f"e{i}" for i in range(10, 250))
            assert set(zip(table["_offset"].to_pylist(), table["event_id"].to_pylist(), strict=True)) == {
                (i // 10, f"e{i}") for i in range(10, 250)
            }


async def _write_all(client: Client, offsets: range) -> None:
    for offset in offsets:
        answer = await client.write(offset, records(offset * 10, 10))
        assert (answer.accepted, answer.duplicates) == (10, 0)


def _ids(backups: str) -> list[str]:
    return sorted(path.name for path in (Path(backups) / "backups").iterdir())


async def test_a_second_backup_copies_only_what_is_new_and_keeps_old_versions(tmp_path: Path) -> None:
    store, target = tmp_path / "backups", tmp_path / "restored"
    target.mkdir()
    async with serving(tmp_path, maintain_every_commits=4) as client:
        await fill(client)
        assert await run("backup", "--config", config(tmp_path, client.settings), "--to", str(store)) == 0
        first = _content(store)
        version = DeltaTable(str(tmp_path / "lake" / "flights")).version()
        before = client.lake()
        await client.write(7, records(1000, 3))
        assert await run("backup", "--config", config(tmp_path, client.settings), "--to", str(store)) == 0
        second = _content(store)
        assert first < second
        assert sum(1 for path in second - first if path.suffix == "" and path.stat().st_size > 0) <= 12
        assert await run("restore", "--config", config(target, settings_for(target)), "--from", str(store)) == 0
    assert DeltaTable(str(target / "lake" / "flights"), version=version).to_pyarrow_table().equals(before)


def _content(store: Path) -> set[Path]:
    return {path for path in (store / "sha256").rglob("*") if path.is_file()}


async def test_a_restore_needs_an_empty_place_and_whole_content(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, target = tmp_path / "backups", tmp_path / "restored"
    target.mkdir()
    async with serving(tmp_path) as client:
        await fill(client)
        own = config(tmp_path, client.settings)
        assert await run("restore", "--config", own, "--from", str(store)) == 1
        assert "no backup named" in capsys.readouterr().err
        assert await run("backup", "--config", own, "--to", str(store)) == 0
        assert await run("restore", "--config", own, "--from", str(store)) == 1
        assert "needs an empty one" in capsys.readouterr().err
    stray = target / "lake" / "flights" / "stray.parquet"
    stray.parent.mkdir(parents=True)
    stray.touch()
    again = ("restore", "--config", config(target, settings_for(target)), "--from", str(store))
    assert await run(*again) == 1
    assert "stray.parquet" in capsys.readouterr().err
    stray.unlink()
    victim = max(_content(store), key=lambda path: path.stat().st_size)
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert await run("verify", "--from", str(store)) == 1
    assert await run(*again) == 1
    assert "holds other content" in capsys.readouterr().err
    # What the attempt left does not stand in the way of the next one.
    victim.write_bytes(whole)
    assert await run(*again) == 0
