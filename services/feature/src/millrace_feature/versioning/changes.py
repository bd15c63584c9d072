"""What differs between two versions of definitions, object by object."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from millrace_feature.feast_import import import_feast
from millrace_feature.versioning.access import KINDS, Resource

Kind = Literal["added", "changed", "removed"]


@dataclass(frozen=True, slots=True)
class Change:
    """One object that differs."""

    kind: Kind
    type: str
    """Feast's, for example "FeatureView"."""
    name: str
    fields: tuple[str, ...]
    """Of a changed object, by their path in Feast's message."""
    before: Resource | None
    after: Resource | None

    @property
    def needs(self) -> list[tuple[str, Resource]]:
        """What a caller must be allowed to do: (action, object). A changed object is judged by its tags before and after."""
        action = {"added": "create", "changed": "update", "removed": "delete"}[self.kind]
        return [(action, resource) for resource in (self.before, self.after) if resource is not None]


def changes_between(before: bytes, after: bytes) -> list[Change]:
    """What differs between two canonical serialized registries, sorted by type and name."""
    import_feast()
    from feast.protos.feast.core.Registry_pb2 import Registry

    old, new = (Registry.FromString(content) for content in (before, after))
    found = []
    for field, kind in KINDS:
        olds, news = ({spec.name: spec for spec in _specs(registry, field)} for registry in (old, new))
        for name in sorted({*olds, *news}):
            a, b = olds.get(name), news.get(name)
            if a == b:
                continue
            fields = tuple(_differing(a, b, "")) if a is not None and b is not None else ()
            word: Kind = "added" if a is None else "removed" if b is None else "changed"
            resources = [Resource(kind, name, dict(spec.tags)) if spec is not None else None for spec in (a, b)]
            found.append(Change(word, kind, name, fields, *resources))
    return sorted(found, key=lambda change: (change.type, change.name))


def _specs(registry: Any, field: str) -> list[Any]:
    return [item if field == "data_sources" else item.spec for item in getattr(registry, field)]


def _differing(a: Any, b: Any, prefix: str) -> Iterator[str]:
    for field in a.DESCRIPTOR.fields:
        one, other = getattr(a, field.name), getattr(b, field.name)
        if one == other:
            continue
        if field.message_type is not None and not field.is_repeated:
            yield from _differing(one, other, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"
