"""The journal: what survives, what is refused, what is counted; and the publisher's batches."""

import asyncio
import os
from pathlib import Path

import pytest
from gateway import eventually
from hypothesis import given, settings
from hypothesis import strategies as st
from millrace_api.events.v1 import events_pb2
from millrace_inference_gateway.journal import Journal, JournalFullError, JournalReader, LogPosition, scan
from millrace_inference_gateway.prediction_log import PredictionLog
from millrace_inference_gateway.publisher import Publisher
from millrace_kit.errors import UnavailableError


def open_journal(folder: Path, segment_bytes: int = 4096, max_segments: int = 4) -> Journal:
    return Journal(folder, segment_bytes=segment_bytes, max_segments=max_segments)


def test_entries_and_counts_survive(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    for n in range(300):
        assert journal.append([b"x" * (n % 50)], LogPosition(7, n)) == n
        if n % 100 == 99:
            journal.trim(n)
    again = open_journal(tmp_path)
    assert (again.end, again.position) == (300, LogPosition(7, 299))
    reader, found = JournalReader(again), []
    while again.start + len(found) < again.end:
        found += reader.read(again.start + len(found), again.end)
    assert [e.payload for e in found] == [b"x" * (n % 50) for n in range(again.start, 300)]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_cut_leaves_a_whole_prefix(data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        journal = open_journal(folder, segment_bytes=1 << 20)
        payloads = data.draw(st.lists(st.binary(max_size=40), min_size=1, max_size=8))
        journal.append(payloads)
        (path,) = folder.glob("*.log")
        content = path.read_bytes()
        if data.draw(st.booleans()):
            path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        else:
            place = data.draw(st.integers(0, len(content) - 1))
            path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        again = open_journal(folder, segment_bytes=1 << 20)
        entries, _good = scan(path.read_bytes(), 0)
        assert [e.payload for e in entries] == payloads[: again.end]
        assert again.end < len(payloads) or path.read_bytes() == content
        assert again.append([b"next"]) == len(entries)


def test_full_journal_drops_and_counts_until_there_is_room(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, segment_bytes=4096, max_segments=2)
    log = PredictionLog(journal, 10)
    for _ in range(100):
        log.write(events_pb2.Prediction(prediction_id="p", features=[1.0] * 20))
    kept = journal.end
    assert 0 < kept < 100
    assert log.counts.dropped == 100 - kept
    journal.trim(kept)
    log.write(events_pb2.Prediction(prediction_id="p"))
    assert journal.end == kept + 1


def test_full_disk_leaves_no_half_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = open_journal(tmp_path)
    journal.append([b"good"])
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, content: write(file, content[:10]))
    with pytest.raises(JournalFullError):
        journal.append([b"lost"])
    monkeypatch.undo()
    journal.append([b"better"])
    assert open_journal(tmp_path).end == 2


class FlakyBus:
    """Acknowledges, or fails before or after it kept the messages."""

    def __init__(self) -> None:
        self.kept: list[events_pb2.PredictionsMade] = []
        self.plan: list[str] = []

    async def publish(self, messages):
        step = self.plan.pop(0) if self.plan else "ok"
        if step != "lose":
            self.kept += [events_pb2.PredictionsMade.FromString(m.value) for m in messages]
        if step != "ok":
            raise UnavailableError("BUS_UNAVAILABLE", "told to fail")
        return []


async def test_a_batch_keeps_its_boundaries_over_failures_and_restarts(tmp_path: Path) -> None:
    bus = FlakyBus()

    async def run(journal: Journal, log: PredictionLog) -> None:
        publisher = Publisher(journal, bus, log, gateway_id="g", batch_entries=5, interval_s=0.01)
        stop = asyncio.Event()
        stop.set()
        await publisher.run(tmp_path, stop)

    journal = open_journal(tmp_path)
    log = PredictionLog(journal, 10)
    for n in range(3):
        log.write(events_pb2.Prediction(prediction_id=str(n), model=f"m{n % 2}"))
    bus.plan = ["kept"]  # it arrived, its acknowledgement did not
    await run(journal, log)
    for n in range(3, 12):
        log.write(events_pb2.Prediction(prediction_id=str(n), model=f"m{n % 2}"))
    again = open_journal(tmp_path)
    log = PredictionLog(again, 10)
    await run(again, log)
    assert log.counts.logged == 12
    by_offset: dict[int, events_pb2.PredictionsMade] = {}
    for batch in bus.kept:
        assert by_offset.setdefault(batch.journal_offset, batch) == batch
    assert sorted(int(p.prediction_id) for b in by_offset.values() for p in b.predictions) == list(range(12))
    await run(again, log)
    assert log.counts.logged == 12, "nothing is published twice without need"


async def test_a_batch_that_arrived_unnoticed_comes_again_whole(tmp_path: Path) -> None:
    bus = FlakyBus()
    journal = open_journal(tmp_path, segment_bytes=4096, max_segments=100)
    log = PredictionLog(journal, 10)
    for n in range(200):
        log.write(events_pb2.Prediction(prediction_id=str(n), model="m", subject="s" * 50))
    assert len(list(tmp_path.glob("*.log"))) > 2
    publisher = Publisher(journal, bus, log, gateway_id="g", batch_entries=60, interval_s=30)
    running = asyncio.create_task(publisher.run(tmp_path, asyncio.Event()))
    await eventually(lambda: asyncio.sleep(0, log.counts.logged == 200), "all entries on the bus")
    # Killed before it kept that the last batch arrived.
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    again = open_journal(tmp_path)
    log = PredictionLog(again, 10)
    for n in range(200, 210):
        log.write(events_pb2.Prediction(prediction_id=str(n), model="m"))
    stop = asyncio.Event()
    stop.set()
    await Publisher(again, bus, log, gateway_id="g", batch_entries=60, interval_s=30).run(tmp_path, stop)
    by_offset: dict[int, events_pb2.PredictionsMade] = {}
    for batch in bus.kept:
        assert by_offset.setdefault(batch.journal_offset, batch) == batch
    assert sorted(int(p.prediction_id) for b in by_offset.values() for p in b.predictions) == list(range(210))


async def test_damaged_entries_are_counted_and_passed_over(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    log = PredictionLog(journal, 10)
    for _ in range(200):
        log.write(events_pb2.Prediction(prediction_id="p" * 50, model="m"))
    first = min(tmp_path.glob("*.log"))
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 0xFF
    first.write_bytes(content)
    bus, stop = FlakyBus(), asyncio.Event()
    stop.set()
    await Publisher(journal, bus, log, gateway_id="g", batch_entries=50, interval_s=0.01).run(tmp_path, stop)
    assert log.counts.dropped > 0
    assert log.counts.logged + log.counts.dropped == 200
