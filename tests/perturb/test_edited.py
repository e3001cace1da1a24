"""Perturb says which columns it has edited, and never takes another stage's column for an original."""

import pandas as pd
import pyterrier as pt
import pytest
from toys import toy_cross_encoder

from pyterrier_mech import PatchHeads
from pyterrier_mech.perturb import TDC, TFC1, Perturb, perturbation


def longer(query, text):
    return f'{text} more'


def shorter(query, text):
    return f'{query} please'


TEXT, QUERY = Perturb(longer), Perturb(shorter, field='query')


@pytest.fixture
def frame():
    return pd.DataFrame({'qid': ['1', '2'], 'docno': 'd', 'query': ['bread?', 'rust?'], 'text': ['Bread.', 'Rust.']})


@pytest.mark.parametrize(
    ('stages', 'edited', 'originals'),
    [
        ([TEXT], 'text', {'text_0': ['Bread.', 'Rust.']}),
        ([QUERY], 'query', {'query_0': ['bread?', 'rust?']}),
        ([TEXT, TEXT], 'text', {'text_0': ['Bread.', 'Rust.']}),
        ([QUERY, QUERY], 'query', {'query_0': ['bread?', 'rust?']}),
        ([TEXT, QUERY], 'query text', {'text_0': ['Bread.', 'Rust.'], 'query_0': ['bread?', 'rust?']}),
        ([QUERY, TEXT, QUERY], 'query text', {'text_0': ['Bread.', 'Rust.'], 'query_0': ['bread?', 'rust?']}),
    ],
)
def test_what_was_edited_is_a_column(frame, stages, edited, originals):
    res = frame
    for stage in stages:
        res = stage(res)
        empty = stage(res.iloc[:0])
        assert list(empty.columns) == list(stage(res).columns) and not len(empty)
    assert res['edited'].tolist() == [edited] * 2
    for column, values in originals.items():
        assert res[column].tolist() == values
    assert sorted(set(res.columns) - set(frame.columns)) == sorted({'edited', *originals})


def test_it_survives_a_file(frame):
    res = pd.DataFrame(TEXT(frame).to_dict('records'))
    assert TEXT(res)['text_0'].tolist() == ['Bread.', 'Rust.']


def test_another_text_column(frame):
    frame = frame.rename(columns={'text': 'body'})
    res = Perturb(longer, text_field='body')(frame)
    assert res['edited'].tolist() == ['body'] * 2 and res['body_0'].tolist() == ['Bread.', 'Rust.']


def test_an_edit_that_changes_nothing_is_an_edit_too(frame):
    with pytest.warns(UserWarning, match='unchanged'):
        assert Perturb(lambda query, text: text)(frame)['edited'].tolist() == ['text'] * 2


# -- what query rewriters leave


def rewritten(frame, times=1):
    for _ in range(times):
        frame = pt.apply.query(lambda row: row['query'].strip('?'))(frame)
    return frame


@pytest.mark.parametrize('times', [1, 2])
def test_what_a_rewriter_left_makes_room(frame, times):
    before = rewritten(frame, times)
    res = QUERY(before)
    assert res['query_0'].tolist() == ['bread', 'rust'] and res['query'].tolist() == ['bread please', 'rust please']
    assert res[f'query_{times - 1}_before'].tolist() == ['bread?', 'rust?'] and 'query_1' not in res
    assert res['edited'].tolist() == ['query'] * 2
    pd.testing.assert_series_equal(QUERY(res)['query_0'], res['query_0'])
    pd.testing.assert_series_equal(QUERY(TEXT(before))['query_0'], res['query_0'])


@pytest.mark.parametrize('stages', [[QUERY], [QUERY, TEXT], [rewritten, QUERY]])
def test_a_rewriter_after_an_edit_of_the_query_is_noticed(frame, stages):
    for stage in [*stages, rewritten]:
        frame = stage(frame)
    for use in (QUERY, PatchHeads(toy_cross_encoder(), heads=['L0H0'])):
        with pytest.raises(ValueError, match="'query_1', so a query rewriter came after.*put rewriters before Perturb"):
            use(frame)
    undone = pt.rewrite.reset()(frame)
    assert len(PatchHeads(toy_cross_encoder(), heads=['L0H0'])(undone)) == 2
    with pytest.raises((ValueError, pt.validate.InputValidationError), match='query_0'):
        PatchHeads(toy_cross_encoder())(pt.rewrite.reset()(undone))


def test_an_edit_of_the_text_leaves_it_and_does_not_call_it_an_edit(frame):
    res = TEXT(rewritten(frame))
    assert res['query_0'].tolist() == ['bread?', 'rust?'] and res['edited'].tolist() == ['text'] * 2


# -- columns of collections


@pytest.mark.parametrize('name', ['text_0', 'body_0'])
def test_a_field_of_the_collection_is_no_original(frame, name):
    column = name.removesuffix('_0')
    frame = frame.rename(columns={'text': column}).assign(**{name: 'a field'})
    stage = Perturb(longer, text_field=column)
    with pytest.raises(ValueError, match=rf"column '{name}' that Perturb did not write.*'{column}_before'"):
        stage(frame)
    res = stage(frame.rename(columns={name: f'{column}_before'}))
    assert res[name].tolist() == ['Bread.', 'Rust.'] and res[f'{column}_before'].tolist() == ['a field'] * 2


@pytest.mark.parametrize('value', ['yes', '2024-01-01', 3, True, 'text'])
def test_a_column_called_edited_is_no_note(frame, value):
    with pytest.raises(ValueError, match="column 'edited' must hold the names of the columns.*Rename yours"):
        TEXT(frame.assign(edited=value))


def test_rows_that_were_edited_and_others_together(frame):
    both = pd.concat([TEXT(frame.iloc[:1]), frame.iloc[1:]])
    res = TEXT(both)
    assert res['text_0'].tolist() == ['Bread.', 'Rust.'] and res['text'].tolist() == ['Bread. more more', 'Rust. more']
    assert res['edited'].tolist() == ['text'] * 2
    with pytest.raises(ValueError, match="'text_0' that Perturb did not write"):
        TEXT(both.assign(text_0='x'))


# -- what is not a perturbation


@pytest.mark.parametrize('kind', [TDC, TFC1, str, Perturb])
def test_a_class_is_refused_at_once(kind):
    with pytest.raises(TypeError, match=rf'perturbation={kind.__name__} is a class: give one made of it'):
        Perturb(kind)
    with pytest.raises(TypeError, match='is a class'):
        perturbation(kind)


@pytest.mark.parametrize(
    ('name', 'value', 'error'),
    [('perturbation', TFC1, TypeError), ('perturbation', 3, TypeError), ('field', 'body', ValueError)],
)
def test_settings_are_checked_when_they_change(frame, name, value, error):
    stage = Perturb(longer)
    stage.set_parameter(name, value)
    with pytest.raises(error, match=name):
        stage(frame.iloc[:0])


@pytest.mark.parametrize('seed', ['1', 1.0, None])
def test_seeds_are_whole_numbers(seed):
    with pytest.raises(ValueError, match=f'seed={seed!r}: must be a whole number'):
        TFC1(seed=seed)
