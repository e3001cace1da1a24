"""AttributeNeurons against captum, a loop over the points by the module's own embeddings, and exact identities."""

import warnings

import inside
import numpy as np
import pandas as pd
import pytest
import torch
from oracles import MLP_OUTS, conductance
from toys import FAMILIES, assets, frame_of, real_cross_encoder, stacked, toy_bi_encoder, toy_cross_encoder

from pyterrier_mech import AttributeNeurons, CrossEncoder

pytestmark = pytest.mark.numeric

TYPES = ['cls', 'query', 'sep', 'doc_match', 'doc_other']


def ends(model, query, text, baseline='query'):
    """Word embeddings of baseline and input, and the other model inputs, by the tokenizer's own pair encoding."""
    encoded = model.tokenizer([query], [text], return_tensors='pt')
    owners = np.array([-1 if owner is None else owner for owner in encoded.sequence_ids(0)])
    given = dict(encoded)
    ids = given.pop('input_ids')
    moves = torch.tensor(owners == 0 if baseline == 'query' else owners >= 0)[None]
    embed = model.model.base_model.get_input_embeddings()
    return embed(torch.where(moves, model.tokenizer.pad_token_id, ids)).detach(), embed(ids).detach(), given


def logits(model, given):
    return lambda point: model.model(inputs_embeds=point, **given).logits


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('baseline', ['query', 'all'])
def test_the_left_rule_is_captums_layer_conductance(family, baseline):
    captum = pytest.importorskip('captum.attr')
    model = toy_cross_encoder(family)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        res = AttributeNeurons(model, baseline=baseline, rule='left', points=10)(frame_of(2))
    row = res.iloc[1]
    start, end, given = ends(model, row['query'], row.text, baseline)
    for index, module in enumerate(MLP_OUTS[family](model.model.base_model)):

        def forward(point):
            n = len(point)
            return model.model(inputs_embeds=point, **{k: v.expand(n, -1) for k, v in given.items()}).logits[:, 0]

        attribution = captum.LayerConductance(forward, module).attribute(
            end, baselines=start, n_steps=10, attribute_to_layer_input=True
        )
        expected = attribution[0].sum(0).detach().numpy()
        assert np.abs(expected).max() > 1e-4
        # ModernBERT turns queries and keys in float32.
        np.testing.assert_allclose(row.neurons[index], expected, atol=1e-6 if family == 'modernbert' else 1e-10)


@pytest.mark.parametrize('family', FAMILIES)
def test_the_trapezoid_is_the_loop_over_the_points(family):
    model = toy_cross_encoder(family)
    row = AttributeNeurons(model, points=5, tolerance=1e9)(frame_of(2)).iloc[1]
    start, end, given = ends(model, row['query'], row.text)
    totals, _ = conductance(logits(model, given), MLP_OUTS[family](model.model.base_model), 'input', start, end, 5)
    tolerance = 1e-6 if family == 'modernbert' else 1e-12
    for mine, total in zip(row.neurons, totals):
        np.testing.assert_allclose(mine, total.sum(0), atol=tolerance)


def test_the_error_falls_by_four_when_the_intervals_are_halved():
    model = toy_cross_encoder('bert')
    short = frame_of(1)
    reference = stacked(AttributeNeurons(model, points=1001, max_points=1001)(short), 'neurons')
    errors = [
        np.abs(stacked(AttributeNeurons(model, points=n, tolerance=1e9)(short), 'neurons') - reference).max()
        for n in (5, 9, 17)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1) and errors[1] / errors[2] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize('family', ['bert', 'modernbert', 'mpnet'])
def test_points_are_added_until_every_block_output_is_complete(family):
    """The error of each grid by hand; the stage stops at the first that is within the tolerance."""
    model = toy_cross_encoder(family)
    tolerance = 2e-3 if family == 'modernbert' else 2e-4
    res = AttributeNeurons(model, points=3, tolerance=tolerance)(frame_of(2))
    layers = inside.layers_of(model)
    for row in res.rename(columns={'completeness_error.neurons': 'error'}).itertuples():
        start, end, given = ends(model, row.query, row.text)
        for points in (3, 5, 9, 17, 33, 65, 129, 257):
            totals, scores = conductance(logits(model, given), layers, 'output', start, end, points)
            change, way = scores[-1] - scores[0], np.abs(np.diff(scores)).sum()
            worst = max(abs(total.sum().item() - change) for total in totals)
            error = worst / max(abs(change), 0.1 * way)
            if error <= tolerance:
                break
        assert points > 3 and row.error <= tolerance
        assert row.error == pytest.approx(error, abs=1e-6 if family == 'modernbert' else 1e-10)
        neurons, _ = conductance(
            logits(model, given), MLP_OUTS[family](model.model.base_model), 'input', start, end, points
        )
        for mine, total in zip(row.neurons, neurons):
            np.testing.assert_allclose(mine, total.sum(0), atol=1e-6 if family == 'modernbert' else 1e-12)


@pytest.mark.parametrize('family', FAMILIES)
def test_neurons_and_the_outputs_of_their_block_have_the_same_sum(family):
    model = toy_cross_encoder(family)
    row = AttributeNeurons(model, points=5, tolerance=1e9)(frame_of(2)).iloc[1]
    start, end, given = ends(model, row['query'], row.text)
    totals, _ = conductance(logits(model, given), MLP_OUTS[family](model.model.base_model), 'output', start, end, 5)
    sums = [total.sum().item() for total in totals]
    assert max(map(abs, sums)) > 1e-3
    np.testing.assert_allclose(row.neurons.sum(1), sums, atol=1e-6 if family == 'modernbert' else 1e-12)


def test_no_point_is_computed_twice():
    model = toy_cross_encoder('bert', fresh=True)
    passed = []
    handle = model.model.bert.encoder.layer[0].output.dense.register_forward_pre_hook(
        lambda _, args: passed.append(len(args[0]))
    )
    res = AttributeNeurons(model, points=3, tolerance=1e-3, batch_tokens=400)(frame_of(1))
    used = sum(passed)
    assert used in (17, 33, 65) and max(passed) > 1
    passed.clear()
    again = AttributeNeurons(model, points=used, max_points=used)(frame_of(1))
    assert sum(passed) == used
    handle.remove()
    np.testing.assert_allclose(stacked(again, 'neurons'), stacked(res, 'neurons'), atol=1e-12)
    np.testing.assert_allclose(again['completeness_error.neurons'], res['completeness_error.neurons'], atol=1e-10)


def test_rows_that_stay_above_the_tolerance_are_counted_once():
    model = toy_cross_encoder('bert')
    stage = AttributeNeurons(model, points=3, tolerance=1e-7, max_points=5)
    with pytest.warns(UserWarning, match=r'4 of 4 rows have a completeness error above tolerance=1e-07') as caught:
        res = stage(frame_of(4))
    assert len(caught) == 1 and (res['completeness_error.neurons'] > 1e-7).all()


@pytest.mark.parametrize('baseline', ['query', 'all'])
@pytest.mark.parametrize('family', ['bert', 'roberta', 'distilbert'])
def test_bi_encoder_moves_one_tower(family, baseline):
    model = toy_bi_encoder(family)
    row = AttributeNeurons(model, baseline=baseline, points=5, tolerance=1e9)(frame_of(2)).iloc[1]
    moving, staying = ('query', 'text') if baseline == 'query' else ('text', 'query')
    other = torch.tensor(model.encode(staying, [row[staying]])[0])
    given = dict(model.tokenizer([row[moving]], return_tensors='pt'))
    ids = given.pop('input_ids')
    special = torch.isin(ids, torch.tensor(model.tokenizer.all_special_ids))
    embed = model.model.get_input_embeddings()
    start = embed(torch.where(special, ids, model.tokenizer.pad_token_id)).detach()

    def score(point):
        pooled = model.model(inputs_embeds=point, **given).last_hidden_state.mean(1)
        return torch.cosine_similarity(pooled, other[None])

    totals, _ = conductance(score, MLP_OUTS[family](model.model), 'input', start, embed(ids).detach(), 5)
    for mine, total in zip(row.neurons, totals):
        assert np.abs(mine).max() > 1e-5
        np.testing.assert_allclose(mine, total.sum(0), atol=1e-12)


@pytest.mark.parametrize('make', [toy_cross_encoder, toy_bi_encoder])
def test_token_types_sum_to_the_whole(make):
    model = make('bert')
    plain = AttributeNeurons(model, baseline='all', points=5, tolerance=1e9)(frame_of(4))
    res = AttributeNeurons(model, baseline='all', points=5, tolerance=1e9, by='token_type')(frame_of(4))
    assert list(res.columns[-6:]) == [*[f'neurons.{kind}' for kind in TYPES], 'completeness_error.neurons']
    parts = np.stack([stacked(res, f'neurons.{kind}') for kind in TYPES])
    np.testing.assert_allclose(np.nansum(parts, axis=0), stacked(plain, 'neurons'), atol=1e-12)
    assert np.isnan(parts[1]).all() == (not isinstance(model, CrossEncoder))
    # 'bread' of the first query is in the second and fourth text
    assert [np.isnan(parts[3][i]).all() for i in range(4)] == [True, False, True, False]
    assert not np.isnan(parts[[0, 2, 4]]).any()


def test_layers_with_different_numbers_of_neurons():
    model = toy_cross_encoder('bert', fresh=True)
    keep, layer = torch.arange(40), model.model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.intermediate.dense.weight = torch.nn.Parameter(layer.intermediate.dense.weight[keep])
        layer.intermediate.dense.bias = torch.nn.Parameter(layer.intermediate.dense.bias[keep])
        layer.output.dense.weight = torch.nn.Parameter(layer.output.dense.weight[:, keep])
    layer.intermediate.dense.out_features = layer.output.dense.in_features = 40
    res = AttributeNeurons(model)(frame_of(2))
    assert stacked(res, 'neurons').shape == (2, 2, 48)
    assert np.isnan(stacked(res, 'neurons')[:, 0, 40:]).all() and not np.isnan(stacked(res, 'neurons')[:, 0, :40]).any()
    assert not np.isnan(stacked(res, 'neurons')[:, 1]).any()


def test_single_precision_stays_single():
    double, single = (toy_cross_encoder('bert', dtype=dtype) for dtype in (torch.float64, torch.float32))
    expected, res = (AttributeNeurons(model)(frame_of(2)) for model in (double, single))
    assert res.neurons[0].dtype == np.float32 and expected.neurons[0].dtype == np.float64
    assert res['completeness_error.neurons'].dtype == np.float32
    np.testing.assert_allclose(stacked(res, 'neurons'), stacked(expected, 'neurons'), atol=1e-5)


def test_half_precision_gives_single():
    model = toy_cross_encoder('bert', dtype=torch.bfloat16)
    res = AttributeNeurons(model, points=5, tolerance=1e9)(frame_of(2))
    assert res.neurons[0].dtype == np.float32 and np.isfinite(stacked(res, 'neurons')).all()


def test_own_baselines():
    model = toy_cross_encoder('bert')
    pad, cls = model.tokenizer.pad_token_id, model.tokenizer.cls_token_id
    special = model.tokenizer.all_special_ids
    every = AttributeNeurons(model, baseline='all')(frame_of(4))
    mine = AttributeNeurons(model, baseline=lambda ids: np.where(np.isin(ids, special), ids, pad))(frame_of(4))
    np.testing.assert_allclose(stacked(mine, 'neurons'), stacked(every, 'neurons'), atol=1e-12)
    length = len(model.tokenizer(frame_of(4)['query'][0], frame_of(4).text[0])['input_ids'])
    given = AttributeNeurons(model, baseline=[cls] * length)(frame_of(1))
    called = AttributeNeurons(model, baseline=lambda ids: [cls] * len(ids))(frame_of(1))
    np.testing.assert_allclose(stacked(given, 'neurons'), stacked(called, 'neurons'), atol=1e-12)
    same = AttributeNeurons(model, baseline=lambda ids: ids)(frame_of(4))
    assert np.abs(stacked(same, 'neurons')).max() < 1e-12 and (same['completeness_error.neurons'] < 1e-12).all()


@pytest.mark.parametrize(
    ('baseline', 'error', 'message'),
    [
        ('nothing', ValueError, "baseline must be one of .*got (baseline=)?'nothing'"),
        (7, TypeError, 'baseline must be one of'),
        ([1, 2, 3], ValueError, r"qid='0' docno='0': the baseline has shape \(3,\) but the input has 17 tokens"),
        (lambda ids: ids[:-1], ValueError, r"qid='0' docno='0': the baseline has shape \(16,\)"),
        (
            lambda ids: ids + 10**6,
            ValueError,
            "qid='0' docno='0'.*not made of token ids, whole numbers from 0 to 30521",
        ),
        (lambda ids: ids * 0.5, ValueError, "qid='0' docno='0'.*not made of token ids, whole"),
    ],
)
def test_baselines_that_do_not_fit(baseline, error, message):
    with pytest.raises(error, match=message):
        AttributeNeurons(toy_cross_encoder('bert'), baseline=baseline)(frame_of(4))


def test_empty_texts_and_queries():
    model = toy_cross_encoder('bert')
    rows = frame_of(3).assign(query=['', 'bread', ''], text=['bread', '', ''])
    res = AttributeNeurons(model)(rows)
    assert np.abs(res.neurons[1]).max() > 1e-5
    assert (
        np.abs(stacked(res, 'neurons')[[0, 2]]).max() < 1e-12
        and (res['completeness_error.neurons'][[0, 2]] < 1e-12).all()
    )
    assert np.isfinite(stacked(AttributeNeurons(toy_bi_encoder('bert'))(rows), 'neurons')).all()


@pytest.mark.parametrize('family', ['roberta', 'modernbert'])
def test_row_order_batches_and_neighbours_do_not_matter(family):
    model = toy_cross_encoder(family)
    options = {'points': 3, 'tolerance': 0.01}
    tolerance = 1e-6 if family == 'modernbert' else 1e-12
    res = AttributeNeurons(model, **options)(frame_of(4))
    for tokens in (1, 500, 100_000):
        other = AttributeNeurons(model, **options, batch_tokens=tokens)(frame_of(4).sample(frac=1, random_state=3))
        np.testing.assert_allclose(stacked(other.sort_index(), 'neurons'), stacked(res, 'neurons'), atol=tolerance)
        np.testing.assert_allclose(
            other.sort_index()['completeness_error.neurons'], res['completeness_error.neurons'], atol=1e-6
        )
    single = pd.concat([AttributeNeurons(model, **options)(frame_of(4).iloc[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(stacked(single, 'neurons'), stacked(res, 'neurons'), atol=tolerance)


def test_a_model_without_neurons_at_the_expected_place():
    for place, message in (('output.nowhere', 'nowhere.*register_family'), ('output.LayerNorm', 'in_features')):
        with inside.described_as('bert', mlp_out=place):
            with pytest.raises(ValueError, match=rf'has no neurons at the place.*{message}'):
                AttributeNeurons(toy_cross_encoder('bert'))(frame_of(4))


def test_a_block_that_works_in_chunks_is_refused():
    model = toy_cross_encoder('bert', fresh=True)
    for layer in model.model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 1
    with pytest.raises(ValueError, match=r'neurons.L0 exactly once.*more than once.*chunk_size_feed_forward'):
        AttributeNeurons(model)(frame_of(1))


def test_gradients_that_are_not_finite_name_the_row():
    model = toy_cross_encoder('bert', fresh=True)
    with torch.no_grad():
        model.model.bert.embeddings.word_embeddings.weight[model.tokenizer.convert_tokens_to_ids('paint')] = torch.nan
    with pytest.raises(ValueError, match="1 rows have scores or gradients that are not finite \\(qid='0' docno='2'"):
        AttributeNeurons(model)(frame_of(4))


def test_columns_of_token_types_without_rows():
    res, empty = (AttributeNeurons(toy_cross_encoder('bert'), by='token_type')(frame_of(n)) for n in (2, 0))
    assert list(empty.columns) == list(res.columns) and len(empty) == 0


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'rule': 'simpson'}, "rule must be one of .*got (rule=)?'simpson'"),
        ({'points': 1}, 'points must be 2 or more'),
        ({'points': 9, 'max_points': 5}, 'max_points must not be below points=9'),
        ({'tolerance': 0}, 'tolerance must be positive'),
        ({'by': 'position'}, 'by must be one of'),
    ],
)
def test_unknown_settings_name_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        AttributeNeurons(toy_cross_encoder('bert'), **settings)(frame_of(4))


def test_equality_by_tolerance_and_baseline():
    model = CrossEncoder('some/model')
    assert AttributeNeurons(model) != AttributeNeurons(model, tolerance=0.1)
    ids = AttributeNeurons(model, baseline=np.array([1, 2]))
    assert (
        ids == AttributeNeurons(model, baseline=np.array([1, 2])) != AttributeNeurons(model, baseline=np.array([1, 3]))
    )
    stage = AttributeNeurons(model, baseline='all', rule='left', points=50, by='token_type')
    assert eval(repr(stage)) == stage and hash(eval(repr(stage))) == hash(stage) and hash(ids) is not None


@pytest.mark.real
def test_real_cross_encoder_is_complete_within_the_tolerance():
    folder = assets()
    docs = pd.read_json(folder / 'dl' / 'docs.jsonl.gz', lines=True, dtype={'docno': str})
    topics = pd.read_csv(folder / 'dl' / 'topics.tsv', sep='\t', dtype=str)
    qrels = pd.read_csv(folder / 'dl' / 'qrels.tsv', sep='\t', dtype=str)
    rows = qrels.sample(2, random_state=1).merge(topics, on='qid').merge(docs, on='docno')
    model = real_cross_encoder()
    res = AttributeNeurons(model, max_points=129)(rows)
    assert stacked(res, 'neurons').shape == (2, 6, 1536) and (res['completeness_error.neurons'] <= 0.05).all()
    # Points that were there already: one finer grid agrees with the coarse one within what is left of its error.
    finer = stacked(AttributeNeurons(model, tolerance=0.02, max_points=129)(rows), 'neurons')
    largest = np.abs(finer).max(axis=(1, 2))
    assert (np.abs(stacked(res, 'neurons') - finer).max(axis=(1, 2)) < 0.3 * largest).all()
