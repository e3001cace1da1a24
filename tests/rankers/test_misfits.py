"""Tokenizers, weights and modules that do not fit are refused, and the error says what to give."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import QUERIES, TEXTS, assert_same, made, modules, ours, same, say, st, words
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from pyterrier_mech.rankers import BiEncoder, CrossEncoder

# -- tokenizers


@pytest.mark.parametrize('config', [BertConfig, ElectraConfig, DistilBertConfig, RobertaConfig])
def test_a_folder_without_tokenizer_files(tmp_path, config):
    made(AutoModelForSequenceClassification, config, num_labels=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'special tokens and no words.*give tokenizer='):
        ours(tmp_path, CrossEncoder)
    if config is BertConfig:
        assert np.ptp(ours(tmp_path, CrossEncoder, tokenizer=words())) > 0


@pytest.mark.parametrize('side', ['truncation_side', 'padding_side'])
def test_tokenizers_that_cut_or_pad_on_the_left(plain, tmp_path, side):
    shutil.copytree(plain[1], tmp_path / 'a')
    say(tmp_path / 'a', 'tokenizer_config.json', **{side: 'left'})
    with pytest.raises(ValueError, match=f"{side} .* must be 'right'; got 'left'"):
        ours(tmp_path / 'a')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'a')
    setattr(tokenizer, side, 'right')
    same(ours(tmp_path / 'a', tokenizer=tokenizer), ours(plain[1]))


def test_tokenizers_that_do_not_fit(plain):
    larger = words()
    larger.add_tokens(['breadbox'])
    with pytest.raises(ValueError, match='ids up to 30522, the model embeddings for ids up to 30521'):
        ours(plain[1], tokenizer=larger)
    with pytest.raises(TypeError, match='tokenizer must be .*got a function'):
        ours(plain[1], tokenizer=lambda text: [1])


def test_segment_ids_that_the_model_does_not_know(tmp_path):
    # A BERT tokenizer numbers the second text 1; RoBERTa has embeddings for 0 alone, DistilBERT for none.
    roberta = {'config': RobertaConfig, 'vocab_size': 30522, 'pad_token_id': 0, 'type_vocab_size': 1}
    for name, auto in (('encoder', AutoModel), ('head', AutoModelForSequenceClassification)):
        made(auto, **roberta, num_labels=1).save_pretrained(tmp_path / name)
        words().save_pretrained(tmp_path / name)
    bi = st.SentenceTransformer(modules=[modules.Transformer(str(tmp_path / 'encoder')), modules.Pooling(32)])
    bi.save_pretrained(str(tmp_path / 'bi'), create_model_card=False)
    assert_same(tmp_path / 'bi')
    with pytest.raises(ValueError, match='segment ids up to 1, the model has 1 .type_vocab_size'):
        ours(tmp_path / 'head')
    settings = {'dim': 32, 'n_layers': 2, 'n_heads': 4, 'hidden_dim': 48, 'num_labels': 1}
    made(AutoModelForSequenceClassification, DistilBertConfig, **settings).save_pretrained(tmp_path / 'distil')
    words().save_pretrained(tmp_path / 'distil')
    assert_same(tmp_path / 'distil')


# -- weights


def test_weights_left_over(tmp_path):
    tokenizer = words()
    for i, auto in enumerate((AutoModel, AutoModelForSequenceClassification)):
        made(auto, num_hidden_layers=3, num_labels=1).save_pretrained(tmp_path / str(i))
        say(tmp_path / str(i), 'config.json', num_hidden_layers=2)
        with pytest.raises(ValueError, match='has 16 weights that a Bert.* does not use, among them .*layer.2'):
            ours(
                tmp_path / str(i),
                CrossEncoder if i else BiEncoder,
                tokenizer=tokenizer,
                **({} if i else {'pooling': 'cls'}),
            )


@pytest.mark.parametrize('auto', [AutoModelForMaskedLM, AutoModelForSequenceClassification])
def test_other_heads_are_left_out(tmp_path, auto):
    module = made(auto, num_labels=1)
    module.save_pretrained(tmp_path / 'a')
    module.base_model.save_pretrained(tmp_path / 'b')
    scores = [ours(tmp_path / name, BiEncoder, tokenizer=words(), pooling='mean') for name in 'ab']
    same(*scores)


def test_buffers_and_poolers_are_left_out(plain, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(plain[1], tmp_path / 'a')
    weights = load_file(tmp_path / 'a' / 'model.safetensors')
    weights['bert.embeddings.position_ids'] = torch.arange(512)[None]
    save_file(weights, tmp_path / 'a' / 'model.safetensors', metadata={'format': 'pt'})
    same(ours(tmp_path / 'a'), ours(plain[1]))
    pooled = made(AutoModel, RobertaConfig, vocab_size=30522, pad_token_id=0)
    module = made(AutoModelForSequenceClassification, RobertaConfig, vocab_size=30522, pad_token_id=0, num_labels=1)
    module.roberta.pooler = pooled.pooler
    module.save_pretrained(tmp_path / 'b')
    module.roberta.pooler = None
    assert any('pooler' in name for name in load_file(tmp_path / 'b' / 'model.safetensors'))
    tokenizer = words()
    same(ours(tmp_path / 'b', tokenizer=tokenizer), CrossEncoder(module, tokenizer=tokenizer).score(QUERIES, TEXTS))


@pytest.mark.parametrize('counts', [{'heads': [10**11, 4]}, {'neurons': [48, 10**11]}, {'heads': [4, 4, 4]}])
def test_absurd_counts_are_refused_before_they_are_made(plain, tmp_path, counts):
    shutil.copytree(plain[1], tmp_path / 'a')
    (tmp_path / 'a' / 'pruned.json').write_text(json.dumps({'heads': [4, 4], 'neurons': [48, 48]} | counts))
    with pytest.raises(ValueError, match='must have 2 layers of at most 4 heads and 48 neurons'):
        ours(tmp_path / 'a')


# -- names and modules


def test_paths_are_names(plain, bi):
    name = str(plain[1])
    same(CrossEncoder(Path(name)).score(QUERIES, TEXTS), ours(plain[1]))
    same(ours(plain[1], tokenizer=Path(name)), ours(plain[1]))
    same(BiEncoder(bi).score(QUERIES, TEXTS), ours(bi))


def module():
    return made(AutoModelForSequenceClassification, num_labels=1)


def compiled_in_place():
    compiled = module()
    compiled.compile()
    return compiled


def a_decoder():
    decoder = module()
    decoder.config.is_decoder = True
    return decoder


@pytest.mark.parametrize(
    'make, error, message',
    [
        (lambda: nn.DataParallel(module()), TypeError, 'got a DataParallel: give model.module'),
        (lambda: torch.compile(module()), TypeError, 'got a OptimizedModule: give .*_orig_mod'),
        (lambda: nn.Linear(2, 2), TypeError, 'must be a hub name, a folder or a Hugging Face module; got a Linear'),
        (lambda: ['a', 'b'], TypeError, 'got a list'),
        (compiled_in_place, ValueError, 'must not be compiled'),
        (a_decoder, ValueError, 'must be an encoder'),
        (lambda: torch.ao.quantization.quantize_dynamic(module(), {nn.Linear}), ValueError, 'must not be quantised'),
    ],
)
@pytest.mark.filterwarnings('ignore')
def test_what_is_not_a_module_says_what_to_give(make, error, message):
    with pytest.raises(error, match=message):
        CrossEncoder(make(), tokenizer=words()).score(QUERIES, TEXTS)


def test_models_of_sentence_transformers_say_what_to_give(bi, cross):
    for model in (st.SentenceTransformer(str(bi)), st.CrossEncoder(str(cross))):
        with pytest.raises(TypeError, match='give its folder or name, or model.transformers_model'):
            CrossEncoder(model).score(QUERIES, TEXTS)
    module = st.CrossEncoder(str(cross)).transformers_model
    same(CrossEncoder(module).score(QUERIES, TEXTS), ours(cross))


def test_adapters_say_how_to_be_merged(tmp_path):
    peft = pytest.importorskip('peft')
    adapted = peft.get_peft_model(module(), peft.LoraConfig(task_type='SEQ_CLS', target_modules=['query', 'value']))
    with pytest.raises(TypeError, match=r'got a PeftModel.*: give model.merge_and_unload\(\)'):
        CrossEncoder(adapted, tokenizer=words()).score(QUERIES, TEXTS)
    adapted.save_pretrained(tmp_path / 'a')
    with pytest.raises(ValueError, match=r'holds an adapter of .*merge_and_unload\(\)'):
        ours(tmp_path / 'a', tokenizer=words())
    module().config.save_pretrained(tmp_path / 'a')
    with pytest.raises(ValueError, match=r'holds an adapter of .*merge_and_unload\(\)'):
        ours(tmp_path / 'a', tokenizer=words())
    merged = adapted.merge_and_unload()
    assert np.isfinite(CrossEncoder(merged, tokenizer=words()).score(QUERIES, TEXTS)).all()


def test_a_tokenizer_without_words_is_refused_as_an_object(plain):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    empty = Tokenizer(WordLevel({'[UNK]': 0, '[PAD]': 1}, unk_token='[UNK]'))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=empty, unk_token='[UNK]', pad_token='[PAD]')
    with pytest.raises(ValueError, match='knows 2 special tokens and no words'):
        ours(plain[1], tokenizer=tokenizer)
