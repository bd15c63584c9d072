"""Who may read or change which features: Feast's `Permission` objects, decided by Feast's own rules about the caller's certificate.

Without permissions in the registry everything is allowed, as without this module. With them, what no permission allows is refused. Permissions
are no part of the definitions' hash: going back to earlier definitions does not bring back the rights of that time.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NoReturn

import grpc
from millrace_kit.clock import Clock
from millrace_kit.errors import InvalidArgumentError, MillraceError
from millrace_kit.sql import reading, writing
from sqlalchemy import Engine, delete, insert, select

from millrace_feature.feast_import import import_feast
from millrace_feature.settings import AccessSettings
from millrace_feature.tables import access_rules_table, audit_table
from millrace_feature.versioning.history import utc

log = logging.getLogger(__name__)

MAX_DECISIONS = 4096
"""Decisions remembered, each for a caller, an action and a resource."""
MAX_REFUSALS = 1024
"""Refusals remembered, so that a caller who asks again and again fills no table."""
REPEAT_AFTER = timedelta(minutes=1)
TRIM_EVERY = 100
ANYBODY = ""
KINDS = (
    ("entities", "Entity"),
    ("data_sources", "DataSource"),
    ("feature_views", "FeatureView"),
    ("stream_feature_views", "StreamFeatureView"),
    ("on_demand_feature_views", "OnDemandFeatureView"),
    ("feature_services", "FeatureService"),
)
"""Field of Feast's registry -> Feast's type."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: the names in a verified certificate, none where calls carry none."""

    names: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The first name, for records."""
        return self.names[0] if self.names else ANYBODY


@dataclass(frozen=True, slots=True)
class Resource:
    """A Feast object as far as rights go."""

    kind: str
    """Feast's type, for example "FeatureView"."""
    name: str
    tags: Mapping[str, str]


class AccessDeniedError(MillraceError):
    """The permissions in force do not let this caller do that."""

    def __init__(self, caller: Caller, action: str, resource: Resource, reason: str) -> None:
        who, what = caller.name or "a caller without a certificate", f"{resource.kind}/{resource.name}"
        super().__init__(
            grpc.StatusCode.PERMISSION_DENIED,
            "FEATURE_ACCESS_DENIED",
            f"{who} may not {action} {what}: {reason}",
            {"caller": caller.name, "action": action, "resource": what},
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the audit."""

    number: int
    at: datetime
    caller: str
    action: str
    resource: str
    allowed: bool
    detail: str


class Audit:
    """The newest `max_rows` changes and refusals, in SQL."""

    def __init__(self, engine: Engine, clock: Clock, max_rows: int) -> None:
        self._engine = engine
        self._clock = clock
        self._max_rows = max_rows
        self._refused: dict[tuple[str, str, str], datetime] = {}

    def add(self, caller: Caller, action: str, resource: str, *, allowed: bool, detail: str = "") -> None:
        """Write a line; of equal refusals one a minute."""
        now = self._clock.now()
        if not allowed:
            key = (caller.name, action, resource)
            if key in self._refused and now - self._refused[key] < REPEAT_AFTER:
                return
            if len(self._refused) >= MAX_REFUSALS:
                self._refused.clear()
            self._refused[key] = now
        row = {
            "at": now,
            "caller": caller.name[:256],
            "action": action,
            "resource": resource[:512],
            "allowed": allowed,
            "detail": detail[:1024],
        }
        with writing(self._engine) as connection:
            number = connection.execute(insert(audit_table).values(row)).inserted_primary_key
            if number is not None and number[0] % TRIM_EVERY == 0:
                connection.execute(delete(audit_table).where(audit_table.c.id <= number[0] - self._max_rows))

    def entries(self, *, before: int | None, limit: int, denied_only: bool) -> Sequence[Entry]:
        """The newest lines with numbers below `before`."""
        query = select(audit_table).order_by(audit_table.c.id.desc()).limit(limit)
        if before is not None:
            query = query.where(audit_table.c.id < before)
        if denied_only:
            query = query.where(audit_table.c.allowed.is_(False))
        with reading(self._engine) as connection:
            rows = connection.execute(query).all()
        return [Entry(r.id, utc(r.at), r.caller, r.action, r.resource, r.allowed, r.detail) for r in rows]


class Access:
    """Decides, and writes down what it refuses. Usable from any thread.

    Args:
        engine: of the service's database.
        audit: told of refusals.
        settings: roles, and who may do everything.
        clock: wall clock.
        registry: the serialized Feast registry in force; None before anything is applied.
    """

    def __init__(
        self,
        engine: Engine,
        audit: Audit,
        settings: AccessSettings,
        clock: Clock,
        registry: Callable[[], bytes | None],
    ) -> None:
        self._engine = engine
        self._audit = audit
        self._settings = settings
        self._clock = clock
        self._registry = registry
        self._version = 0
        self._permissions: list[Any] = []
        self._content = b""
        self._resources: dict[tuple[str, str], Resource] | None = None
        self._decisions: dict[tuple[tuple[str, ...], str, str, str], str] = {}
        self.look()

    @property
    def is_open(self) -> bool:
        """Whether everything is allowed, because nobody has said what is."""
        return not self._permissions

    def look(self) -> None:
        """Read the permissions again when others are in force."""
        newest = select(access_rules_table).order_by(access_rules_table.c.id.desc()).limit(1)
        with reading(self._engine) as connection:
            row = connection.execute(newest).first()
        if row is not None and row.id != self._version:
            self._permissions, self._content, self._version = _permissions(row.permissions), row.permissions, row.id
            log.info("%d permissions are in force", len(self._permissions))
            self.forget()

    def forget(self) -> None:
        """Forget decisions, because other definitions are in force."""
        self._resources = None
        self._decisions.clear()

    def check(self, caller: Caller, action: str, kind: str, name: str) -> None:
        """Refuse unless the caller may do `action` (Feast's name, `read_online`) to the object of Feast's type `kind` called `name`.

        Raises:
            AccessDeniedError: no permission allows it.
        """
        if not self._permissions:
            return
        key = (caller.names, action, kind, name)
        reason = self._decisions.get(key)
        if reason is None:
            reason = self._decision(caller, action, self._resource(kind, name))
            if len(self._decisions) >= MAX_DECISIONS:
                self._decisions.clear()
            self._decisions[key] = reason
        if reason:
            self._refuse(caller, action, Resource(kind, name, {}), reason)

    def check_features(self, caller: Caller, features: Sequence[str]) -> None:
        """Refuse unless the caller may read features ("view__feature") offline: every view that a name may mean has to be allowed.

        Raises:
            AccessDeniedError: one of them is not.
        """
        known = self._known()
        views = {name: kind for kind, name in known if kind.endswith("FeatureView")}
        wanted = {name for feature in features for name in views if feature.startswith(f"{name}__")}
        for name in sorted(wanted):
            self.check(caller, "read_offline", views[name], name)
        for feature in features:
            if not any(feature.startswith(f"{name}__") for name in wanted):  # an alias hides its view
                self.check(caller, "read_offline", "FeatureView", feature.partition("__")[0])

    def check_views(self, caller: Caller, action: str, names: Sequence[str]) -> None:
        """Refuse unless the caller may do `action` to each of these views.

        Raises:
            AccessDeniedError: one of them is not allowed.
        """
        kinds = {name: kind for kind, name in self._known() if kind.endswith("FeatureView")}
        for name in dict.fromkeys(names):
            self.check(caller, action, kinds.get(name, "FeatureView"), name)

    def check_changes(self, caller: Caller, changes: Iterable[tuple[str, Resource]]) -> None:
        """Refuse unless the caller may make each change: (`create`, `update` or `delete`, object).

        Raises:
            AccessDeniedError: one of them is not allowed.
        """
        for action, resource in changes if self._permissions else ():
            if reason := self._decision(caller, action, resource):
                self._refuse(caller, action, resource, reason)

    def _decision(self, caller: Caller, action: str, resource: Resource) -> str:
        if not set(caller.names).isdisjoint(self._settings.administrators):
            return ""
        return self._decided(caller, action, resource)

    def _refuse(self, caller: Caller, action: str, resource: Resource, reason: str) -> NoReturn:
        self._audit.add(caller, action, f"{resource.kind}/{resource.name}", allowed=False, detail=reason)
        raise AccessDeniedError(caller, action, resource, reason)

    def replace(self, caller: Caller, permissions: bytes) -> bool:
        """Put other permissions in force (a serialized registry with nothing else in it); False when they are.

        Raises:
            AccessDeniedError: the caller may not update permissions.
        """
        if permissions == self._content:
            return False
        self.check(caller, "update", "Permission", "permissions")
        row = {"at": self._clock.now(), "author": caller.name[:256], "permissions": permissions}
        with writing(self._engine) as connection:
            connection.execute(insert(access_rules_table).values(row))
        self.look()
        self._audit.add(caller, "permissions", "Permission", allowed=True, detail=f"{len(self._permissions)} in force")
        return True

    def _decided(self, caller: Caller, action: str, resource: Resource) -> str:
        """Why it is refused; empty when it is allowed: by one permission that covers it, as in Feast."""
        from feast.permissions.action import AuthzedAction
        from feast.permissions.user import User

        roles = [role for role, names in self._settings.roles.items() if not set(names).isdisjoint(caller.names)]
        # A certificate's own name is a role, a group and a namespace too, so small installations need no table of roles.
        own = [*caller.names, *roles]
        user = User(caller.name or "anybody", roles=own, groups=own, namespaces=own)
        reasons = []
        for permission in self._permissions:
            if not _covers(permission, resource) or not permission.match_actions([AuthzedAction(action)]):
                continue
            # Feast writes its AllowAll as no policy at all.
            granted, reason = (True, "") if permission.policy is None else permission.policy.validate_user(user)
            if granted:
                return ""
            reasons.append(f"{permission.name}: {reason}")
        return "; ".join(reasons) or "no permission covers it"

    def _resource(self, kind: str, name: str) -> Resource:
        """The object with its tags; one that is not in force has none."""
        return self._known().get((kind, name)) or Resource(kind, name, {})

    def _known(self) -> Mapping[tuple[str, str], Resource]:
        if self._resources is None:
            self._resources = resources_of(self._registry() or b"")
        return self._resources


def resources_of(registry: bytes) -> dict[tuple[str, str], Resource]:
    """The objects of a serialized registry by Feast's type and name."""
    import_feast()
    from feast.protos.feast.core.Registry_pb2 import Registry

    content = Registry.FromString(registry)
    specs = [
        (kind, item if kind == "DataSource" else item.spec) for field, kind in KINDS for item in getattr(content, field)
    ]
    return {(kind, spec.name): Resource(kind, spec.name, dict(spec.tags)) for kind, spec in specs}


def _covers(permission: Any, resource: Resource) -> bool:
    """Whether a permission is about an object.

    Feast 0.67 compares `required_tags` with an attribute that no object has, and so gives rights to objects without the tags; here they are
    compared with the object's tags.
    """
    import feast
    from feast.data_source import DataSource
    from feast.permissions.permission import Permission

    others = {"DataSource": DataSource, "Permission": Permission}
    cls = others.get(resource.kind) or getattr(feast, resource.kind)
    if not issubclass(cls, tuple(permission.types)):
        return False
    if permission.name_patterns and not any(re.fullmatch(p, resource.name) for p in permission.name_patterns):
        return False
    return all(resource.tags.get(tag) == value for tag, value in (permission.required_tags or {}).items())


def _permissions(content: bytes) -> list[Any]:
    import_feast()
    from feast.permissions.permission import Permission
    from feast.protos.feast.core.Registry_pb2 import Registry

    return [Permission.from_proto(proto) for proto in Registry.FromString(content).permissions]


def split_permissions(registry: bytes) -> tuple[bytes, bytes]:
    """(a serialized registry without its permissions, a registry with them alone in canonical form).

    Raises:
        InvalidArgumentError: it is no registry.
    """
    import_feast()
    from feast.protos.feast.core.Registry_pb2 import Registry
    from google.protobuf.message import DecodeError

    try:
        content = Registry.FromString(registry)
    except DecodeError:
        raise InvalidArgumentError("feast_registry", "is no serialized feast.core.Registry") from None
    if not content.permissions:
        return registry, b""
    rules = Registry()
    for permission in sorted(content.permissions, key=lambda p: str(p.spec.name)):
        rules.permissions.add(spec=permission.spec).spec.ClearField("project")
    del content.permissions[:]
    found = rules.SerializeToString(deterministic=True)
    try:
        for permission in _permissions(found):
            for pattern in permission.name_patterns:
                re.compile(pattern)
    except Exception as error:  # Feast raises whatever its parsers meet
        raise InvalidArgumentError("feast_registry", f"holds a permission that cannot be read: {error}") from error
    return content.SerializeToString(), found
