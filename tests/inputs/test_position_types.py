"""Position types by whole words, against the characters of the text, and cases worked out by hand."""

import re

import numpy as np
import pytest
from inside import LITERATURE, SCHEMES, Inputs, words_of
from toys import QUERIES, TEXTS, byte_level_tokenizer, toy_bi_encoder, toy_cross_encoder, wordpiece_tokenizer
from unigram import unigram_tokenizer

from pyterrier_mech import CrossEncoder

QUERY = 'is theraderm, in bread?'
TEXT = ' The theracort, Theraderm-like bread—is breaded?'
TOKENIZERS = {'wordpiece': wordpiece_tokenizer, 'byte level': byte_level_tokenizer, 'unigram': unigram_tokenizer}

WORDS = {'wordpiece': 'a', 'byte level': 'dough', 'unigram': 'b'}  # a word of one token


def cross(name, **settings):
    module = toy_cross_encoder('bert' if name == 'wordpiece' else 'roberta').model
    return CrossEncoder(module, tokenizer=TOKENIZERS[name](), **settings)


def both(model, original, perturbed, filler='a'):
    """Inputs of one pair of (query, text)."""
    versions = [{'query': [query], 'text': [text]} for query, text in (original, perturbed)]
    return Inputs.pairs(model, *versions, filler)


def named(model, inputs, tower=0, side='perturbed', **settings):
    """[(token, type)] of the positions."""
    ids = inputs.towers[tower].arrays(np.array([0]), side)[0][0].tolist()
    tokens = model.maker.tokenizer.convert_ids_to_tokens(ids)
    return list(zip(tokens, inputs.towers[tower].types(0, scheme='literature', **settings), strict=True))


def of_type(model, inputs, kind, tower=0):
    return ' '.join(token for token, found in named(model, inputs, tower) if found == kind)


def word_at(text, start, end):
    """The word, of letters and digits, in which the characters stand; '' for punctuation."""
    while start < end - 1 and text[start].isspace():
        start += 1
    start += text[start].isspace()  # a piece for a space alone belongs to what follows
    found = (match for match in re.finditer(r'[^\W_]+', text) if match.start() <= start < match.end())
    return next((match[0].lower() for match in found), '')


def expected(tokenizer, query, text, added, inserted):
    """Types of the positions of a plain pair, some of which were inserted."""
    encoded = tokenizer(query, text, return_offsets_mapping=True)
    owners, types = encoded.sequence_ids(), []
    query_words = set(re.findall(r'\w+', query.lower()))
    for place, (owner, span) in enumerate(zip(owners, encoded['offset_mapping'], strict=True)):
        word = '' if owner is None else word_at((query, text)[owner], *span)
        if owner is None:
            types.append('cls' if not place else 'sep_last' if place == len(owners) - 1 else 'sep_first')
        elif place in inserted:
            types.append('inserted')
        elif owner == 0:
            types.append('query_same' if word in added else 'query_other')
        else:
            types.append('doc_same' if word in added else 'doc_query' if word in query_words else 'doc_other')
    return encoded['input_ids'], types


@pytest.mark.parametrize('filler', ['word', 'mask', 'special'])
@pytest.mark.parametrize('name', TOKENIZERS)
@pytest.mark.parametrize('added', ['theraderm', 'bread', 'the', 'is Theraderm', 'unheard'])
def test_types_are_those_of_the_characters(name, added, filler):
    model = cross(name)
    text = f'{TEXT} {added}'
    fillers = {'word': WORDS[name], 'special': model.tokenizer.sep_token}
    inputs = both(model, (QUERY, TEXT), (QUERY, text), fillers.get(filler, filler))
    assert inputs.problems == ['']
    inserted = np.flatnonzero(np.array(inputs.towers[0].types(0)) == 'inserted')
    ids, types = expected(model.tokenizer, QUERY, text, added.lower().split(), inserted)
    assert inputs.towers[0].arrays(np.array([0]), 'perturbed')[0][0].tolist() == ids
    assert inputs.towers[0].types(0, scheme='literature') == types
    assert [LITERATURE[place] for place in inputs.types(0, [0], scheme='literature')[0]] == types
    if added == 'theraderm':
        assert {'query_same', 'query_other', 'doc_same', 'doc_query', 'doc_other', 'inserted'} <= set(types)


@pytest.mark.parametrize('name', TOKENIZERS)
def test_one_version_has_no_inserted_word(name):
    model = cross(name)
    inputs = Inputs.plain(model, [QUERY, QUERIES[0]], [TEXT, TEXTS[0]], types=True)
    assert inputs.towers[0].types(0, scheme='literature') == expected(model.tokenizer, QUERY, TEXT, [], [])[1]
    types = inputs.types(0, [0, 1], scheme='literature')
    assert (types[1] == -1).any() or (types[0] == -1).any()
    with pytest.raises(ValueError, match='made without types'):
        Inputs.plain(model, [QUERY], [TEXT]).types(0, [0], scheme='literature')


def test_pieces_of_other_words_do_not_match():
    model = cross('wordpiece')
    inputs = both(model, ('theraderm', 'the theracort theraderm'), ('theraderm', 'the theracort theraderm theraderm'))
    assert of_type(model, inputs, 'doc_same') == 'the ##rade ##rm' == of_type(model, inputs, 'inserted')
    assert of_type(model, inputs, 'query_same') == 'the ##rade ##rm'
    assert of_type(model, inputs, 'doc_other') == 'the the ##rac ##ort'
    # The alignment finds the first piece of the word in front of the other word, and that word as half new.
    inputs = both(model, ('theraderm', 'a theracort'), ('theraderm', 'a theraderm theracort'))
    assert of_type(model, inputs, 'inserted') == '##rade ##rm the'
    assert of_type(model, inputs, 'query_same') == 'the ##rade ##rm' and not of_type(model, inputs, 'doc_same')


def test_what_was_put_in_is_not_an_occurrence_of_itself():
    model = cross('wordpiece')
    inputs = both(model, ('bread dough', 'bread and rust'), ('bread dough', 'bread and bread'))
    assert inputs.towers[0].types(0)[-2] == 'doc_match'
    assert named(model, inputs)[4:-1] == [('bread', 'doc_same'), ('and', 'doc_other'), ('bread', 'doc_query')]
    assert of_type(model, inputs, 'query_same') == 'bread'
    # A word that grew is a new word, and its old piece is not an occurrence of it.
    inputs = both(model, ('theraderm', 'a therade'), ('theraderm', 'a theraderm'))
    assert of_type(model, inputs, 'inserted') == '##rm' and of_type(model, inputs, 'doc_query') == 'the ##rade'


@pytest.mark.parametrize('text', ['rust keeps', 'keeps bread rust'])
def test_deletions_and_moves_put_nothing_in(text):
    model = cross('wordpiece')
    inputs = both(model, ('bread', 'bread rust keeps'), ('bread', text))
    types = set(inputs.towers[0].types(0, scheme='literature'))
    assert inputs.problems == [''] and 'doc_query' in types and not types & {'query_same', 'doc_same'}


def test_an_edited_query():
    model = cross('wordpiece')
    inputs = both(model, ('bread', 'bread dough dough'), ('dough bread dough', 'bread dough dough'))
    assert of_type(model, inputs, 'doc_same') == 'dough dough' and of_type(model, inputs, 'doc_query') == 'bread'
    assert of_type(model, inputs, 'query_other') == 'bread' and of_type(model, inputs, 'inserted') == 'dough dough'


def test_towers_know_the_words_of_the_other():
    model = toy_bi_encoder('bert')
    original, perturbed = ('the theraderm', 'theraderm rust'), ('the theraderm', 'theraderm rust theraderm')
    inputs = both(model, original, perturbed)
    assert of_type(model, inputs, 'query_same') == 'the ##rade ##rm' and of_type(model, inputs, 'sep_last') == '[SEP]'
    assert of_type(model, inputs, 'doc_same', 1) == 'the ##rade ##rm' == of_type(model, inputs, 'inserted', 1)
    assert not of_type(model, inputs, 'sep_first') + of_type(model, inputs, 'sep_first', 1)
    plain = Inputs.plain(model, *[[text] for text in perturbed], types=True)
    assert [tower.types(0, scheme='literature') for tower in plain.towers] == [
        ['cls', *['query_other'] * 4, 'sep_last'],
        ['cls', *['doc_query'] * 3, 'doc_other', *['doc_query'] * 3, 'sep_last'],
    ]


def test_a_prompt_is_no_word():
    model = toy_bi_encoder('bert')
    model.query_prefix, model.text_prefix = 'query: ', 'text about a query: '
    inputs = both(model, ('bread', 'rust query'), ('bread', 'rust query bread query'))
    assert of_type(model, inputs, 'query_other') == 'query :' and of_type(model, inputs, 'query_same') == 'bread'
    assert of_type(model, inputs, 'doc_same', 1) == 'query'
    assert of_type(model, inputs, 'doc_other', 1) == 'text about a query : rust'


def test_truncation():
    model = cross('wordpiece', max_length=8)
    inputs = both(model, ('bread', 'bread rust theraderm'), ('bread', 'bread rust theraderm bread'))
    assert inputs.problems == ['edit truncated away'] and not of_type(model, inputs, 'query_same')
    inputs = both(model, ('theraderm', 'rust keeps'), ('theraderm', 'rust theraderm keeps'))
    assert of_type(model, inputs, 'inserted') == 'the ##rade' == of_type(model, inputs, 'query_same')


def test_pairs_with_a_problem():
    model = cross('wordpiece')
    same, apart = ('bread', 'bread rust'), ('bread', 'dough winter keep')
    inputs = both(model, same, same)
    assert [kind for _, kind in named(model, inputs)] == (
        ['cls', 'query_other', 'sep_first', 'doc_query', 'doc_other', 'sep_last']
    )
    inputs = both(model, same, apart, filler=None)
    assert inputs.problems == ['no alignment'] and of_type(model, inputs, 'doc_query') == 'bread'
    inputs = both(model, ('a', 'rust'), ('a', 'rust a'))
    assert inputs.problems == ['edit equals the filler'] and not of_type(model, inputs, 'query_same')


def test_inserted_positions_as_what_they_are():
    model = cross('wordpiece')
    inputs = both(model, ('bread', 'bread rust'), ('bread', 'bread rust bread unheard'))
    types = [kind for _, kind in named(model, inputs, inserted=False)]
    assert types[3:-1] == ['doc_same', 'doc_other', 'doc_query', *['doc_other'] * (len(types) - 7)]


def test_texts_without_tokens():
    model = cross('wordpiece')
    inputs = both(model, ('bread', ''), ('bread', 'bread'))
    assert [kind for _, kind in named(model, inputs)] == ['cls', 'query_same', 'sep_first', 'inserted', 'sep_last']
    assert words_of(wordpiece_tokenizer(), []) == [] and list(words_of(wordpiece_tokenizer(), [''])[0].owners) == []


def test_an_unknown_scheme():
    inputs = both(cross('wordpiece'), ('bread', 'rust'), ('bread', 'rust bread'))
    with pytest.raises(ValueError, match=r"scheme must be one of \('basic', 'literature'\); got 'fine'"):
        inputs.types(0, [0], scheme='fine')
    assert set(SCHEMES) == {'basic', 'literature'}
