"""What the stages share that patch an original pair with a perturbed one, one thing at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TypeVar

import numpy as np
import torch

from pyterrier_mech.anatomy.model import Run
from pyterrier_mech.inputs.inputs import Inputs
from pyterrier_mech.patch.engine import traced_sides
from pyterrier_mech.provenance import Analysis, noted
from pyterrier_mech.stage import Keeping, ModelStage, choice

_T = TypeVar('_T')

DIRECTIONS = ('perturbed_to_original', 'original_to_perturbed')
EFFECTS = ('difference', 'normalized')


@dataclass(eq=False, repr=False)
class Patching(Keeping, ModelStage):
    """Base of the patching stages."""

    _: KW_ONLY
    direction: str = choice(DIRECTIONS)
    effect: str = choice(EFFECTS)
    filler: str | None = 'a'

    def _analysis(self, names: Sequence[str], **more: str) -> Analysis:
        settings = {name: getattr(self, name) for name in ('direction', 'effect', 'filler')}
        return Analysis(type(self).__name__, {**settings, **more, 'model': noted(self.model)}, names)

    def _ordered(self, sides: Sequence[_T]) -> tuple[_T, _T]:
        """From the original and the perturbed side to the one that is patched and the one that it takes from."""
        first, second = sides
        return (first, second) if self.direction == DIRECTIONS[0] else (second, first)

    def _effects(self, scores: np.ndarray) -> np.ndarray:
        """Returns effects [..., rows] from scores [original, perturbed, patched…, rows]."""
        base, whole = (scores[0], scores[1] - scores[0])
        if self.direction != DIRECTIONS[0]:
            base, whole = scores[1], -whole
        effects = scores[2:] - base
        return effects / np.where(whole == 0, np.nan, whole) if self.effect == 'normalized' else effects

    def _both(
        self, inputs: Inputs, tower: int, rows: np.ndarray, kinds: Sequence[str]
    ) -> tuple[torch.Tensor, tuple[Run, Run]]:
        """Returns the vectors [original and perturbed, pairs, d] of a tower, and its two runs in order."""
        runs = traced_sides(self.model.map, inputs, tower, rows, kinds)
        both = torch.stack([self.model.readout.represent(run.hidden, run.batch.scored) for run in runs])
        return both, self._ordered(runs)
