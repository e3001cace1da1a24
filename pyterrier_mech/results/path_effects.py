"""What patching says about each path, over many pairs: an Artifact made from the frame of PatchPaths."""

from __future__ import annotations

import numpy as np
import pandas as pd

from pyterrier_mech.columns import SCORE, SENDERS, Path, path_arrays, paths
from pyterrier_mech.results._aggregate import NUMBERS, Kind, Reading, arrays, floats
from pyterrier_mech.results.effects import Effects
from pyterrier_mech.results.head_effects import head_grid

KEYS = ('sender', 'receiver', 'name')


class PathEffects(Effects):
    """Effect of each path from a head to the score, or to an input of a later head, over all rows of a patching run.

    Made by `from_frame` from the frame of ``PatchPaths`` or ``AttributePaths``: columns ``L0H4>score`` and
    ``L1H1>L2H9.k``, or one array of all senders a receiver, ``paths.score`` and ``paths.L2H9.k``, beside
    ``path_senders`` with their names.

    Columns of `to_frame`, one row per path, sorted by receiver, the score last, and by sender: ``sender``, ``receiver``
    ('score', or a head and its input: 'L2H9.k'), ``name``, ``ratio``, ``ratio_low``, ``ratio_high``, ``mean``,
    ``mean_low``, ``mean_high``, ``n`` (rows that entered), ``n_queries`` (their queries). What entered is counted by
    the attributes of `Effects`.
    """

    ARTIFACT_TYPE = 'path_effects'
    TABLES = {'paths': (*KEYS, *NUMBERS)}
    MADE_BY = 'PathEffects.from_frame(frame)'
    KIND = Kind(
        'PathEffects',
        ('PatchPaths', 'AttributePaths'),
        'paths',
        "columns of paths such as 'L0H4>score' or 'paths.score'",
    )

    @classmethod
    def _reading(cls, frame: pd.DataFrame) -> Reading:
        single, whole = paths(frame), path_arrays(frame)
        senders = _senders(frame) if whole else []
        # In an array, the entries of senders that do not stand before the receiver mean nothing.
        entries = {(column, 0): path for column, path in single.items()}
        entries |= {(c, i): path for c, to in whole.items() for i, path in _paths_to(to, senders) if _forward(path)}
        order = sorted(entries.items(), key=lambda entry: _order(entry[1]))
        keys = pd.DataFrame([(path.sender, path.receiver, path.name) for _, path in order], columns=list(KEYS))
        if keys['name'].duplicated().any():
            twice = keys['name'][keys['name'].duplicated()].iloc[0]
            raise ValueError(f'The path {twice} has a column of its own and stands in an array: keep one of them.')

        def values(rows: pd.DataFrame) -> np.ndarray:
            of_column = {column: floats(rows, [column]) for column in single}
            lengths = [len(senders)] * len(rows)
            of_column |= {column: np.stack(arrays(rows, column, lengths)) for column in whole}
            return np.stack([of_column[column][:, i] for (column, i), _ in order], axis=1)

        return Reading(keys, [*single, *whole], values)

    @property
    def receivers(self) -> list[str]:
        """The receivers, the score last."""
        return list(dict.fromkeys(self._table['receiver']))

    def matrix(self, receiver: str = SCORE, column: str = 'ratio', stack: str = '') -> np.ndarray:
        """Returns a column of `to_frame` for the senders to one receiver, ``[layers, max heads]``, else NaN.

        Args:
            receiver: The receiver.
            column: A column of numbers.
            stack: Which stack of layers the senders are of, where a model has several.

        Raises:
            ValueError: If there is no such receiver or stack, or the column holds no numbers of paths.
        """
        if receiver not in self.receivers:
            raise ValueError(f'receiver must be one of {self.receivers}; got receiver={receiver!r}')
        table = self._table[self._table['receiver'] == receiver]
        return head_grid(table, table['sender'], column, stack)


def _senders(frame: pd.DataFrame) -> list[str]:
    if SENDERS not in frame.columns:
        raise ValueError(f'The frame has arrays of paths and no column {SENDERS!r}: pass the whole frame.')
    found = {tuple(cell) for cell in frame[SENDERS] if np.ndim(cell)}
    if len(found) > 1:
        raise ValueError(f'The rows have {len(found)} different lists of {SENDERS}: aggregate those of one analysis.')
    return list(found.pop()) if found else []


def _paths_to(receiver: str, senders: list[str]) -> list[tuple[int, Path]]:
    return [(i, Path(sender, receiver)) for i, sender in enumerate(senders)]


def _forward(path: Path) -> bool:
    sender, receiver = path.ends
    return receiver is None or sender.site.stack != receiver.site.stack or sender.site.layer < receiver.site.layer


def _order(path: Path) -> tuple[object, ...]:
    sender, receiver = path.ends
    return receiver is None, () if receiver is None else (receiver,), path.receiver, sender
