"""The two runs of a batch of aligned pairs: model inputs of either side, and what passes through the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pyterrier_mech.anatomy.encoder import Encoder, Trace, pool
from pyterrier_mech.inputs.alignment import Alignment

Head = tuple[int, int]


@dataclass
class Side:
    """One run of a batch: its inputs and, for the sites that patching touches, its trace."""

    inputs: dict[str, torch.Tensor]
    trace: Trace

    def pooled(self, pooling: str) -> torch.Tensor:
        """Returns the pooled vectors [pairs, d]."""
        return pool(self.trace.hidden, self.inputs['attention_mask'], pooling)


def run_side(encoder: Encoder, alignments: Sequence[Alignment], side: str, uses_segments: bool) -> Side:
    """Runs one side ('original' or 'perturbed') of a batch of pairs, padded to the longest."""
    inputs = side_inputs(encoder, alignments, side, uses_segments)
    return Side(inputs, encoder.trace(inputs))


def run_sides(encoder: Encoder, alignments: Sequence[Alignment], uses_segments: bool) -> tuple[Side, Side]:
    """Runs both sides of a batch of pairs at once; returns the original and the perturbed side."""
    sides = [side_inputs(encoder, alignments, side, uses_segments) for side in ('original', 'perturbed')]
    if sides[0].keys() != sides[1].keys():
        # Only one side hides positions; the other keeps the numbers that the model gives by itself.
        return (Side(sides[0], encoder.trace(sides[0])), Side(sides[1], encoder.trace(sides[1])))
    trace = encoder.trace({name: torch.cat([side[name] for side in sides]) for name in sides[0]})
    count = len(alignments)
    return (
        Side(sides[0], trace.rows(lambda tensor: tensor[:count])),
        Side(sides[1], trace.rows(lambda tensor: tensor[count:])),
    )


def side_inputs(
    encoder: Encoder, alignments: Sequence[Alignment], side: str, uses_segments: bool
) -> dict[str, torch.Tensor]:
    """Returns the model inputs of one side of a batch, [pairs, tokens] each.

    Where positions are hidden by a mask filler, the others are numbered without a gap, so that a model with absolute
    positions reads the plain text. Relative positions and sliding windows still count the hidden ones.
    """
    width = max(map(len, alignments))
    pad = encoder.base.config.pad_token_id or 0

    def padded(arrays: Sequence[np.ndarray], fill: int) -> torch.Tensor:
        values = np.full((len(arrays), width), fill, dtype=np.int64)
        for row, array in zip(values, arrays, strict=True):
            row[: len(array)] = array
        return torch.from_numpy(values).to(encoder.device)

    masks = [getattr(alignment, f'{side}_mask') for alignment in alignments]
    inputs = {
        'input_ids': padded([getattr(alignment, side) for alignment in alignments], pad),
        'attention_mask': padded(masks, 0),
    }
    if uses_segments:
        inputs['token_type_ids'] = padded([alignment.segments for alignment in alignments], 0)
    if not all(mask.all() for mask in masks):
        positions = (inputs['attention_mask'].cumsum(1) - 1).clamp(min=0) + encoder.first_position
        inputs['position_ids'] = positions
    return inputs
