"""Linear maps made smaller in place: the heads and neurons of a Hugging Face module that are kept, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, index
from typing import Any

import torch
from torch import nn

from pyterrier_mech.anatomy.families import Family, family_of, known_types
from pyterrier_mech.anatomy.layers import Layer
from pyterrier_mech.anatomy.model import ModelMap

# What Hugging Face attention modules call their number of heads and the width of all heads together.
_COUNTS = ('num_attention_heads', 'n_heads')
_WIDTHS = ('all_head_size', 'dim')


class NoHeads(nn.Module):
    """Stands in for an attention module that has lost all its heads.

    Attention kernels are not all made for no heads, and none is needed. Parameters, under the same names, and settings
    are those of the module that it stands for.
    """

    def __init__(self, attention: nn.Module, out: str | None):
        """Takes over the parts of an attention module.

        Args:
            attention: The module that holds the query, key and value projections, already without rows.
            out: Name of the output projection in it, if it applies that too.
        """
        super().__init__()
        for name, value in vars(attention).items():
            if not name.startswith('_'):
                setattr(self, name, value)
        for name, part in attention.named_children():
            self.add_module(name, part)
        self.out = out

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Returns an output [rows, tokens, 0], or what the output projection makes of it, and no weights."""
        nothing = hidden_states[..., :0]
        return (nothing if self.out is None else self.get_submodule(self.out)(nothing)), None


def keep_units(module: Any, heads: Sequence[Sequence[int]], neurons: Sequence[Sequence[int]]) -> None:
    """Removes all other heads and neurons from a module, in place.

    The projections of heads and the linear maps around neurons get smaller parameters, of the same type, on the same
    device; the biases that follow them and the norms stay, as they would if the outputs were set to zero.

    Args:
        module: An encoder, or an encoder with its classification head, that nothing else uses.
        heads: For each layer, the sorted numbers of the heads that stay; may be empty.
        neurons: For each layer, the sorted numbers of the neurons that stay; may be empty.

    Raises:
        ValueError: If units of the family cannot be removed, or the numbers are not those of its units. The module is
            then as it was.
    """
    check_resizable(module.base_model.config.model_type)
    layers = ModelMap(module).layers
    heads = _checked('heads', heads, [layer.n_heads for layer in layers])
    neurons = _checked('neurons', neurons, [layer.n_neurons for layer in layers])
    for number, layer in enumerate(layers):
        for part in layer.linear_parts:
            if type(part) is not nn.Linear:
                raise ValueError(
                    f'layer {number} has a {type(part).__name__} where a Linear was expected: '
                    'remove units before a module is quantised, adapted or parametrised'
                )
    for layer, kept_heads, kept_neurons in zip(layers, heads, neurons, strict=True):
        if len(kept_heads) < layer.n_heads:
            _keep_heads(layer, kept_heads)
        if len(kept_neurons) < layer.n_neurons:
            _keep_rows(layer.mlp_in, kept_neurons)
            _keep_columns(layer.mlp_out, kept_neurons)


def check_resizable(model_type: str) -> None:
    """Checks that heads and neurons of a family can be removed.

    Raises:
        ValueError: If not, or if the family is unknown; the message names those whose can.
    """
    if not _resizable(family_of(model_type)):
        raise ValueError(
            f'heads and neurons of {model_type!r} cannot be removed: query, key and value must be three linear maps '
            f'and the feed-forward block must not be gated. Those of {", ".join(known_types(_resizable))} can; of '
            'other families they can be silenced, with AblatedReranker'
        )


def _resizable(family: Family) -> bool:
    return len(family.qkv) == 3 and not family.gated


def _checked(kind: str, kept: Sequence[Sequence[int]], counts: Sequence[int]) -> list[list[int]]:
    if len(kept) != len(counts):
        raise ValueError(f'{kind} of {len(kept)} layers are given for a module of {len(counts)}')
    lists = [[index(number) for number in numbers] for numbers in kept]
    for layer, (numbers, count) in enumerate(zip(lists, counts, strict=True)):
        if numbers != sorted(set(numbers)):
            raise ValueError(f'the {kind} to keep in layer {layer} are not sorted, or not all different')
        wrong = [number for number in numbers if not 0 <= number < count]
        if wrong:
            raise ValueError(f'layer {layer} has {count} {kind}, counted from 0: there is no {wrong[0]}')
    return lists


def _keep_heads(layer: Layer, heads: Sequence[int]) -> None:
    columns = [column for head in heads for column in range(layer.columns(head).start, layer.columns(head).stop)]
    for part in layer.qkv_parts:
        _keep_rows(part, columns)
    _keep_columns(layer.attention_out, columns)
    path = layer.family.qkv[0].rpartition('.')[0]
    attention = attrgetter(path)(layer.module)
    for names, value in ((_COUNTS, len(heads)), (_WIDTHS, len(columns))):
        for name in names:
            if hasattr(attention, name):
                setattr(attention, name, value)
    if not heads and not isinstance(attention, NoHeads):
        above, _, name = layer.family.attention_out.rpartition('.')
        layer.module.set_submodule(path, NoHeads(attention, name if above == path else None))


def _keep_rows(part: nn.Linear, rows: Sequence[int]) -> None:
    part.weight = _picked(part.weight, 0, rows)
    if part.bias is not None:
        part.bias = _picked(part.bias, 0, rows)
    part.out_features = len(rows)


def _keep_columns(part: nn.Linear, columns: Sequence[int]) -> None:
    part.weight = _picked(part.weight, 1, columns)
    part.in_features = len(columns)


def _picked(parameter: torch.Tensor, dim: int, places: Sequence[int]) -> nn.Parameter:
    kept = parameter.detach().index_select(dim, torch.tensor(places, dtype=torch.long, device=parameter.device))
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)
