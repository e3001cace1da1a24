"""Words of the simple tokeniser keep their combining marks, in every script; and draws are what they were."""

import unicodedata

import pytest
from inside import plain_words

from pyterrier_mech.perturb import LNC1, TDC, TFC1, DocumentStatistics

WORDS = {
    'Turkish': 'İstanbul',
    'Devanagari': 'हिन्दी',
    'Arabic with vowels': 'كِتَابٌ',
    'Hebrew with vowels': 'שָׁלוֹם',
    'Thai': 'ที่นี่',
    'Tamil': 'தமிழ்',
    'Bengali': 'বাংলা',
    'Vietnamese, decomposed': unicodedata.normalize('NFD', 'tiếng'),
    'French, decomposed': unicodedata.normalize('NFD', 'café'),
    'Yoruba': 'ẹ̀kọ́',
}


@pytest.mark.parametrize('script', WORDS)
def test_a_word_stays_whole(script):
    word = WORDS[script]
    assert plain_words(word) == [word.lower()]
    assert plain_words(f'“{word}”, {word}-{word}_x') == [word.lower()] * 3 + ['x']
    assert set(TFC1(k=20)(word, 'Text.').split()[1:]) == {word.lower()}
    statistics = DocumentStatistics([f'{word} here', 'others'])
    assert statistics.df(word.lower()) == 1 and TDC(statistics)(word, 'Text.') == f'Text. {word.lower()}'
    assert LNC1(k=5)(word, word) == word


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('\N{HEAVY BLACK HEART}\N{VARIATION SELECTOR-16}bread', ['bread']),
        ('\N{HEAVY BLACK HEART}\N{VARIATION SELECTOR-16}', []),
        ('\N{COMBINING ACUTE ACCENT}', []),
        ('It\N{RIGHT SINGLE QUOTATION MARK}s 5 o_clock', ['it', 's', '5', 'o', 'clock']),
        ('パン 面包 хлеб', ['パン', '面包', 'хлеб']),
        ('Plain words, 12 of them.', ['plain', 'words', '12', 'of', 'them']),
    ],
)
def test_marks_that_follow_no_letter_are_no_words(text, words):
    assert plain_words(text) == words


def test_draws_are_those_of_earlier_versions():
    query = 'how to keep bread fresh longer'
    drawn = [' '.join(TFC1(k=4, seed=seed).terms(query, f'Some text {seed}')) for seed in range(4)]
    assert drawn == [
        'keep bread longer fresh',
        'longer longer keep longer',
        'fresh longer fresh keep',
        'bread keep keep longer',
    ]
