from __future__ import annotations

import builtins

import numpy as np
import pandas as pd
import pytest

from pyterrier_mech import Circuit, NeuronEffects, plot

matplotlib = pytest.importorskip('matplotlib')

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


def _circuit(effects=(0.4, -0.1, 0.2), roles=('matching', 'query-focused', 'matching'), neurons=(), settings=None):
    heads = pd.DataFrame({'layer': [0, 1, 2], 'head': [1, 0, 3], 'effect': effects, 'role': roles})
    table = pd.DataFrame(neurons, columns=['layer', 'neuron'])
    return Circuit.of_tables(heads, table, settings={'head_counts': [4, 2, 4]} if settings is None else settings)


def _curves(n_random=3):
    rows = []
    for size in (0, 1, 2, 4, 8):
        value = size / 8
        row = {'size': size, 'n_heads': size, 'completeness': value / 2, 'completeness_low': 0, 'completeness_high': 1}
        row |= {'faithfulness': value, 'faithfulness_low': value - 0.1, 'faithfulness_high': value + 0.1}
        rows.append(row | {'kind': 'circuit', 'draw': 0})
        rows += [row | {'kind': 'random', 'draw': i, 'faithfulness': i * value / 10} for i in range(n_random)]
    return pd.DataFrame(rows)


def _row(words=('[CLS]', 'rust', 'costs', '$5', 'to', '$9'), effects=(0, 2.0, -1.0, 0.5, 0.1, -0.1)):
    return pd.Series({'qid': '1', 'tokens': list(words), 'token_effects': np.asarray(effects, dtype=np.float32)})


def _neurons():
    values = np.arange(30.0).reshape(3, 10)
    frame = pd.DataFrame({'qid': ['x', 'y'], 'docno': 'd', 'completeness_error.neurons': 0.0})
    frame['neurons'] = [values, np.zeros((3, 10))]
    return NeuronEffects.from_frame(frame, pd.DataFrame({'qid': ['x', 'y'], 'docno': 'd', 'label': [1, 0]}))


FIGURES = {
    'circuit': lambda **options: plot.circuit(_circuit(), **options),
    'faithfulness': lambda **options: plot.faithfulness(_curves(), **options),
    'tokens': lambda **options: plot.tokens(_row(), **options),
    'neurons': lambda **options: plot.neurons(_neurons(), p=10, **options),
}


def _legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


# -- all of them


@pytest.mark.parametrize('name', FIGURES)
def test_given_axes_and_title(name):
    figure = Figure(layout='constrained')
    left, right = figure.subplots(1, 2)
    assert FIGURES[name](ax=right, title='TDC') is figure
    assert right.get_title() == 'TDC' and not left.get_title() and not left.collections and not left.patches


@pytest.mark.parametrize('name', FIGURES)
def test_nothing_is_clipped(name):
    figure = FIGURES[name](title='TDC')
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = figure.get_window_extent().size
    renderer = canvas.get_renderer()
    shown = [text for axes in figure.axes for text in [*axes.texts, axes.title]]
    for axes in figure.axes:
        shown += [axes.get_legend()] if axes.get_legend() else []
        shown += [] if not axes.axison else [axes.xaxis.label, axes.yaxis.label]
        for child in axes.child_axes:
            shown += child.texts
    for artist in shown:
        box = artist.get_window_extent(renderer)
        assert box.width == 0 or (box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height), artist


@pytest.mark.parametrize('name', FIGURES)
def test_without_matplotlib(name, monkeypatch):
    real = builtins.__import__

    def missing(module, *args, **kwargs):
        if module.startswith('matplotlib'):
            raise ImportError(module)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', missing)
    with pytest.raises(ImportError, match=r"Run `pip install 'pyterrier-mech\[plot\]'`"):
        FIGURES[name]()


# -- circuit


def test_heads_stand_in_their_cells_with_the_colour_of_their_role():
    axes = plot.circuit(_circuit()).axes[0]
    cells, query, matching = axes.collections
    assert len(cells.get_paths()) == 10
    np.testing.assert_array_equal(query.get_offsets(), [[0.5, 1.5]])
    np.testing.assert_array_equal(matching.get_offsets(), [[1.5, 0.5], [3.5, 2.5]])
    np.testing.assert_allclose([*matching.get_sizes(), *query.get_sizes()], [120, 60, 30])
    assert to_hex(query.get_facecolors()[0]) == '#ffffff' and to_hex(query.get_edgecolors()[0]) == '#0072b2'
    assert {to_hex(colour) for colour in matching.get_facecolors()} == {'#009e73'}
    assert _legend(axes) == ['query-focused', 'matching', 'effect 0.4', 'effect 0.1', 'negative effect']
    assert axes.yaxis_inverted() and [t.get_text() for t in axes.get_yticklabels()] == ['0', '1', '2']


def test_neurons_are_counted_by_layer():
    axes = plot.circuit(_circuit(neurons=[(0, 5), (0, 6), (2, 1)])).axes[0]
    assert [t.get_text() for t in axes.texts] == ['2', '0', '1', 'neurons']


def test_circuits_without_effects_roles_or_grid():
    axes = plot.circuit(Circuit.from_units(['L1H2', 'L0H0'])).axes[0]
    assert axes.get_legend() is None and len(axes.collections[0].get_paths()) == 6
    assert len(set(axes.collections[1].get_sizes())) == 1
    axes = plot.circuit(Circuit.from_units(['L1H2']), head_counts=[4, 4, 4]).axes[0]
    assert len(axes.collections[0].get_paths()) == 12
    named = _circuit(roles=['copies', 'matching', 'copies'])
    assert _legend(plot.circuit(named).axes[0])[:2] == ['matching', 'copies']
    only = plot.circuit(Circuit.from_units(['L1N3']), head_counts=[2, 2]).axes[0]
    assert [t.get_text() for t in only.texts] == ['0', '1', 'neurons']


def test_circuit_errors():
    with pytest.raises(ValueError, match=r'head_counts=\[2, 2\] has no head 3 in layer 2'):
        plot.circuit(_circuit(), head_counts=[2, 2])
    with pytest.raises(ValueError, match='give head_counts='):
        plot.circuit(Circuit.from_units(['L0N1']))


# -- faithfulness


def test_curves_and_bands():
    axes = plot.faithfulness(_curves()).axes[0]
    own, random = axes.lines[:2]
    np.testing.assert_allclose(own.get_xydata(), [[s, s / 8] for s in (0, 1, 2, 4, 8)])
    np.testing.assert_allclose(random.get_ydata(), [s / 80 for s in (0, 1, 2, 4, 8)])
    band, spread = (collection.get_paths()[0].vertices for collection in axes.collections)
    assert band[:, 1].min() == pytest.approx(-0.1) and band[:, 1].max() == pytest.approx(1.1)
    assert spread[:, 1].max() == pytest.approx(0.2)
    assert _legend(axes) == ['circuit', '3 random circuits: mean, range']
    assert axes.get_xlabel() == 'heads in the circuit'
    assert [t.get_text() for t in axes.get_xticklabels()] == ['0', '1', '2', '4', '8']


def test_completeness_and_no_random():
    axes = plot.faithfulness(_curves(0), column='completeness').axes[0]
    assert axes.lines[0].get_ydata().tolist() == [0, 1 / 16, 1 / 8, 1 / 4, 1 / 2] and _legend(axes) == ['circuit']
    assert 'goes with the circuit' in axes.get_ylabel()
    of_neurons = plot.faithfulness(_curves(0).assign(n_heads=0)).axes[0]
    assert of_neurons.get_xlabel() == 'neurons in the circuit'


def test_faithfulness_errors():
    with pytest.raises(ValueError, match="column must be one of .*; got column='size'"):
        plot.faithfulness(_curves(), column='size')
    with pytest.raises(ValueError, match=r"no \['kind'\]: give what faithfulness"):
        plot.faithfulness(_curves().drop(columns='kind'))
    with pytest.raises(ValueError, match='no rows'):
        plot.faithfulness(_curves().iloc[:0])


# -- tokens


def test_words_are_shaded_symmetric_around_zero():
    figure = plot.tokens(_row())
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.texts] == ['[CLS]', 'rust', 'costs', '$5', 'to', '$9']
    zero, up, down = (patch.get_facecolor() for patch in axes.patches[:3])
    assert up[2] > up[0] and down[0] > down[2] and min(zero[:3]) > 0.9
    bar = axes.child_axes[0]
    assert [t.get_text() for t in bar.get_xticklabels()] == ['\u22122', '0', '2']


def test_lines_break_between_words():
    words = ['word'] * 60 + ['a' * 150]
    figure = plot.tokens(_row(words, np.zeros(61)), width=4)
    axes = figure.axes[0]
    FigureCanvasAgg(figure).draw()
    edges = [(p.get_x() + p.get_width(), p.get_y()) for p in axes.patches]
    assert max(x for x, _ in edges[:-1]) <= 72 * 4 - 16
    assert len({y for _, y in edges}) > 4 and edges[-1][1] < edges[-2][1]
    renderer = figure.canvas.get_renderer()
    for text, patch in zip(axes.texts[:-1], axes.patches[:-1], strict=True):
        inner, outer = text.get_window_extent(renderer), patch.get_window_extent(renderer)
        assert outer.x0 <= inner.x0 and inner.x1 <= outer.x1
    assert figure.get_figheight() > plot.tokens(_row()).get_figheight()


def test_one_row_frames_and_mappings():
    frame = pd.DataFrame([_row()])
    assert len(plot.tokens(frame).axes[0].texts) == len(plot.tokens(dict(_row())).axes[0].texts) == 6


@pytest.mark.parametrize(
    ('row', 'message'),
    [
        (pd.DataFrame([_row(), _row()]), 'A frame of 2 rows is not one row'),
        (_row().drop('token_effects'), "no 'token_effects': give one that AttributeTokens returned"),
        (_row(['a'], [1, 2]), r'1 words and effects of shape \(2,\)'),
        (_row(['a'], [np.nan]), 'a finite effect for each word'),
        (_row([], []), '0 words'),
    ],
)
def test_token_errors(row, message):
    with pytest.raises(ValueError, match=message):
        plot.tokens(row)


# -- neurons


def test_shares_of_layers():
    # The three largest of thirty are in the last layer, the three smallest in the first.
    axes = plot.neurons(_neurons(), p=10).axes[0]
    top, bottom = axes.containers
    np.testing.assert_allclose([bar.get_height() for bar in top], [0, 0, 100])
    np.testing.assert_allclose([bar.get_height() for bar in bottom], [100, 0, 0])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), 100 / 3)
    assert _legend(axes) == ['top 10 %', 'bottom 10 %', 'if spread evenly']


def test_neuron_errors():
    with pytest.raises(ValueError, match='p must be a percentage.*got p=0'):
        plot.neurons(_neurons(), p=0)
