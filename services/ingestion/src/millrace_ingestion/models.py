"""What travels between the edge, the landing and the store."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from millrace_kit.errors import MillraceError

from millrace_ingestion.checks import Checked, Failure, Reject
from millrace_ingestion.contracts import Contract
from millrace_ingestion.origins import TASK_PUT, Origin

# Replays of dead letters land under this source; producers' sources never begin with an underscore.
REPLAY_SOURCE = "_dead_letters"
# Batches released from the quarantine land under this one.
RELEASE_SOURCE = "_quarantine"


@dataclass(frozen=True)
class Incoming:
    """One batch as a producer or a source sent it; exactly one payload is set (empty JSON lines when every record was undecodable)."""

    contract: str
    source: str
    offset: int
    arrow_ipc: bytes | None = None
    json_lines: bytes | None = None
    origins: Sequence[Origin] = ()
    """Where each record of the payload came from, by its place among the records; empty when the producer is the origin."""
    undecodable: Sequence[Reject] = ()
    """Records that the source could not make records of; they become dead letters of this batch."""
    after: int | None = None
    """Offset of the source's batch before this one (0: none); when another one landed last, this one is refused."""

    @property
    def payload_bytes(self) -> int:
        """Size as sent."""
        refused = sum(reject.size for reject in self.undecodable)
        return len(self.arrow_ipc or b"") + len(self.json_lines or b"") + refused


@dataclass(frozen=True)
class Outcome:
    """What became of a batch."""

    contract: str
    source: str
    offset: int
    accepted: int
    duplicates: int
    rejected: int
    table_version: int
    replayed: bool = False
    quarantined: int = 0


@dataclass(frozen=True)
class Pending:
    """A checked batch that waits to land."""

    contract: Contract
    source: str
    offset: int
    """0 takes the source's next one."""
    checked: Checked
    arrow_ipc: bytes | None = None
    """The payload, when it is an Arrow stream with exactly the contract's schema whose records are all good."""
    letter_ids: npt.NDArray[np.int64] | None = None
    """For a replay: the dead letter of each record of the batch as it was sent."""
    released_ids: Sequence[int] = ()
    """For a release: the quarantined batches whose records these are."""
    after: int | None = None
    """As in `Incoming`."""


@dataclass(frozen=True)
class Entry:
    """One batch of a group, with what will be stored for it."""

    source: str
    offset: int
    accepted: int
    duplicates: int
    rejected: int
    rejects: Sequence[Reject] = ()
    """New dead letters."""
    landed_letters: Sequence[int] = ()
    """Dead letters that this batch, a replay, brings into the lake."""
    held: Failure | None = None
    """Why it is quarantined."""
    quarantined: int = 0
    """Its records there."""
    released_ids: Sequence[int] = ()
    """Quarantined batches that this batch, a release, brings into the lake."""


@dataclass(frozen=True)
class Group:
    """Batches that one Delta commit carries."""

    id: str
    contract: str
    contract_version: int
    base_version: int
    """Newest Delta version when the group was planned; its commit comes after it."""
    entries: Sequence[Entry] = ()


@dataclass(frozen=True)
class Piece:
    """The landed records of one batch, for the bus."""

    source: str
    offset: int
    rows: int
    table: pa.Table
    arrow_ipc: bytes | None = None


@dataclass(frozen=True)
class Landed:
    """A group that is in the lake; its pieces are still to be published."""

    group_id: str
    contract: str
    contract_version: int
    table_version: int
    pieces: Sequence[Piece]
    results: Sequence[Outcome | MillraceError] = ()
    """One for each batch that was given, in order."""
    entries: Sequence[Entry] = field(default=())


@dataclass(frozen=True)
class Letter:
    """A dead letter as it is stored."""

    id: int
    contract: str
    source: str
    offset: int
    reason: str
    column: str
    detail: str
    record_json: str
    received_at: datetime
    replayed: bool
    origin: Origin | None = None
    stage: str = TASK_PUT
    exception: str = ""


@dataclass(frozen=True)
class HeldBatch:
    """A quarantined batch as it is stored."""

    id: int
    contract: str
    source: str
    offset: int
    reason: str
    column: str
    detail: str
    rows: int
    received_at: datetime
    released: bool = False
    discarded: bool = False


@dataclass(frozen=True)
class Released:
    """What became of batches that were released."""

    batches: int
    accepted: int
    duplicates: int
    rejected: int


@dataclass(frozen=True)
class LetterCount:
    """Dead letters of one contract and reason."""

    contract: str
    reason: str
    count: int
    replayed: int


@dataclass(frozen=True)
class Pin:
    """Somebody's claim to a table version."""

    contract: str
    version: int
    owner: str
    expires_at: datetime | None
    """None holds it for ever."""


@dataclass(frozen=True)
class TableState:
    """A lake table as readers open it."""

    contract: str
    version: int
    url: str
    rows: int
