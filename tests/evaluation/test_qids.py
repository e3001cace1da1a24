"""Queries are compared as text: what chose a ranker is refused as its judge, whatever type a merge made of the qids."""

import numpy as np
import pandas as pd
import pytest

from pyterrier_mech.stats import compare

DOCNOS = ['d0', 'd1', 'd2']
SPELLINGS = {'text': str, 'int': int, 'float': float, 'numpy float': np.float64}


def run_of(seed, spell=str):
    rng = np.random.default_rng(seed)
    rows = [(spell(qid), docno, rng.normal()) for qid in range(1, 7) for docno in DOCNOS]
    return pd.DataFrame(rows, columns=['qid', 'docno', 'score'])


def qrels_of(spell=str):
    rows = [(spell(qid), docno, i % 2) for qid in range(1, 7) for i, docno in enumerate(DOCNOS)]
    return pd.DataFrame(rows, columns=['qid', 'docno', 'label'])


@pytest.mark.parametrize('run', SPELLINGS)
@pytest.mark.parametrize('fitted', SPELLINGS)
@pytest.mark.parametrize('where', ['fitted_on', 'attrs', 'topics'])
def test_seen_queries_are_refused_in_every_spelling(run, fitted, where):
    baseline, other = run_of(0, SPELLINGS[run]), run_of(1, SPELLINGS[run])
    seen = [SPELLINGS[fitted](3)]
    given = {'fitted_on': seen} if where == 'fitted_on' else {}
    if where == 'topics':
        given = {'fitted_on': pd.DataFrame({'qid': seen, 'query': 'x'})}
    if where == 'attrs':
        other.attrs['pyterrier_mech.fitted_on'] = seen
    with pytest.raises(ValueError, match=r"1 of the queries that would judge.*qids '3'"):
        compare(baseline, other, qrels_of(), ['map'], **given)


@pytest.mark.parametrize('spell', [*SPELLINGS.values(), np.float32])
def test_the_numbers_are_those_of_text(spell):
    expected = compare(run_of(0), run_of(1), qrels_of(), ['map', 'ndcg_cut_2'])
    for runs, judge in ((spell, str), (str, spell), (spell, spell)):
        found = compare(run_of(0, runs), run_of(1), qrels_of(judge), ['map', 'ndcg_cut_2'])
        pd.testing.assert_frame_equal(found.table, expected.table)
        pd.testing.assert_frame_equal(found.scores, expected.scores)
        pd.testing.assert_frame_equal(found.per_query, expected.per_query)


@pytest.mark.parametrize('column', ['qid', 'docno'])
@pytest.mark.parametrize('nothing', [None, float('nan'), pd.NA])
@pytest.mark.parametrize('side', ['the baseline', 'run', 'qrels'])
def test_a_row_of_no_query_is_refused(column, nothing, side):
    frames = {'the baseline': run_of(0), 'run': run_of(1), 'qrels': qrels_of()}
    bad = frames[side].astype({column: object})
    bad.loc[4, column] = nothing
    frames[side] = bad
    with pytest.raises(ValueError, match=rf'{side}.*1 of 18 rows have no {column}, the first is row 4.*dropna'):
        compare(*frames.values(), ['map'])
