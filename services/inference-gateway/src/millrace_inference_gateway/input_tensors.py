"""The tensor that Predict fills with a vector of features, as the signature has it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_KINDS = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2", "INT32": "<i4",
    "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
FP32: "np.dtype[np.generic]" = np.dtype("<f4")


@dataclass(frozen=True, slots=True)
class VectorTensor:
    """One row's part of the input tensor."""

    datatype: str
    """Of V2."""
    kind: "np.dtype[np.generic]"
    shape: tuple[int, ...]
    """Without the batch dimension, none variable."""


def vector_tensor(datatype: str, shape: Sequence[int], features: int) -> VectorTensor | None:
    """The tensor for so many features; None where it cannot hold them.

    Args:
        datatype: of V2; empty is FP32.
        shape: without the batch dimension, -1 is variable; empty is one dimension of the features.
        features: how many.
    """
    kind = _KINDS.get(datatype or "FP32")
    if kind is None:
        return None
    fixed = math.prod(size for size in shape if size > 0)
    variable = sum(size < 0 for size in shape)
    if not shape:
        made: tuple[int, ...] = (features,)
    elif variable > 1 or features % fixed or (not variable and fixed != features):
        return None
    else:
        made = tuple(features // fixed if size < 0 else size for size in shape)
    return VectorTensor(datatype or "FP32", np.dtype(kind), made)
