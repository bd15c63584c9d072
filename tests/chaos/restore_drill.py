"""The whole place is lost: lake, database, topics, online values. What a backup under load had, and what producers send again, is all there.

Run by `make soak`, not with the tests: it repeats what `services/ingestion/tests/test_backup.py` holds, on the real parts and to the online values.
"""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.data_plane import WRITERS, Client, Plane, Reader, Repeater, Writer
from tests.chaos.test_data_kill import RECOVERY_S, SEED, broken, check_lake, check_online, work_goes_on

pytestmark = [pytest.mark.slow, pytest.mark.kafka, pytest.mark.redis, pytest.mark.timeout(900)]


def command(verb: str, plane: Plane, *arguments: str) -> None:
    """One of ingestion's own commands."""
    program = Path(sys.executable).parent / "millrace-ingestion"
    config = plane.folder / "ingestion" / "config.yaml"
    done = subprocess.run(
        [str(program), verb, "--config", str(config), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_everything_is_lost(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    plane = Plane(tmp_path, chance)
    backups = str(tmp_path / "backups")
    try:
        plane.start()
        Client(plane).set_up()
        writers = [Writer(plane, number, SEED) for number in range(WRITERS)]
        for writer in writers:
            writer.start()
        work_goes_on(writers, chance, "before the backup")
        command("backup", plane, "--to", backups)
        plane.victims["ingestion"].kill()
        command("backup", plane, "--to", backups)
        plane.victims["ingestion"].start()
        work_goes_on(writers, chance, "after the backup")
        for writer in writers:
            writer.stop.set()
        for writer in writers:
            writer.join(RECOVERY_S)
            assert writer.failure is None
        plane.stop()
        for name in ("lake", "kafka", "redis", "ingestion/state", "feature/state"):
            shutil.rmtree(tmp_path / name)
        command("restore", plane, "--from", backups)
        for victim in plane.victims.values():
            victim.start()
        Client(plane).set_up()
        repeaters = [Repeater(writer) for writer in writers]
        reader = Reader(plane, writers)
        for client in (*repeaters, reader):
            client.start()
        for repeater in repeaters:
            repeater.join(RECOVERY_S)
            assert repeater.failure is None
            assert repeater.done == len(repeater.batches)
        check_lake(plane, [event for w in writers for table in w.sent for event in table["event_id"].to_pylist()])
        check_online(reader, writers)
        reader.stop.set()
        reader.join(RECOVERY_S)
        assert not broken([reader])
    finally:
        plane.stop()
