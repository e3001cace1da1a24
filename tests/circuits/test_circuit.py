from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from toys import analysed, toy_cross_encoder

from pyterrier_mech import AblatedReranker, Circuit, HeadEffects, NeuronEffects, Units, discover_circuit


def _effects(values, **options):
    """Head effects whose ratio is the value with an interval of no width; four queries."""
    rows = [{'qid': q, 'docno': 'd', 'score_original': 1.0, 'score_perturbed': 3.0} for q in 'abcd']
    return HeadEffects.from_frame(
        analysed(pd.DataFrame([row | {name: 2 * value for name, value in values.items()} for row in rows])), **options
    )


def _neurons(values, **options):
    frame = pd.DataFrame({'qid': ['x', 'y'], 'docno': 'd', 'completeness_error.neurons': 0.0})
    frame['neurons'] = [np.asarray(values, dtype=float), np.zeros(np.shape(values))]
    qrels = pd.DataFrame({'qid': ['x', 'y'], 'docno': 'd', 'label': [1, 0]})
    return NeuronEffects.from_frame(frame, qrels, **options)


HEADS = {'L0H0': 0.1, 'L0H1': -0.5, 'L0H2': 0.0, 'L1H0': 0.3, 'L1H1': 0.2}


@pytest.fixture
def circuit():
    roles = pd.DataFrame(
        [(0, 1, 'matching'), (1, 0, 'query-focused'), (0, 0, 'mixed'), (1, 5, 'mixed')],
        columns=['layer', 'head', 'role'],
    )
    return discover_circuit(_effects(HEADS), roles=roles, neurons=_neurons([[5, 1, 2, 0], [0, 9, 0, 0]]), p=25)


class TestDiscovery:
    def test_heads_by_absolute_ratio_whose_interval_excludes_zero(self):
        effects = _effects(HEADS)
        found = discover_circuit(effects)
        assert found.heads['name'].tolist() == ['L0H1', 'L1H0', 'L1H1', 'L0H0']
        assert found.heads['effect'].tolist() == [-0.5, 0.3, 0.2, 0.1]
        assert found.heads['effect_low'].tolist() == found.heads['effect_high'].tolist() == [-0.5, 0.3, 0.2, 0.1]
        assert set(found.heads['role']) == {'unknown'} and not len(found.neurons)
        assert found.qids == ['a', 'b', 'c', 'd']
        assert found.settings == {
            'k': None,
            'share': None,
            'confidence': 0.95,
            'analysis': effects.analysis,
            'n_heads': 5,
            'n_certain': 4,
            'head_counts': [3, 2],
        }

    def test_how_many(self):
        effects = _effects(HEADS)
        assert discover_circuit(effects, k=2).heads['name'].tolist() == ['L0H1', 'L1H0']
        assert discover_circuit(effects, share=0.4).heads['name'].tolist() == ['L0H1', 'L1H0']
        assert discover_circuit(effects, share=0.01).settings['k'] == 1
        with pytest.warns(UserWarning, match='4 heads have an interval that excludes 0.*not 5') as record:
            assert len(discover_circuit(effects, k=5)) == 4
        assert record[0].filename == __file__

    def test_roles_and_neurons(self, circuit):
        assert circuit.heads['role'].tolist() == ['matching', 'query-focused', 'unknown', 'mixed']
        assert circuit.neurons.to_dict('records') == [
            {'layer': 1, 'neuron': 1, 'name': 'L1N1', 'effect': 9, 'role': 'relevance'},
            {'layer': 0, 'neuron': 0, 'name': 'L0N0', 'effect': 5, 'role': 'relevance'},
        ]
        assert circuit.qids == ['a', 'b', 'c', 'd', 'x', 'y']
        assert (circuit.settings['p'], circuit.settings['scheme'], circuit.settings['fuse']) == (
            25,
            'relevance',
            'average',
        )

    def test_an_intersection_may_be_empty(self):
        both = NeuronEffects.join(_neurons([[1, 0]]), _neurons([[0, 1]], dataset='b'))
        assert not len(discover_circuit(_effects(HEADS), neurons=both, p=50, fuse='intersection').neurons)

    @pytest.mark.parametrize(
        ('settings', 'message'),
        [
            ({'k': 1, 'share': 0.1}, 'k=1 and share=0.1 both say'),
            ({'k': 0}, 'k must be 1 or more; got k=0'),
            ({'share': 0}, 'share must be above 0.*got share=0'),
            ({'share': 1.5}, 'share=1.5'),
            ({'roles': pd.DataFrame({'layer': [0]})}, "roles= has no 'head', 'role'"),
        ],
    )
    def test_bad_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            discover_circuit(_effects(HEADS), **settings)

    def test_bad_effects(self):
        with pytest.raises(TypeError, match='effects must be HeadEffects, HeadEffects.from_frame.*got DataFrame'):
            discover_circuit(pd.DataFrame())
        with pytest.raises(TypeError, match='neurons must be NeuronEffects.*got DataFrame'):
            discover_circuit(_effects(HEADS), neurons=pd.DataFrame())
        with pytest.raises(ValueError, match=r'None of the 1 heads has an interval.*4 queries.*patch more topics'):
            discover_circuit(_effects({'L0H0': 0.0}))


class TestCircuit:
    def test_units(self, circuit):
        assert circuit.units == Units.of(['L0H0', 'L0H1', 'L1H0', 'L1H1', 'L0N0', 'L1N1'])
        assert Units.of(circuit) == circuit.units and len(circuit) == 6

    def test_an_intervention_takes_it(self):
        model = toy_cross_encoder('bert')
        circuit = Circuit.from_units(['L0H1', 'L1N3'])
        scores = [AblatedReranker(model, units).score(['rust'], ['Bread.'])[0] for units in (circuit, circuit.units)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-12)

    def test_parts_are_nested(self, circuit):
        assert [len(circuit.top(size).heads) for size in range(5)] == [0, 1, 2, 3, 4]
        assert [len(circuit.top(size).neurons) for size in range(5)] == [0, 0, 1, 2, 2]
        assert circuit.top(2).units == Units.of(['L0H1', 'L1H0', 'L1N1'])
        assert circuit.top(4) == circuit and circuit.top(1).qids == circuit.qids
        for size in (-1, 5):
            with pytest.raises(ValueError, match=f'size must be between 0 and 4.*got size={size}'):
                circuit.top(size)
        only = Circuit.from_units(['L0N3', 'L0N1', 'L1N0'])
        assert only.top(2).units == Units.of(['L0N3', 'L0N1'])

    def test_given_units(self):
        circuit = Circuit.from_units(['L1H0', (0, 3)], qids=[7, 'a'])
        assert circuit.heads['name'].tolist() == ['L1H0', 'L0H3'] and circuit.qids == ['7', 'a']
        assert circuit.heads[['effect', 'effect_low', 'effect_high']].isna().all(axis=None)
        assert Circuit.from_units(Units.of(['L1H0', 'L0H3'])).heads['name'].tolist() == ['L0H3', 'L1H0']
        assert len(Circuit.from_units([])) == 0
        with pytest.raises(ValueError, match='L1H0 comes twice'):
            Circuit.from_units(['L1H0', 'L1H0'])
        with pytest.raises(ValueError, match="heads have no 'head'"):
            Circuit.of_tables(pd.DataFrame({'layer': [0]}))

    def test_repr(self, circuit):
        assert repr(circuit) == (
            'Circuit(4 heads: L0H1 (matching), L1H0 (query-focused), L1H1, L0H0 (mixed); 2 neurons; found on 6 queries)'
        )
        assert repr(Circuit.from_units([])) == 'Circuit(0 heads; 0 neurons; found on 0 queries)'
        many = Circuit.from_units([(0, i) for i in range(6)])
        assert 'L0H4, …; 0 neurons' in repr(many)

    def test_equality(self, circuit):
        assert circuit != Circuit.from_units(circuit.units) and circuit != 'circuit'
        assert Circuit.from_units(['L0H0']) == Circuit.from_units(['L0H0'])
        assert Circuit.from_units(['L0H0']) != Circuit.from_units(['L0H0'], qids=['1'])
        assert hash(Circuit.from_units(['L0H0'])) == hash(Circuit.from_units(['L0H0']))
        table = circuit.heads
        table['role'] = 'x'
        assert 'x' not in circuit.heads['role'].tolist()


class TestSaving:
    @pytest.mark.parametrize('kind', ['found', 'heads', 'neurons', 'empty'])
    def test_roundtrip(self, circuit, kind, tmp_path):
        given = {'heads': ['L0H0'], 'neurons': ['L0N0'], 'empty': []}
        circuit = circuit if kind == 'found' else Circuit.from_units(given[kind])
        path = tmp_path / 'fold=1' / 'circuit'
        assert circuit.save(path) is circuit
        loaded = Circuit.load(str(path))
        assert type(loaded) is Circuit and loaded == circuit and hash(loaded) == hash(circuit)
        assert (repr(loaded), loaded.settings, loaded.qids) == (repr(circuit), circuit.settings, circuit.qids)
        pd.testing.assert_frame_equal(loaded.heads, circuit.heads, check_exact=True)
        pd.testing.assert_frame_equal(loaded.neurons, circuit.neurons, check_exact=True)

    def test_metadata_and_errors(self, circuit, tmp_path):
        circuit.save(tmp_path / 'c')
        meta = json.loads((tmp_path / 'c' / 'pt_meta.json').read_text())
        assert (meta['type'], meta['format']) == ('circuit', 'mech') == pt.inspect.artifact_type_format(Circuit)
        with pytest.raises(FileExistsError, match='already exists; pass overwrite=True'):
            circuit.save(tmp_path / 'c')
        with pytest.raises(ValueError, match="holds no saved HeadEffects .type='circuit'"):
            HeadEffects.load(tmp_path / 'c')
        _effects(HEADS).save(tmp_path / 'e')
        with pytest.raises(FileExistsError, match='holds no saved Circuit, so it stays'):
            circuit.save(tmp_path / 'e', overwrite=True)
        with pytest.raises(FileNotFoundError, match='discover_circuit'):
            Circuit.load(tmp_path / 'nowhere')
        with pytest.raises(ValueError, match='Use discover_circuit'):
            Circuit(pt.Artifact.NO_PATH)

    def test_load_by_entry_point(self, circuit, tmp_path):
        if not any(ep.name == 'circuit.mech' for ep in pt.utils.entry_points('pyterrier.artifact')):
            pytest.skip('entry point circuit.mech is not registered: the package is not installed')
        circuit.save(tmp_path / 'c')
        assert pt.Artifact.load(str(tmp_path / 'c')) == circuit
