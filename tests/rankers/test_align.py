"""The two versions of every pair of a frame, side by side, position by position."""

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from inside import sides
from toys import frame_of, pairs, toy_bi_encoder, toy_cross_encoder, unpatchable_pairs

from pyterrier_mech import CrossEncoder, PatchHeads, PatchLayers

pytestmark = pytest.mark.filterwarnings('ignore:.*cannot be patched')

COLUMNS = ['qid', 'docno', 'position', 'original', 'perturbed', 'change', 'type', 'patchable']


def one_pair(**columns):
    row = {'qid': '1', 'docno': 'd', 'query': 'keep bread', 'text_0': 'Bread keeps.', 'text': 'Bread keeps. bread'}
    return pd.DataFrame([{**row, **columns}])


def test_one_pair_by_hand():
    found = toy_cross_encoder().align(one_pair())
    assert list(found.columns) == COLUMNS and list(found.position) == list(range(len(found)))
    assert list(found.original) == '[CLS] keep bread [SEP] bread keeps . a [SEP]'.split()
    assert list(found.perturbed) == '[CLS] keep bread [SEP] bread keeps . bread [SEP]'.split()
    assert list(found.change) == ['same'] * 7 + ['inserted', 'same']
    assert list(found.type) == 'cls query query sep doc_match doc_other doc_other inserted sep'.split()
    assert set(found.qid) == {'1'} and set(found.docno) == {'d'} and set(found.patchable) == {'yes'}


@pytest.mark.parametrize('make', [toy_cross_encoder, toy_bi_encoder])
def test_it_is_what_is_patched(make):
    model, frame = make(), pairs(8).sample(frac=1, random_state=2)
    before = frame.copy(deep=True)
    found = model.align(frame)
    pd.testing.assert_frame_equal(frame, before)
    res = PatchLayers(model, sites=['mlp_out'], by='position')(frame)
    for label, row in frame.iterrows():
        part = found.loc[label]
        towers = sides(model, row)
        ids = np.concatenate([np.asarray(tower.original['input_ids'])[0] for tower in towers])
        assert list(part.original) == model.tokenizer.convert_ids_to_tokens(ids.tolist())
        assert list(part.perturbed) == res.position_tokens[label] and list(part.type) == res.position_types[label]
        assert list(part.position) == list(range(len(res['mlp_out.L0'][label])))
        assert set(part.patchable) == {res.patchable[label]} and set(part.qid) == {row.qid}


def test_pairs_that_cannot_be_patched_say_why():
    model, frame = toy_cross_encoder(max_length=24), unpatchable_pairs()
    found = model.align(frame)
    assert list(found.groupby(level=0).patchable.first()) == list(PatchHeads(model)(frame).patchable)
    none = found[found.patchable == 'no alignment']
    assert none[['perturbed', 'change']].isna().all(axis=None) and none.original.notna().all()
    assert found[found.patchable != 'no alignment'].notna().all(axis=None)


def test_fillers():
    model = toy_cross_encoder()
    assert 'the' in list(model.align(one_pair(), filler='the').original)
    assert list(model.align(one_pair(), filler='mask').original)[-2:] == ['[PAD]', '[SEP]']
    assert set(model.align(one_pair(), filler=None).patchable) == {'no alignment'}
    with pytest.raises(ValueError, match="filler='two words' is 2 tokens"):
        model.align(one_pair(), filler='two words')


def test_an_edited_query_and_another_text_field():
    model = toy_cross_encoder()
    frame = one_pair(query_0='bread', edited='query').drop(columns='text_0')
    assert list(model.align(frame).query("change == 'inserted'").perturbed) == ['keep']
    model.set_parameter('text_field', 'body')
    found = model.align(one_pair().rename(columns={'text': 'body', 'text_0': 'body_0'}))
    assert list(found.query("type == 'inserted'").perturbed) == ['bread']


def test_frames_that_are_odd():
    model = toy_cross_encoder()
    empty = CrossEncoder('nowhere/at-all').align(one_pair().iloc[:0])
    assert list(empty.columns) == COLUMNS and not len(empty)
    twice = pd.concat([one_pair(), one_pair()])
    assert len(model.align(twice)) == 18 and set(model.align(twice).index) == {0}
    assert list(model.align(one_pair(text='', text_0='')).patchable)[0] == 'nothing changed'
    with pytest.raises(pt.validate.InputValidationError, match=r'Perturb\(\.\.\.\)'):
        model.align(frame_of(2))
    with pytest.raises(ValueError, match="no string in column 'text'"):
        model.align(one_pair(text=None))
