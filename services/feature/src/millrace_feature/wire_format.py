"""Pieces of protobuf's wire format, for answers that are written without making messages."""


def varint(number: int) -> bytes:
    """A non-negative number in protobuf's variable length; a negative one as its 64-bit two's complement."""
    if 0 <= number < 128:
        return bytes((number,))
    number &= 0xFFFF_FFFF_FFFF_FFFF
    out = bytearray()
    while number > 127:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def sized(tag: bytes, content: bytes) -> bytes:
    """A field with a length."""
    return tag + varint(len(content)) + content
