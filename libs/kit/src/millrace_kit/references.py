"""References to secrets inside settings: `${file:/path}` and `${env:NAME}` stand for a file's text and a variable of the environment.

A settings file is a ConfigMap in a cluster and may be read by many; what is secret comes from a mounted Secret instead. Inside a URL
`${url-file:/path}` and `${url-env:NAME}` percent-encode the value, so that a password may hold any character. `$${` is a plain `${`.

Whatever was put in is masked in every log line of this process and in the errors of `settings`.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

MAX_FILE_BYTES = 64 * 1024
MASK = "***"
# Shorter values are not masked: they would blank out half of every line, and are no secrets worth the name.
MIN_MASKED_CHARACTERS = 4

_REFERENCE = re.compile(r"\$\$\{|\$\{(?P<kind>[^:}]*)(?::(?P<name>[^}]*))?(?P<end>\}?)")
# Values this process has read through references; of the process, because its log is.
_secrets: set[str] = set()


class ReferenceProblem(Exception):  # noqa: N818 - becomes a part of SettingsError
    """A reference that cannot be followed; the message names file or variable, never a value."""


def mask(text: str) -> str:
    """`text` without any value that a reference stood for."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, MASK)
    return text


class Expansion:
    """Plain settings with references replaced, and what could not be replaced.

    Args:
        tolerant: leave a reference whose file or variable is not here as it stands, for a check away from the cluster.
        stand_in: put this instead, for keys whose values must have a form that no reference has.
        environment: variables; the process's own when None.
    """

    def __init__(
        self, *, tolerant: bool = False, stand_in: str = "", environment: Mapping[str, str] | None = None
    ) -> None:
        self._tolerant = tolerant
        self._stand_in = stand_in
        self._environment = os.environ if environment is None else environment
        self.problems: list[str] = []
        self.unresolved = 0

    def expand(self, raw: object, key: str = "") -> object:
        """`raw` with the references in all its strings replaced; `key` is its dotted place, for problems."""
        match raw:
            case dict():
                return {name: self.expand(value, f"{key}.{name}" if key else str(name)) for name, value in raw.items()}
            case list():
                return [self.expand(value, f"{key}.{index}" if key else str(index)) for index, value in enumerate(raw)]
            case str():
                return _REFERENCE.sub(lambda found: self._replace(found, key), raw)
        return raw

    def _replace(self, found: re.Match[str], key: str) -> str:
        if found[0] == "$${":
            return "${"
        try:
            value = self._value(found["kind"], found["name"] if found["end"] else "")
        except ReferenceProblem as problem:
            self.problems.append(f"{key or '(top)'}: {problem}")
            return found[0]
        if value is None:
            self.unresolved += 1
            return self._stand_in or found[0]
        for secret in (value, quote(value, safe=""), repr(value)[1:-1]):
            if len(secret) >= MIN_MASKED_CHARACTERS:
                _secrets.add(secret)
        return quote(value, safe="") if found["kind"].startswith("url-") else value

    def _value(self, kind: str, name: str | None) -> str | None:
        if not name:
            raise ReferenceProblem("a reference is ${file:/path} or ${env:NAME}; a plain ${ is written $${")
        match kind:
            case "env" | "url-env":
                if name in self._environment:
                    return self._environment[name]
                return self._absent(f"there is no environment variable {name}")
            case "file" | "url-file":
                return self._file(Path(name))
        raise ReferenceProblem(f"unknown reference ${{{kind}:…}}; known are file, env, url-file, url-env")

    def _file(self, path: Path) -> str | None:
        try:
            with path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            return self._absent(f"{path}: {error.strerror}")
        if len(content) > MAX_FILE_BYTES:
            raise ReferenceProblem(f"{path}: longer than {MAX_FILE_BYTES} bytes")
        try:
            return content.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise ReferenceProblem(f"{path}: no UTF-8 text") from None

    def _absent(self, problem: str) -> str | None:
        if self._tolerant:
            return None
        raise ReferenceProblem(problem)
