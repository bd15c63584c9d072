"""What a finished attempt left behind: its exit as an outcome, `result.json`, and its declared outputs."""

import json
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from millrace_kit import check
from millrace_kit.content import ContentStore
from millrace_kit.errors import InvalidArgumentError

from millrace_training_coordinator.executor import Ending, Exit
from millrace_training_coordinator.scheduler import Outcome

RESULT_FILE = "result.json"
MAX_RESULT_BYTES = 64 * 1024
MAX_TABLES = 256
# sysexits.h: EX_TEMPFAIL and EX_CONFIG.
EXIT_TEMPORARY = 75
EXIT_PERMANENT = 78


class StageFailedError(Exception):
    """A stage ended well but what it left cannot be used; running it again would not help."""


@dataclass(frozen=True, slots=True)
class Output:
    """A kept file: `path` is `<stage>/<path below its output folder>`."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class StageResult:
    """The meaning of a `result.json`; empty where it said nothing."""

    text: str = ""
    training_set_digest: str = ""
    definitions_hash: str = ""
    table_versions: Mapping[str, int] = field(default_factory=dict)
    model: str = ""
    model_version: str = ""


def classify(exit_: Exit) -> tuple[Outcome, str]:
    """Whether an attempt succeeded or may be tried again, and why it failed in words."""
    match exit_.ending:
        case Ending.EXITED if exit_.code == 0:
            return Outcome.SUCCEEDED, ""
        case Ending.EXITED if exit_.code < 0:
            return Outcome.RETRYABLE, f"killed by {signal_name(-exit_.code)}"
        case Ending.EXITED if exit_.code == EXIT_PERMANENT:
            return Outcome.PERMANENT, f"exit code {exit_.code} (permanent failure)"
        case Ending.EXITED if exit_.code == EXIT_TEMPORARY:
            return Outcome.RETRYABLE, f"exit code {exit_.code} (temporary failure)"
        case Ending.EXITED:
            return Outcome.RETRYABLE, exit_.detail or f"exit code {exit_.code}"
        case Ending.TIMEOUT:
            return Outcome.RETRYABLE, f"timeout: {exit_.detail}"
        case Ending.MEMORY:
            return Outcome.RETRYABLE, f"out of memory: {exit_.detail}"
        case Ending.NOT_PLACED:
            return Outcome.RETRYABLE, f"did not start: {exit_.detail}"
        case Ending.NOT_STARTED:
            return Outcome.PERMANENT, exit_.detail
        case Ending.STOPPED:
            return Outcome.INTERRUPTED, f"stopped: {exit_.detail}" if exit_.detail else "stopped"
        case Ending.LOST:
            return Outcome.INTERRUPTED, f"lost: {exit_.detail}" if exit_.detail else "lost"


def signal_name(number: int) -> str:
    """`SIGKILL` for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def read_result(folder: Path) -> StageResult:
    """The stage's `result.json`.

    Raises:
        StageFailedError: it is too large, is not a JSON object, has a wrong value, or says that the gate refused.
    """
    path = folder / RESULT_FILE
    if not path.exists() and not path.is_symlink():
        return StageResult()
    if path.is_symlink() or not path.is_file():
        raise StageFailedError(f"{RESULT_FILE} is no regular file")
    if path.stat().st_size > MAX_RESULT_BYTES:
        raise StageFailedError(f"{RESULT_FILE} is larger than {MAX_RESULT_BYTES >> 10} KiB")
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise StageFailedError(f"{RESULT_FILE} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise StageFailedError(f"{RESULT_FILE} must be a JSON object")
    if "\0" in text:
        raise StageFailedError(f"{RESULT_FILE} holds a NUL character")
    _check_gate(raw.get("gate"))
    return StageResult(
        text,
        _sha256(raw, "training_set_digest"),
        _text(raw, "definitions_hash"),
        _table_versions(raw.get("table_versions")),
        _text(raw, "model"),
        _text(raw, "model_version"),
    )


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _check_gate(gate: object) -> None:
    if gate is None:
        return
    if not isinstance(gate, dict) or not isinstance(gate.get("passed"), bool):
        raise StageFailedError(f'{RESULT_FILE}: gate must be {{"passed": true or false, "reason": text}}')
    if not gate["passed"]:
        reason = str(gate.get("reason", "no reason given"))[:1000]
        raise StageFailedError(f"the gate refused: {''.join(c if c.isprintable() else ' ' for c in reason)}")


def _text(raw: Mapping[str, Any], name: str) -> str:
    value = raw.get(name, "")
    if not isinstance(value, str) or len(value) > 256 or not value.isprintable():
        raise StageFailedError(f"{RESULT_FILE}: {name} must be a printable text of at most 256 characters")
    return value


def _sha256(raw: Mapping[str, Any], name: str) -> str:
    value = _text(raw, name)
    try:
        return check.sha256(value, name) if value else ""
    except InvalidArgumentError as error:
        raise StageFailedError(f"{RESULT_FILE}: {error}") from error


def _table_versions(raw: object) -> dict[str, int]:
    if raw is None:
        return {}
    shape = f'{RESULT_FILE}: table_versions must be a list of {{"table": name, "version": whole number}}'
    if not isinstance(raw, list) or len(raw) > MAX_TABLES:
        raise StageFailedError(shape)
    versions: dict[str, int] = {}
    for entry in raw:
        table, version = (entry.get("table"), entry.get("version")) if isinstance(entry, dict) else (None, None)
        good = (
            isinstance(table, str)
            and 0 < len(table) <= 256
            and table.isprintable()
            and type(version) is int
            and 0 <= version < 2**63
        )
        if not good:
            raise StageFailedError(shape)
        versions[str(table)] = int(str(version))
    return versions


def keep_outputs(
    stage: str, declared: Iterable[str], folder: Path, store: ContentStore, limit_bytes: int
) -> tuple[Output, ...]:
    """Put the declared files into `store`.

    Raises:
        StageFailedError: one is missing, is no regular file inside `folder`, or is too large.
        OSError: it could not be stored; trying again may help.
    """
    root = folder.resolve()
    kept = []
    for name in declared:
        path = folder / name
        if not path.exists():
            raise StageFailedError(f"declared output {name!r} is missing")
        if path.is_symlink() or not path.is_file() or not path.resolve().is_relative_to(root):
            raise StageFailedError(f"declared output {name!r} is no regular file of the output folder")
        size = path.stat().st_size
        if size > limit_bytes:
            raise StageFailedError(f"declared output {name!r} is larger than {limit_bytes >> 20} MiB")
        kept.append(Output(f"{stage}/{name}", store.put_file(path), size))
    return tuple(kept)
