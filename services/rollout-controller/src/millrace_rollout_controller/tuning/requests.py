"""What is sent to the servers: requests of a file, of the model's callers, or zeros by its signature."""

import json
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from millrace_kit.errors import InvalidArgumentError
from tritonclient.grpc import service_pb2
from tritonclient.utils import triton_to_np_dtype

from millrace_rollout_controller.probe import sample_request
from millrace_rollout_controller.state import Tensor, VersionRef
from millrace_rollout_controller.warming import MAX_SAMPLES

MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_REQUESTS = 1024
"""Different requests of a file."""


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests to send in turn."""

    bodies: tuple[bytes, ...]
    source: str
    """Where they are from, in words."""
    rows: float
    """Mean rows of one."""
    max_rows: int


async def load(
    ref: VersionRef, path: Path | None, samples: Callable[[str, int], Awaitable[list[bytes]]], *, max_rows: int
) -> Requests:  # fmt: skip
    """Those of the file if there is one, else what the model's callers sent lately in at most `max_rows` rows, else zeros.

    Raises:
        InvalidArgumentError: the file is no such file, or does not fit the signature; names the place in it.
    """
    if path is not None:
        return _made(from_file(ref, path), f"of {path.name}")
    logged = [_cleaned(ref, body, max_rows) for body in await samples(ref.model, MAX_SAMPLES)]
    if kept := [request for request in logged if request is not None]:
        return _made(kept, "that callers sent lately, as the gateway kept them")
    return _made([sample_request(ref)], "of zeros by the signature, for no gateway had any (--requests gives others)")


def _made(found: list[Any], words: str) -> Requests:
    rows = [int(request.inputs[0].shape[0]) for request in found]
    source = f"{len(found)} {'request' if len(found) == 1 else 'requests'} {words}"
    return Requests(
        tuple(request.SerializeToString() for request in found), source, sum(rows) / len(rows), max(rows)
    )  # fmt: skip


def _cleaned(ref: VersionRef, body: bytes, max_rows: int) -> Any | None:
    """A logged request for the tuner's own server: it has one version, which has another number there. None when it is none to be answered."""
    try:
        request = service_pb2.ModelInferRequest.FromString(body)
    except DecodeError:
        return None
    if not request.inputs or not request.inputs[0].shape or not 1 <= request.inputs[0].shape[0] <= max_rows:
        return None
    request.model_name = ref.model
    request.ClearField("model_version")
    return request


def from_file(ref: VersionRef, path: Path) -> list[Any]:
    """Requests of one row each in perf_analyzer's format: `{"data": [{"features": [1.0, 2.0]}, …]}`, where a value may also be
    `{"content": […], "shape": […]}`.

    Raises:
        InvalidArgumentError: names what is wrong, for example `data[2].features`.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise InvalidArgumentError("--requests", f"is larger than {MAX_FILE_BYTES >> 20} MiB")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidArgumentError("--requests", f"is not JSON: {error}") from None
    data = raw.get("data") if isinstance(raw, dict) else None
    if not isinstance(data, list) or not 1 <= len(data) <= MAX_REQUESTS:
        raise InvalidArgumentError("data", f"must be a list of 1 to {MAX_REQUESTS} requests")
    return [_request(ref, one, f"data[{index}]") for index, one in enumerate(data)]


def _request(ref: VersionRef, values: Any, where: str) -> Any:
    if not isinstance(values, dict) or set(values) != {tensor.name for tensor in ref.inputs}:
        raise InvalidArgumentError(where, f"needs the inputs {', '.join(tensor.name for tensor in ref.inputs)}")
    request = service_pb2.ModelInferRequest(model_name=ref.model)
    for tensor in ref.inputs:
        array = _array(tensor, values[tensor.name], f"{where}.{tensor.name}")
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    return request


def _array(tensor: Tensor, value: Any, where: str) -> "np.ndarray[Any, Any]":
    shape = list(tensor.shape)
    if isinstance(value, dict):
        value, shape = value.get("content"), value.get("shape", shape)
    try:
        array = np.asarray(value, dtype=triton_to_np_dtype(tensor.datatype)).reshape(-1)
        whole = [int(size) for size in shape]
    except (ValueError, TypeError, OverflowError):
        raise InvalidArgumentError(where, f"is no {tensor.datatype}") from None
    known = math.prod(size for size in whole if size >= 0)
    if known and len([size for size in whole if size < 0]) == 1:
        whole = [array.size // known if size < 0 else size for size in whole]
    fits = len(whole) == len(tensor.shape) and all(a < 0 or a == w for a, w in zip(tensor.shape, whole, strict=True))
    if not fits or any(size < 0 for size in whole) or math.prod(whole) != array.size:
        raise InvalidArgumentError(where, f"has {array.size} values, the signature's shape is {list(tensor.shape)}")
    return array.reshape(1, *whole)
