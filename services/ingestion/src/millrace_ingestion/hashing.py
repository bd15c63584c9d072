"""MurmurHash3 x64 128 of a whole Arrow string column at once, in numpy.

The duplicate index keeps 16 bytes for each event id instead of the id. For n ids the chance of one false duplicate is about
n^2 / 2^129: 1.5e-19 for ten thousand million. The function is Austin Appleby's (public domain, github.com/aappleby/smhasher); it is not
keyed, so it does not defend against a producer who constructs collisions of its own ids, which only harms that producer.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

U64 = npt.NDArray[np.uint64]

_C1 = np.uint64(0x87C37B91114253D5)
_C2 = np.uint64(0x4CF5AD432745937F)
_MIX1 = np.uint64(0xFF51AFD7ED558CCD)
_MIX2 = np.uint64(0xC4CEB9FE1A85EC53)
_BLOCK = 16


def _rotated(values: U64, bits: int) -> U64:
    return (values << np.uint64(bits)) | (values >> np.uint64(64 - bits))


def _finished(values: U64) -> U64:
    values = (values ^ (values >> np.uint64(33))) * _MIX1
    values = (values ^ (values >> np.uint64(33))) * _MIX2
    return values ^ (values >> np.uint64(33))


def _tail_mask(length: npt.NDArray[np.int64]) -> U64:
    """Ones in the lowest `length` bytes (0 to 8)."""
    bits = (np.clip(length, 0, 8) * 8).astype(np.uint64)
    full = bits == np.uint64(64)
    mask = (np.uint64(1) << np.where(full, np.uint64(0), bits)) - np.uint64(1)
    return np.where(full, np.uint64(0xFFFFFFFFFFFFFFFF), mask)


def hash_strings(array: pa.StringArray) -> tuple[U64, U64]:
    """The two halves of each string's 128-bit hash; `array` has no nulls."""
    count = len(array)
    if count == 0:
        return np.empty(0, np.uint64), np.empty(0, np.uint64)
    _validity, offset_buffer, data_buffer = array.buffers()
    offsets = np.frombuffer(offset_buffer, np.int32)[array.offset : array.offset + count + 1].astype(np.int64)
    first, last = int(offsets[0]), int(offsets[-1])
    # A copy with room behind it, so that an 8-byte read at the last character stays inside.
    padded = np.zeros(last - first + 2 * _BLOCK, np.uint8)
    if data_buffer is not None and last > first:
        padded[: last - first] = np.frombuffer(data_buffer, np.uint8)[first:last]
    words = np.ndarray((len(padded) - 7,), "<u8", buffer=padded, strides=(1,))
    starts = offsets[:-1] - first
    lengths = offsets[1:] - offsets[:-1]
    return _hash_words(lambda at: words[at], starts, lengths)


def _hash_words(
    read: Callable[[npt.NDArray[np.int64]], U64], starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> tuple[U64, U64]:
    h1 = np.zeros(len(starts), np.uint64)
    h2 = np.zeros(len(starts), np.uint64)
    blocks = lengths // _BLOCK
    for block in range(int(blocks.max())):
        rows: slice | npt.NDArray[np.intp] = (
            slice(None) if int(blocks.min()) > block else np.flatnonzero(blocks > block)
        )
        at = starts[rows] + block * _BLOCK
        a, b = h1[rows], h2[rows]
        a = a ^ (_rotated(read(at) * _C1, 31) * _C2)
        a = (_rotated(a, 27) + b) * np.uint64(5) + np.uint64(0x52DCE729)
        b = b ^ (_rotated(read(at + 8) * _C2, 33) * _C1)
        b = (_rotated(b, 31) + a) * np.uint64(5) + np.uint64(0x38495AB5)
        h1[rows], h2[rows] = a, b
    rest = lengths % _BLOCK
    tail = starts + blocks * _BLOCK
    h2 ^= _rotated((read(tail + 8) & _tail_mask(rest - 8)) * _C2, 33) * _C1
    h1 ^= _rotated((read(tail) & _tail_mask(rest)) * _C1, 31) * _C2
    size = lengths.astype(np.uint64)
    h1, h2 = h1 ^ size, h2 ^ size
    h1 = h1 + h2
    h2 = h2 + h1
    h1, h2 = _finished(h1), _finished(h2)
    h1 = h1 + h2
    h2 = h2 + h1
    return h1, h2
