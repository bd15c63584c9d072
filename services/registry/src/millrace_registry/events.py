"""What the registry tells the others on the bus."""

from datetime import datetime

from millrace_api.events.v1 import events_pb2
from millrace_kit.bus import MODELS, Outgoing

from millrace_registry.convert import version_out
from millrace_registry.models import Version


def model_changed(
    *, registry_id: str, sequence: int, at: datetime, change: str, actor: str, version: Version
) -> Outgoing:
    """The message of one change; its event id comes from its number, so the same change is never counted twice."""
    event = events_pb2.ModelChanged(sequence=sequence, change=change, actor=actor, version=version_out(version))
    event.at.FromDatetime(at)
    headers = {"event-id": f"{registry_id}:{sequence}".encode("ascii")}
    return Outgoing(MODELS, version.content.model, event.SerializeToString(deterministic=True), headers)
