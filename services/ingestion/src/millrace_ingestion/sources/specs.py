"""What a source is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum

from millrace_ingestion.joins.position import Position
from millrace_ingestion.joins.specs import JoinSpec
from millrace_ingestion.models import Outcome


class Format(Enum):
    """How the value of a message is written."""

    JSON = "JSON"
    AVRO = "AVRO"
    PROTOBUF = "PROTOBUF"


class FileFormat(Enum):
    """How a file is written; see `millrace_kit.record_files`."""

    BY_NAME = ""
    PARQUET = "parquet"
    CSV = "csv"
    JSON_LINES = "json_lines"


class CloudEvents(Enum):
    """How CloudEvents are carried."""

    NONE = "UNSPECIFIED"
    BINARY = "BINARY"
    STRUCTURED = "STRUCTURED"
    BOTH = "BOTH"


class State(Enum):
    """What people and the service decided about a source."""

    RUNNING = "running"
    PAUSED = "paused"
    FAILED = "failed"
    DONE = "done"
    REMOVED = "removed"


@dataclass(frozen=True)
class TopicSpec:
    """Topics of another system; see `KafkaSource` in the protos."""

    topics: tuple[str, ...]
    group: str
    connection: str = ""
    bootstrap_servers: tuple[str, ...] = ()
    latest: bool = False
    format: Format = Format.JSON
    registry_url: str = ""
    schema: bytes = b""
    message_name: str = ""
    cloud_events: CloudEvents = CloudEvents.NONE
    skip_lost: bool = False
    skip_tombstones: bool = False


@dataclass(frozen=True)
class FileSpec:
    """Files that are pulled; see `FileSource` in the protos."""

    urls: tuple[str, ...]
    format: FileFormat = FileFormat.BY_NAME
    interval_s: float = 0.0
    cron: str = ""


@dataclass(frozen=True)
class Source:
    """Something that is read into a contract."""

    name: str
    version: int
    contract: str
    spec: TopicSpec | FileSpec | JoinSpec
    columns: Mapping[str, str] = field(default_factory=dict)
    """Columns that come from elsewhere than the member of the same name."""
    registered_at: datetime | None = None

    def lane(self, place: str) -> str:
        """The name under which the batches of one partition or file land."""
        return f"_{self.name}/{place}"


@dataclass(frozen=True)
class Standing:
    """What is stored about a source beside its definition."""

    state: State
    error: str = ""
    turn: int = 0
    """Rises with each look that is asked for."""
    last_run: datetime | None = None
    last_result: str = ""


@dataclass(frozen=True)
class PartitionState:
    """One partition that this process reads."""

    topic: str
    partition: int
    position: int
    end: int


@dataclass
class JoinProgress:
    """What this process knows about a running join."""

    position: Position | None = None
    newest: tuple[int, int] = (0, 0)
    """Newest versions of the left and the right table."""
    matched: int = 0
    unmatched: int = 0
    late: int = 0

    @property
    def lag(self) -> int:
        """Versions of both tables that are not joined; with the records of the beginning at least one."""
        if self.position is None:
            return 0
        at = self.position.left_version, self.position.right_version
        behind = sum(max(0, newest - version) for newest, version in zip(self.newest, at, strict=True))
        return behind + (self.position.base_row is not None)


@dataclass
class Progress:
    """What this process knows about a running source."""

    accepted: int = 0
    duplicates: int = 0
    rejected: int = 0
    trouble: str = ""
    """Why it is being tried again; empty while it reads."""
    next_run: datetime | None = None
    partitions: dict[tuple[str, int], PartitionState] = field(default_factory=dict)
    join: JoinProgress | None = None

    def count(self, outcome: Outcome) -> None:
        """Add what became of a batch."""
        self.accepted += outcome.accepted
        self.duplicates += outcome.duplicates
        self.rejected += outcome.rejected

    @property
    def settled(self) -> int:
        """Records that landed or were refused."""
        return self.accepted + self.duplicates + self.rejected

    @property
    def lag(self) -> int:
        """Messages that have not landed, over the partitions of this process; of a join see `JoinProgress`."""
        if self.join is not None:
            return self.join.lag
        return sum(max(0, one.end - one.position) for one in self.partitions.values())
