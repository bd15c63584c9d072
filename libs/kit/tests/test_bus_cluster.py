"""The bus as a cluster has it: brokers with TLS and passwords, topics made by others, and never the embedded log in a pod."""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient
from millrace_kit.bus import IN_CLUSTER, Outgoing, open_bus
from millrace_kit.errors import FailedPreconditionError, UnavailableError
from millrace_kit.settings import BusSettings, KafkaSecurity, SettingsError, parse_settings
from parts.certificates import Authority, write
from parts.kafka import start_kafka
from parts.server import free_port

PASSWORD = "correct horse"


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BusSettings]:
    """A real broker with a listener that wants TLS, a client certificate and a password."""
    folder, authority, port = tmp_path_factory.mktemp("kafka"), Authority.new(), free_port()
    broker = write(folder / "broker", authority, "localhost")
    client = write(folder / "client", authority, "client")
    store = folder / "broker.pem"
    store.write_bytes(Path(broker.key_file).read_bytes() + Path(broker.cert_file).read_bytes())
    login = f'org.apache.kafka.common.security.plain.PlainLoginModule required user_millrace="{PASSWORD}";'
    properties = [
        "sasl.enabled.mechanisms=PLAIN",
        f"listener.name.sasl_ssl.plain.sasl.jaas.config={login}",
        "ssl.keystore.type=PEM",
        f"ssl.keystore.location={store}",
        "ssl.truststore.type=PEM",
        f"ssl.truststore.location={broker.ca_file}",
        "listener.name.sasl_ssl.ssl.client.auth=required",
    ]
    # The certificate says localhost, the broker advertises 127.0.0.1: hence check_hostname in the tests below.
    server = start_kafka(folder / "server", listeners={"SASL_SSL": port}, properties=properties)
    security = KafkaSecurity(
        protocol="SASL_SSL", username="millrace", password=PASSWORD, check_hostname=False,
        ca_file=client.ca_file, cert_file=client.cert_file, key_file=client.key_file,
    )  # fmt: skip
    yield BusSettings(kind="kafka", bootstrap_servers=(f"127.0.0.1:{port}",), security=security, request_timeout_s=15)
    server.stop()


def changed(settings: BusSettings, **security: object) -> BusSettings:
    return settings.model_copy(
        update={"security": settings.security.model_copy(update=security), "request_timeout_s": 3.0}
    )


@pytest.mark.kafka
async def test_tls_and_password(secured: BusSettings) -> None:
    topic = f"millrace.test.{uuid4().hex}"
    bus = await open_bus(secured)
    await bus.publish([Outgoing(topic, "k", b"v")])
    subscription = await bus.subscribe([topic], group="g", at={})
    assert [m.value for m in await subscription.fetch(timeout_s=15)] == [b"v"]
    await subscription.close()
    await bus.close()


@pytest.mark.kafka
@pytest.mark.parametrize(
    "wrong",
    [
        {"password": "wrong"},
        {"cert_file": "", "key_file": ""},
        {"check_hostname": True},
        {"protocol": "SASL_PLAINTEXT"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
async def test_who_does_not_prove_enough_stays_out(secured: BusSettings, wrong: dict[str, object]) -> None:
    with pytest.raises(UnavailableError) as caught:
        await open_bus(changed(secured, **wrong))
    assert PASSWORD not in str(caught.value)


@pytest.mark.kafka
async def test_topics_are_left_to_others_where_the_settings_say_so(kafka_address: str) -> None:
    topic = f"millrace.test.{uuid4().hex}"
    bus = await open_bus(BusSettings(kind="kafka", bootstrap_servers=(kafka_address,), create_topics=False))
    with pytest.raises(UnavailableError, match=topic) as caught:
        await bus.publish([Outgoing(topic, "k", b"v")])
    assert caught.value.reason == "BUS_TOPIC_MISSING"
    admin = KafkaAdminClient(bootstrap_servers=kafka_address)
    admin.create_topics({topic: {"num_partitions": 2, "replication_factor": 1}}, wait_for_metadata=True)
    await bus.publish([Outgoing(topic, "k", b"v")])  # found without a restart
    await bus.close()
    admin.close()


@pytest.mark.kafka
async def test_topics_are_made_with_the_settings_options(kafka_address: str) -> None:
    topic = f"millrace.test.{uuid4().hex}"
    settings = BusSettings(
        kind="kafka", bootstrap_servers=(kafka_address,), partitions=3, topic_configs={"retention.ms": "86400000"}
    )
    bus = await open_bus(settings)
    await bus.publish([Outgoing(topic, "k", b"v")])
    await bus.close()
    admin = KafkaAdminClient(bootstrap_servers=kafka_address)
    (found,) = admin.describe_topics([topic])
    assert len(found["partitions"]) == 3
    configs = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
    assert "86400000" in str(configs)
    admin.close()


async def test_the_embedded_log_is_refused_in_a_pod(tmp_path: Path) -> None:
    pod = {IN_CLUSTER: "10.96.0.1"}
    settings = BusSettings(path=str(tmp_path / "bus.sqlite"))
    with pytest.raises(FailedPreconditionError, match=r"bus\.kind"):
        await open_bus(settings, pod)
    assert not (tmp_path / "bus.sqlite").exists()
    for good, environment in ((settings, {}), (settings.model_copy(update={"embedded_in_cluster": True}), pod)):
        await (await open_bus(good, environment)).close()


@pytest.mark.parametrize(
    "security", [{"protocol": "SASL_SSL", "username": "u"}, {"protocol": "SSL", "cert_file": "c"}, {"protocol": "TLS"}]
)
def test_incomplete_security_is_refused_offline(security: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="security"):
        parse_settings(BusSettings, {"kind": "kafka", "security": security}, "here")


def test_the_password_is_not_shown() -> None:
    assert PASSWORD not in repr(KafkaSecurity(protocol="SASL_SSL", username="u", password=PASSWORD))
