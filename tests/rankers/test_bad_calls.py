"""Bad calls get a clear error, good ones of any kind of sequence are accepted."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from toys import QUERIES, TEXTS, frame_of, pairs, toy_bi_encoder, toy_cross_encoder, toy_module

from pyterrier_mech import AblateHeads, AttributeHeads, CrossEncoder, PatchHeads

pytestmark = pytest.mark.filterwarnings('ignore:.*cannot be patched')
RANKERS = [toy_cross_encoder, toy_bi_encoder]


@pytest.mark.parametrize('make', RANKERS)
@pytest.mark.parametrize('value', [None, float('nan'), 3, b'bytes'])
def test_a_value_that_is_not_a_string_is_named(make, value):
    with pytest.raises(TypeError, match='texts must be strings; got .* at position 1'):
        make().score(QUERIES[:3], [TEXTS[0], value, TEXTS[2]])
    with pytest.raises(TypeError, match='queries must be strings; got .* at position 0'):
        make().score([value, 'b'], TEXTS[:2])


def test_encode_names_them_too():
    with pytest.raises(TypeError, match='texts must be strings; got None at position 1'):
        toy_bi_encoder().encode('text', ['a', None])


@pytest.mark.parametrize('make', RANKERS)
@pytest.mark.parametrize(('queries', 'texts'), [(2, 1), (1, 2), (0, 1), (1, 0)])
def test_unequal_lengths(make, queries, texts):
    with pytest.raises(ValueError, match=f'got {queries} queries and {texts} texts'):
        make().score(QUERIES[:queries], TEXTS[:texts])


@pytest.mark.parametrize('make', RANKERS)
def test_one_string_is_not_a_list_of_letters(make):
    with pytest.raises(TypeError, match='must be a list of strings'):
        make().score('bread', 'bread')


@pytest.mark.parametrize('make', RANKERS)
@pytest.mark.parametrize('kind', [pd.Series, np.asarray, tuple, lambda x: pd.Series(x, index=[7, 7, 1, 0])])
def test_series_arrays_and_tuples(make, kind):
    model = make()
    np.testing.assert_allclose(model.score(kind(QUERIES), kind(TEXTS)), model.score(QUERIES, TEXTS))


def test_a_path_is_a_name(tmp_path):
    module, tokenizer = toy_module('bert')
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = CrossEncoder(Path(tmp_path), dtype='float64', device='cpu')
    expected = CrossEncoder(module, tokenizer=tokenizer).score(QUERIES, TEXTS)
    np.testing.assert_allclose(found.score(QUERIES, TEXTS), expected, atol=1e-10)
    assert found.n_heads(0) == 4


@pytest.mark.parametrize('model', ['bert-base', None, CrossEncoder, 3])
def test_a_model_that_is_not_a_ranker(model):
    with pytest.raises(TypeError, match='model must be a ranker'):
        PatchHeads(model)(pairs(2))


def test_columns_of_one_name():
    frame = pairs(2)
    twice = pd.concat([frame, frame[['text']]], axis=1)
    for stage in (toy_cross_encoder(), PatchHeads(toy_cross_encoder()), AblateHeads(toy_cross_encoder())):
        with pytest.raises(ValueError, match="2 columns called 'text'"):
            stage(twice)


@pytest.mark.parametrize('name', ['cross', 'patch', 'ablate'])
def test_scores_that_are_not_finite_name_the_model(name):
    module, tokenizer = toy_module('bert', fresh=True)
    with torch.no_grad():
        module.bert.encoder.layer[1].output.dense.weight[0, 0] = float('nan')
    model = CrossEncoder(module, tokenizer=tokenizer)
    stage = {'cross': model, 'patch': PatchHeads(model), 'ablate': AblateHeads(model)}[name]
    with pytest.raises(ValueError, match='not finite: CrossEncoder'):
        stage(pairs(3))


@pytest.mark.parametrize('label', ['1', 2, -1, 0.5])
def test_a_label_that_is_none_of_the_labels(label):
    module, tokenizer = toy_module('bert', num_labels=2)
    with pytest.raises(ValueError, match='label must be a number from 0 to 1'):
        CrossEncoder(module, tokenizer=tokenizer, label=label).score(QUERIES, TEXTS)


@pytest.mark.parametrize('around', [torch.inference_mode, torch.no_grad, lambda: torch.autocast('cpu')])
def test_what_the_caller_has_set_does_not_reach_in(around):
    model, frame = toy_cross_encoder(dtype=torch.float32), pairs(4)
    for stage in (PatchHeads(model), AttributeHeads(model), AttributeHeads(model, 'integrated_gradients')):
        expected = stage(frame)
        with around():
            found = stage(frame)
        np.testing.assert_allclose(found.L1H1, expected.L1H1, atol=1e-7)


def test_a_ranker_that_is_first_used_in_inference_mode(tmp_path):
    module, tokenizer = toy_module('bert')
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = CrossEncoder(str(tmp_path), device='cpu', dtype='float64')
    with torch.inference_mode():
        model.score(QUERIES, TEXTS)
    expected = AttributeHeads(CrossEncoder(module, tokenizer=tokenizer))(pairs(3))
    np.testing.assert_allclose(AttributeHeads(model)(pairs(3)).L1H1, expected.L1H1, atol=1e-10)


def test_a_configuration_that_returns_tuples():
    module, tokenizer = toy_module('bert', fresh=True)
    expected = PatchHeads(CrossEncoder(module, tokenizer=tokenizer))(pairs(3))
    module.config.return_dict = False
    found = PatchHeads(CrossEncoder(module, tokenizer=tokenizer))(pairs(3))
    np.testing.assert_allclose(found.L1H1, expected.L1H1, atol=1e-12)


def test_integrated_gradients_of_a_model_without_heads():
    from pyterrier_mech.prune import remove_units

    model = remove_units(toy_cross_encoder(), {'heads': [(layer, head) for layer in (0, 1) for head in range(4)]})
    for scale in (1.0, 1e-30):
        with torch.no_grad():
            model.map.module.classifier.weight *= scale
        res = AttributeHeads(model, 'integrated_gradients')(frame_of(3))
        assert np.isfinite(res['completeness_error.heads']).all()
