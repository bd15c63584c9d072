"""Calling model servers without a proxy: what gRPC's own xDS client needs to follow a gateway.

```python
os.environ["GRPC_XDS_BOOTSTRAP"] = str(write_bootstrap(Path("xds.json"), "gateway:7405"))  # before the first xDS channel
channel = grpc.insecure_channel("xds:///flight-delay")
stub.ModelInfer(request, metadata=[sticky_metadata("user-17")])
```
Such calls are in no figure and no prediction log: the gateway does not see them. Gates count them with `rollout.countedBy: Servers`.
"""

import json
from pathlib import Path

from millrace_kit.settings import TlsSettings

UNITS = 10_000
"""Of a split: weights are percents with two decimals."""
UNIT_HEADER = "x-millrace-unit"

_MASK = (1 << 64) - 1
_P1, _P2, _P3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_P4, _P5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5


def write_bootstrap(path: Path, gateway: str, *, node_id: str = "", tls: TlsSettings | None = None) -> Path:
    """Write the bootstrap file of gRPC's xDS client.

    Args:
        path: the file; `GRPC_XDS_BOOTSTRAP` has to name it before the process opens its first xDS channel.
        gateway: `host:port` of the gateway's own gRPC server (its `listen`), whose `max_zero_hop_clients` is above 0.
        node_id: name of this client in the gateway's log.
        tls: files to prove who this client is; None speaks plain text.
    """
    credentials: dict[str, object] = {"type": "insecure"}
    if tls is not None:
        files = {
            "ca_certificate_file": tls.ca_file, "certificate_file": tls.cert_file, "private_key_file": tls.key_file,
        }  # fmt: skip
        credentials = {"type": "tls", "config": files}
    content = {
        "xds_servers": [{"server_uri": gateway, "channel_creds": [credentials], "server_features": ["xds_v3"]}],
        "node": {"id": node_id or "millrace-client"},
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def sticky_metadata(key: str) -> tuple[str, str]:
    """Metadata that keeps `key` on its version: the side on which Envoy has it by the route's sticky header."""
    return UNIT_HEADER, str(sticky_unit(key))


def sticky_unit(key: str) -> int:
    """Where in a split `key` is, 0 to 9999: XXH64 of it, as Envoy hashes a header."""
    return _xxh64(key.encode()) % UNITS


def _rotated(value: int, bits: int) -> int:
    return ((value << bits) | (value >> (64 - bits))) & _MASK


def _round(lane: int, value: int) -> int:
    return _rotated((lane + value * _P2) & _MASK, 31) * _P1 & _MASK


def _xxh64(content: bytes) -> int:
    """XXH64 with seed 0."""
    position, size = 0, len(content)
    if size >= 32:
        lanes = [(_P1 + _P2) & _MASK, _P2, 0, -_P1 & _MASK]
        while position <= size - 32:
            for lane in range(4):
                at = position + 8 * lane
                lanes[lane] = _round(lanes[lane], int.from_bytes(content[at : at + 8], "little"))
            position += 32
        found = sum(_rotated(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18), strict=True)) & _MASK
        for lane in lanes:
            found = ((found ^ _round(0, lane)) * _P1 + _P4) & _MASK
    else:
        found = _P5
    found = (found + size) & _MASK
    while position + 8 <= size:
        found ^= _round(0, int.from_bytes(content[position : position + 8], "little"))
        found = (_rotated(found, 27) * _P1 + _P4) & _MASK
        position += 8
    if position + 4 <= size:
        found ^= int.from_bytes(content[position : position + 4], "little") * _P1 & _MASK
        found = (_rotated(found, 23) * _P2 + _P3) & _MASK
        position += 4
    for byte in content[position:]:
        found = _rotated(found ^ (byte * _P5 & _MASK), 11) * _P1 & _MASK
    for shift, factor in ((33, _P2), (29, _P3), (32, 1)):
        found = (found ^ (found >> shift)) * factor & _MASK
    return found
