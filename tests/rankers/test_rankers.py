"""Rankers give the scores of the plain Hugging Face module, whatever the batch."""

import logging
import pickle

import numpy as np
import pytest
import torch
from inside import Budget, budget_of, in_batches, max_length_of, tokenizer_of
from toys import (
    DESCRIBED,
    FAMILIES,
    PAIRS,
    TEXTS,
    frame_of,
    minilm_path,
    real_cross_encoder,
    tokenizer_for,
    toy_bi_encoder,
    toy_cross_encoder,
    toy_module,
)
from transformers import AutoModelForSequenceClassification, GPT2Config

from pyterrier_mech import BiEncoder, CrossEncoder

pytestmark = pytest.mark.numeric

Q, T = PAIRS


def plain_logits(module, tokenizer, queries, texts, **options):
    """One pair at a time, by the module's own forward."""
    with torch.no_grad():
        return np.array(
            [
                module(**tokenizer([q], [t], return_tensors='pt', **options)).logits[0, -1].item()
                for q, t in zip(queries, texts)
            ]
        )


@pytest.mark.parametrize('family', FAMILIES)
def test_cross_encoder_scores_are_the_modules_logits(family):
    expected = plain_logits(*toy_module(family), Q, T)
    assert np.ptp(expected) > 0.01
    for batch_tokens in (1, 150, 100_000):
        model = toy_cross_encoder(family, batch_tokens=batch_tokens)
        np.testing.assert_allclose(model.score(Q, T), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize('family', ['bert', 'roberta'])
def test_long_texts_are_truncated_as_the_tokenizer_does(family):
    model = toy_cross_encoder(family, max_length=16)
    expected = plain_logits(model.model, model.tokenizer, Q, T, truncation=True, max_length=16)
    np.testing.assert_allclose(model.score(Q, T), expected, atol=1e-12, rtol=0)


def test_segment_ids_matter():
    model = toy_cross_encoder('bert', fresh=True)
    before = model.score(Q, T)
    with torch.no_grad():
        model.model.bert.embeddings.token_type_embeddings.weight[1, ::2] += 1
    assert np.abs(model.score(Q, T) - before).min() > 1e-6


def test_a_model_that_is_not_there_gives_the_columns_of_an_empty_frame():
    res = CrossEncoder('nowhere/at-all')(frame_of(0).drop(columns=['score', 'rank']))
    assert list(res.columns) == ['qid', 'query', 'docno', 'text', 'score', 'rank'] and len(res) == 0


def test_a_stage_writes_the_scores():
    model, inp = toy_cross_encoder('bert'), frame_of(16)
    np.testing.assert_allclose(model(inp)['score'], model.score(list(inp['query']), list(inp['text'])), atol=1e-12)


def test_dropout_is_off(module):
    module.train()
    model = CrossEncoder(module, tokenizer=tokenizer_for('bert'))
    np.testing.assert_allclose(model.score(Q, T), toy_cross_encoder('bert').score(Q, T), atol=1e-12)


def test_empty_text_is_scored_as_the_module_scores_it():
    model = toy_cross_encoder('bert')
    assert model.score(['rust'], ['']) == pytest.approx(plain_logits(model.model, model.tokenizer, ['rust'], ['']))


def test_the_label_of_several_is_explicit():
    module, tokenizer = toy_module('bert', num_labels=3)
    with pytest.raises(ValueError, match='has 3 labels: say which'):
        CrossEncoder(module, tokenizer=tokenizer).score(Q, T)
    with pytest.raises(ValueError, match='label must be a number from 0 to 2'):
        CrossEncoder(module, tokenizer=tokenizer, label=3).score(Q, T)
    scores = CrossEncoder(module, tokenizer=tokenizer, label=2).score(Q, T)
    np.testing.assert_allclose(scores, plain_logits(module, tokenizer, Q, T), atol=1e-12)


def test_out_of_memory_halves_the_budget_and_resumes_at_the_failed_batch(caplog):
    model = toy_cross_encoder('bert', batch_tokens=400, fresh=True)
    expected = model.score(Q, T)
    rows_run, module = [], model.model

    def full(_, args, kwargs):
        if kwargs['input_ids'].numel() > 130:
            raise torch.OutOfMemoryError('device memory is full')
        rows_run.append(len(kwargs['input_ids']))

    handle = module.base_model.register_forward_pre_hook(full, with_kwargs=True)
    with caplog.at_level(logging.WARNING, logger='pyterrier_mech'):
        np.testing.assert_allclose(model.score(Q, T), expected, atol=1e-12)
    assert sum(rows_run) == 16, 'a finished batch was run again'
    assert budget_of(model) <= 130 and 'out of memory' in caplog.text
    caplog.clear()
    model.score(Q, T)
    assert 'out of memory' not in caplog.text, 'the smaller budget was not remembered'
    handle.remove()


def test_out_of_memory_on_one_row_is_an_error_with_a_way_out():
    def step(rows):
        raise torch.OutOfMemoryError('full.')

    with pytest.raises(torch.OutOfMemoryError, match='One row of 7 tokens does not fit: lower max_length'):
        list(in_batches(np.array([7, 3]), Budget(100), step))


def test_batches_hold_no_more_tokens_than_the_budget():
    lengths = np.array([5, 9, 2, 9, 4, 1])
    batches = [rows for rows, _ in in_batches(lengths, Budget(18), lambda rows: None)]
    assert sorted(np.concatenate(batches)) == list(range(6))
    assert all(len(rows) * lengths[rows].max() <= 18 for rows in batches)
    assert [list(rows) for rows in batches] == [[1, 3], [0, 4, 2], [5]]


def test_equality_hash_repr_and_pickle():
    path = minilm_path()
    one, same = BiEncoder(path, verbose=True), BiEncoder(path, batch_tokens=64)
    other = BiEncoder(path, similarity='dot')
    assert one == same and hash(one) == hash(same) and one != other
    assert one != CrossEncoder(path)
    assert repr(other) == f"BiEncoder({path!r}, similarity='dot')"
    assert eval(repr(other)) == other
    scores = one.score(Q[:3], T[:3])
    copy = pickle.loads(pickle.dumps(one))
    assert len(pickle.dumps(one)) < 10_000, 'the weights were pickled'
    np.testing.assert_allclose(copy.score(Q[:3], T[:3]), scores, atol=1e-6)


def test_handle_tells_layers_heads_and_neurons():
    model = toy_cross_encoder('distilbert')
    assert (model.n_layers, model.n_heads(1), model.n_neurons(0)) == (2, 4, 48)


# -- loading


def test_a_folder_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="no model at './not-here'"):
        CrossEncoder('./not-here').score(Q, T)


def test_a_checkpoint_without_a_classification_head_is_refused():
    with pytest.raises(ValueError, match='no weights for classifier.bias, classifier.weight.*use BiEncoder'):
        CrossEncoder(minilm_path()).score(Q, T)
    module, tokenizer = toy_module('bert', classifier=False)
    with pytest.raises(ValueError, match='BertModel has no classification head'):
        CrossEncoder(module, tokenizer=tokenizer).score(Q, T)


def test_an_unknown_family_is_named_with_the_way_out(tmp_path):
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="type 'gpt2' are unknown here.*register_family"):
        CrossEncoder(str(tmp_path)).score(Q, T)


def test_stored_half_precision_is_computed_in_float32(tmp_path):
    module, tokenizer = toy_module('bert', dtype=torch.bfloat16, fresh=True)
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = CrossEncoder(str(tmp_path), device='cpu')
    assert model.score(Q, T).dtype == np.float32
    expected = plain_logits(module.float(), tokenizer, Q, T)
    np.testing.assert_allclose(model.score(Q, T), expected, atol=1e-5)
    half = CrossEncoder(str(tmp_path), device='cpu', dtype='bfloat16').score(Q, T)
    assert half.dtype == np.float32 and 0 < np.abs(half - expected).max() < 0.3


def test_settings_that_make_no_sense_name_the_value():
    module, tokenizer = toy_module('bert')
    with pytest.raises(ValueError, match='max_length must be between 1 and the 80 positions'):
        CrossEncoder(module, tokenizer=tokenizer, max_length=900).score(Q, T)
    with pytest.raises(ValueError, match='a loaded module is used as it is'):
        CrossEncoder(module, tokenizer=tokenizer, dtype='float16').score(Q, T)
    with pytest.raises(ValueError, match="dtype='int8' is none of"):
        BiEncoder(minilm_path(), dtype='int8').score(Q, T)
    with pytest.raises(ValueError, match='batch_tokens=0'):
        CrossEncoder(module, tokenizer=tokenizer, batch_tokens=0).score(Q, T)
    with pytest.raises(ValueError, match='give its tokenizer='):
        CrossEncoder(module).score(Q, T)


def test_roberta_positions_start_behind_padding():
    model = toy_cross_encoder('roberta')
    assert max_length_of(model) == 80 - tokenizer_for('roberta').pad_token_id - 1


# -- bi-encoders


@pytest.mark.parametrize('family', DESCRIBED)
@pytest.mark.parametrize('pooling', ['cls', 'mean'])
@pytest.mark.parametrize('similarity', ['cosine', 'dot'])
def test_bi_encoder_pools_the_modules_hidden_states(family, pooling, similarity):
    model = toy_bi_encoder(family, pooling, similarity=similarity, batch_tokens=60)

    def vector(text):
        with torch.no_grad():
            hidden = model.model(**model.tokenizer(text, return_tensors='pt')).last_hidden_state[0]
        pooled = hidden[0] if pooling == 'cls' else hidden.mean(0)
        return pooled / pooled.norm() if similarity == 'cosine' else pooled

    expected = [(vector(q) @ vector(t)).item() for q, t in zip(Q, T)]
    np.testing.assert_allclose(model.score(Q, T), expected, atol=1e-12)


@pytest.mark.real
def test_bi_encoder_reads_pooling_and_similarity_from_sentence_transformers():
    sentence_transformers = pytest.importorskip('sentence_transformers')
    model = BiEncoder(minilm_path(), device='cpu')
    theirs = sentence_transformers.SentenceTransformer(minilm_path(), device='cpu')
    assert (model.stated_.pooling, model.stated_.similarity, max_length_of(model)) == ('mean', 'cosine', 256)
    long = TEXTS + ['bread ' * 400]
    np.testing.assert_allclose(
        model.encode('text', long) / np.linalg.norm(model.encode('text', long), axis=1, keepdims=True),
        theirs.encode(long, normalize_embeddings=True),
        atol=1e-6,
    )


def test_prefixes_are_read_by_the_model():
    plain, prefixed = (BiEncoder(minilm_path(), device='cpu', query_prefix=prefix) for prefix in ('', 'query: '))
    found, expected = prefixed.encode('query', ['rust']), plain.encode('query', ['query: rust'])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(prefixed.encode('text', ['rust']), plain.encode('text', ['rust']), atol=1e-6)


def test_bi_encoder_wants_a_known_pooling():
    module, tokenizer = toy_module('bert', classifier=False)
    with pytest.raises(ValueError, match='give pooling='):
        BiEncoder(module, tokenizer=tokenizer).score(Q, T)
    with pytest.raises(ValueError, match="pooling must be one of .*got (pooling=)?'max'"):
        BiEncoder(module, tokenizer=tokenizer, pooling='max').score(Q, T)
    with pytest.raises(ValueError, match="similarity must be one of .*got (similarity=)?'l2'"):
        BiEncoder(module, tokenizer=tokenizer, pooling='cls', similarity='l2').score(Q, T)


# -- the real cross-encoder


@pytest.mark.real
def test_real_cross_encoder_equals_the_plain_module():
    model = real_cross_encoder()
    module = AutoModelForSequenceClassification.from_pretrained(model.model).eval()
    expected = plain_logits(module, tokenizer_of(model), Q, T)
    np.testing.assert_allclose(model.score(Q, T), expected, atol=1e-5)
