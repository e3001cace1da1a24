"""Sets of heads and neurons."""

import pickle

import inside
import numpy as np
import pytest
from toys import minilm_path, toy_cross_encoder

from pyterrier_mech import CrossEncoder, Units
from pyterrier_mech.units import head


class WithUnits:
    units = ['L1H0', 'L0N5']


@pytest.mark.parametrize(
    ('given', 'heads', 'neurons'),
    [
        ([], set(), set()),
        ('L3H7', {(3, 7)}, set()),
        (['L3H7', 'L3N120', (0, 2)], {(3, 7), (0, 2)}, {(3, 120)}),
        (iter(['L0N1', 'L0N1']), set(), {(0, 1)}),
        ([(np.int64(1), np.int32(2))], {(1, 2)}, set()),
        ({'heads': ['L0H1', (1, 1)], 'neurons': ['L0N3', (1, 4)]}, {(0, 1), (1, 1)}, {(0, 3), (1, 4)}),
        ({'neurons': []}, set(), set()),
        (WithUnits(), {(1, 0)}, {(0, 5)}),
        (Units.of([(0, 0)]), {(0, 0)}, set()),
    ],
)
def test_what_names_units(given, heads, neurons):
    assert Units.of(given) == Units.of({'heads': heads, 'neurons': neurons})


@pytest.mark.parametrize('unit', ['L3', 'H3L1', 'L03H1', 'l0h1', '', (1,), (1, 2, 3), (0.5, 1), (-1, 0), None, 3])
def test_what_names_none_is_quoted(unit):
    with pytest.raises(ValueError, match='does not name a head or a neuron') as error:
        Units.of([unit])
    assert repr(unit) in str(error.value)


def test_what_is_no_list_says_what_to_give():
    with pytest.raises(TypeError, match='must be a list of names; got 7'):
        Units.of(7)
    with pytest.raises(ValueError, match="the keys must be 'heads' and 'neurons'; got 'layers'"):
        Units.of({'layers': [1]})
    with pytest.raises(ValueError, match="'L0N1' stands among the heads"):
        Units.of({'heads': ['L0N1']})


def test_order_length_and_repr_do_not_depend_on_how_the_set_was_made():
    units = Units.of(['L1N3', 'L10H0', 'L2H1', 'L0N20', 'L0N3'])
    assert [unit.name for unit in sorted(units)] == units.names == ['L2H1', 'L10H0', 'L0N3', 'L0N20', 'L1N3'] and len(
        units
    ) == 5
    assert repr(units) == "Units.of(['L2H1', 'L10H0', 'L0N3', 'L0N20', 'L1N3'])"
    assert eval(repr(units)) == units == Units.of(reversed(units.names)) == pickle.loads(pickle.dumps(units))
    assert hash(eval(repr(units))) == hash(units) and not Units() and eval(repr(Units())) == Units()


def test_set_algebra():
    a, b = Units.of(['L0H0', 'L0H1', 'L0N1']), Units.of(['L0H1', 'L0N1', 'L1N1'])
    assert (a | b).names == ['L0H0', 'L0H1', 'L0N1', 'L1N1']
    assert (a & b).names == ['L0H1', 'L0N1']
    assert (a - b).names == ['L0H0'] and (b - a).names == ['L1N1']


def test_the_complement_is_everything_else():
    model = toy_cross_encoder('bert')
    units = Units.of(['L0H0', 'L1N47'])
    rest = units.complement(model)
    assert (len(rest.heads), len(rest.neurons)) == (7, 95)
    assert not rest & units and rest | units == Units.all(model) and rest.complement(model) == units


@pytest.mark.parametrize(
    ('unit', 'message'),
    [
        ('L1H4', r'L1H4: .* does not have it; it has \[4, 4\] heads'),
        ('L2H0', r'L2H0: .* does not have it; it has \[4, 4\] heads'),
        ('L0N48', r'L0N48: .* does not have it; it has \[48, 48\] neurons'),
        (head(0, -1), r'L0H-1: .* does not have it; it has \[4, 4\] heads'),
    ],
)
def test_a_unit_that_the_model_has_not_is_named_with_the_counts(unit, message):
    model = toy_cross_encoder('bert')
    for use in (Units.check, Units.complement, lambda units, model: Units.random(units, model, seed=0)):
        with pytest.raises(ValueError, match=message):
            use(Units.of(['L0H0', unit]), model)


def test_heads_are_checked_without_loading_weights():
    model = CrossEncoder(minilm_path())
    assert Units.of(['L5H11']).check(model).names == ['L5H11'] and not inside.is_loaded(model)


def test_random_sets_have_as_many_units_in_every_layer():
    model = toy_cross_encoder('modernbert')
    like = Units.of(['L0H1', 'L2H0', 'L2H3', *[f'L1N{i}' for i in range(9)]])
    drawn = [Units.random(like, model, seed=seed) for seed in range(20)]
    for units in drawn:
        assert [sum(site.layer == i for site, _ in units.heads) for i in range(4)] == [1, 0, 2, 0]
        assert [sum(site.layer == i for site, _ in units.neurons) for i in range(4)] == [0, 9, 0, 0]
    assert len(set(drawn)) == 20 and drawn[3] == Units.random(like.names, model, seed=3)
    assert {unit.name for units in drawn for unit in units.neurons} == {f'L1N{i}' for i in range(48)}


def test_random_sets_over_all_layers_have_the_same_totals():
    model = toy_cross_encoder('bert')
    like = Units.of(['L0H0', 'L0H1', 'L0N0'])
    drawn = [Units.random(like, model, seed=seed, per_layer=False) for seed in range(20)]
    assert all((len(units.heads), len(units.neurons)) == (2, 1) for units in drawn)
    assert {site.layer for units in drawn for site, _ in units.heads} == {0, 1}


def test_random_sets_of_one_seed_are_nested_and_the_same_in_every_process():
    model = toy_cross_encoder('bert')
    sizes = [Units.random([f'L0H{i}' for i in range(k)], model, seed=4) for k in range(5)]
    assert all(small.heads < large.heads for small, large in zip(sizes, sizes[1:]))
    assert Units.random(['L0H0', 'L1H0', 'L0N0', 'L1N0'], model, seed=4).names == ['L0H2', 'L1H0', 'L0N35', 'L1N4']
