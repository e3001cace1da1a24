"""Effects of paths, from columns and from arrays; notes of such columns; edges of circuits."""

import numpy as np
import pandas as pd
import pytest
from inside import Analysis

from pyterrier_mech import Circuit, HeadEffects, PathEffects, discover_circuit, read_frame, write_frame

SETTINGS = {'direction': 'perturbed_to_original', 'effect': 'difference', 'filler': 'a'}
# Score changes 1, 2, 1, 4.
PAIRS = pd.DataFrame(
    {'qid': list('abcd'), 'docno': 'd', 'score_original': 1.0, 'score_perturbed': [2.0, 3.0, 2.0, 5.0]}
)
SHARES = {'L0H0>score': 0.25, 'L0H1>score': 0.0, 'L1H1>score': -0.5, 'L0H0>L1H1.k': 0.125, 'L0H1>L1H1.q': 0.0625}
DELTA = (PAIRS['score_perturbed'] - PAIRS['score_original']).to_numpy()


def noted(frame, columns, by='PatchPaths', **settings):
    return frame.assign(analysis=str(Analysis(by, {**SETTINGS, **settings}, columns)))


def in_columns(**settings):
    return noted(PAIRS.assign(**{name: share * DELTA for name, share in SHARES.items()}), list(SHARES), **settings)


def in_arrays():
    senders = ['L0H0', 'L0H1', 'L1H0', 'L1H1']
    receivers = ['score', 'L1H1.k', 'L1H1.q']
    columns = {
        f'paths.{to}': [np.asarray([SHARES.get(f'{of}>{to}', 0.0) * d for of in senders], np.float32) for d in DELTA]
        for to in receivers
    }
    return noted(PAIRS.assign(**columns, path_senders=[senders] * 4), list(columns))


def ratios(effects):
    return effects.to_frame().set_index('name')['ratio'].to_dict()


def test_shares_and_order():
    effects = PathEffects.from_frame(in_columns())
    assert ratios(effects) == pytest.approx(SHARES)
    assert list(ratios(effects)) == ['L0H0>L1H1.k', 'L0H1>L1H1.q', 'L0H0>score', 'L0H1>score', 'L1H1>score']
    assert effects.receivers == ['L1H1.k', 'L1H1.q', 'score']
    np.testing.assert_allclose(effects.matrix(), [[0.25, 0.0], [np.nan, -0.5]])
    np.testing.assert_allclose(effects.matrix('L1H1.q'), [[np.nan, 0.0625]])
    assert effects.strongest(1)['name'].tolist() == ['L1H1>score']
    assert repr(effects).startswith('PathEffects(5 paths, 4 of 4 rows, 4 queries, strongest L1H1>score ratio -0.5')
    with pytest.raises(ValueError, match="receiver must be one of .*got receiver='L1H1'"):
        effects.matrix('L1H1')


def test_arrays_give_the_same_and_leave_out_paths_that_lead_nowhere(tmp_path):
    effects = PathEffects.from_frame(in_arrays())
    found = ratios(effects)
    assert {name: found[name] for name in SHARES} == pytest.approx(SHARES)
    assert list(found) == [
        *['L0H0>L1H1.k', 'L0H1>L1H1.k', 'L0H0>L1H1.q', 'L0H1>L1H1.q'],
        *['L0H0>score', 'L0H1>score', 'L1H0>score', 'L1H1>score'],
    ]
    write_frame(in_arrays(), tmp_path / 'paths.parquet')
    assert PathEffects.from_frame(read_frame(tmp_path / 'paths.parquet')) == effects
    in_arrays().to_parquet(tmp_path / 'pandas.parquet')
    assert PathEffects.from_frame(pd.read_parquet(tmp_path / 'pandas.parquet')) == effects
    effects.save(tmp_path / 'effects')
    assert PathEffects.load(tmp_path / 'effects') == effects


def test_other_direction():
    plain = PathEffects.from_frame(in_columns())
    other = PathEffects.from_frame(in_columns(direction='original_to_perturbed'))
    np.testing.assert_allclose(other.to_frame()['ratio'], -plain.to_frame()['ratio'])


def test_what_is_refused():
    frame = in_arrays()
    with pytest.raises(ValueError, match="no column 'path_senders'"):
        PathEffects.from_frame(frame.drop(columns='path_senders'))
    with pytest.raises(ValueError, match='2 different lists of path_senders'):
        PathEffects.from_frame(frame.assign(path_senders=[['L0H0', 'L0H1', 'L1H0', 'L1H1']] * 3 + [['L0H0']]))
    with pytest.raises(ValueError, match=r"'paths.score' has an array of shape .4,., and must have 3"):
        PathEffects.from_frame(frame.assign(path_senders=[['L0H0', 'L0H1', 'L1H0']] * 4))
    both = frame.assign(**{'L0H0>score': 1.0})
    with pytest.raises(ValueError, match='path L0H0>score has a column of its own and stands in an array'):
        PathEffects.from_frame(both)
    with pytest.raises(ValueError, match="no columns of paths such as 'L0H4>score'"):
        PathEffects.from_frame(noted(PAIRS.assign(L0H0=1.0), ['L0H0']))
    with pytest.raises(ValueError, match='needs columns of PatchPaths or AttributePaths; these are of PatchHeads'):
        PathEffects.from_frame(noted(in_columns(), list(SHARES), 'PatchHeads'))
    with pytest.raises(ValueError, match='None of the 0 rows is patchable'):
        PathEffects.from_frame(frame.iloc[:0])


@pytest.mark.parametrize(
    'columns',
    [
        [f'L{layer}H{head}>score' for layer in range(2) for head in range(12)],
        [f'L0H{head}>L2H{to}.{part}' for to in (9, 10) for part in 'qkv' for head in range(12)],
        [f'L0H{head}>L2H9.{part}' for head in range(3) for part in 'qk'],
        ['paths.score', 'paths.L2H9.k', 'paths.L2H10.k', 'paths.L2H9.q'],
        ['L2H9.inserted', 'L2H10.inserted', 'L2H9.k', 'resid_pre.L0.cls', 'resid_pre.L1.cls', 'attn_out.L3'],
        ['cross.L0H3>score', 'cross.L0H4>score', 'enc.L0H0>cross.L1H2.v'],
    ],
)
def test_notes_name_such_columns(columns):
    text = str(Analysis('PatchPaths', SETTINGS, columns))
    assert list(Analysis.parse(text).columns) == columns
    if len(columns) > 20:
        assert len(text) < 400


@pytest.mark.parametrize('by', ['text', 'array'])
def test_arrays_that_went_through_csv_are_refused(by):
    frame = in_arrays()
    frame = frame.assign(**{'paths.score': frame['paths.score'].map(str)})
    if by == 'text':
        frame = noted(PAIRS.assign(L0H0=frame['paths.score']), ['L0H0'], 'PatchHeads')
    with pytest.raises(ValueError, match='must hold numbers; got .*arrays do not survive CSV'):
        (HeadEffects if by == 'text' else PathEffects).from_frame(frame)


# -- edges of a circuit


def circuit(**options):
    heads = PAIRS.assign(L0H0=0.5 * DELTA, L0H1=0.1 * DELTA, L1H1=0.4 * DELTA)
    effects = HeadEffects.from_frame(noted(heads, ['L0H0', 'L0H1', 'L1H1'], 'PatchHeads'))
    return discover_circuit(effects, edges=PathEffects.from_frame(in_columns()), **options)


def test_edges_are_certain_paths_between_chosen_heads_strongest_first():
    assert circuit().edges['name'].tolist() == ['L1H1>score', 'L0H0>score', 'L0H0>L1H1.k', 'L0H1>L1H1.q']
    found = circuit(k=2)
    assert found.edges.to_dict('records')[0] == {
        'sender': 'L1H1', 'receiver': 'score', 'name': 'L1H1>score', 'effect': -0.5, 'effect_low': -0.5,
        'effect_high': -0.5,
    }  # fmt: skip
    assert found.edges['name'].tolist() == ['L1H1>score', 'L0H0>score', 'L0H0>L1H1.k']
    assert '3 edges' in repr(found) and found.settings['edges']['by'] == 'PatchPaths'
    assert found.top(1).edges['name'].tolist() == ['L0H0>score'] and not len(found.top(0).edges)
    with pytest.raises(TypeError, match='edges must be PathEffects.*got DataFrame'):
        discover_circuit(HeadEffects.from_frame(noted(PAIRS.assign(L0H0=DELTA), ['L0H0'], 'PatchHeads')), edges=PAIRS)


def test_a_circuit_is_of_one_ranker_and_says_what_of_its_heads_was_patched():
    keys = PAIRS.assign(**{'L0H0.k': 0.5 * DELTA, 'L1H1.k': 0.4 * DELTA})
    effects = HeadEffects.from_frame(noted(keys, ['L0H0.k', 'L1H1.k'], 'PatchHeads', model='one'))
    paths = {model: PathEffects.from_frame(in_columns(model=model)) for model in ('one', 'other')}
    found = discover_circuit(effects, edges=paths['one'])
    assert found.settings['site'] == 'k' and 'site' not in circuit().settings
    with pytest.raises(ValueError, match='the effects of heads are of one, but those of edges of other'):
        discover_circuit(effects, edges=paths['other'])


@pytest.mark.parametrize('source', ['text', 'file', 'path'])
def test_circuits_go_through_json_and_folders(source, tmp_path):
    whole = circuit()
    text = whole.to_json(tmp_path / 'circuit.json')
    given = {'text': text, 'file': tmp_path / 'circuit.json', 'path': str(tmp_path / 'circuit.json')}[source]
    assert Circuit.from_json(given) == whole == Circuit.from_json(Circuit.from_json(given).to_json())
    assert whole.save(tmp_path / 'c') == Circuit.load(tmp_path / 'c')
    some = Circuit.from_units(['L0H1', 'L1N3'], qids=['1'])
    assert Circuit.from_json(some.to_json()) == some


def test_bad_edges_and_bad_json(tmp_path):
    heads = pd.DataFrame({'name': ['L0H0', 'L1H1']})
    with pytest.raises(ValueError, match='L0H4>score has an end that is not among the heads'):
        Circuit.of_tables(heads, edges=pd.DataFrame({'name': ['L0H4>score']}))
    with pytest.raises(ValueError, match='L0H0>score comes twice'):
        Circuit.of_tables(heads, edges=pd.DataFrame({'name': ['L0H0>score'] * 2}))
    with pytest.raises(ValueError, match="'L0H0>L1H1' does not name a path"):
        Circuit.of_tables(heads, edges=pd.DataFrame({'name': ['L0H0>L1H1']}))
    with pytest.raises(ValueError, match="edges have no 'name'"):
        Circuit.of_tables(heads, edges=heads.rename(columns={'name': 'x'}))
    for text in ('{}', '{"heads": 3}', '{"heads": [', '{"heads": [1], "neurons": [], "edges": []}'):
        with pytest.raises(ValueError, match=r'Give what Circuit.to_json\(\) returned'):
            Circuit.from_json(text)
    with pytest.raises(FileNotFoundError):
        Circuit.from_json(tmp_path / 'none.json')
