"""Batches by exact token count, and what to do when the accelerator's memory does not hold one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import pyterrier as pt
import torch

_logger = logging.getLogger('pyterrier_mech')
_T = TypeVar('_T')

DEFAULT_TOKENS = {'cpu': 4096, 'cuda': 65536}


class Budget:
    """The number of tokens, padding included, that one batch may have. Shrinks when memory runs out."""

    def __init__(self, tokens: int):
        """Starts with `tokens`."""
        if tokens < 1:
            raise ValueError(f'batch_tokens={tokens} is no number of tokens; use 1 or more, or None for the default')
        self.tokens = tokens

    def lower(self, tokens: int) -> None:
        """Remembers a smaller budget."""
        self.tokens = max(1, tokens)
        _logger.warning('out of memory: going on with batches of %d tokens', self.tokens)


def in_batches(
    lengths: np.ndarray,
    budget: Budget,
    step: Callable[[np.ndarray], _T],
    *,
    smallest: np.ndarray | None = None,
    verbose: bool = False,
    desc: str = '',
    unit: str = 'pair',
) -> Iterator[tuple[np.ndarray, _T]]:
    """Runs `step` over all rows, longest first, in batches of at most `budget.tokens` tokens.

    When `step` runs out of memory, the budget is halved and the same rows are tried again in smaller batches; what
    was done is not done again.

    Args:
        lengths: Tokens of every row.
        smallest: Budget below which `step` cannot split a row further; by default a row is never split.
        budget: Shared and remembered by the caller.
        step: From row numbers to a result.
        verbose: Shows a progress bar.
        desc: Its label.
        unit: What it counts.

    Yields:
        Row numbers and their result.

    Raises:
        torch.OutOfMemoryError: If a single row does not fit.
    """
    order = np.argsort(-lengths, kind='stable')
    start = 0
    with pt.tqdm(total=len(order), desc=desc, unit=unit, disable=not verbose) as bar:
        while start < len(order):
            width = max(1, int(lengths[order[start]]))
            rows = order[start : start + max(1, budget.tokens // width)]
            try:
                result = step(rows)
            except torch.OutOfMemoryError as error:
                used = min(budget.tokens, len(rows) * width)
                if len(rows) == 1 and used <= (width if smallest is None else int(smallest[rows[0]])):
                    raise torch.OutOfMemoryError(
                        f'{error} One row of {width} tokens does not fit: lower max_length, or use another device.'
                    ) from error
                budget.lower(used // 2)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            yield rows, result
            bar.update(len(rows))
            start += len(rows)


def collected(
    lengths: np.ndarray, budget: Budget, step: Callable[[np.ndarray], np.ndarray], **options: Any
) -> np.ndarray:
    """Runs `step` over all rows as `in_batches` does; returns its results in the order of the rows.

    Args:
        lengths: Tokens of every row, at least one row.
        budget: Tokens of a batch.
        step: From row numbers to an array [..., rows].
        options: As for `in_batches`.
    """
    done = list(in_batches(lengths, budget, step, **options))
    order = np.argsort(np.concatenate([rows for rows, _ in done]))
    return np.concatenate([values for _, values in done], axis=-1)[..., order]


def default_budget(tokens: int | None, device: torch.device) -> Budget:
    """Returns the budget asked for, or the device's usual one."""
    return Budget(tokens if tokens is not None else DEFAULT_TOKENS.get(device.type, DEFAULT_TOKENS['cpu']))
