"""The model at points of a line: scores, and activations with their gradients, through the module's own forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pyterrier_mech.anatomy.model import EMBEDDINGS, Batch
from pyterrier_mech.attribute.lines import Line
from pyterrier_mech.inputs.batching import Budget

Values = tuple[torch.Tensor, torch.Tensor]

# A token of a run that keeps its graph takes the memory of several without: it counts so often in a batch.
GRAPH = 4


@dataclass
class Node:
    """One point of one row.

    Attributes:
        score: The score there.
        sites: Activation and gradient [tokens, width] at every site; of the first token alone, in the last layer,
            where no other is read.
        cuts: The same at every full cut of the network.
    """

    score: float
    sites: list[Values]
    cuts: list[Values]


class Points:
    """Rows whose lines are walked together.

    Args:
        model: A ranker.
        lines: The line of every row.
        site: 'neurons', 'heads' or 'embeddings'.
        budget: Tokens of one batch; each counts `GRAPH` times.
    """

    def __init__(self, model: Any, lines: Sequence[Line], site: str, budget: Budget):
        """Looks up the embeddings of both ends."""
        self.model, self.lines, self.budget = model, lines, budget
        first = lines[0]
        self.batch = first.inputs.batch(first.tower, [line.row for line in lines])
        starts = self.batch.tensors['input_ids'].clone()
        for row, line in zip(starts, lines, strict=True):
            row[: len(line)] = torch.from_numpy(line.baseline)
        embed = model.map.base.get_input_embeddings()
        self.start = embed(starts).detach()
        self.change = embed(self.batch.tensors['input_ids']).detach() - self.start
        self.sites = [EMBEDDINGS] if site == EMBEDDINGS.kind else model.map.sites(site)
        self.cuts = [] if site == EMBEDDINGS.kind else model.map.sites('resid_post')
        self.others = [torch.stack(vectors) for vectors in zip(*[line.others for line in lines], strict=True)]

    def evaluate(self, places: Sequence[tuple[int, float]]) -> Iterator[Node]:
        """Yields the node of every (row of the batch, α), in their order."""
        begin = 0
        while begin < len(places):
            width = GRAPH * len(self.lines[places[begin][0]])
            chunk = places[begin : begin + max(1, self.budget.tokens // width)]
            yield from self._forward(np.asarray([row for row, _ in chunk]), [alpha for _, alpha in chunk])
            begin += len(chunk)

    def _forward(self, rows: np.ndarray, alphas: Sequence[float]) -> list[Node]:
        model = self.model
        lengths = [len(self.lines[row]) for row in rows]
        width = max(lengths)
        picked = torch.from_numpy(rows).to(self.start.device)
        batch: Batch = self.batch.picked(lambda tensor: tensor[picked, :width])
        steps = torch.tensor(alphas, dtype=self.start.dtype, device=self.start.device)[:, None, None]
        point = (self.start[picked, :width] + steps * self.change[picked, :width]).requires_grad_()
        read, seen = model.map.represent(
            batch, model.readout, edits={EMBEDDINGS: lambda _: point}, record=[*self.sites, *self.cuts]
        )
        vectors = [vectors[picked] for vectors in self.others]
        vectors.insert(self.lines[0].tower, read)
        scores = model.read(vectors)
        outputs = [seen[site] for site in [*self.sites, *self.cuts]]
        gradients = torch.autograd.grad(scores.sum(), outputs)
        at = model.readout.at(batch.scored)
        values = [(_plain(a, width, at), _plain(g, width, at)) for a, g in zip(outputs, gradients, strict=True)]
        nodes = []
        for row, (length, score) in enumerate(zip(lengths, scores.tolist(), strict=True)):
            curve = [(a[row, :length], g[row, :length]) for a, g in values]
            nodes.append(Node(score, curve[: len(self.sites)], curve[len(self.sites) :]))
        return nodes


def _plain(values: torch.Tensor, width: int, at: torch.Tensor | int | None) -> torch.Tensor:
    """Returns values without their graph, half precision raised so that sums over points keep it.

    A token that stands alone in the last layer, and is not the first, is put where it belongs.
    """
    values = values.detach()
    if isinstance(at, torch.Tensor) and values.shape[1] < width:
        whole = values.new_zeros(len(values), width, values.shape[-1])
        whole[torch.arange(len(values), device=at.device), at] = values[:, 0]
        values = whole
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
