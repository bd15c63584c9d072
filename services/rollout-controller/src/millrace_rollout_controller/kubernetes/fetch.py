"""`millrace-model-fetch`: the init container of a model server. Brings a version's files, proves their digests, writes the model repository.

Ends with 0 when the repository is whole, 1 when trying again may help, 3 when it cannot. Why is in the termination message.
"""

import asyncio
import contextlib
import logging
import os
import sys
import time
from pathlib import Path

from millrace_kit.client import open_channel
from millrace_kit.clock import SystemClock
from millrace_kit.entry import read_arguments
from millrace_kit.errors import DataLossError, FailedPreconditionError, MillraceError, UnavailableError
from pydantic import ValidationError

from millrace_rollout_controller import repository
from millrace_rollout_controller.kubernetes.order import ENVIRONMENT, MODELS, TERMINATION_LOG, Ending, Order
from millrace_rollout_controller.peers import Registry
from millrace_rollout_controller.settings import RolloutSettings

log = logging.getLogger(__name__)
RETRY_S = 1.0
"""Wait between two attempts while the registry does not answer."""
PERMANENT = 3
"""Exit status when no attempt can help."""


async def fetch(settings: RolloutSettings, order: Order, models: Path, *, attempt_s: float) -> None:
    """Write the order's repository below `models`.

    Raises:
        DataLossError: the registry's bytes are not those of the version.
        FailedPreconditionError: the version cannot be served.
        UnavailableError: the registry did not answer within `attempt_s`.
    """
    channel = open_channel(settings.registry_address, tls=settings.tls)
    registry = Registry(
        channel,
        SystemClock(),
        timeout_s=settings.registry_timeout_s,
        artifact_timeout_s=settings.artifact_timeout_s,
    )
    limit = settings.triton.max_artifact_mib * 1024 * 1024
    end = time.monotonic() + attempt_s
    # The volume itself cannot be renamed; the repository is made beside its place inside it.
    staging = models / ".staging"
    try:
        while True:
            try:
                await repository.write(staging, order.ref, order.server, order.flavour, registry, max_bytes=limit)
                break
            except UnavailableError as error:
                if time.monotonic() + RETRY_S > end:
                    raise
                log.warning("%s; trying again", error.message)
                await asyncio.sleep(RETRY_S)
    finally:
        await channel.close()
    (staging / order.ref.model).rename(models / order.ref.model)
    staging.rmdir()


def _end(path: Path, reason: str, message: str, *, permanent: bool) -> None:
    with contextlib.suppress(OSError):
        path.write_text(Ending(reason=reason, message=message[:2000], permanent=permanent).model_dump_json())
    print(f"millrace-model-fetch: {reason}: {message}", file=sys.stderr)
    raise SystemExit(PERMANENT if permanent else 1)


def main() -> None:
    """Entry point."""
    settings = read_arguments("model-fetch", RolloutSettings)
    ended = Path(os.environ.get("MILLRACE_TERMINATION_LOG", TERMINATION_LOG))
    models = Path(os.environ.get("MILLRACE_MODELS", MODELS))
    attempt_s = settings.kubernetes.fetch.attempt_s if settings.kubernetes is not None else 120.0
    try:
        order = Order.model_validate_json(os.environ.get(ENVIRONMENT, ""))
    except ValidationError as error:
        _end(ended, "OrderInvalid", f"{ENVIRONMENT}: {error}", permanent=True)
        return
    if (models / order.ref.model / "config.pbtxt").exists():
        # The kubelet may run an init container again; the volume is the same.
        print(f"{order.ref.model} {order.ref.version} is here already")
        return
    try:
        asyncio.run(fetch(settings, order, models, attempt_s=attempt_s))
    except DataLossError as error:
        _end(ended, "DataLoss", f"DATA_LOSS: {error.message}; not loaded", permanent=True)
    except FailedPreconditionError as error:
        _end(ended, error.reason, error.message, permanent=True)
    except MillraceError as error:
        _end(ended, "ArtifactUnavailable", error.message, permanent=False)
    print(f"{order.ref.model} {order.ref.version} ({order.ref.digest[:12]}) is in {models}")
