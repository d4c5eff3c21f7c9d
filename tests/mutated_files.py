"""Damages files in every way, and checks that each is refused with one line or read."""

import random
from pathlib import Path

import torch

from alexnet_mp.weights.convert import read_network_file

COUNT = 2000


def mutated(content: bytes, generator: random.Random) -> bytes:
    """`content` with bits flipped, bytes set, a part cut out, repeated or overwritten."""
    data = bytearray(content)
    head = min(len(data), 4096)  # where the structure is, which random places rarely hit
    for _ in range(generator.choice((1, 1, 2, 5))):
        place = generator.randrange(generator.choice((64, head, len(data))))
        kind = generator.randrange(5)
        if kind == 0:
            data[place] ^= 1 << generator.randrange(8)
        elif kind == 1:
            data[place] = generator.choice((0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)))
        elif kind == 2:
            del data[place : place + generator.randrange(1, 40)]
        elif kind == 3:
            data[place:place] = data[place : place + generator.randrange(1, 40)]
        else:
            del data[place:]
        if len(data) < 64:
            break
        head = min(len(data), 4096)
    return bytes(data)


def check_mutated(path: Path, content: bytes, count: int = COUNT) -> int:
    """How many of `count` mutated files are refused; each of them with one line naming it."""
    errors = []
    for seed in range(count):
        path.write_bytes(mutated(content, random.Random(seed)))
        try:
            network = read_network_file(path)
            assert all(isinstance(value, torch.Tensor) for value in network.tensors.values())
        except ValueError as error:
            errors.append(str(error))
    assert [error for error in errors if str(path) not in error or "\n" in error] == []
    return len(errors)
