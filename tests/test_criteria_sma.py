"""What every criterion of pruning keeps (needs, order, samples, the model left alone), and the arithmetic of SMA."""

import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import toy_bi_encoder, toy_cross_encoder
from test_criteria import add_query, assert_layers, fit_on, same

from pyterrier_mech import AblateHeads, AttentionShares, Circuit, Perturb, Units, head_roles
from pyterrier_mech.prune.criteria import (
    L0,
    SMA,
    Conductance,
    Fisher,
    Magnitude,
    Movement,
    Patching,
    Random,
    Taylor,
    check_needs,
    sample,
)
from pyterrier_mech.prune.data import FitData

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


def state(model):
    """Everything about the module that a criterion must leave alone."""
    module = model.model
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()]
    flags = [(p.requires_grad, p.grad is None) for p in module.parameters()]
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return hooks, flags, [part.training for part in module.modules()], weights


@pytest.mark.parametrize('criterion', CRITERIA, ids=repr)
def test_order_batches_and_the_model(criterion):
    model, data = toy_cross_encoder('bert'), fit_on()
    model.model.train()
    model.model.bert.encoder.layer[0].attention.self.query.weight.requires_grad_(False)
    before = state(model)
    found = criterion.scores(model, data)
    after = state(model)
    assert after[:3] == before[:3] and all(before[3][name].equal(value) for name, value in after[3].items())
    shuffled = FitData(data.frame.sample(frac=1, random_state=1).reset_index(drop=True), data.qrels)
    small = toy_cross_encoder('bert', batch_tokens=90)
    same(found, criterion.scores(small, shuffled), rtol=1e-5, atol=1e-9)
    assert found.notes == criterion.scores(small, shuffled).notes
    assert np.ptp(np.concatenate(found.heads)) > 0 and np.ptp(np.concatenate(found.neurons)) > 0


@pytest.mark.parametrize('criterion', CRITERIA, ids=repr)
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
        (Taylor('loss'), "loss must be one of .*got (loss=)?'loss'"),
        (Taylor(max_pairs=0), 'max_pairs=0 leaves nothing'),
        (Conductance(baseline='none'), "baseline must be one of .*got (baseline=)?'none'"),
        (Conductance(tolerance=0), 'tolerance=0 is not positive'),
        (SMA(odds=0.5), 'odds=0.5 would not protect'),
        (L0(target=1), 'target=1 is no share'),
        (L0(steps=0), 'steps=0 trains nothing'),
        (Movement(learning_rate=0), 'learning_rate=0 trains nothing'),
    ],
)
def test_settings_out_of_range(criterion, message):
    with pytest.raises(ValueError, match=message):
        criterion.scores(None, fit_on())
    with pytest.raises(ValueError, match='no head 9'):
        SMA(circuit=['L0H9']).scores(toy_cross_encoder('bert'), fit_on())


def test_judgements_of_other_topics_are_refused():
    model, data = toy_cross_encoder('bert'), fit_on()
    other = FitData(data.frame, data.qrels.assign(qid='other'))
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


# -- SMA


def order(layers):
    return np.argsort(np.concatenate(layers), kind='stable').tolist()


def test_without_roles_and_protection_it_orders_by_effect():
    model, data = toy_cross_encoder('bert'), fit_on()
    found = SMA(odds=1, role_weighting=False, perturbation=add_query).scores(model, data)
    effects = AblateHeads(model)(data.frame)
    heads = [effects[f'L{i}H{h}'].abs().mean() for i in range(2) for h in range(4)]
    assert order(found.heads) == np.argsort(heads).tolist()
    assert order(found.neurons) == order(Taylor().scores(model, data).neurons)
    np.testing.assert_allclose(np.sort(np.concatenate(found.heads)), (np.arange(8) + 0.5) / 8)
    assert found.notes['circuit'] == [] and not found.joint


def test_odds_of_circuit_members_are_three_times_as_high():
    model, data = toy_cross_encoder('bert'), fit_on()
    circuit = Circuit.from_units(['L0H1', 'L1N3'])
    plain, found = (SMA(circuit=circuit, odds=odds).scores(model, data) for odds in (1, 3.0))
    for kind, member in (('heads', (0, 1)), ('neurons', (1, 3))):
        ratios = [
            (b / (1 - b)) / (a / (1 - a)) for a, b in zip(getattr(plain, kind), getattr(found, kind), strict=True)
        ]
        assert ratios[member[0]][member[1]] == pytest.approx(3, rel=1e-12)
        ratios[member[0]][member[1]] = 1
        assert all((layer == 1).all() for layer in ratios)
    assert found.notes['circuit'] == ['L0H1', 'L1N3'] and SMA(circuit=circuit) == SMA(circuit=Units.of(circuit))


def test_neurons_are_weighed_by_how_differently_they_serve_relevant_pairs():
    model, data = toy_cross_encoder('deberta-v2'), fit_on()
    relevant = data.labels().to_numpy() >= 1
    parts = [
        Taylor().scores(model, FitData(data.frame[pick].reset_index(drop=True))).neurons
        for pick in (relevant, ~relevant)
    ]
    effects = Taylor().scores(model, data).neurons
    weighed, alone = SMA(odds=1).scores(model, data), SMA(odds=1, role_weighting=False).scores(model, data)
    # Undescribed attention: heads keep their effect.
    assert weighed.notes['roles'] == {'heads': False, 'neurons': True}
    assert_layers(weighed.heads, alone.heads)
    g = np.concatenate(signed(model, data), axis=1)
    means = [np.concatenate(part) for part in parts]
    strength = np.abs(g[relevant].mean(0) - g[~relevant].mean(0)) / (means[0] + means[1])
    expected = np.concatenate(effects) * np.clip(strength, 0.1, 1)
    assert order(weighed.neurons) == np.argsort(expected).tolist() != order(alone.neurons)
    without = SMA(odds=1).scores(model, FitData(data.frame))
    assert without.notes['roles'] == {'heads': False, 'neurons': False}
    assert_layers(without.neurons, alone.neurons)


def signed(model, data):
    from pyterrier_mech.prune.criteria.gates import unit_gradients

    g = [np.empty((len(data.frame), 48)) for _ in range(2)]
    for batch in unit_gradients(model, data):
        for layer, values in zip(g, batch.neurons, strict=True):
            layer[batch.rows] = values
    return g


def test_heads_are_weighed_by_how_far_they_look_from_even_attention():
    model, data = toy_cross_encoder('bert', initializer_range=1.0), fit_on()
    attention = model.model.bert.encoder.layer[0].attention.self
    for parameter in attention.query.parameters():
        parameter.data[:8] = 0  # its attention is even
    roles = head_roles(AttentionShares(model)(data.frame)).set_index('name')
    effects = AblateHeads(model)(data.frame)
    expected = []
    for name, row in roles.iterrows():
        largest = max(abs(np.log(row['odds.query_to_query'])), abs(np.log(row['odds.document_to_document'])))
        strength = largest / (1 + largest) * (1 - row['attention.to_cls'] - row['attention.to_sep'])
        assert strength > 0.01 or name == 'L0H0'
        expected.append(effects[name].abs().mean() * max(strength, 0.1))
    alone = SMA(odds=1, role_weighting=False).scores(model, data)
    assert order(SMA(odds=1).scores(model, data).heads) == np.argsort(expected).tolist() != order(alone.heads)


def test_a_circuit_is_discovered_where_there_are_two_versions():
    model, data = toy_cross_encoder('deberta-v2'), fit_on()
    found = SMA(perturbation=add_query).scores(model, data)
    assert found.notes['protection'] == 'discovered'
    heads, neurons = Units.of(found.notes['circuit']).heads, Units.of(found.notes['circuit']).neurons
    assert 1 <= len(heads) <= 2 and len(neurons) == 1
    best = np.concatenate(SMA(odds=1).scores(model, data).neurons)
    assert neurons == {divmod(int(np.argmax(best)), 48)}
    paired = FitData(Perturb(add_query)(data.frame), data.qrels)
    assert SMA().scores(model, paired).notes['protection'].startswith('discovered')
    assert SMA().scores(model, data).notes['protection'].startswith('none')
    assert SMA().scores(toy_bi_encoder('bert'), data).notes['roles']['heads'] is False
