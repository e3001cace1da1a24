"""Sets of units that are removed from toys: some of all layers, whole sublayers, everything."""

import random

import pytest
from toys import HEADS, NEURONS, RESIZABLE

from pyterrier_mech import Units


def all_heads(layer):
    return {(layer, head) for head in range(HEADS)}


def all_neurons(layer):
    return {(layer, neuron) for neuron in range(NEURONS)}


def some(seed):
    """About half of the heads and neurons of both layers, unevenly."""
    draw = random.Random(seed)
    heads = {(0, 2), (1, 0), (1, 3)} if seed else {(0, 0), (0, 1), (0, 3), (1, 2)}
    return heads, {unit for layer in (0, 1) for unit in all_neurons(layer) if draw.random() < 0.3 + 0.4 * layer}


REMOVED = {
    'some': some(0),
    'others': some(1),
    'no heads first, no neurons last': ({*all_heads(0), (1, 1)}, {*all_neurons(1), (0, 5)}),
    'last layer gone': ({*all_heads(1), (0, 2)}, {*all_neurons(1), (0, 47)}),
    'no heads': (all_heads(0) | all_heads(1), set()),
    'everything': (all_heads(0) | all_heads(1), all_neurons(0) | all_neurons(1)),
}
UNITS = {name: Units.of({'heads': heads, 'neurons': neurons}) for name, (heads, neurons) in REMOVED.items()}

every_family = pytest.mark.parametrize('family', RESIZABLE)
# ELECTRA and RoBERTa are cut by the same description as BERT: for them, two sets are enough.
_GRID = [
    (family, units)
    for family in RESIZABLE
    for units in (UNITS if family in ('bert', 'distilbert') else ['some', 'no heads first, no neurons last'])
]
each_removal = pytest.mark.parametrize(
    ('family', 'units'), [pytest.param(family, UNITS[name], id=f'{family}-{name}') for family, name in _GRID]
)
