"""Calls to Redis: failures as the service's one error, and transactions that are tried again when others come between."""

from collections.abc import Callable
from typing import Any, TypeVar

from millrace_kit.errors import UnavailableError
from redis.exceptions import RedisError, WatchError

ATTEMPTS = 20
"""Tries of a transaction that others disturb."""

T = TypeVar("T")


def unavailable(error: Exception) -> UnavailableError:
    """The one error callers see when Redis fails."""
    message = f"the online store did not answer: {type(error).__name__}: {error}"
    return UnavailableError("ONLINE_STORE_UNAVAILABLE", message)


def asked(ask: Callable[[], T]) -> T:
    """What Redis answers, its failures as the service's one error."""
    try:
        return ask()
    except WatchError:
        raise
    except (RedisError, OSError) as error:
        raise unavailable(error) from error


def transaction(client: Any, attempt: Callable[[Any], T], *watched: str) -> T:
    """Run `attempt` with a pipeline that watches keys; again when one of them changed before it was executed.

    Raises:
        UnavailableError: others came between all the time, or Redis does not answer.
    """

    def run() -> T:
        with client.pipeline(transaction=True) as pipe:
            pipe.watch(*watched)
            return attempt(pipe)

    for _attempt in range(ATTEMPTS):
        try:
            return asked(run)
        except WatchError:
            continue
    raise UnavailableError("ONLINE_STORE_BUSY", "other replicas change the online store all the time")
