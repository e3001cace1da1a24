"""What the stages share that patch an original pair with a perturbed one, one thing at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from pyterrier_mech.anatomy.model import Run
from pyterrier_mech.inputs.batching import in_batches
from pyterrier_mech.inputs.inputs import Inputs
from pyterrier_mech.patch.engine import Engine, engine_for, traced_sides
from pyterrier_mech.patch.variants import PATTERN, with_patterns
from pyterrier_mech.patch.wavefront import Wavefront
from pyterrier_mech.provenance import Analysis, noted
from pyterrier_mech.stage import Keeping, ModelStage, choice
from pyterrier_mech.units import Site

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

    def _ordered(self, sides: Iterable[_T]) -> tuple[_T, _T]:
        """From the original and the perturbed side to the one that is patched and the one that it takes from."""
        first, second = sides
        return (first, second) if self.direction == DIRECTIONS[0] else (second, first)

    def _effects(self, scores: np.ndarray) -> np.ndarray:
        """Returns effects [..., rows] from scores [original, perturbed, patched…, rows]."""
        return (scores[2:] - self._ordered(scores[:2])[0]) / self._unit(scores)

    def _unit(self, scores: np.ndarray) -> np.ndarray:
        """Returns what effects are divided by [rows], from scores [original, perturbed, …, rows]: 1, or the change."""
        base, other = self._ordered(scores[:2])
        change = other - base
        return np.where(change == 0, np.nan, change) if self.effect == 'normalized' else np.ones_like(change)

    def _both(
        self, engine: Engine, inputs: Inputs, tower: int, rows: np.ndarray, sites: Sequence[Site]
    ) -> tuple[torch.Tensor, tuple[Run, Run]]:
        """Returns the vectors [original and perturbed, pairs, d] of a tower, and its two runs in order.

        The runs have what the engine needs so that the sites can be patched.
        """
        model, kinds = self.model, list(dict.fromkeys(site.kind for site in sites))
        causal = model.readout if isinstance(engine, Wavefront) and model.map.family.causal else None
        runs = traced_sides(model.map, inputs, tower, rows, engine.recorded(kinds), causal)
        for run in runs:
            with_patterns(model.map, run, [site for site in sites if site.kind == PATTERN])
        both = torch.stack([model.readout.represent(run.hidden, run.batch.scored) for run in runs])
        return both, self._ordered(runs)

    def _swept(
        self, inputs: Inputs, counts: np.ndarray, step: Callable[[Engine, np.ndarray], Any]
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """Yields the good rows and what `step` makes of them.

        Args:
            inputs: Aligned pairs.
            counts: Variants of every row.
            step: From an engine and row numbers to a result.
        """
        tokens = inputs.lengths[inputs.good]
        if not len(tokens):
            return
        with self.model.computing():
            engine = engine_for(self.model)
            for batch, result in in_batches(
                tokens * (2 + counts[inputs.good]),
                self.budget,
                lambda batch: step(engine, inputs.good[batch]),
                smallest=2 * tokens,
                verbose=self.shows,
                desc=type(self).__name__,
            ):
                yield inputs.good[batch], result
