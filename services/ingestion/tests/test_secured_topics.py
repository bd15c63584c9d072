"""Topics of a real broker that wants TLS and a proof of who reads: a client certificate, a password, a SCRAM password."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient, ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion
from millrace_ingestion.settings import SourceConnection
from millrace_kit.settings import KafkaSecurity
from parts.certificates import Authority, write
from parts.kafka import start_kafka
from parts.server import free_port

from .harness import row
from .test_topics import connected_service, ids
from .topics import landed, new_topic, produce, register, topic_source, until

pytestmark = pytest.mark.kafka
PASSWORD = "correct-horse"
LOGIN = "org.apache.kafka.common.security"


class Broker:
    """A broker with a plain listener for whoever writes, and two that readers have to prove themselves to."""

    def __init__(self, folder: Path) -> None:
        authority, self.ports = Authority.new(), {"SASL_SSL": free_port(), "SSL": free_port()}
        broker = write(folder / "broker", authority, "localhost")
        self.client = write(folder / "client", authority, "client")
        self.other = write(folder / "other", Authority.new("another"), "client")
        store = folder / "broker.pem"
        store.write_bytes(Path(broker.key_file).read_bytes() + Path(broker.cert_file).read_bytes())
        plain = f'{LOGIN}.plain.PlainLoginModule required user_millrace="{PASSWORD}";'
        properties = [
            "sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-512",
            f"listener.name.sasl_ssl.plain.sasl.jaas.config={plain}",
            f"listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config={LOGIN}.scram.ScramLoginModule required;",
            "ssl.keystore.type=PEM",
            f"ssl.keystore.location={store}",
            "ssl.truststore.type=PEM",
            f"ssl.truststore.location={broker.ca_file}",
            "listener.name.ssl.ssl.client.auth=required",
        ]
        self.server = start_kafka(folder / "server", listeners=self.ports, properties=properties)
        scram = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        user = UserScramCredentialUpsertion("millrace", scram, PASSWORD.encode())
        admin = AdminClient({"bootstrap.servers": self.server.address})
        admin.alter_user_scram_credentials([user])["millrace"].result(30)

    def connection(self, protocol: str, **security: object) -> SourceConnection:
        # The certificate says localhost, the broker advertises 127.0.0.1.
        given = {"protocol": protocol, "ca_file": self.client.ca_file, "check_hostname": False, **security}
        return SourceConnection(
            bootstrap_servers=(f"127.0.0.1:{self.ports[protocol]}",), security=KafkaSecurity(**given)
        )

    def password(self, mechanism: str, **security: object) -> SourceConnection:
        given = {"sasl_mechanism": mechanism, "username": "millrace", "password": PASSWORD, **security}
        return self.connection("SASL_SSL", **given)

    def certificate(self, **security: object) -> SourceConnection:
        given = {"cert_file": self.client.cert_file, "key_file": self.client.key_file, **security}
        return self.connection("SSL", **given)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    found = Broker(tmp_path_factory.mktemp("kafka"))
    yield found
    found.server.stop()


def named(topic: str):
    message = topic_source("unused:1", topic)
    del message.kafka.bootstrap_servers[:]
    message.kafka.connection = "shop"
    return message


async def test_who_proves_enough_reads(broker: Broker, tmp_path: Path) -> None:
    topic = new_topic(broker.server.address)
    connections = [broker.password("PLAIN"), broker.password("SCRAM-SHA-512"), broker.certificate()]
    for count, connection in enumerate(connections, start=1):
        produce(broker.server.address, topic, [row(f"e{count}")])
        # The service is started anew with each proof, and goes on from what landed.
        async with connected_service(tmp_path, source_connections={"shop": connection}) as client:
            await register(client.sources, named(topic))
            await until(client.sources, landed(1))
            assert ids(client) == [f"e{i}" for i in range(1, count + 1)]


@pytest.mark.parametrize("wrong", ["password", "SCRAM password", "no certificate", "authority", "host name"])
async def test_who_does_not_is_told_and_nothing_leaks(broker: Broker, tmp_path: Path, wrong: str) -> None:
    connection = {
        "password": broker.password("PLAIN", password="hush-hush"),
        "SCRAM password": broker.password("SCRAM-SHA-512", password="hush-hush"),
        "no certificate": broker.certificate(cert_file="", key_file=""),
        "authority": broker.certificate(ca_file=broker.other.ca_file),
        "host name": broker.certificate(check_hostname=True),
    }[wrong]
    topic = new_topic(broker.server.address)
    produce(broker.server.address, topic, [row("e1")])
    async with connected_service(tmp_path, source_connections={"shop": connection}) as client:
        await register(client.sources, named(topic))
        found = await until(client.sources, lambda now: now.error)
        assert found.accepted == 0
        assert "hush-hush" not in found.error
