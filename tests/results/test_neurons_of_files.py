"""NeuronEffects of frames that went through files, and of judgements that contradict each other."""

import io

import numpy as np
import pandas as pd
import pytest

from pyterrier_mech.results import Circuit, NeuronEffects


def frame_of(dtype=np.float32):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({'qid': ['1', '1', '2', '2'], 'docno': list('abab'), 'completeness_error.neurons': 0.01})
    arrays = [rng.normal(size=(2, 3)).astype(dtype) for _ in range(4)]
    for array in arrays:
        array[1, 2] = np.nan
    return frame.assign(neurons=arrays)


def qrels_of(labels=(1, 0, 0, 1)):
    return pd.DataFrame({'qid': ['1', '1', '2', '2'], 'docno': list('abab'), 'label': labels})


def _parquet(frame):
    file = io.BytesIO()
    frame.assign(neurons=[list(array) for array in frame['neurons']]).to_parquet(file)
    return pd.read_parquet(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize(
    'stored',
    [
        _parquet,
        lambda frame: frame.assign(neurons=[array.tolist() for array in frame['neurons']]),
        lambda frame: frame.assign(neurons=[tuple(array) for array in frame['neurons']]),
        lambda frame: pd.DataFrame(frame.to_dict('records')),
    ],
)
def test_nested_lists_give_the_same_numbers(stored, dtype):
    assert NeuronEffects.from_frame(stored(frame_of(dtype)), qrels_of()) == NeuronEffects.from_frame(
        frame_of(dtype), qrels_of()
    )


@pytest.mark.parametrize('turned', [False, True])
def test_two_labels_of_a_document_are_refused_and_the_same_twice_is_one(turned):
    other = pd.concat([qrels_of(), pd.DataFrame({'qid': ['2'], 'docno': ['b'], 'label': [0]})])
    with pytest.raises(ValueError, match="qid='2' docno='b' two labels"):
        NeuronEffects.from_frame(frame_of(), other[::-1] if turned else other)
    # The same for judgements of subtopics: a neuron's pair has one label.
    with pytest.raises(ValueError, match='two labels'):
        NeuronEffects.from_frame(frame_of(), other.assign(iteration=list('00001')))
    same = pd.concat([qrels_of(), qrels_of()])
    assert NeuronEffects.from_frame(frame_of(), same) == NeuronEffects.from_frame(frame_of(), qrels_of())


@pytest.mark.parametrize('spell', [int, float])
def test_qids_are_text_on_both_sides(spell):
    expected = NeuronEffects.from_frame(frame_of(), qrels_of())
    frame, qrels = (one.assign(qid=one['qid'].map(spell)) for one in (frame_of(), qrels_of()))
    assert NeuronEffects.from_frame(frame, qrels_of()) == NeuronEffects.from_frame(frame_of(), qrels) == expected
    assert NeuronEffects.from_frame(frame, qrels).qids == ['1', '2']


def test_units_of_several_stacks_in_a_circuit():
    circuit = Circuit.from_units(['cross.L1H0', 'dec.L1H0', 'L0N3'], qids=[1.0, '2'])
    assert set(circuit.units.names) == {'L0N3', 'cross.L1H0', 'dec.L1H0'}
    assert circuit.heads['name'].tolist() == ['cross.L1H0', 'dec.L1H0'] and circuit.qids == ['1', '2']
    assert Circuit.of_tables(circuit.heads, circuit.neurons).units == circuit.units
    with pytest.raises(ValueError, match='cross.L1H0 comes twice'):
        Circuit.from_units(['cross.L1H0', 'cross.L1H0'])
    with pytest.raises(ValueError, match="'L0N3' stands among the heads"):
        Circuit.of_tables(circuit.neurons)
