"""How large a compressed Arrow IPC stream gets, read from its headers before anything is decompressed.

A few kilobytes of zstd can stand for gigabytes, and Arrow's reader allocates what the headers say. The format (Arrow columnar format,
"Serialization and Interprocess Communication"): each message is 0xFFFFFFFF, the metadata's length, the metadata (a flatbuffer `Message`),
the body. In a compressed body each buffer begins with its plain length as int64; -1 means that it is stored as it is.
"""

import struct

_CONTINUATION = b"\xff\xff\xff\xff"
_RECORD_BATCH, _DICTIONARY_BATCH = 3, 2
_MAX_BUFFERS = 100_000


def decoded_size(payload: bytes) -> int:
    """Sum of the plain sizes of all compressed buffers; 0 when nothing is compressed.

    Raises:
        ValueError: the framing or a header is broken.
    """
    total = at = 0
    view = memoryview(payload)
    try:
        while at + 8 <= len(view):
            if view[at : at + 4] != _CONTINUATION:
                raise ValueError("a message does not begin with the continuation marker")
            (length,) = struct.unpack_from("<i", view, at + 4)
            if length == 0:
                break
            if length < 0 or at + 8 + length > len(view):
                raise ValueError("a message's metadata is cut off")
            metadata = _Table.root(view[at + 8 : at + 8 + length])
            body = at + 8 + length
            body_length = metadata.int64(3)
            if body_length < 0 or body + body_length > len(view):
                raise ValueError("a message's body is cut off")
            total += _batch_size(metadata, view[body : body + body_length])
            at = body + body_length
    except (struct.error, IndexError) as error:
        raise ValueError("a message's metadata is broken") from error
    return total


def _batch_size(message: "_Table", body: memoryview) -> int:
    kind = message.uint8(1)
    header = message.table(2)
    if kind == _DICTIONARY_BATCH and header is not None:
        header = header.table(1)
    elif kind != _RECORD_BATCH:
        return 0
    if header is None or header.table(3) is None:
        return 0
    total = 0
    for offset, length in header.pairs(2):
        if length == 0:
            continue
        if offset < 0 or length < 8 or offset + length > len(body):
            raise ValueError("a buffer lies outside the body")
        (plain,) = struct.unpack_from("<q", body, offset)
        total += length if plain < 0 else plain
    return total


class _Table:
    """A flatbuffer table: just enough of the format to read four fields."""

    def __init__(self, data: memoryview, at: int) -> None:
        self._data = data
        self._at = at
        self._fields = at - _signed(data, at)
        if self._fields < 0:
            raise ValueError("a table lies outside the metadata")

    @classmethod
    def root(cls, data: memoryview) -> "_Table":
        return cls(data, _unsigned(data, 0))

    def _place(self, field: int) -> int:
        (size,) = struct.unpack_from("<H", self._data, self._fields)
        entry = 4 + 2 * field
        if entry + 2 > size:
            return 0
        (offset,) = struct.unpack_from("<H", self._data, self._fields + entry)
        return self._at + offset if offset else 0

    def uint8(self, field: int) -> int:
        place = self._place(field)
        return self._data[place] if place else 0

    def int64(self, field: int) -> int:
        place = self._place(field)
        return int(struct.unpack_from("<q", self._data, place)[0]) if place else 0

    def table(self, field: int) -> "_Table | None":
        place = self._place(field)
        return _Table(self._data, place + _unsigned(self._data, place)) if place else None

    def pairs(self, field: int) -> list[tuple[int, int]]:
        """A vector of structs of two int64."""
        place = self._place(field)
        if not place:
            return []
        start = place + _unsigned(self._data, place)
        count = _unsigned(self._data, start)
        if count > _MAX_BUFFERS:
            raise ValueError("a batch has too many buffers")
        return [struct.unpack_from("<qq", self._data, start + 4 + 16 * index) for index in range(count)]


def _unsigned(data: memoryview, at: int) -> int:
    return int(struct.unpack_from("<I", data, at)[0])


def _signed(data: memoryview, at: int) -> int:
    return int(struct.unpack_from("<i", data, at)[0])
