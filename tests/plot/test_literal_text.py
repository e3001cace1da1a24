"""Every text of every figure is drawn as it is written; legends stand inside; other things are refused."""

import io

import numpy as np
import pandas as pd
import pytest
from inside import Analysis

from pyterrier_mech import plot
from pyterrier_mech.results import Circuit, HeadEffects, NeuronEffects

matplotlib = pytest.importorskip('matplotlib')

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.text import Text  # noqa: E402

QUERIES = ['is $5 less than $10', r'what is $\binom nk$ and $\foo$', 'a $ alone', r'50 % & a_b^2 #1 \alpha']


def _heads(**options):
    scores = {'score_original': 1.0, 'score_perturbed': [2.0, 3.0, 4.0]}
    frame = pd.DataFrame({'qid': ['1', '2', '3'], 'docno': 'd', **scores, 'L0H0': 0.5, 'L0H1': -0.2, 'L1H0': 0.0})
    note = Analysis('PatchHeads', {'direction': 'perturbed_to_original'}, ['L0H0', 'L0H1', 'L1H0'])
    return plot.heads(HeadEffects.from_frame(frame.assign(analysis=str(note))), **options)


def _circuit(role='matching', **options):
    heads = pd.DataFrame({'layer': [0, 1], 'head': [1, 0], 'effect': [0.4, -0.1], 'role': [role, 'mixed']})
    return plot.circuit(Circuit.of_tables(heads, pd.DataFrame({'layer': [1], 'neuron': [7]})), **options)


def _faithfulness(**options):
    rows = []
    for size in (0, 1, 2, 4, 8):
        row = {'size': size, 'n_heads': size, 'kind': 'circuit', 'draw': 0, 'faithfulness': size / 8}
        row |= {'faithfulness_low': size / 9, 'faithfulness_high': size / 7}
        rows += [row, row | {'kind': 'random', 'faithfulness': size / 80}]
    return plot.faithfulness(pd.DataFrame(rows), **options)


def _neurons(**options):
    frame = pd.DataFrame({'qid': ['x', 'y'], 'docno': 'd', 'completeness_error.neurons': 0.0})
    frame['neurons'] = [np.arange(30.0).reshape(3, 10), np.zeros((3, 10))]
    qrels = pd.DataFrame({'qid': ['x', 'y'], 'docno': 'd', 'label': [1, 0]})
    return plot.neurons(NeuronEffects.from_frame(frame, qrels), p=10, **options)


def _tokens(words=('rust', 'costs', '$5', r'$\foo$'), **options):
    return plot.tokens({'tokens': list(words), 'token_effects': np.linspace(-1, 1, len(words))}, **options)


def _scores(**options):
    frame = pd.DataFrame({'qid': ['1', '1', '2'], 'score_original': [0.0, 1, 2], 'score_perturbed': [1.0, 1, 1]})
    return plot.scores(frame, **options)


def _overlaps(**options):
    frame = pd.DataFrame({'qid': ['x', 'y'], 'docno': 'd', 'completeness_error.neurons': 0.0})
    frame['neurons'] = [np.arange(30.0).reshape(3, 10), np.arange(30.0)[::-1].reshape(3, 10)]
    qrels = pd.DataFrame({'qid': ['x', 'y'], 'docno': 'd', 'label': [1, 0]})
    return plot.overlaps(NeuronEffects.from_frame(frame, qrels), p=[10, 50], **options)


def _paths(receiver=None, **options):
    scores = {'score_original': 1.0, 'score_perturbed': [2.0, 3.0, 4.0]}
    paths = {'L0H0>score': 0.5, 'L1H0>score': -0.2, 'L0H0>L1H0.k': 0.1, 'L0H1>L1H1.v': 0.2}
    frame = pd.DataFrame({'qid': ['1', '2', '3'], 'docno': 'd', **scores, **paths})
    note = Analysis('PatchPaths', {'direction': 'perturbed_to_original'}, list(paths))
    return plot.paths(frame.assign(analysis=str(note)), receiver=receiver, **options)


def _retention(**options):
    rows = [(name, x, 1 - x / 3, 0.8 - x / 3, 1.1) for name in QUERIES for x in (0.2, 0.5)]
    table = pd.DataFrame(rows, columns=['criterion', 'sparsity', 'retention', 'retention_low', 'retention_high'])
    return plot.retention(table, by='criterion', **options)


FIGURES = {'heads': _heads, 'circuit': _circuit, 'faithfulness': _faithfulness, 'neurons': _neurons, 'tokens': _tokens}
FIGURES |= {'scores': _scores, 'overlaps': _overlaps, 'paths': _paths, 'retention': _retention}


def texts_of(figure):
    return [text for text in figure.findobj(Text) if text.get_text()]


def saved(figure):
    for kind in ('png', 'pdf', 'svg'):
        figure.savefig(io.BytesIO(), format=kind)


@pytest.mark.parametrize('query', QUERIES)
@pytest.mark.parametrize('name', FIGURES)
def test_titles_are_literal(name, query):
    figure = FIGURES[name](title=query)
    saved(figure)
    texts = texts_of(figure)
    assert query in [text.get_text() for text in texts] and not [text for text in texts if text.get_parse_math()]


@pytest.mark.parametrize('name', FIGURES)
def test_they_are_literal_in_axes_of_the_user_too_and_other_axes_stay(name):
    figure = Figure()
    left, right = figure.subplots(1, 2)
    left.set_title('$x^2$')
    FIGURES[name](title=QUERIES[0], ax=right)
    saved(figure)
    assert left.title.get_parse_math()
    assert not [text for text in texts_of(right) if text.get_parse_math()]


def test_roles_and_words_are_literal():
    for query in QUERIES:
        saved(_circuit(role=query))
        saved(_tokens(words=query.split()))
    legend = _circuit(role=QUERIES[1]).axes[0].get_legend()
    assert QUERIES[1] in [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize('name', FIGURES)
def test_numbers_are_numbers_where_the_user_likes_mathematics(name):
    with matplotlib.rc_context({'axes.formatter.use_mathtext': True}):
        figure = FIGURES[name](title='x')
        saved(figure)
    assert not [
        text.get_text() for text in texts_of(figure) if '$' in text.get_text() and 'mathdefault' in text.get_text()
    ]


# -- legends


WITH_LEGENDS = [name for name in FIGURES if name != 'tokens']


@pytest.mark.parametrize('name', WITH_LEGENDS)
@pytest.mark.parametrize('layout', [None, 'constrained'])
@pytest.mark.parametrize('shape', [(1, 1), (1, 2), (2, 1)])
def test_legends_stand_inside_the_figure(name, layout, shape):
    figure = Figure(figsize=(5 * shape[1], 3.4 * shape[0]), layout=layout)
    ax = figure.subplots(*shape, squeeze=False)[-1, -1]
    FIGURES[name](ax=ax)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = ax.get_legend().get_window_extent(canvas.get_renderer())
    assert box.y0 >= 0 and box.height > 0 and ax.get_window_extent().height > 20


# -- what cannot be drawn


OF_RESULTS = ['heads', 'circuit', 'faithfulness', 'neurons', 'layers', 'paths', 'overlaps']
OF_FRAMES = ['scores', 'retention', 'importance']


@pytest.mark.parametrize('value', [[1, 2], None, 'effects', np.zeros((2, 2)), 'of another kind'])
@pytest.mark.parametrize('name', [*OF_RESULTS, *OF_FRAMES])
def test_other_things_are_refused_with_their_kind(name, value):
    if isinstance(value, str) and value == 'of another kind':
        value = Circuit.from_units(['L0H1']) if name != 'circuit' else NeuronEffects
    with pytest.raises(TypeError, match=f'the first argument must be .*; got {type(value).__name__}'):
        getattr(plot, name)(value)
