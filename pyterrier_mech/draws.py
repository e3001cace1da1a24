"""Everything random: a function of a seed and of what is drawn for, never of the order of calls."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any, TypeVar

_T = TypeVar('_T')


def digest(*key: Any) -> bytes:
    """Returns the SHA-256 digest of plain values."""
    return hashlib.sha256(repr(key).encode()).digest()


def generator(*key: Any) -> random.Random:
    """Returns a generator that a key of plain values determines.

    Use only its method `random`: of the others Python does not promise that they draw the same in every version.
    """
    return random.Random(int.from_bytes(digest(*key), 'big'))


def shuffled(items: Sequence[_T], *key: Any) -> list[_T]:
    """Returns sorted items in the random order of a key; with more items, the order of the others may change."""
    drawn = generator(*key)
    return [item for _, item in sorted((drawn.random(), item) for item in items)]
