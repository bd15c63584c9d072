"""Fitted transformers and feature selections."""

from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from google.protobuf import json_format, struct_pb2
from millrace_api.feature.v1 import transformers_pb2 as transformers
from millrace_api.feature.v1.transformers_pb2_grpc import TransformerServiceStub
from millrace_kit.errors import InvalidArgumentError

from millrace.transport import LONG_TIMEOUT_S, call

_OWN = frozenset({"kind", "inputs", "output"})


def step_of(number: int, fields: Mapping[str, Any]) -> transformers.TransformerStep:
    """A step from plain values: `kind`, `inputs` (one name or a list), `output`, and the kind's parameters beside them.

    Raises:
        InvalidArgumentError: `kind` or `inputs` is missing, or a parameter is no plain value.
    """
    inputs = fields.get("inputs", ())
    names = [inputs] if isinstance(inputs, str) else list(inputs)
    if not fields.get("kind") or not names:
        raise InvalidArgumentError(f"steps[{number}]", "needs kind and inputs")
    try:
        given = {name: value for name, value in fields.items() if name not in _OWN}
        return transformers.TransformerStep(
            kind=fields["kind"],
            inputs=names,
            output=fields.get("output", ""),
            parameters=json_format.ParseDict(given, struct_pb2.Struct()),
        )
    except (TypeError, json_format.ParseError) as error:
        raise InvalidArgumentError(f"steps[{number}]", str(error)) from error


def raw_features(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """The features (`view__feature`) that steps take from a training set; names that a step has made itself are none."""
    made: set[str] = set()
    found: dict[str, None] = {}
    for step in steps:
        inputs = step.get("inputs", ())
        names = [inputs] if isinstance(inputs, str) else list(inputs)
        found.update({name: None for name in names if "__" in name and name not in made})
        made.update([step["output"]] if step.get("output") else [])
    return list(found)


class TransformerArea:
    """Fits transformers, and keeps selections of features."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub = TransformerServiceStub(channel)

    def fit(self, name: str, training_set: str, steps: Sequence[Mapping[str, Any]]) -> transformers.Transformer:
        """Fit `steps` (see `step_of`) on a training set and keep them as the next version of `name`.

        The same steps on the same set give the version there is. A feature service uses it by the tag
        `millrace.transformers: name@version`.

        Args:
            name: lower-case letters, digits, `-` and `_`; it begins the outputs' names.
            training_set: the set's digest; `FeatureArea.build_training_set(features=…)` makes one that may hold texts.
            steps: in the order they run.
        """
        request = transformers.FitTransformerRequest(
            name=name, training_set=training_set, steps=[step_of(i, step) for i, step in enumerate(steps)]
        )
        answer: transformers.FitTransformerResponse = call(self.stub.FitTransformer, request, LONG_TIMEOUT_S)
        return answer.transformer

    def get(self, name: str, version: int = 0) -> transformers.Transformer:
        """One version of a transformer; 0 is the newest."""
        request = transformers.GetTransformerRequest(name=name, version=version)
        answer: transformers.GetTransformerResponse = call(self.stub.GetTransformer, request)
        return answer.transformer

    def list(self, name: str = "") -> Sequence[transformers.Transformer]:
        """All versions of `name`, newest first; of every name where it is empty."""
        request = transformers.ListTransformersRequest(name=name)
        answer: transformers.ListTransformersResponse = call(self.stub.ListTransformers, request)
        return answer.transformers

    def record_selection(self, selection: transformers.Selection) -> transformers.Selection:
        """Keep a report of `millrace.selection.select` as the next version of its name.

        A feature service keeps only what it selected by the tag `millrace.selection: name@version`.
        """
        request = transformers.RecordSelectionRequest(selection=selection)
        answer: transformers.RecordSelectionResponse = call(self.stub.RecordSelection, request)
        return answer.selection

    def selection(self, name: str, version: int = 0) -> transformers.Selection:
        """One version of a selection; 0 is the newest."""
        request = transformers.GetSelectionRequest(name=name, version=version)
        answer: transformers.GetSelectionResponse = call(self.stub.GetSelection, request)
        return answer.selection

    def selections(self, name: str = "") -> Sequence[transformers.Selection]:
        """All versions of `name`, newest first; of every name where it is empty."""
        request = transformers.ListSelectionsRequest(name=name)
        answer: transformers.ListSelectionsResponse = call(self.stub.ListSelections, request)
        return answer.selections
