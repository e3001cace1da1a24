"""Attention matrices against the eager attention of Hugging Face, and what goes to the same word, counted in loops."""

import copy
import functools

import numpy as np
import pandas as pd
import pytest
import torch
from toys import DESCRIBED, frame_of, pairs, toy_bi_encoder, toy_cross_encoder, with_heads

from pyterrier_mech import (
    AttentionPatterns,
    AttentionShares,
    PatchHeads,
    Perturb,
    compare_roles,
    head_roles,
    head_shares,
)

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings('ignore:.*cannot be aligned')]

HEADS = ['L1H3', 'L0H2']
WORD_FLOWS = ['query_to_query', 'document_to_document', 'query_to_document', 'document_to_query']


@functools.cache
def eager(module):
    module = copy.deepcopy(module)
    module.set_attn_implementation('eager')
    return module


def weights_of(model, *texts):
    """Tokens and attention weights [layers, heads, tokens, tokens] of one input by the module's own eager attention."""
    encoded = model.tokenizer(*[[text] for text in texts], return_tensors='pt')
    with torch.no_grad():
        found = eager(model.model)(**encoded, output_attentions=True).attentions
    return encoded, [of_layer[0].numpy() for of_layer in found]


def appended(count=4):
    frame = frame_of(count)
    words = [query.split()[-1] for query in frame['query']]
    return frame.assign(text_0=frame['text'], text=[f'{t} {w}' for t, w in zip(frame['text'], words, strict=True)])


# -- matrices


@pytest.mark.parametrize('family', DESCRIBED)
def test_matrices_are_the_eager_ones(family):
    model, frame = toy_cross_encoder(family), frame_of(5)
    res = AttentionPatterns(model, HEADS)(frame)
    assert list(res.columns[len(frame.columns) :]) == [
        'attention.L0H2', 'attention.L1H3', 'attention_tokens', 'attention_types'
    ]  # fmt: skip
    for row in res.itertuples():
        encoded, expected = weights_of(model, row.query, row.text)
        matrices = dict(zip(['L0H2', 'L1H3'], row[len(frame.columns) + 1 :], strict=False))
        for name, (layer, head) in {'L0H2': (0, 2), 'L1H3': (1, 3)}.items():
            np.testing.assert_allclose(matrices[name], expected[layer][head], rtol=0, atol=1e-6)
        assert row.attention_tokens == model.tokenizer.convert_ids_to_tokens(encoded['input_ids'][0].tolist())
        assert len(row.attention_types) == len(row.attention_tokens) and row.attention_types[0] == 'cls'


def test_two_versions_are_read_aligned():
    model, frame = toy_cross_encoder('bert'), pairs(6)
    frame.loc[5, 'text'] = frame['text_0'][5]
    res = AttentionPatterns(model, HEADS, types='literature')(frame)
    reasons = PatchHeads(model, heads=['L0H0'])(frame)['patchable']
    assert res['attention_aligned'].tolist() == reasons.tolist() and len(set(reasons)) > 1
    for row in res.to_dict('records'):
        before, after = row['attention_0.L1H3'], row['attention.L1H3']
        n = len(row['attention_tokens'])
        assert before.shape == after.shape == (n, n) and len(row['attention_tokens_0']) == n
        assert len(row['attention_types']) == n
        if row['attention_aligned'] != 'yes':
            assert np.isnan(before).all() and np.isnan(after).all()
            continue
        assert 'inserted' in row['attention_types'] or 'replaced' in row['text'] or row['text'] != row['text_0']
        ids = torch.tensor([model.tokenizer.convert_tokens_to_ids(row['attention_tokens_0'])])
        segments = torch.tensor([[0] * n])
        segments[0, row['attention_tokens_0'].index('[SEP]') + 1 :] = 1
        with torch.no_grad():
            found = eager(model.model)(input_ids=ids, token_type_ids=segments, output_attentions=True).attentions
        np.testing.assert_allclose(before, found[1][0, 3].numpy(), rtol=0, atol=1e-10)


def test_appended_text_is_read_as_it_is():
    model, frame = toy_cross_encoder('bert'), appended()
    two, one = AttentionPatterns(model, HEADS)(frame), AttentionPatterns(model, HEADS)(frame.drop(columns='text_0'))
    for column in ('attention.L0H2', 'attention_tokens'):
        assert all(
            np.allclose(a, b) if column[9] == '.' else a == b for a, b in zip(two[column], one[column], strict=True)
        )


def test_hidden_positions_are_zero():
    model, frame = toy_cross_encoder('bert'), appended(2)
    row = AttentionPatterns(model, ['L1H0'], filler='mask')(frame).iloc[0]
    hidden = np.array(row['attention_types']) == 'inserted'
    matrix = row['attention_0.L1H0']
    assert not matrix[hidden].any() and not matrix[:, hidden].any() and hidden.sum() >= 1
    _, plain = weights_of(model, row['query'], row['text_0'])
    np.testing.assert_allclose(matrix[~hidden][:, ~hidden], plain[1][0], rtol=0, atol=1e-10)


def test_towers():
    model, frame = toy_bi_encoder('bert'), appended(3)
    res = AttentionPatterns(model, ['L1H3'])(frame)
    new = [column for column in res.columns if column not in frame.columns]
    sides = [
        'attention{}.L1H3',
        'attention_0{}.L1H3',
        'attention_tokens{}',
        'attention_tokens_0{}',
        'attention_types{}',
    ]
    assert new == [name.format(f'.{tower}') for tower in ('query', 'text') for name in sides] + ['attention_aligned']
    for row in res.to_dict('records'):
        for tower in ('query', 'text'):
            _, expected = weights_of(model, row[tower])
            np.testing.assert_allclose(row[f'attention.{tower}.L1H3'], expected[1][3], rtol=0, atol=1e-10)
        assert row['attention_tokens.query'] == row['attention_tokens_0.query']
    alone = AttentionPatterns(model, ['L1H3'], tower='text')(frame)
    assert [c for c in alone.columns if '.query' in c] == []
    with pytest.raises(ValueError, match="tower='text' is for a bi-encoder"):
        AttentionPatterns(toy_cross_encoder('bert'), ['L1H3'], tower='text')(frame)


def test_the_edited_query():
    frame = Perturb(lambda query, text: f'{query} {text.split()[1]}', field='query')(frame_of(2))
    row = AttentionPatterns(toy_cross_encoder('bert'), ['L0H0'], types='literature')(frame).iloc[1]
    assert row['attention_types'].index('inserted') < row['attention_types'].index('sep_first')
    assert 'doc_same' in row['attention_types']


def test_no_heads_and_heads_that_are_not_there():
    model = with_heads(toy_cross_encoder('bert', fresh=True), 1, [0, 1])
    assert 'attention_tokens' in AttentionPatterns(model, [])(frame_of(1)).columns
    with pytest.raises(ValueError, match='L1H3: .* does not have it'):
        AttentionPatterns(model, ['L1H3'])(frame_of(1))
    with pytest.raises(ValueError, match='is not described'):
        AttentionPatterns(toy_cross_encoder('deberta-v2'), ['L0H0'])(frame_of(1))
    columns = AttentionPatterns(model, ['L1H1'])(appended(2).iloc[:0]).columns
    assert list(columns) == list(AttentionPatterns(model, ['L1H1'])(appended(2)).columns)


# -- the same word


def test_same_words_and_separators_in_loops():
    model = toy_cross_encoder('bert')
    frame = frame_of(1).assign(query='theraderm bread', text='Theraderm in bread, theracort bread. The theraderm')
    res = AttentionShares(model)(frame).iloc[0]
    encoded, weights = weights_of(model, frame['query'][0], frame['text'][0])
    ids, words, sides = encoded['input_ids'][0].tolist(), encoded.word_ids(0), encoded.sequence_ids(0)
    tokens = model.tokenizer.convert_ids_to_tokens(ids)
    whole = {}
    for token, word, side in zip(tokens, words, sides, strict=True):
        whole[side, word] = whole.get((side, word), '') + token.removeprefix('##')
    n, found, even, repeated = len(ids), {}, {}, set()
    for i in range(n):
        for j in range(n):
            apart = sides[i] is not None and sides[j] is not None and (sides[i], words[i]) != (sides[j], words[j])
            name = whole[sides[i], words[i]]
            if not apart or not name.isalnum():
                continue
            flow = f'{("query", "document")[sides[i]]}_to_{("query", "document")[sides[j]]}'
            for part, same in (('word', name == whole[sides[j], words[j]]), ('piece', ids[i] == ids[j])):
                if same:
                    key = f'{flow}.same_{part}'
                    found[key] = found.get(key, 0) + np.stack([w[:, i, j] for w in weights]) / n
                    even[key] = even.get(key, 0) + 1 / n**2
                    repeated |= {i} if part == 'word' else set()
    assert len(found) == 6  # the query alone has no word twice
    for key, value in found.items():
        np.testing.assert_allclose(res[f'attention.{key}'], value, rtol=0, atol=1e-12)
        assert res[f'expected.{key}'] == pytest.approx(even[key], abs=1e-12)
    assert not res['attention.query_to_query.same_word'].any()
    assert res['repeated'] == pytest.approx(len(repeated) / n)
    last = [tokens.index('[SEP]'), n - 1]
    for name, place in zip(('first', 'last'), last, strict=True):
        expected = np.stack([w[:, :, place].sum(-1) / n for w in weights])
        np.testing.assert_allclose(res[f'attention.to_sep.{name}'], expected, rtol=0, atol=1e-12)


def test_shares_of_what_was_put_in():
    model = toy_cross_encoder('bert')
    text_0 = 'bread and theraderm.'
    frame = frame_of(2).assign(query='what is theraderm', text_0=text_0, text=[f'{text_0} theraderm', text_0])
    res = AttentionShares(model)(frame)
    assert res['attention_aligned'].tolist() == ['yes', 'nothing changed']
    encoded, weights = weights_of(model, 'what is theraderm', f'{text_0} theraderm')
    n, length = encoded['input_ids'].shape[1], 3
    places = {
        'injected': range(n - 1 - length, n - 1), 'query_same': range(3, 6), 'query_other': [1, 2], 'sep_first': [6],
        'doc_same': range(9, 12), 'doc_other': [7, 8, 12], 'sep_last': [n - 1], 'cls': [0],
    }  # fmt: skip
    total = 0
    for kind, where in places.items():
        to = np.stack([w[:, places['injected']][:, :, where].sum(-1).mean(-1) for w in weights])
        back = np.stack([w[:, where][:, :, places['injected']].sum(-1).mean(-1) for w in weights])
        np.testing.assert_allclose(res[f'attention.injected_to_{kind}'][0], to, rtol=0, atol=1e-12)
        np.testing.assert_allclose(res[f'attention.{kind}_to_injected'][0], back, rtol=0, atol=1e-12)
        assert res[f'expected.injected_to_{kind}'][0] == pytest.approx(len(where) / n)
        assert res[f'expected.{kind}_to_injected'][0] == pytest.approx(length / n)
        total = total + to
        assert np.isnan(res[f'attention.injected_to_{kind}'][1]).all() and np.isnan(
            res[f'expected.injected_to_{kind}'][1]
        )
    np.testing.assert_allclose(total, 1, atol=1e-12)
    assert np.isnan(res['attention.injected_to_doc_query'][0]).all()
    means = head_shares(res, 'injected_to_query_same').set_index('name')
    assert means.loc['L1H2', 'share'] == pytest.approx(res['attention.injected_to_query_same'][0][1, 2])
    assert means.loc['L1H2', 'n'] == 1 and means.loc['L1H2', 'expected'] == pytest.approx(3 / n)


def test_what_divides_the_mass_does_not_know_of_the_edit():
    model, frame = toy_cross_encoder('bert'), pairs(6)
    two, one = AttentionShares(model)(frame), AttentionShares(model)(frame.drop(columns='text_0'))
    for column in [column for column in one.columns if column.startswith(('attention.', 'expected.', 'repeated'))]:
        for a, b in zip(two[column], one[column], strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_deleted_words_leave_the_plain_text():
    model = toy_cross_encoder('bert')
    frame = frame_of(1).assign(query='theraderm', text_0='bread theraderm rust and', text='bread rust theraderm')
    row = AttentionShares(model)(frame).iloc[0]
    total = sum(np.nan_to_num(row[c]) for c in row.index if c.startswith('attention.injected_to_'))
    np.testing.assert_allclose(total, 1, rtol=0, atol=1e-12)


def test_the_towers_of_a_bi_encoder():
    model, frame = toy_bi_encoder('bert'), appended(4)
    res = AttentionShares(model)(frame)
    for tower, flow in {'query': 'query_to_query', 'text': 'document_to_document'}.items():
        names = [flow, 'to_cls', 'to_sep', 'special_to_words']
        shares = np.sum([np.stack(res[f'attention.{tower}.{name}'].tolist()) for name in names], axis=0)
        np.testing.assert_allclose(shares, 1, rtol=0, atol=1e-12)
        encoded, weights = weights_of(model, frame[tower][1])
        inner = slice(1, encoded['input_ids'].shape[1] - 1)
        expected = np.stack([w[:, inner, inner].sum((1, 2)) / w.shape[-1] for w in weights])
        np.testing.assert_allclose(res[f'attention.{tower}.{flow}'][1], expected, rtol=0, atol=1e-12)
    assert 'attention.text.injected_to_query_same' not in res.columns
    assert np.isnan(res['attention.query.injected_to_cls'][0]).all()
    assert np.isfinite(res['attention.text.injected_to_cls'][0]).all()
    roles = head_roles(res, tower='text')
    assert set(roles['role']) <= {'same-token', 'special-token', 'mixed'} and len(roles) == 8
    with pytest.raises(ValueError, match="two sequences: give tower='text'"):
        head_roles(res)


# -- roles


def copying(scale):
    """A BERT of one layer: head 0 looks at equal tokens, head 1 at the [SEP], the others evenly."""
    model = toy_cross_encoder('bert', num_hidden_layers=1, fresh=True)
    module, width = model.model, 32
    embeddings = module.base_model.embeddings
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for table in (embeddings.position_embeddings, embeddings.token_type_embeddings):
            table.weight.zero_()
        vectors = torch.sign(torch.randn(embeddings.word_embeddings.weight.shape, generator=generator).double())
        embeddings.word_embeddings.weight.copy_(vectors)
        embeddings.LayerNorm = torch.nn.Identity()
        attention = module.base_model.encoder.layer[0].attention.self
        for part in (attention.query, attention.key):
            part.weight.zero_()
            part.bias.zero_()
            part.weight[:8, :8] = torch.eye(8)
        attention.query.weight[:8] *= scale
    assert width == embeddings.word_embeddings.weight.shape[1]
    return model


def test_a_head_that_looks_at_the_same_token_is_named():
    frame = frame_of(8).assign(query='rust bread', text=['the bread and some rust here'] * 8)
    frame['qid'] = [str(i % 3) for i in range(8)]
    res = AttentionShares(copying(4.0))(frame)
    roles = head_roles(res, n_resamples=50).set_index('name')
    assert roles.loc['L0H0', 'role'] == 'same-token' and roles.loc['L0H0', 'same_token'] > 0.3
    assert roles.loc['L0H1', 'same_token'] == pytest.approx(roles.loc['L0H1', 'same_token_expected'])
    assert roles.loc['L0H1', 'role'] == 'mixed' and (roles['stability'] == 1).all()
    assert set(roles['n_repeated']) == {8} and set(roles['same_threshold']) == {0.25}
    assert head_roles(res, same=1.0).set_index('name').loc['L0H0', 'role'] != 'same-token'
    without = AttentionShares(copying(4.0))(frame.assign(text='some other words'))
    row = head_roles(without).set_index('name').loc['L0H0']
    assert row['role'] != 'same-token' and np.isnan(row['same_token']) and row['n_repeated'] == 0


def test_even_attention_to_one_repeated_word_is_no_role():
    frame = frame_of(2).assign(query='bread', text='rust ' * 30)
    table = head_roles(AttentionShares(copying(0.0))(frame))
    assert (table['same_token'] > 0.8).all() and (table['role'] != 'same-token').all()


def shares_frame(rows):
    """One head; rows of (qid, share of the same word)."""
    flows = ['to_cls', 'to_sep', 'special_to_words', *WORD_FLOWS, *(f'{flow}.same_word' for flow in WORD_FLOWS)]
    table = []
    for qid, same in rows:
        row = {'qid': qid, 'repeated': 0.5}
        for flow in flows:
            value = same if flow == 'document_to_query.same_word' else 0.25 if flow in WORD_FLOWS else 0.0
            even = 0.0 if flow.endswith('word') else 0.25
            row |= {f'attention.{flow}': np.array([[value]]), f'expected.{flow}': even}
        table.append(row)
    return pd.DataFrame(table)


def test_stability_is_the_share_of_samples_with_the_role():
    rows = [('a', 0.0), ('b', 0.3), ('b', 0.3), ('c', 0.05)]
    table = head_roles(shares_frame(rows), n_resamples=400, seed=3)
    # same words get 0.65 of 2.0 tokens' mass, with repeats in half of the tokens: 0.325
    assert table['same_token'][0] == pytest.approx(0.65 / 2) and table['role'][0] == 'same-token'
    rng, sums = np.random.default_rng(3), np.array([[0.0, 1], [0.6, 2], [0.05, 1]])
    drawn = [sums[rng.integers(3, size=3)].sum(0) for _ in range(400)]
    expected = np.mean([same / (0.5 * n) >= 0.25 for same, n in drawn])
    assert table['stability'][0] == pytest.approx(expected) and 0 < expected < 1
    assert np.isnan(head_roles(shares_frame(rows[:1]))['stability'][0])


def test_roles_on_two_collections():
    one = head_roles(shares_frame([('a', 0.3), ('b', 0.3)]))
    two = head_roles(shares_frame([('a', 0.0), ('b', 0.0)]))
    res = compare_roles({'lab': one, 'dl': two, 'more': one})
    assert res.iloc[0][['role.lab', 'role.dl']].tolist() == ['same-token', 'mixed']
    assert (res['n_roles'][0], res['agrees'][0]) == (2, False) and res['stability.dl'][0] == 1
    with pytest.raises(ValueError, match='two collections or more'):
        compare_roles({'lab': one})
    with pytest.raises(ValueError, match="'dl' has other thresholds than 'lab'"):
        compare_roles({'lab': one, 'dl': head_roles(shares_frame([('a', 0.3)]), same=0.5)})


def test_a_flow_that_is_not_there():
    with pytest.raises(ValueError, match="no 'attention.injected_to_cls': pass what AttentionShares"):
        head_shares(AttentionShares(toy_cross_encoder('bert'))(frame_of(1)), 'injected_to_cls')
