"""Adding many columns at once gives what adding them one by one does."""

import warnings

import numpy as np
import pandas as pd
from inside import with_columns


def test_columns_come_at_the_end_and_replace_their_namesakes_without_a_warning():
    inp = pd.DataFrame({'qid': ['1', '2'], 'L0H0': ['old', 'old'], 'text': ['a', 'b']}, index=[7, 7])
    inp.attrs['note'] = 'kept'
    columns = {
        f'L{layer}H{head}': np.array([layer, head], dtype=np.float32) for layer in range(12) for head in range(12)
    }
    before = inp.copy()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        res = with_columns(inp, columns)
    assert list(res.columns) == ['qid', 'text', *columns] and list(res.index) == [7, 7]
    assert list(res['L3H5']) == [3.0, 5.0] and res['L3H5'].dtype == np.float32
    assert res.attrs == {'note': 'kept'}
    pd.testing.assert_frame_equal(inp, before)


def test_a_frame_without_rows_keeps_types():
    res = with_columns(pd.DataFrame({'qid': []}), {'L0H0': np.zeros(0, dtype=np.float32)})
    assert len(res) == 0 and res['L0H0'].dtype == np.float32
