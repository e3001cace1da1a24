"""Which axioms a ranker keeps: against numbers by hand, for rankers whose answer is known."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from toys import toy_module, wordpiece_tokenizer

from pyterrier_mech import AxiomProfile, CrossEncoder
from pyterrier_mech.perturb import LNC1, LNC2, PROX, TFC1, TFC2, TFC3, ChangeCase, ShuffleWords, all_edits, perturbation

TOPICS = {'q1': 'cat dog', 'q2': 'red fox', 'q3': 'blue bird'}


def frame():
    """Nine pairs."""
    texts = ['a cat and a red bird sit', 'the dog saw the fox, the dog ran', 'one blue bird and one red fox']
    rows = [(qid, f'd{i}', query, text) for qid, query in TOPICS.items() for i, text in enumerate(texts)]
    return pd.DataFrame(rows, columns=['qid', 'docno', 'query', 'text'])


class Scorer(pt.Transformer):
    """Scores a row by a function of query and text; counts calls, and returns rows in another order."""

    def __init__(self, function):
        self.function = function
        self.given = []

    def transform(self, inp):
        self.given.append(inp)
        scores = [self.function(query, text) for query, text in zip(inp['query'], inp['text'])]
        return pt.model.add_ranks(inp.assign(score=scores)).sample(frac=1, random_state=0)

    def __repr__(self):
        return 'Scorer'


def frequency(query, text):
    """Square roots of term frequencies, less for long texts."""
    words = text.lower().replace(',', '').split()
    return sum(words.count(word) ** 0.5 for word in query.split()) - 0.001 * len(words)


@pytest.fixture(scope='module')
def profile():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return AxiomProfile.of(Scorer(frequency), frame(), all_edits(['cat dog fox bird red blue'], seed=2))


class TestNumbers:
    def test_a_lexical_ranker_keeps_what_it_must(self, profile):
        table = profile.to_frame().set_index('axiom')
        names = ['TFC1', "TFC1(location='replace')", 'TFC2', 'TDC', 'LNC1', 'RemoveQueryTerm', 'TFLNC']
        assert table.loc[names, 'kept'].tolist() == [1.0] * len(names)
        assert (table['n'] + table['n_unchanged'] == 9).all()
        assert table.loc['ChangeCase', ['change', 'change_low', 'change_high']].tolist() == [0, 0, 0]
        assert table['kept'].isna().equals(table['expected'].isna() | (table['n'] == 0))

    def test_every_number_by_hand(self):
        rows = frame().sample(frac=1, random_state=1)
        got = AxiomProfile.of(Scorer(frequency), rows, [TFC1(), TFC2()], n_resamples=50)
        own = frame().sort_values(['qid', 'docno'])
        pairs = got.pairs().sort_values(['axiom', 'qid', 'docno'])
        for axiom, weights in ((TFC1(), (-1, 1)), (TFC2(), (-1, 2, -1))):
            changes = [
                sum(w * frequency(query, version) for w, version in zip(weights, axiom.versions(query, text)))
                for query, text in zip(own['query'], own['text'])
            ]
            found = pairs[pairs['axiom'] == axiom.name]
            np.testing.assert_allclose(found['change'], changes, atol=1e-12)
            line = got.to_frame().set_index('axiom').loc[axiom.name]
            assert line['change'] == pytest.approx(np.mean(changes)) and line['n'] == 9 and line['n_queries'] == 3
            assert line['difference'] == pytest.approx((found['change'] - found['control']).mean())
            assert line['difference_low'] <= line['difference'] <= line['difference_high']
            means = [np.mean(changes[i : i + 3]) for i in (0, 3, 6)]
            assert min(means) <= line['change_low'] <= line['change_high'] <= max(means)
        # A foreign term changes nothing but the length.
        np.testing.assert_allclose(pairs[pairs['axiom'] == 'TFC1']['control'], -0.001, atol=1e-12)
        variances = own.assign(s=[frequency(q, t) for q, t in zip(own['query'], own['text'])]).groupby('qid')['s'].var()
        assert got.spread == pytest.approx(variances.mean() ** 0.5)

    def test_position_is_seen_by_who_reads_it(self):
        def nearness(query, text):
            words = text.replace(',', '').split()
            places = [words.index(word) if word in words else 99 for word in query.split()]
            return -abs(places[0] - places[1])

        texts = ['red a b fox c', 'a red c d e fox', 'fox a b c red d']
        rows = frame().head(3).assign(query='red fox', text=texts)
        with pytest.warns(UserWarning, match='one query'):
            table = AxiomProfile.of(Scorer(nearness), rows, [PROX()]).to_frame()
        assert table['kept'].tolist() == [1.0]

    def test_a_real_ranker_is_scored_as_it_scores(self):
        module = toy_module('bert')[0]
        ranker = CrossEncoder(module, tokenizer=wordpiece_tokenizer())
        pairs = AxiomProfile.of(ranker, frame(), [LNC2()]).pairs()
        texts = frame().sort_values(['qid', 'docno'])
        before = ranker.score(texts['query'].tolist(), texts['text'].tolist())
        after = ranker.score(texts['query'].tolist(), [f'{text} {text}' for text in texts['text']])
        np.testing.assert_allclose(pairs['change'], after - before, atol=1e-5)
        assert pairs['control'].isna().all()


class TestRanker:
    def test_one_call_and_nothing_but_queries_and_texts(self):
        scorer = Scorer(frequency)
        AxiomProfile.of(scorer, frame().assign(score=1.0, rank=0, text_0='x'), [TFC1(), ShuffleWords()])
        (given,) = scorer.given
        assert list(given.columns) == ['qid', 'query', 'docno', 'text']
        assert not given.duplicated(['qid', 'docno']).any() and not given.duplicated(['qid', 'text']).any()

    def test_rounding_is_no_change(self):
        noise = iter(np.tile([1, -1], 500) * 1e-7)
        got = AxiomProfile.of(Scorer(lambda query, text: 10 + next(noise)), frame(), [LNC1(), TFC1()])
        assert got.to_frame()['kept'].tolist() == [1.0, 0.0] and (got.pairs()['change'] == 0).all()

    @pytest.mark.parametrize(
        ('ranker', 'error', 'message'),
        [
            (pt.apply.generic(lambda res: res.assign(score=np.nan)), ValueError, 'no finite score'),
            (Scorer(frequency) >> pt.apply.generic(lambda res: res.head(2)), ValueError, 'without a cut-off'),
            (pt.apply.generic(lambda res: res), ValueError, "no column 'score'"),
            (frequency, TypeError, 'give a transformer'),
            (CrossEncoder, TypeError, 'give a transformer'),
        ],
    )
    def test_what_does_not_score(self, ranker, error, message):
        with pytest.raises(error, match=message):
            AxiomProfile.of(ranker, frame(), [TFC1()])


class TestInput:
    @pytest.mark.parametrize(
        ('change', 'message'),
        [
            (lambda rows: rows.drop(columns='text'), "the frame has no 'text'"),
            (lambda rows: rows.iloc[:0], 'no rows'),
            (lambda rows: pd.concat([rows, rows]), 'stands there twice'),
            (lambda rows: rows.assign(text=None), "no string in column 'text'"),
            (lambda rows: rows.assign(qid='q'), 'stands there twice'),
            (lambda rows: rows.assign(qid='q', docno=range(9)), 'several queries'),
        ],
    )
    def test_odd_frames(self, change, message):
        with pytest.raises(ValueError, match=message):
            AxiomProfile.of(Scorer(frequency), change(frame()), [TFC1()])

    @pytest.mark.parametrize(
        ('axioms', 'error', 'message'),
        [
            ([], ValueError, 'no axioms'),
            ([TFC1(), TFC1(seed=1)], ValueError, "two edits are called 'TFC1'"),
            ([TFC1], TypeError, 'is no edit'),
            ([lambda text, query: text], TypeError, 'query first'),
            ([lambda query, text: None], TypeError, 'returns a string'),
            ([lambda query, text: text[99]], RuntimeError, 'failed at qid='),
        ],
    )
    def test_odd_edits(self, axioms, error, message):
        with pytest.raises(error, match=message):
            AxiomProfile.of(Scorer(frequency), frame(), axioms)

    def test_functions_and_names(self):
        @perturbation
        def shout(text):
            return text.upper()

        with pytest.warns(UserWarning, match='same changed no text'):
            got = AxiomProfile.of(Scorer(frequency), frame(), {'loud': shout, 'same': lambda q, t: t, 'T': TFC1()})
        assert got.to_frame()[['axiom', 'n']].values.tolist() == [['loud', 9], ['same', 0], ['T', 9]]
        assert AxiomProfile.of(Scorer(frequency), frame(), TFC1()).to_frame()['axiom'].tolist() == ['TFC1']

    def test_one_query(self):
        with pytest.warns(UserWarning, match='one query'):
            table = AxiomProfile.of(Scorer(frequency), frame().head(3), [TFC1()]).to_frame()
        assert np.isnan(table['kept_low'][0]) and table['n_control'][0] == 0 and table['kept'][0] == 1

    def test_the_frame_stays_and_order_does_not_matter(self, profile):
        rows = frame()
        first = AxiomProfile.of(Scorer(frequency), rows, [TFC1(), TFC3()])
        pd.testing.assert_frame_equal(rows, frame())
        assert first == AxiomProfile.of(Scorer(frequency), rows.iloc[::-1], [TFC1(), TFC3()])


class TestCompared:
    def test_on_the_pairs_of_both(self):
        edits = [TFC1(), ChangeCase(), LNC1()]
        keeps = AxiomProfile.of(Scorer(frequency), frame(), edits)
        breaks = AxiomProfile.of(Scorer(lambda query, text: -frequency(query, text)), frame().head(6), edits)
        table = keeps.compare(breaks).set_index('axiom')
        assert table['n'].tolist() == [6, 6, 6]
        assert table.loc['TFC1', ['kept', 'kept_other', 'difference', 'same_sign']].tolist() == [1, 0, 1, 0]
        assert table.loc['ChangeCase', 'same_sign'] == 1 and np.isnan(table.loc['ChangeCase', 'kept'])

    def test_other_edits_of_the_same_name_are_not_compared(self):
        one, other = (AxiomProfile.of(Scorer(frequency), frame(), [ShuffleWords(seed=seed)]) for seed in (0, 1))
        with pytest.raises(ValueError, match='share no pair with the same edit'):
            one.compare(other)


def test_saved_and_read(profile, tmp_path):
    profile.save(tmp_path / 'profile')
    read = AxiomProfile.load(tmp_path / 'profile')
    assert read == profile and read.compare(profile)['difference'].dropna().abs().max() == 0
    assert repr(read).startswith('AxiomProfile(Scorer, 17 edits, 9 pairs, 3 queries, kept least')
