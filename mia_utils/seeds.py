"""Named random streams: the same numbers for an image whatever its batch, its order or the device.

Nothing here reads or writes the global random state.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


def derive(seed: int, *names: object) -> int:
    """Derive a seed in [0, 2**63) from a base seed and the names of a stream (``"partcrop", image_id``): blake2b."""
    text = "\x1f".join([str(int(seed)), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *names: object) -> torch.Generator:
    """Return a CPU ``torch.Generator`` for a named stream (CPU and GPU runs then agree)."""
    import torch  # seconds to import, and replay needs none

    return torch.Generator().manual_seed(derive(seed, *names))


def rng(seed: int, *names: object) -> np.random.Generator:
    """Return a numpy ``Generator`` for a named stream; cheap enough for one per image."""
    return np.random.Generator(np.random.Philox(key=derive(seed, *names)))


class RowGenerator:
    """Draws the numbers of a whole batch and gives those of some rows: what one of several processes trains on.

    So the processes see together what a single one would have seen. Has what training uses of ``np.random.Generator``.

    Args:
        rng: the stream of the whole batch; every process has it from its beginning.
        n: rows of the whole batch.
        rows: ours; the first number of every ``size`` is how many they are, else a ValueError.
    """

    def __init__(self, rng: np.random.Generator, n: int, rows: slice):
        self._rng, self._n, self._rows = rng, n, rows
        self._n_rows = len(range(n)[rows])

    def _widen(self, size: int | tuple[int, ...]) -> tuple[int, ...]:
        """The size of the whole batch's draw."""
        n_rows, *rest = (size,) if isinstance(size, (int, np.integer)) else size
        if n_rows != self._n_rows:
            raise ValueError(f"expected draws for the {self._n_rows} rows of this process, got size {size}")
        return self._n, *rest

    def __getattr__(self, name: str) -> Any:
        """``random``, ``uniform``, ``integers``, ``normal``, ``beta``: their last argument is the size."""
        draw = getattr(self._rng, name)
        return lambda *given, **options: draw(*given[:-1], self._widen(given[-1]), **options)[self._rows]

    def choice(self, a: int, size: int, replace: bool = True) -> np.ndarray:
        """Integers in [0, a); with replacement also where the whole batch is larger than a."""
        (n,) = self._widen(size)
        return self._rng.choice(a, n, replace=replace or a < n)[self._rows]

    def permutation(self, n: int) -> np.ndarray:
        """Order of our rows among themselves: other processes' images are not at hand (the one draw that differs)."""
        self._widen(n)
        return self._rng.permutation(n)
