"""Gradients of scores by what passes at sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pyterrier_mech.anatomy.model import EMBEDDINGS, Values
from pyterrier_mech.inputs.inputs import Inputs
from pyterrier_mech.units import Site


def with_gradients(
    model: Any, inputs: Inputs, rows: np.ndarray, side: str, sites: Sequence[Site]
) -> tuple[torch.Tensor, list[Values], list[Values]]:
    """Returns the scores [rows], and for every tower what passes at the sites and ∂s/∂ of it [rows, tokens, width]."""
    begin = {EMBEDDINGS: lambda words: words.detach().requires_grad_()}
    towers = range(len(inputs.towers))
    runs = [model.map.run(inputs.batch(tower, rows, side), edits=begin, record=sites) for tower in towers]
    scores = model.read([model.readout.represent(run.hidden, run.batch.scored) for run in runs])
    values = [run.values[site] for run in runs for site in sites]
    found = iter(zip(values, torch.autograd.grad(scores.sum(), values), strict=True))
    both = [{site: next(found) for site in sites} for _ in towers]
    kept = [{site: value.detach() for site, (value, _) in tower.items()} for tower in both]
    return scores.detach(), kept, [{site: gradient for site, (_, gradient) in tower.items()} for tower in both]


def without_gradients(
    model: Any, inputs: Inputs, rows: np.ndarray, side: str, sites: Sequence[Site]
) -> tuple[torch.Tensor, list[Values]]:
    """Returns the scores [rows], and for every tower what passes at the sites."""
    runs = [model.map.run(inputs.batch(i, rows, side), record=sites) for i in range(len(inputs.towers))]
    vectors = [model.readout.represent(run.hidden, run.batch.scored) for run in runs]
    return model.read(vectors), [run.values for run in runs]
