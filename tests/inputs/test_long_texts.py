"""Alignment searches no more than the model reads."""

import difflib

import inside
import numpy as np
import pytest
from toys import toy_cross_encoder

from pyterrier_mech import PatchHeads


@pytest.mark.parametrize('edit', [lambda text: 'rust ' + text, lambda text: text.replace('bread', 'dough'), str.upper])
def test_long_texts_are_cut_before_they_are_searched(edit, monkeypatch):
    searched = []

    class Counting(difflib.SequenceMatcher):
        def __init__(self, isjunk, a, b, autojunk):
            searched.append(max(len(a), len(b)))
            super().__init__(isjunk, a, b, autojunk)

    monkeypatch.setattr(inside.alignment_module, 'SequenceMatcher', Counting)
    model, text = toy_cross_encoder(), 'a slow rise gives bread more flavour and keeps it ' * 400
    row = {'query': 'keep bread fresh', 'text_0': text, 'text': edit(text)}
    (side,) = inside.sides(model, row)
    assert max(searched) <= inside.max_length_of(model)
    assert side.original['input_ids'].shape == side.perturbed['input_ids'].shape
    assert side.original['input_ids'].shape[1] <= inside.max_length_of(model)


def test_an_edit_behind_what_is_read_is_truncated_away():
    import pandas as pd

    text = 'a slow rise gives bread more flavour ' * 300
    frame = pd.DataFrame({'qid': ['1'], 'docno': 'd', 'query': 'rust', 'text': text + 'rust', 'text_0': text})
    with pytest.warns(UserWarning, match='edit truncated away: 1'):
        res = PatchHeads(toy_cross_encoder())(frame)
    assert res.patchable[0] == 'edit truncated away' and np.isnan(res.L0H0[0])
