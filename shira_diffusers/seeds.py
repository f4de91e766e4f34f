"""Random generators with a seed of their own for each purpose, the same on every machine."""

import hashlib

import torch


def seeded(seed: int, name: str) -> torch.Generator:
    """A CPU generator of its own for each (seed, parameter name), the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def step_seed(seed: int, purpose: str, number: int) -> int:
    """A seed of its own for each purpose and number, for a generator on any device."""
    digest = hashlib.sha256(f"{seed}:{purpose}:{number}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
