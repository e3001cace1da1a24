"""Joined ids are what the tokenizer itself gives for the pair."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inside import InputMaker
from toys import byte_level_tokenizer, wordpiece_tokenizer

TOKENIZERS = {'wordpiece': wordpiece_tokenizer, 'byte level': byte_level_tokenizer}
WORDS = st.lists(st.sampled_from(['bread', 'rust', 'a', 'dough-rise', 'unbelievable', '', '北京', "baker's", '3.5']))


def own_encoding(tokenizer, parts, max_length):
    batch = tokenizer(*parts, truncation=True, max_length=max_length, padding=True, return_tensors='pt')
    return {name: tensor for name, tensor in batch.items()}


def joined(tokenizer, parts, max_length):
    maker = InputMaker(tokenizer, max_length)
    arrays = maker.joined(maker.cut([maker.tokenize(part) for part in parts]))
    names = ('input_ids', 'attention_mask', 'token_type_ids')
    return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}


def assert_same(ours, theirs, mask):
    for name in theirs:
        assert torch.equal(ours[name] * mask, theirs[name] * mask), name


@pytest.mark.parametrize('name', TOKENIZERS)
@given(pairs=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), max_length=st.integers(8, 40))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_pairs_equal_the_tokenizers_own_encoding(name, pairs, max_length):
    queries, texts = [' '.join(q) for q, _ in pairs], [' '.join(t) for _, t in pairs]
    ours = joined(TOKENIZERS[name](), [queries, texts], max_length)
    theirs = own_encoding(TOKENIZERS[name](), [queries, texts], max_length)
    assert_same(ours, theirs, theirs['attention_mask'])


@pytest.mark.parametrize('name', TOKENIZERS)
def test_single_texts_equal_the_tokenizers_own_encoding(name):
    texts = ['bread', 'a slow rise in the fridge gives bread flavour ' * 3, '']
    ours, theirs = joined(TOKENIZERS[name](), [texts], 12), own_encoding(TOKENIZERS[name](), [texts], 12)
    assert_same(ours, theirs, theirs['attention_mask'])


def test_equal_texts_are_tokenised_once():
    class Counting:
        def __init__(self, tokenizer):
            self.tokenizer, self.seen = tokenizer, []

        def __call__(self, texts, **options):
            self.seen += texts
            return self.tokenizer(texts, **options)

    counting = Counting(wordpiece_tokenizer())
    ids = InputMaker(counting, 64).tokenize(['rust', 'bread', 'rust', 'rust'])
    assert counting.seen == ['rust', 'bread']
    assert np.array_equal(ids.row(0), ids.row(3)) and not np.array_equal(ids.row(0), ids.row(1))


def test_a_maximum_length_without_room_is_an_error():
    with pytest.raises(ValueError, match='max_length=2'):
        joined(wordpiece_tokenizer(), [['a'], ['b']], 2)
