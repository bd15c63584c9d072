"""A real Kafka broker (KRaft, one node), from the jars Maven resolves."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from uuid import uuid4

from parts.server import PartError, Server, free_port, listening, start

VERSION = "4.1.0"
MAVEN_TIMEOUT_S = 600
# Set when Maven was tried and had no access, so that tests are left out instead of failing one by one.
UNREACHABLE_VARIABLE = "MILLRACE_KAFKA_UNREACHABLE"
_POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>dev.millrace</groupId><artifactId>kafka-for-tests</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{VERSION}</version></dependency>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka-tools</artifactId><version>{VERSION}</version></dependency>
  </dependencies>
</project>
"""
_LOGGING = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration><Appenders><Console name="out"><PatternLayout pattern="%d %p %c %m%n"/></Console></Appenders>
<Loggers><Root level="warn"><AppenderRef ref="out"/></Root></Loggers></Configuration>
"""


def jars() -> Path:
    """Folder the jars are kept in, for every checkout of this user."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "millrace" / "kafka" / VERSION


def missing() -> str:
    """What to install, or empty when a broker can be started."""
    if shutil.which("java") is None:
        return "needs Java 17 (Debian: default-jre-headless)"
    if (jars() / "complete").exists():
        return ""
    if os.environ.get(UNREACHABLE_VARIABLE):
        return "needs Kafka's jars, which Maven could not get"
    if shutil.which("mvn") is None:
        return "needs Maven to get Kafka (Debian: maven)"
    return ""


def fetch() -> Path:
    """The folder with Kafka's jars, resolved by Maven the first time."""
    folder = jars()
    if (folder / "complete").exists():
        return folder
    scratch = folder.with_name(f".{VERSION}.{uuid4().hex}")
    scratch.mkdir(parents=True)
    (scratch / "pom.xml").write_text(_POM, encoding="utf-8")
    command = ["mvn", "-q", "-B", "-f", str(scratch / "pom.xml"), "dependency:copy-dependencies"]
    command.append(f"-DoutputDirectory={scratch}")
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=MAVEN_TIMEOUT_S)
    if done.returncode:
        shutil.rmtree(scratch)
        raise PartError(f"Maven could not get Kafka {VERSION}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    (scratch / "complete").touch()
    try:
        scratch.replace(folder)
    except OSError:  # another run was faster
        shutil.rmtree(scratch)
    return folder


def start_kafka(
    folder: Path,
    *,
    owner_pid: int | None = None,
    port: int = 0,
    listeners: Mapping[str, int] | None = None,
    properties: Sequence[str] = (),
) -> Server:
    """A broker on loopback; the address is its `host:port`. Starting again in a used `folder` keeps the data.

    Args:
        folder: what it keeps.
        owner_pid: process it ends with; this one when None.
        port: of the plain listener; 0 takes a free one.
        listeners: further listeners, port by security protocol (`SASL_SSL`).
        properties: further lines of server.properties.
    """
    reason = missing()
    if reason:
        raise PartError(f"kafka {reason}")
    classes = f"{fetch()}/*"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "server.pid").unlink(missing_ok=True)
    port = port or free_port()
    config = folder / "server.properties"
    text = _properties(folder / "data", port, free_port(), listeners or {})
    config.write_text("\n".join([text, *properties, ""]), encoding="utf-8")
    (folder / "log4j2.xml").write_text(_LOGGING, encoding="utf-8")
    java = [
        "java",
        "-XX:TieredStopAtLevel=1",
        "-XX:+UseSerialGC",
        "-Xmx512m",
        f"-Dlog4j2.configurationFile={folder}/log4j2.xml",
    ]
    java += ["-cp", classes]
    if not (folder / "data" / "meta.properties").exists():
        storage = [*java, "kafka.tools.StorageTool", "format", "-t", "millrace-tests-00000w", "-c", str(config)]
        done = subprocess.run(storage, check=False, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise PartError(f"Kafka could not format its folder:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return start(
        "kafka",
        [*java, "kafka.Kafka", str(config)],
        address=f"127.0.0.1:{port}",
        folder=folder,
        ready=lambda: listening(port),
        owner_pid=owner_pid or os.getpid(),
    )


def _properties(data: Path, port: int, controller_port: int, more: Mapping[str, int]) -> str:
    further = "".join(f",{name}://127.0.0.1:{number}" for name, number in more.items())
    protocols = "".join(f",{name}:{name}" for name in more)
    return f"""process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller_port}
controller.listener.names=CONTROLLER
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT{protocols}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}{further}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}{further}
log.dirs={data}
auto.create.topics.enable=false
num.partitions=1
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
log.retention.hours=1
"""
