"""Axioms: the exact strings they make, what they draw, and what they refuse."""

from __future__ import annotations

import pickle
import random
from collections import Counter

import pandas as pd
import pytest

from pyterrier_mech.perturb import LNC1, TDC, TFC1, TFC2, Axiom, DocumentStatistics

QUERY, TEXT = 'What is the Black Cat of Egypt?', 'A fox, a red fox.'
WORDS = ['black', 'cat', 'egypt']


class Stems:
    """A collection of 100 documents whose stemmer cuts a final s and whose only stop word is 'the'."""

    n_docs = 100

    def __init__(self, **df):
        self.frequencies = df

    def df(self, term):
        return self.frequencies.get(term, 0)

    def query_terms(self, text):
        return [(word, word.removesuffix('s')) for word in text.lower().split() if word != 'the']


class TestTFC1:
    def test_adds_one_query_word_lower_cased_after_one_space(self):
        added = {TFC1(seed=seed)(QUERY, TEXT) for seed in range(50)}
        assert added == {f'{TEXT} {word}' for word in WORDS}

    def test_start(self):
        axiom = TFC1(seed=4)
        assert TFC1(seed=4, location='start')(QUERY, TEXT) == f'{axiom.terms(QUERY, TEXT)[0]} {TEXT}'

    def test_words_are_drawn_evenly_and_repeated_words_count_once(self):
        counts = Counter(TFC1(seed=seed).terms('cat cat dog', TEXT)[0] for seed in range(2000))
        assert set(counts) == {'cat', 'dog'}
        assert 900 < counts['cat'] < 1100

    def test_more_draws_begin_with_the_fewer(self):
        drawn = TFC1(k=6).terms(QUERY, TEXT)
        assert len(drawn) == 6 and len(set(drawn)) > 1
        assert [TFC1(k=k).terms(QUERY, TEXT) for k in range(1, 6)] == [drawn[:k] for k in range(1, 6)]
        assert TFC1(k=6)(QUERY, TEXT) == f'{TEXT} {" ".join(drawn)}'

    def test_the_word_is_added_as_written_and_not_as_indexed(self):
        assert TFC1(Stems())('the Cats', TEXT) == f'{TEXT} cats'

    def test_a_query_of_stop_words_leaves_the_text(self):
        assert TFC1()('what is the', TEXT) == TEXT


class TestDraws:
    def test_seed_query_and_text_decide(self):
        def drawn(seed=0, query=QUERY, text=TEXT):
            return TFC1(k=30, seed=seed).terms(query, text)

        assert drawn() == drawn()
        assert drawn() != drawn(seed=1)
        assert drawn() != drawn(text=f'{TEXT} ')
        assert drawn() != drawn(query=f'{QUERY} ')

    def test_neither_the_order_of_calls_nor_the_global_seed_matters(self):
        texts = [f'text {i}' for i in range(20)]
        forward = {text: TFC1()(QUERY, text) for text in texts}
        random.seed(0)
        state = random.getstate()
        backward = {text: TFC1()(QUERY, text) for text in reversed(texts)}
        assert forward == backward
        assert random.getstate() == state

    def test_every_process_draws_the_same(self):
        """Strings hash differently in every process: what was drawn in another one stands here."""
        drawn = 'black egypt egypt black cat cat black cat egypt cat black black black egypt egypt black'
        assert TFC1(k=16).terms(QUERY, TEXT) == drawn.split()

    def test_odd_characters_are_no_obstacle(self):
        assert TFC1()('cat', 'half a pair \ud83d') == 'half a pair \ud83d cat'


class TestTFC2:
    def test_adds_the_same_word_k_times_for_every_k(self):
        (word,) = TFC1(seed=2).terms(QUERY, TEXT)
        assert [TFC2(k=k, seed=2)(QUERY, TEXT) for k in range(1, 6)] == [
            f'{TEXT} {word}',
            f'{TEXT} {word} {word}',
            f'{TEXT} {word} {word} {word}',
            f'{TEXT} {word} {word} {word} {word}',
            f'{TEXT} {word} {word} {word} {word} {word}',
        ]

    def test_a_query_of_stop_words_leaves_the_text(self):
        assert TFC2(k=3)('what is the', TEXT) == TEXT


class TestTDC:
    def test_adds_the_rarest_query_word_as_written(self):
        assert TDC(Stems(black=50, cat=3, egypt=9))('the Black cats of Egypt', TEXT) == f'{TEXT} cats'
        assert TDC(Stems(black=2, cat=3), location='start')('black cats', TEXT) == f'black {TEXT}'

    def test_words_that_no_document_contains_are_skipped(self):
        assert TDC(Stems(cat=90))('cat of egypt', TEXT) == f'{TEXT} cat'
        assert TDC(Stems(dog=1))('cat of egypt', TEXT) == TEXT

    def test_the_first_among_equals(self):
        assert TDC(Stems(fox=5, cat=5, dog=6))('dog cats fox', TEXT) == f'{TEXT} cats'

    def test_statistics_of_documents(self):
        axiom = TDC(['the cat', 'a cat and a fox', 'a dog'])
        assert isinstance(axiom.statistics, DocumentStatistics)
        assert axiom('cat or fox', TEXT) == f'{TEXT} fox'

    def test_statistics_are_needed(self):
        with pytest.raises(ValueError, match='statistics=None: TDC needs document frequencies'):
            TDC()


class TestLNC1:
    def test_words_of_the_document_that_are_not_in_the_query(self):
        added = {LNC1(seed=seed)('Is the fox QUICK?', 'The quick fox was sly, was red.') for seed in range(50)}
        assert added == {f'The quick fox was sly, was red. {word}' for word in ('sly', 'red')}

    @pytest.mark.parametrize('query, text', [('cats', 'the cat met dogs'), ('cat', 'the cats met dogs')])
    def test_other_forms_of_a_query_word_are_not_added(self, query, text):
        assert {LNC1(Stems(), seed=seed).terms(query, text)[0] for seed in range(50)} == {'met', 'dogs'}

    def test_given_words(self):
        axiom = LNC1(Stems(), words=['Tea', 'cat', 'the', 'milk', 'What'], k=60)
        assert set(axiom.terms('what cats', 'no matter')) == {'Tea', 'the', 'milk'}
        assert len(axiom.terms('what cats', 'no matter')) == 60

    def test_stop_words_of_the_query_are_query_words(self):
        assert LNC1(words=['what', 'tea'], k=50).terms('What?', TEXT) == ['tea'] * 50

    def test_nothing_to_add_leaves_the_text(self):
        assert LNC1()('red fox', 'the red fox') == 'the red fox'
        assert LNC1(words=['cat'])('cat', TEXT) == TEXT


class TestValue:
    axioms = [
        TFC1(),
        TFC1(k=2),
        TFC1(seed=1),
        TFC1(location='start'),
        TFC2(),
        TDC(Stems()),
        LNC1(),
        LNC1(words=['tea']),
    ]

    def test_expected_and_citation(self):
        assert [axiom.expected for axiom in (TFC1, TFC2, TDC, LNC1)] == [1, 1, 1, -1]
        assert all('Fang, Tao and Zhai' in axiom.citation and 'SIGIR 2004' in axiom.citation for axiom in self.axioms)

    def test_equality_and_hash(self):
        assert len(set(self.axioms)) == len(self.axioms)
        frame = pd.DataFrame({'docno': ['d'], 'text': ['cat']})
        assert TDC(frame) == TDC(frame) and hash(TDC(frame)) == hash(TDC(frame))
        assert TDC(frame) != TDC(frame.copy()) and TDC(frame) != TFC1(frame)
        assert LNC1(words=['tea']) == LNC1(words=('tea',))

    def test_frozen(self):
        with pytest.raises(AttributeError):
            TFC1().k = 3

    def test_pickle(self):
        axiom = pickle.loads(pickle.dumps(TDC(pd.DataFrame({'text': ['cat', 'cat dog']}), seed=3)))
        assert axiom('cat dog', TEXT) == f'{TEXT} dog' and axiom.seed == 3

    def test_repr_rebuilds(self):
        for axiom in (TFC1(k=2, seed=5), TFC2(location='start'), LNC1(k=3, words=['tea'])):
            assert eval(repr(axiom)) == axiom

    def test_one_source_is_wrapped_once(self):
        axiom = TDC(['cat'])
        assert TFC1(axiom.statistics).statistics is axiom.statistics


class TestBadParameters:
    @pytest.mark.parametrize('axiom', [TFC1, TFC2, LNC1])
    @pytest.mark.parametrize('k', [0, -1, 1.5, '2'])
    def test_k(self, axiom, k):
        with pytest.raises(ValueError, match=f'k={k!r}: must be a whole number'):
            axiom(k=k)

    @pytest.mark.parametrize('axiom', [TFC1, TFC2, LNC1])
    def test_location(self, axiom):
        with pytest.raises(ValueError, match="location='middle': must be 'end', 'start', 'sentence' or 'replace'"):
            axiom(location='middle')

    @pytest.mark.parametrize('words', [[], '', 'tea', ['tea', ' '], ['tea', 3], {'tea', 'milk'}])
    def test_words(self, words):
        with pytest.raises(ValueError, match='words='):
            LNC1(words=words)

    @pytest.mark.parametrize('axiom', [TFC1, TFC2, TDC, LNC1])
    def test_statistics(self, axiom):
        with pytest.raises(TypeError, match='no collection statistics from int'):
            axiom(3)

    def test_the_base_class_alone_adds_nothing(self):
        with pytest.raises(NotImplementedError, match='Axiom must say which terms it adds'):
            Axiom()(QUERY, TEXT)


def test_whether_a_score_change_agrees():
    assert [TFC1().agrees(change) for change in (-0.1, 0.0, 0.1)] == [False, False, True]
    assert [LNC1().agrees(change) for change in (-0.1, 0.0, 0.1)] == [True, True, False]
