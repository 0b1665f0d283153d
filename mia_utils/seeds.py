"""Named random streams: the same numbers for an image whatever its batch, its order or the device.

Nothing here reads or writes the global random state.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive(seed: int, *names: object) -> int:
    """Derive a 63-bit seed from a base seed and the names of a stream.

    Args:
        seed: base seed of the experiment.
        names: stream name and keys, for example ``"partcrop", image_id``.

    Returns:
        int in [0, 2**63), the same on every machine: blake2b over the seed and the names.
    """
    text = "\x1f".join([str(int(seed)), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *names: object) -> torch.Generator:
    """Return a CPU ``torch.Generator`` for a named stream (CPU and GPU runs then agree)."""
    return torch.Generator().manual_seed(derive(seed, *names))


def rng(seed: int, *names: object) -> np.random.Generator:
    """Return a numpy ``Generator`` for a named stream; cheap enough for one per image."""
    return np.random.Generator(np.random.Philox(key=derive(seed, *names)))
