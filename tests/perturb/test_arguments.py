"""The order of arguments: found by names, refused where it is the other one, and never exchanged in silence."""

from __future__ import annotations

import functools

import pandas as pd
import pytest

from pyterrier_mech.perturb import TFC1, Perturb, perturbation


def frame():
    return pd.DataFrame({'qid': ['q'], 'docno': ['d'], 'query': ['cat'], 'text': ['a fox']})


def edited(function, **settings):
    return Perturb(function, **settings)(frame())[settings.get('field', 'text')].tolist()


def prepend_query(text, query):
    return f'{query} {text}'


def with_default(text, query='cat'):
    return f'{query} {text}'


class Shouting:
    def __call__(self, text):
        return text.upper()


@pytest.mark.parametrize(
    'function',
    [
        prepend_query,
        with_default,
        functools.partial(prepend_query),
        lambda t, q: t,
        lambda doc, other: doc,
        lambda a, query: a,
        lambda passage_, q_: passage_,
    ],
)
def test_the_other_order_is_refused_with_the_way_out(function):
    for make in (Perturb, perturbation):
        with pytest.raises(TypeError, match=r'query first and the text second.*lambda query, text: f\(text, query\)'):
            make(function)


@pytest.mark.parametrize(
    'function',
    [
        lambda q, t: f'{t} {q}',
        lambda query, passage: f'{passage} {query}',
        lambda a, b: f'{b} {a}',
        lambda *args: f'{args[1]} {args[0]}',
        lambda _, doc: f'{doc} cat',
        lambda query, text, times=1: f'{text} {query}',
        TFC1(),
    ],
)
def test_query_and_text_in_this_order(function):
    assert edited(function) == ['a fox cat']
    assert edited(perturbation(function)) == ['a fox cat']


@pytest.mark.parametrize('function', [lambda text: text.upper(), lambda x: x.upper(), str.upper, Shouting()])
def test_one_argument_gets_what_is_edited(function):
    assert edited(function) == ['A FOX']


def test_one_argument_gets_what_its_name_says():
    assert edited(lambda x: x.upper(), field='query') == ['CAT']
    assert edited(lambda query: query.upper(), field='query') == ['CAT']
    assert edited(lambda query: query.upper()) == ['CAT']
    assert edited(lambda text: text.upper(), field='query') == ['A FOX']
    assert edited(lambda text, times=2: ' '.join([text] * times)) == ['a fox a fox']


def test_a_decorated_function_of_one_argument():
    shout = perturbation(str.upper)
    assert shout('cat', 'a fox') == 'A FOX'
    assert edited(shout, field='query') == ['CAT']


@pytest.mark.parametrize('function', [lambda: '', lambda query, text, more: text])
def test_other_numbers_of_arguments_are_refused(function):
    with pytest.raises(TypeError, match=r'give a callable \(query, text\) -> str, or \(text\)'):
        Perturb(function)


def test_an_edit_set_later_is_checked_too():
    stage = Perturb(TFC1())
    stage.perturbation = prepend_query
    with pytest.raises(TypeError, match='query first'):
        stage(frame())
