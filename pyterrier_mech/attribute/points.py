"""The model at points of a line: scores, and activations with their gradients, through the module's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pyterrier_mech.anatomy.encoder import Encoder, hooked, pool
from pyterrier_mech.attribute.lines import Line
from pyterrier_mech.inputs.batching import Budget
from pyterrier_mech.patch.runs import side_inputs
from pyterrier_mech.rankers.ranker import Ranker

Values = tuple[torch.Tensor, torch.Tensor]

# A token of a run that keeps its graph takes the memory of several without: it counts so often in a batch.
GRAPH = 4

SITES = {'neurons': 'mlp_out', 'heads': 'attention_out'}


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


class Batch:
    """Rows whose lines are walked together.

    Args:
        model: A ranker.
        lines: The line of every row.
        site: 'neurons', 'heads' or 'embeddings'.
        budget: Tokens of one batch; each counts `GRAPH` times.
    """

    def __init__(self, model: Ranker, lines: Sequence[Line], site: str, budget: Budget):
        """Looks up the embeddings of both ends."""
        self.model, self.lines, self.site, self.budget = model, lines, site, budget
        encoder = model.encoder
        self.inputs = side_inputs(
            encoder, [line.alignment for line in lines], 'original', model.loaded.maker.uses_segments
        )
        starts = self.inputs['input_ids'].clone()
        for row, line in zip(starts, lines, strict=True):
            row[: len(line)] = torch.from_numpy(line.baseline)
        embed = encoder.base.get_input_embeddings()
        self.start = embed(starts).detach()
        self.change = embed(self.inputs['input_ids']).detach() - self.start
        family = encoder.family
        self.first_only = model.pooling_ == 'cls' and family.described and not family.final_norm
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
        model, encoder = self.model, self.model.encoder
        lengths = [len(self.lines[row]) for row in rows]
        width = max(lengths)
        picked = torch.from_numpy(rows).to(self.start.device)
        inputs = {name: tensor[picked, :width] for name, tensor in self.inputs.items()}
        steps = torch.tensor(alphas, dtype=self.start.dtype, device=self.start.device)[:, None, None]
        point = (self.start[picked, :width] + steps * self.change[picked, :width]).requires_grad_()
        with embedding(encoder, point), recording(encoder, self.site, point) as records:
            if self.first_only:
                # The output of the last layer is then what is read.
                last = [encoder.pooled(inputs, 'cls')[:, None]]
                read = last[0][:, 0]
            else:
                last = []
                read = pool(encoder.run(inputs), inputs['attention_mask'], model.pooling_)
        sites, cuts = records(last)
        vectors = [vectors[picked] for vectors in self.others]
        vectors.insert(self.lines[0].tower, read)
        scores = model.read(vectors)
        gradients = torch.autograd.grad(scores.sum(), [*sites, *cuts])
        values = [(_plain(a), _plain(g)) for a, g in zip([*sites, *cuts], gradients, strict=True)]
        nodes = []
        for row, (length, score) in enumerate(zip(lengths, scores.tolist(), strict=True)):
            curve = [(a[row, :length], g[row, :length]) for a, g in values]
            nodes.append(Node(score, curve[: len(sites)], curve[len(sites) :]))
        return nodes


@contextmanager
def embedding(encoder: Encoder, point: torch.Tensor | None = None) -> Iterator[None]:
    """Makes word embeddings the beginning of the graph, for the length of the block.

    The ids still go through the module's own forward, which may read positions off them.

    Args:
        encoder: An encoder.
        point: What stands for the word embeddings; by default they stay as they are.
    """

    def post(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_() if point is None else point

    with hooked(encoder.base.get_input_embeddings(), post=post):
        yield


@contextmanager
def recording(
    encoder: Encoder, site: str, point: torch.Tensor
) -> Iterator[Callable[[list[torch.Tensor]], tuple[list[torch.Tensor], list[torch.Tensor]]]]:
    """Records the sites and the full cuts of a run in the block, layer by layer.

    Yields:
        A function that returns both. It is given the last layer's output if that layer's module is not called whole.

    Raises:
        ValueError: By that function, if a layer's site was not passed exactly once.
    """
    if site == 'embeddings':
        yield lambda last: ([point], [])
        return
    passed: list[list[torch.Tensor]] = [[] for _ in encoder.layers]
    outputs: list[torch.Tensor] = []

    def pre(index: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # A layer without heads has outputs of no width, which come from nowhere.
            passed[index].append(args[0] if args[0].requires_grad else args[0].requires_grad_())

        return keep

    def post(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output if isinstance(output, torch.Tensor) else output[0])

    def records(last: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        for index, found in enumerate(passed):
            if len(found) != 1:
                raise ValueError(
                    f'layer {index} of {type(encoder.base).__name__} passed the place of its {site} {len(found)} '
                    'times in one forward, not once: its description in families does not fit, or the module works '
                    'in chunks (set config.chunk_size_feed_forward to 0)'
                )
        return [found[0] for found in passed], [*outputs, *last]

    with ExitStack() as hooks:
        for index, layer in enumerate(encoder.layers):
            hooks.enter_context(hooked(getattr(layer, SITES[site]), pre=pre(index)))
            hooks.enter_context(hooked(layer.module, post=post))
        yield records


def _plain(values: torch.Tensor) -> torch.Tensor:
    """Returns values without their graph, half precision raised so that sums over points keep it."""
    values = values.detach()
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
