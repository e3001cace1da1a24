"""Frames of effects by hand and simulated."""

import numpy as np
import pandas as pd
import pytest
from toys import effect_frame, simulated_effects


@pytest.fixture
def by_hand() -> pd.DataFrame:
    # delta: 1, 3, -0.5, 2.5; sum 6, mean 1.5.
    return effect_frame(
        [
            ('q1', 'd1', 0.0, 1.0, 0.5, -1.0),
            ('q1', 'd2', 1.0, 4.0, 0.5, -1.0),
            ('q2', 'd1', 2.0, 1.5, 0.5, 2.0),
            ('q2', 'd2', 0.5, 3.0, 0.5, 2.0),
        ],
        ['L0H0', 'L1H2'],
    )


@pytest.fixture
def simulated() -> pd.DataFrame:
    """40 queries of 1 to 5 rows; L0H0 carries 0.3 of the score change, L0H1 nothing, L2H0 -0.1."""
    return simulated_effects(np.random.default_rng(7), 40)
