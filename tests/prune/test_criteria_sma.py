"""The arithmetic of SMA: ranks, roles and protection."""

import numpy as np
import pytest
from fits import add_query, assert_layers, fit_on
from inside import FitData, neuron_gradients
from toys import toy_bi_encoder, toy_cross_encoder

from pyterrier_mech import AblateHeads, AttentionShares, Circuit, Perturb, Units, head_roles
from pyterrier_mech.prune import SMA, Taylor

pytestmark = pytest.mark.numeric


def order(layers):
    return np.argsort(np.concatenate(layers), kind='stable').tolist()


def test_without_roles_and_protection_it_orders_by_effect():
    model, data = toy_cross_encoder('bert'), fit_on()
    found = SMA(protection=1, role_weighting=False, perturbation=add_query).scores(model, data)
    effects = AblateHeads(model)(data.frame)
    heads = [effects[f'L{i}H{h}'].abs().mean() for i in range(2) for h in range(4)]
    assert order(found.heads) == np.argsort(heads).tolist()
    assert order(found.neurons) == order(Taylor().scores(model, data).neurons)
    np.testing.assert_allclose(np.sort(np.concatenate(found.heads)), (np.arange(8) + 0.5) / 8)
    assert found.notes['circuit'] == [] and not found.joint


def test_odds_of_circuit_members_are_three_times_as_high():
    model, data = toy_cross_encoder('bert'), fit_on()
    circuit = Circuit.from_units(['L0H1', 'L1N3'])
    plain, found = (SMA(circuit=circuit, protection=odds).scores(model, data) for odds in (1, 3.0))
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
    weighed, alone = SMA(protection=1).scores(model, data), SMA(protection=1, role_weighting=False).scores(model, data)
    # Undescribed attention: heads keep their effect.
    assert weighed.notes['roles'] == {'heads': False, 'neurons': True}
    assert_layers(weighed.heads, alone.heads)
    g = np.concatenate(neuron_gradients(model, data), axis=1)
    means = [np.concatenate(part) for part in parts]
    strength = np.abs(g[relevant].mean(0) - g[~relevant].mean(0)) / (means[0] + means[1])
    expected = np.concatenate(effects) * np.clip(strength, 0.1, 1)
    assert order(weighed.neurons) == np.argsort(expected).tolist() != order(alone.neurons)
    without = SMA(protection=1).scores(model, FitData(data.frame))
    assert without.notes['roles'] == {'heads': False, 'neurons': False}
    assert_layers(without.neurons, alone.neurons)


def test_heads_are_weighed_by_how_far_they_look_from_even_attention():
    model, data = toy_cross_encoder('bert', initializer_range=1.0, fresh=True), fit_on()
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
    alone = SMA(protection=1, role_weighting=False).scores(model, data)
    assert order(SMA(protection=1).scores(model, data).heads) == np.argsort(expected).tolist() != order(alone.heads)


def test_a_circuit_is_discovered_where_there_are_two_versions():
    model, data = toy_cross_encoder('deberta-v2'), fit_on()
    found = SMA(perturbation=add_query).scores(model, data)
    assert found.notes['protection'] == 'discovered'
    heads, neurons = Units.of(found.notes['circuit']).heads, Units.of(found.notes['circuit']).neurons
    assert 1 <= len(heads) <= 2 and len(neurons) == 1
    best = np.concatenate(SMA(protection=1).scores(model, data).neurons)
    assert neurons == Units.of({'neurons': [divmod(int(np.argmax(best)), 48)]})
    paired = FitData(Perturb(add_query)(data.frame), data.qrels)
    assert SMA().scores(model, paired).notes['protection'].startswith('discovered')
    assert SMA().scores(model, data).notes['protection'].startswith('none')
    assert SMA().scores(toy_bi_encoder('bert'), data).notes['roles']['heads'] is False
