"""Feature and output rows of a sampled V2 call."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from millrace_inference_gateway.v2_bodies import NUMERIC, HttpForms, request_message, response_message

_CONTENTS = {
    "BOOL": "bool_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents",
}  # fmt: skip

Rows = npt.NDArray[np.float64]


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


def payload_rows(request: bytes, response: bytes, max_rows: int, http: HttpForms | None = None) -> list[PayloadRow]:
    """Rows of one call from its two bodies (gRPC, or HTTP of those forms); one empty row when they cannot be read as rows."""
    asked = request_message(request, "", http.request if http else None)
    features = _rows(asked.inputs, asked.raw_input_contents) if asked is not None else None
    if features is None or not 1 <= len(features) <= max_rows:
        return [PayloadRow()]
    answer = response_message(response, http.response if http else None)
    outputs = _rows(answer.outputs, answer.raw_output_contents) if answer is not None else None
    if outputs is None or len(outputs) != len(features):
        return [PayloadRow()]
    return [PayloadRow(tuple(row.tolist()), tuple(out.tolist())) for row, out in zip(features, outputs, strict=True)]


def output_rows(response: bytes) -> dict[str, OutputRows]:
    """Numeric outputs of a serialized `ModelInferResponse` by name; none when one of them cannot be read."""
    try:
        message = service_pb2.ModelInferResponse.FromString(response)
    except DecodeError:
        return {}
    found: dict[str, OutputRows] = {}
    raw: Sequence[bytes] = message.raw_output_contents
    for index, tensor in enumerate(message.outputs):
        if tensor.datatype not in NUMERIC:
            continue
        rows = _tensor_rows(tensor, raw[index] if index < len(raw) else None)
        if rows is None:
            return {}
        found[tensor.name] = OutputRows(rows, not tensor.datatype.startswith("FP"))
    return found


def _rows(tensors: Sequence[object], raw: Sequence[bytes]) -> Rows | None:
    found: list[Rows] = []
    for index, tensor in enumerate(tensors):
        rows = _tensor_rows(tensor, raw[index] if index < len(raw) else None)
        if rows is None:
            return None
        found.append(rows)
    if not found or any(len(rows) != len(found[0]) for rows in found):
        return None
    return found[0] if len(found) == 1 else np.concatenate(found, axis=1)


def _tensor_rows(tensor: object, raw: bytes | None) -> Rows | None:
    """Values as [rows, values of one row]; None where they are no numbers or do not fit the shape."""
    values, shape = _values(tensor, raw), tuple(tensor.shape)  # type: ignore[attr-defined]
    if values is None or not shape or shape[0] < 1 or math.prod(shape) != values.size:
        return None
    return values.reshape(shape[0], -1)


def _values(tensor: object, raw: bytes | None) -> Rows | None:
    kind: str = tensor.datatype  # type: ignore[attr-defined]
    if raw is not None:
        dtype = NUMERIC.get(kind)
        return (
            None
            if dtype is None or len(raw) % np.dtype(dtype).itemsize
            else np.frombuffer(raw, dtype).astype(np.float64)
        )
    contents = _CONTENTS.get(kind)
    return None if contents is None else np.asarray(getattr(tensor.contents, contents), np.float64)  # type: ignore[attr-defined]
