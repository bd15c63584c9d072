"""What the steps share: names of the sample, the loop's state, waiting."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from flights import EVENT_TIMES
from millrace import Client

from loop.replay import Replay
from loop.story import Story

SAMPLE = Path(__file__).resolve().parents[1]
PIPELINE = "flight-delay"
ACTOR = "demo"
WAIT_S = 120.0
HISTORY_START = datetime(2013, 1, 1, tzinfo=UTC)
SERVING_START = datetime(2013, 7, 1, tzinfo=UTC)
# After Labor Day (2 September) delays fall: the history features leave what January to June showed. Nothing is injected.
DRIFT_START = datetime(2013, 9, 4, tzinfo=UTC)
DRIFT_REASON = "after Labor Day delays fall, unlike anything from January to June; a natural shift, nothing is injected"
YEAR_END = datetime(2014, 1, 1, tzinfo=UTC)

T = TypeVar("T")


class TimedOutError(Exception):
    """Something the demo waits for did not happen in time."""


def until(what: str, ask: Callable[[], T | None], timeout_s: float = WAIT_S) -> T:
    """Ask again until there is an answer.

    Raises:
        TimedOutError: none came within `timeout_s`; the message says what was waited for.
    """
    deadline = time.monotonic() + timeout_s
    while (answer := ask()) is None:
        if time.monotonic() > deadline:
            raise TimedOutError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(0.1)
    return answer


@dataclass
class Loop:
    """What the steps hand on to each other."""

    client: Client
    story: Story
    replay: Replay
    failed_requests: int = 0
    """Client requests that failed in any replay."""


def wait_for_features(client: Client) -> None:
    """Wait until the online store has followed every record on the bus."""

    def caught_up() -> bool | None:
        contracts = client.features.progress().contracts
        followed = {contract.contract for contract in contracts if contract.next_offset >= contract.end_offset}
        # A contract appears once the history of its views is filled.
        return followed >= set(EVENT_TIMES) or None

    until("the online store follows the records", caught_up)
