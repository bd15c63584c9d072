"""Fitting, keeping and finding transformers and selections; the edge is `servicer.py`."""

import asyncio
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from google.protobuf import json_format, struct_pb2
from millrace_api.feature.v1 import feature_pb2, transformers_pb2
from millrace_kit.clock import Clock
from millrace_kit.content import ContentStore
from millrace_kit.errors import DataLossError, InvalidArgumentError, UnavailableError

from millrace_feature.catalog import Catalog
from millrace_feature.convert import now_timestamp
from millrace_feature.settings import FeatureSettings
from millrace_feature.transformers.artifact import (
    Artifact,
    Specification,
    SpecificationError,
    from_content,
    specification,
)
from millrace_feature.transformers.attach import Pinned
from millrace_feature.transformers.fitting import fit
from millrace_feature.transformers.store import FittedStore

SELECTION_FORMAT = 1
MAX_SELECTION_FEATURES = 10_000
VERSION_DIGITS = 10
"""A reference of so few characters is a version, a longer one a digest."""


class Transformers:
    """Transformers and selections of one installation."""

    def __init__(
        self, *, store: FittedStore, catalog: Catalog, content: ContentStore, settings: FeatureSettings, clock: Clock
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._content = content
        self._settings = settings
        self._clock = clock
        self._turn = asyncio.Semaphore(settings.max_builds)
        self.pinned = Pinned(self._artifact, self._selected)
        """What tags of feature services may name."""

    async def fit(
        self, name: str, training_set: str, steps: Sequence[transformers_pb2.TransformerStep]
    ) -> transformers_pb2.Transformer:
        """Fit `steps` on a training set and keep them as the next version of `name`.

        Raises:
            InvalidArgumentError: the steps cannot be fitted on that set.
            NotFoundError: there is no such set.
        """
        specifications = [_specification(i, step) for i, step in enumerate(steps)]
        async with self._turn:
            return await asyncio.to_thread(self._fit, name, training_set, specifications)

    def _fit(self, name: str, digest: str, specifications: Sequence[Specification]) -> transformers_pb2.Transformer:
        training_set = feature_pb2.TrainingSet.FromString(self._catalog.training_set(digest))
        scratch = Path(self._settings.state_dir) / "builds"
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=scratch) as folder, _store_answers():
            # The set's own store: another installation may have built it.
            path = ContentStore(training_set.store_url).fetch(training_set.data.sha256, Path(folder) / "data.parquet")
            try:
                artifact = fit(
                    path,
                    specifications,
                    training_set=digest,
                    join_column=training_set.request.join_column,
                    label_column=training_set.label_column,
                )
            except SpecificationError as error:
                raise InvalidArgumentError("steps", str(error)) from error
            self._content.put_bytes(artifact.content)

        def record(version: int) -> bytes:
            return self._message(name, version, artifact).SerializeToString()

        kept = self._store.put("transformer", name, artifact.digest, record)
        return transformers_pb2.Transformer.FromString(kept)

    def _message(self, name: str, version: int, artifact: Artifact) -> transformers_pb2.Transformer:
        steps = [
            transformers_pb2.TransformerStep(
                kind=s.kind, inputs=s.inputs, output=s.output, parameters=_struct(dict(s.parameters))
            )
            for s in artifact.specifications
        ]
        return transformers_pb2.Transformer(
            name=name,
            version=version,
            digest=artifact.digest,
            store_url=self._content.url,
            steps=steps,
            inputs=artifact.inputs,
            outputs=artifact.outputs,
            training_set=artifact.origin.training_set,
            rows=artifact.origin.rows,
            created_at=now_timestamp(self._clock.now()),
        )

    async def transformer(self, name: str, version: int) -> transformers_pb2.Transformer:
        """One version; 0 is the newest."""
        record = await asyncio.to_thread(self._store.get, "transformer", name, version)
        return transformers_pb2.Transformer.FromString(record)

    async def transformers(self, name: str) -> list[transformers_pb2.Transformer]:
        """All versions of `name`, or of every name."""
        records = await asyncio.to_thread(self._store.listed, "transformer", name)
        return [transformers_pb2.Transformer.FromString(record) for record in records]

    async def record_selection(self, selection: transformers_pb2.Selection) -> transformers_pb2.Selection:
        """Keep a report as the next version of its name.

        Raises:
            InvalidArgumentError: it holds no feature, one twice, or none that is selected.
            NotFoundError: there is no such training set.
        """
        names = [score.feature for score in selection.features]
        if not 1 <= len(names) <= MAX_SELECTION_FEATURES or len(set(names)) < len(names) or not all(names):
            raise InvalidArgumentError("selection.features", f"needs 1 to {MAX_SELECTION_FEATURES} different features")
        if not any(score.selected for score in selection.features):
            raise InvalidArgumentError("selection.features", "none is selected")
        return await asyncio.to_thread(self._record, selection)

    def _record(self, selection: transformers_pb2.Selection) -> transformers_pb2.Selection:
        self._catalog.training_set(selection.training_set)
        report = {
            "format": SELECTION_FORMAT,
            "training_set": selection.training_set,
            "parameters": json_format.MessageToDict(selection.parameters),
            "features": [
                {"feature": s.feature, "selected": s.selected, "reason": s.reason, "scores": dict(s.scores)}
                for s in selection.features
            ],
        }
        try:
            text = json.dumps(report, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
        except ValueError:
            raise InvalidArgumentError("selection.features", "a score is not finite; leave it out") from None
        with _store_answers():
            digest = self._content.put_bytes(text.encode())

        def record(version: int) -> bytes:
            kept = transformers_pb2.Selection()
            kept.CopyFrom(selection)
            kept.version, kept.digest = version, digest
            kept.created_at.CopyFrom(now_timestamp(self._clock.now()))
            return kept.SerializeToString()

        return transformers_pb2.Selection.FromString(self._store.put("selection", selection.name, digest, record))

    async def selection(self, name: str, version: int) -> transformers_pb2.Selection:
        """One version; 0 is the newest."""
        record = await asyncio.to_thread(self._store.get, "selection", name, version)
        return transformers_pb2.Selection.FromString(record)

    async def selections(self, name: str) -> list[transformers_pb2.Selection]:
        """All versions of `name`, or of every name."""
        records = await asyncio.to_thread(self._store.listed, "selection", name)
        return [transformers_pb2.Selection.FromString(record) for record in records]

    def _artifact(self, name: str, reference: str) -> Artifact:
        digest = reference
        if len(reference) < VERSION_DIGITS:
            record = self._store.get("transformer", name, int(reference))
            digest = transformers_pb2.Transformer.FromString(record).digest
        try:
            return from_content(self._read(digest))
        except SpecificationError as error:
            message = f"transformer {name}@{reference}: {error}"
            raise DataLossError("TRANSFORMER_UNREADABLE", message, {"digest": digest}) from error

    def _selected(self, name: str, reference: str) -> tuple[str, list[str]]:
        digest = reference
        if len(reference) < VERSION_DIGITS:
            record = self._store.get("selection", name, int(reference))
            digest = transformers_pb2.Selection.FromString(record).digest
        report = json.loads(self._read(digest))
        return digest, [item["feature"] for item in report["features"] if item["selected"]]

    def _read(self, digest: str) -> bytes:
        with _store_answers():
            return self._content.read(digest)


@contextmanager
def _store_answers() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnavailableError("STORE_UNAVAILABLE", "the store of training sets did not answer") from error


def _specification(number: int, step: transformers_pb2.TransformerStep) -> Specification:
    parameters = {name: _plain(value) for name, value in json_format.MessageToDict(step.parameters).items()}
    try:
        return specification(number, step.kind, step.inputs, step.output, parameters)
    except SpecificationError as error:
        raise InvalidArgumentError("steps", str(error)) from error


def _plain(value: Any) -> Any:
    """A Struct knows no whole numbers; parameters do."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _struct(fields: dict[str, Any]) -> struct_pb2.Struct:
    return json_format.ParseDict(fields, struct_pb2.Struct())
