"""ColBERT and Splade: what folders state is applied as sentence-transformers applies it, or refused."""

import json

import late
import numpy as np
import pytest
import torch
from toys import QUERIES, TEXTS, real_pairs

from pyterrier_mech.rankers import BiEncoder, ColBERT, Splade

transformers = pytest.importorskip('sentence_transformers', minversion='6')
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')


def material(count):
    """Real pairs, some of them odd: without text, truncated, with a question mark, punctuation and a long query."""
    frame = real_pairs(count)
    queries = [query + '?' * (i % 5 == 0) for i, query in enumerate(frame['query'])]
    texts = [' '.join(text.split()[:50]) for text in frame['text']]
    texts[3], texts[7] = '', ' '.join(frame['text'].iloc[:9])
    queries[5], queries[6] = 'a !', ' '.join(queries[:9])
    return queries, texts


def assert_same(folder, count=12, **settings):
    """MaxSim of all tokens is a sum of 32 products: one part in a million of it, in float32."""
    queries, texts = material(count)
    theirs = transformers.MultiVectorEncoder(str(folder), device='cpu')
    encoded = [encode(part, show_progress_bar=False) for encode, part in zip(
        (theirs.encode_query, theirs.encode_document), (queries, texts), strict=True
    )]  # fmt: skip
    expected = theirs.similarity_pairwise(*encoded).numpy()
    model = ColBERT(str(folder), device='cpu', **settings)
    np.testing.assert_allclose(model.score(queries, texts), expected, atol=1e-5, rtol=2e-6)
    return model, encoded


def test_stanford_on_real_pairs(tmp_path):
    model, (queries, texts) = assert_same(late.stanford(tmp_path, doc_maxlen=180), 200)
    mine = model.encode('text', material(200)[1][:9])
    for a, b in zip(mine, texts[:9], strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=2e-6)
    assert {len(one) for one in queries} == {32} and len(model.encode('query', ['a'])[0]) == 32


@pytest.mark.parametrize(
    'metadata',
    [
        {'query_maxlen': 16, 'doc_maxlen': 40, 'mask_punctuation': False},
        {'attend_to_mask_tokens': True, 'query_token_id': '[unused5]', 'doc_token_id': '[unused6]', 'doc_maxlen': 90},
    ],
)
def test_what_stanford_states(tmp_path, metadata):
    assert_same(late.stanford(tmp_path, **metadata))


@pytest.mark.parametrize(
    'settings, dense',
    [
        ({}, {}),
        ({'do_query_expansion': False, 'document_length': 50, 'skiplist_words': ['the']}, {}),
        ({'attend_to_expansion_tokens': True, 'query_length': 20, 'prompts': {'query': 'find: '}}, {}),
        ({'skiplist_words': []}, {'activation_function': 'torch.nn.modules.activation.Tanh'}),
    ],
)
def test_pylate(tmp_path, settings, dense):
    assert_same(late.pylate(tmp_path, dense, **settings))


@pytest.mark.parametrize(
    'expansion',
    [{'strategy': 'min', 'attend': True, 'length': 8}, {'strategy': 'min', 'length': 20, 'token': '[unused9]'}, None],
)
def test_sentence_transformers_own_files(tmp_path, expansion):
    (tmp_path / 'pylate').mkdir()
    model = transformers.MultiVectorEncoder(str(late.pylate(tmp_path / 'pylate')), device='cpu')
    model[0].query_expansion, model.similarity_fn_name = expansion, 'meanmaxsim'
    model[0].query_length, model[2].skiplist_tasks = 30, ['query', 'document']
    model.save_pretrained(str(tmp_path / 'own'))
    assert_same(tmp_path / 'own')


def sparse(folder, pooling='max', activation='relu', prompts=None, **settings):
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    late.masked_lm().save_pretrained(folder / 'plain')
    late.tokenizer().save_pretrained(folder / 'plain')
    first = Transformer(str(folder / 'plain'), transformer_task='fill-mask', max_seq_length=96)
    modules = [first, SpladePooling(pooling, activation)]
    transformers.SparseEncoder(modules=modules, prompts=prompts, device='cpu', **settings).save_pretrained(
        str(folder / 'st')
    )
    return folder / 'st'


def assert_same_terms(folder, count=12):
    queries, texts = material(count)
    theirs = transformers.SparseEncoder(str(folder), device='cpu')
    query, text = (
        encode(part, show_progress_bar=False).to_dense()
        for encode, part in ((theirs.encode_query, queries), (theirs.encode_document, texts))
    )
    on = (query > 0).sum(1).float().mean()
    assert 10 < on < 1000  # else restricting the vocabulary says nothing
    model = Splade(str(folder), device='cpu')
    np.testing.assert_allclose(model.score(queries, texts), (query * text).sum(1), atol=1e-5, rtol=2e-6)
    np.testing.assert_allclose(model.encode('text', texts[:5]), text[:5], atol=1e-4)


def test_splade_on_real_pairs(tmp_path):
    assert_same_terms(sparse(tmp_path), 200)


@pytest.mark.parametrize(
    'settings', [('sum', 'relu'), ('max', 'log1p_relu', {'query': 'find: ', 'document': 'text: '})]
)
def test_what_a_sparse_encoder_states(tmp_path, settings):
    assert_same_terms(sparse(tmp_path, *settings))


def test_a_plain_masked_language_model_is_read_by_max(tmp_path):
    sparse(tmp_path)
    assert_same_terms(tmp_path / 'plain')


@pytest.mark.parametrize('family', ['bert', 'distilbert', 'electra', 'roberta', 'modernbert', 'mpnet'])
def test_weights_of_every_family_are_those_of_its_own_head(family):
    model = late.toy_splade(family)
    encoded = model.tokenizer(TEXTS, padding=True, return_tensors='pt')
    with torch.no_grad():
        logits = model.model(**encoded).logits * encoded['attention_mask'].unsqueeze(-1)
    expected = torch.log1p(torch.relu(logits)).amax(1)
    np.testing.assert_allclose(model.encode('text', TEXTS), expected, atol=1e-12)


@pytest.mark.parametrize('make', [late.toy_colbert, late.toy_splade])
def test_batches_and_company_do_not_matter(make):
    expected = [make().score([query], [text])[0] for query, text in zip(QUERIES, TEXTS, strict=True)]
    for tokens in (1, 40, 10_000):
        np.testing.assert_allclose(make(batch_tokens=tokens).score(QUERIES, TEXTS), expected, rtol=1e-12)
    crossed = make().score(QUERIES * 4, [text for text in TEXTS for _ in QUERIES]).reshape(4, 4)
    np.testing.assert_allclose(np.diag(crossed), expected, rtol=1e-12)


# -- what is refused


def test_what_stanford_states_and_is_not_done(tmp_path):
    with pytest.raises(ValueError, match="similarity .* must be 'cosine'; artifact.metadata states 'l2'"):
        ColBERT(str(late.stanford(tmp_path, similarity='l2'))).score(['a'], ['b'])


def test_folders_of_other_kinds_say_what_to_use(tmp_path):
    late.save_encoder(tmp_path)
    with pytest.raises(ValueError, match='is no ColBERT model'):
        ColBERT(str(tmp_path)).score(['a'], ['b'])
    with pytest.raises(ValueError, match='no weights for .*would be random.* no masked language model'):
        Splade(str(tmp_path)).score(['a'], ['b'])
    say = {'model_type': 'SparseEncoder'}
    (tmp_path / 'modules.json').write_text('[]')
    (tmp_path / 'config_sentence_transformers.json').write_text(json.dumps(say))
    with pytest.raises(ValueError, match='use Splade'):
        BiEncoder(str(tmp_path)).score(['a'], ['b'])
    with pytest.raises(ValueError, match='use Splade'):
        ColBERT(str(tmp_path)).score(['a'], ['b'])


def test_two_encoders_are_refused_by_name(tmp_path):
    late.save_encoder(tmp_path)
    modules = [{'idx': 0, 'name': '0', 'path': '', 'type': 'sentence_transformers.base.modules.router.Router'}]
    (tmp_path / 'modules.json').write_text(json.dumps(modules))
    (tmp_path / 'config_sentence_transformers.json').write_text(json.dumps({'model_type': 'SparseEncoder'}))
    with pytest.raises(ValueError, match='one encoder for queries and another for texts'):
        Splade(str(tmp_path)).score(['a'], ['b'])


def test_modules_without_what_is_needed_are_refused():
    bare = late.toy_colbert().model.base_model
    with pytest.raises(ValueError, match='no map to the vectors'):
        ColBERT(bare, tokenizer=late.tokenizer()).score(['a'], ['b'])
    with pytest.raises(ValueError, match='no head for masked tokens'):
        Splade(bare, tokenizer=late.tokenizer()).score(['a'], ['b'])
    with pytest.raises(ValueError, match="marker '\\[Q\\]' is no token"):
        late.toy_colbert(query_marker='[Q]').score(['a'], ['b'])
    with pytest.raises(ValueError, match='query_length must be'):
        late.toy_colbert(query_length=500).score(['a'], ['b'])
    with pytest.raises(ValueError, match='pooling must be one of'):
        late.toy_splade(pooling='mean').score(['a'], ['b'])


def test_settings_are_obeyed_when_they_are_changed_later():
    model = late.toy_colbert()
    before = model.score(QUERIES, TEXTS)
    model.query_length = 20
    changed = model.score(QUERIES, TEXTS)
    np.testing.assert_allclose(changed, late.toy_colbert(query_length=20).score(QUERIES, TEXTS), rtol=1e-12)
    assert np.abs(changed - before).min() > 1e-3 and model != late.toy_colbert()
    model.expand = False
    assert {len(one) for one in model.encode('query', QUERIES)} == {7}
    model.skip_punctuation = False
    assert len(model.encode('text', ['a . b'])[0]) == 6
