"""Alignment of a pair is a value: positions, changes and token types, worked out by hand."""

import numpy as np
import pytest
from inside import FILLER, TRUNCATED, UNALIGNED, UNCHANGED, Aligner, InputMaker
from toys import byte_level_tokenizer, wordpiece_tokenizer

MAKER = InputMaker(wordpiece_tokenizer(), 32)


def aligned(query, original, perturbed, *, maker=MAKER, filler='a', query_0=None):
    ids = [maker.tokenize([text]).row(0) for text in (query_0 or query, original, query, perturbed)]
    return Aligner(maker, filler).align(ids[:2], ids[2:])


def shown(alignment, column, maker=MAKER):
    return ' '.join(alignment.to_frame(maker.tokenizer)[column])


CASES = {
    'appended': (
        'rust keeps',
        'rust keeps bread',
        '[CLS] bread [SEP] rust keeps a [SEP]',
        '[CLS] bread [SEP] rust keeps bread [SEP]',
        'same same same same same inserted same',
        'cls query sep doc_other doc_other inserted sep',
    ),
    'prepended': (
        'rust keeps',
        'bread rust keeps',
        '[CLS] bread [SEP] a rust keeps [SEP]',
        '[CLS] bread [SEP] bread rust keeps [SEP]',
        'same same same inserted same same same',
        'cls query sep inserted doc_other doc_other sep',
    ),
    'inserted': (
        'rust bread keeps',
        'rust bread bread keeps',
        '[CLS] bread [SEP] rust bread a keeps [SEP]',
        '[CLS] bread [SEP] rust bread bread keeps [SEP]',
        'same same same same same inserted same same',
        'cls query sep doc_other doc_match inserted doc_other sep',
    ),
    'deleted': (
        'rust bread keeps',
        'rust keeps',
        '[CLS] bread [SEP] rust bread keeps [SEP]',
        '[CLS] bread [SEP] rust a keeps [SEP]',
        'same same same same deleted same same',
        'cls query sep doc_other doc_match doc_other sep',
    ),
    'replaced, one longer': (
        'rust keeps well',
        'rust bread dough well',
        '[CLS] bread [SEP] rust keeps a well [SEP]',
        '[CLS] bread [SEP] rust bread dough well [SEP]',
        'same same same same replaced inserted same same',
        'cls query sep doc_other doc_match inserted doc_other sep',
    ),
}


@pytest.mark.parametrize('name', CASES)
def test_changes_and_types(name):
    original, perturbed, left, right, changes, types = CASES[name]
    result = aligned('bread', original, perturbed)
    assert (shown(result, 'original'), shown(result, 'perturbed')) == (left, right)
    assert (' '.join(result.changes), ' '.join(result.types)) == (changes, types)
    assert list(result.segments) == [0, 0, 0] + [1] * (len(result) - 3)
    assert result.problem == '' and result.original_mask.all() and result.perturbed_mask.all()


def test_two_edits_keep_what_is_common_in_its_place():
    result = aligned('bread', 'one two three four five', 'bread one two four five bread')
    assert shown(result, 'original') == '[CLS] bread [SEP] a one two three four five a [SEP]'
    assert shown(result, 'perturbed') == '[CLS] bread [SEP] bread one two a four five bread [SEP]'
    assert list(result.positions('inserted')) == [3, 9] and list(result.positions('deleted')) == [6]


def test_an_edited_query_is_aligned_too():
    result = aligned('keep bread', 'rust', 'rust', query_0='bread')
    assert shown(result, 'original') == '[CLS] a bread [SEP] rust [SEP]'
    assert shown(result, 'perturbed') == '[CLS] keep bread [SEP] rust [SEP]'
    assert ' '.join(result.types) == 'cls inserted query sep doc_other sep'


def test_the_mask_filler_hides_positions():
    result = aligned('bread', 'rust keeps', 'rust bread keeps', filler='mask')
    assert list(result.original_mask) == [1, 1, 1, 1, 0, 1, 1] and result.perturbed_mask.all()


def test_another_filler_token():
    assert shown(aligned('bread', 'rust', 'rust bread', filler='the'), 'original') == '[CLS] bread [SEP] rust the [SEP]'
    masked = aligned('bread', 'rust', 'rust bread', filler='[MASK]')
    assert shown(masked, 'original') == '[CLS] bread [SEP] rust [MASK] [SEP]'
    with pytest.raises(ValueError, match="filler='bread dough' is 2 tokens"):
        aligned('bread', 'rust', 'rust bread', filler='bread dough')


@pytest.mark.parametrize(
    ('original', 'perturbed', 'filler', 'problem'),
    [
        ('rust keeps', 'rust keeps', 'a', UNCHANGED),
        ('rust keeps', 'Rust  keeps', 'a', UNCHANGED),
        ('rust ' * 40, 'rust ' * 40 + 'bread', 'a', TRUNCATED),
        ('rust keeps', 'rust keeps bread', None, UNALIGNED),
        ('rust keeps', 'bread dough winter', 'a', UNALIGNED),
        ('rust a', 'rust', 'a', FILLER),
        ('rust', 'rust a', 'a', FILLER),
    ],
)
def test_pairs_that_cannot_be_patched_say_why(original, perturbed, filler, problem):
    assert aligned('bread', original, perturbed, filler=filler).problem == problem


@pytest.mark.parametrize(
    ('original', 'perturbed', 'filler'),
    [
        ('rust keeps', 'rust bread', None),
        ('', 'bread', 'a'),
        ('rust', '', 'a'),
        ('rust', 'bread', 'a'),
        ('rust', 'rust a', 'mask'),
        ('rust', 'rust a', 'the'),
        ('bread ' * 40 + 'rust', 'rust ' + 'bread ' * 40, 'a'),
    ],
)
def test_pairs_that_can(original, perturbed, filler):
    result = aligned('bread', original, perturbed, filler=filler)
    assert result.problem == '' and len(result.original) == len(result.perturbed) <= 32


def test_truncation_cuts_both_sides_alike():
    result = aligned('bread', 'rust ' * 40, 'bread ' + 'rust ' * 40)
    assert len(result) == 32
    assert shown(result, 'original').endswith('rust [SEP]') and list(result.positions('inserted')) == [3]
    without = MAKER.tokenize(['bread', 'bread ' + 'rust ' * 40])
    kept = MAKER.kept([without.lengths[:1], without.lengths[1:]])
    assert np.array_equal(result.perturbed[3:-1], without.row(1)[: int(kept[1][0])])


def test_single_texts_take_query_terms_from_outside():
    maker = InputMaker(byte_level_tokenizer(), 32)
    ids = maker.tokenize(['bread rust', 'bread rust dough', ' rust'])
    result = Aligner(maker).align([ids.row(0)], [ids.row(1)], ['text'], query=ids.row(2))
    assert result.types[0] == 'cls' and result.types[-1] == 'sep' and 'doc_match' in result.types
    assert set(result.types) == {'cls', 'sep', 'doc_match', 'doc_other', 'inserted'}
