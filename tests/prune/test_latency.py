"""Tables of measured time: their shape, and that they are kept. Nothing here is about speed itself."""

import json
import warnings
from pathlib import Path

import inside
import numpy as np
import pandas as pd
import pytest
from fits import ticking
from inside import Costs
from toys import QUERIES, TEXTS, toy_bi_encoder, toy_cross_encoder

from pyterrier_mech import CrossEncoder
from pyterrier_mech.prune import Plan, UnitScores, latency_costs, make_plan, prune_units

FRAME = pd.DataFrame({'query': QUERIES, 'text': TEXTS})


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """PyTerrier's folder, where tables are kept."""
    monkeypatch.setenv('PYTERRIER_HOME', str(tmp_path))
    return tmp_path


def checked(model, costs):
    assert costs.whole == pytest.approx(1)
    assert 0 <= costs.fixed <= 1
    for layer in range(model.n_layers):
        for table, count in (
            (costs.heads[layer], model.n_heads(layer)),
            (costs.neurons[layer], model.n_neurons(layer)),
        ):
            assert table.shape == (count + 1,) and table[0] == 0 and (np.diff(table) >= 0).all()
    return costs


@pytest.mark.parametrize(
    'make',
    [
        lambda: toy_cross_encoder('bert'),
        lambda: toy_cross_encoder('distilbert'),
        lambda: toy_bi_encoder('bert', pooling='mean'),
        lambda: prune_units(toy_cross_encoder('bert'), [[0, 2], []], [[], list(range(20))]),
        lambda: toy_cross_encoder('bert', num_hidden_layers=1),
    ],
)
def test_measured_tables(make):
    model = make()
    before = model.score(QUERIES, TEXTS)
    checked(model, latency_costs(model, FRAME, repeats=2, cache=False))
    np.testing.assert_allclose(model.score(QUERIES, TEXTS), before, atol=1e-12)


def test_times_are_put_where_they_were_measured(monkeypatch):
    # A head takes as long as any other, as do neurons; and whatever there is, one second goes by.
    model = toy_cross_encoder('bert', num_hidden_layers=3, num_attention_heads=8)
    last = 0.125
    parts = [1.0, 1.0, last]

    def seconds(widths):
        return 2.5 + sum(part * (0.5 * h + n / 48) for part, (h, n) in zip(parts, widths, strict=True))

    ticking(monkeypatch, seconds)
    costs = checked(model, latency_costs(model, FRAME, repeats=3, cache=False))
    whole = 2.5 + sum(parts) * 5
    assert costs.fixed == pytest.approx(2.5 / whole)
    for layer, part in enumerate(parts):
        np.testing.assert_allclose(costs.heads[layer], part * 0.5 * np.arange(9) / whole, atol=1e-12)
        np.testing.assert_allclose(costs.neurons[layer], part * np.arange(49) / 48 / whole, atol=1e-12)


def test_few_heads_have_few_widths(monkeypatch):
    # Three heads: no eighth of them can be measured, and thirds must not be taken for eighths.
    model = toy_cross_encoder('bert', hidden_size=24, num_attention_heads=3)
    ticking(monkeypatch, lambda widths: 1.0 + sum(h**2 for h, _ in widths))
    costs = latency_costs(model, FRAME, repeats=1, cache=False)
    np.testing.assert_allclose(costs.heads[0] / costs.heads[0][-1], [0, 1 / 9, 4 / 9, 1])


def test_layers_of_unequal_width(monkeypatch):
    model = prune_units(toy_cross_encoder('bert', num_hidden_layers=3), [[0, 1, 2, 3], [0, 1], [0]], [[], [], []])
    ticking(monkeypatch, lambda widths: 1.0 + widths[0][0] + widths[1][0])
    costs = checked(model, latency_costs(model, FRAME, repeats=1, cache=False))
    np.testing.assert_allclose(costs.heads[0], np.arange(5) / 7)
    np.testing.assert_allclose(costs.heads[1], np.arange(3) / 7)


def test_noise_does_not_make_wider_quicker(monkeypatch):
    rng = np.random.default_rng(0)
    ticking(monkeypatch, lambda widths: 1.0 + rng.random())
    model = toy_cross_encoder('bert')
    for _ in range(5):
        checked(model, latency_costs(model, FRAME, repeats=1, cache=False))
    ticking(monkeypatch, lambda widths: 1.0 if sum(n for _, n in widths) == 96 and widths[0][0] else 0.5)
    checked(model, latency_costs(model, FRAME, repeats=1, cache=False))


def test_a_table_is_kept(home, monkeypatch):
    model = toy_cross_encoder('bert')
    scored = ticking(monkeypatch, lambda widths: 1.0 + sum(h + n for h, n in widths))
    first = latency_costs(model, FRAME)
    (file,) = [path for path in Path(home).rglob('*') if path.is_file()]
    assert json.loads(file.read_text())['fixed'] and scored

    def refuse(*_):
        raise AssertionError('it was measured again')

    monkeypatch.setattr(CrossEncoder, 'score', refuse)
    # Other weights, other rows of the same lengths, in another order: the same shapes.
    again = latency_costs(toy_cross_encoder('bert', seed=1), FRAME.iloc[::-1])
    assert isinstance(again, Costs) and again.fixed == first.fixed
    for one, other in zip([*first.heads, *first.neurons], [*again.heads, *again.neurons], strict=True):
        np.testing.assert_array_equal(one, other)
    others = [
        lambda: latency_costs(model, FRAME, cache=False),
        lambda: latency_costs(model, FRAME, repeats=3),
        lambda: latency_costs(model, FRAME.assign(text=[text * 4 for text in TEXTS])),
        lambda: latency_costs(model, FRAME.head(3)),
        lambda: latency_costs(toy_cross_encoder('bert', intermediate_size=64), FRAME),
        lambda: latency_costs(toy_cross_encoder('electra'), FRAME),
        lambda: latency_costs(toy_cross_encoder('bert', batch_tokens=100), FRAME),
        lambda: latency_costs(prune_units(model, [[0], [0]], [[0], [0]]), FRAME),
    ]
    for other in others:
        with pytest.raises(AssertionError, match='measured again'):
            other()


def test_rows_are_two_batches_whatever_their_order(monkeypatch):
    frame = pd.concat([FRAME.assign(text=FRAME['text'] + f' {i}') for i in range(20)])
    model = toy_cross_encoder('bert', batch_tokens=100)
    scored = ticking(monkeypatch, lambda widths: 1.0 + sum(h + n for h, n in widths))
    latency_costs(model, frame, repeats=1, cache=False)
    rows = scored[0]
    assert 4 < len(rows) < 20 and all(one == rows for one in scored)
    latency_costs(model, frame.sample(frac=1, random_state=1), repeats=1, cache=False)
    assert scored[-1] == rows


def test_a_plan_by_time(monkeypatch):
    model = toy_cross_encoder('bert')
    ticking(monkeypatch, lambda widths: 10.0 + sum(5 * h + n for h, n in widths))
    costs = latency_costs(model, FRAME)
    rng = np.random.default_rng(0)
    scores = UnitScores(list(rng.random((2, 4))), list(rng.random((2, 48))))
    plan = make_plan(model, scores, speedup=2, budget='latency', latency=costs, multiple=8)
    kept = costs.total([len(layer) for layer in plan.heads], [len(layer) for layer in plan.neurons])
    assert 0.4 < kept <= 0.5 and plan.settings['kept_share'] == pytest.approx(kept)
    with pytest.raises(ValueError, match='what no unit owns'):
        make_plan(model, scores, speedup=100, budget='latency', latency=costs)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'frame': FRAME.head(0)}, 'the frame has no rows'),
        ({'frame': FRAME[['query']]}, "the frame has no 'text'"),
        ({'text_field': 'body'}, "the frame has no 'body'"),
        ({'repeats': 0}, 'repeats must be 1 or more; got repeats=0'),
        ({'model': 'mpnet'}, 'cannot be removed'),
    ],
)
def test_bad_input(change, message, monkeypatch):
    ticking(monkeypatch, lambda widths: pytest.fail('it was measured'))
    asked = {'model': 'bert', 'frame': FRAME, **change}
    with pytest.raises(ValueError, match=message):
        latency_costs(toy_cross_encoder(asked.pop('model')), asked.pop('frame'), **asked)


def test_a_speed_that_no_plan_has_is_warned_of(monkeypatch):
    model = toy_cross_encoder('bert')
    ticking(monkeypatch, lambda widths: 1.0 + sum(heads for heads, _ in widths))
    plan = Plan.removing(model, ['L0H0', 'L0H1', 'L0H2', 'L0H3'])
    with pytest.warns(UserWarning, match='asked for 3.00 times the speed, the nearest plan measures 1.80'):
        found = inside.corrected(lambda speedup: plan, 3.0, model, FRAME, 'text')
    assert found == plan and found.settings['measured_speedup'] == pytest.approx(9 / 5)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        inside.corrected(lambda speedup: plan, 1.75, model, FRAME, 'text')
