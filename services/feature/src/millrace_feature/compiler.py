"""From a serialized Feast registry to `Definitions`: the only place that reads Feast's messages.

Feast carries an OnDemandFeatureView's function as a dill pickle, so applying definitions runs code of the person who applies them,
in this process, by Feast's design. Who may call ApplyDefinitions may run code here.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from millrace_kit.errors import InvalidArgumentError, MillraceError

from millrace_feature.canonical import FIELD, canonical_registry, fingerprint
from millrace_feature.feast_import import import_feast
from millrace_feature.plan import (
    Aggregate,
    Definitions,
    LatestView,
    ServicePlan,
    Transform,
    ValueType,
    VectorField,
    View,
    ViewUse,
    WindowView,
)
from millrace_feature.transformers.attach import Attachments, Pinned
from millrace_feature.vector_fields import LIST_TYPES, element_names, not_searched, vector_field
from millrace_feature.window_definitions import HEAD_TAG, LATE_TAG, aggregate_of, duration_us, head_us_of, hop_us_of

DUMMY_ENTITY = "__dummy"
_TYPES: Mapping[str, ValueType] = {
    "STRING": "string",
    "INT32": "int64",
    "INT64": "int64",
    "FLOAT": "double",
    "DOUBLE": "double",
    "BOOL": "bool",
    "UNIX_TIMESTAMP": "timestamp",
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """Definitions and the registry they came from in canonical form."""

    definitions: Definitions
    registry: bytes


def compile_registry(project: str, content: bytes, pinned: Pinned | None = None) -> Compiled:
    """Check and compile a serialized `feast.core.Registry`.

    Args:
        project: name of the Feast project.
        content: the registry.
        pinned: where tags that name fitted transformers and selections lead; None refuses such tags.

    Raises:
        InvalidArgumentError: it is no registry, or holds something this service cannot compute; the message names the object.
    """
    import_feast()
    from feast.protos.feast.core.Registry_pb2 import Registry
    from google.protobuf.message import DecodeError

    registry = Registry()
    try:
        registry.ParseFromString(content)
    except DecodeError:
        raise InvalidArgumentError(FIELD, "is no serialized feast.core.Registry") from None
    try:
        clean = canonical_registry(registry, project)
        definitions = _Compiler(clean, pinned).definitions(project)
        return Compiled(definitions, clean.SerializeToString(deterministic=True))
    except MillraceError:
        raise
    except Exception as error:  # Feast raises whatever its parsers meet in a strange message
        raise InvalidArgumentError(FIELD, f"cannot be read: {type(error).__name__}: {error}") from error


def _type_name(value_type: Any) -> str:
    from feast.protos.feast.types.Value_pb2 import ValueType as FeastType

    return str(FeastType.Enum.Name(value_type))


class _Compiler:
    """One registry's objects by name."""

    def __init__(self, registry: Any, pinned: Pinned | None) -> None:
        self._registry = registry
        self._pinned = pinned
        self._pins: list[str] = []
        self._entities = {e.spec.name: e.spec for e in registry.entities}
        self._transforms = {v.spec.name: v.spec for v in registry.on_demand_feature_views if not v.spec.disabled}
        self._key_types: dict[str, ValueType] = {}
        self._feast_keys: dict[str, str] = {}
        self._event_times: dict[str, str] = {}
        self._views: dict[str, View] = {}
        self._feature_types: dict[str, dict[str, str]] = {}

    def definitions(self, project: str) -> Definitions:
        """Compile everything."""
        for source in self._registry.data_sources:
            self._source(source)
        for view in self._registry.feature_views:
            self._add_view(self._latest(view.spec), view.spec)
        for view in self._registry.stream_feature_views:
            compiled = self._windows(view.spec) if view.spec.aggregations else self._latest(view.spec)
            self._add_view(compiled, view.spec)
        if overlap := sorted(set(self._views) & set(self._transforms)):
            raise InvalidArgumentError(FIELD, f"{overlap[0]!r} names two views")
        services = tuple(self._service(service.spec) for service in self._registry.feature_services)
        on_demand = tuple(plan for spec in self._transforms.values() if (plan := self._alone(spec)) is not None)
        return Definitions(
            project=project,
            digest=self._digest(),
            event_times=tuple(sorted(self._event_times.items())),
            key_types=tuple(sorted(self._key_types.items())),
            views=tuple(self._views[name] for name in sorted(self._views)),
            services=services,
            on_demand=on_demand,
            feast_types=self._feast_types(),
        )

    def _alone(self, spec: Any) -> ServicePlan | None:
        """An on-demand view as if a service held nothing else; None for one that no service could use."""
        uses: dict[str, ViewUse] = {}
        request: dict[str, ValueType] = {}
        try:
            transform = self._transform(spec, uses, request)
        except InvalidArgumentError:
            return None
        features = tuple(f"{spec.name}__{name}" for name in transform.outputs)
        return ServicePlan(spec.name, features, tuple(uses.values()), (transform,), tuple(sorted(request.items())))

    def _feast_types(self) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
        """Feast's own types, which its clients get their values in."""
        known: dict[str, Mapping[str, str]] = {"": self._feast_keys, **self._feature_types}
        for name, spec in self._transforms.items():
            known[name] = {f.name: _type_name(f.value_type) for f in spec.features}
        return tuple((name, tuple(sorted(types.items()))) for name, types in sorted(known.items()))

    def _digest(self) -> str:
        """SHA-256 over the canonical registry with every pickled function replaced by its fingerprint."""
        import dill

        copy = type(self._registry)()
        copy.CopyFrom(self._registry)
        for view in copy.on_demand_feature_views:
            function = view.spec.feature_transformation.user_defined_function
            if function.body:
                function.body = fingerprint(dill.loads(function.body)).encode()  # noqa: S301 - see the module's docstring
            view.spec.ClearField("user_defined_function")
        pins = "".join(f"\0{digest}" for digest in self._pins).encode()
        return hashlib.sha256(copy.SerializeToString(deterministic=True) + pins).hexdigest()

    def _source(self, source: Any) -> tuple[str, str]:
        """(contract, event-time column); a stream source takes the column of its batch source."""
        column = source.timestamp_field or source.batch_source.timestamp_field
        if column:
            known = self._event_times.setdefault(source.name, column)
            if known != column:
                raise InvalidArgumentError(
                    FIELD, f"data source {source.name!r} has two event times, {known!r} and {column!r}"
                )
        return source.name, column

    def _add_view(self, view: View, spec: Any) -> None:
        if view.name in self._views:
            raise InvalidArgumentError(FIELD, f"{view.name!r} names two views")
        self._views[view.name] = view
        self._feature_types[view.name] = {f.name: _type_name(f.value_type) for f in spec.features}

    def _place(self, spec: Any) -> tuple[str, str, tuple[str, ...]]:
        """(contract, event time, join keys) of a view."""
        source = spec.stream_source if spec.stream_source.name else spec.batch_source
        contract, column = self._source(source)
        column = getattr(spec, "timestamp_field", "") or column
        if not contract or not column:
            raise InvalidArgumentError(FIELD, f"view {spec.name!r} needs a named source with a timestamp_field")
        keys = []
        for name in spec.entities:
            entity = self._entities.get(name)
            if name == DUMMY_ENTITY or entity is None:
                raise InvalidArgumentError(FIELD, f"view {spec.name!r} needs an entity of this registry, not {name!r}")
            keys.append(entity.join_key or entity.name)
            kinds = {c.name: c.value_type for c in spec.entity_columns}
            self._key_type(keys[-1], _type_name(kinds.get(keys[-1], entity.value_type)))
            self._feast_keys.setdefault(keys[-1], _type_name(kinds.get(keys[-1], entity.value_type)))
        if not keys or len(set(keys)) != len(keys):
            raise InvalidArgumentError(FIELD, f"view {spec.name!r} needs one or more distinct entities")
        return contract, column, tuple(keys)

    def _key_type(self, name: str, feast_type: str) -> ValueType:
        kind: ValueType = "string" if feast_type == "INVALID" else _TYPES.get(feast_type, "double")
        if kind not in {"string", "int64"}:
            raise InvalidArgumentError(FIELD, f"join key {name!r} is {feast_type}; it must be STRING or an integer")
        if self._key_types.setdefault(name, kind) != kind:
            raise InvalidArgumentError(FIELD, f"join key {name!r} has two types")
        return kind

    def _latest(self, spec: Any) -> LatestView:
        contract, column, keys = self._place(spec)
        features = tuple(f.name for f in spec.features if f.name not in keys and f.name != column)
        vectors: list[VectorField] = []
        for field in spec.features:
            kind = _type_name(field.value_type)
            if kind in LIST_TYPES and field.name in features:
                vectors.append(vector_field(spec.name, field, kind))
                continue
            not_searched(spec.name, field)
            if field.name in features and kind not in _TYPES:
                raise InvalidArgumentError(FIELD, f"{spec.name}.{field.name} has a type this service does not keep")
        if not features:
            raise InvalidArgumentError(FIELD, f"view {spec.name!r} needs a schema with at least one feature")
        feast_keys = tuple(c.name for c in spec.entity_columns) if vectors else ()
        ttl_us = spec.ttl.ToMicroseconds()
        return LatestView(spec.name, contract, column, keys, ttl_us, features, tuple(vectors), feast_keys)

    def _windows(self, spec: Any) -> WindowView:
        contract, column, keys = self._place(spec)
        for field in spec.features:
            not_searched(spec.name, field)
        hop_us = hop_us_of(spec)
        found: dict[str, Aggregate] = {}
        for aggregation in spec.aggregations:
            aggregate = aggregate_of(spec.name, aggregation, hop_us)
            if found.setdefault(aggregate.feature, aggregate) != aggregate:
                raise InvalidArgumentError(FIELD, f"{spec.name}.{aggregate.feature} is defined twice")
        names = [f.name for f in spec.features if f.name not in keys and f.name != column] or list(found)
        if missing := [name for name in names if name not in found]:
            raise InvalidArgumentError(FIELD, f"{spec.name}.{missing[0]} has no aggregation of that name")
        aggregates = tuple(found[name] for name in names)
        head_us = head_us_of(spec.name, spec.tags.get(HEAD_TAG, ""), hop_us)
        late_us = duration_us(spec.name, LATE_TAG, spec.tags[LATE_TAG]) if LATE_TAG in spec.tags else 0
        arrived_at = self._arrived_at(spec, contract) if late_us else ""
        return WindowView(spec.name, contract, column, keys, hop_us, aggregates, head_us, arrived_at, late_us)

    def _arrived_at(self, spec: Any, contract: str) -> str:
        source = spec.stream_source if spec.stream_source.name else spec.batch_source
        column = source.created_timestamp_column or source.batch_source.created_timestamp_column
        if not column:
            problem = f"has tag {LATE_TAG}, so its source {contract!r} needs a created_timestamp_column"
            raise InvalidArgumentError(FIELD, f"view {spec.name!r} {problem}: the stream and the lake judge rows by it")
        return str(column)

    def _service(self, spec: Any) -> ServicePlan:
        uses: dict[str, ViewUse] = {}
        transforms: dict[str, Transform] = {}
        request: dict[str, ValueType] = {}
        places: dict[str, tuple[str, str]] = {}
        held: set[tuple[str, str]] = set()
        attached = Attachments(spec.name, spec.tags, self._pinned)
        for projection in spec.features:
            name = projection.feature_view_name
            alias = projection.feature_view_name_alias or name
            columns = [c.name for c in projection.feature_columns]
            if name in self._transforms:
                transforms[name] = self._transform(self._transforms[name], uses, request)
                alias, known = name, set(transforms[name].outputs)
                columns = columns or list(transforms[name].outputs)
            else:
                use = self._use(projection, f"feature service {spec.name!r}")
                if uses.setdefault(alias, use) != use:
                    raise InvalidArgumentError(FIELD, f"feature service {spec.name!r} uses {alias!r} in two ways")
                columns = columns or list(self._views[name].features)
                known = {f for f in self._views[name].features if self._is_number(name, f)}
                known |= {f for f in self._views[name].features if f"{alias}__{f}" in attached.inputs}
            for column in columns:
                vector = self._vector(name, column)
                if column not in known and vector is None:
                    problem = "is no feature the vector can hold (numbers and booleans; encode texts by a transformer)"
                    raise InvalidArgumentError(FIELD, f"{name}.{column} {problem}")
                held.add((alias, column))
                for full_name in _names(f"{alias}__{column}", vector):
                    if vector is not None and not attached.inputs.isdisjoint({full_name, f"{alias}__{column}"}):
                        problem = f"is taken by a transformer of {spec.name!r}; they take no embeddings"
                        raise InvalidArgumentError(FIELD, f"{name}.{column} {problem}")
                    if places.setdefault(full_name, (alias, column)) != (alias, column):
                        raise InvalidArgumentError(FIELD, f"feature service {spec.name!r} has two {full_name}")
        if not places or len(held) < sum(len(p.feature_columns) for p in spec.features):
            raise InvalidArgumentError(FIELD, f"feature service {spec.name!r} needs one or more distinct features")
        features, fitted = attached.applied(places, [*uses, *transforms])
        if not features:
            raise InvalidArgumentError(FIELD, f"the vector of feature service {spec.name!r} holds nothing")
        self._pins += attached.digests
        return ServicePlan(
            spec.name,
            tuple(features),
            tuple(uses.values()),
            (*transforms.values(), *fitted),
            tuple(sorted(request.items())),
        )

    def _vector(self, view: str, feature: str) -> VectorField | None:
        """The embedding of that name, where it has a fixed length and so fits a model's vector."""
        found = self._views.get(view)
        field = found.vector(feature) if isinstance(found, LatestView) else None
        if field is not None and not field.length:
            problem = "has no vector_length; a model's vector holds embeddings of a fixed length only"
            raise InvalidArgumentError(FIELD, f"{view}.{feature} {problem}")
        return field

    def _is_number(self, view: str, feature: str) -> bool:
        if isinstance(self._views[view], WindowView):
            return True
        return self._feature_types[view].get(feature, "") in {"INT32", "INT64", "FLOAT", "DOUBLE", "BOOL"}

    def _use(self, projection: Any, where: str) -> ViewUse:
        view = self._views.get(projection.feature_view_name)
        if view is None:
            raise InvalidArgumentError(
                FIELD, f"{where} uses {projection.feature_view_name!r}, which is no enabled view"
            )
        renamed = dict(projection.join_key_map)
        kinds = dict(self._key_types)
        keys = tuple(renamed.get(key, key) for key in view.join_keys)
        for key, name in zip(view.join_keys, keys, strict=True):
            if self._key_types.setdefault(name, kinds[key]) != kinds[key]:
                raise InvalidArgumentError(FIELD, f"join key {name!r} has two types")
            self._feast_keys.setdefault(name, self._feast_keys[key])
        return ViewUse(projection.feature_view_name_alias or view.name, view.name, keys)

    def _transform(self, spec: Any, uses: dict[str, ViewUse], request: dict[str, ValueType]) -> Transform:
        function = spec.feature_transformation.user_defined_function
        if spec.mode != "python" or not function.body or spec.aggregations:
            problem = f"must be a Python-mode function (mode='python'), not {spec.mode or 'pandas'}"
            raise InvalidArgumentError(FIELD, f"on-demand view {spec.name!r} {problem}")
        inputs: list[tuple[str, str]] = []
        fields: list[str] = []
        for _name, source in sorted(spec.sources.items()):
            if source.HasField("request_data_source"):
                for field in source.request_data_source.request_data_options.schema:
                    kind = _TYPES.get(_type_name(field.value_type))
                    if kind is None or request.setdefault(field.name, kind) != kind:
                        raise InvalidArgumentError(
                            FIELD, f"request field {field.name!r} of {spec.name!r} has no usable type"
                        )
                    fields.append(field.name)
            else:
                projection = source.feature_view_projection
                use = self._use(projection, f"on-demand view {spec.name!r}")
                uses.setdefault(use.alias, use)
                known = self._views[use.view].features
                chosen = [c.name for c in projection.feature_columns] or list(known)
                if missing := [c for c in chosen if c not in known]:
                    raise InvalidArgumentError(
                        FIELD, f"on-demand view {spec.name!r} reads {use.view}.{missing[0]}, which is none"
                    )
                inputs.extend((use.alias, c) for c in chosen)
        outputs = tuple(
            f.name for f in spec.features if _type_name(f.value_type) in {"INT32", "INT64", "FLOAT", "DOUBLE", "BOOL"}
        )
        for field in spec.features:
            not_searched(spec.name, field)
        if clash := sorted({f.name for f in spec.features} & {*fields, *(feature for _alias, feature in inputs)}):
            # Feast skips such a function without a word where a column of that name is there already (feast-dev/feast#5534).
            problem = (
                f"computes {clash[0]!r}, which is the name of one of its inputs; give the output a name of its own"
            )
            raise InvalidArgumentError(FIELD, f"on-demand view {spec.name!r} {problem}")
        return Transform(spec.name, tuple(inputs), tuple(_once(fields)), outputs, spec.singleton, function.body)


def _names(feature: str, vector: VectorField | None) -> Iterable[str]:
    """What a feature is called in a service's vector: an embedding is one name a number."""
    return [feature] if vector is None else element_names(feature, vector)


def _once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
