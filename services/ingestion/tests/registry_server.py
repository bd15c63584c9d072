"""A small schema registry that speaks Confluent's API over HTTP."""

import base64
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse


@dataclass
class Registry:
    """What it holds, and what it was asked."""

    url: str = ""
    schemas: dict[int, dict[str, Any]] = field(default_factory=dict)
    subjects: dict[tuple[str, int], int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    authorizations: set[str] = field(default_factory=set)
    broken: bool = False

    def add(
        self, number: int, kind: str, schema: str | bytes, subject: str = "", references: Sequence[dict[str, Any]] = ()
    ) -> None:
        text = schema if isinstance(schema, str) else base64.b64encode(schema).decode()
        self.schemas[number] = {"schema": text, "schemaType": kind, "references": list(references)}
        if subject:
            self.subjects[subject, 1] = number

    def find(self, path: str) -> dict[str, Any] | None:
        parts = [unquote(part) for part in path.strip("/").split("/")]
        match parts:
            case ["schemas", "ids", number]:
                return self.schemas.get(int(number))
            case ["subjects", subject, "versions", version]:
                return self.schemas.get(self.subjects.get((subject, int(version)), -1))
        return None


@contextmanager
def schema_registry() -> Iterator[Registry]:
    registry = Registry()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            registry.asked.append(self.path)
            registry.authorizations.add(self.headers.get("Authorization", ""))
            found = None if registry.broken else registry.find(urlparse(self.path).path)
            status = 503 if registry.broken else 200 if found else 404
            body = json.dumps(found or {"error_code": 40403, "message": "Schema not found"}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            del arguments

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    registry.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield registry
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
