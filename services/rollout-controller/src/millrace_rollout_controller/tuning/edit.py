"""Writes a configuration into a manifest's text. Only the characters of values that change are touched, so comments and layout stay.

The places come from the YAML parser itself, and the result is read again: it has to mean the same manifest but for the tuned fields.
"""

import json
import os
import tempfile
from pathlib import Path

import yaml
from millrace_kit.errors import FailedPreconditionError, MillraceError

from millrace_rollout_controller.manifest import Manifest, parse
from millrace_rollout_controller.tuning.configuration import Configuration

_Edit = tuple[int, int, str]
"""From and to which character, and what stands there instead."""


def edited(text: str, configuration: Configuration) -> str:
    """The manifest with the tuned fields of `spec.server` as in `configuration`.

    Raises:
        FailedPreconditionError: its layout is one that cannot be edited so; nothing else is lost by writing the fields by hand.
        InvalidArgumentError: the text is no manifest.
    """
    before = parse(text)
    wanted = configuration.applied(before.spec.server)
    if wanted == before.spec.server:
        return text
    try:
        made = _apply(text, _edits(text, Configuration.of(before.spec.server), configuration))
        after: Manifest | None = parse(made)
    except (MillraceError, yaml.YAMLError, _LayoutError):
        after = None
    if after is None or after != before.model_copy(update={"spec": before.spec.model_copy(update={"server": wanted})}):
        message = (
            f"the manifest's layout cannot be edited without loss; write it by hand: server: {{{configuration.words}}}"
        )
        raise FailedPreconditionError("LAYOUT_NOT_EDITABLE", message)
    return made


def write(path: Path, text: str) -> None:
    """Replace a file (of a link, what it leads to) whole or not at all; who may read it stays."""
    path = path.resolve()
    mode = path.stat().st_mode & 0o7777 if path.exists() else 0o644
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        Path(scratch).chmod(mode)
        Path(scratch).replace(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


class _LayoutError(Exception):
    """A part of the text is not what an edit needs."""


def _edits(text: str, present: Configuration, wanted: Configuration) -> list[_Edit]:
    quote = text.lstrip("\ufeff \t\r\n").startswith("{")
    newline = "\r\n" if "\r\n" in text else "\n"
    scalars = {
        key: str(new)
        for key, old, new in (
            ("instances", present.instances, wanted.instances),
            ("maxBatchSize", present.max_batch_size, wanted.max_batch_size),
            ("queueDelayUs", present.queue_delay_us, wanted.queue_delay_us),
        )
        if old != new
    }
    sizes = f"[{', '.join(map(str, wanted.preferred_sizes))}]"
    resized = present.preferred_sizes != wanted.preferred_sizes
    spec = _child(_mapping(yaml.compose(text, yaml.SafeLoader)), "spec")
    if spec is None:
        raise _LayoutError
    writer = _Writer(quote, newline)
    server = _child(_mapping(spec), "server")
    block = scalars | ({"batching": writer.flow({"preferredSizes": sizes})} if resized else {})
    if server is None:
        return writer.set(_mapping(spec), {"server": writer.flow(block)})
    batching = _child(_mapping(server), "batching")
    if batching is None or not resized:
        return writer.set(_mapping(server), block)
    return [*writer.set(_mapping(server), scalars), *writer.set(_mapping(batching), {"preferredSizes": sizes})]


class _Writer:
    """Edits of mappings, in the style of the text.

    Args:
        quote: whether keys are quoted, as in JSON.
        newline: what ends a line.
    """

    def __init__(self, quote: bool, newline: str) -> None:
        self._quote = quote
        self._newline = newline

    def flow(self, values: dict[str, str]) -> str:
        """A mapping in braces."""
        return f"{{{', '.join(self._pair(key, value) for key, value in values.items())}}}"

    def set(self, mapping: yaml.MappingNode, values: dict[str, str]) -> list[_Edit]:
        """Replace the values of keys that are there, and put the others before the first key."""
        edits, missing = [], []
        for key, value in values.items():
            edit = _replaced(mapping, key, value)
            if edit is None:
                missing.append(self._pair(key, value))
            else:
                edits.append(edit)
        if not missing:
            return edits
        if not mapping.value:
            at = mapping.start_mark.index + 1
            return [*edits, (at, at, ", ".join(missing))]
        first = mapping.value[0][0].start_mark
        gap = ", " if mapping.flow_style else self._newline + " " * first.column
        return [*edits, (first.index, first.index, "".join(pair + gap for pair in missing))]

    def _pair(self, key: str, value: str) -> str:
        return f"{json.dumps(key) if self._quote else key}: {value}"


def _replaced(mapping: yaml.MappingNode, key: str, value: str) -> _Edit | None:
    for found, node in mapping.value:
        if found.value != key:
            continue
        if isinstance(node, yaml.SequenceNode) and not node.flow_style:
            # The parser's end of a block is where the next one begins, comments included; its last entry's end is exact.
            return found.end_mark.index, node.value[-1].end_mark.index, f": {value}"
        return node.start_mark.index, node.end_mark.index, value
    return None


def _child(mapping: yaml.MappingNode, key: str) -> yaml.Node | None:
    return next((node for found, node in mapping.value if found.value == key), None)


def _mapping(node: yaml.Node | None) -> yaml.MappingNode:
    if not isinstance(node, yaml.MappingNode):
        raise _LayoutError
    return node


def _apply(text: str, edits: list[_Edit]) -> str:
    for start, end, instead in sorted(edits, reverse=True):
        text = text[:start] + instead + text[end:]
    return text
