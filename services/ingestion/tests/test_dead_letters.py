"""Dead letters: where their records came from."""

from pathlib import Path

from millrace_ingestion.app import MIGRATIONS
from millrace_ingestion.checks import UNDECODABLE, Failure, Reject
from millrace_ingestion.contract_messages import contract_from
from millrace_ingestion.convert import letter_to
from millrace_ingestion.intake import decode
from millrace_ingestion.models import Entry, Group, Incoming
from millrace_ingestion.origins import VALUE_CONVERTER, Origin
from millrace_ingestion.store import Store
from millrace_kit.clock import FakeClock
from millrace_kit.sql import migrate, open_engine

from .harness import contract, lines, row


def test_a_refused_message_is_kept_with_its_bytes_and_its_place(tmp_path: Path) -> None:
    broken = Origin("flights.raw", 3, 17, 5, b"key", b"\xff\x00", (("h", b"\x01"), ("h", None)))
    place = Origin("flights.raw", 3, 18, 6, None, lines(row("a", carrier="?")))
    incoming = Incoming(
        "flights", "s", 1,
        json_lines=lines(row("a", carrier="?"), row("b")),
        origins=[place, Origin("flights.raw", 3, 19)],
        undecodable=[Reject(2, Failure(UNDECODABLE, "", "bad magic"), "", broken, VALUE_CONVERTER, "ValueError")],
    )  # fmt: skip
    pending = decode(contract_from(contract(), "contract"), incoming, max_rows=10, max_bytes=1 << 20)
    assert incoming.payload_bytes > len(incoming.json_lines or b"") + len(broken.value or b"")
    engine = open_engine(f"sqlite:///{tmp_path}/state.sqlite")
    migrate(engine, MIGRATIONS)
    store = Store(engine, FakeClock())
    store.record(Group("g", "flights", 1, 0, [Entry("s", 1, 1, 0, 2, pending.checked.rejects)]), 1)
    first, second = store.letters("flights", "", after=0, limit=10)
    assert (first.reason, first.origin, first.stage) == ("PATTERN_MISMATCH", place, "TASK_PUT")
    assert (second.reason, second.stage, second.exception) == (UNDECODABLE, VALUE_CONVERTER, "ValueError")
    message = letter_to(second).origin
    assert (message.topic, message.partition, message.offset, message.value) == ("flights.raw", 3, 17, b"\xff\x00")
    assert [(h.name, h.HasField("value")) for h in message.headers] == [("h", True), ("h", False)]
    # Bytes that are no record cannot be replayed as one.
    assert [letter.id for letter in store.letters("flights", "", after=0, limit=10, only_open=True)] == [first.id]
    engine.dispose()
