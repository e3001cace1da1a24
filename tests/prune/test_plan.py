"""Plans against what they promise."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inside import Costs, check_budget, flop_costs, parameter_costs
from toys import toy_cross_encoder

from pyterrier_mech import Circuit, Units
from pyterrier_mech.prune import Plan, UnitScores, make_plan

HEADS, NEURONS, LAYERS = 4, 48, 4


cross = functools.cache(toy_cross_encoder)


@functools.cache
def deep():
    return toy_cross_encoder('bert', num_hidden_layers=LAYERS)


def scores_of(heads, neurons, **options):
    return UnitScores([np.asarray(h, float) for h in heads], [np.asarray(n, float) for n in neurons], **options)


def drawn(seed=0, **options):
    rng = np.random.default_rng(seed)
    return scores_of(rng.random((LAYERS, HEADS)), rng.random((LAYERS, NEURONS)), **options)


def widths(plan):
    return list(map(len, plan.heads)), list(map(len, plan.neurons))


def cost_of(plan, costs):
    return costs.total(*widths(plan)) / costs.whole


def flat_latency(model, fixed=0.1, value=1.0):
    """Time that is concave in the width, as measured times are."""
    heads = [np.sqrt(np.arange(model.n_heads(layer) + 1)) for layer in range(model.n_layers)]
    neurons = [np.sqrt(np.arange(model.n_neurons(layer) + 1)) for layer in range(model.n_layers)]
    parts = sum(part[-1] for part in heads + neurons) / (value - fixed)
    return Costs([h / parts for h in heads], [n / parts for n in neurons], fixed, 'time')


# -- plans keep what they promise


@pytest.mark.parametrize('budget', ['flops', 'parameters', 'latency'])
@pytest.mark.parametrize('joint', [True, False])
def test_the_budget_is_kept_and_used(budget, joint):
    model = deep()
    costs = {
        'flops': flop_costs(model, 50),
        'parameters': parameter_costs(model),
        'latency': flat_latency(model),
    }[budget]
    for sparsity in (0.1, 0.3, 0.5, 0.8):
        plan = make_plan(
            model, drawn(joint=joint), sparsity, budget=budget, multiple=16, tokens=50, latency=flat_latency(model)
        )
        assert cost_of(plan, costs) <= 1 - sparsity + 1e-12
        assert plan.settings['kept_share'] == pytest.approx(cost_of(plan, costs))
        heads, neurons = widths(plan)
        assert all(width % 16 == 0 for width in neurons)
        for layer in range(LAYERS):
            for row, step, most in ((heads, 1, HEADS), (neurons, 16, NEURONS)):
                if row[layer] < most:
                    row[layer] += step
                    assert costs.total(heads, neurons) > (1 - sparsity) * costs.whole
                    row[layer] -= step


def test_best_units_of_a_layer_stay():
    scores = drawn()
    plan = make_plan(deep(), scores, 0.5, multiple=8)
    for kind in ('heads', 'neurons'):
        for layer, kept in enumerate(getattr(plan, kind)):
            best = np.argsort(-getattr(scores, kind)[layer])[: len(kept)]
            assert sorted(best.tolist()) == list(kept)


def test_uniform_keeps_equal_shares():
    model = deep()
    skewed = scores_of(np.arange(16).reshape(4, 4) ** 3, np.ones((4, 48)) * [[1], [9], [99], [999]])
    for sparsity in (0.25, 0.5, 0.75):
        plan = make_plan(model, skewed, sparsity, budget='flops', allocation='uniform', multiple=8)
        heads, neurons = widths(plan)
        # A block of the next layers may not have fitted; the last layer, which is all but free, is no exception.
        assert max(heads) - min(heads) <= 1 and max(neurons) - min(neurons) <= 8
        assert abs(np.mean(heads) / HEADS - np.mean(neurons) / NEURONS) <= 0.25
        assert 0 <= 1 - sparsity - plan.settings['kept_share'] < 0.1


def test_adaptive_follows_the_scores_within_half_and_twice():
    model = deep()
    means = np.array([[0.0], [1.0], [4.0], [1000.0]])
    scores = scores_of(means * np.ones((4, 4)), means * np.ones((4, 48)))
    for sparsity in (0.4, 0.5):
        plan = make_plan(model, scores, sparsity, budget='parameters', allocation='adaptive', multiple=4)
        neurons = np.array(widths(plan)[1]) / NEURONS
        share = 1 - sparsity
        assert neurons[3] == pytest.approx(min(1.0, 2 * share), abs=0.1)
        assert (neurons >= share / 2 - 0.1).all() and (np.diff(neurons) >= -4.1 / NEURONS).all() and neurons[0] < 0.5
    even = [
        make_plan(model, scores_of(np.ones((4, 4)), np.ones((4, 48))), 0.5, allocation=a, multiple=4)
        for a in ('adaptive', 'uniform')
    ]
    assert even[0] == even[1]


def test_global_drops_whole_sublayers():
    heads, neurons = np.ones((4, 4)), np.ones((4, 48)) / 100
    heads[1], neurons[2] = 1e-6, 1e-6
    plan = make_plan(deep(), scores_of(heads, neurons, joint=True), 0.3, budget='parameters', multiple=8)
    assert plan.heads[1] == () and plan.neurons[2] == ()
    assert plan.heads[2] == plan.heads[3] == (0, 1, 2, 3)


def test_joint_scores_weigh_heads_against_neurons():
    model = deep()
    heads, neurons = 1e6 * np.ones((4, 4)), np.ones((4, 48))
    joint, apart = (
        make_plan(model, scores_of(heads, neurons, joint=joint), 0.3, budget='parameters', multiple=4)
        for joint in (True, False)
    )
    assert widths(joint)[0] == [4] * 4
    share = sum(widths(apart)[0]) / 16, sum(widths(apart)[1]) / 192
    assert abs(share[0] - share[1]) < 0.1 and max(share) < 0.8


def test_equal_scores_have_one_plan():
    # Tenths are not exact: sums of them must not decide.
    same, ones = (scores_of(np.full((4, 4), value), np.full((4, 48), value)) for value in (0.1, 1.0))
    for allocation in ('global', 'uniform', 'adaptive'):
        plans = [make_plan(deep(), same, 0.5, allocation=allocation, multiple=8) for _ in range(2)]
        assert plans[0] == plans[1] == make_plan(deep(), ones, 0.5, allocation=allocation, multiple=8)
        assert all(layer == tuple(range(len(layer))) for layer in plans[0].heads + plans[0].neurons)


@pytest.mark.parametrize('allocation', ['global', 'uniform', 'adaptive'])
@pytest.mark.parametrize('joint', [True, False])
def test_protected_units_stay_and_do_not_hold_back_others(allocation, joint):
    model = deep()
    scores = drawn(1, joint=joint)
    for layer in (0, 3):
        scores.heads[layer][2], scores.neurons[layer][[5, 40]] = -9.0, -9.0
    circuit = Circuit.from_units(['L0H2', 'L3H2', 'L0N5', 'L0N40', 'L3N5', 'L3N40'])
    plan = make_plan(model, scores, 0.5, protect=circuit, allocation=allocation, multiple=8)
    assert circuit.units - plan.kept == Units()
    assert plan.settings['protected'] == circuit.units.names
    # The other units of these layers are as good as those of the others.
    assert len(plan.heads[3]) > 1 and len(plan.neurons[3]) > 8
    assert cost_of(plan, flop_costs(model, 128)) <= 0.5


@pytest.mark.parametrize('joint', [True, False])
def test_a_bad_protected_unit_does_not_drag_its_layer_down(joint):
    scores = drawn(1, joint=joint)
    scores.heads[0][:], scores.neurons[0][:] = 50.0, 50.0
    scores.heads[0][2], scores.neurons[0][5] = -200.0, -400.0
    plan = make_plan(deep(), scores, 0.4, protect=['L0H2', 'L0N5'], budget='parameters', multiple=8)
    assert len(plan.heads[0]) == HEADS and len(plan.neurons[0]) == NEURONS


def test_one_strong_layer_among_six():
    model, strong = toy_cross_encoder('bert', num_hidden_layers=6), np.array([[1e-6]] * 5 + [[1.0]])
    scores = scores_of(strong * np.ones((6, 4)), strong * np.ones((6, 48)))
    plan = make_plan(model, scores, 0.6, budget='parameters', allocation='adaptive', multiple=2)
    neurons = np.array(widths(plan)[1]) / NEURONS
    assert 0.4 < neurons[5] <= 0.85 and neurons[:5].min() >= 0.15


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    sparsity=st.floats(0.02, 0.98),
    budget=st.sampled_from(['flops', 'parameters']),
    allocation=st.sampled_from(['global', 'uniform', 'adaptive']),
    joint=st.booleans(),
    multiple=st.integers(1, 60),
    scale=st.sampled_from([1e-9, 1.0, 1e9]),
)
def test_any_scores(seed, sparsity, budget, allocation, joint, multiple, scale):
    model = deep()
    rng = np.random.default_rng(seed)
    scores = scores_of(
        scale * rng.standard_normal((LAYERS, HEADS)), rng.standard_normal((LAYERS, NEURONS)), joint=joint
    )
    costs = flop_costs(model, 128) if budget == 'flops' else parameter_costs(model)
    asked = {'budget': budget, 'multiple': multiple}
    if costs.fixed > (1 - sparsity) * costs.whole:
        with pytest.raises(ValueError, match='what must stay takes'):
            make_plan(model, scores, sparsity, allocation=allocation, **asked)
        return
    plan = make_plan(model, scores, sparsity, allocation=allocation, **asked)
    assert cost_of(plan, costs) <= 1 - sparsity + 1e-9
    blocks = [
        np.diff(part[np.unique([*range(0, len(part) - 1, step), len(part) - 1])]).max()
        for parts, step in ((costs.heads, 1), (costs.neurons, multiple))
        for part in parts
    ]
    if sum(map(sum, widths(plan))) < LAYERS * (HEADS + NEURONS):
        assert cost_of(plan, costs) + max(blocks) / costs.whole > 1 - sparsity
    assert all(width % multiple == 0 or width == NEURONS for width in widths(plan)[1])
    assert Plan.from_json(plan.to_json()) == plan == make_plan(model, scores, sparsity, allocation=allocation, **asked)


# -- errors


@pytest.mark.parametrize(
    'change, message',
    [
        ({'sparsity': 0}, 'sparsity must be a share between 0 and 1; got sparsity=0[.] '),
        ({'sparsity': 1.0}, 'sparsity must be a share .*; got sparsity=1.0'),
        ({'sparsity': float('nan')}, 'sparsity must be a share .*; got sparsity=nan'),
        ({'sparsity': None}, 'sparsity must be a share .*; got sparsity=None'),
        ({'budget': 'time'}, "budget must be one of .*got (budget=)?'time'"),
        ({'allocation': 'even'}, "allocation must be one of .*got (allocation=)?'even'"),
        ({'sparsity': None, 'speedup': 2.0}, "speedup=2.0 goes with budget='latency'"),
        ({'budget': 'latency', 'speedup': 2.0}, "speedup=2.0 goes with budget='latency' and without sparsity"),
        ({'budget': 'latency', 'sparsity': None, 'speedup': 1.0}, 'speedup must be above 1; got speedup=1.0'),
        ({'budget': 'latency'}, r'needs times: give latency=latency_costs\(model, frame\)'),
        ({'multiple': 0}, 'multiple must be a whole number from 1; got multiple=0'),
        ({'multiple': 0.5}, 'multiple must be a whole number from 1; got multiple=0.5'),
        ({'tokens': 0}, 'tokens must be the length of a sequence; got tokens=0'),
        ({'protect': ['L9H0']}, 'L9H0: .* does not have it'),
        ({'sparsity': 0.9, 'protect': [f'L0H{i}' for i in range(4)]}, r'what must stay takes .* 4 protected units'),
        ({'budget': 'latency', 'latency': flat_latency(cross('bert'))}, 'these costs are for a model with'),
    ],
)
def test_bad_settings(change, message):
    asked = {'sparsity': 0.5, **change}
    with pytest.raises(ValueError, match=message):
        make_plan(deep(), drawn(), asked.pop('sparsity'), **asked)


def test_a_budget_below_what_no_unit_owns():
    times = flat_latency(deep(), fixed=0.4)
    asked = {'budget': 'latency', 'latency': times, 'protect': (), 'multiple': 8, 'tokens': 1.0}
    with pytest.raises(ValueError, match=r'speedup=3 leaves 33.3% .* what no unit owns 40.0%. Ask for less'):
        check_budget(deep(), None, speedup=3, **asked)
    check_budget(deep(), None, speedup=2, **asked)
    assert cost_of(make_plan(deep(), drawn(), speedup=2, **asked), times) <= 0.5


def test_scores_that_do_not_fit():
    bad = drawn()
    bad.neurons[2][7] = np.nan
    with pytest.raises(ValueError, match='neurons of layer 2 are not all finite'):
        make_plan(deep(), bad, 0.5)
    with pytest.raises(ValueError, match='layer 0 has scores of shape'):
        make_plan(deep(), scores_of(np.ones((4, 5)), np.ones((4, 48))), 0.5)
    with pytest.raises(ValueError, match='scores of 3 layers'):
        make_plan(deep(), scores_of(np.ones((3, 4)), np.ones((4, 48))), 0.5)
    with pytest.raises(ValueError, match='cannot be removed'):
        make_plan(cross('mpnet'), scores_of(np.ones((2, 4)), np.ones((2, 48))), 0.5)


# -- the value


def test_a_plan_is_a_value():
    model = deep()
    plan = make_plan(model, drawn(), 0.5, multiple=8)
    again = Plan.from_json(plan.to_json())
    assert again == plan and hash(again) == hash(plan) and again.settings == plan.settings
    assert dataclasses.replace(plan, settings={}) == plan
    other = make_plan(model, drawn(3), 0.5, multiple=8)
    assert other != plan and len({plan, again, other}) == 2
    assert plan.kept & plan.removed == Units() and plan.kept | plan.removed == Units.all(model)
    assert Plan.removing(model, plan.removed) == plan
    table = plan.to_frame()
    assert list(table) == ['layer', 'heads', 'of_heads', 'neurons', 'of_neurons']
    assert table['heads'].tolist() == widths(plan)[0] and table['of_neurons'].tolist() == [48] * 4
    assert table['neurons'].tolist() == widths(plan)[1] and set(table['of_heads']) == {4}
    assert f'heads {" ".join(map(str, widths(plan)[0]))} of 16' in repr(plan) and plan.model in repr(plan)


def test_removing_chosen_units(tmp_path):
    plan = Plan.removing(cross('bert'), ['L0H1', 'L1N3'])
    assert plan.removed == Units.of(['L0H1', 'L1N3']) and plan.heads == ((0, 2, 3), (0, 1, 2, 3))
    plan.save(tmp_path / 'plan.json')
    assert Plan.load(tmp_path / 'plan.json') == plan
    assert Plan([[3, 0]], [[1]], [4], [2], 'x').heads == ((0, 3),)
    with pytest.raises(ValueError, match='L0H7: .* does not have it'):
        Plan.removing(cross('bert'), ['L0H7'])


def test_a_plan_for_another_model():
    plan = Plan.removing(cross('bert'), ['L0H1'])
    assert plan.check(cross('bert')) is plan
    with pytest.raises(ValueError, match=r'has \[4, 4, 4, 4\] and .*: make a plan for it'):
        plan.check(deep())
    with pytest.raises(ValueError, match='of other weights'):
        plan.check(toy_cross_encoder('bert', seed=1))
    assert plan.check(toy_cross_encoder('bert', dtype=torch.float32)) is plan


def test_what_is_no_plan():
    good = json.loads(Plan.removing(cross('bert'), ['L0H1']).to_json())
    bad = ['', '[]', '3', '{}', json.dumps({**good, 'heads': [[0], [9]]}), json.dumps({**good, 'heads': [['a'], []]})]
    bad += [json.dumps({**good, 'neurons': [[1]]}), json.dumps({**good, 'neurons': [[1, 1], []]})]
    for text in bad:
        with pytest.raises(ValueError, match=r'give what Plan.to_json\(\) returned'):
            Plan.from_json(text)
