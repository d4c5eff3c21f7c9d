"""One seed from several whole numbers and names."""

from __future__ import annotations

import hashlib


def combine(*parts: int | str) -> int:
    """A seed below 2**63 that differs, in all its bits, for different `parts`.

    torch's CPU generator keeps only the low 32 bits of a seed, so sums and shifts of small numbers
    would collide.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
