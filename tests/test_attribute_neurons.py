"""AttributeNeurons against captum, a loop over the points by the module's own embeddings, and exact identities."""

import os
import warnings

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from conftest import FAMILIES, QUERIES, TEXTS, assets, toy_bi_encoder, toy_cross_encoder

from pyterrier_mech import CrossEncoder
from pyterrier_mech.anatomy.families import _FAMILIES, Family, register_family
from pyterrier_mech.attribute import AttributeNeurons

os.environ.setdefault('PT_TEST_TRANSFORMER_REPORTS', '0')

MLP_OUT = {
    'bert': lambda base: [layer.output.dense for layer in base.encoder.layer],
    'electra': lambda base: [layer.output.dense for layer in base.encoder.layer],
    'roberta': lambda base: [layer.output.dense for layer in base.encoder.layer],
    'distilbert': lambda base: [layer.ffn.lin2 for layer in base.transformer.layer],
    'modernbert': lambda base: [layer.mlp.Wo for layer in base.layers],
    'deberta-v2': lambda base: [layer.output.dense for layer in base.encoder.layer],
    'mpnet': lambda base: [layer.output.dense for layer in base.encoder.layer],
}
TYPES = ['cls', 'query', 'sep', 'doc_match', 'doc_other']


def frame(count=4):
    rows = [(q, t) for q in QUERIES for t in TEXTS][:count]
    return pd.DataFrame(
        {
            'qid': [str(i // 4) for i in range(count)],
            'query': [q for q, _ in rows],
            'docno': [str(i) for i in range(count)],
            'score': 1.0,
            'rank': [i % 4 for i in range(count)],
            'text': [t for _, t in rows],
        }
    )


def stacked(res, column='neurons'):
    return np.stack(res[column].tolist())


def ends(model, query, text, baseline='query'):
    """Word embeddings of baseline and input, and the other model inputs, by the tokenizer's own pair encoding."""
    encoded = model.tokenizer([query], [text], return_tensors='pt')
    owners = np.array([-1 if owner is None else owner for owner in encoded.sequence_ids(0)])
    given = dict(encoded)
    ids = given.pop('input_ids')
    moves = torch.tensor(owners == 0 if baseline == 'query' else owners >= 0)[None]
    embed = model.model.base_model.get_input_embeddings()
    return embed(torch.where(moves, model.tokenizer.pad_token_id, ids)).detach(), embed(ids).detach(), given


def by_hand(score, modules, kind, start, end, points):
    """Conductance of the inputs or outputs of `modules`, [tokens, width] each, and the score at both ends."""
    curve, scores = [], []
    for alpha in np.linspace(0, 1, points):
        found = []
        hook = (lambda m, a: found.append(a[0])) if kind == 'input' else (lambda m, a, out: found.append(first(out)))
        add = 'register_forward_pre_hook' if kind == 'input' else 'register_forward_hook'
        handles = [getattr(module, add)(hook) for module in modules]
        s = score(start + alpha * (end - start)).sum()
        curve.append(([a.detach()[0] for a in found], [g[0] for g in torch.autograd.grad(s, found)]))
        scores.append(s.item())
        for handle in handles:
            handle.remove()
    totals = []
    for layer in range(len(modules)):
        steps = [(b[layer] - a[layer]) * (g[layer] + h[layer]) / 2 for (a, g), (b, h) in zip(curve, curve[1:])]
        totals.append(sum(steps))
    return totals, scores


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def logits(model, given):
    return lambda point: model.model(inputs_embeds=point, **given).logits


# -- against captum and by hand


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('baseline', ['query', 'all'])
def test_the_left_rule_is_captums_layer_conductance(family, baseline):
    captum = pytest.importorskip('captum.attr')
    model = toy_cross_encoder(family)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        res = AttributeNeurons(model, baseline=baseline, rule='left', points=10)(frame(2))
    row = res.iloc[1]
    start, end, given = ends(model, row['query'], row.text, baseline)
    for index, module in enumerate(MLP_OUT[family](model.model.base_model)):

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
    row = AttributeNeurons(model, points=5, tolerance=1e9)(frame(2)).iloc[1]
    start, end, given = ends(model, row['query'], row.text)
    totals, _ = by_hand(logits(model, given), MLP_OUT[family](model.model.base_model), 'input', start, end, 5)
    tolerance = 1e-6 if family == 'modernbert' else 1e-12
    for mine, total in zip(row.neurons, totals):
        np.testing.assert_allclose(mine, total.sum(0), atol=tolerance)


def test_the_error_falls_by_four_when_the_intervals_are_halved():
    model = toy_cross_encoder('bert')
    short = frame(1)
    reference = stacked(AttributeNeurons(model, points=1001, max_points=1001)(short))
    errors = [
        np.abs(stacked(AttributeNeurons(model, points=n, tolerance=1e9)(short)) - reference).max() for n in (5, 9, 17)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1) and errors[1] / errors[2] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize('family', ['bert', 'modernbert', 'mpnet'])
def test_points_are_added_until_every_block_output_is_complete(family):
    """The error of each grid by hand; the stage stops at the first that is within the tolerance."""
    model = toy_cross_encoder(family)
    tolerance = 2e-4
    res = AttributeNeurons(model, points=3, tolerance=tolerance)(frame(2))
    layers = [part.module for part in model.encoder.layers]
    for row in res.itertuples():
        start, end, given = ends(model, row.query, row.text)
        for points in (3, 5, 9, 17, 33, 65, 129, 257):
            totals, scores = by_hand(logits(model, given), layers, 'output', start, end, points)
            change, way = scores[-1] - scores[0], np.abs(np.diff(scores)).sum()
            worst = max(abs(total.sum().item() - change) for total in totals)
            error = worst / max(abs(change), 0.1 * way)
            if error <= tolerance:
                break
        assert points > 3 and row.completeness_error <= tolerance
        assert row.completeness_error == pytest.approx(error, abs=1e-6 if family == 'modernbert' else 1e-10)
        neurons, _ = by_hand(logits(model, given), MLP_OUT[family](model.model.base_model), 'input', start, end, points)
        for mine, total in zip(row.neurons, neurons):
            np.testing.assert_allclose(mine, total.sum(0), atol=1e-6 if family == 'modernbert' else 1e-12)


@pytest.mark.parametrize('family', FAMILIES)
def test_neurons_and_the_outputs_of_their_block_have_the_same_sum(family):
    model = toy_cross_encoder(family)
    row = AttributeNeurons(model, points=5, tolerance=1e9)(frame(2)).iloc[1]
    start, end, given = ends(model, row['query'], row.text)
    totals, _ = by_hand(logits(model, given), MLP_OUT[family](model.model.base_model), 'output', start, end, 5)
    sums = [total.sum().item() for total in totals]
    assert max(map(abs, sums)) > 1e-3
    np.testing.assert_allclose(row.neurons.sum(1), sums, atol=1e-6 if family == 'modernbert' else 1e-12)


def test_no_point_is_computed_twice():
    model = toy_cross_encoder('bert')
    passed = []
    handle = model.model.bert.encoder.layer[0].output.dense.register_forward_pre_hook(
        lambda _, args: passed.append(len(args[0]))
    )
    res = AttributeNeurons(model, points=3, tolerance=1e-3, batch_tokens=400)(frame(1))
    used = sum(passed)
    assert used in (17, 33, 65) and max(passed) > 1
    passed.clear()
    again = AttributeNeurons(model, points=used, max_points=used)(frame(1))
    assert sum(passed) == used
    handle.remove()
    np.testing.assert_allclose(stacked(again), stacked(res), atol=1e-12)
    np.testing.assert_allclose(again.completeness_error, res.completeness_error, atol=1e-10)


def test_rows_that_stay_above_the_tolerance_are_counted_once():
    model = toy_cross_encoder('bert')
    stage = AttributeNeurons(model, points=3, tolerance=1e-7, max_points=5)
    with pytest.warns(UserWarning, match=r'4 of 4 rows have a completeness error above tolerance=1e-07') as caught:
        res = stage(frame())
    assert len(caught) == 1 and (res.completeness_error > 1e-7).all()


# -- bi-encoders, token types, shapes


@pytest.mark.parametrize('baseline', ['query', 'all'])
@pytest.mark.parametrize('family', ['bert', 'roberta', 'distilbert'])
def test_bi_encoder_moves_one_tower(family, baseline):
    model = toy_bi_encoder(family)
    row = AttributeNeurons(model, baseline=baseline, points=5, tolerance=1e9)(frame(2)).iloc[1]
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

    totals, _ = by_hand(score, MLP_OUT[family](model.model), 'input', start, embed(ids).detach(), 5)
    for mine, total in zip(row.neurons, totals):
        assert np.abs(mine).max() > 1e-5
        np.testing.assert_allclose(mine, total.sum(0), atol=1e-12)


@pytest.mark.parametrize('model', [toy_cross_encoder('bert'), toy_bi_encoder('bert')], ids=['cross', 'bi'])
def test_token_types_sum_to_the_whole(model):
    plain = AttributeNeurons(model, baseline='all', points=5, tolerance=1e9)(frame())
    res = AttributeNeurons(model, baseline='all', points=5, tolerance=1e9, by='token_type')(frame())
    assert list(res.columns[-6:]) == [*[f'neurons.{kind}' for kind in TYPES], 'completeness_error']
    parts = np.stack([stacked(res, f'neurons.{kind}') for kind in TYPES])
    np.testing.assert_allclose(np.nansum(parts, axis=0), stacked(plain), atol=1e-12)
    is_bi = len(model.towers) == 2
    assert np.isnan(parts[1]).all() == is_bi
    # 'bread' of the first query is in the second and fourth text
    assert [np.isnan(parts[3][i]).all() for i in range(4)] == [True, False, True, False]
    assert not np.isnan(parts[[0, 2, 4]]).any()


def test_layers_with_different_numbers_of_neurons():
    model = toy_cross_encoder('bert')
    keep, layer = torch.arange(40), model.model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.intermediate.dense.weight = torch.nn.Parameter(layer.intermediate.dense.weight[keep])
        layer.intermediate.dense.bias = torch.nn.Parameter(layer.intermediate.dense.bias[keep])
        layer.output.dense.weight = torch.nn.Parameter(layer.output.dense.weight[:, keep])
    layer.intermediate.dense.out_features = layer.output.dense.in_features = 40
    res = AttributeNeurons(model)(frame(2))
    assert stacked(res).shape == (2, 2, 48)
    assert np.isnan(stacked(res)[:, 0, 40:]).all() and not np.isnan(stacked(res)[:, 0, :40]).any()
    assert not np.isnan(stacked(res)[:, 1]).any()


def test_single_precision_stays_single():
    double, single = (toy_cross_encoder('bert', dtype=dtype) for dtype in (torch.float64, torch.float32))
    expected, res = (AttributeNeurons(model)(frame(2)) for model in (double, single))
    assert res.neurons[0].dtype == np.float32 and expected.neurons[0].dtype == np.float64
    assert res.completeness_error.dtype == np.float32
    np.testing.assert_allclose(stacked(res), stacked(expected), atol=1e-5)


def test_half_precision_gives_single():
    model = toy_cross_encoder('bert', dtype=torch.bfloat16)
    res = AttributeNeurons(model, points=5, tolerance=1e9)(frame(2))
    assert res.neurons[0].dtype == np.float32 and np.isfinite(stacked(res)).all()


# -- baselines


def test_own_baselines():
    model = toy_cross_encoder('bert')
    pad, cls = model.tokenizer.pad_token_id, model.tokenizer.cls_token_id
    special = model.tokenizer.all_special_ids
    every = AttributeNeurons(model, baseline='all')(frame())
    mine = AttributeNeurons(model, baseline=lambda ids: np.where(np.isin(ids, special), ids, pad))(frame())
    np.testing.assert_array_equal(stacked(mine), stacked(every))
    length = len(model.tokenizer(frame()['query'][0], frame().text[0])['input_ids'])
    given = AttributeNeurons(model, baseline=[cls] * length)(frame(1))
    called = AttributeNeurons(model, baseline=lambda ids: [cls] * len(ids))(frame(1))
    np.testing.assert_array_equal(stacked(given), stacked(called))
    same = AttributeNeurons(model, baseline=lambda ids: ids)(frame())
    assert np.abs(stacked(same)).max() < 1e-12 and (same.completeness_error == 0).all()


@pytest.mark.parametrize(
    ('baseline', 'error', 'message'),
    [
        ('nothing', ValueError, "baseline='nothing' is none of"),
        (7, TypeError, 'baseline=7 is neither'),
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
        AttributeNeurons(toy_cross_encoder('bert'), baseline=baseline)(frame())


def test_empty_texts_and_queries():
    model = toy_cross_encoder('bert')
    rows = frame(3).assign(query=['', 'bread', ''], text=['bread', '', ''])
    res = AttributeNeurons(model)(rows)
    assert np.abs(res.neurons[1]).max() > 1e-5
    assert np.abs(stacked(res)[[0, 2]]).max() < 1e-12 and list(res.completeness_error[[0, 2]]) == [0, 0]
    assert np.isfinite(stacked(AttributeNeurons(toy_bi_encoder('bert'))(rows))).all()


# -- batches, order, what is left behind


@pytest.mark.parametrize('family', ['bert', 'roberta', 'modernbert'])
def test_row_order_batches_and_neighbours_do_not_matter(family):
    model = toy_cross_encoder(family)
    options = {'points': 3, 'tolerance': 0.01}
    tolerance = 1e-6 if family == 'modernbert' else 1e-12
    res = AttributeNeurons(model, **options)(frame())
    for tokens in (1, 500, 100_000):
        other = AttributeNeurons(model, **options, batch_tokens=tokens)(frame().sample(frac=1, random_state=3))
        np.testing.assert_allclose(stacked(other.sort_index()), stacked(res), atol=tolerance)
        np.testing.assert_allclose(other.sort_index().completeness_error, res.completeness_error, atol=1e-6)
    single = pd.concat([AttributeNeurons(model, **options)(frame().iloc[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(stacked(single), stacked(res), atol=tolerance)


def test_out_of_memory_halves_the_budget_and_changes_no_number(monkeypatch):
    from pyterrier_mech.attribute import points

    model = toy_cross_encoder('bert', batch_tokens=20_000)
    expected = AttributeNeurons(model)(frame())
    real = points.Batch._forward

    def limited(self, rows, alphas):
        if len(rows) > 3:
            raise torch.OutOfMemoryError('device memory is full')
        return real(self, rows, alphas)

    monkeypatch.setattr(points.Batch, '_forward', limited)
    res = AttributeNeurons(model)(frame())
    assert model.loaded.budget.tokens < 1000
    np.testing.assert_allclose(stacked(res), stacked(expected), atol=1e-12)


def test_the_model_is_as_before():
    model = toy_cross_encoder('bert')
    expected = stacked(AttributeNeurons(model)(frame(2)))
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        np.testing.assert_array_equal(stacked(AttributeNeurons(model)(frame(2))), expected)
        assert not torch.is_grad_enabled()
    handle = model.model.bert.encoder.layer[0].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError('boom')))
    with pytest.raises(KeyError, match='boom'):
        AttributeNeurons(model)(frame(2))
    handle.remove()
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.model.modules())
    assert all(parameter.grad is None for parameter in model.model.parameters())


# -- the frame and bad input


def test_one_row_in_one_row_out_and_nothing_else_changes():
    model = toy_cross_encoder('bert')
    inp = frame().sample(frac=1, random_state=5).assign(extra='kept')
    kept = inp.copy()
    for by in (None, 'token_type'):
        res = AttributeNeurons(model, by=by)(inp)
        pd.testing.assert_frame_equal(inp, kept)
        pd.testing.assert_frame_equal(res[list(inp.columns)], inp)
        empty = AttributeNeurons(model, by=by)(inp.iloc[:0])
        assert list(empty.columns) == list(res.columns) and len(empty) == 0
    assert len(AttributeNeurons(model)(frame().iloc[[0, 0, 1]])) == 3


def test_a_model_without_neurons_at_the_expected_place():
    family = _FAMILIES['bert']
    try:
        register_family(Family(**{**family.__dict__, 'mlp_out': 'output.nowhere'}))
        with pytest.raises(ValueError, match=r'has no neurons at the place.*nowhere.*register_family'):
            AttributeNeurons(toy_cross_encoder('bert'))(frame())
        register_family(Family(**{**family.__dict__, 'mlp_out': 'output.LayerNorm'}))
        with pytest.raises(ValueError, match=r'has no neurons at the place.*in_features'):
            AttributeNeurons(toy_cross_encoder('bert'))(frame())
    finally:
        register_family(family)


def test_a_block_that_works_in_chunks_is_refused():
    model = toy_cross_encoder('bert')
    for layer in model.model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 1
    with pytest.raises(ValueError, match=r'17 times in one forward.*chunk_size_feed_forward'):
        AttributeNeurons(model)(frame(1))


def test_gradients_that_are_not_finite_name_the_row():
    model = toy_cross_encoder('bert')
    with torch.no_grad():
        model.model.bert.embeddings.word_embeddings.weight[model.tokenizer.convert_tokens_to_ids('paint')] = torch.nan
    with pytest.raises(ValueError, match="1 rows have scores or gradients that are not finite \\(qid='0' docno='2'"):
        AttributeNeurons(model)(frame())


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'rule': 'simpson'}, "rule='simpson' is none of"),
        ({'points': 1}, 'points=1 makes no grid'),
        ({'points': 9, 'max_points': 5}, 'max_points=5 is below points=9'),
        ({'tolerance': 0}, 'tolerance=0 is not positive'),
        ({'by': 'position'}, "by='position' is neither"),
    ],
)
def test_unknown_settings_name_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        AttributeNeurons(toy_cross_encoder('bert'), **settings)(frame())


def test_missing_and_null_texts():
    model = toy_cross_encoder('bert')
    with pytest.raises(KeyError, match='text_loader'):
        AttributeNeurons(model)(frame().drop(columns='text'))
    rows = frame()
    rows.loc[2, 'text'] = None
    with pytest.raises(ValueError, match="no string in column 'text' \\(qid='0' docno='2'"):
        AttributeNeurons(model)(rows)


def test_equality_repr_and_drawing():
    model = CrossEncoder('some/model')
    assert AttributeNeurons(model) == AttributeNeurons(model, verbose=True, batch_tokens=7)
    assert AttributeNeurons(model) != AttributeNeurons(model, tolerance=0.1)
    ids = AttributeNeurons(model, baseline=np.array([1, 2]))
    assert (
        ids == AttributeNeurons(model, baseline=np.array([1, 2])) != AttributeNeurons(model, baseline=np.array([1, 3]))
    )
    stage = AttributeNeurons(model, baseline='all', rule='left', points=50, by='token_type')
    assert eval(repr(stage)) == stage and hash(eval(repr(stage))) == hash(stage) and hash(ids) is not None
    assert stage.schematic == {'label': 'AttributeNeurons', 'help_url': None} and stage.subtransformers() == {}
    assert stage.fuse_rank_cutoff(3) == pt.RankCutoff(3) >> stage


TestContract = pt.testing.transformer_test_class(lambda: AttributeNeurons(toy_cross_encoder('bert')))


# -- the real cross-encoder


def test_real_cross_encoder_is_complete_within_the_tolerance():
    folder = assets()
    docs = pd.read_json(folder / 'dl' / 'docs.jsonl.gz', lines=True, dtype={'docno': str})
    topics = pd.read_csv(folder / 'dl' / 'topics.tsv', sep='\t', dtype=str)
    qrels = pd.read_csv(folder / 'dl' / 'qrels.tsv', sep='\t', dtype=str)
    rows = qrels.sample(2, random_state=1).merge(topics, on='qid').merge(docs, on='docno')
    model = CrossEncoder(str(folder / 'models' / 'ce-minilm-l6'), device='cpu')
    res = AttributeNeurons(model, max_points=129)(rows)
    assert stacked(res).shape == (2, 6, 1536) and (res.completeness_error <= 0.05).all()
    # Points that were there already: one finer grid agrees with the coarse one within what is left of its error.
    finer = stacked(AttributeNeurons(model, tolerance=0.02, max_points=129)(rows))
    largest = np.abs(finer).max(axis=(1, 2))
    assert (np.abs(stacked(res) - finer).max(axis=(1, 2)) < 0.3 * largest).all()
