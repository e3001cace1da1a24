"""Edits of a site: from the tensor that passes there to what stands in its place."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pyterrier_mech.anatomy.model import Edit, ModelMap
from pyterrier_mech.units import HEADS, Site, Units

Columns = dict[Site, torch.Tensor]
"""For every site that is touched, where the values of the units stand in its last dimension."""


def columns_of(model: ModelMap, units: Units) -> Columns:
    """Returns where the values of units stand, site by site, in the order of the unit numbers."""
    columns: Columns = {}
    for site, numbers in units.by_site().items():
        width = model.layers[site.layer].head_dim if site.kind == HEADS else 1
        places = [number * width + i for number in numbers for i in range(width)]
        columns[site] = torch.tensor(places, device=model.device)
    return columns


def uniform(edit: Edit) -> Edit:
    """Marks an edit that does the same at every position, so that it fits a layer that computes a single token."""
    edit.uniform = True  # type: ignore[attr-defined]
    return edit


def put(columns: torch.Tensor, values: Callable[[], torch.Tensor]) -> Edit:
    """Returns the edit that puts values, broadcastable to [rows, tokens, columns], in the place of some columns.

    Values are asked for when the run reaches the site, so that not all sites' values exist at a time.
    """

    def edit(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed[..., columns] = values().to(changed.dtype)
        return changed

    return edit


def zeros(columns: Columns) -> dict[Site, Edit]:
    """Returns the edits that set the columns of some sites to zero."""

    def zero(places: torch.Tensor) -> Edit:
        return uniform(put(places, lambda: torch.zeros(1, device=places.device)))

    return {site: zero(places) for site, places in columns.items()}


def picking(columns: Columns) -> dict[Site, Edit]:
    """Returns what a run has to record so that the columns of some sites, and no more, are kept."""

    def of(places: torch.Tensor) -> Edit:
        return lambda tensor: tensor[..., places]

    return {site: of(places) for site, places in columns.items()}


def scale(gates: torch.Tensor, width: int = 1) -> Edit:
    """Returns the edit that multiplies units of some width by gates [units] or [rows, units]."""

    def edit(tensor: torch.Tensor) -> torch.Tensor:
        factors = gates.repeat_interleave(width, dim=-1) if width > 1 else gates
        return tensor * factors.unsqueeze(-2).to(tensor.dtype)

    return uniform(edit)
