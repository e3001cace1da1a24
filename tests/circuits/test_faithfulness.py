"""Faithfulness against ablated re-rankers on the texts themselves, and identities that hold by construction."""

import inside
import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from toys import FAMILIES, TEXTS, frame_of, toy_bi_encoder, toy_cross_encoder

from pyterrier_mech import AblatedReranker, Circuit, CrossEncoder, Units, faithfulness

pytestmark = pytest.mark.numeric

VALUES = ['zero', 'mean', 'resample']


def frame(added=' bread'):
    """8 pairs of 4 queries: a query word is added at the end."""
    plain = frame_of(8, n_texts=2)
    return plain.assign(text_0=plain['text'], text=plain['text'] + added)


def reference():
    pairs = [('rust', TEXTS[2]), ('bread', TEXTS[3]), ('oil in winter', 'A bicycle needs oil and bread in winter.')]
    return pd.DataFrame(pairs, columns=['query', 'text'])


def all_heads(model):
    return Units.all(model, ['heads'])


def change(model, units, rows):
    """Score changes with units zeroed, by re-rankers on the plain texts; the filler 'a' is written out."""
    stage = AblatedReranker(model, units)
    count = [[len(model.tokenizer.tokenize(text)) for text in rows[column]] for column in ('text', 'text_0')]
    filled = [text + ' a' * (more - less) for text, more, less in zip(rows['text_0'], *count, strict=True)]
    queries = rows['query'].tolist()
    return stage.score(queries, rows['text'].tolist()) - stage.score(queries, filled)


def test_a_row_without_a_score_is_not_left_out_silently():
    model, rows = toy_cross_encoder('bert', fresh=True), frame()
    word = model.tokenizer.convert_tokens_to_ids('yeast')
    with torch.no_grad():
        model.model.get_input_embeddings().weight[word] = np.nan
    with pytest.raises(ValueError, match='scores are not finite'):
        faithfulness(model, Circuit.from_units(['L1H2']), rows, value='zero', n_random=0)


# -- numbers


@pytest.mark.parametrize('family', FAMILIES)
def test_ratios_of_sums_equal_ablated_rerankers(family):
    model, rows = toy_cross_encoder(family), frame()
    circuit = Circuit.from_units(['L1H2', 'L0H1', 'L0H3'])
    table = faithfulness(model, circuit, rows, sizes=[1, 3], value='zero', n_random=2, seed=5)
    assert table['kind'].tolist() == ['circuit', 'random', 'random'] * 2
    assert table[['size', 'draw']].values.tolist() == [[1, 0], [1, 0], [1, 1], [3, 0], [3, 0], [3, 1]]
    whole = change(model, [], rows).sum()
    for row in table.itertuples():
        part = circuit.top(row.size).units
        units = part if row.kind == 'circuit' else Units.random(part, model, 5 + row.draw)
        within = change(model, all_heads(model) - units, rows).sum()
        outside = change(model, units, rows).sum()
        tolerance = 1e-4 if family == 'modernbert' else 1e-8
        np.testing.assert_allclose(
            [row.faithfulness, row.completeness], [within / whole, 1 - outside / whole], tolerance
        )
        assert (row.n_heads, row.n_neurons, row.n, row.n_queries, row.n_left_out) == (row.size, 0, 8, 4, 0)


@pytest.mark.parametrize('make', [toy_cross_encoder, toy_bi_encoder])
@pytest.mark.parametrize('units', [['L1H2', 'L0H1'], ['L1H2', 'L0H1', 'L0N5', 'L1N7'], ['L0N5', 'L1N7', 'L1N8']])
def test_means_equal_ablated_rerankers_where_position_types_are_the_same(make, units):
    # The replaced word is no query word before or after, so its position is of one type in both texts.
    model = make('bert')
    rows = (
        frame().assign(query='rust and oil').assign(text_0=lambda f: f['text'] + ' x', text=lambda f: f['text'] + ' y')
    )
    circuit, settings = Circuit.from_units(units), {'value': 'mean', 'reference': reference()}
    table = faithfulness(model, circuit, rows, sizes=[len(circuit.heads) or 3], n_random=0, **settings)
    kinds = [kind for kind in ('heads', 'neurons') if getattr(circuit.units, kind)]
    every = Units.all(model, kinds)

    def moved(ablated):
        stage = AblatedReranker(model, ablated, **settings)
        scores = [stage.score(rows['query'].tolist(), rows[column].tolist()) for column in ('text', 'text_0')]
        return (scores[0] - scores[1]).sum()

    row, whole = table.iloc[0], moved(Units())
    assert row['faithfulness'] == pytest.approx(moved(every - circuit.units) / whole, rel=1e-8)
    assert row['completeness'] == pytest.approx(1 - moved(circuit.units) / whole, rel=1e-8)
    assert (row['n_heads'], row['n_neurons']) == (len(circuit.heads), len(circuit.neurons))


def test_intervals_are_over_queries():
    model, rows = toy_cross_encoder('bert'), frame()
    units = Units.of(['L0H1', 'L1H2'])
    table = faithfulness(
        model,
        Circuit.from_units(units),
        rows,
        sizes=[2],
        value='zero',
        n_random=0,
        confidence=0.9,
        n_resamples=60,
        seed=3,
    )
    within, whole = change(model, all_heads(model) - units, rows), change(model, [], rows)
    rng, draws = np.random.default_rng(3), []
    for _ in range(60):
        drawn = np.concatenate([[2 * q, 2 * q + 1] for q in rng.integers(4, size=4)])
        draws.append(within[drawn].sum() / whole[drawn].sum())
    expected = np.quantile(draws, [0.05, 0.95])
    np.testing.assert_allclose(table[['faithfulness_low', 'faithfulness_high']].iloc[0], expected, rtol=1e-8)
    assert (table['completeness_low'] <= table['completeness']).all()
    assert (table['completeness'] <= table['completeness_high']).all()


# -- identities


@pytest.mark.parametrize('value', VALUES)
@pytest.mark.parametrize('filler', ['a', 'mask'])
def test_all_heads_are_faithful_and_complete(value, filler):
    """Without heads the first token reads nothing but itself, so no change is left."""
    model = toy_cross_encoder('bert')
    circuit = Circuit.from_units(all_heads(model))
    table = faithfulness(
        model, circuit, frame(), sizes=[8], value=value, reference=reference(), n_random=1, filler=filler
    )
    columns = ['faithfulness', 'faithfulness_low', 'completeness', 'completeness_high']
    np.testing.assert_allclose(table[columns], 1, rtol=1e-12)


@pytest.mark.parametrize('make', [toy_cross_encoder, toy_bi_encoder])
def test_the_empty_circuit_is_the_fully_ablated_model(make):
    model, rows = make('bert'), frame()
    table = faithfulness(model, Circuit.from_units(['L0H0', 'L0N1']), rows, sizes=[0], value='zero', n_random=2)
    remaining = change(model, Units.all(model), rows).sum() / change(model, [], rows).sum()
    np.testing.assert_allclose(table['faithfulness'], remaining, atol=1e-10)
    np.testing.assert_allclose(table['completeness'], 0, atol=1e-12)
    empty = faithfulness(model, Circuit.from_units([]), rows, value='zero', n_random=0)
    heads = change(model, all_heads(model), rows).sum() / change(model, [], rows).sum()
    assert (empty['size'].tolist(), empty['faithfulness'].tolist()) == ([0], [pytest.approx(heads, abs=1e-10)])


@pytest.mark.parametrize('value', VALUES)
def test_order_and_batches_do_not_matter(value):
    settings = {'value': value, 'reference': reference(), 'n_random': 1}
    circuit = Circuit.from_units(['L1H2', 'L0N1'])
    table = faithfulness(toy_cross_encoder('bert'), circuit, frame(), **settings)
    turned = faithfulness(toy_cross_encoder('bert', batch_tokens=1), circuit, frame()[::-1], **settings)
    pd.testing.assert_frame_equal(table, turned, rtol=1e-8)


def test_the_part_follows_the_order_of_the_circuit_and_sizes_have_a_default():
    model = toy_cross_encoder('bert')
    names = ['L1H2', 'L0H1', 'L0H3', 'L1H0', 'L0H0']
    table = faithfulness(model, Circuit.from_units(names), frame(), value='zero', n_random=1)
    assert table['size'].tolist() == [0, 0, 1, 1, 2, 2, 4, 4, 5, 5]
    alone = faithfulness(model, Circuit.from_units(names[:2]), frame(), value='zero', n_random=0)
    np.testing.assert_allclose(
        table[table['kind'] == 'circuit']['faithfulness'].iloc[:3], alone['faithfulness'], rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize('make', [toy_cross_encoder, toy_bi_encoder])
def test_both_inputs_of_a_pair_have_the_same_position_types(make):
    model = make('bert')
    rows = frame().assign(query_0=lambda f: f['query'], query=lambda f: f['query'] + ' today', edited='query text')
    for fields, row, types, marked in inside.ablation_types(model, rows):
        assert 'inserted' not in types
        added = [kind for kind, before in zip(types, marked, strict=True) if before == 'inserted']
        document = 'doc_match' if 'bread' in rows['query'].iloc[row] else 'doc_other'
        assert added == [{'query': 'query', 'text': document}[field] for field in fields]


def test_float32_models():
    model = toy_cross_encoder('bert', dtype=torch.float32)
    table = faithfulness(model, Circuit.from_units(['L0H1']), frame(), value='mean', reference=reference())
    assert table['faithfulness'].dtype == np.float64 and np.isfinite(table['faithfulness']).all()


def test_nothing_is_left_after_an_exception(module):
    model = CrossEncoder(module, tokenizer=toy_cross_encoder('bert').tokenizer)
    handle = module.bert.encoder.layer[0].intermediate.register_forward_pre_hook(lambda *_: {}['boom'])
    with pytest.raises(KeyError, match='boom'):
        faithfulness(model, Circuit.from_units(['L0H1']), frame(), value='mean', reference=reference())
    handle.remove()
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in module.modules())


# -- bad input


def test_queries_that_the_circuit_was_found_on_are_refused():
    circuit = Circuit.from_units(['L0H1'], qids=[1, 9])
    with pytest.raises(ValueError, match=r"found on 1 of the queries.*first: '1'.*frame\[~frame\['qid'\].isin"):
        faithfulness(toy_cross_encoder('bert'), circuit, frame(), value='zero')
    rows = frame()
    table = faithfulness(
        toy_cross_encoder('bert'), circuit, rows[~rows['qid'].isin(circuit.qids)], value='zero', n_random=0
    )
    assert table['n_queries'].tolist() == [3, 3]


def test_rows_that_cannot_be_patched_are_left_out_and_counted():
    rows = frame()
    rows.loc[[0, 5], 'text'] = rows['text_0']
    model, circuit = toy_cross_encoder('bert'), Circuit.from_units(['L0H1'])
    with pytest.warns(UserWarning, match='2 of 8 rows cannot be patched') as record:
        table = faithfulness(model, circuit, rows, value='zero', n_random=0)
    assert record[0].filename == __file__ and set(table['n']) == {6} and set(table['n_left_out']) == {2}
    rest = faithfulness(model, circuit, rows.drop([0, 5]), value='zero', n_random=0)
    np.testing.assert_allclose(table['faithfulness'], rest['faithfulness'], rtol=1e-8)
    with pytest.raises(ValueError, match='None of the 8 rows can be patched.*nothing changed'):
        faithfulness(model, circuit, rows.assign(text=rows['text_0']), value='zero')
    with pytest.raises(ValueError, match='The frame has no rows'):
        faithfulness(model, circuit, rows.iloc[:0], value='zero')


@pytest.mark.parametrize(
    ('settings', 'kind', 'message'),
    [
        ({}, ValueError, "value='mean' needs rows to take values from: give reference="),
        ({'value': 'noise'}, ValueError, "value must be one of .*got (value=)?'noise'"),
        ({'value': 'mean', 'reference': 'x'}, TypeError, 'must be a frame'),
        ({'value': 'zero', 'sizes': [2]}, ValueError, 'size must be between 0 and 1'),
        ({'value': 'zero', 'n_random': -1}, ValueError, 'n_random must be 0'),
        ({'value': 'zero', 'confidence': 2}, ValueError, 'confidence=2'),
    ],
)
def test_bad_settings(settings, kind, message):
    with pytest.raises(kind, match=message):
        faithfulness(toy_cross_encoder('bert'), Circuit.from_units(['L0H1']), frame(), **settings)


def test_bad_circuits_and_frames():
    model = toy_cross_encoder('bert')
    with pytest.raises(TypeError, match=r"circuit must be a Circuit; got \['L0H1'\]: use discover_circuit"):
        faithfulness(model, ['L0H1'], frame(), value='zero')
    with pytest.raises(ValueError, match='L5H0: .* does not have it'):
        faithfulness(model, Circuit.from_units(['L5H0']), frame(), value='zero')
    with pytest.raises(pt.validate.InputValidationError, match='Put an edit before'):
        faithfulness(model, Circuit.from_units(['L0H1']), frame().drop(columns='text_0'), value='zero')


def test_changes_that_cancel_have_no_ratio():
    rows = frame().iloc[:2]
    rows = pd.concat([rows, rows.assign(qid='9', text=rows['text_0'] + ' a', text_0=rows['text'])])
    table = faithfulness(toy_cross_encoder('bert'), Circuit.from_units(['L0H1']), rows, value='zero', n_random=0)
    assert table[['faithfulness', 'faithfulness_low', 'completeness']].isna().all(axis=None)
