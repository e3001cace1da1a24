"""Attention weights against the eager attention of Hugging Face, shares counted by hand, and heads built for a role."""

import copy
import functools

import numpy as np
import pandas as pd
import pytest
import torch
from inside import FLOWS, attention_weights
from toys import (
    DESCRIBED,
    QUERIES,
    TEXTS,
    frame_of,
    toy_cross_encoder,
    with_heads,
    wordpiece_tokenizer,
)

from pyterrier_mech import AttentionShares, head_roles

pytestmark = pytest.mark.numeric

WORD_FLOWS = FLOWS[:4]


def rows():
    return frame_of(8)


def eager_weights(model, inputs):
    """The attention weights of every layer by the module's own eager attention."""
    module = eager(model.model)
    with torch.no_grad():
        return module(**inputs, output_attentions=True).attentions


@functools.cache
def eager(module):
    module = copy.deepcopy(module)
    module.set_attn_implementation('eager')
    return module


def groups_of(encoded):
    owners = encoded.sequence_ids(0)
    return np.array([{0: 'query', 1: 'document'}.get(o, 'sep' if i else 'cls') for i, o in enumerate(owners)])


def by_hand(weights, groups):
    """The seven shares [flows, heads] of one unpadded row."""
    n = len(groups)

    def mass(source, target):
        return weights[:, np.isin(groups, source)][:, :, np.isin(groups, target)].sum((1, 2)) / n

    every, words = ['cls', 'query', 'sep', 'document'], ['query', 'document']
    return np.stack(
        [
            mass(['query'], ['query']),
            mass(['document'], ['document']),
            mass(['query'], ['document']),
            mass(['document'], ['query']),
            mass(every, ['cls']),
            mass(every, ['sep']),
            mass(['cls', 'sep'], words),
        ]
    )


def stacked(res):
    """[flows, rows, layers, heads]."""
    return np.stack([np.stack(res[f'attention.{flow}'].tolist()) for flow in FLOWS])


# -- the weights


@pytest.mark.parametrize('family', DESCRIBED)
def test_weights_are_the_eager_ones_and_rows_sum_to_one(family):
    model = toy_cross_encoder(family)
    inputs = dict(model.tokenizer(QUERIES, TEXTS, padding=True, return_tensors='pt'))
    mine = attention_weights(model, inputs)
    # ModernBERT turns queries and keys in float32.
    tolerance = 1e-6 if family == 'modernbert' else 1e-10
    for row, (query, text) in enumerate(zip(QUERIES, TEXTS, strict=True)):
        alone = eager_weights(model, dict(model.tokenizer([query], [text], return_tensors='pt')))
        for weights, expected in zip(mine, alone, strict=True):
            n = expected.shape[-1]
            np.testing.assert_allclose(weights[row][:, :n, :n], expected[0], rtol=0, atol=tolerance)
            np.testing.assert_allclose(weights[row][:, :n].sum(-1), 1, rtol=0, atol=tolerance)
            np.testing.assert_allclose(weights[row][:, :n, n:], 0, atol=1e-12)


@pytest.mark.parametrize('family', DESCRIBED)
def test_shares_are_those_counted_by_hand(family):
    model = toy_cross_encoder(family)
    frame = rows()
    res = AttentionShares(model)(frame)
    shares = stacked(res)
    np.testing.assert_allclose(shares.sum(0), 1, rtol=0, atol=1e-6 if family == 'modernbert' else 1e-12)
    for place, row in enumerate(frame.itertuples()):
        encoded = model.tokenizer([row.query], [row.text], return_tensors='pt')
        groups = groups_of(encoded)
        for layer, weights in enumerate(eager_weights(model, dict(encoded))):
            expected = by_hand(weights[0].numpy(), groups)
            tolerance = 1e-6 if family == 'modernbert' else 1e-10
            np.testing.assert_allclose(shares[:, place, layer], expected, rtol=0, atol=tolerance)
        even = by_hand(np.full((1, len(groups), len(groups)), 1 / len(groups)), groups)[:, 0]
        np.testing.assert_allclose([res[f'expected.{flow}'].iloc[place] for flow in FLOWS], even, rtol=0, atol=1e-12)
    pd.testing.assert_frame_equal(res[frame.columns], rows())


def test_layers_with_fewer_heads_are_nan():
    model = with_heads(toy_cross_encoder('bert', fresh=True), 1, [0, 1])
    res = AttentionShares(model)(rows())
    first = res['attention.to_cls'].iloc[0]
    assert first.shape == (2, 4) and np.isfinite(first[0]).all() and np.isnan(first[1]).tolist() == [0, 0, 1, 1]
    assert head_roles(res)['name'].tolist() == ['L0H0', 'L0H1', 'L0H2', 'L0H3', 'L1H0', 'L1H1']


# -- roles


def built():
    """A BERT whose heads look where their number says: the query, the document, the other side, special tokens.

    Its first four embedding columns say what a token is: query, document, special, and 1. A head's queries and keys
    read these columns alone, so its attention is what the two matrices below say.
    """
    model = toy_cross_encoder('bert', num_hidden_layers=1, num_attention_heads=8, fresh=True)
    module, tokenizer = model.model, model.tokenizer
    query, document, special = range(3)
    looks = {
        0: {query: query, document: query},
        1: {query: document, document: document},
        2: {query: document, document: query},
        3: {query: special, document: special, special: special},
        4: {},
        5: {query: query, document: document},
        6: {query: query},
        7: {document: document},
    }
    embeddings = module.base_model.embeddings
    with torch.no_grad():
        for table in (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings):
            table.weight.zero_()
        for token in range(len(tokenizer)):
            embeddings.word_embeddings.weight[token, document] = 1.0
        for token in tokenizer(QUERIES[0], add_special_tokens=False)['input_ids']:
            embeddings.word_embeddings.weight[token] = 0
            embeddings.word_embeddings.weight[token, query] = 1.0
        for token in (tokenizer.cls_token_id, tokenizer.sep_token_id):
            embeddings.word_embeddings.weight[token] = 0
            embeddings.word_embeddings.weight[token, special] = 1.0
        embeddings.LayerNorm = torch.nn.Identity()
        attention = module.base_model.encoder.layer[0].attention.self
        for part in (attention.query, attention.key):
            part.weight.zero_()
            part.bias.zero_()
        for head, targets in looks.items():
            for source, target in targets.items():
                # Column `source` of the head's queries asks, the same column of its keys answers.
                attention.query.weight[4 * head + source, source] = 20.0
                attention.key.weight[4 * head + source, target] = 1.0
    return model


@pytest.fixture(scope='module')
def of_built():
    text = 'Rust spreads below paint.'
    frame = rows().iloc[:3].assign(query=QUERIES[0], text=[text, text + ' Yes.', text + ' Rust and paint.'])
    return AttentionShares(built())(frame)


def test_heads_built_for_a_role_get_it(of_built):
    table = head_roles(of_built)
    assert table['role'].tolist() == [
        'query-focused',
        'document-focused',
        'matching',
        'special-token',
        'mixed',
        'mixed',
        'query-focused',
        'document-focused',
    ]
    assert table['above'].tolist() == [
        'query_to_query document_to_query',
        'document_to_document query_to_document',
        'query_to_document document_to_query',
        '',
        '',
        'query_to_query document_to_document',
        'query_to_query',
        'document_to_document',
    ]
    assert set(table['odds_threshold']) == {2.0} and set(table['special_threshold']) == {0.5}
    assert set(table['n']) == {3} and set(table['n_queries']) == {1}


def test_numbers_of_the_roles(of_built):
    table = head_roles(of_built).set_index('name')
    even = table.loc['L0H4']
    for flow in FLOWS:
        assert even[f'attention.{flow}'] == pytest.approx(even[f'expected.{flow}'], abs=1e-12)
    np.testing.assert_allclose([even[f'odds.{flow}'] for flow in WORD_FLOWS], 1, atol=1e-12)
    # All words of head 0 ask for query words, whose scores are 20 / sqrt(4) = 10 and all others 0.
    found = []
    for text in of_built['text']:
        encoded = wordpiece_tokenizer()([QUERIES[0]], [text])
        groups = groups_of(encoded)
        n_query, n_document = (groups == 'query').sum(), (groups == 'document').sum()
        asked = n_query * np.exp(10)
        found.append(n_document / len(groups) * asked / (asked + len(groups) - n_query))
    assert table.loc['L0H0', 'attention.document_to_query'] == pytest.approx(np.mean(found))
    assert table.loc['L0H0', 'odds.document_to_query'] * table.loc['L0H0', 'odds.document_to_document'] == (
        pytest.approx(1)
    )


def test_thresholds_decide(of_built):
    strict = head_roles(of_built, odds=1e12)
    assert set(strict['role']) == {'mixed', 'special-token'} and set(strict['odds_threshold']) == {1e12}
    lax = head_roles(of_built, special=0.01)
    assert set(lax['role']) == {'special-token'} and set(lax['special_threshold']) == {0.01}


def test_shares_of_rows_are_averaged_and_odds_are_of_sums():
    def one(to_query, to_document):
        shares = dict.fromkeys(FLOWS, 0.0) | {'query_to_query': to_query, 'query_to_document': to_document}
        expected = dict.fromkeys(FLOWS, 0.0) | {'query_to_query': 0.25, 'query_to_document': 0.5}
        return {
            'qid': 'q',
            **{f'attention.{flow}': np.array([[value]]) for flow, value in shares.items()},
            **{f'expected.{flow}': value for flow, value in expected.items()},
            **{f'attention.{flow}.same_word': np.array([[0.0]]) for flow in WORD_FLOWS},
            **{f'expected.{flow}.same_word': 0.0 for flow in WORD_FLOWS},
            'repeated': 0.0,
        }

    table = head_roles(pd.DataFrame([one(0.1, 0.5), one(0.5, 0.1)]))
    row = table.iloc[0]
    assert row['attention.query_to_query'] == pytest.approx(0.3)
    # (0.6 / 0.6) / (0.5 / 1); the mean of the rows' own odds would be 5.2.
    assert row['odds.query_to_query'] == pytest.approx(2.0)
    assert (row['role'], np.isnan(row['odds.document_to_query'])) == ('query-focused', True)


# -- the stage


def test_texts_without_tokens():
    res = AttentionShares(toy_cross_encoder('bert'))(rows().iloc[:1].assign(text=''))
    assert res['expected.document_to_document'].tolist() == [0] and stacked(res).sum() == pytest.approx(8)


def test_errors():
    with pytest.raises(ValueError, match="the attention of 'deberta-v2' is not described.*register_family"):
        AttentionShares(toy_cross_encoder('deberta-v2'))(rows())


@pytest.mark.parametrize(
    ('settings', 'message'),
    [({'odds': 0.5}, 'odds must be 1 or more'), ({'special': 0}, 'special must be a share'), ({'special': 2}, 'got 2')],
)
def test_bad_thresholds(of_built, settings, message):
    with pytest.raises(ValueError, match=message):
        head_roles(of_built, **settings)


def test_rows_of_several_rankers_and_of_csv_are_refused():
    models = [toy_cross_encoder('bert'), with_heads(toy_cross_encoder('bert', fresh=True), 0, [1])]
    shares = [AttentionShares(model)(frame_of(4)) for model in models]
    with pytest.raises(ValueError, match='of different heads: keep those of one ranker'):
        head_roles(pd.concat(shares).drop(columns='attention_model'))
    with pytest.raises(ValueError, match='arrays do not survive CSV, write_frame'):
        head_roles(shares[0].map(lambda cell: str(cell) if isinstance(cell, np.ndarray) else cell))


def test_roles_need_the_shares(of_built):
    with pytest.raises(ValueError, match=r"no 'attention.query_to_query': pass what AttentionShares\(model\) returned"):
        head_roles(rows())
    with pytest.raises(ValueError, match='The frame has no rows'):
        head_roles(of_built.iloc[:0])


def test_rows_of_two_rankers_are_not_put_together():
    """Two rankers of one shape: their heads have the same names, and nothing in common."""
    one, other = (AttentionShares(toy_cross_encoder('bert', seed=seed))(frame_of(4)) for seed in (1, 2))
    again = AttentionShares(toy_cross_encoder('bert', seed=1))(frame_of(4))
    assert len(head_roles(pd.concat([one, again]))) == len(head_roles(one))
    with pytest.raises(ValueError, match='the rows are of 2 rankers'):
        head_roles(pd.concat([one, other]))
