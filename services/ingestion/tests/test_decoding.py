"""Messages in every format as records, and what is none as dead letters."""

import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

import fastavro
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, timestamp_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from millrace_ingestion.contract_messages import contract_from
from millrace_ingestion.json_records import JsonReader
from millrace_ingestion.sources.avro import avro_reader
from millrace_ingestion.sources.convert import source_bytes, source_from, source_from_bytes
from millrace_ingestion.sources.decoding import Decoder, Parse, UndecodableError
from millrace_ingestion.sources.protobuf import Schema, read_indexes
from millrace_ingestion.sources.registry import Access, Registry
from millrace_ingestion.sources.specs import Format, Source
from millrace_kit.clock import FakeClock
from millrace_kit.errors import InvalidArgumentError, UnavailableError

from .harness import contract, row
from .registry_server import schema_registry
from .topics import topic_source

CONTRACT = contract_from(contract(ce_type={"type": 1, "nullable": True}), "contract")
AT = datetime(2013, 1, 1, tzinfo=UTC)
AVRO = {
    "type": "record", "name": "Flight", "namespace": "shop",
    "fields": [
        {"name": "event_id", "type": "string"},
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "carrier", "type": {"type": "enum", "name": "Carrier", "symbols": ["UA", "AA"]}},
        {"name": "delay", "type": ["null", "double"], "default": None},
        {"name": "seats", "type": {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 0}},
        {"name": "raw", "type": "bytes"},
    ],
}  # fmt: skip
FLIGHT = {"event_id": "e1", "at": AT, "carrier": "UA", "delay": 2.5, "seats": Decimal(7), "raw": b"\x00\xff"}


@dataclass(frozen=True)
class Message:
    """A message as librdkafka hands it out."""

    raw: bytes | None
    all_headers: Sequence[tuple[str, bytes | None]] = ()
    raw_key: bytes | None = b"k"
    place: int = 5

    def topic(self) -> str:
        return "t"

    def partition(self) -> int:
        return 3

    def offset(self) -> int:
        return self.place

    def key(self) -> bytes | None:
        return self.raw_key

    def value(self) -> bytes | None:
        return self.raw

    def headers(self) -> Sequence[tuple[str, bytes | None]] | None:
        return list(self.all_headers) or None

    def timestamp(self) -> tuple[int, int]:
        return 1, 1_357_000_000_000


def decoder(parse: Parse | None = None, columns: dict[str, str] | None = None, **changes) -> Decoder:
    given = source_from(topic_source("b:1", "t", columns=columns or {}, **changes), "source")
    return Decoder(given, CONTRACT, parse, max_bytes=1 << 20)


def read(made: Decoder, *messages: Message) -> tuple[list[dict], list[str]]:
    """Records that the contract's own reader makes of them, and details of those that are none."""
    decoded = made.decode(messages)
    checked = JsonReader(CONTRACT).check(decoded.json_lines, max_rows=100)
    rows = checked.table.to_pylist()
    return rows, [reject.failure.detail for reject in (*checked.rejects, *decoded.undecodable)]


def avro(record: dict, schema: dict = AVRO) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, schema, record)
    return out.getvalue()


def wired(number: int, value: bytes) -> bytes:
    return b"\x00" + number.to_bytes(4, "big") + value


def registry(url: str, kind: Format, clock: FakeClock | None = None, **access: str) -> Registry:
    return Registry(Access(url, **access), kind, timeout_s=2, max_schemas=2, clock=clock or FakeClock())


def test_avro_values_become_records() -> None:
    made = decoder(avro_reader(json.dumps(AVRO)), format=2, schema=json.dumps(AVRO).encode())
    odd = {**FLIGHT, "event_id": "e2", "delay": float("nan")}
    rows, problems = read(made, Message(avro(FLIGHT)), Message(avro(odd)), Message(avro(FLIGHT) + b"x"), Message(b""))
    assert [(r["event_id"], r["at"], r["carrier"], r["seats"]) for r in rows] == [("e1", AT, "UA", 7)]
    assert len(problems) == 3  # NaN is below no minimum; one has a tail, one is empty
    assert any("follow the Avro record" in problem for problem in problems)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_no_bytes_break_the_avro_reader(value: bytes) -> None:
    reader = avro_reader(json.dumps(AVRO))
    try:
        record = reader(value)
    except UndecodableError:
        return
    assert set(record) == {field["name"] for field in AVRO["fields"]}


def proto_file(name: str = "flight.proto") -> descriptor_pb2.FileDescriptorProto:
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name=name, package="shop", syntax="proto3")
    file.dependency.append("google/protobuf/timestamp.proto")
    message = file.message_type.add(name="Flight")
    for number, (field, kind, of) in enumerate(
        [
            ("event_id", kinds.TYPE_STRING, ""), ("at", kinds.TYPE_MESSAGE, ".google.protobuf.Timestamp"),
            ("carrier", kinds.TYPE_ENUM, ".shop.Carrier"), ("delay", kinds.TYPE_DOUBLE, ""),
            ("seats", kinds.TYPE_INT64, ""), ("next", kinds.TYPE_MESSAGE, ".shop.Flight"),
        ],
        1,
    ):  # fmt: skip
        message.field.add(name=field, number=number, type=kind, type_name=of or None, label=kinds.LABEL_OPTIONAL)
    message.nested_type.add(name="Inner").field.add(
        name="event_id", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL
    )
    carrier = file.enum_type.add(name="Carrier")
    for number, symbol in enumerate(["UA", "AA"]):
        carrier.value.add(name=symbol, number=number)
    return file


def proto_value(**fields) -> bytes:
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(timestamp_pb2.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(proto_file().SerializeToString())
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName("shop.Flight"))
    message = kind(**fields)
    message.at.FromDatetime(AT)
    return message.SerializeToString()


def test_protobuf_values_become_records() -> None:
    serialized = descriptor_pb2.FileDescriptorSet(file=[proto_file()]).SerializeToString()
    reader = Schema.of_set(serialized).named("shop.Flight")
    made = decoder(reader, format=3, schema=serialized, message_name="shop.Flight")
    nested = proto_value(
        event_id="e1", carrier=1, delay=1.5, seats=2**40, next={"event_id": "x", "next": {"delay": float("inf")}}
    )
    rows, problems = read(made, Message(nested), Message(b"\xff\xff"))
    assert [(r["event_id"], r["at"], r["carrier"], r["delay"], r["seats"]) for r in rows] == [
        ("e1", AT, "AA", 1.5, 2**40)
    ]
    assert "no shop.Flight" in problems[0]
    with pytest.raises(InvalidArgumentError, match=r"no message 'shop\.None'"):
        Schema.of_set(serialized).named("shop.None")


def test_wire_formats_by_a_registry_with_references() -> None:
    with schema_registry() as server:
        carrier = {"type": "enum", "name": "Carrier", "namespace": "shop", "symbols": ["UA", "AA"]}
        fields = [{**one, "type": "shop.Carrier"} if one["name"] == "carrier" else one for one in AVRO["fields"]]
        server.add(1, "AVRO", json.dumps(carrier), "shop/carrier")
        reference = {"name": "shop.Carrier", "subject": "shop/carrier", "version": 1}
        server.add(2, "AVRO", json.dumps({**AVRO, "fields": fields}), references=[reference])
        reader = registry(server.url, Format.AVRO, username="u", password="p")
        for _ in range(3):
            assert reader.parse(wired(2, avro(FLIGHT)))["carrier"] == "UA"
        assert server.asked == ["/schemas/ids/2", "/subjects/shop%2Fcarrier/versions/1"]
        assert server.authorizations == {"Basic dTpw"}
        server.add(3, "PROTOBUF", proto_file("ignored").SerializeToString())
        with pytest.raises(UndecodableError, match="is PROTOBUF"):
            reader.parse(wired(3, b""))
        proto = registry(server.url, Format.PROTOBUF)
        assert proto.parse(wired(3, b"\x00" + proto_value(event_id="e1", seats=1)))["event_id"] == "e1"
        # Two indexes (zigzag): message 0, in it message 0.
        assert proto.parse(wired(3, b"\x04\x00\x00" + b"\x0a\x01x")) == {"event_id": "x"}
        with pytest.raises(UndecodableError, match="no message at the indexes"):
            proto.parse(wired(3, b"\x02\x0a"))
        assert server.asked[-1] == "/schemas/ids/3?format=serialized"


def test_unknown_schemas_are_asked_again_later_and_a_registry_that_is_away_stops_the_source() -> None:
    clock = FakeClock()
    with schema_registry() as server:
        reader = registry(server.url, Format.AVRO, clock)
        for _ in range(3):
            with pytest.raises(UndecodableError, match="does not know"):
                reader.parse(wired(9, b""))
        assert len(server.asked) == 1
        clock.advance(31)
        server.add(9, "AVRO", json.dumps(AVRO))
        assert reader.parse(wired(9, avro(FLIGHT)))["event_id"] == "e1"
        for number in (10, 11, 12):  # two are kept
            server.add(number, "AVRO", json.dumps(AVRO))
            reader.parse(wired(number, avro(FLIGHT)))
        reader.parse(wired(9, avro(FLIGHT)))
        assert server.asked.count("/schemas/ids/9") == 3
        server.broken = True
        with pytest.raises(UnavailableError, match="status 503"):
            reader.parse(wired(13, b""))
    with pytest.raises(UnavailableError):
        reader.parse(wired(14, b""))
    for value in (b"", b"\x01\x00\x00\x00\x01", b"{}"):
        with pytest.raises(UndecodableError, match="wire format"):
            reader.parse(value)


@given(st.binary(max_size=40))
@settings(max_examples=200, deadline=None)
def test_no_bytes_break_the_message_indexes(value: bytes) -> None:
    try:
        indexes, at = read_indexes(value, 0)
    except UndecodableError:
        return
    assert 0 < at <= len(value)
    assert all(index >= 0 for index in indexes)


def test_columns_come_from_members_headers_and_places() -> None:
    columns = {"event_id": "@position", "at": "@timestamp", "carrier": "@header.carrier", "seats": "@partition"}
    plain = decoder(columns=columns)
    headers = [("carrier", b"AA"), ("carrier", b"UA")]
    bad_header = Message(b"{}", [("carrier", b"\xff")])
    rows, problems = read(
        plain, Message(b' {"delay": 2, "event_id": "own"} ', headers), Message(b"{}", headers, place=6), bad_header
    )
    assert [(r["event_id"], r["carrier"], r["delay"], r["seats"]) for r in rows] == [
        ("t-3-5", "UA", 2.0, 3),
        ("t-3-6", "UA", None, 3),
    ]
    assert rows[0]["at"] == datetime.fromtimestamp(1_357_000_000, UTC)
    assert len(problems) == 1
    nested = decoder(columns={**columns, "event_id": "order.id", "delay": "order.more.delay"})
    value = b'{"order": {"id": "n1", "more": {"delay": 1.5}}, "other": [1]}'
    rows, problems = read(nested, Message(value, headers), Message(b'{"order": 5}', headers))
    assert [(r["event_id"], r["delay"]) for r in rows] == [("n1", 1.5)]
    assert "the event id is missing" in problems[0]


def test_cloud_events_in_both_modes() -> None:
    data = {name: value for name, value in row("own").items() if name not in {"event_id", "at"}}
    headers = [
        ("ce_specversion", b"1.0"), ("ce_id", b"c1"), ("ce_time", b"2013-01-01T00:00:00Z"), ("ce_type", b"landed"),
        ("ce_source", b"/air"), ("content-type", b"application/json"),
    ]  # fmt: skip
    binary = Message(json.dumps(data).encode(), headers)
    event = {
        "specversion": "1.0",
        "id": "c2",
        "time": "2013-01-01T00:00:00Z",
        "type": "left",
        "source": "/air",
        "data": data,
    }
    structured = Message(json.dumps(event).encode(), [("content-type", b"application/cloudevents+json; charset=UTF-8")])
    for mode, messages, expected in (
        (1, [binary], [("c1", "landed")]),
        (2, [structured], [("c2", "left")]),
        (3, [binary, structured], [("c1", "landed"), ("c2", "left")]),
    ):
        rows, problems = read(decoder(cloud_events=mode), *messages)
        assert not problems
        assert [(r["event_id"], r["ce_type"]) for r in rows] == expected
        assert {r["at"] for r in rows} == {AT}
    _rows, problems = read(decoder(cloud_events=1), Message(json.dumps(data).encode()))
    assert "the event id is missing" in problems[0]
    _rows, problems = read(decoder(cloud_events=2), binary)
    assert "no specversion" in problems[0]


def test_what_is_refused_keeps_its_place_among_the_good() -> None:
    made = decoder(skip_tombstones=True)
    good = [json.dumps(row(f"e{i}", carrier="?" if i == 3 else "UA")).encode() for i in range(5)]
    messages = [Message(value, place=i) for i, value in enumerate([good[0], b"\n\n", None, good[3], b"[1]", good[4]])]
    decoded = made.decode(messages)
    assert [reject.origin.offset for reject in decoded.undecodable] == [1, 4]
    assert [origin.offset for origin in decoded.origins] == [0, 3, 5]
    checked = JsonReader(CONTRACT).check(decoded.json_lines, max_rows=10)
    assert [decoded.origins[reject.row].offset for reject in checked.rejects] == [3]
    large = Decoder(source_from(topic_source("b:1", "t"), "source"), CONTRACT, None, max_bytes=100)
    (reject,) = large.decode([Message(b'{"a": "' + b"x" * 200 + b'"}')]).undecodable
    assert reject.origin.value is None
    assert "209 bytes" in reject.failure.detail


def test_random_texts_are_one_record_or_one_dead_letter_each() -> None:
    """Whatever stands in a value, the batch has one line for it or one refusal, and no text becomes another's record."""
    chance = random.Random(5)
    pieces = [
        b"{",
        b"}",
        b'"a":1',
        b",",
        b"\n",
        b" ",
        b'"',
        b"\\",
        b"[]",
        b"\r",
        b'{"event_id":"z"}',
        b"\x00\x00\x00\x00\x01{}",
    ]
    for made in (decoder(), decoder(columns={"event_id": "@position"})):
        for _ in range(300):
            values = [b"".join(chance.choices(pieces, k=chance.randint(0, 6))) for _ in range(5)]
            messages = [Message(value, place=i) for i, value in enumerate(values)]
            decoded = made.decode(messages)
            kept = [line for line in decoded.json_lines.split(b"\n") if line]
            assert len(kept) == len(decoded.origins)
            places = sorted([o.offset for o in decoded.origins] + [r.origin.offset for r in decoded.undecodable])
            assert places == list(range(5))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"topics": ["bad topic"]}, "topics[0]"),
        ({"topics": []}, "topics"),
        ({"bootstrap_servers": []}, "connection"),
        ({"connection": "x"}, "connection"),
        ({"bootstrap_servers": ["nowhere"]}, "bootstrap_servers[0]"),
        ({"format": 2}, "schema"),
        ({"format": 1, "schema": b"x"}, "schema"),
        ({"format": 3, "schema": b"x"}, "message_name"),
        ({"format": 2, "schema": b"x", "cloud_events": 2}, "cloud_events"),
        ({"schema_registry_url": "https://user:secret@registry"}, "schema_registry_url"),
        ({"schema_registry_url": "ftp://registry"}, "schema_registry_url"),
    ],
)
def test_wrong_sources_are_refused_by_field(change: dict, field: str) -> None:
    message = topic_source("b:1", "t")
    for name, value in change.items():
        if isinstance(value, list):
            del getattr(message.kafka, name)[:]
            getattr(message.kafka, name).extend(value)
        else:
            setattr(message.kafka, name, value)
    with pytest.raises(InvalidArgumentError) as raised:
        source_from(message, "source")
    assert raised.value.field == f"source.kafka.{field}"


def test_sources_are_stored_without_loss() -> None:
    message = topic_source(
        "b:1", "t", "u", format=3, schema=b"x", message_name="M", start=2, skip_lost=True, columns={"at": "@timestamp"}
    )
    given = source_from(message, "source")
    stored = source_from_bytes(4, source_bytes(given), AT)
    assert stored == Source(given.name, 4, given.contract, given.spec, given.columns, AT)
