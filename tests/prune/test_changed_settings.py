"""Settings are checked where they are given, and a pruned ranker never outlives those that it was made with."""

import pickle
from configparser import ConfigParser
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from toys import toy_cross_encoder, training_frame

from pyterrier_mech import CrossEncoder, PrunedReranker
from pyterrier_mech.prune import Fisher, Plan, Random, Rescaling

FRAME = training_frame()
TRAIN, OTHER = FRAME[FRAME['qid'] < 'q2'], FRAME[FRAME['qid'] >= 'q2']


def fitted(frame=TRAIN, criterion=None, **settings):
    stage = PrunedReranker(toy_cross_encoder(), criterion or Random(), **{'multiple': 8, 'recovery': (), **settings})
    stage.fit(frame)
    return stage


@pytest.mark.parametrize(
    'settings, message',
    [
        ({'criterion': 'fisher'}, r'criterion must be .* Fisher\(\) .*got \'fisher\''),
        ({'criterion': Fisher}, r'criterion must be an object with scores'),
        ({'recovery': 'rescaling'}, r'recovery must be .* Rescaling\(\)'),
        ({'recovery': (Rescaling(), Random())}, 'recovery must be'),
        ({'plan': {'heads': []}}, r'plan must be a Plan, such as Plan.load\(file\)'),
        ({'sparsity': 'half'}, "sparsity must be a number; got sparsity='half'"),
        ({'speedup': [2]}, 'speedup must be a number'),
    ],
)
def test_types_are_checked_when_the_stage_is_made_and_when_it_ranks(settings, message):
    with pytest.raises(TypeError, match=message):
        PrunedReranker(toy_cross_encoder(), **settings)
    stage = fitted()
    for name, value in settings.items():
        stage.set_parameter(name, value)
    with pytest.raises(TypeError, match=message):
        stage(OTHER)


def test_a_folder_is_loaded_not_pruned(tmp_path):
    stage = fitted()
    stage.save(tmp_path / 'small')
    with pytest.raises(TypeError, match=r'PrunedReranker.load\(folder\)'):
        PrunedReranker(tmp_path / 'small')
    with pytest.raises(TypeError, match='must be a ranker'):
        PrunedReranker(None)
    loaded = PrunedReranker.load(tmp_path / 'small')
    assert loaded == PrunedReranker.load(tmp_path / 'small') and hash(loaded) == hash(eval(repr(loaded)))
    assert repr(loaded) == f'PrunedReranker.load({str(tmp_path / "small")!r})' and loaded != stage
    np.testing.assert_allclose(loaded(OTHER)['score'], stage(OTHER)['score'], atol=1e-12)
    assert pickle.loads(pickle.dumps(loaded)) == loaded


def test_pyterrier_loads_what_the_entry_point_names(tmp_path):
    fitted().save(tmp_path / 'small')
    config = ConfigParser()
    config.read(Path(__file__).parents[2] / 'setup.cfg')
    lines = config['options.entry_points']['pyterrier.artifact'].strip().splitlines()
    (value,) = [line.split(' = ')[1] for line in lines if line.startswith('pruned_reranker.mech')]
    # What pt.Artifact.load does with it.
    load = EntryPoint('pruned_reranker.mech', value, 'pyterrier.artifact').load()
    loaded = load(str(tmp_path / 'small'))
    assert load == PrunedReranker.load and type(loaded) is PrunedReranker and loaded.fitted


@pytest.mark.parametrize(
    'name, value',
    [
        ('sparsity', 0.2),
        ('criterion', Random(seed=5)),
        ('budget', 'parameters'),
        ('protect', ['L0H1']),
        ('recovery', Rescaling()),
        ('model', toy_cross_encoder(seed=1)),
    ],
)
def test_a_setting_changed_after_fit_asks_for_another_fit(name, value):
    stage = fitted(sparsity=0.5)
    before = stage(OTHER)
    kept = getattr(stage, name)
    stage.set_parameter(name, value)
    assert not stage.fitted
    for work in (lambda: stage(OTHER), lambda: stage.save('nowhere')):
        with pytest.raises(ValueError, match='was fitted with other settings: call fit again'):
            work()
    stage.set_parameter(name, kept)
    pd.testing.assert_frame_equal(stage(OTHER), before)
    stage.set_parameter(name, value)
    stage.fit(TRAIN)
    assert stage.fitted and stage(OTHER)['score'].notna().all()


def test_a_ranker_changed_in_place_asks_for_another_fit_and_another_column_does_not():
    model = toy_cross_encoder(num_labels=3, label=1)
    stage = PrunedReranker(model, Random(), multiple=8, recovery=())
    stage.fit(TRAIN)
    before = stage(OTHER)
    stage.set_parameter('text_field', 'body')
    pd.testing.assert_frame_equal(
        stage(OTHER.rename(columns={'text': 'body'})), before.rename(columns={'text': 'body'})
    )
    stage.set_parameter('text_field', None)
    model.set_parameter('label', 2)
    with pytest.raises(ValueError, match='call fit again'):
        stage(OTHER)


def test_equal_by_settings_and_by_what_was_fitted():
    one = fitted()
    assert one == fitted() and hash(one) == hash(fitted()) and one != PrunedReranker(one.model, Random(), multiple=8)
    assert one != fitted(criterion=Random(1)) and pickle.loads(pickle.dumps(one)).fitted
    plan = Plan.removing(one.model, ['L0H1', 'L1N3'])
    settings = {'plan': plan, 'recovery': Rescaling()}
    first, second = (PrunedReranker(one.model, **settings) for _ in range(2))
    assert first == second
    first.fit(TRAIN)
    second.fit(OTHER)
    # One plan, other weights.
    assert first.plan_ == second.plan_ and first != second


def test_repr_rebuilds():
    stage = PrunedReranker(
        CrossEncoder('some/name'), Random(3), 0.4, protect=['L0H1'], recovery=(Rescaling(ridge=0.1),)
    )
    again = eval(repr(stage))
    assert again == stage and repr(again) == repr(stage)


def test_settings_of_numpy_are_saved(tmp_path):
    stage = fitted(sparsity=np.float32(0.5), multiple=np.int64(8), criterion=Random(np.int64(3)))
    stage.save(tmp_path / 'small')
    loaded = PrunedReranker.load(tmp_path / 'small')
    assert loaded.plan_.settings == stage.plan_.settings and loaded.plan_.settings['multiple'] == 8
    assert Plan.from_json(stage.plan_.to_json()) == stage.plan_
