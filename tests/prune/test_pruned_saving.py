"""Pruned rankers in folders and archives: loaded without the checkpoint, equal in weights, and as good as equal."""

import json
import pickle
import shutil

import inside
import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from toys import same_weights, toy_bi_encoder, toy_cross_encoder, training_frame, weights

from pyterrier_mech import BiEncoder, Circuit, CrossEncoder, PatchHeads, PrunedReranker
from pyterrier_mech.prune import Distillation, Plan, Rescaling

FRAME = training_frame()

TRAIN, OTHER = FRAME[FRAME['qid'] < 'q2'], FRAME[FRAME['qid'] >= 'q2']

KINDS = {
    'float32': lambda: toy_cross_encoder('bert', dtype=torch.float32),
    'float64': lambda: toy_cross_encoder('distilbert'),
    'label': lambda: toy_cross_encoder('electra', num_labels=3, label=2, max_length=30),
    'mean': lambda: toy_bi_encoder('bert', pooling='mean'),
    'cls': lambda: toy_bi_encoder('roberta', pooling='cls', similarity='dot'),
}


def fitted(model=None, **options):
    options = {'multiple': 8, 'recovery': (Rescaling(), Distillation(epochs=2)), **options}
    stage = PrunedReranker(model or KINDS['float32'](), **options)
    stage.fit(TRAIN, None, FRAME[FRAME['qid'] == 'q2'])
    return stage


def close(res, expected):
    """Equal frames; scores, up to the rounding of float32."""
    np.testing.assert_allclose(res['score'], expected['score'], atol=1e-5, rtol=0)
    pd.testing.assert_frame_equal(res.drop(columns='score'), expected.drop(columns='score'))
    assert res['score'].dtype == expected['score'].dtype


def module_of(stage):
    return weights(inside.module_of(stage.model_))


def refuse(*_, **__):
    raise AssertionError('there was work')


@pytest.mark.parametrize('kind', KINDS)
def test_loaded_weights_are_saved_ones_bit_for_bit(kind, tmp_path):
    stage = fitted(KINDS[kind]())
    assert stage.save(tmp_path / 'small') is stage and stage.path == tmp_path / 'small'
    expected = stage(OTHER)
    for loaded in (PrunedReranker.load(tmp_path / 'small'), pt.Artifact.load(str(tmp_path / 'small'))):
        assert type(loaded) is PrunedReranker and loaded.fitted and loaded.scores_ is None
        res = loaded(OTHER)
        close(res, expected)
        assert same_weights(module_of(loaded), module_of(stage))
        assert res.attrs == expected.attrs == {'pyterrier_mech.fitted_on': ['q0', 'q1', 'q2']}
        assert loaded.plan_ == stage.plan_ and loaded.plan_.settings == stage.plan_.settings
        assert loaded.qids_ == stage.qids_ == ['q0', 'q1', 'q2']
        pd.testing.assert_frame_equal(loaded.history_, stage.history_, check_dtype=False)
        assert type(loaded.model_) is type(stage.model_) and loaded.model_.head_counts == stage.model_.head_counts
        assert repr(loaded) == f'PrunedReranker.load({str(tmp_path / "small")!r})'
    assert [path.name for path in tmp_path.iterdir()] == ['small']


def test_the_ranker_alone_and_a_second_analysis(tmp_path):
    stage = fitted()
    stage.save(tmp_path / 'small')
    ranker = CrossEncoder(str(tmp_path / 'small' / 'ranker'), device='cpu')
    close(ranker(OTHER), stage(OTHER))
    pairs = OTHER.assign(text_0=OTHER['text'], text=OTHER['text'] + ' rust')
    ours, theirs = PatchHeads(ranker)(pairs), PatchHeads(stage.model_)(pairs)
    # The analysis names the ranker: one by its folder, the other by its module.
    for frame, name in ((ours, str(tmp_path)), (theirs, '<BertForSequenceClassification>')):
        notes = frame['analysis'].map(json.loads)
        assert notes.map(lambda note: name in note.pop('model')).all()
        frame['analysis'] = notes.map(json.dumps)
    pd.testing.assert_frame_equal(ours, theirs, rtol=0, atol=1e-5)
    bi = fitted(KINDS['mean']())
    bi.save(tmp_path / 'bi')
    again = BiEncoder(str(tmp_path / 'bi' / 'ranker'), dtype='float64', device='cpu')
    close(again(OTHER), bi(OTHER))


def test_a_saved_one_is_not_fitted_but_its_ranker_can_be_pruned_again(tmp_path):
    fitted(sparsity=0.2, text_field=None).save(tmp_path / 'small')
    loaded = PrunedReranker.load(str(tmp_path / 'small'))
    with pytest.raises(ValueError, match='is fitted already: to prune it again, give its model_'):
        loaded.fit(TRAIN)
    with pytest.raises(TypeError, match='the unpruned ranker is not saved'):
        loaded.compare(OTHER, OTHER[['qid', 'docno']].assign(label=1), ['ndcg_cut_10'])
    again = fitted(loaded.model_, sparsity=0.4)
    assert again.plan_.of_heads == tuple(map(len, loaded.plan_.heads))
    again.save(tmp_path / 'smaller')
    close(PrunedReranker.load(tmp_path / 'smaller')(OTHER), again(OTHER))


def test_text_field_and_circuit_are_saved(tmp_path):
    circuit = Circuit.from_units(['L0H1'], qids=['q9'])
    stage = PrunedReranker(KINDS['float32'](), text_field='body', protect=circuit, multiple=8)
    stage.fit(TRAIN.rename(columns={'text': 'body'}))
    stage.save(tmp_path / 'small')
    loaded = PrunedReranker.load(tmp_path / 'small')
    assert loaded.qids_ == ['q0', 'q1', 'q9']
    frame = OTHER.rename(columns={'text': 'body'})
    close(loaded(frame), stage(frame))


def test_what_may_be_replaced(tmp_path, monkeypatch):
    stage = fitted()
    stage.save(tmp_path / 'small')
    with pytest.raises(FileExistsError, match='pass overwrite=True'):
        stage.save(tmp_path / 'small')
    stage.save(tmp_path / 'small', overwrite=True)
    # It may even replace itself, with the weights that it has not loaded yet.
    PrunedReranker.load(tmp_path / 'small').save(tmp_path / 'small', overwrite=True)
    close(PrunedReranker.load(tmp_path / 'small')(OTHER), stage(OTHER))
    Circuit.from_units(['L0H1']).save(tmp_path / 'circuit')
    (tmp_path / 'thesis').mkdir()
    for other in ('circuit', 'thesis'):
        with pytest.raises(FileExistsError, match='holds no saved PrunedReranker, so it stays'):
            stage.save(tmp_path / other, overwrite=True)
        with pytest.raises(ValueError, match='holds no saved PrunedReranker'):
            PrunedReranker.load(tmp_path / other)
    with pytest.raises(FileNotFoundError, match=r'There is no .*nothing.*PrunedReranker.save\(path\)'):
        PrunedReranker.load(tmp_path / 'nothing')
    monkeypatch.setattr(Plan, 'save', refuse)
    before = sorted(path for path in tmp_path.rglob('*'))
    for path in ('new', 'small'):
        with pytest.raises(AssertionError):
            stage.save(tmp_path / path, overwrite=True)
    assert sorted(path for path in tmp_path.rglob('*')) == before


def test_a_new_fit_is_not_what_was_saved(tmp_path):
    stage = fitted()
    stage.save(tmp_path / 'small')
    stage.fit(TRAIN)
    assert stage.path is pt.Artifact.NO_PATH


def test_the_summary_can_be_read(tmp_path):
    stage = fitted()
    stage.save(tmp_path / 'small')
    meta = json.loads((tmp_path / 'small' / 'pt_meta.json').read_text())
    assert (meta['type'], meta['format'], meta['package_hint']) == ('pruned_reranker', 'mech', 'pyterrier-mech')
    assert meta['summary']['ranker'] == 'CrossEncoder' and meta['summary']['qids'] == ['q0', 'q1', 'q2']
    assert 'NaN' not in (tmp_path / 'small' / 'pt_meta.json').read_text()


@pytest.mark.parametrize('kind', ['float32', 'mean'])
def test_archive(kind, tmp_path, monkeypatch):
    monkeypatch.setenv('PYTERRIER_HOME', str(tmp_path / 'home'))
    stage = fitted(KINDS[kind]())
    stage.save(tmp_path / 'small')
    # In segments: PyTerrier unpacks a single local file from a server alone.
    archive = stage.build_package(max_file_size=200_000, verbose=False)
    shutil.rmtree(tmp_path / 'small')
    loaded = pt.Artifact.from_url(archive)
    close(loaded(OTHER), stage(OTHER))
    assert loaded.plan_ == stage.plan_


def test_pickle(tmp_path):
    stage = fitted()
    again = pickle.loads(pickle.dumps(stage))
    close(again(OTHER), stage(OTHER))
    assert again.plan_ == stage.plan_ and again.qids_ == stage.qids_ and repr(again) == repr(stage)
    stage.save(tmp_path / 'small')
    loaded = PrunedReranker.load(tmp_path / 'small')
    loaded(OTHER)
    data = pickle.dumps(loaded)
    assert len(data) < 100_000
    close(pickle.loads(data)(OTHER), stage(OTHER))
