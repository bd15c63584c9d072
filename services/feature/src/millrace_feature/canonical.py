"""What a Feast registry means, whoever wrote it and when: its canonical form, and a fingerprint of the functions it carries.

Two registries of the same meaning get the same definitions hash, so applying a repository again changes nothing.
"""

import hashlib
import types
from collections.abc import Mapping
from typing import Any

from millrace_kit.errors import InvalidArgumentError

FIELD = "feast_registry"
"""Where a caller gave the registry, for errors."""
MAX_OBJECTS = 10_000


def canonical_registry(registry: Any, project: str) -> Any:
    """The same objects without times or bookkeeping, named, sorted, and all of one project."""
    from feast.protos.feast.core.Registry_pb2 import Registry

    clean = Registry(registry_schema_version=registry.registry_schema_version)
    for kind in (
        "entities",
        "data_sources",
        "feature_views",
        "stream_feature_views",
        "on_demand_feature_views",
        "feature_services",
    ):
        seen: set[str] = set()
        copies = []
        for item in getattr(registry, kind):
            copy = type(item)()
            copy.CopyFrom(item)
            _forget_times(copy)
            spec = copy if kind == "data_sources" else copy.spec
            if not spec.name:
                raise InvalidArgumentError(FIELD, f"one of {kind} has no name")
            if spec.name in seen:
                raise InvalidArgumentError(FIELD, f"{kind} holds {spec.name!r} twice")
            seen.add(spec.name)
            spec.project = project
            if kind == "stream_feature_views":  # Feast writes their fields in the order of a Python set
                fields = sorted(spec.features, key=lambda f: f.name)
                del spec.features[:]
                spec.features.extend(fields)
            copies.append(copy)
        if len(copies) > MAX_OBJECTS:
            raise InvalidArgumentError(FIELD, f"{kind} holds more than {MAX_OBJECTS} objects")
        getattr(clean, kind).extend(sorted(copies, key=lambda c: c.name if kind == "data_sources" else c.spec.name))
    for item in registry.permissions, registry.label_views, registry.saved_datasets:
        if len(item):
            raise InvalidArgumentError(FIELD, f"{type(item[0]).__name__} objects are not supported")
    return clean


def _forget_times(message: Any) -> None:
    """Clear every `meta` of a Feast message, however deep: times of creation, versions, materialization."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if field.name == "meta":
            message.ClearField("meta")
        elif field.message_type.GetOptions().map_entry:
            if field.message_type.fields_by_name["value"].message_type is not None:
                for item in value.values():
                    _forget_times(item)
        elif field.is_repeated:
            for item in value:
                _forget_times(item)
        else:
            _forget_times(value)


def fingerprint(value: object, seen: frozenset[int] = frozenset()) -> str:
    """Text that is equal for functions that do the same: code, constants and the globals they use, but no paths or line numbers."""
    if id(value) in seen:
        return "recursive"
    inside = seen | {id(value)}
    if isinstance(value, types.FunctionType):
        names = _global_names(value.__code__)
        used = {name: value.__globals__[name] for name in sorted(names) if name in value.__globals__}
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        parts: list[object] = [value.__code__, value.__defaults__, value.__kwdefaults__, cells, used]
        return f"function({','.join(fingerprint(p, inside) for p in parts)})"
    if isinstance(value, types.CodeType):
        code: list[object] = [
            value.co_code,
            value.co_consts,
            value.co_names,
            value.co_varnames,
            value.co_freevars,
            value.co_flags,
        ]
        return f"code({','.join(fingerprint(p, inside) for p in code)})"
    if isinstance(value, types.ModuleType):
        return f"module({value.__name__})"
    if isinstance(value, Mapping):
        return (
            "{" + ",".join(sorted(f"{fingerprint(k, inside)}:{fingerprint(v, inside)}" for k, v in value.items())) + "}"
        )
    if isinstance(value, frozenset | set):
        return "set(" + ",".join(sorted(fingerprint(v, inside) for v in value)) + ")"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}(" + ",".join(fingerprint(v, inside) for v in value) + ")"
    if isinstance(value, type):
        return f"class({value.__module__}.{value.__qualname__})"
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    import dill

    return f"{type(value).__name__}({hashlib.sha256(dill.dumps(value, recurse=True)).hexdigest()})"


def _global_names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return names
