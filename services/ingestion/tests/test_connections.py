"""Where sources may connect, and what secrets they are shown."""

import confluent_kafka as ck
import pytest
from millrace_ingestion.settings import SourceConnection
from millrace_ingestion.sources.connections import Connections
from millrace_ingestion.sources.convert import source_from, source_to
from millrace_ingestion.sources.specs import FileSpec, TopicSpec
from millrace_ingestion.sources.topic_reader import connection_options
from millrace_kit.clock import FakeClock
from millrace_kit.errors import FailedPreconditionError, InvalidArgumentError
from millrace_kit.settings import KafkaSecurity

from .topics import topic_source

SHOP = SourceConnection(
    bootstrap_servers=("kafka.shop:9093",),
    security=KafkaSecurity(
        protocol="SASL_SSL",
        sasl_mechanism="SCRAM-SHA-512",
        username="millrace",
        password="hush-hush",
        check_hostname=False,
    ),
    registry_password="also-hush",
)


def connections(*, inline: bool = True, locations: tuple[str, ...] = ()) -> Connections:
    return Connections({"shop": SHOP}, inline, locations, 1.0, 10, FakeClock())


def named(name: str, **changes) -> TopicSpec:
    message = topic_source("b:1", "t", **changes)
    message.kafka.connection = name
    del message.kafka.bootstrap_servers[:]
    spec = source_from(message, "source").spec
    assert isinstance(spec, TopicSpec)
    return spec


def test_secrets_stay_with_their_addresses_and_out_of_sight() -> None:
    options = connections().options(named("shop"))
    assert (options["bootstrap.servers"], options["sasl.password"]) == ("kafka.shop:9093", "hush-hush")
    assert "hush" not in repr(SHOP)
    message = topic_source("b:1", "t")
    message.kafka.connection = "shop"
    with pytest.raises(InvalidArgumentError, match="either a connection"):
        source_from(message, "source")
    del message.kafka.bootstrap_servers[:]
    assert b"hush" not in source_to(source_from(message, "source")).SerializeToString()


@pytest.mark.parametrize("protocol", ["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"])
@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_librdkafka_takes_the_options_of_every_protocol(protocol, mechanism) -> None:
    security = KafkaSecurity(protocol=protocol, sasl_mechanism=mechanism, username="u", password="p")
    options = connection_options(["127.0.0.1:1"], security)
    consumer = ck.Consumer({**options, "group.id": "g", "log_level": 0})
    consumer.close()


def test_what_the_settings_do_not_have_or_allow_is_refused() -> None:
    connections().check(named("shop"))
    with pytest.raises(FailedPreconditionError, match="no connection 'other'"):
        connections().check(named("other"))
    with pytest.raises(InvalidArgumentError, match="has no schema registry"):
        connections().check(named("shop", format=2))
    inline = source_from(topic_source("b:1", "t"), "source").spec
    connections().check(inline)
    with pytest.raises(FailedPreconditionError, match="source_connections"):
        connections(inline=False).check(inline)
    broken = source_from(topic_source("b:1", "t", format=2, schema=b"{"), "source").spec
    with pytest.raises(InvalidArgumentError, match="no Avro schema"):
        connections().check(broken)


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("/data/drop/x.csv", True),
        ("file:///data/drop/*.csv", True),
        ("/data/drop*/x.csv", False),
        ("/data/dropped/x.csv", False),
        ("/data", False),
        ("s3://bucket/a/b.csv", True),
        ("s3://bucket2/a.csv", False),
        ("s3://buck*/a.csv", False),
        ("http://bucket/a.csv", False),
    ],
)
def test_files_are_read_only_below_the_locations(url: str, allowed: bool) -> None:
    one = connections(locations=("/data/drop", "s3://bucket/"))
    if allowed:
        one.check(FileSpec((url,)))
        return
    with pytest.raises(FailedPreconditionError, match="source_locations"):
        one.check(FileSpec((url,)))
