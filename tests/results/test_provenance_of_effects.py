"""HeadEffects reads how effects were made from a column that survives files, and refuses what has no ratio."""

import io
import json
import pickle

import numpy as np
import pandas as pd
import pytest
from inside import Analysis, with_columns

from pyterrier_mech.results import HeadEffects

TO_ORIGINAL = {'model': 'm', 'direction': 'perturbed_to_original', 'effect': 'difference', 'filler': 'a'}
TO_PERTURBED = {**TO_ORIGINAL, 'direction': 'original_to_perturbed'}
PAIRED = {'model': 'm', 'direction': 'perturbed_to_original', 'filler': 'a', 'method': 'relp'}


def pairs(n=6):
    rng = np.random.default_rng(n)
    scores = {'score_original': rng.normal(size=n), 'score_perturbed': 3 + rng.normal(size=n)}
    return pd.DataFrame({'qid': [str(i) for i in range(n)], 'docno': 'd', **scores})


def wrote(frame, heads=('L0H0', 'L1H2'), settings=TO_ORIGINAL, by='PatchHeads', **more):
    """What a stage gives: its columns, its note."""
    columns = {name: np.arange(1.0, len(frame) + 1) + i for i, name in enumerate(heads)}
    return with_columns(frame, {**columns, **more}, Analysis(by, settings, list(heads)))


def ratios(frame):
    return HeadEffects.from_frame(frame).to_frame().set_index('name')['ratio']


# -- the direction, whatever becomes of the frame

JOURNEYS = {
    'CSV': lambda frame: pd.read_csv(io.StringIO(frame.to_csv(index=False)), dtype={'qid': str}),
    'list of dictionaries': lambda frame: pd.DataFrame(frame.to_dict('records')),
    'Parquet': lambda frame: _parquet(frame),
    'pickle': lambda frame: pickle.loads(pickle.dumps(frame)),
    'concatenation': lambda frame: pd.concat([frame.iloc[:2], frame.iloc[2:].set_axis(range(4))]),
    'merge': lambda frame: frame.merge(pd.DataFrame({'qid': frame['qid'], 'topic': 'x'}), on='qid'),
    'attrs lost': lambda frame: pd.DataFrame(dict(frame.items())),
    'columns turned round': lambda frame: frame[frame.columns[::-1]],
}


def _parquet(frame):
    file = io.BytesIO()
    frame.to_parquet(file)
    return pd.read_parquet(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize('journey', JOURNEYS)
@pytest.mark.parametrize(('settings', 'sign'), [(TO_ORIGINAL, 1), (TO_PERTURBED, -1)])
def test_the_sign_survives(journey, settings, sign):
    frame = wrote(pairs(), settings=settings)
    change = (frame['score_perturbed'] - frame['score_original']).sum()
    expected = [sign * frame[name].sum() / change for name in ('L0H0', 'L1H2')]
    np.testing.assert_allclose(ratios(JOURNEYS[journey](frame)), expected, rtol=1e-9)


@pytest.mark.parametrize('attrs', [{}, {'pyterrier_mech.patching': {'direction': 'original_to_perturbed'}}])
def test_without_the_column_the_sign_is_unknown(attrs):
    frame = wrote(pairs()).drop(columns='analysis')
    frame.attrs = attrs
    with pytest.raises(ValueError, match="no column 'analysis'.*their sign is unknown"):
        HeadEffects.from_frame(frame)


# -- what has no ratio

ONE_SCORE = {
    'AblateHeads': ('AblateHeads', {'model': 'm', 'value': 'zero'}, 'these are of AblateHeads'),
    'gradient': ('AttributeHeads', {'model': 'm', 'method': 'gradient'}, 'parts of one score.*PatchHeads'),
    'integrated gradients': (
        'AttributeHeads',
        {'method': 'integrated_gradients', 'direction': 'perturbed_to_original'},
        'parts of one score',
    ),
    'an unknown direction': ('PatchHeads', {'direction': 'sideways'}, 'parts of one score'),
    'normalised': ('PatchHeads', {**TO_ORIGINAL, 'effect': 'normalized'}, 'are normalized, ratios already'),
}


@pytest.mark.parametrize('case', ONE_SCORE)
@pytest.mark.parametrize('after', [False, True])
def test_effects_without_a_ratio_are_refused_by_name(case, after):
    by, settings, message = ONE_SCORE[case]
    frame = wrote(pairs()) if after else pairs()
    with pytest.raises(ValueError, match=message):
        HeadEffects.from_frame(wrote(frame, by=by, settings=settings))


MIXTURES = {
    'PatchHeads >> AblateHeads': lambda f: wrote(wrote(f), ['L1H2'], {'value': 'zero'}, 'AblateHeads'),
    'a head each way': lambda f: wrote(wrote(f, ['L0H0']), ['L1H2'], TO_PERTURBED),
    'a head each kind': lambda f: wrote(wrote(f, ['L0H0'], {**TO_ORIGINAL, 'effect': 'normalized'}), ['L1H2']),
    'patched and attributed': lambda f: wrote(wrote(f, ['L0H0']), ['L1H2'], PAIRED, 'AttributeHeads'),
    'two models': lambda f: wrote(wrote(f, ['L0H0']), ['L1H2'], {**TO_ORIGINAL, 'model': 'other'}),
    'a foreign column': lambda f: wrote(f).assign(L12H99=1.0),
    'half of the rows each way': lambda f: pd.concat([wrote(f).iloc[:3], wrote(f, settings=TO_PERTURBED).iloc[3:]]),
    'rows without a note': lambda f: pd.concat([wrote(f).iloc[:3], wrote(f).iloc[3:].drop(columns='analysis')]),
    'a note of something else': lambda f: wrote(f).assign(analysis='deep'),
}


@pytest.mark.parametrize('mixture', MIXTURES)
def test_mixtures_are_refused(mixture):
    message = 'different analyses|was not written by|these are of AblateHeads|must hold what an analysis'
    with pytest.raises(ValueError, match=message):
        HeadEffects.from_frame(MIXTURES[mixture](pairs()))


def test_parts_of_one_analysis_are_one_analysis():
    both = wrote(wrote(pairs(), ['L0H0']), ['L1H2'])
    assert ratios(both).index.tolist() == ['L0H0', 'L1H2']
    again = wrote(wrote(pairs(), ['L0H0', 'L1H2'], TO_PERTURBED), ['L0H0', 'L1H2'])
    pd.testing.assert_series_equal(ratios(again), ratios(wrote(pairs())))


# -- what is known of the effects afterwards


@pytest.mark.parametrize(('by', 'settings'), [('PatchHeads', TO_PERTURBED), ('AttributeHeads', PAIRED)])
def test_the_artifact_says_how_it_was_made(by, settings, tmp_path):
    effects = HeadEffects.from_frame(wrote(pairs(), by=by, settings=settings))
    assert effects.analysis == {'by': by, **settings}
    loaded = HeadEffects.load(effects.save(tmp_path / 'effects').path)
    assert loaded.analysis == effects.analysis and loaded == effects
    meta = json.loads((tmp_path / 'effects' / 'pt_meta.json').read_text())
    assert meta['summary']['analysis'] == {'by': by, **settings}
    assert effects != HeadEffects.from_frame(wrote(pairs(), settings={**TO_ORIGINAL, 'filler': 'mask'}))


@pytest.mark.parametrize('spell', [int, float, np.float64])
def test_qids_are_text(spell):
    frame = wrote(pairs())
    effects = HeadEffects.from_frame(frame.assign(qid=frame['qid'].map(spell)))
    assert effects.qids == ['0', '1', '2', '3', '4', '5'] and effects == HeadEffects.from_frame(frame)


def test_heads_of_several_stacks_stay_apart():
    effects = HeadEffects.from_frame(wrote(pairs(), ['cross.L0H1', 'dec.L0H1', 'dec.L1H0']))
    table = effects.to_frame()
    assert table['name'].tolist() == ['cross.L0H1', 'dec.L0H1', 'dec.L1H0']
    assert effects.matrix(stack='cross')[0, 1] == table['ratio'][0]
    assert effects.matrix(stack='dec').shape == (2, 2) and effects.matrix(stack='dec')[0, 1] == table['ratio'][1]
    with pytest.raises(ValueError, match=r"stack must be one of \['cross', 'dec'\]; got stack=''"):
        effects.matrix()
