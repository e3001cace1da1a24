"""What a criterion says: one number for every head and every neuron."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.units import KINDS, Site, Unit


@dataclass(frozen=True, eq=False)
class UnitScores:
    """How much every unit of a ranker is worth keeping; higher is kept.

    Attributes:
        heads: For each layer, an array [heads].
        neurons: For each layer, an array [neurons].
        joint: Whether heads and neurons are measured in the same unit, so that one may be weighed against the other.
        passes: How often the data went through the model, in forward runs of all its rows; a backward run counts two.
        notes: What else a criterion has to tell, in plain values.
    """

    heads: Sequence[np.ndarray]
    neurons: Sequence[np.ndarray]
    joint: bool = False
    passes: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)

    def check(self, model: Ranker) -> UnitScores:
        """Returns these scores if they are finite and are for the units of a ranker.

        Raises:
            ValueError: If not; the message names the layer.
        """
        for kind in KINDS:
            counts, layers = list(model.counts(kind).values()), getattr(self, kind)
            if len(layers) != len(counts):
                raise ValueError(f'scores of {len(layers)} layers do not fit the {len(counts)} of {model!r}')
            for layer, (values, count) in enumerate(zip(layers, counts, strict=True)):
                if np.shape(values) != (count,):
                    raise ValueError(f'layer {layer} has scores of shape {np.shape(values)} for its {count} {kind}')
                if not np.isfinite(values).all():
                    raise ValueError(f'the scores of the {kind} of layer {layer} are not all finite')
        return self

    def to_frame(self) -> pd.DataFrame:
        """Returns one row a unit: `kind` ('head' or 'neuron'), `layer`, `unit`, `name`, `score`."""
        rows = [
            (kind[:-1], layer, number, Unit(Site(kind, layer), number).name, float(value))
            for kind in KINDS
            for layer, values in enumerate(getattr(self, kind))
            for number, value in enumerate(values)
        ]
        return pd.DataFrame(rows, columns=['kind', 'layer', 'unit', 'name', 'score'])
