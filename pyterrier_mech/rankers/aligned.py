"""How the two versions of every row of a frame stand side by side, as a frame."""

from __future__ import annotations

from typing import Any

import pandas as pd

from pyterrier_mech.frames import two_versions
from pyterrier_mech.inputs.alignment import UNALIGNED
from pyterrier_mech.inputs.inputs import AlignedTower, Inputs

_ALIGNED = ['qid', 'docno', 'position', 'original', 'perturbed', 'change', 'type', 'patchable']


def aligned(model: Any, frame: pd.DataFrame, filler: str | None) -> pd.DataFrame:
    """Returns the alignments of a frame, one row a position; see `Ranker.align`."""
    versions = two_versions(frame, model, model.text_field)
    if not len(frame):
        return pd.DataFrame(columns=_ALIGNED, index=frame.index)
    inputs, parts = Inputs.pairs(model, *versions, filler), []
    for row, problem in enumerate(inputs.problems):
        towers = [tower.alignments[row] for tower in inputs.towers if isinstance(tower, AlignedTower)]
        part = pd.concat([one.to_frame(model.maker.tokenizer) for one in towers], ignore_index=True)
        if problem == UNALIGNED:
            part[['perturbed', 'change']] = None
        named = {name: frame[name].iloc[row] for name in ('qid', 'docno')}
        parts.append(part.assign(**named, position=part.index, patchable=problem or 'yes'))
    index = frame.index.repeat([len(part) for part in parts])
    return pd.concat(parts)[_ALIGNED].set_axis(index, axis=0)
