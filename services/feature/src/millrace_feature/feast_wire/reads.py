"""Answers reads of Feast's clients; the edges convert on both sides."""

import asyncio
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from millrace_kit.clock import Clock
from millrace_kit.errors import UnavailableError

from millrace_feature.feast_wire.requests import Given, Request, given
from millrace_feature.feast_wire.selection import Selection, Selections
from millrace_feature.float_parts import FloatPart
from millrace_feature.metrics import READ_FEATURES, READ_ROWS
from millrace_feature.serving import Part, Serving
from millrace_feature.versioning.access import Access, Caller
from millrace_feature.worker import to_us

UNNAMED = "(features)"
"""Stands for the feature service in metrics where a request names features one by one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a read found, ready to be written."""

    selection: Selection
    given: Given
    parts: Sequence[Part | FloatPart]
    with_versions: bool

    @property
    def rows(self) -> int:
        """Entity rows asked for."""
        return len(self.given.rows)


class FeastReads:
    """Reads as Feast's clients ask for them, answered from the definitions in force."""

    def __init__(self, serving: Serving[Any], access: Access, clock: Clock) -> None:
        self._access = access
        self._serving = serving
        self._clock = clock
        self._selections: Selections | None = None

    @property
    def is_ready(self) -> bool:
        """Whether reads can be answered."""
        return self._serving.is_active

    def _current(self) -> Selections:
        definitions = self._serving.definitions
        if definitions is None:
            raise UnavailableError("DEFINITIONS_NOT_READY", "no definitions are applied, or their backfill is running")
        if self._selections is None or self._selections.definitions is not definitions:
            self._selections = Selections(definitions)
        return self._selections

    def _check(self, caller: Caller, selection: Selection) -> None:
        if selection.label:
            self._access.check(caller, "read_online", "FeatureService", selection.label)
        else:
            self._access.check_views(caller, "read_online", [block.view for block in selection.blocks])

    async def answer(self, request: Request, write: Callable[[Answer], bytes], caller: Caller) -> tuple[bytes, int]:
        """(the answer to `request` as `write` puts it, age in milliseconds of the oldest kept part of it).

        Raises:
            MillraceError: it names what does not exist, the caller may not read it, its values are wrong, or the store does not answer.
        """
        selection = self._current().find(request.wanted)
        if not self._access.is_open:
            await asyncio.to_thread(self._check, caller, selection)
        rows = given(selection, request.columns)
        at_us = to_us(self._clock.now())
        service = selection.service
        asks, known, age_ms = await self._serving.fetched(service, rows.rows, at_us, may_be_kept=True)

        def finish() -> bytes:
            parts = service.parts(asks, known, rows.rows, at_us)
            # Features named one by one are no service whose training sets could be compared; what was kept may lawfully differ.
            if selection.label and not age_ms:
                self._serving.note(service, rows.rows, at_us, partial(service.row_values, parts))
            answer = Answer(selection, rows, parts, request.with_versions)
            _counters(selection.label or UNNAMED).count(answer)
            return write(answer)

        content = finish() if len(rows.rows) <= service.rows_on_loop else await asyncio.to_thread(finish)
        return content, age_ms


class _Counters:
    """The metrics of one feature service, looked up once."""

    def __init__(self, label: str) -> None:
        self._rows = READ_ROWS.labels(label)
        self._present, self._missing, self._expired = (
            READ_FEATURES.labels(label, status) for status in ("present", "missing", "expired")
        )

    def count(self, answer: Answer) -> None:
        """Add one answer."""
        total = missing = expired = 0
        for block in answer.selection.blocks:
            part, width = answer.parts[block.part], len(block.names)
            total += width * answer.rows
            if isinstance(part, FloatPart) and part.is_whole:
                continue
            if None in part.values:
                expired += len(part.expired) * width
                missing += (part.values.count(None) - len(part.expired)) * width
        self._rows.inc(answer.rows)
        self._present.inc(total - missing - expired)
        if missing:
            self._missing.inc(missing)
        if expired:
            self._expired.inc(expired)


_counters = functools.lru_cache(maxsize=1024)(_Counters)
