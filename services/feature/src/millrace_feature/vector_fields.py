"""What definitions say about embeddings: Feast's `Field(vector_index=…, vector_length=…, vector_search_metric=…)`, checked."""

from collections.abc import Mapping, Sequence
from typing import Any

from millrace_kit.errors import InvalidArgumentError

from millrace_feature.plan import Metric, VectorField

FIELD = "feast_registry"
LIST_TYPES: Mapping[str, bool] = {"FLOAT_LIST": False, "DOUBLE_LIST": True}
"""Feast's types of embeddings, and whether their numbers are float64."""
MAX_LENGTH = 16_384
DEFAULT_METRIC: Metric = "L2"
"""Feast's own default."""
_METRICS: Mapping[str, Metric] = {
    "l2": "L2",
    "euclidean": "L2",
    "cosine": "cosine",
    "inner_product": "inner_product",
    "ip": "inner_product",
    "dot": "inner_product",
}
"""Names that Feast's online stores use, in lower case."""


def metric_of(name: str) -> Metric | None:
    """The metric that Feast's stores call `name`, in any case; None for one this service does not have."""
    return _METRICS.get(name.lower())


def known_metrics() -> str:
    """For messages."""
    return "L2, cosine and inner_product"


def vector_field(view: str, field: Any, kind: str) -> VectorField:
    """A Feast field with one of `LIST_TYPES`.

    Raises:
        InvalidArgumentError: its index lacks a length, the length is out of bounds, or the metric is none that is known.
    """
    name = f"{view}.{field.name}"
    if not 0 <= field.vector_length <= MAX_LENGTH:
        raise InvalidArgumentError(FIELD, f"{name} has vector_length {field.vector_length}; at most {MAX_LENGTH}")
    if field.vector_index and not field.vector_length:
        raise InvalidArgumentError(FIELD, f"{name} has a vector_index, so it needs a vector_length")
    metric = metric_of(field.vector_search_metric or DEFAULT_METRIC)
    if metric is None:
        problem = f"has vector_search_metric {field.vector_search_metric!r}, which is none of {known_metrics()}"
        raise InvalidArgumentError(FIELD, f"{name} {problem}")
    return VectorField(field.name, field.vector_length, LIST_TYPES[kind], metric if field.vector_index else None)


def not_searched(view: str, field: Any) -> None:
    """Raises InvalidArgumentError when a field that is no stored embedding asks to be searched."""
    if field.vector_index:
        problem = "has a vector_index; only newest rows of type Array(Float32) or Array(Float64) can be searched"
        raise InvalidArgumentError(FIELD, f"{view}.{field.name} {problem}")


def element_names(feature: str, field: VectorField) -> Sequence[str]:
    """What the numbers of an embedding are called in a model's vector: `<feature>__0` and up."""
    return [f"{feature}__{i}" for i in range(field.length)]
