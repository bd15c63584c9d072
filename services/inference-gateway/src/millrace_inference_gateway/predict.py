"""From a feature vector to a V2 request and back: what Predict does between its two calls. Knows no transport."""

import contextlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from millrace_api.common.v1 import common_pb2
from millrace_kit.errors import FailedPreconditionError, InvalidArgumentError, MillraceError
from tritonclient.grpc import service_pb2

from millrace_inference_gateway.routes import Route
from millrace_inference_gateway.value_checks import Checks, Problem

MAX_NAME = 256
_STRUCT_CODES = {"<f4": "f", "<f8": "d"}
_RAW_INPUT_TAG = b"\x3a"  # field 7, length-delimited


@dataclass(frozen=True, slots=True)
class Vector:
    """Features in the order of the model, NaN where missing."""

    values: tuple[float, ...]
    max_age_ms: int = 0
    definitions_hash: str = ""
    expired: frozenset[str] = frozenset()
    """Features whose value is too old to be used."""
    ages: tuple[common_pb2.FeatureAge, ...] = ()
    """By view, those that gave a value; empty where the feature service does not say."""

    def missing(self, names: Sequence[str]) -> list[str]:
        """Names of the features without a value."""
        if not math.isnan(sum(self.values)):
            return []
        return [name for name, value in zip(names, self.values, strict=True) if math.isnan(value)]


def ordered(route: Route, names: Sequence[str], values: Sequence[float]) -> tuple[float, ...]:
    """`values` (named by `names`) in the order the model was trained with.

    Raises:
        FailedPreconditionError: a feature of the model is not among them.
    """
    if tuple(names) == route.feature_names:
        return tuple(values)
    found = dict(zip(names, values, strict=True))
    lacking = [name for name in route.feature_names if name not in found]
    if lacking:
        raise FailedPreconditionError(
            "FEATURE_NOT_SERVED",
            f"feature service {route.feature_service!r} does not give {lacking[0]!r}, which model {route.model!r} needs",
            {"feature": lacking[0], "feature_service": route.feature_service, "model": route.model},
        )
    return tuple(found[name] for name in route.feature_names)


def from_inputs(route: Route, inputs: Mapping[str, common_pb2.Value], checks: Checks) -> Vector:
    """The vector of a model without a feature service: its features are the inputs.

    Raises:
        InvalidArgumentError: an input is no number, or is no feature of the model.
    """
    unknown = sorted(set(inputs) - set(route.feature_names))
    if unknown:
        raise InvalidArgumentError(f"inputs[{unknown[0]!r}]", f"is no feature of model {route.model!r}")
    values = []
    for name in route.feature_names:
        value = inputs.get(name)
        kind = value.WhichOneof("kind") if value is not None else None
        if value is None or kind is None:
            values.append(math.nan)
        elif kind in {"int64_value", "double_value", "bool_value"}:
            values.append(float(getattr(value, kind)))
        else:
            raise checks.refused(f"inputs[{name!r}]", Problem.VALUE_PROBLEM_WRONG_TYPE, name)
    return Vector(tuple(values))


def request_head(route: Route, rows: int) -> bytes:
    """Everything of the model's request except the values; the same for every call of a route with so many rows."""
    assert route.tensor is not None  # else `route_of` refuses the call
    tensor = service_pb2.ModelInferRequest.InferInputTensor(
        name=route.input_tensor, datatype=route.tensor.datatype, shape=[rows, *route.tensor.shape]
    )
    wanted = [service_pb2.ModelInferRequest.InferRequestedOutputTensor(name=route.output_tensor)]
    return service_pb2.ModelInferRequest(  # type: ignore[no-any-return]
        model_name=route.model, inputs=[tensor], outputs=wanted if route.output_tensor else []
    ).SerializeToString()


def request_bytes(head: bytes, rows: Sequence[Sequence[float]], route: Route) -> bytes:
    """A `ModelInferRequest` with `rows` as little-endian numbers of the route's type."""
    assert route.tensor is not None
    raw = _packed(rows, route.tensor.kind)
    return head + _RAW_INPUT_TAG + _varint(len(raw)) + raw


def _packed(rows: Sequence[Sequence[float]], kind: "np.dtype[np.generic]") -> bytes:
    if len(rows) == 1 and (code := _STRUCT_CODES.get(kind.str)) is not None:
        # What is too large for FP32 is infinite to numpy and an error here.
        with contextlib.suppress(OverflowError):
            return struct.pack(f"<{len(rows[0])}{code}", *rows[0])
    with np.errstate(over="ignore"):
        return np.asarray(rows, kind).tobytes()


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def response_values(body: bytes, output_tensor: str) -> list[float]:
    """The values of the output tensor.

    Raises:
        MillraceError: the model server's answer cannot be used (INTERNAL, reason BAD_MODEL_ANSWER).
    """
    try:
        answer = service_pb2.ModelInferResponse.FromString(body)
        for index, tensor in enumerate(answer.outputs):
            if output_tensor in {"", tensor.name}:
                return _decode(tensor, answer.raw_output_contents, index)
    except (DecodeError, IndexError, struct.error, ValueError) as error:
        raise _bad_answer(f"cannot be read: {error}") from error
    raise _bad_answer(f"has no tensor {output_tensor!r}")


def response_rows(body: bytes, output_tensor: str, rows: int) -> list[list[float]]:
    """The output tensor's values, row by row.

    Raises:
        MillraceError: the model server's answer cannot be used (INTERNAL, reason BAD_MODEL_ANSWER).
    """
    values = response_values(body, output_tensor)
    width, rest = divmod(len(values), rows)
    if rest:
        raise _bad_answer(f"has {len(values)} values for {rows} rows")
    return [values[start : start + width] for start in range(0, rows * width, width)] if width else [[]] * rows


def _decode(tensor: object, raw: Sequence[bytes], index: int) -> list[float]:
    kind: str = tensor.datatype  # type: ignore[attr-defined]
    types = {"FP32": "<f4", "FP64": "<f8", "INT64": "<i8", "INT32": "<i4"}
    if kind not in types:
        raise _bad_answer(f"has the type {kind!r}; Predict reads {', '.join(types)}")
    if raw:
        found: list[float] = np.frombuffer(raw[index], types[kind]).astype(np.float64).tolist()
        return found
    contents = tensor.contents  # type: ignore[attr-defined]
    names = {"FP32": "fp32_contents", "FP64": "fp64_contents", "INT64": "int64_contents", "INT32": "int_contents"}
    return [float(value) for value in getattr(contents, names[kind])]


def _bad_answer(problem: str) -> MillraceError:
    return MillraceError(grpc.StatusCode.INTERNAL, "BAD_MODEL_ANSWER", f"the model's answer {problem}")
