"""PatchHeads against hooks on the unmodified module, one full forward a head."""

import copy
import functools
import logging

import inside
import numpy as np
import oracles
import pandas as pd
import pyterrier as pt
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from toys import (
    DESCRIBED,
    FAMILIES,
    TEXTS,
    effects_of,
    heads_of,
    pairs,
    real_cross_encoder,
    real_pairs,
    toy_bi_encoder,
    toy_cross_encoder,
    toy_module,
    unpatchable_pairs,
    with_heads,
)
from transformers import AutoModelForSequenceClassification

from pyterrier_mech import BiEncoder, CrossEncoder, HeadEffects, PatchHeads

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings('ignore:.*cannot be patched')]


def by_hooks(model, frame, *, reverse=False, filler='a'):
    """Effects [rows, heads] by one unpadded full forward a head; NaN where a pair is not patchable."""
    plain, names = oracles.plain(model), [f'L{i}H{h}' for i, h, _ in oracles.head_sites(model.model)]
    effects = []
    for row in frame.itertuples():
        sides = inside.sides(model, row, filler)
        if inside.problem_of(sides):
            effects.append(dict.fromkeys(names, np.nan))
        else:
            effects.append(oracles.patch_effects(plain, [side.runs(reverse) for side in sides]))
    return pd.DataFrame(effects)[names].to_numpy()


@functools.cache
def expected(family, pooling=None, reverse=False):
    """The oracle on `pairs()`, once for a ranker and a direction."""
    effects = by_hooks(ranker(family, pooling), pairs(), reverse=reverse)
    assert np.nanmax(np.abs(effects)) > 1e-3 and np.isfinite(effects).all(1).sum() > 10
    return effects


def ranker(family, pooling=None):
    return toy_bi_encoder(family, pooling) if pooling else toy_cross_encoder(family)


@pytest.mark.parametrize('family', FAMILIES)
def test_equals_the_oracle_in_every_family(family):
    for batch_tokens in (1, 300, 100_000):
        res = PatchHeads(ranker(family), batch_tokens=batch_tokens)(pairs())
        np.testing.assert_allclose(effects_of(res), expected(family), atol=1e-10, rtol=0)


@pytest.mark.parametrize('family', ['bert', 'modernbert', 'mpnet'])
def test_the_other_direction_equals_the_oracle(family):
    res = PatchHeads(ranker(family), direction='original_to_perturbed')(pairs())
    np.testing.assert_allclose(effects_of(res), expected(family, reverse=True), atol=1e-10, rtol=0)


@pytest.mark.parametrize('family', DESCRIBED)
@pytest.mark.parametrize('pooling', ['cls', 'mean'])
def test_bi_encoder_equals_the_oracle(family, pooling):
    res = PatchHeads(ranker(family, pooling))(pairs())
    np.testing.assert_allclose(effects_of(res), expected(family, pooling), atol=1e-10, rtol=0)


@pytest.mark.parametrize('pooling', [None, 'mean'])
def test_an_edited_query_is_patched_in_both_kinds_of_ranker(pooling):
    model, frame = ranker('bert', pooling), pairs(6).assign(query_0=lambda f: f['query'])
    frame = frame.assign(query=frame['query'] + ' rust', text=frame['text_0'], edited='query')
    alone = frame.drop(columns='text_0')
    both = frame.assign(text=frame['text'] + ' dough', edited='query text')
    for edited in (alone, both):
        res = PatchHeads(model)(edited)
        assert (res.patchable == 'yes').all() and np.abs(effects_of(res)).max() > 1e-3
        np.testing.assert_allclose(effects_of(res), by_hooks(model, edited), atol=1e-10, rtol=0)


def test_mask_filler_reads_the_plain_texts():
    frame = pairs()
    for model in (toy_cross_encoder('roberta'), toy_cross_encoder('bert')):
        res = PatchHeads(model, filler='mask', batch_tokens=10_000)(frame)
        for column, text in (('score_original', 'text_0'), ('score_perturbed', 'text')):
            np.testing.assert_allclose(res[column], model.score(list(frame['query']), list(frame[text])), atol=1e-12)
    alone = PatchHeads(model, filler='mask')(frame.iloc[4:5])
    np.testing.assert_allclose(effects_of(alone), effects_of(res)[4:5], atol=1e-12)


def test_mask_filler_numbers_positions_as_the_model_does():
    """RoBERTa does not count padding tokens; here the separator is one."""
    module, tokenizer = toy_module('roberta', pad_token_id=2)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    model, frame = CrossEncoder(module, tokenizer=tokenizer), pairs(8)
    res = PatchHeads(model, filler='mask')(frame)
    np.testing.assert_allclose(res['score_original'], model.score(frame['query'], frame['text_0']), atol=1e-12)


def test_a_hidden_token_is_not_read():
    module, tokenizer = toy_module('bert', classifier=False)
    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = TemplateProcessing(single='$A', pair='$A $B:1', special_tokens=[])
    model, frame = BiEncoder(module, tokenizer=bare, pooling='cls'), pairs(2)
    frame = frame.assign(text=['rust ' + frame.text_0[0], frame.text_0[1] + ' rust'])
    res = PatchHeads(model, filler='mask')(frame)
    assert list(res.patchable) == ['the first token, which is read, is hidden', 'yes']
    np.testing.assert_allclose(res.score_original, model.score(frame['query'], frame['text_0']), atol=1e-12)


def test_mask_filler_leaves_the_same_tokens_out_of_the_mean():
    """The space of the prompt joins the first word, which is left out, as in sentence-transformers."""
    model, frame = toy_bi_encoder('roberta'), pairs(8)
    model._carried = inside.Stated(text_prompt='dough ', pooling='mean', include_prompt=False)
    res = PatchHeads(model, filler='mask')(frame)
    np.testing.assert_allclose(res['score_original'], model.score(frame['query'], frame['text_0']), atol=1e-12)


@pytest.mark.parametrize('layer', [0, 1])
def test_layers_with_different_numbers_of_heads(layer):
    """A layer that lost a head is a smaller linear layer; the oracle runs on the same module."""
    model = with_heads(toy_cross_encoder('bert', fresh=True), layer, [1, 2, 3])
    res = PatchHeads(model)(pairs(1))
    assert heads_of(res) == [f'L{i}H{h}' for i in (0, 1) for h in range(3 if i == layer else 4)]
    np.testing.assert_allclose(effects_of(res), by_hooks(model, pairs(1)), atol=1e-10)


# -- identities


def test_identical_texts_have_no_effect_anywhere():
    model = toy_cross_encoder('bert')
    np.testing.assert_allclose(inside.forced_effects(model, TEXTS, [(0, 1), (1, 3)]), 0, atol=1e-13)


def test_patching_all_heads_of_the_first_layer_and_the_embeddings_is_the_other_run():
    """All head outputs of layer 0 swapped at once, plus the layer's input: the whole reaction, in one number."""
    model = toy_cross_encoder('bert', fresh=True)
    row = PatchHeads(model)(pairs(1)).iloc[0]
    (side,) = inside.sides(model, row)
    z = oracles.activations(model.model, side.perturbed)['heads', 0][None]
    layer = model.model.bert.encoder.layer[0]
    embedded = model.model.bert.embeddings(side.perturbed['input_ids'], side.perturbed['token_type_ids'])
    handles = [
        layer.register_forward_pre_hook(lambda _, args: (embedded, *args[1:])),
        layer.attention.output.dense.register_forward_pre_hook(lambda _, args: (z,)),
    ]
    with torch.no_grad():
        assert model.model(**side.original).logits.item() == pytest.approx(row.score_perturbed, abs=1e-12)
    for handle in handles:
        handle.remove()


def test_a_subset_of_heads_gives_the_same_numbers():
    model, frame = toy_cross_encoder('distilbert'), pairs(4)
    every = PatchHeads(model)(frame)
    some = PatchHeads(model, heads=['L1H3', (0, 2)])(frame)
    assert heads_of(some) == ['L0H2', 'L1H3']
    np.testing.assert_allclose(effects_of(some), every[heads_of(some)], atol=1e-13)
    assert heads_of(PatchHeads(model, heads=[])(frame)) == []


def test_normalised_effects_divide_by_the_change_in_the_direction_of_patching():
    model, frame = toy_cross_encoder('bert'), pairs(4)
    for direction, sign in (('perturbed_to_original', 1), ('original_to_perturbed', -1)):
        plain = PatchHeads(model, direction=direction)(frame)
        shares = PatchHeads(model, direction=direction, effect='normalized')(frame)
        change = sign * (plain.score_perturbed - plain.score_original)
        np.testing.assert_allclose(shares[heads_of(plain)], plain[heads_of(plain)].div(change, axis=0), atol=1e-12)


# -- the frame


def test_columns():
    frame = pairs(4)
    res = PatchHeads(toy_cross_encoder('bert'))(frame)
    new = [column for column in res.columns if column not in frame.columns]
    heads = [f'L{i}H{h}' for i in (0, 1) for h in range(4)]
    assert new == ['score_original', 'score_perturbed', 'patchable', *heads, 'analysis']


def test_inputs_and_outputs_are_those_of_the_documentation():
    stage = PatchHeads(toy_cross_encoder('bert'))
    inputs = ['qid', 'docno', 'query', 'text']
    assert pt.inspect.transformer_inputs(stage) == [[*inputs, 'text_0'], [*inputs, 'query_0']]
    outputs = pt.inspect.transformer_outputs(stage, [*inputs, 'text_0'])
    assert outputs[5:8] == ['score_original', 'score_perturbed', 'patchable'] and outputs[8] == 'L0H0'


def test_equality_and_repr_by_settings():
    model = CrossEncoder('some/name')
    stages = [PatchHeads(model), PatchHeads(model, filler='mask'), PatchHeads(model, effect='normalized')]
    stages += [PatchHeads(model, heads=('L0H1',), direction='original_to_perturbed')]
    assert len(set(stages)) == 4
    for stage in stages:
        assert eval(repr(stage)) == stage and hash(eval(repr(stage))) == hash(stage)


def test_unpatchable_rows_stay_marked_and_counted():
    model, frame = toy_cross_encoder('bert', max_length=24), unpatchable_pairs()
    with pytest.warns(UserWarning, match=r'3 of 4 pairs cannot be patched \(.*nothing changed: 1'):
        res = PatchHeads(model)(frame)
    assert list(res.patchable) == ['nothing changed', 'edit truncated away', 'no alignment', 'yes']
    assert np.isnan(effects_of(res)[:3]).all() and np.isfinite(effects_of(res)[3]).all()
    queries = list(frame['query'])
    np.testing.assert_allclose(res.score_original[:3], model.score(queries, list(frame.text_0))[:3], atol=1e-12)
    np.testing.assert_allclose(res.score_perturbed[:3], model.score(queries, list(frame.text))[:3], atol=1e-12)


def test_empty_texts_can_be_patched():
    res = PatchHeads(toy_cross_encoder('bert'))(pairs(2).assign(text_0=['', 'rust'], text=['bread', '']))
    assert list(res.patchable) == ['yes', 'yes'] and np.abs(effects_of(res)).max() > 1e-4


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'direction': 'up'}, "direction must be one of .*got (direction=)?'up'"),
        ({'effect': 'ratio'}, "effect must be one of .*got (effect=)?'ratio'"),
        ({'heads': ['head 3']}, 'does not name a head'),
    ],
)
def test_unknown_settings_name_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        PatchHeads(toy_cross_encoder('bert'), **settings)(pairs())


def test_families_without_a_fast_engine_say_so_once(caplog):
    inside.forget_what_was_told()
    model = toy_cross_encoder('mpnet')
    with caplog.at_level(logging.INFO, logger='pyterrier_mech'):
        for _ in range(2):
            PatchHeads(model)(pairs(2))
    assert caplog.text.count("no fast engine (the attention of 'mpnet'") == 1


def test_effects_say_how_they_were_made():
    model, frame = toy_cross_encoder('bert'), pairs(4).assign(qid=list('abcd'))
    frames = {d: PatchHeads(model, direction=d)(frame) for d in ('perturbed_to_original', 'original_to_perturbed')}
    for direction, res in frames.items():
        change = (res.score_perturbed - res.score_original).sum() * (1 if direction.startswith('p') else -1)
        ratios = HeadEffects.from_frame(res).to_frame().set_index('name')['ratio']
        np.testing.assert_allclose(ratios['L0H2'], res['L0H2'].sum() / change)
    with pytest.raises(ValueError, match='ratios already'):
        HeadEffects.from_frame(PatchHeads(model, effect='normalized')(frame))


# -- the real cross-encoder on real pairs


def on_real_pairs(model, module, frame, share):
    """Effects and those of the oracle, of every pair for one head in `share`, in turn; NaN for the others."""
    res = PatchHeads(model, batch_tokens=20_000)(frame)
    assert (res.patchable == 'yes').all() and len(heads_of(res)) == 72
    plain, by_oracle = oracles.Plain(module), np.full((len(frame), 72), np.nan)
    for place, row in enumerate(frame.itertuples()):
        chosen = range(place % share, 72, share)
        sides = [side.runs() for side in inside.sides(model, row)]
        found = oracles.patch_effects(plain, sides, [heads_of(res)[i] for i in chosen])
        by_oracle[place, list(chosen)] = list(found.values())
    return res, by_oracle


@pytest.mark.real
def test_real_cross_encoder_equals_the_oracle_on_real_pairs():
    """To 1e-5; where the oracle in float32 is itself further from float64 than that, by no more than it is."""
    model, frame = real_cross_encoder(), real_pairs(24)
    module = AutoModelForSequenceClassification.from_pretrained(model.model).eval()
    res, by_oracle = on_real_pairs(model, module, frame, 6)
    assert np.nanmax(np.abs(by_oracle)) > 0.1
    difference = np.abs(effects_of(res) - by_oracle)
    beyond = (difference > 1e-5).any(1)
    assert beyond.sum() <= 2
    if beyond.any():
        precise = effects_of(PatchHeads(real_cross_encoder(dtype='float64'))(frame[beyond]))
        assert not (difference[beyond] > 1e-5 + np.abs(by_oracle[beyond] - precise)).any()


@pytest.mark.real
def test_real_cross_encoder_equals_the_oracle_in_float64():
    model = real_cross_encoder(dtype='float64')
    module = AutoModelForSequenceClassification.from_pretrained(model.model).double().eval()
    res, by_oracle = on_real_pairs(model, module, real_pairs(3), 3)
    there = ~np.isnan(by_oracle)
    np.testing.assert_allclose(effects_of(res)[there], by_oracle[there], atol=1e-10, rtol=0)


def test_effects_of_two_modules_are_not_mixed():
    frame, models = pairs(4), [toy_cross_encoder(seed=seed) for seed in (0, 0, 1)]
    assert repr(models[0]) == repr(models[2])
    one, same, other = (PatchHeads(model, heads=['L0H0'])(frame) for model in models)
    assert HeadEffects.from_frame(pd.concat([one[:2], same[2:]])).n_rows == 4
    with pytest.raises(ValueError, match='2 different analyses'):
        HeadEffects.from_frame(pd.concat([one[:2], other[2:]]))
    with pytest.raises(ValueError, match='remove it'):
        HeadEffects.from_frame(PatchHeads(models[2], heads=['L1H1'])(one))
