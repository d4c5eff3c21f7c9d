"""The wire format of protocol buffers, as far as messages can be read without their definition."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

MOST_FIELDS = 1_000_000
"""Fields of a message that are read: weights are packed into one, and a damaged file must end."""
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class WireError(ValueError):
    """The bytes are not a message."""


def fields(message: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """(number, wire type, value) of each field: an int for a varint, else its bytes."""
    place = count = 0
    while place < len(message):
        count += 1
        if count > MOST_FIELDS:
            raise WireError(f"more than {MOST_FIELDS:,} fields in a message")
        key, place = _varint(message, place)
        number, kind = key >> 3, key & 7
        value: int | memoryview
        if kind == VARINT:
            value, place = _varint(message, place)
        elif kind in (FIXED64, FIXED32, BYTES):
            length = {FIXED64: 8, FIXED32: 4}.get(kind, 0)
            if kind == BYTES:
                length, place = _varint(message, place)
            if number == 0 or length > len(message) - place:
                raise WireError("a field is longer than its message")
            value, place = message[place : place + length], place + length
        else:
            raise WireError(f"a field of wire type {kind}")
        yield number, kind, value


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(message) and shift < 64:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value & (2**64 - 1), place
    raise WireError("a number does not end")


def messages(message: memoryview, number: int) -> Iterator[memoryview]:
    """The bytes of each field `number` that has a length."""
    for found, kind, value in fields(message):
        if found == number and kind == BYTES and isinstance(value, memoryview):
            yield value


def text(message: memoryview, number: int) -> str:
    """The last string in field `number`, or an empty one."""
    found = list(messages(message, number))
    return bytes(found[-1]).decode("utf-8", "replace") if found else ""


def integer(message: memoryview, number: int, default: int = 0) -> int:
    """The last varint in field `number`."""
    for found, _, value in fields(message):
        if found == number and isinstance(value, int):
            default = value
    return default


def float32(message: memoryview, number: int, default: float) -> float:
    """The last float in field `number`."""
    for found, kind, value in fields(message):
        if found == number and kind == FIXED32 and isinstance(value, memoryview):
            default = float(struct.unpack("<f", value)[0])
    return default


def integers(message: memoryview, number: int) -> list[int]:
    """The varints in field `number`, packed or one by one."""
    values = []
    for found, kind, value in fields(message):
        if found != number:
            continue
        if kind == VARINT and isinstance(value, int):
            values.append(value)
        elif kind == BYTES and isinstance(value, memoryview):
            place = 0
            while place < len(value):
                one, place = _varint(value, place)
                values.append(one)
    return values


def floats(message: memoryview, number: int, kind: str = "<f4") -> NDArray[np.generic]:
    """The numbers in field `number`, packed or one by one: little-endian "<f4" or "<f8"."""
    size = np.dtype(kind).itemsize
    parts = []
    for found, wire, value in fields(message):
        if found != number or not isinstance(value, memoryview):
            continue
        if wire not in (BYTES, FIXED32, FIXED64) or len(value) % size:
            raise WireError(f"{len(value)} bytes do not hold numbers of {size} bytes")
        parts.append(value)
    if len(parts) == 1:
        return np.frombuffer(parts[0], kind)
    return np.frombuffer(b"".join(parts), kind)


def encode(number: int, value: int | float | str | bytes) -> bytes:
    """The field `number` of a message: a varint, a float32, a text or bytes."""
    if isinstance(value, float):
        return _encode_varint(number << 3 | FIXED32) + struct.pack("<f", value)
    if isinstance(value, int):
        return _encode_varint(number << 3 | VARINT) + _encode_varint(value)
    content = value.encode() if isinstance(value, str) else value
    return _encode_varint(number << 3 | BYTES) + _encode_varint(len(content)) + content


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
