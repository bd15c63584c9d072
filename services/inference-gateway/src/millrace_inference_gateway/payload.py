"""Feature and output rows of a sampled V2 call, from the bytes that passed."""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

FRAME_BYTES = 5
_TYPES = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2", "INT32": "<i4",
    "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
_CONTENTS = {
    "BOOL": "bool_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents",
}  # fmt: skip

Rows = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PayloadRow:
    """One row of a call; empty where its tensors are not numeric or their shapes do not fit."""

    features: tuple[float, ...] = ()
    outputs: tuple[float, ...] = ()


def payload_rows(request: bytes, response: bytes, max_rows: int) -> list[PayloadRow]:
    """Rows of one call from its two gRPC bodies; one empty row when they cannot be read as rows."""
    features = _rows(_message(request, service_pb2.ModelInferRequest), "inputs", "raw_input_contents")
    if features is None or not 1 <= len(features) <= max_rows:
        return [PayloadRow()]
    outputs = _rows(_message(response, service_pb2.ModelInferResponse), "outputs", "raw_output_contents")
    if outputs is None or len(outputs) != len(features):
        return [PayloadRow()]
    return [PayloadRow(tuple(row.tolist()), tuple(out.tolist())) for row, out in zip(features, outputs, strict=True)]


def _message(body: bytes, kind: type) -> object | None:
    """The one message of a unary body: a flag byte, four bytes of length, the message."""
    if len(body) < FRAME_BYTES or body[0] != 0 or struct.unpack_from(">I", body, 1)[0] != len(body) - FRAME_BYTES:
        return None
    try:
        return kind.FromString(body[FRAME_BYTES:])  # type: ignore[attr-defined,no-any-return]
    except DecodeError:
        return None


def _rows(message: object | None, tensors: str, raws: str) -> Rows | None:
    if message is None:
        return None
    found: list[Rows] = []
    raw: Sequence[bytes] = getattr(message, raws)
    for index, tensor in enumerate(getattr(message, tensors)):
        values = _values(tensor, raw[index] if index < len(raw) else None)
        shape = tuple(tensor.shape)
        if values is None or not shape or shape[0] < 1 or math.prod(shape) != values.size:
            return None
        found.append(values.reshape(shape[0], -1))
    if not found or any(len(rows) != len(found[0]) for rows in found):
        return None
    return found[0] if len(found) == 1 else np.concatenate(found, axis=1)


def _values(tensor: object, raw: bytes | None) -> Rows | None:
    kind = _TYPES.get(tensor.datatype)  # type: ignore[attr-defined]
    if kind is None:
        return None
    if raw is not None:
        if len(raw) % np.dtype(kind).itemsize:
            return None
        return np.frombuffer(raw, kind).astype(np.float64)
    contents = _CONTENTS.get(tensor.datatype)  # type: ignore[attr-defined]
    return None if contents is None else np.asarray(getattr(tensor.contents, contents), np.float64)  # type: ignore[attr-defined]
