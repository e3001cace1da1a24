"""The Perturb stage and the decorator: exact frames, composition, and what happens where nothing can be done."""

from __future__ import annotations

import pickle
import warnings

import pandas as pd
import pyterrier as pt
import pytest

from pyterrier_mech.perturb import TDC, TFC1, Perturb, perturbation


@perturbation
def shout(query, text):
    """Raises its voice."""
    return text.upper()


@perturbation
def add_query(query, text):
    return f'{text} {query}'


def plain(query, text):
    return f'{text}!'


wrapped = perturbation(plain)


@pytest.fixture
def frame():
    return pd.DataFrame(
        {
            'docno': ['d2', 'd1', 'd2'],
            'qid': ['q1', 'q1', 'q2'],
            'text': ['black cat', 'red fox', 'black cat'],
            'score': [2.0, 1.0, 0.5],
            'query': ['cat', 'cat', 'big fox'],
            'rank': [0, 1, 0],
        },
        index=[7, 7, 3],
    )


class TestTransform:
    def test_text(self, frame):
        before = frame.copy(deep=True)
        expected = frame.assign(
            text=['black cat cat', 'red fox cat', 'black cat big fox'], text_0=['black cat', 'red fox', 'black cat']
        ).assign(edited='text')
        out = Perturb(add_query)(frame)
        pd.testing.assert_frame_equal(out, expected)
        assert list(out.columns) == ['docno', 'qid', 'text', 'score', 'query', 'rank', 'text_0', 'edited']
        pd.testing.assert_frame_equal(frame, before)

    def test_query(self, frame):
        expected = frame.assign(query=['cat black', 'cat red', 'big fox black'], query_0=['cat', 'cat', 'big fox'])
        expected['edited'] = 'query'
        out = Perturb(lambda query, text: f'{query} {text.split()[0]}', field='query')(frame)
        pd.testing.assert_frame_equal(out, expected)

    def test_text_field(self, frame):
        frame = frame.rename(columns={'text': 'body'})
        expected = frame.assign(body=['BLACK CAT', 'RED FOX', 'BLACK CAT'], body_0=frame['body'], edited='body')
        pd.testing.assert_frame_equal(Perturb(shout, text_field='body')(frame), expected)

    def test_stages_compose_and_keep_the_first_original(self, frame):
        expected = frame.assign(
            text=['BLACK CAT cat', 'RED FOX cat', 'BLACK CAT big fox'], text_0=['black cat', 'red fox', 'black cat']
        ).assign(edited='text')
        pd.testing.assert_frame_equal((Perturb(shout) >> Perturb(add_query))(frame), expected)

    def test_an_earlier_original_keeps_its_place_and_value(self, frame):
        frame = frame.assign(query_0=['a', 'b', 'c'], edited='query')
        out = Perturb(lambda query, text: f'{query}?', field='query')(frame)
        pd.testing.assert_frame_equal(out, frame.assign(query=['cat?', 'cat?', 'big fox?']))

    def test_text_and_query_both(self, frame):
        out = (Perturb(shout) >> Perturb(lambda query, text: text, field='query'))(frame)
        assert out['query'].tolist() == ['BLACK CAT', 'RED FOX', 'BLACK CAT']
        assert list(out.columns[-3:]) == ['text_0', 'edited', 'query_0']

    def test_one_row_of_the_frame_gives_what_it_gives_alone(self, frame):
        stage = Perturb(TFC1(seed=3))
        whole = stage(frame)
        for row in range(3):
            pd.testing.assert_frame_equal(stage(frame.iloc[[row]]), whole.iloc[[row]])


class TestNothingToDo:
    def test_rows_stay_and_one_warning_counts_them(self, frame):
        stage = Perturb(TDC([{'text': 'a fox'}, {'text': 'big'}]))
        with pytest.warns(UserWarning) as caught:
            out = stage(frame)
        assert [str(w.message) for w in caught] == [
            f"{stage!r} left 2 of 3 rows unchanged, the first at qid='q1' docno='d2': "
            'the perturbation found nothing to do there.'
        ]
        assert out['text'].tolist() == ['black cat', 'red fox', 'black cat big']
        assert out['text_0'].tolist() == ['black cat', 'red fox', 'black cat']

    def test_no_warning_where_every_row_changes_or_there_is_none(self, frame):
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            Perturb(add_query)(frame)
            Perturb(TDC([]))(frame.iloc[:0])


class TestErrors:
    def test_a_result_that_is_no_string(self, frame):
        stage = Perturb(lambda query, text: text if query == 'cat' else None)
        with pytest.raises(TypeError, match=r"Perturb\(<lambda>\) got None at qid='q2' docno='d2'.*returns a string"):
            stage(frame)

    def test_an_exception_names_the_row_and_keeps_its_cause(self, frame):
        stage = Perturb(lambda query, text: text + {'black cat': '!'}[text])
        with pytest.raises(RuntimeError, match=r"failed at qid='q1' docno='d1': KeyError\('red fox'\)") as caught:
            stage(frame)
        assert isinstance(caught.value.__cause__, KeyError)

    @pytest.mark.parametrize('value', ['shout', None, 3])
    def test_not_callable(self, value):
        with pytest.raises(TypeError, match=f'{value!r} is not callable'):
            Perturb(value)
        with pytest.raises(TypeError, match=f'{value!r} is not callable'):
            perturbation(value)

    def test_unknown_field(self):
        with pytest.raises(ValueError, match="field must be one of .'text', 'query'.; got field='body'"):
            Perturb(shout, field='body')


class TestValue:
    @pytest.mark.parametrize(
        'stage',
        [
            Perturb(shout),
            Perturb(shout, field='query'),
            Perturb(plain, text_field='body'),
            Perturb(TFC1(k=2, seed=5, location='start')),
        ],
    )
    def test_repr_rebuilds(self, stage):
        rebuilt = eval(repr(stage))
        assert rebuilt == stage and repr(rebuilt) == repr(stage) and hash(rebuilt) == hash(stage)

    def test_equality(self):
        stages = [
            Perturb(shout),
            Perturb(add_query),
            Perturb(shout, field='query'),
            Perturb(shout, text_field='body'),
            Perturb(TFC1(seed=0)),
            Perturb(TFC1(seed=1)),
        ]
        assert len(set(stages)) == len(stages)
        assert Perturb(TFC1(seed=1)) == stages[-1]
        assert Perturb(shout) != 'Perturb(shout)'

    def test_pickle(self, frame):
        stage = pickle.loads(pickle.dumps(Perturb(shout) >> Perturb(wrapped)))
        assert stage(frame)['text'].tolist() == ['BLACK CAT!', 'RED FOX!', 'BLACK CAT!']

    @pytest.mark.parametrize(
        'function, label',
        [
            (shout, 'Perturb shout'),
            (TFC1(), 'Perturb TFC1'),
            (lambda query, text: text, 'Perturb <lambda>'),
            (type('AVeryLongClassName', (), {'__call__': plain})(), 'Perturb AVeryLongCl…'),
        ],
    )
    def test_schematic(self, function, label):
        stage = Perturb(function)
        assert stage.schematic == {'label': label, 'help_url': None} and len(label) <= 20
        assert stage.subtransformers() == {}


class TestDecorator:
    def test_name_repr_and_docstring(self):
        assert (shout.name, repr(shout), shout.__doc__) == ('shout', 'shout', 'Raises its voice.')
        assert shout('q', 'a') == 'A'

    def test_equality_by_function(self):
        assert perturbation(plain) == wrapped and hash(perturbation(plain)) == hash(wrapped)
        assert perturbation(plain) != shout and wrapped != plain

    def test_pickle_by_name_where_the_name_leads_here_else_by_function(self):
        assert pickle.loads(pickle.dumps(shout)) is shout
        assert pickle.loads(pickle.dumps(wrapped)) == wrapped


def test_inspect():
    assert pt.inspect.transformer_inputs(Perturb(shout)) == [['qid', 'docno', 'query', 'text']]
    assert pt.inspect.transformer_outputs(Perturb(shout), ['qid', 'docno', 'query', 'text']) == [
        'qid',
        'docno',
        'query',
        'text',
        'text_0',
        'edited',
    ]
