"""Feature and output rows of a sampled V2 call, from the bytes that passed."""

import json
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

FRAME_BYTES = 5
# A sample may not grow beyond this when it is unpacked.
MAX_UNPACKED_BYTES = 1 << 20
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
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
class HttpForm:
    """How a body of V2 over HTTP (JSON, then tensors) is to be read."""

    json_bytes: int = 0
    """Length of the JSON; 0 when it is all."""
    encoding: str = ""
    """Content encoding."""


@dataclass(frozen=True, slots=True)
class HttpForms:
    """Of both bodies of a call."""

    request: HttpForm
    response: HttpForm


@dataclass(frozen=True, slots=True)
class OutputRows:
    """One numeric output; `rows` is [rows, values of one row]."""

    rows: Rows
    whole: bool
    """Of a type of whole numbers."""


@dataclass(frozen=True, slots=True)
class PayloadRow:
    """One row of a call; empty where its tensors are not numeric or their shapes do not fit."""

    features: tuple[float, ...] = ()
    outputs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class _Tensor:
    shape: tuple[int, ...]
    values: Rows | None


def payload_rows(request: bytes, response: bytes, max_rows: int, http: HttpForms | None = None) -> list[PayloadRow]:
    """Rows of one call from its two bodies (gRPC, or HTTP of those forms); one empty row when they cannot be read as rows."""
    if http is None:
        inputs = _grpc_tensors(request, service_pb2.ModelInferRequest, "inputs", "raw_input_contents")
    else:
        inputs = _http_tensors(request, http.request, "inputs")
    features = _rows(inputs)
    if features is None or not 1 <= len(features) <= max_rows:
        return [PayloadRow()]
    if http is None:
        answers = _grpc_tensors(response, service_pb2.ModelInferResponse, "outputs", "raw_output_contents")
    else:
        answers = _http_tensors(response, http.response, "outputs")
    outputs = _rows(answers)
    if outputs is None or len(outputs) != len(features):
        return [PayloadRow()]
    return [PayloadRow(tuple(row.tolist()), tuple(out.tolist())) for row, out in zip(features, outputs, strict=True)]


def _grpc_tensors(body: bytes, kind: type, tensors: str, raws: str) -> list[_Tensor] | None:
    message = _message(body, kind)
    if message is None:
        return None
    raw: Sequence[bytes] = getattr(message, raws)
    return [
        _Tensor(tuple(tensor.shape), _values(tensor, raw[index] if index < len(raw) else None))
        for index, tensor in enumerate(getattr(message, tensors))
    ]


def message_bytes(body: bytes) -> bytes:
    """The one message of a unary body; empty when there is none, more than one, or a compressed one."""
    if len(body) < FRAME_BYTES or body[0] != 0 or struct.unpack_from(">I", body, 1)[0] != len(body) - FRAME_BYTES:
        return b""
    return body[FRAME_BYTES:]


def output_rows(response: bytes) -> dict[str, OutputRows]:
    """Numeric outputs of a serialized `ModelInferResponse` by name; none when one of them cannot be read."""
    try:
        message = service_pb2.ModelInferResponse.FromString(response)
    except DecodeError:
        return {}
    found: dict[str, OutputRows] = {}
    raw: Sequence[bytes] = message.raw_output_contents
    for index, tensor in enumerate(message.outputs):
        if tensor.datatype not in _TYPES:
            continue
        values = _values(tensor, raw[index] if index < len(raw) else None)
        shape = tuple(tensor.shape)
        if values is None or not shape or shape[0] < 1 or math.prod(shape) != values.size:
            return {}
        found[tensor.name] = OutputRows(values.reshape(shape[0], -1), not tensor.datatype.startswith("FP"))
    return found


def _message(body: bytes, kind: type) -> object | None:
    """The one message of a unary body: a flag byte, four bytes of length, the message."""
    if len(body) < FRAME_BYTES or body[0] > 1 or struct.unpack_from(">I", body, 1)[0] != len(body) - FRAME_BYTES:
        return None
    content = body[FRAME_BYTES:] if body[0] == 0 else _unpacked(body[FRAME_BYTES:])
    if content is None:
        return None
    try:
        return kind.FromString(content)  # type: ignore[attr-defined,no-any-return]
    except DecodeError:
        return None


def _unpacked(content: bytes) -> bytes | None:
    """What gzip or deflate packed; None when it is neither, or larger than a sample may be."""
    try:
        packer = zlib.decompressobj(_GZIP_OR_ZLIB)
        found = packer.decompress(content, MAX_UNPACKED_BYTES)
    except zlib.error:
        return None
    return None if packer.unconsumed_tail or not packer.eof else found


def _rows(tensors: list[_Tensor] | None) -> Rows | None:
    found: list[Rows] = []
    for tensor in tensors or ():
        shape = tensor.shape
        if tensor.values is None or not shape or shape[0] < 1 or math.prod(shape) != tensor.values.size:
            return None
        found.append(tensor.values.reshape(shape[0], -1))
    if not found or any(len(rows) != len(found[0]) for rows in found):
        return None
    return found[0] if len(found) == 1 else np.concatenate(found, axis=1)


def _values(tensor: object, raw: bytes | None) -> Rows | None:
    kind: str = tensor.datatype  # type: ignore[attr-defined]
    if raw is not None:
        return _from_bytes(kind, raw)
    contents = _CONTENTS.get(kind)
    return None if contents is None else np.asarray(getattr(tensor.contents, contents), np.float64)  # type: ignore[attr-defined]


def _from_bytes(kind: object, raw: bytes) -> Rows | None:
    dtype = _TYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None or len(raw) % np.dtype(dtype).itemsize:
        return None
    return np.frombuffer(raw, dtype).astype(np.float64)


def _http_tensors(body: bytes, form: HttpForm, tensors: str) -> list[_Tensor] | None:
    """Tensors of V2 over HTTP: values in the JSON, or their bytes after it in the order of the tensors."""
    content = _unpacked(body) if form.encoding else body
    if content is None:
        return None
    end = form.json_bytes or len(content)
    found = []
    try:
        for tensor in json.loads(content[:end])[tensors]:
            size = (tensor.get("parameters") or {}).get("binary_data_size")
            if size is not None:
                values = _from_bytes(tensor["datatype"], content[end : end + int(size)])
                end += int(size)
            else:
                values = np.asarray(tensor["data"], np.float64).reshape(-1) if tensor["datatype"] in _TYPES else None
            found.append(_Tensor(tuple(int(size) for size in tensor["shape"]), values))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return found
