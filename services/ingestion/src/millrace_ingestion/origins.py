"""Where a record came from, kept with its dead letter so that the message itself can be found, read and sent again.

The fields are those that Kafka Connect writes into the headers of a dead letter (KIP-298); a source that is no topic leaves them empty.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

# Names of Kafka Connect's stages (org.apache.kafka.connect.runtime.errors.Stage) in which a record can be refused here.
KEY_CONVERTER = "KEY_CONVERTER"
VALUE_CONVERTER = "VALUE_CONVERTER"
HEADER_CONVERTER = "HEADER_CONVERTER"
TRANSFORMATION = "TRANSFORMATION"
TASK_PUT = "TASK_PUT"
STAGES = (KEY_CONVERTER, VALUE_CONVERTER, HEADER_CONVERTER, TRANSFORMATION, TASK_PUT)

Headers = Sequence[tuple[str, bytes | None]]
"""A message's headers in their order; names may repeat."""


@dataclass(frozen=True)
class Origin:
    """A record as its source has it.

    `topic`, `partition` and `offset` name a Kafka message; for a file the topic is its URL, the partition 0 and the offset the record's
    place. `value` and `key` are the bytes that were read, None when they cannot be had again.
    """

    topic: str
    partition: int
    offset: int
    timestamp_ms: int = 0
    key: bytes | None = None
    value: bytes | None = None
    headers: Headers = field(default=())
