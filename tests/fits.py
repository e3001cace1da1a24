"""What the tests of pruning share: rows to fit on, small trainings, comparisons, and a clock that scoring moves on."""

import functools

import numpy as np
import pandas as pd
import torch
from inside import FitData, replace_latency_clock
from toys import QUERIES, TEXTS, toy_cross_encoder, weights

from pyterrier_mech import CrossEncoder
from pyterrier_mech.prune import prune_units

KEPT_HEADS = [[0, 2], [1]]
KEPT_NEURONS = [list(range(0, 48, 2)), list(range(30))]
FAST = {'epochs': 2, 'learning_rate': 3e-3, 'texts_per_query': 4, 'queries_per_batch': 2}
DOCS = [*TEXTS, 'Dough rests in a cold place.', 'Oil the chain before the winter comes.']


def fit_on(queries=range(4), texts=range(3), qrels=True, labels=None):
    """Rows of some queries and texts; labels are 0 to 2 unless given, as (qid, docno, label)."""
    rows = [(f'q{i}', QUERIES[i], f'd{j}', DOCS[j]) for i in queries for j in texts]
    frame = pd.DataFrame(rows, columns=['qid', 'query', 'docno', 'text'])
    labels = labels or [(f'q{i}', f'd{j}', (i + j) % 3) for i in queries for j in texts]
    return FitData(frame, pd.DataFrame(labels, columns=['qid', 'docno', 'label']) if qrels else None)


def data(queries=range(4), texts=range(4), labels=None):
    """More rows, for what trains."""
    return fit_on(queries, texts, labels=labels)


def mixed(fit, seed=2):
    """The same rows in another order."""
    return FitData(fit.frame.sample(frac=1, random_state=seed).reset_index(drop=True), fit.qrels)


def add_query(query, text):
    return f'{text} {query.split()[0]}'


def pruned(teacher):
    return prune_units(teacher, KEPT_HEADS, KEPT_NEURONS)


def trained(recovery, fit=None, validation=None, make=toy_cross_encoder):
    """The weights of a pruned toy after a recovery, and its history."""
    teacher = make('bert')
    student = pruned(teacher)
    history = recovery.recover(student, teacher, fit or data(), validation)
    return weights(student), history


@functools.cache
def trained_once(recovery, fit, validation):
    """The same, once for the same objects."""
    return trained(recovery, fit, validation)


def close_weights(a, b, atol=1e-9):
    """Whether trained weights are equal up to rounding, but for those that no score feels and that rounding moves."""
    felt = [name for name in a if not name.endswith(('key.bias', 'k_lin.bias'))]
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=0, atol=atol) for name in felt)


def same_history(a, b):
    pd.testing.assert_frame_equal(a, b, rtol=1e-7)
    return True


def assert_layers(found, expected, **tolerance):
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, **{'rtol': 1e-7, 'atol': 1e-12, **tolerance})


def same_scores(a, b, **tolerance):
    """Checks that scores of units are equal."""
    assert_layers(a.heads, b.heads, **tolerance)
    assert_layers(a.neurons, b.neurons, **tolerance)


def ticking(monkeypatch, seconds):
    """Replaces the clock by one that a scoring moves on by what `seconds` says of the ranker."""
    now, scored = [0.0], []
    replace_latency_clock(monkeypatch, lambda: now[0])

    def score(self, queries, texts):
        scored.append(sorted(zip(queries, texts, strict=True)))
        now[0] += seconds([(self.n_heads(i), self.n_neurons(i)) for i in range(self.n_layers)])
        return np.zeros(len(queries))

    monkeypatch.setattr(CrossEncoder, 'score', score)
    return scored
