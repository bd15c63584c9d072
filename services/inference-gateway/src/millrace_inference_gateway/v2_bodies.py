"""Bodies of sampled V2 calls as messages, whichever way they came: one gRPC frame, or HTTP's JSON with or without tensors after it.

What came by HTTP becomes the message that a gRPC client would have sent, with its values as bytes, so that it can be replayed and compared like any other.
HTTP: https://github.com/kserve/open-inference-protocol, with Triton's extension for binary tensors.
"""

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message
from tritonclient.grpc import service_pb2
from tritonclient.utils import serialize_byte_tensor

FRAME_BYTES = 5
# A sample may not grow beyond this when it is unpacked.
MAX_UNPACKED_BYTES = 1 << 20
BYTES = "BYTES"
NUMERIC = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2", "INT32": "<i4",
    "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
"""NumPy's names of the types with numbers."""
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
# About how a tensor is sent, not what it is.
_OF_TRANSPORT = frozenset({"binary_data", "binary_data_size", "binary_data_output"})

Kind = TypeVar("Kind", bound=Message)


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


def request_message(body: bytes, model: str, form: HttpForm | None = None) -> service_pb2.ModelInferRequest | None:
    """The request in a body (by gRPC without a form); None when there is none, or more than one."""
    if form is None:
        return _grpc_message(body, service_pb2.ModelInferRequest)
    message = service_pb2.ModelInferRequest(model_name=model)
    return message if _read_http(body, form, message, "inputs", message.raw_input_contents) else None


def response_message(body: bytes, form: HttpForm | None = None) -> service_pb2.ModelInferResponse | None:
    """The answer in a body."""
    if form is None:
        return _grpc_message(body, service_pb2.ModelInferResponse)
    message = service_pb2.ModelInferResponse()
    return message if _read_http(body, form, message, "outputs", message.raw_output_contents) else None


def _grpc_message(body: bytes, kind: type[Kind]) -> Kind | None:
    """The one message of a unary body: a flag byte, four bytes of length, the message."""
    if len(body) < FRAME_BYTES or body[0] > 1 or struct.unpack_from(">I", body, 1)[0] != len(body) - FRAME_BYTES:
        return None
    content = body[FRAME_BYTES:] if body[0] == 0 else _unpacked(body[FRAME_BYTES:])
    if content is None:
        return None
    try:
        return kind.FromString(content)
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


def _read_http(body: bytes, form: HttpForm, message: Any, tensors: str, raws: Any) -> bool:
    """Fill `message`; False when the body is no V2."""
    content = _unpacked(body) if form.encoding else body
    if content is None:
        return False
    end = form.json_bytes or len(content)
    try:
        document = json.loads(content[:end])
        _take_parameters(document, message)
        for tensor in document[tensors]:
            size = (tensor.get("parameters") or {}).get("binary_data_size")
            if size is not None:
                raw = content[end : end + int(size)]
                if len(raw) != int(size):
                    return False
                end += len(raw)
            else:
                raw = _packed(tensor["datatype"], tensor["data"])
            shape = [int(each) for each in tensor["shape"]]
            added = getattr(message, tensors).add(name=tensor["name"], datatype=tensor["datatype"], shape=shape)
            _take_parameters(tensor, added)
            raws.append(raw)
        if tensors == "inputs":
            for wanted in document.get("outputs") or ():
                _take_parameters(wanted, message.outputs.add(name=wanted["name"]))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return False
    return True


def _packed(kind: str, data: object) -> bytes:
    """Values of JSON as the bytes of a tensor, in the order of rows whether lists are nested or not."""
    if kind == BYTES:
        texts = np.asarray(data, np.object_).reshape(-1)
        # It gives an array of one element, which holds the bytes; none for an empty tensor.
        packed = serialize_byte_tensor(np.array([str(each).encode() for each in texts], np.object_))
        return bytes(packed.item()) if packed.size else b""
    return np.asarray(data, np.dtype(NUMERIC[kind])).tobytes()


def _take_parameters(source: Mapping[str, Any], target: Any) -> None:
    for name, value in (source.get("parameters") or {}).items():
        if name in _OF_TRANSPORT:
            continue
        if isinstance(value, bool):
            target.parameters[name].bool_param = value
        elif isinstance(value, int):
            target.parameters[name].int64_param = value
        elif isinstance(value, float):
            target.parameters[name].double_param = value
        else:
            target.parameters[name].string_param = str(value)
