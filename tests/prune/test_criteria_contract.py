"""What every criterion of pruning keeps: needs, order, samples, and the model left alone."""

import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from fits import add_query, fit_on, mixed, same_scores
from inside import FitData, check_needs, sample
from toys import toy_cross_encoder, weights

from pyterrier_mech.prune import L0, SMA, Conductance, Fisher, Magnitude, Movement, Patching, Random, Taylor

pytestmark = pytest.mark.numeric

CRITERIA = [
    Random(),
    Magnitude(),
    Taylor(),
    Taylor('labels', max_pairs=7),
    Fisher(),
    Conductance(max_pairs=4),
    Patching(add_query),
    Patching(add_query, max_pairs=5, seed=3),
    SMA(perturbation=add_query),
    SMA(circuit=['L0H1', 'L1N3'], max_pairs=6),
    L0(steps=6, batch_pairs=5),
    Movement(steps=3, batch_pairs=3),
]
each = pytest.mark.parametrize('criterion', CRITERIA, ids=lambda criterion: type(criterion).__name__)


def state(model):
    """Everything about the module that a criterion must leave alone."""
    module = model.model
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()]
    flags = [(p.requires_grad, p.grad is None) for p in module.parameters()]
    return hooks, flags, [part.training for part in module.modules()], weights(module)


@each
def test_order_batches_and_the_model(criterion):
    model, data = toy_cross_encoder('bert', fresh=True), fit_on()
    model.model.train()
    model.model.bert.encoder.layer[0].attention.self.query.weight.requires_grad_(False)
    before = state(model)
    found = criterion.scores(model, data)
    after = state(model)
    assert after[:3] == before[:3] and all(before[3][name].equal(value) for name, value in after[3].items())
    shuffled = mixed(data)
    small = toy_cross_encoder('bert', batch_tokens=90)
    same_scores(found, criterion.scores(small, shuffled), rtol=1e-5, atol=1e-9)
    assert found.notes == criterion.scores(small, shuffled).notes
    assert np.ptp(np.concatenate(found.heads)) > 0 and np.ptp(np.concatenate(found.neurons)) > 0


@each
def test_criteria_are_values(criterion):
    assert criterion == replace(criterion) and hash(criterion) == hash(replace(criterion))
    assert criterion != object() and pickle.loads(pickle.dumps(criterion)) == criterion
    assert repr(criterion).startswith(f'{type(criterion).__name__}(')


def test_missing_needs_are_told_before_the_model_is_touched():
    class Untouchable:
        def __getattr__(self, name):
            raise AssertionError(f'touched {name}')

    data = fit_on(qrels=False)
    for criterion, what in [
        (Patching(), 'Patching needs a second version of each text: put Perturb'),
        (Movement(), 'Movement needs judgements: give qrels'),
        (Fisher('labels'), 'Fisher needs judgements'),
        (Taylor('labels'), 'Taylor needs judgements'),
    ]:
        with pytest.raises(ValueError, match=what):
            criterion.scores(Untouchable(), data)
        with pytest.raises(ValueError, match=what):
            check_needs(criterion, data)
    for criterion in CRITERIA[2:]:
        with pytest.raises(ValueError, match=f'{type(criterion).__name__} needs queries and texts'):
            criterion.scores(Untouchable(), None)


@pytest.mark.parametrize(
    ('criterion', 'message'),
    [
        (Taylor('loss'), "loss must be one of .*; got loss='loss'"),
        (Taylor(max_pairs=0), 'max_pairs must be 1 or more; got max_pairs=0'),
        (Conductance(baseline='none'), "baseline must be one of .*; got 'none'"),
        (Conductance(tolerance=0), 'tolerance must be positive, .*; got 0'),
        (SMA(protection=0.5), 'protection must be 1 .* or more; got protection=0.5'),
        (L0(target=1), 'target must be a share between 0 and 1; got target=1'),
        (L0(steps=0), 'steps must be 1 or more; got steps=0'),
        (Movement(learning_rate=0), 'learning_rate must be above 0; got learning_rate=0'),
    ],
)
def test_settings_out_of_range(criterion, message):
    with pytest.raises(ValueError, match=message):
        criterion.scores(None, fit_on())
    with pytest.raises(ValueError, match='L0H9: .* does not have it'):
        SMA(circuit=['L0H9']).scores(toy_cross_encoder('bert'), fit_on())


def test_judgements_of_other_topics_are_refused():
    model, data = toy_cross_encoder('bert'), fit_on()
    other = FitData(data.frame, data.qrels.assign(qid='other ' + data.qrels['qid']))
    for criterion in (Fisher('labels'), Movement(), SMA()):
        with pytest.raises(ValueError, match='none of the 12 rows is judged'):
            criterion.scores(model, other)


def test_a_sample_is_spread_over_queries_and_grows():
    rows = [(f'q{i}', f'd{j}', 'a', f'{i} {j}') for i in range(5) for j in range(20 if i else 2)]
    data = FitData(pd.DataFrame(rows, columns=['qid', 'docno', 'query', 'text']))
    drawn = sample(data, 17, 0).frame
    assert drawn['qid'].value_counts().sort_index().tolist()[0] == 2
    assert set(drawn['qid'].value_counts()[['q1', 'q2', 'q3', 'q4']]) == {3, 4}
    assert set(sample(data, 9, 0).frame['text']) < set(drawn['text'])
    shuffled = FitData(data.frame.sample(frac=1, random_state=0))
    assert set(sample(shuffled, 17, 0).frame['text']) == set(drawn['text'])
    assert set(sample(data, 17, 1).frame['text']) != set(drawn['text'])
    assert sample(data, None, 0) is data and sample(data, 82, 0) is data
