"""Two versions inside one model server: under which number each is there. Pure.

A server knows versions of a model as whole numbers. They come from the registry's versions alone, so nobody has to remember them: 1.4.0 is
1000004000000, three numbers of six digits. What cannot be said so (pre-releases, builds, large numbers) gets a number from its digest.
"""

import hashlib
import re

_DIGITS = 6
_OTHERS = 8 * 10**18
"""Numbers from here on are made of digests; the largest that a server takes is 2**63 - 1, some 9.2 * 10**18."""


def number(version: str) -> str:
    """The number of a version, without leading zeros, more than 0 and less than 2**63."""
    parts = re.fullmatch(rf"(\d{{1,{_DIGITS}}})\.(\d{{1,{_DIGITS}}})\.(\d{{1,{_DIGITS}}})", version)
    if parts is not None and (found := int("".join(part.zfill(_DIGITS) for part in parts.groups()))):
        return str(found)
    return str(_OTHERS + int(hashlib.sha256(version.encode()).hexdigest()[:14], 16))


def naming(version: str) -> bytes:
    """What names a version at the end of a serialized V2 request about a model: its field 2, of which the last one counts."""
    text = number(version).encode()
    return b"\x12" + bytes([len(text)]) + text
