"""Conductance of the neurons of the feed-forward blocks, as a pipeline stage."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyterrier_mech.attribute.lines import Line
from pyterrier_mech.attribute.path import Integrating, integrate, warn_of
from pyterrier_mech.frames import texts_of, with_columns
from pyterrier_mech.inputs.alignment import types_of
from pyterrier_mech.rankers.ranker import as_numpy
from pyterrier_mech.stage import choice
from pyterrier_mech.units import NEURONS

ERROR = 'completeness_error.neurons'


@dataclass(eq=False, repr=False)
class AttributeNeurons(Integrating):
    """How much of the score goes through every MLP neuron: conductance, for all layers in one sweep.

    The word embeddings go in a straight line from a baseline to the input; a neuron's conductance is
    ∫ ∂s/∂a · da, its activation a moving with them, summed over the tokens. Positions, segments and the attention mask
    stay those of the input. The neurons of a layer are not a full cut of the network (the residual stream passes them
    by), so their sum is not the change of the score; the outputs of a layer are, and on them the error is measured.

    **Input columns**: qid, query, docno, text.

    **Output columns**: the same and `neurons`, an array [layers, neurons] a row (float32, or float64 for a float64
    model, in units of the score; NaN where a layer has fewer neurons than the widest), and
    `completeness_error.neurons`: the largest difference, over the layers, between the summed conductance of the layer's
    outputs and s(x) − s(baseline), relative to the latter or to a tenth of the score's whole way along the line if that
    is more. The ranking is kept.
    With `by='token_type'` there is an array for each type of token instead, `neurons.cls`, `neurons.query`,
    `neurons.sep`, `neurons.doc_match` (also in the query), `neurons.doc_other`; all NaN where a row has no such token.

    Args:
        model: A ranker.
        baseline: 'query': query tokens become padding tokens, special tokens and text stay. 'all': all but the special
            tokens become padding. Else token ids, special tokens included, of the input's length, or a function from
            the input's ids to them. Of a bi-encoder's towers, only the query's moves with 'query' and only the text's
            with every other baseline; the other vector is that of its text.
        rule: 'trapezoid': (a_{k+1} − a_k)(g_k + g_{k+1}) / 2 on a uniform grid with both ends. 'left': nodes and rule
            of captum's `LayerConductance`, with `points` steps; for comparison.
        points: Points of the first grid.
        tolerance: Intervals are halved, row by row, until the completeness error is not above this.
        max_points: No row gets more points. A warning counts the rows that would need them.
        by: None, or 'token_type'.
        batch_tokens: Tokens of one batch, over all points, each counted four times for the memory of its graph; by
            default as the model has it. A row's points are kept until it is done: twice as many numbers as it has
            points times tokens times neurons of all layers, and a quarter more.
        text_field: Column of the text; by default as the model has it.
        verbose: Shows a progress bar; by default as the model has it.

    Raises:
        ValueError: If a setting is not known, a baseline does not fit its row, the model has no neurons where its
            family has them, or a gradient is not finite.

    Source: Dhamdhere, Sundararajan, Yan, ICLR 2019, arXiv 1805.12233; Shrikumar et al., arXiv 1807.09946; for rankers
    Vast et al., ICTIR 2024, arXiv 2406.19309.
    """

    _: KW_ONLY
    by: str | None = choice([None, 'token_type'])

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Attributes the score of every row."""
        self.check()
        texts_of(inp, self, self.text)
        names = ['neurons'] if self.by is None else [f'neurons.{kind}' for kind in plain_types(self.model)]
        if not len(inp):
            empty = {name: np.zeros(0, dtype=object) for name in names}
            return with_columns(inp, {**empty, ERROR: np.zeros(0, dtype=np.float32)})
        return with_columns(inp, self._attribute(inp, names))

    def _attribute(self, inp: pd.DataFrame, names: list[str]) -> dict[str, Any]:
        model = self.model
        widest = max(neuron_counts(model), default=0)
        values: dict[str, list[Any]] = {name: [None] * len(inp) for name in names}
        errors = np.zeros(len(inp), dtype=model.float_type)

        def reduce(line: Line, layers: list[torch.Tensor]) -> list[np.ndarray]:
            return [_table(layers, positions, widest, model.float_type) for positions in self._positions(line)]

        for result in integrate(model, self.lines(inp), site=NEURONS, reduce=reduce, **self.walking()):
            errors[result.row] = result.error
            for name, value in zip(names, result.value, strict=True):
                values[name][result.row] = value
        warn_of(errors, self.grid)
        return {**values, ERROR: errors}

    def _positions(self, line: Line) -> list[np.ndarray]:
        if self.by is None:
            return [np.arange(len(line))]
        return [np.flatnonzero(line.types == kind) for kind in plain_types(self.model)]


def plain_types(model: Any) -> tuple[str, ...]:
    """Returns the types of positions of a ranker that reads one version."""
    return tuple(kind for kind in types_of(model, 'basic') if kind != 'inserted')


def neuron_counts(model: Any) -> list[int]:
    """Returns the number of neurons of every layer.

    Raises:
        ValueError: If the module has none where its family has them.
    """
    try:
        return list(model.counts(NEURONS).values())
    except AttributeError as error:
        raise ValueError(
            f'{model!r} has no neurons at the place that its family names ({error}): AttributeNeurons needs the last '
            'linear map of every feed-forward block; describe the module with register_family(Family(..., mlp_out=...))'
        ) from error


def _table(layers: list[torch.Tensor], positions: np.ndarray, width: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Returns the sums over some positions, [layers, width]; NaN where there is no such position or neuron."""
    table = np.full((len(layers), width), np.nan, dtype=dtype)
    if len(positions):
        for row, layer in zip(table, layers, strict=True):
            row[: layer.shape[1]] = as_numpy(layer[torch.from_numpy(positions).to(layer.device)].sum(0))
    return table
