"""Pruned rankers in folders: what is loaded is what was saved, without the checkpoint that it came from."""

import copy
import json
import pickle

import huggingface_hub
import numpy as np
import pytest
import torch
from inside import is_loaded, max_length_of, module_of, save_ranker, tokenizer_of
from safetensors.torch import load_file, save_file
from toys import (
    PAIRS,
    RESIZABLE,
    real_cross_encoder,
    toy_bi_encoder,
    toy_cross_encoder,
    toy_module,
)

from pyterrier_mech import BiEncoder, CrossEncoder
from pyterrier_mech.prune import prune_units, remove_units

HEADS, NEURONS = [[0, 2], []], [[], [1, 5, 40]]


def small(make, family='bert', **settings):
    return prune_units(make(family, **settings), HEADS, NEURONS)


def plain(module, tokenizer):
    encoded = tokenizer(*PAIRS, padding=True, return_tensors='pt')
    with torch.no_grad():
        return module(**encoded)[0]


def same_scores(a, b, atol=1e-12):
    np.testing.assert_allclose(a.score(*PAIRS), b.score(*PAIRS), atol=atol, rtol=0)


def change(folder, file, edit):
    values = json.loads((folder / file).read_text())
    edit(values)
    (folder / file).write_text(json.dumps(values))


# -- the same again


@pytest.mark.parametrize('family', RESIZABLE)
@pytest.mark.parametrize('make, cls', [(toy_cross_encoder, CrossEncoder), (toy_bi_encoder, BiEncoder)])
def test_loaded_weights_are_saved_ones_bit_for_bit(tmp_path, family, make, cls):
    model = small(make, family, max_length=40)
    assert save_ranker(model, tmp_path / 'deep' / 'small') == tmp_path / 'deep' / 'small'
    name = str(tmp_path / 'deep' / 'small')
    state, dtype = torch.random.get_rng_state(), torch.get_default_dtype()
    loaded = cls(name, dtype='float64', device='cpu')
    assert loaded.head_counts == [2, 0] and loaded.n_layers == 2 and not is_loaded(loaded)
    same_scores(loaded, model)
    assert torch.equal(state, torch.random.get_rng_state()) and torch.get_default_dtype() == dtype
    assert loaded.head_counts == [2, 0] and [loaded.n_neurons(layer) for layer in (0, 1)] == [0, 3]
    assert max_length_of(loaded) == 40
    module = module_of(loaded)
    assert not module.training and all(part.requires_grad for part in module.parameters())
    assert module.dtype == module.config.dtype == torch.float64
    for kind in ('named_parameters', 'named_buffers'):
        ours, theirs = (dict(getattr(one, kind)()) for one in (module, model.model))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert all(ours[key].dtype == theirs[key].dtype for key in ours)
    tokenizer = tokenizer_of(loaded)
    torch.testing.assert_close(plain(module, tokenizer), plain(model.model, tokenizer), atol=1e-12, rtol=0)
    again = pickle.loads(pickle.dumps(loaded))
    assert not is_loaded(again)
    same_scores(again, model)


def test_pruned_again_after_loading_and_saved_again(tmp_path):
    model = small(toy_cross_encoder)
    save_ranker(model, tmp_path / 'a')
    smaller = remove_units(CrossEncoder(str(tmp_path / 'a'), dtype='float64'), ['L0H1', 'L1N0'])
    save_ranker(smaller, tmp_path / 'b')
    loaded = CrossEncoder(str(tmp_path / 'b'), dtype='float64')
    assert loaded.head_counts == [1, 0]
    same_scores(loaded, smaller)
    same_scores(remove_units(model, ['L0H1', 'L1N0']), smaller)


@pytest.mark.parametrize('pooling, similarity', [('mean', 'dot'), ('cls', 'cosine')])
def test_a_bi_encoder_remembers_its_settings(tmp_path, pooling, similarity):
    module, tokenizer = toy_module('bert', classifier=False)
    settings = {'pooling': pooling, 'similarity': similarity, 'query_prefix': 'query: ', 'text_prefix': 'rise '}
    model = prune_units(BiEncoder(module, tokenizer=tokenizer, **settings), HEADS, NEURONS)
    save_ranker(model, tmp_path / 'a')
    loaded = BiEncoder(str(tmp_path / 'a'), dtype='float64')
    assert (loaded.stated_.pooling, loaded.stated_.similarity) == (pooling, similarity)
    assert (loaded.stated_.query_prompt, loaded.stated_.text_prompt) == ('query: ', 'rise ')
    same_scores(loaded, model)
    # Read off the files, then carried by the ranker around the smaller module.
    smaller = remove_units(loaded, ['L0H0'])
    stated = smaller.stated_
    assert (stated.pooling, stated.similarity, stated.query_prompt) == (pooling, similarity, 'query: ')
    same_scores(smaller, remove_units(model, ['L0H0']))


def test_a_bi_encoder_without_pooler_and_in_a_classifier(tmp_path):
    module, tokenizer = toy_module('bert')
    model = prune_units(BiEncoder(module, tokenizer=tokenizer, pooling='mean'), HEADS, NEURONS)
    save_ranker(model, tmp_path / 'a')
    same_scores(BiEncoder(str(tmp_path / 'a'), dtype='float64'), model)
    module = copy.deepcopy(module)
    module.base_model.pooler = None
    headless = prune_units(BiEncoder(module.base_model, tokenizer=tokenizer, pooling='mean'), HEADS, NEURONS)
    save_ranker(headless, tmp_path / 'b')
    same_scores(BiEncoder(str(tmp_path / 'b'), dtype='float64'), model)


def test_types(tmp_path):
    model = small(toy_cross_encoder)
    save_ranker(model, tmp_path / 'a')
    loaded = CrossEncoder(str(tmp_path / 'a'))
    assert loaded.score(*PAIRS).dtype == np.float32
    assert module_of(loaded).config.dtype == torch.float32
    np.testing.assert_allclose(loaded.score(*PAIRS), model.score(*PAIRS), atol=1e-5)
    half = CrossEncoder(str(tmp_path / 'a'), dtype='bfloat16')
    assert {part.dtype for part in module_of(half).parameters()} == {torch.bfloat16}
    halved = small(toy_cross_encoder, dtype=torch.bfloat16)
    save_ranker(halved, tmp_path / 'b')
    assert {part.dtype for part in load_file(tmp_path / 'b' / 'model.safetensors').values()} == {torch.bfloat16}
    loaded = CrossEncoder(str(tmp_path / 'b'), dtype='bfloat16')
    same_scores(loaded, halved, atol=0.02)


def test_a_repository_of_the_hub(tmp_path, monkeypatch):
    model = small(toy_bi_encoder)
    repository = tmp_path / 'models--somebody--small'
    save_ranker(model, repository / 'snapshots' / 'abc')
    (repository / 'refs').mkdir()
    (repository / 'refs' / 'main').write_text('abc')
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    loaded = BiEncoder('somebody/small', dtype='float64')
    assert loaded.head_counts == [2, 0]
    same_scores(loaded, model)


@pytest.mark.real
def test_the_real_cross_encoder(tmp_path):
    dense = real_cross_encoder()
    heads = [list(range(layer, 12, 2)) for layer in range(6)]
    neurons = [list(range(layer, 1536, 2)) for layer in range(6)]
    model = prune_units(dense, heads, neurons)
    save_ranker(model, tmp_path / 'small')
    count = sum(part.numel() for part in model.model.parameters())
    size = (tmp_path / 'small' / 'model.safetensors').stat().st_size
    assert 0 < size - 4 * count < 20_000
    loaded = CrossEncoder(str(tmp_path / 'small'), device='cpu')
    assert max_length_of(loaded) == max_length_of(dense)
    same_scores(loaded, model, atol=1e-5)


# -- what does not fit


@pytest.fixture
def folder(tmp_path):
    save_ranker(small(toy_cross_encoder), tmp_path / 'a')
    return tmp_path / 'a'


@pytest.mark.parametrize(
    'edit, message',
    [
        (lambda state: state.pop('classifier.bias'), r'it lacks classifier.bias \(1 in all\)'),
        (lambda state: state.update(more=torch.zeros(1)), r'it has, unexpectedly, more \(1 in all\)'),
        (
            lambda state: state.update({'bert.encoder.layer.0.output.dense.weight': torch.zeros(32, 1)}),
            r'in another size bert.encoder.layer.0.output.dense.weight \[32, 1\] for \[32, 0\]',
        ),
    ],
)
def test_weights_that_do_not_fit(folder, edit, message):
    state = load_file(folder / 'model.safetensors')
    edit(state)
    save_file(state, folder / 'model.safetensors')
    with pytest.raises(ValueError, match=message):
        CrossEncoder(str(folder)).score(*PAIRS)


@pytest.mark.parametrize(
    'edit, message',
    [
        (lambda saved: saved.pop('heads'), 'pruned.json of .* has no lists of whole numbers'),
        (lambda saved: saved.update(neurons=[0, -3]), 'pruned.json of .* has no lists of whole numbers'),
        (
            lambda saved: saved.update(heads=[2, 9]),
            'must have 2 layers of at most 4 heads',
        ),
        (lambda saved: saved.update(heads=[2]), 'must have 2 layers of at most 4 heads'),
        (lambda saved: saved.update(heads=[2, 1]), r'in another size .*\[0, 32\] for \[8, 32\]|\[0\] for \[8\]'),
    ],
)
def test_counts_that_do_not_fit(folder, edit, message):
    change(folder, 'pruned.json', edit)
    with pytest.raises(ValueError, match=message):
        CrossEncoder(str(folder)).score(*PAIRS)


def test_counts_that_are_no_object(folder):
    (folder / 'pruned.json').write_text('[1, 2]')
    with pytest.raises(ValueError, match='has no lists of whole numbers'):
        _ = CrossEncoder(str(folder)).head_counts


def test_missing_files(folder):
    (folder / 'model.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='has no model.safetensors'):
        CrossEncoder(str(folder)).score(*PAIRS)


def test_without_its_counts_a_pruned_folder_is_not_loaded(folder):
    (folder / 'pruned.json').unlink()
    with pytest.raises(RuntimeError, match='size'):
        CrossEncoder(str(folder)).score(*PAIRS)


def test_the_other_class(tmp_path, folder):
    with pytest.raises(ValueError, match='does not fit a BertModel .*the class that saved it'):
        BiEncoder(str(folder), pooling='cls').score(*PAIRS)
    save_ranker(small(toy_bi_encoder), tmp_path / 'b')
    with pytest.raises(ValueError, match='does not fit a BertForSequenceClassification .*the class that saved it'):
        CrossEncoder(str(tmp_path / 'b')).score(*PAIRS)


def test_nothing_is_written_over_and_nothing_else_is_saved(tmp_path, folder):
    before = (folder / 'model.safetensors').read_bytes()
    with pytest.raises(FileExistsError, match='is not empty'):
        save_ranker(small(toy_bi_encoder), folder)
    assert (folder / 'model.safetensors').read_bytes() == before
    with pytest.raises(ValueError, match="'modernbert' cannot be removed"):
        save_ranker(toy_cross_encoder('modernbert'), tmp_path / 'b')
    with pytest.raises(TypeError, match='must be a CrossEncoder'):
        save_ranker('a', tmp_path / 'b')
    assert not (tmp_path / 'b').exists()
