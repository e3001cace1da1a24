"""What a folder states is applied as sentence-transformers applies it, or refused."""

import json
import shutil
from itertools import product

import pytest
from folders import (
    POOLING,
    QUERIES,
    SETTINGS,
    TEXTS,
    TRANSFORMER,
    assert_same,
    ours,
    same,
    saved_bi,
    say,
    theirs,
    words,
)
from inside import save_ranker

from pyterrier_mech.prune import remove_units
from pyterrier_mech.rankers import BiEncoder, CrossEncoder

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
    (POOLING, {'pooling_mode': ['lasttoken', 'mean']}, r"got 'lasttoken\+mean'"),
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
    prompts = {'query': 'Find: ', 'document': 'A text: '}
    settings = {'similarity_fn_name': 'dot', 'truncate_dim': 8, 'prompts': prompts}
    folder = saved_bi(plain, tmp_path, pooling, True, include, **settings)
    say(folder, TRANSFORMER, do_lower_case=True, max_seq_length=20)
    wanted = theirs(folder)
    save_ranker(BiEncoder(str(folder)), tmp_path / 'again')
    same(ours(tmp_path / 'again'), wanted)
    assert_same(tmp_path / 'again')


def test_a_saved_cross_encoder_states_the_same(cross, tmp_path):
    say(cross, SETTINGS, prompts={'search': 'Find: '}, default_prompt_name='search')
    say(cross, TRANSFORMER, do_lower_case=True, max_seq_length=20)
    save_ranker(CrossEncoder(str(cross)), tmp_path / 'again')
    same(ours(tmp_path / 'again'), theirs(cross))
    assert_same(tmp_path / 'again')


def test_a_pruned_ranker_keeps_what_the_folder_states(plain, tmp_path):
    settings = {'similarity_fn_name': 'dot', 'truncate_dim': 8, 'prompts': {'query': 'Find: ', 'document': 'A text: '}}
    folder = saved_bi(plain, tmp_path, 'mean', True, False, **settings)
    say(folder, TRANSFORMER, do_lower_case=True, max_seq_length=20)
    pruned = remove_units(BiEncoder(str(folder), device='cpu'), [])
    same(pruned.score(QUERIES, TEXTS), theirs(folder))
