"""What `compare` refuses, and says, before it computes anything: scores, labels, judgements and measures."""

import warnings

import ir_measures
import pandas as pd
import pytest

from pyterrier_mech.stats import compare

QIDS, DOCNOS = ['1', '2', '3'], ['a', 'b', 'c']
PAIRS = [(qid, docno) for qid in QIDS for docno in DOCNOS]


def run_of(shift=0):
    return pd.DataFrame(PAIRS, columns=['qid', 'docno']).assign(score=[float((i * 7 + shift) % 5) for i in range(9)])


def qrels_of(labels=(1, 0, 0, 0, 1, 0, 2, 0, 1)):
    return pd.DataFrame(PAIRS, columns=['qid', 'docno']).assign(label=labels)


@pytest.mark.parametrize('score', ['1.5', 'high', None, float('nan'), float('inf')])
@pytest.mark.parametrize('side', ['the baseline', "run 'run'"])
def test_scores_that_are_no_finite_numbers(score, side):
    bad = run_of().astype({'score': object})
    bad.loc[4, 'score'] = score
    frames = (bad, run_of(1)) if side == 'the baseline' else (run_of(1), bad)
    with pytest.raises(ValueError, match=f"{side}: 1 of 9 scores are not finite, first qid='2' docno='b'"):
        compare(*frames, qrels_of(), ['map'])


def test_scores_in_a_column_of_objects_are_numbers():
    found = compare(run_of(), run_of(1).astype({'score': object}), qrels_of(), ['map'])
    pd.testing.assert_frame_equal(found.table, compare(run_of(), run_of(1), qrels_of(), ['map']).table)


def test_labels_that_a_merge_made_floats_are_whole_numbers():
    found = compare(run_of(), run_of(1), qrels_of().astype({'label': float}), ['map', 'ndcg_cut_2'])
    expected = compare(run_of(), run_of(1), qrels_of(), ['map', 'ndcg_cut_2'])
    pd.testing.assert_frame_equal(found.table, expected.table)


@pytest.mark.parametrize('label', [0.5, '1', 'relevant', float('inf'), None])
def test_other_labels_are_refused(label):
    bad = qrels_of().astype({'label': object})
    bad.loc[4, 'label'] = label
    with pytest.raises(ValueError, match="1 of 9 rows have no label.*first qid='2' docno='b'"):
        compare(run_of(), run_of(1), bad, ['map'])


def test_the_same_judgement_twice_counts_once_and_another_is_refused():
    expected = compare(run_of(), run_of(1), qrels_of(), ['map']).table
    same = pd.concat([qrels_of(), qrels_of().iloc[[0, 4]]])
    pd.testing.assert_frame_equal(compare(run_of(), run_of(1), same, ['map']).table, expected)
    other = pd.concat([qrels_of(), pd.DataFrame({'qid': ['2'], 'docno': ['b'], 'label': [0]})])
    for qrels in (other, other[::-1]):
        with pytest.raises(ValueError, match=r"the qrels give qid='2' docno='b' two labels.*drop_duplicates"):
            compare(run_of(), run_of(1), qrels, ['map'])


@pytest.mark.parametrize('side', ['the baseline', "run 'run'", 'both'])
def test_a_run_of_another_collection_is_warned_of(side):
    elsewhere = run_of(1).assign(docno=lambda frame: 'x' + frame['docno'])
    frames = {'the baseline': (elsewhere, run_of()), "run 'run'": (run_of(), elsewhere), 'both': (elsewhere, elsewhere)}
    with pytest.warns(UserWarning, match='none of the documents of .* is judged.*Give the qrels') as caught:
        compare(*frames[side], qrels_of(), ['map'])
    said = [str(one.message) for one in caught if 'is judged' in str(one.message)]
    assert len(said) == (2 if side == 'both' else 1)
    assert side == 'both' or side in said[0]


def test_no_warning_where_a_document_is_judged():
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        compare(run_of(), run_of(1), qrels_of().iloc[[0, 4]], ['map'])


@pytest.mark.parametrize('measure', [ir_measures.P, ir_measures.P @ 'a', 'ndgc@10', 7])
def test_measures_are_checked_before_frames_are_read(measure):
    # Frames that nothing can be read from: only the measures are looked at.
    with pytest.raises(ValueError, match='cannot be computed: it needs a parameter|is no known measure'):
        compare(None, None, None, ['map', measure])
