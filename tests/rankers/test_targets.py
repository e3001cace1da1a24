"""What a score is: a logit, a difference of two, or a probability; and everything that measures the score obeys."""

import pickle

import numpy as np
import pytest
import torch
from toys import PAIRS, effects_of, pairs, stacked, toy_cross_encoder, toy_module, training_frame

from pyterrier_mech import (
    AttributeHeads,
    AttributeNeurons,
    AttributeTokens,
    CrossEncoder,
    PatchedReranker,
    PatchHeads,
    PatchLayers,
    PrunedReranker,
)
from pyterrier_mech.prune import FineTuning, Movement, Random

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings('ignore:.*cannot be patched')]

Q, T = PAIRS


def ranker(target='logit', label=None, **settings):
    return toy_cross_encoder(target=target, label=label, num_labels=1 if label is None else 3, **settings)


@torch.no_grad()
def plain_logits(module, tokenizer, queries=Q, texts=T):
    """[pairs, labels], one pair at a time, by the module's own forward."""
    rows = [module(**tokenizer([q], [t], return_tensors='pt')).logits[0] for q, t in zip(queries, texts)]
    return torch.stack(rows)


@pytest.mark.parametrize('family', ['bert', 'roberta', 'distilbert', 'modernbert', 'deberta-v2'])
def test_scores_are_those_of_torch(family):
    one, three = plain_logits(*toy_module(family)), plain_logits(*toy_module(family, num_labels=3))
    expected = [
        ('probability', None, one[:, 0].sigmoid()),
        ('probability', 0, three.softmax(-1)[:, 0]),
        ('probability', 2, three.softmax(-1)[:, 2]),
        ('logit', (2, 0), three[:, 2] - three[:, 0]),
        ('logit', [0, 1], three[:, 0] - three[:, 1]),
    ]
    for target, label, values in expected:
        model = ranker(target, label, family=family)
        np.testing.assert_allclose(model.score(Q, T), values, atol=1e-12, rtol=0)
    assert (one[:, 0].sigmoid() != one[:, 0]).all()


def test_half_precision_is_raised_before_the_probability():
    module, tokenizer = toy_module('bert', dtype=torch.bfloat16)
    logits = CrossEncoder(module, tokenizer=tokenizer).score(Q, T)
    found = CrossEncoder(module, tokenizer=tokenizer, target='probability').score(Q, T)
    np.testing.assert_allclose(found, torch.from_numpy(logits).sigmoid(), atol=1e-7)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'target': 'sigmoid'}, r"target must be one of \('logit', 'probability'\); got target='sigmoid'"),
        ({'label': (0, 3)}, 'label must be a number from 0 to 2 .*; got 3'),
        ({'label': (1, 1)}, r'label must be one number, or two different ones .*got \(1, 1\)'),
        ({'label': (0, 1, 2)}, r'label must be one number, or two different ones .*got \(0, 1, 2\)'),
        ({'label': []}, r'label must be one number, or two different ones .*got \[\]'),
        ({'label': ('1', 0)}, "label must be a number from 0 to 2 .*; got '1'"),
        ({'label': True}, 'label must be a number from 0 to 2 .*; got True'),
        ({'label': [True, False]}, 'label must be a number from 0 to 2 .*; got True'),
        ({'label': '10'}, "label must be a number from 0 to 2 .*; got '10'"),
        ({'label': (1, 0), 'target': 'probability'}, "use label=1 with target='probability', or target='logit'"),
        ({'label': None, 'target': 'probability'}, 'has 3 labels: say which'),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    module, tokenizer = toy_module('bert', num_labels=3)
    model = CrossEncoder(module, tokenizer=tokenizer, **{'label': 1, **settings})
    with pytest.raises(ValueError, match=message):
        model.score(Q, T)
    if 'target=' in message and 'use' not in message:
        with pytest.raises(ValueError, match=message):
            CrossEncoder('nowhere/at-all', **settings)(pairs(1).iloc[:0])


def test_a_model_of_one_label_has_no_difference():
    with pytest.raises(ValueError, match='label must be a number from 0 to 0 .*; got 1'):
        toy_cross_encoder(label=(1, 0)).score(Q, T)


def test_it_is_part_of_what_a_ranker_is():
    plain, probability, difference = (
        CrossEncoder('some/name', **settings) for settings in ({}, {'target': 'probability'}, {'label': (2, 0)})
    )
    assert len({plain, probability, difference, CrossEncoder('some/name', label=(0, 2))}) == 4
    assert difference == CrossEncoder('some/name', label=[2, 0])
    assert repr(probability) == "CrossEncoder('some/name', target='probability')"
    for model in (probability, difference):
        assert eval(repr(model)) == model == pickle.loads(pickle.dumps(model))
        assert PatchHeads(model) != PatchHeads(plain)


def test_a_target_that_is_changed_later_is_obeyed():
    model = ranker()
    logits = torch.from_numpy(model.score(Q, T))
    model.set_parameter('target', 'probability')
    np.testing.assert_allclose(model.score(Q, T), logits.sigmoid(), atol=1e-12)


# -- patching


def sigmoid(values):
    return 1 / (1 + np.exp(-np.asarray(values, dtype=np.float64)))


@pytest.mark.parametrize('stage', [PatchHeads, PatchLayers])
def test_effects_are_changes_of_the_target(stage):
    frame = pairs(6)
    settings = [('logit', None), ('probability', None), ('logit', 2), ('logit', 0), ('logit', (2, 0))]
    plain, found, a, b, both = (stage(ranker(*one))(frame) for one in settings)
    names = [name for name in plain if name.startswith(('L', 'resid', 'attn', 'mlp'))]
    start = plain['score_original'].to_numpy()[:, None]
    expected = sigmoid(start + plain[names]) - sigmoid(start)
    np.testing.assert_allclose(found[names], expected, atol=1e-12)
    assert np.nanmax(np.abs(expected - plain[names])) > 1e-3
    np.testing.assert_allclose(found['score_perturbed'], sigmoid(plain['score_perturbed']), atol=1e-12)
    np.testing.assert_allclose(both[names], a[names] - b[names], atol=1e-12)


def test_a_patched_reranker_scores_the_target():
    units = ['L0H1', 'L1H3', 'L0N5']
    found = PatchedReranker(ranker('probability'), units)(pairs(6))['score']
    np.testing.assert_allclose(found, sigmoid(PatchedReranker(ranker(), units)(pairs(6))['score']), atol=1e-12)


# -- attributions


@pytest.mark.parametrize(('target', 'label'), [('probability', None), ('probability', 1), ('logit', (2, 0))])
def test_words_sum_to_the_change_of_the_target(target, label):
    frame = pairs(4)
    model = ranker(target, label)
    res = AttributeTokens(model, tolerance=1e-6, max_points=2000)(frame)
    pad = model.tokenizer.pad_token_id
    for row in res.itertuples():
        inputs = dict(model.tokenizer(row.query, row.text, return_tensors='pt', return_special_tokens_mask=True))
        special = inputs.pop('special_tokens_mask').bool()
        gone = {**inputs, 'input_ids': torch.where(special, inputs['input_ids'], pad)}
        with torch.no_grad():
            ends = [model.model(**one).logits[0] for one in (inputs, gone)]
        if target == 'logit':
            scores = [one[2] - one[0] for one in ends]
        else:
            scores = [one[0].sigmoid() if label is None else one.softmax(-1)[label] for one in ends]
        np.testing.assert_allclose(row.token_effects.sum(), scores[0] - scores[1], atol=1e-6)


def test_gradients_are_those_of_the_target():
    frame = pairs(4)
    plain, found = (AttributeHeads(ranker(target), 'gradient')(frame) for target in ('logit', 'probability'))
    share = sigmoid(plain['score_plain'])[:, None]
    np.testing.assert_allclose(effects_of(found), share * (1 - share) * effects_of(plain), atol=1e-12)
    for method in ('attribution_patching', 'relp'):
        one, other = (AttributeHeads(ranker(target), method)(frame) for target in ('logit', 'probability'))
        share = sigmoid(one['score_original'])[:, None]
        np.testing.assert_allclose(effects_of(other), share * (1 - share) * effects_of(one), atol=1e-12)


def test_neurons_of_a_difference_are_the_difference():
    a, b, both = (
        stacked(AttributeNeurons(ranker(label=label), max_points=9)(pairs(3)), 'neurons') for label in (2, 0, (2, 0))
    )
    np.testing.assert_allclose(both, a - b, atol=1e-12)


# -- pruning


@pytest.mark.parametrize(('target', 'label'), [('probability', None), ('logit', (2, 0))])
def test_a_pruned_ranker_keeps_its_target_in_a_folder(target, label, tmp_path):
    pruned = PrunedReranker(ranker(target, label), Random(), 0.3, recovery=(), multiple=8)
    pruned.fit(training_frame())
    pruned.save(tmp_path / 'pruned')
    loaded = PrunedReranker.load(tmp_path / 'pruned')
    assert (loaded.model_.target, loaded.model_.label) == (target, label)
    expected = pruned.model_.score(Q, T)
    np.testing.assert_allclose(loaded.model_.score(Q, T), expected, atol=1e-12)
    logits = plain_logits(pruned.model_.model, pruned.model_.tokenizer)
    np.testing.assert_allclose(
        expected, logits[:, 0].sigmoid() if label is None else logits[:, 2] - logits[:, 0], atol=1e-12
    )


@pytest.mark.parametrize('settings', [{'criterion': Movement()}, {'criterion': Random(), 'recovery': FineTuning()}])
def test_losses_on_logits_refuse_probabilities(settings):
    frame = training_frame()
    qrels = frame[['qid', 'docno']].assign(label=[1, 0] * 8)
    stage = PrunedReranker(ranker('probability'), sparsity=0.3, multiple=8, **settings)
    with pytest.raises(ValueError, match=r"(Movement|FineTuning) compares scores by a logistic loss.*target='logit'"):
        stage.fit(frame, qrels)
