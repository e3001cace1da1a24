"""PatchParts: parts sum to the effects, and each is what its definition says."""

import late
import numpy as np
import pandas as pd
import pytest
from toys import QUERIES, TEXTS, toy_bi_encoder

from pyterrier_mech import PatchHeads, PatchParts

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings('ignore:.*cannot be patched')]
HEADS = ['L0H1', 'L1H2']


def frame(field='text'):
    rows = [(str(i), str(i), query, text) for i, (query, text) in enumerate(zip(QUERIES, TEXTS, strict=True))]
    plain = pd.DataFrame(rows, columns=['qid', 'docno', 'query', 'text'])
    edited = [value.replace('the ', 'dough ') + ' bread' for value in plain[field]]
    return plain.assign(**{f'{field}_0': plain[field], field: edited, 'edited': field})


@pytest.mark.parametrize('make', [late.toy_colbert, late.toy_splade])
@pytest.mark.parametrize('field', ['text', 'query'])
@pytest.mark.parametrize('filler', ['a', 'mask'])
@pytest.mark.parametrize('direction', ['perturbed_to_original', 'original_to_perturbed'])
def test_parts_sum_to_effects(make, field, filler, direction):
    settings = {'filler': filler, 'direction': direction}
    res, heads = (
        PatchParts(make(), heads=HEADS, **settings)(frame(field)),
        PatchHeads(make(), heads=HEADS, **settings)(frame(field)),
    )
    sign = 1 if direction.startswith('perturbed') else -1
    expected = {'edit': sign * (heads['score_perturbed'] - heads['score_original']), **heads[HEADS]}
    for name, whole in expected.items():
        np.testing.assert_allclose(res[f'parts.{name}'].map(np.sum), whole, atol=1e-10, rtol=1e-12)
        assert all(len(a) == len(b) for a, b in zip(res['parts'], res[f'parts.{name}'], strict=True))


def test_query_tokens_of_colbert():
    model, rows = (
        late.toy_colbert(),
        frame().assign(text_0=['rust spreads', *TEXTS[1:]], text=['bread spreads', *TEXTS[1:]]),
    )
    row = PatchParts(model)(rows).iloc[0]
    query = model.encode('query', [rows['query'][0]])[0]
    before, after = (query @ model.encode('text', [text])[0].T for text in ('rust spreads', 'bread spreads'))
    at = before.argmax(1)
    same = after[np.arange(len(at)), at] - before.max(1)
    np.testing.assert_allclose(row['parts.edit'], after.max(1) - before.max(1), atol=1e-12)
    np.testing.assert_allclose(row['rematch.edit'], after.max(1) - before.max(1) - same, atol=1e-12)
    assert row['rematch.edit'].min() >= 0 and row['rematch.edit'].max() > 0
    tokens = ['[CLS]', '[unused1]', 'rust', 'spreads', '[SEP]']
    assert row['match_original'] == [tokens[place] for place in at]
    assert row['parts'][:2] == ['[CLS]', '[unused0]'] and row['parts'][-1] == '[MASK]' and len(row['parts']) == 16


def test_a_match_that_is_no_longer_compared_is_lost():
    model = late.toy_colbert()
    rows = frame().assign(text_0='rust spreads', text='. spreads')
    res = PatchParts(model)(rows)
    for parts, rematch, score in zip(res['parts.edit'], res['rematch.edit'], res['score_original'], strict=True):
        assert np.isfinite(parts).all() and np.isfinite(rematch).all() and score > 0
    np.testing.assert_allclose(
        res['parts.edit'].map(np.sum), res['score_perturbed'] - res['score_original'], atol=1e-10
    )


def test_terms_of_splade():
    model, rows = late.toy_splade(), frame().assign(text_0='rust spreads', text='bread spreads')
    row = PatchParts(model)(rows).iloc[0]
    query = model.encode('query', [rows['query'][0]])[0]
    before, after = (query * model.encode('text', [text])[0] for text in ('rust spreads', 'bread spreads'))
    ids = model.tokenizer.convert_tokens_to_ids(row['parts'])
    np.testing.assert_allclose(row['parts.edit'], (after - before)[ids], atol=1e-10)
    np.testing.assert_array_equal(row['switched.edit'], (after > 0)[ids].astype(int) - (before > 0)[ids].astype(int))
    assert set(row['switched.edit']) == {-1, 0, 1} and (np.diff(np.abs(row['parts.edit'])) <= 1e-12).all()
    assert len(ids) == (np.abs(after - before) > 0).sum()


@pytest.mark.parametrize('make', [late.toy_colbert, late.toy_splade])
def test_rows_that_cannot_be_patched_have_no_parts(make):
    rows = frame().assign(text=lambda f: [f['text_0'][0], *f['text'][1:]])
    res = PatchParts(make(), heads=HEADS)(rows)
    assert res['patchable'].tolist() == ['nothing changed', 'yes', 'yes', 'yes']
    assert res['parts'][0] == [] and len(res['parts.L0H1'][0]) == 0 and len(res['parts'][1])
    assert list(PatchParts(make(), heads=HEADS)(rows[:0]).columns) == list(res.columns)


def test_other_rankers_are_refused():
    with pytest.raises(TypeError, match='model must be a ColBERT or a Splade'):
        PatchParts(toy_bi_encoder())(frame())
