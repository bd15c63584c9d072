"""A client of schema registries with Confluent's API, for values with its wire format: 0x00, four bytes of schema id, the value.

Schemas never change under an id, so they are kept (a limited number). A registry that does not answer stops the source for a while; an id
that it does not know makes a dead letter, and is asked again after a while.
"""

import base64
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import urllib3
from millrace_kit.clock import Clock
from millrace_kit.errors import InvalidArgumentError, UnavailableError

from millrace_ingestion.sources import protobuf
from millrace_ingestion.sources.avro import avro_reader
from millrace_ingestion.sources.decoding import UndecodableError
from millrace_ingestion.sources.specs import Format

MAGIC = 0
HEAD_BYTES = 5
MAX_SCHEMA_BYTES = 4 << 20
MAX_REFERENCES = 200
# How long an unknown id is not asked for again.
UNKNOWN_S = 30.0
_OK, _NOT_FOUND = 200, 404
_TYPES = {Format.AVRO: "AVRO", Format.PROTOBUF: "PROTOBUF"}


@dataclass(frozen=True)
class Access:
    """How a registry is reached."""

    url: str
    username: str = ""
    password: str = ""
    ca_file: str = ""


class Registry:
    """Reads values by their schema ids.

    Args:
        access: the registry.
        format: of the values.
        timeout_s: longest wait for one answer.
        max_schemas: schemas kept; the least used goes first.
        clock: for ids that were not known.
    """

    def __init__(self, access: Access, kind: Format, *, timeout_s: float, max_schemas: int, clock: Clock) -> None:
        self._access = access
        self._kind = kind
        self._max_schemas = max_schemas
        self._clock = clock
        headers = urllib3.make_headers(basic_auth=f"{access.username}:{access.password}") if access.username else {}
        self._pool = urllib3.PoolManager(
            headers={**headers, "Accept": "application/vnd.schemaregistry.v1+json, application/json"},
            timeout=urllib3.Timeout(total=timeout_s),
            retries=False,
            ca_certs=access.ca_file or None,
        )
        self._lock = threading.Lock()
        self._known: OrderedDict[int, Any] = OrderedDict()
        self._unknown: OrderedDict[int, tuple[float, str]] = OrderedDict()

    def parse(self, value: bytes) -> Mapping[str, Any]:
        """The record of a value with the wire format.

        Raises:
            UndecodableError: it is none.
            UnavailableError: the registry does not answer.
        """
        if len(value) < HEAD_BYTES or value[0] != MAGIC:
            raise UndecodableError("the value has no Confluent wire format: its first byte is not 0")
        number = int.from_bytes(value[1:HEAD_BYTES], "big")
        schema = self._schema(number)
        if self._kind is Format.AVRO:
            read: Callable[[bytes], Mapping[str, Any]] = schema
            return read(value[HEAD_BYTES:])
        indexes, at = protobuf.read_indexes(value, HEAD_BYTES)
        compiled: protobuf.Schema = schema
        return compiled.indexed(indexes)(value[at:])

    def close(self) -> None:
        """Disconnect."""
        self._pool.clear()

    def _schema(self, number: int) -> Any:
        with self._lock:
            if number in self._known:
                self._known.move_to_end(number)
                return self._known[number]
            asked = self._unknown.get(number)
            if asked is not None and self._clock.monotonic() - asked[0] < UNKNOWN_S:
                raise UndecodableError(asked[1], cause="SchemaNotFound")
            try:
                found = self._load(number)
            except (InvalidArgumentError, UndecodableError) as error:
                detail = f"schema {number}: {error}"
                _keep(self._unknown, number, (self._clock.monotonic(), detail), self._max_schemas)
                raise UndecodableError(detail, cause="SchemaNotFound") from None
            _keep(self._known, number, found, self._max_schemas)
            return found

    def _load(self, number: int) -> Any:
        answer = self._get(f"/schemas/ids/{number}")
        kind = answer.get("schemaType", "AVRO")
        if kind != _TYPES[self._kind]:
            raise UndecodableError(f"is {kind}, the source reads {_TYPES[self._kind]}")
        references: OrderedDict[str, str] = OrderedDict()
        self._follow(answer, references)
        if self._kind is Format.AVRO:
            return avro_reader(str(answer["schema"]), list(references.values()))
        files = [*references.items(), (f"schema-{number}.proto", str(answer["schema"]))]
        return protobuf.Schema([_named(name, text) for name, text in files])

    def _follow(self, answer: Mapping[str, Any], found: OrderedDict[str, str]) -> None:
        """Collect what a schema refers to, the innermost first."""
        for reference in answer.get("references") or ():
            name, subject, version = reference["name"], reference["subject"], reference["version"]
            if name in found:
                continue
            if len(found) >= MAX_REFERENCES:
                raise UndecodableError(f"refers to more than {MAX_REFERENCES} schemas")
            found[name] = ""  # a circle ends here
            inner = self._get(f"/subjects/{_quoted(subject)}/versions/{int(version)}")
            self._follow(inner, found)
            found[name] = str(inner["schema"])
            found.move_to_end(name)

    def _get(self, path: str) -> Mapping[str, Any]:
        url = self._access.url + path + ("?format=serialized" if self._kind is Format.PROTOBUF else "")
        try:
            answer = self._pool.request("GET", url, redirect=False, preload_content=False)
            body = answer.read(MAX_SCHEMA_BYTES + 1)
            answer.release_conn()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _unavailable(self._access.url, type(error).__name__) from error
        if answer.status == _NOT_FOUND:
            raise UndecodableError("the registry does not know it")
        if answer.status != _OK:
            raise _unavailable(self._access.url, f"status {answer.status}")
        if len(body) > MAX_SCHEMA_BYTES:
            raise UndecodableError(f"is larger than {MAX_SCHEMA_BYTES} bytes")
        try:
            parsed = json.loads(body)
            str(parsed["schema"])
        except (ValueError, KeyError, TypeError) as error:
            raise _unavailable(self._access.url, f"no schema in its answer ({type(error).__name__})") from error
        return dict(parsed)


def _named(name: str, text: str) -> bytes:
    """A file descriptor as the registry writes it (base64), under the name by which others import it."""
    from google.protobuf import descriptor_pb2
    from google.protobuf.message import DecodeError

    try:
        file = descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(text, validate=True))
    except (DecodeError, ValueError) as error:
        raise UndecodableError(f"{name} is no serialized descriptor: {error}") from None
    file.name = name
    return file.SerializeToString()


def _quoted(subject: str) -> str:
    from urllib.parse import quote

    return quote(str(subject), safe="")


def _keep(kept: OrderedDict[int, Any], number: int, value: Any, limit: int) -> None:
    kept[number] = value
    kept.move_to_end(number)
    while len(kept) > limit:
        kept.popitem(last=False)


def _unavailable(url: str, what: str) -> UnavailableError:
    return UnavailableError("SCHEMA_REGISTRY_UNAVAILABLE", f"{url}: {what}", {"url": url, "cause": what})
