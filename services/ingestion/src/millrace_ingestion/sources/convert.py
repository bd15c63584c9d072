"""Sources between their protobuf messages and the domain."""

import re
from datetime import UTC, datetime

from cronsim import CronSim, CronSimError
from google.protobuf.timestamp_pb2 import Timestamp
from millrace_api.ingestion.v1 import sources_pb2 as pb
from millrace_kit import check
from millrace_kit.errors import InvalidArgumentError

from millrace_ingestion.joins import convert as joins
from millrace_ingestion.joins.specs import JoinSpec
from millrace_ingestion.sources.specs import (
    CloudEvents,
    FileFormat,
    FileSpec,
    Format,
    PartitionState,
    Progress,
    Source,
    Standing,
    State,
    TopicSpec,
)

MAX_TOPICS = 100
MAX_COLUMNS = 2_000
MAX_SCHEMA_BYTES = 1 << 20
MIN_INTERVAL_S = 1.0
METADATA = ("@key", "@timestamp", "@topic", "@partition", "@offset", "@position")
HEADER = "@header."
# Kafka's own rule for names of topics.
_TOPIC = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}")
_ADDRESS = re.compile(r"[^\s,/]+:\d{1,5}")
_STATES = {
    State.RUNNING: pb.SOURCE_STATE_RUNNING,
    State.PAUSED: pb.SOURCE_STATE_PAUSED,
    State.FAILED: pb.SOURCE_STATE_FAILED,
    State.DONE: pb.SOURCE_STATE_DONE,
}
_FILE_FORMATS = {
    pb.FILE_FORMAT_UNSPECIFIED: FileFormat.BY_NAME,
    pb.FILE_FORMAT_PARQUET: FileFormat.PARQUET,
    pb.FILE_FORMAT_CSV: FileFormat.CSV,
    pb.FILE_FORMAT_JSON_LINES: FileFormat.JSON_LINES,
}


def source_from(message: pb.Source, field: str) -> Source:
    """A source whose fields are right, as a version that is still to be numbered.

    Raises:
        InvalidArgumentError: naming the field.
    """
    name = check.name(message.name, f"{field}.name")
    contract = check.table(message.contract, f"{field}.contract")
    if len(message.columns) > MAX_COLUMNS:
        raise InvalidArgumentError(f"{field}.columns", f"has more than {MAX_COLUMNS} entries")
    match message.WhichOneof("kind"):
        case "kafka":
            for column, origin in message.columns.items():
                _check_origin(origin, f"{field}.columns[{column}]")
            return Source(name, 0, contract, _topics(message.kafka, name, f"{field}.kafka"), dict(message.columns))
        case "files":
            if message.columns:
                raise InvalidArgumentError(f"{field}.columns", "is for topics only")
            return Source(name, 0, contract, _files(message.files, f"{field}.files"))
        case "join":
            if message.columns:
                raise InvalidArgumentError(f"{field}.columns", "is for topics only")
            spec = joins.join_from(message.join, f"{field}.join")
            if contract in {spec.left, spec.right}:
                raise InvalidArgumentError(f"{field}.contract", "must be another one than the two that are joined")
            return Source(name, 0, contract, spec)
        case _:
            raise InvalidArgumentError(f"{field}.kind", "needs kafka, files or join")


def source_to(source: Source) -> pb.Source:
    """The message of a source."""
    message = pb.Source(name=source.name, version=source.version, contract=source.contract, columns=source.columns)
    spec = source.spec
    if isinstance(spec, TopicSpec):
        message.kafka.CopyFrom(
            pb.KafkaSource(
                connection=spec.connection,
                bootstrap_servers=spec.bootstrap_servers,
                topics=spec.topics,
                group=spec.group,
                start=pb.START_POSITION_LATEST if spec.latest else pb.START_POSITION_EARLIEST,
                format=pb.RecordFormat.Value(f"RECORD_FORMAT_{spec.format.value}"),
                schema_registry_url=spec.registry_url,
                schema=spec.schema,
                message_name=spec.message_name,
                cloud_events=pb.CloudEventsMode.Value(f"CLOUD_EVENTS_MODE_{spec.cloud_events.value}"),
                skip_lost=spec.skip_lost,
                skip_tombstones=spec.skip_tombstones,
            )
        )
    elif isinstance(spec, JoinSpec):
        message.join.CopyFrom(joins.join_to(spec))
    else:
        formats = {ours: theirs for theirs, ours in _FILE_FORMATS.items()}
        message.files.CopyFrom(
            pb.FileSource(urls=spec.urls, format=formats[spec.format], interval_s=spec.interval_s, cron=spec.cron)
        )
    if source.registered_at is not None:
        message.registered_at.CopyFrom(_timestamp(source.registered_at))
    return message


def source_bytes(source: Source) -> bytes:
    """A source as it is stored: without its version and time, which are columns of their own."""
    message = source_to(source)
    message.ClearField("version")
    message.ClearField("registered_at")
    return message.SerializeToString(deterministic=True)


def source_from_bytes(version: int, body: bytes, registered_at: datetime) -> Source:
    """A stored source."""
    source = source_from(pb.Source.FromString(body), "source")
    return Source(source.name, version, source.contract, source.spec, source.columns, registered_at)


def status_to(source: Source, standing: Standing, progress: Progress) -> pb.SourceStatus:
    """The message of how a source is doing."""
    retrying = standing.state is State.RUNNING and bool(progress.trouble)
    status = pb.SourceStatus(
        state=pb.SOURCE_STATE_RETRYING if retrying else _STATES[standing.state],
        error=progress.trouble if retrying else standing.error,
        accepted=progress.accepted,
        duplicates=progress.duplicates,
        rejected=progress.rejected,
        lag=progress.lag,
        partitions=[_partition(one) for _place, one in sorted(progress.partitions.items())],
        last_result=standing.last_result,
    )
    if isinstance(source.spec, JoinSpec) and progress.join is not None:
        status.join.CopyFrom(joins.status_to(source.spec, progress.join))
    if standing.last_run is not None:
        status.last_run.CopyFrom(_timestamp(standing.last_run))
    if progress.next_run is not None:
        status.next_run.CopyFrom(_timestamp(progress.next_run))
    return status


def _partition(one: PartitionState) -> pb.PartitionPosition:
    return pb.PartitionPosition(topic=one.topic, partition=one.partition, position=one.position, end=one.end)


def _timestamp(at: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(at)
    return stamp


def _topics(message: pb.KafkaSource, name: str, field: str) -> TopicSpec:
    if bool(message.connection) == bool(message.bootstrap_servers):
        raise InvalidArgumentError(
            f"{field}.connection", "needs either a connection of the settings or bootstrap_servers"
        )
    if message.connection and message.schema_registry_url:
        raise InvalidArgumentError(f"{field}.schema_registry_url", "is part of the connection; leave it empty")
    for index, address in enumerate(message.bootstrap_servers):
        if not _ADDRESS.fullmatch(address):
            raise InvalidArgumentError(f"{field}.bootstrap_servers[{index}]", "needs host:port")
    if not 1 <= len(message.topics) <= MAX_TOPICS or len(set(message.topics)) < len(message.topics):
        raise InvalidArgumentError(f"{field}.topics", f"needs 1 to {MAX_TOPICS} different topics")
    for index, topic in enumerate(message.topics):
        if not _TOPIC.fullmatch(topic):
            raise InvalidArgumentError(f"{field}.topics[{index}]", "is no name of a Kafka topic")
    if message.schema_registry_url and not message.schema_registry_url.startswith(("http://", "https://")):
        raise InvalidArgumentError(f"{field}.schema_registry_url", "needs http:// or https://")
    if "@" in message.schema_registry_url:
        raise InvalidArgumentError(
            f"{field}.schema_registry_url", "must hold no secret; use a connection of the settings"
        )
    spec = TopicSpec(
        topics=tuple(message.topics),
        group=check.text(message.group or f"millrace-{name}", f"{field}.group", limit=249),
        connection=check.name(message.connection, f"{field}.connection") if message.connection else "",
        bootstrap_servers=tuple(message.bootstrap_servers),
        latest=message.start == pb.START_POSITION_LATEST,
        format=_format(message.format, f"{field}.format"),
        registry_url=message.schema_registry_url.rstrip("/"),
        schema=message.schema,
        message_name=message.message_name,
        cloud_events=_mode(message.cloud_events, f"{field}.cloud_events"),
        skip_lost=message.skip_lost,
        skip_tombstones=message.skip_tombstones,
    )
    _check_schema(spec, field)
    return spec


def _check_schema(spec: TopicSpec, field: str) -> None:
    if len(spec.schema) > MAX_SCHEMA_BYTES:
        raise InvalidArgumentError(f"{field}.schema", f"is larger than {MAX_SCHEMA_BYTES} bytes")
    if spec.format is Format.JSON and spec.schema:
        raise InvalidArgumentError(f"{field}.schema", "is for Avro and protobuf")
    structured = spec.cloud_events in {CloudEvents.STRUCTURED, CloudEvents.BOTH}
    if structured and spec.format is not Format.JSON:
        raise InvalidArgumentError(f"{field}.cloud_events", "structured events are JSON")
    if spec.format is not Format.JSON and not spec.connection and bool(spec.schema) == bool(spec.registry_url):
        raise InvalidArgumentError(
            f"{field}.schema", f"{spec.format.value} needs either a schema or a schema_registry_url"
        )
    if bool(spec.message_name) != (spec.format is Format.PROTOBUF and bool(spec.schema)):
        raise InvalidArgumentError(f"{field}.message_name", "goes together with a protobuf schema")


def _files(message: pb.FileSource, field: str) -> FileSpec:
    if not 1 <= len(message.urls) <= MAX_TOPICS:
        raise InvalidArgumentError(f"{field}.urls", f"needs 1 to {MAX_TOPICS} globs")
    for index, url in enumerate(message.urls):
        check.text(url, f"{field}.urls[{index}]")
        if not (url.startswith("/") or re.match(r"[a-z][a-z0-9+.-]*://", url)) or "::" in url:
            raise InvalidArgumentError(f"{field}.urls[{index}]", "needs an absolute path or a URL")
        if ".." in url.split("/"):
            raise InvalidArgumentError(f"{field}.urls[{index}]", "must not hold '..'")
    if message.format not in _FILE_FORMATS:
        raise InvalidArgumentError(f"{field}.format", f"{message.format} is no format")
    if message.interval_s and message.cron:
        raise InvalidArgumentError(f"{field}.cron", "needs an interval or a cron expression, not both")
    if message.interval_s and not MIN_INTERVAL_S <= message.interval_s <= 366 * 86_400:
        raise InvalidArgumentError(f"{field}.interval_s", f"must be {MIN_INTERVAL_S:g} to a year")
    if message.cron:
        _check_cron(message.cron, f"{field}.cron")
    return FileSpec(tuple(message.urls), _FILE_FORMATS[message.format], message.interval_s, message.cron)


def _check_cron(expression: str, field: str) -> None:
    if len(expression.split()) != 5:
        raise InvalidArgumentError(field, "needs the five fields minute, hour, day, month, day of the week")
    try:
        next(CronSim(expression, datetime(2026, 1, 1, tzinfo=UTC)))
    except (CronSimError, StopIteration) as error:
        raise InvalidArgumentError(field, f"is no cron expression that ever comes: {error}") from None


def _check_origin(origin: str, field: str) -> None:
    if origin.startswith("@"):
        if origin not in METADATA and not (origin.startswith(HEADER) and len(origin) > len(HEADER)):
            raise InvalidArgumentError(field, f"is none of {', '.join(METADATA)} and {HEADER}<name>")
    elif not origin or not all(origin.split(".")):
        raise InvalidArgumentError(field, "needs a dotted path of members")


def _format(value: int, field: str) -> Format:
    if value == pb.RECORD_FORMAT_UNSPECIFIED:
        return Format.JSON
    if value not in pb.RecordFormat.values():
        raise InvalidArgumentError(field, f"{value} is no format")
    return Format(pb.RecordFormat.Name(value).removeprefix("RECORD_FORMAT_"))  # type: ignore[arg-type]


def _mode(value: int, field: str) -> CloudEvents:
    if value not in pb.CloudEventsMode.values():
        raise InvalidArgumentError(field, f"{value} is no mode")
    return CloudEvents(pb.CloudEventsMode.Name(value).removeprefix("CLOUD_EVENTS_MODE_"))  # type: ignore[arg-type]
