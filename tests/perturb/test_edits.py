"""Axioms that rearrange, plain edits, where added terms go, and what Perturb says of them."""

from __future__ import annotations

import pickle
import warnings
from collections import Counter

import inside
import numpy as np
import pandas as pd
import pytest
from toys import toy_module, wordpiece_tokenizer

from pyterrier_mech import BiEncoder
from pyterrier_mech.perturb import (
    LNC1,
    LNC2,
    PROX,
    STMC1,
    TDC,
    TFC1,
    TFC2,
    TFC3,
    TFLNC,
    ChangeCase,
    Perturb,
    RemovePunctuation,
    RemoveQueryTerm,
    RemoveStopWords,
    ReplaceQueryTerm,
    ShuffleSentences,
    ShuffleWords,
    Typos,
    all_edits,
)

QUERY = 'keep bread fresh'
TEXT = 'Bread keeps best in a box. Keep bread dry, and it stays good! Do you own one?'
ODD = [
    '',
    ' ',
    '\n',
    '?!…',
    'a',
    'keep',
    'Keep.',
    'naïve café',
    'हिन्दी पाठ',
    'İstanbul İ',
    'a\0b',
    '\ud83d x',
    '\u0301',
]


class Letters:
    """Encodes a word as the counts of its letters."""

    def __init__(self):
        self.seen = []

    def encode(self, words):
        self.seen += words
        return np.array([[word.count(letter) for letter in 'abcdefghijklmnopqrstuvwxyz'] for word in words])


def edits():
    return all_edits([TEXT, 'fresh bread', 'keep'], encoder=Letters(), synonyms={'bread': ['loaf'], 'keep': ['hold']})


@pytest.mark.parametrize('edit', edits(), ids=lambda edit: edit.name)
class TestEveryEdit:
    def test_odd_texts_give_strings_and_the_same_ones_again(self, edit):
        for text in [*ODD, TEXT]:
            for query in [*ODD, QUERY]:
                made = edit.versions(query, text)
                assert all(isinstance(version, str) for version in made) and made[0] == text
                assert made == edit.versions(query, text)
                assert len(made) == len(edit.weights)

    def test_value(self, edit):
        assert edit.citation and edit.expected in (None, 1, -1)
        copy = pickle.loads(pickle.dumps(edit)) if not isinstance(edit, STMC1) else edit
        assert copy(QUERY, TEXT) == edit(QUERY, TEXT)
        assert hash(edit) == hash(edit) and edit == edit
        with pytest.raises(AttributeError):
            edit.seed = 3

    def test_bad_seed(self, edit):
        settings = {'encoder': Letters()} if isinstance(edit, STMC1) else {}
        settings |= {'statistics': [TEXT]} if isinstance(edit, TDC) else {}
        settings |= {'synonyms': {'a': ['b']}} if isinstance(edit, ReplaceQueryTerm) else {}
        with pytest.raises(ValueError, match="seed='x': must be a whole number"):
            type(edit)(seed='x', **settings)


def test_names_tell_all_edits_apart_and_predictions_are_those_of_the_sources():
    names = {edit.name: edit.expected for edit in edits()}
    assert names == {
        **dict.fromkeys(['TFC1', "TFC1(location='replace')", 'TFC2', 'TFC3', 'TDC', 'LNC2', 'TFLNC', 'PROX'], 1),
        **dict.fromkeys(['STMC1', "STMC1(location='replace')"], 1),
        **dict.fromkeys(['LNC1', "PROX(direction='apart')", 'RemoveQueryTerm'], -1),
        **dict.fromkeys(['ReplaceQueryTerm', 'ChangeCase', 'RemovePunctuation', 'RemoveStopWords'], None),
        **dict.fromkeys(['ShuffleSentences', 'ShuffleWords', 'Typos'], None),
    }
    assert TFC1(k=2, seed=4).name == 'TFC1(k=2)'


class TestLocation:
    def test_between_sentences(self):
        places = {TFC1(location='sentence', seed=seed)(QUERY, 'One is. Two are! Three') for seed in range(60)}
        expected = [('One is. {} Two are! Three'), ('One is. Two are! {} Three')]
        assert places == {text.format(word) for word in ('keep', 'bread', 'fresh') for text in expected}
        assert TFC2(location='sentence')('cat', 'One only.') == 'One only. cat'

    def test_replace_keeps_the_number_of_words_and_the_words_of_the_query(self):
        places = {TFC2(location='replace', seed=seed)('box', 'My box, is (full).') for seed in range(60)}
        assert places == {'box box, is (full).', 'My box, box (full).', 'My box, is (box).'}
        assert TFC2(location='replace', k=2)('box', 'the box is') == 'box box box'
        assert TFC2(location='replace', k=3)('box', 'the box is') == 'the box is'


class TestOneTermAQuery:
    def test_the_same_for_all_texts(self):
        texts = [f'text {i}' for i in range(30)]
        assert len({TFC1(per='query').terms(QUERY, text)[0] for text in texts}) == 1
        assert len({TFC1().terms(QUERY, text)[0] for text in texts}) == 3
        assert len({TFC1(per='query', seed=seed).terms(QUERY, '')[0] for seed in range(30)}) == 3
        assert TFC2(per='query', k=2).terms(QUERY, 'x') == TFC1(per='query').terms(QUERY, 'y') * 2

    def test_unknown(self):
        with pytest.raises(ValueError, match="per='text': must be 'pair' or 'query'"):
            TFC1(per='text')


class TestTermColumns:
    def frame(self):
        return pd.DataFrame({'qid': '1', 'docno': list('abc'), 'query': 'cat', 'text': ['a cat.', 'a dog', 'the Cat']})

    def test_whether_the_term_was_there(self):
        out = Perturb(TFC1())(self.frame())
        assert out['term_added'].tolist() == ['cat'] * 3
        assert out['term_before'].tolist() == ['yes', 'no', 'yes']
        assert list(out.columns[-4:]) == ['text_0', 'edited', 'term_added', 'term_before']

    def test_some_of_several_and_missing_where_nothing_is_added(self):
        frame = self.frame().assign(query=['the', 'dog cat', 'dog cat'])
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            out = Perturb(TFC1(k=20))(frame)
        assert out['term_before'].isna().tolist() == [True, False, False]
        assert out['term_before'].tolist()[1:] == ['some', 'some']

    def test_forms_that_the_collection_does_not_tell_apart(self):
        class Stems:
            n_docs = 9

            def df(self, term):
                return 1

            def query_terms(self, text):
                return [(word, word.removesuffix('s')) for word in text.lower().split()]

        out = Perturb(TFC1(Stems()))(self.frame().assign(query='cats', text=['one cat', 'one dog', 'two cats']))
        assert out['term_before'].tolist() == ['yes', 'no', 'yes']

    def test_edits_that_cannot_tell_write_no_columns_and_the_last_that_can_counts(self):
        assert 'term_added' not in Perturb(ChangeCase())(self.frame())
        both = (Perturb(TFC1()) >> Perturb(TFC1()) >> Perturb(ChangeCase()))(self.frame())
        assert both['term_before'].tolist() == ['yes'] * 3

    def test_no_rows(self):
        assert list(Perturb(TFC1())(self.frame().iloc[:0]).columns[-2:]) == ['term_added', 'term_before']

    def test_columns_of_the_user_stay(self):
        with pytest.raises(ValueError, match="'term_added' that Perturb did not write"):
            Perturb(TFC1())(self.frame().assign(term_added='x'))


class TestTFC3:
    def test_one_of_several_occurrences_is_exchanged(self):
        made = {TFC3(seed=seed)('cat dog', 'Cat, cat and fox.') for seed in range(30)}
        assert made == {'dog, cat and fox.', 'Cat, dog and fox.'}
        assert TFC3().terms('cat dog', 'cat cat') == ['dog']

    @pytest.mark.parametrize('text', ['cat and fox', 'cat cat dog', 'fox fox', ''])
    def test_where_it_does_not_apply(self, text):
        assert TFC3()('cat dog', text) == text

    def test_only_terms_that_are_not_commoner(self):
        rare, common = ['cat', 'cat', 'dog'], ['cat', 'dog', 'dog']
        assert TFC3(rare)('cat dog', 'cat cat') != 'cat cat'
        assert TFC3(common)('cat dog', 'cat cat') == 'cat cat'
        assert TFC3(['cat'])('cat dog', 'cat cat') == 'cat cat'


class TestPROX:
    def distance(self, text):
        places = [(i, word) for i, word in enumerate(text.split()) if word in ('a1', 'b2')]
        return min(abs(i - j) for i, one in places for j, other in places if one != other)

    def test_together_and_apart(self):
        text = 'x a1 y z b2 w v u'
        assert PROX()('a1 b2', text) == 'x a1 b2 y z w v u'
        assert PROX(direction='apart')('a1 b2', text) == 'a1 x y z w v u b2'
        assert (PROX().expected, PROX(direction='apart').expected) == (1, -1)

    def test_random_texts_keep_their_words_and_move_in_the_right_direction(self):
        drawn = np.random.default_rng(0)
        changed = Counter()
        for _ in range(300):
            words = drawn.choice(['a1', 'b2', 'x', 'y', 'z', 'w'], size=drawn.integers(2, 14)).tolist()
            text = ' '.join(words)
            for direction in ('together', 'apart'):
                new = PROX(direction=direction)('a1 b2', text)
                assert Counter(new.split()) == Counter(words)
                if new != text:
                    moved = self.distance(new) - self.distance(text)
                    assert moved < 0 if direction == 'together' else moved > 0
                    changed[direction] += 1
        assert min(changed.values()) > 20 and len(changed) == 2

    @pytest.mark.parametrize('text', ['a1 b2', 'a1 x a1', 'x', ''])
    def test_nothing_to_move(self, text):
        assert PROX()('a1 b2', text) == PROX(direction='apart')('a1 b2', text) == text

    def test_punctuation_stays(self):
        assert PROX()('cat dog', 'Cat, fox (dog).') == 'Cat, dog (fox).'

    def test_bad_direction(self):
        with pytest.raises(ValueError, match="direction='near': must be 'together' or 'apart'"):
            PROX(direction='near')


class TestSTMC1:
    def test_the_closest_word_of_the_document_or_of_a_list(self):
        encoder = Letters()
        axiom = STMC1(encoder=encoder)
        assert axiom('cat', 'the tact of a fox, cat') == 'the tact of a fox, cat tact'
        assert STMC1(encoder=encoder, words=['dog', 'act', 'fox', 'cats'], k=2).terms('cat', '') == ['act', 'cats']
        assert axiom('cat', 'a cat') == 'a cat' and axiom('the', 'tact') == 'tact'

    def test_a_word_is_encoded_once(self):
        axiom = STMC1(encoder=(encoder := Letters()))
        for _ in range(3):
            axiom('cat', 'tact fox')
        assert sorted(encoder.seen) == ['cat', 'fox', 'tact']

    def test_a_bi_encoder_chooses_as_its_own_cosine_does(self):
        module, tokenizer = toy_module('bert', classifier=False)[0], wordpiece_tokenizer()
        encoder = BiEncoder(module, tokenizer=tokenizer, pooling='mean', similarity='cosine')
        words = ['fox', 'dog', 'red', 'black', 'quick']
        cosines = encoder.score(['cat'] * 5, words)
        if encoder.encode('query', ['cat']).tolist() == encoder.encode('text', ['cat']).tolist():
            assert STMC1(encoder=encoder, words=words).terms('cat', '') == [words[int(np.argmax(cosines))]]
        axiom = STMC1(encoder=encoder, words=words)
        assert pickle.loads(pickle.dumps(axiom)).terms('cat', '') == axiom.terms('cat', '')

    @pytest.mark.parametrize('encoder', [None, 'minilm', BiEncoder])
    def test_no_encoder(self, encoder):
        with pytest.raises(TypeError, match='STMC1 needs an object with encode'):
            STMC1(encoder=encoder)

    def test_vectors_of_a_wrong_shape(self):
        class Bad:
            def encode(self, words):
                return np.zeros(3)

        with pytest.raises(ValueError, match='one row for each word'):
            STMC1(encoder=Bad())('cat', 'fox')


def test_tflnc_adds_what_is_there():
    assert TFLNC(k=2)('cat dog', 'a dog') == 'a dog dog dog'
    assert TFLNC()('cat dog', 'a fox') == 'a fox'


def test_lnc2_repeats():
    assert LNC2(k=3)('q', 'a b.') == 'a b. a b. a b.'
    with pytest.raises(ValueError, match='k=1: must be a whole number of at least 2'):
        LNC2(k=1)
    assert [LNC2().agrees(change) for change in (-1, 0, 1)] == [False, True, True]
    with pytest.raises(ValueError, match='Typos predicts no sign'):
        Typos().agrees(1)


def test_tfc2_compares_three_texts():
    assert TFC2()('cat', 'a') == 'a cat'
    assert TFC2(k=2).versions('cat', 'a') == ('a', 'a cat cat', 'a cat cat cat cat')
    assert sum(TFC2.weights) == 0


class TestPlain:
    def test_exact_texts(self):
        assert ChangeCase()('q', 'aB ß') == 'AB SS' and ChangeCase('lower')('q', 'aB') == 'ab'
        assert RemovePunctuation()('q', '(A) b-c, d!') == 'A b c d'
        assert RemovePunctuation()('q', 'as  it\nis') == 'as  it\nis'
        assert RemoveStopWords()('q', 'The box is in a box, a.') == 'box box,.'
        assert RemoveQueryTerm()('cat', 'A cat, the Cat and cats.') == 'A, the and cats.'
        assert RemoveQueryTerm()('cat', 'cat') == ''
        assert ReplaceQueryTerm(synonyms={'Cat': ['kitten']})('cat', 'Cat, cat and cats') == 'kitten, kitten and cats'
        assert ReplaceQueryTerm(synonyms={'fox': ['vixen']})('cat', 'fox') == 'fox'

    @pytest.mark.parametrize('shuffle', [ShuffleWords, ShuffleSentences])
    def test_shuffles_keep_the_parts_and_never_the_order(self, shuffle):
        texts = {shuffle(seed=seed)('q', 'One. Two. Three.') for seed in range(100)}
        assert len(texts) == 5 and 'One. Two. Three.' not in texts
        assert {tuple(sorted(text.split())) for text in texts} == {('One.', 'Three.', 'Two.')}
        assert shuffle()('q', 'One. Two.') == 'Two. One.'
        assert shuffle()('q', 'same') == 'same' and shuffle()('q', 'a. a.') == 'a. a.'

    def test_typos(self):
        made = {Typos(seed=seed)('q', 'The bread!') for seed in range(50)}
        assert made == {'The berad!', 'The braed!', 'The breda!'}
        assert Typos(k=9)('q', 'aaaa bbb') == 'aaaa bbb'
        wrong = Typos(k=2)('q', TEXT)
        assert sum(a != b for a, b in zip(wrong.split(), TEXT.split())) == 2 and sorted(wrong) == sorted(TEXT)

    @pytest.mark.parametrize('synonyms', [None, {}, {'a': 'b'}, {'a': []}, 'ab', 3, [('a',)]])
    def test_bad_synonyms(self, synonyms):
        with pytest.raises(ValueError, match='synonyms='):
            ReplaceQueryTerm(synonyms=synonyms)

    def test_synonyms_are_kept_as_they_were(self):
        given = {'cat': ['kitten']}
        edit = ReplaceQueryTerm(synonyms=given)
        given['cat'].append('tom')
        assert edit.synonyms == (('cat', ('kitten',)),) and eval(repr(edit)) == edit


def test_spans_are_the_words_of_the_tokeniser():
    for text in [*ODD, TEXT]:
        if len(text.lower()) == len(text):
            words = [text[span.start : span.end].lower() for span in inside.word_spans(text)]
            assert [inside.plain_words(word)[0] for word in words] == inside.plain_words(text)


def test_lnc1_control_is_another_word():
    text = 'red fox and black cat'
    assert LNC1().control('red', 'blue', text)[1] in {f'{text} {word}' for word in ('red', 'fox', 'black', 'cat')}
    made = RemoveQueryTerm().control('fox', 'blue', text)
    assert made[1] in {'fox and black cat', 'red fox and cat', 'red fox and black'}
