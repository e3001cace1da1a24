"""Weights are read and cut only where they are what the model computes with."""

import numpy as np
import pytest
import torch
from toys import toy_cross_encoder, training_frame

from pyterrier_mech import PrunedReranker
from pyterrier_mech.prune import FitData, Magnitude, Movement, Rescaling, mask_weights, prune_units

FRAME = training_frame()
QRELS = FRAME[['qid', 'docno']].assign(label=[(7 * i) % 3 for i in range(len(FRAME))])


class Adapter(torch.nn.Module):
    """What an adapter puts in the place of a linear map: it answers with the weights that it adapts."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.more = torch.nn.Parameter(torch.full_like(base.weight, 0.1))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)
    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)

    def forward(self, x):
        return self.base(x) + x @ self.more.T


def adapted(part):
    model = toy_cross_encoder(fresh=True)
    layer = model.model.bert.encoder.layer[1]
    owner, name = {
        'value': (layer.attention.self, 'value'),
        'out': (layer.attention.output, 'dense'),
        'neurons': (layer.output, 'dense'),
    }[part]
    setattr(owner, name, Adapter(getattr(owner, name)))
    return model


WORK = {
    'Magnitude': lambda model: Magnitude().scores(model, None),
    'Movement': lambda model: Movement(steps=1).scores(model, FitData(FRAME, QRELS)),
    'surgery': lambda model: prune_units(model, [[0], [0]], [[0], [0]]),
    'masks': lambda model: mask_weights(model, 0.5),
    'Rescaling': lambda model: Rescaling().recover(toy_cross_encoder(fresh=True), model, FitData(FRAME)),
    'the estimator': lambda model: PrunedReranker(model, multiple=8).fit(FRAME),
}


@pytest.mark.parametrize('work', WORK)
@pytest.mark.parametrize('part', ['value', 'out', 'neurons'])
def test_adapters_are_refused_with_the_way_out(work, part):
    with pytest.raises(ValueError, match=r'Adapter.* merge_and_unload\(\)'):
        WORK[work](adapted(part))


@pytest.mark.parametrize('work', WORK)
def test_hooks_are_refused_with_the_way_out(work):
    model = toy_cross_encoder(fresh=True)
    handle = model.model.bert.encoder.layer[0].attention.self.key.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match='has hooks.* remove hooks'):
        WORK[work](model)
    handle.remove()
    WORK[work](model)


def test_families_without_a_description_have_the_weights_of_their_output_maps():
    model = toy_cross_encoder('deberta-v2', fresh=True)
    scores = Magnitude().scores(model, None)
    assert scores.notes['weights'] == 'of the output maps alone' and all(
        np.isfinite(layer).all() for layer in scores.heads
    )
    layer = model.model.deberta.encoder.layer[0]
    layer.output.dense = Adapter(layer.output.dense)
    with pytest.raises(ValueError, match='Adapter'):
        Magnitude().scores(model, None)
