"""Names of columns."""

import pandas as pd
import pytest
from inside import head_columns, head_name, parse_head


def test_columns_come_in_order_of_layer_and_head():
    names = ['qid', 'L10H0', 'L2H11', 'L2H9', 'score', 'L2', 'xL0H0', 'L0H0x', 'L00H1', 'resid_pre.L0', 7]
    assert head_columns(pd.DataFrame([range(len(names))], columns=names)) == ['L2H9', 'L2H11', 'L10H0']


def test_name_and_parse_are_inverse():
    assert parse_head('L3H7') == (3, 7)
    assert parse_head(head_name(10, 0)) == (10, 0)


@pytest.mark.parametrize('name', ['L3', 'L3H', 'l3h7', 'L3H7 ', 'L03H7', 'L-1H0', 'L3H7\n', '', None])
def test_anything_else_is_an_error(name):
    with pytest.raises(ValueError, match=r'does not name a head.*L3H7'):
        parse_head(name)
