"""Where a source's brokers and schema registry are, and what they must be shown. Secrets come from the settings, never from a source.

A connection has its addresses beside its secrets, so that nobody who may register a source can have a password sent elsewhere.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from millrace_kit.clock import Clock
from millrace_kit.errors import FailedPreconditionError, InvalidArgumentError
from millrace_kit.settings import KafkaSecurity

from millrace_ingestion.settings import SourceConnection
from millrace_ingestion.sources.avro import avro_reader
from millrace_ingestion.sources.decoding import Parse
from millrace_ingestion.sources.protobuf import Schema
from millrace_ingestion.sources.registry import Access, Registry
from millrace_ingestion.sources.specs import FileSpec, Format, TopicSpec
from millrace_ingestion.sources.topic_reader import connection_options


@dataclass(frozen=True)
class Connections:
    """The connections of the settings.

    Args:
        named: by name.
        inline: whether a source may name brokers itself.
        locations: prefixes of paths and URLs below which files may be read.
        timeout_s: longest wait for one answer of a schema registry.
        max_schemas: schemas kept for a source.
        clock: for schemas that were not known.
    """

    named: Mapping[str, SourceConnection]
    inline: bool
    locations: Sequence[str]
    timeout_s: float
    max_schemas: int
    clock: Clock

    def check(self, spec: TopicSpec | FileSpec) -> None:
        """Make sure that a source can be read with these settings.

        Raises:
            InvalidArgumentError: naming the field.
            FailedPreconditionError: the settings do not have, or do not allow, what it names.
        """
        if isinstance(spec, FileSpec):
            for url in spec.urls:
                self._check_location(url)
            return
        if not spec.connection and not self.inline:
            message = "the service reads only connections of its settings (source_connections)"
            raise FailedPreconditionError("BROKERS_NOT_ALLOWED", message)
        if spec.format is not Format.JSON and not spec.schema and not self._access(spec):
            raise InvalidArgumentError("source.kafka.schema", f"connection {spec.connection!r} has no schema registry")
        self.options(spec)
        parse, registry = self.parse(spec)
        del parse
        if registry is not None:
            registry.close()

    def _check_location(self, url: str) -> None:
        fixed = re.split(r"[*?\[]", _as_url(url))[0]
        if not any(fixed.startswith(_as_url(location).rstrip("/") + "/") for location in self.locations):
            raise FailedPreconditionError(
                "LOCATION_NOT_ALLOWED",
                f"{url} is below none of the service's source_locations",
                {"url": url, "locations": ", ".join(self.locations)},
            )

    def options(self, spec: TopicSpec) -> dict[str, Any]:
        """Librdkafka's options for a source."""
        if not spec.connection:
            return connection_options(spec.bootstrap_servers, KafkaSecurity())
        connection = self._connection(spec)
        return connection_options(connection.bootstrap_servers, connection.security)

    def parse(self, spec: TopicSpec) -> tuple[Parse | None, Registry | None]:
        """What reads a source's values (None for JSON without the wire format), and the registry to close afterwards."""
        if spec.schema:
            try:
                if spec.format is Format.AVRO:
                    return avro_reader(spec.schema.decode("utf-8")), None
                return Schema.of_set(spec.schema).named(spec.message_name), None
            except UnicodeDecodeError:
                raise InvalidArgumentError("source.kafka.schema", "is no UTF-8 text") from None
        access = self._access(spec)
        if spec.format is Format.JSON or access is None:
            return None, None
        registry = Registry(
            access, spec.format, timeout_s=self.timeout_s, max_schemas=self.max_schemas, clock=self.clock
        )
        return registry.parse, registry

    def _connection(self, spec: TopicSpec) -> SourceConnection:
        if spec.connection not in self.named:
            message = f"the service's settings have no connection {spec.connection!r} (source_connections)"
            raise FailedPreconditionError("CONNECTION_NOT_CONFIGURED", message, {"connection": spec.connection})
        return self.named[spec.connection]

    def _access(self, spec: TopicSpec) -> Access | None:
        if not spec.connection:
            return Access(spec.registry_url) if spec.registry_url else None
        one = self._connection(spec)
        if not one.schema_registry_url:
            return None
        return Access(
            one.schema_registry_url.rstrip("/"), one.registry_username, one.registry_password, one.registry_ca_file
        )


def _as_url(path: str) -> str:
    return f"file://{path}" if path.startswith("/") else path
