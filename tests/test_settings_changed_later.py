"""A setting that is changed after the first use is obeyed, as `set_parameter` and `pt.GridScan` change them."""

import numpy as np
import pyterrier as pt
import pytest
import torch
from toys import QUERIES, TEXTS, frame_of, pairs, reference, toy_cross_encoder, toy_module

from pyterrier_mech import AblatedReranker, AblateHeads, CrossEncoder, PatchedReranker, PatchHeads

pytestmark = pytest.mark.filterwarnings('ignore:.*cannot be patched')

CHANGES = {
    'units': ['L1H1', 'L0H2', 'L0N7'],
    'value': 'resample',
    'seed': 5,
    'reference': reference().iloc[:2],
    'model': toy_cross_encoder(seed=1),
}


@pytest.mark.parametrize('name', CHANGES)
def test_ablated_reranker(name):
    model, frame = toy_cross_encoder(), frame_of(8)
    settings = {'model': model, 'units': ['L0H0'], 'value': 'mean', 'reference': reference(), 'seed': 0}
    if name == 'seed':
        settings['value'] = 'resample'
    stage = AblatedReranker(**settings)
    before = stage(frame).score.to_numpy()
    stage.set_parameter(name, CHANGES[name])
    fresh = AblatedReranker(**{**settings, name: CHANGES[name]})
    assert stage == fresh and hash(stage) == hash(fresh)
    expected = fresh(frame).score.to_numpy()
    assert np.abs(before - expected).max() > 1e-6
    np.testing.assert_allclose(stage(frame).score, expected, atol=1e-12)


@pytest.mark.parametrize('name', ['heads', 'value', 'seed', 'reference'])
def test_ablate_heads(name):
    frame, settings = frame_of(4), {'heads': ['L0H0', 'L1H1'], 'value': 'mean', 'reference': reference(), 'seed': 0}
    if name == 'seed':
        settings['value'] = 'resample'
    changed = {**CHANGES, 'heads': ['L1H1', 'L1H2'], 'value': 'zero'}[name]
    stage = AblateHeads(toy_cross_encoder(), **settings)
    stage(frame)
    stage.set_parameter(name, changed)
    expected = AblateHeads(toy_cross_encoder(), **{**settings, name: changed})(frame)
    assert list(stage(frame).columns) == list(expected.columns)
    np.testing.assert_allclose(stage(frame).L1H1, expected.L1H1, atol=1e-12)


@pytest.mark.parametrize('change', ['weights', 'data', 'hook', 'another hook'])
def test_reference_values_follow_the_model(change):
    model, frame = toy_cross_encoder(fresh=True), frame_of(4)
    stage = AblatedReranker(model, ['L1H0', 'L1H1'], value='mean', reference=reference())
    value = model.model.bert.encoder.layer[1].attention.self.value
    first = value.register_forward_hook(lambda _, args, output: output * 2) if change == 'another hook' else None
    before = stage(frame).score.to_numpy()
    if first is not None:
        first.remove()
    if change == 'weights':
        with torch.no_grad():
            value.weight *= 3
    elif change == 'data':
        value.weight.data *= 3
    else:
        value.register_forward_hook(lambda _, args, output: output * 3)
    fresh = AblatedReranker(model, ['L1H0', 'L1H1'], value='mean', reference=reference())
    assert np.abs(fresh(frame).score - before).max() > 1e-6
    np.testing.assert_allclose(stage(frame).score, fresh(frame).score, atol=1e-12)


def test_max_length_tokenizer_and_label_of_a_ranker():
    module, tokenizer = toy_module('bert', num_labels=2)
    model = CrossEncoder(module, tokenizer=tokenizer, label=0)
    first = model.score(QUERIES, TEXTS)
    for name, value in (('max_length', 12), ('label', 1)):
        model.set_parameter(name, value)
        fresh = CrossEncoder(module, tokenizer=tokenizer, max_length=12, label=model.label)
        assert np.abs(model.score(QUERIES, TEXTS) - first).max() > 1e-6
        np.testing.assert_allclose(model.score(QUERIES, TEXTS), fresh.score(QUERIES, TEXTS), atol=1e-12)


def test_a_model_by_name_that_becomes_another(tmp_path):
    scores = []
    for seed in (0, 1):
        module, tokenizer = toy_module('bert', seed=seed)
        module.save_pretrained(tmp_path / str(seed))
        tokenizer.save_pretrained(tmp_path / str(seed))
        scores.append(CrossEncoder(module, tokenizer=tokenizer).score(QUERIES, TEXTS))
    model = CrossEncoder(str(tmp_path / '0'), dtype='float64', device='cpu')
    np.testing.assert_allclose(model.score(QUERIES, TEXTS), scores[0], atol=1e-10)
    model.set_parameter('model', str(tmp_path / '1'))
    np.testing.assert_allclose(model.score(QUERIES, TEXTS), scores[1], atol=1e-10)


def test_units_and_directions_of_patching():
    frame, model = pairs(4), toy_cross_encoder()
    patched, patching = PatchedReranker(model, ['L0H0']), PatchHeads(model, heads=['L0H0'])
    patched(frame), patching(frame)
    patched.set_parameter('units', ['L1H1', 'L0N3'])
    np.testing.assert_allclose(patched(frame).score, PatchedReranker(model, ['L1H1', 'L0N3'])(frame).score, atol=1e-12)
    patching.set_parameter('direction', 'original_to_perturbed')
    fresh = PatchHeads(model, heads=['L0H0'], direction='original_to_perturbed')
    np.testing.assert_allclose(patching(frame).L0H0, fresh(frame).L0H0, atol=1e-12)


def test_grid_scan_over_units_judges_each_set():
    frame, model = frame_of(16), toy_cross_encoder()
    sets = [['L0H0'], [f'L1H{h}' for h in range(4)], [f'L0N{n}' for n in range(48)]]
    stage = AblatedReranker(model, sets[0], value='mean', reference=reference())
    qrels = frame[['qid', 'docno']].assign(label=[int(text == TEXTS[1]) for text in frame.text])
    topics = frame.drop_duplicates('qid')[['qid', 'query']]
    first = pt.Transformer.from_df(frame)
    found = pt.GridScan(first >> stage, {stage: {'units': sets}}, topics, qrels, ['recip_rank'], verbose=False)
    scores = [AblatedReranker(model, units, value='mean', reference=reference())(frame) for units in sets]
    expected = [pt.Evaluate(one, qrels, ['recip_rank'])['recip_rank'] for one in scores]
    assert len({tuple(one['rank']) for one in scores}) > 1
    np.testing.assert_allclose(found['recip_rank'], expected)
