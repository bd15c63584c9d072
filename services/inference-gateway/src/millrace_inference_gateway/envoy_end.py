"""Keeps the Python process for as long as the Envoy beside it ends: Predict is answered and the access log taken to the last call."""

import asyncio
import time

from millrace_inference_gateway.envoy_admin import EnvoyAdmin, EnvoyDownError
from millrace_inference_gateway.settings import GatewaySettings

POLL_S = 0.1
# Both containers of a pod are told to end at about the same time, each by itself.
SKEW_S = 1.0
MARGIN_S = 5.0


async def until_envoy_ends(admin: EnvoyAdmin, settings: GatewaySettings) -> None:
    """Return when Envoy is gone, when it turns out that it stays, or when it has had its time."""
    if not settings.envoy.deregister_s:
        # One machine, where nobody has to turn away first: whoever ends both ends Envoy first, or wants neither.
        return
    started = time.monotonic()
    most_s = settings.envoy.deregister_s + settings.drain_s + MARGIN_S
    while (elapsed := time.monotonic() - started) < most_s:
        try:
            state = await admin.state()
        except EnvoyDownError:
            return
        if state == "LIVE" and elapsed > SKEW_S:
            return
        await asyncio.sleep(POLL_S)
