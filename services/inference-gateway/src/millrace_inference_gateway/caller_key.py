"""The key that keeps a caller on its arm in every model, on its way through other services: a member of W3C baggage.

An application sets `millrace.sticky` once, where a user comes in (OpenTelemetry carries baggage from service to service by itself); every call of a model on the way, by
whichever service, is then split by that key. A key in the call itself comes first. https://www.w3.org/TR/baggage/
"""

import re
from urllib.parse import quote, unquote

MEMBER = "millrace.sticky"
HEADER = "x-millrace-sticky"
"""In which Envoy's script puts the key, decoded, for the split."""
BAGGAGE = b"baggage"
MAX_KEY = 256
MAX_BAGGAGE_BYTES = 8192
# What a metadata value may hold, printable ASCII.
_PRINTABLE = re.compile(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")


def is_key(text: str) -> bool:
    """Whether `text` may keep a caller on its arm: as a header's value may be, and not too long."""
    return len(text) <= MAX_KEY and _PRINTABLE.fullmatch(text) is not None


def key_of(baggage: bytes) -> str:
    """The caller's key; empty where there is none that could be one."""
    for member in baggage[:MAX_BAGGAGE_BYTES].decode("latin-1").split(","):
        name, _, value = member.partition("=")
        if name.strip() == MEMBER:
            key = unquote(value.partition(";")[0].strip())
            return key if is_key(key) else ""
    return ""


def with_key(baggage: bytes, key: str) -> bytes:
    """Baggage that says the key, for whoever is called next; other members stay."""
    if not key or key_of(baggage) == key:
        return baggage
    others = [m for m in baggage.split(b",") if m.strip() and m.partition(b"=")[0].strip() != MEMBER.encode()]
    return b",".join([*others, f"{MEMBER}={quote(key, safe='')}".encode()])
