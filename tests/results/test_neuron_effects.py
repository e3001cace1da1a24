from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from toys import QUERIES, TEXTS, toy_cross_encoder

from pyterrier_mech import AttributeNeurons, NeuronEffects, Units


def _frame(rows):
    """Rows of (qid, docno, completeness_error.neurons, neurons)."""
    frame = pd.DataFrame([(q, d, e) for q, d, e, _ in rows], columns=['qid', 'docno', 'completeness_error.neurons'])
    return frame.assign(neurons=[np.asarray(array, dtype=np.float32) for *_, array in rows])


def _qrels(**labels):
    rows = [(pair.split('_')[0], pair.split('_')[1], label) for pair, label in labels.items()]
    return pd.DataFrame(rows, columns=['qid', 'docno', 'label'])


@pytest.fixture
def by_hand():
    # Layer 1 has one neuron only.
    return _frame(
        [
            ('q1', 'd1', 0.01, [[1, 2], [3, math.nan]]),
            ('q1', 'd2', 0.04, [[3, 0], [1, math.nan]]),
            ('q2', 'd1', 0.02, [[0, 4], [1, math.nan]]),
            ('q2', 'd2', 0.03, [[2, 2], [-3, math.nan]]),
            ('q2', 'd3', 0.01, [[9, 9], [9, math.nan]]),
        ]
    )


@pytest.fixture
def qrels():
    return _qrels(q1_d1=1, q1_d2=3, q2_d1=0, q2_d2=0, q9_d9=1)


def _effects(values, **options):
    """Effects of one pair a label, of one layer: relevant ones are `values`, others 0."""
    frame = _frame([('q', 'a', 0.0, [values]), ('q', 'b', 0.0, [[0] * len(values)])])
    return NeuronEffects.from_frame(frame, _qrels(q_a=1, q_b=0), **options)


class TestNumbers:
    def test_means_of_labels(self, by_hand, qrels):
        effects = NeuronEffects.from_frame(by_hand, qrels, dataset='dl')
        table = effects.to_frame()
        assert list(table.columns) == ['layer', 'neuron', 'name', 'dl.relevant', 'dl.non_relevant']
        assert table.values.tolist() == [
            [0, 0, 'L0N0', 2, 1],
            [0, 1, 'L0N1', 1, 3],
            [1, 0, 'L1N0', 2, -1],
        ]
        np.testing.assert_array_equal(effects.mean(), [[1, -2], [3, math.nan]])
        np.testing.assert_array_equal(effects.mean('relevant'), [[2, 1], [2, math.nan]])

    def test_what_entered(self, by_hand, qrels):
        effects = NeuronEffects.from_frame(by_hand, qrels, dataset='dl')
        assert effects.schemes.to_dict('records') == [
            {
                'scheme': 'dl.relevant',
                'dataset': 'dl',
                'label': 'relevant',
                'n': 2,
                'n_queries': 1,
                'median_error': 0.025,
                'worst_error': 0.04,
            },
            {
                'scheme': 'dl.non_relevant',
                'dataset': 'dl',
                'label': 'non_relevant',
                'n': 2,
                'n_queries': 1,
                'median_error': 0.025,
                'worst_error': 0.03,
            },
        ]
        row = effects.datasets.iloc[0]
        assert row[['dataset', 'n_rows', 'n_unjudged', 'n_inexact', 'n_nan', 'n_duplicates', 'min_rel']].tolist() == [
            *['dl', 5, 1, 0, 0, 0, 1]
        ]
        assert math.isnan(row['max_error']) and effects.qids == ['q1', 'q2']

    def test_min_rel_and_unjudged(self, by_hand, qrels):
        effects = NeuronEffects.from_frame(by_hand, qrels, min_rel=3, unjudged=0)
        assert effects.schemes['n'].tolist() == [1, 4] and effects.datasets['n_unjudged'].tolist() == [0]
        assert effects.mean('relevant')[0].tolist() == [3, 0] and effects.mean('non_relevant')[0].tolist() == [3, 4.25]

    def test_inexact_and_broken_pairs_are_left_out_and_counted(self, by_hand, qrels):
        by_hand.at[0, 'neurons'] = np.array([[1, math.nan], [3, math.nan]])
        effects = NeuronEffects.from_frame(by_hand, qrels, max_error=0.025, unjudged=1)
        counts = effects.datasets.iloc[0]
        assert (counts['n_inexact'], counts['n_nan'], counts['max_error']) == (2, 1, 0.025)
        assert effects.schemes['n'].tolist() == [1, 1] and effects.schemes['worst_error'].tolist() == [0.01, 0.02]

    def test_order_of_rows_does_not_matter(self, by_hand, qrels):
        assert NeuronEffects.from_frame(by_hand[::-1], qrels) == NeuronEffects.from_frame(by_hand, qrels)

    def test_token_types(self, by_hand, qrels):
        frame = by_hand.rename(columns={'neurons': 'neurons.cls'})
        frame.at[1, 'neurons.cls'] = np.full((2, 2), math.nan)
        effects = NeuronEffects.from_frame(frame, qrels, column='neurons.cls')
        assert effects.datasets['n_nan'].tolist() == [1]
        np.testing.assert_array_equal(effects.mean('relevant'), [[1, 2], [3, math.nan]])

    def test_the_stage_itself(self):
        frame = pd.DataFrame(
            {'qid': ['0', '0', '1', '1'], 'docno': list('abcd'), 'query': [*QUERIES[:1] * 2, *QUERIES[1:2] * 2]}
        ).assign(text=TEXTS, score=0.0, rank=[0, 1, 0, 1])
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            res = AttributeNeurons(toy_cross_encoder('bert'), points=3, tolerance=1e9)(frame)
        labels = pd.DataFrame({'qid': ['0', '0', '1', '1'], 'docno': list('abcd'), 'label': [1, 0, 0, 1]})
        effects = NeuronEffects.from_frame(res, labels)
        a, b, c, d = res['neurons']
        np.testing.assert_allclose(effects.mean(), (a + d) / 2 - (b + c) / 2, atol=1e-12)


class TestSets:
    def test_top_and_bottom(self):
        effects = _effects([5, -9, 1, 0, 7, 2, 3, -1, 4, 6])
        assert effects.top(20) == Units.of(['L0N4', 'L0N9'])
        assert effects.bottom(20) == Units.of(['L0N1', 'L0N7'])
        assert effects.top(20, by='magnitude') == Units.of(['L0N1', 'L0N4'])
        assert effects.bottom(20, by='magnitude') == Units.of(['L0N3', 'L0N2'])
        assert effects.top(0.1) == Units.of('L0N4') and len(effects.top(100)) == 10

    def test_ties_go_to_the_first(self):
        assert _effects([1, 1, 1, 1]).top(50) == Units.of(['L0N0', 'L0N1'])
        assert _effects([1, 1, 1, 1]).bottom(50) == Units.of(['L0N0', 'L0N1'])

    def test_fusions_of_datasets(self):
        one, two = _effects([9, 8, 0, 1], dataset='one'), _effects([0, 8, 9, 7], dataset='two')
        both = NeuronEffects.join(one, two)
        assert both.top(50, fuse='intersection') == Units.of('L0N1')
        # Means are 4.5, 8, 4.5, 4.
        assert both.top(50, fuse='average') == Units.of(['L0N0', 'L0N1'])
        assert both.top(50, datasets=['two']) == two.top(50) == Units.of(['L0N1', 'L0N2'])
        assert both.top(50, datasets='two') == two.top(50)
        np.testing.assert_array_equal(both.mean(), [[4.5, 8, 4.5, 4]])
        overlaps = both.overlaps(50)
        assert overlaps.loc['one.relevant', 'two.relevant'] == 0.5
        assert (np.diag(overlaps) == 1).all() and len(overlaps) == 4
        assert both.schemes['dataset'].tolist() == ['one', 'one', 'two', 'two'] and len(both.datasets) == 2

    def test_relevance_is_the_difference(self):
        frame = _frame([('q', 'a', 0, [[3, 2, 1]]), ('q', 'b', 0, [[3, 0, 2]])])
        effects = NeuronEffects.from_frame(frame, _qrels(q_a=1, q_b=0))
        assert effects.top(33).names == ['L0N1'] and effects.top(33, 'relevant').names == ['L0N0']
        assert effects.bottom(33).names == ['L0N2'] and effects.bottom(33, 'non_relevant').names == ['L0N1']


class TestErrors:
    def test_columns(self, by_hand, qrels):
        with pytest.raises(
            ValueError, match="no 'neurons', 'completeness_error.neurons'. Pass the whole frame that an Attr"
        ):
            NeuronEffects.from_frame(by_hand[['qid', 'docno']], qrels)
        with pytest.raises(ValueError, match="frame of qrels has no 'label'"):
            NeuronEffects.from_frame(by_hand, qrels.drop(columns='label'))
        with pytest.raises(ValueError, match="no 'neurons.cls'"):
            NeuronEffects.from_frame(by_hand, qrels, column='neurons.cls')

    def test_rows(self, by_hand, qrels):
        with pytest.raises(ValueError, match='1 of 5 rows have no qid'):
            NeuronEffects.from_frame(by_hand.assign(qid=['q1', 'q1', 'q2', 'q2', None]), qrels)
        with pytest.raises(ValueError, match=r"No pair is left to average: {'n_rows': 5, 'n_unjudged': 5"):
            NeuronEffects.from_frame(by_hand, qrels.iloc[:0])
        with pytest.raises(ValueError, match='No pair is left'):
            NeuronEffects.from_frame(by_hand.iloc[:0], qrels)
        with pytest.raises(ValueError, match="qid='q1' docno='d1' two labels"):
            NeuronEffects.from_frame(by_hand, pd.concat([qrels, _qrels(q1_d1=2)]))
        by_hand.at[0, 'neurons'] = np.zeros((1, 2))
        with pytest.raises(ValueError, match=r'arrays of shapes \[\(1, 2\), \(2, 2\)\]'):
            NeuronEffects.from_frame(by_hand, qrels)

    @pytest.mark.parametrize('limit', [0, -1, math.nan])
    def test_max_error(self, by_hand, qrels, limit):
        with pytest.raises(ValueError, match='max_error='):
            NeuronEffects.from_frame(by_hand, qrels, max_error=limit)

    def test_a_label_without_pairs(self, by_hand, qrels):
        with pytest.warns(UserWarning, match='all.relevant has no pairs') as record:
            effects = NeuronEffects.from_frame(by_hand, qrels, min_rel=9)
        assert record[0].filename == __file__
        with pytest.raises(ValueError, match='all.relevant has no pairs: attribute pairs of both labels'):
            effects.top(1)
        assert len(effects.top(40, 'non_relevant')) == 1 and list(effects.overlaps(40)) == ['all.non_relevant']

    def test_duplicates(self, by_hand, qrels):
        with pytest.warns(UserWarning, match='1 rows repeat'):
            effects = NeuronEffects.from_frame(pd.concat([by_hand, by_hand.iloc[:1]]), qrels)
        assert effects.datasets['n_duplicates'].tolist() == [1] and effects.schemes['n'].tolist() == [3, 2]

    @pytest.mark.parametrize(
        ('settings', 'message'),
        [
            ({'p': 0}, 'p must be a percentage above 0.*got p=0'),
            ({'p': 101}, 'p=101'),
            ({'p': 1, 'scheme': 'good'}, "scheme must be one of .*got scheme='good'"),
            ({'p': 1, 'fuse': 'union'}, "fuse='union'"),
            ({'p': 1, 'by': 'size'}, "by='size'"),
            ({'p': 1, 'datasets': ['dl']}, r"datasets must be among \['all'\]; got datasets=\['dl'\]"),
            ({'p': 1, 'datasets': []}, r'datasets=\[\]'),
        ],
    )
    def test_sets(self, settings, message):
        with pytest.raises(ValueError, match=message):
            _effects([1, 2]).top(**settings)

    def test_join(self):
        with pytest.raises(ValueError, match="dataset='all' comes twice"):
            NeuronEffects.join(_effects([1]), _effects([1]))
        with pytest.raises(ValueError, match='have other neurons'):
            NeuronEffects.join(_effects([1]), _effects([1, 2], dataset='b'))
        with pytest.raises(ValueError, match='nothing to join'):
            NeuronEffects.join()


class TestSaving:
    def test_roundtrip(self, by_hand, qrels, tmp_path):
        effects = NeuronEffects.join(
            NeuronEffects.from_frame(by_hand, qrels, max_error=0.5),
            NeuronEffects.from_frame(by_hand, qrels, dataset='b'),
        )
        path = tmp_path / 'fold=1' / 'effects'
        assert effects.save(path) is effects and effects.path == path
        loaded = NeuronEffects.load(str(path))
        assert type(loaded) is NeuronEffects and loaded == effects and hash(loaded) == hash(effects)
        assert repr(loaded) == repr(effects) and loaded.qids == effects.qids
        pd.testing.assert_frame_equal(loaded.to_frame(), effects.to_frame(), check_exact=True)
        pd.testing.assert_frame_equal(loaded.schemes, effects.schemes, check_exact=True)
        pd.testing.assert_frame_equal(loaded.datasets, effects.datasets, check_exact=True)
        meta = json.loads((path / 'pt_meta.json').read_text())
        assert (meta['type'], meta['format'], meta['package_hint']) == ('neuron_effects', 'mech', 'pyterrier-mech')
        assert pt.inspect.artifact_type_format(NeuronEffects) == ('neuron_effects', 'mech')

    def test_load_by_entry_point(self, tmp_path):
        if not any(ep.name == 'neuron_effects.mech' for ep in pt.utils.entry_points('pyterrier.artifact')):
            pytest.skip('entry point neuron_effects.mech is not registered: the package is not installed')
        effects = _effects([1, 2]).save(tmp_path / 'e')
        assert pt.Artifact.load(str(tmp_path / 'e')) == effects

    def test_existing_and_missing_folders(self, tmp_path):
        effects = _effects([1, 2]).save(tmp_path / 'e')
        with pytest.raises(FileExistsError, match='already exists; pass overwrite=True'):
            effects.save(tmp_path / 'e')
        _effects([3, 4]).save(tmp_path / 'e', overwrite=True)
        assert NeuronEffects.load(tmp_path / 'e') != effects
        with pytest.raises(FileNotFoundError, match='NeuronEffects.from_frame'):
            NeuronEffects.load(tmp_path / 'nowhere')
        with pytest.raises(ValueError, match='Use NeuronEffects.from_frame'):
            NeuronEffects(pt.Artifact.NO_PATH)
        (tmp_path / 'thesis').mkdir()
        with pytest.raises(FileExistsError, match='holds no saved NeuronEffects, so it stays'):
            effects.save(tmp_path / 'thesis', overwrite=True)
        with pytest.raises(ValueError, match='holds no saved NeuronEffects'):
            NeuronEffects.load(tmp_path / 'thesis')

    def test_views_are_copies(self):
        effects = _effects([1, 2])
        for view in (effects.to_frame(), effects.schemes, effects.datasets):
            view.iloc[:, 0] = 'x' if view.iloc[:, 0].dtype.kind not in 'iu' else 7
        effects.mean()[:] = 7
        assert effects == _effects([1, 2]) and effects != 'effects'

    def test_repr(self, by_hand, qrels):
        text = repr(NeuronEffects.from_frame(by_hand, qrels, dataset='dl'))
        assert text == 'NeuronEffects(3 neurons, dl.relevant 2 pairs, dl.non_relevant 2 pairs, worst error 0.04)'
