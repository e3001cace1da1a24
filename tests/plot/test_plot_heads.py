from __future__ import annotations

import builtins

import numpy as np
import pandas as pd
import pytest
from toys import analysed

from pyterrier_mech import plot
from pyterrier_mech.results import HeadEffects

matplotlib = pytest.importorskip('matplotlib')

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


def _effects(matrix: list[list[float]], **options) -> HeadEffects:
    """Effects whose ratio is ``matrix`` with an interval of no width, and whose mean is twice that."""
    return HeadEffects.from_frame(_frame(matrix), **options)


def _frame(matrix: list[list[float]]) -> pd.DataFrame:
    heads = {f'L{i}H{j}': 2 * value for i, row in enumerate(matrix) for j, value in enumerate(row)}
    return analysed(
        pd.DataFrame([{'qid': q, 'docno': 'd', 'score_original': 1.0, 'score_perturbed': 3.0, **heads} for q in 'abc'])
    )


UNEVEN = [[0.1, -0.5, 0.0], [0.25], [0.0, 0.02]]


def _texts(axes) -> dict[tuple[int, int], str]:
    return {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in axes.texts}


def test_cells_show_the_matrix_symmetric_around_zero():
    figure = plot.heads(_effects(UNEVEN))
    axes, bar = figure.axes
    mesh = axes.collections[0]
    np.testing.assert_allclose(
        np.ma.filled(mesh.get_array(), np.nan),
        [[0.1, -0.5, 0.0], [0.25, np.nan, np.nan], [0.0, 0.02, np.nan]],
    )
    assert mesh.get_clim() == (-0.5, 0.5)
    assert ' '.join(bar.get_ylabel().split()) == 'share of the score change carried by the head'
    assert (axes.get_xlabel(), axes.get_ylabel()) == ('head', 'layer')
    assert [t.get_text() for t in axes.get_yticklabels()] == ['0', '1', '2']
    assert [t.get_text() for t in axes.get_xticklabels()] == ['0', '1', '2']


def test_layer_0_is_on_top_and_blue_is_positive():
    figure = plot.heads(_effects([[0.5, -0.5]]))
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    assert axes.yaxis_inverted()
    positive, negative = axes.collections[0].get_facecolors()[:, :3]
    assert positive[2] > positive[0] and negative[0] > negative[2]


def test_dots_mark_heads_whose_interval_excludes_zero():
    axes = plot.heads(_effects(UNEVEN)).axes[0]
    dots = {(int(y), int(x)) for x, y in axes.collections[1].get_offsets()}
    assert dots == {(0, 0), (0, 1), (1, 0), (2, 1)}
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ['95% interval excludes 0', 'no data']


def test_legend_names_only_what_is_there():
    axes = plot.heads(_effects([[0.1, 0.2]], confidence=0.995)).axes[0]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ['99.5% interval excludes 0']
    assert plot.heads(_effects([[0.0, 0.0]])).axes[0].get_legend() is None


def test_strongest_heads_are_labelled():
    assert _texts(plot.heads(_effects(UNEVEN), annotate=2).axes[0]) == {(0, 1): '\u22120.50', (1, 0): '0.25'}
    assert _texts(plot.heads(_effects(UNEVEN), annotate=0).axes[0]) == {}
    # Heads that do nothing stay bare.
    assert len(_texts(plot.heads(_effects(UNEVEN), annotate=99).axes[0])) == 4


@pytest.mark.parametrize('largest, text', [(30.0, '30'), (3.14159, '3.1'), (0.5, '0.50'), (0.012345, '.012')])
def test_labels_have_two_digits(largest, text):
    assert _texts(plot.heads(_effects([[largest, 0.0]])).axes[0]) == {(0, 0): text}


def test_mean():
    axes, bar = plot.heads(_effects(UNEVEN), column='mean', annotate=1).axes
    assert bar.get_ylabel() == 'mean score change (logits)'
    assert _texts(axes) == {(0, 1): '\u22121.0'}


def test_frame_of_patch_heads():
    frame = _frame(UNEVEN)
    mine, theirs = (plot.heads(x).axes[0].collections[0].get_array() for x in (frame, HeadEffects.from_frame(frame)))
    np.testing.assert_array_equal(mine, theirs)


def test_given_axes_and_title():
    figure = Figure(layout='constrained')
    left, right = figure.subplots(1, 2)
    assert plot.heads(_effects(UNEVEN), ax=right, title='TDC') is figure
    assert right.get_title() == 'TDC'
    assert not left.collections and not left.get_title()


def test_given_axes_of_a_subfigure():
    figure = Figure(layout='constrained')
    assert plot.heads(_effects(UNEVEN), ax=figure.subfigures(1, 2)[1].subplots()) is figure


@pytest.mark.parametrize('shape', [(1, 1), (6, 12), (24, 16), (32, 32)])
def test_nothing_is_clipped_and_values_fit_their_cells(shape):
    matrix = np.random.default_rng(0).normal(size=shape)
    figure = plot.heads(_effects((-np.abs(matrix) / 10).tolist()), title='TDC')
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    axes, bar = figure.axes
    width, height = figure.get_window_extent().size
    for artist in [axes, axes.title, axes.xaxis.label, axes.yaxis.label, axes.get_legend(), bar.yaxis.label]:
        box = artist.get_window_extent(renderer)
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, artist
    cell = axes.get_window_extent().width / shape[1]
    assert max(t.get_window_extent(renderer).width for t in axes.texts) <= cell


def test_without_matplotlib(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith('matplotlib'):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', missing)
    with pytest.raises(ImportError, match=r"Run `pip install 'pyterrier-mech\[plot\]'`"):
        plot.heads(_effects(UNEVEN))


def test_errors():
    with pytest.raises(ValueError, match=r"column must be one of \['ratio', 'mean'\]; got column='n'"):
        plot.heads(_effects(UNEVEN), column='n')
    frame = _frame(UNEVEN).assign(score_perturbed=1.0)
    with pytest.warns(UserWarning, match='is NaN'):
        effects = HeadEffects.from_frame(frame)
    with pytest.raises(ValueError, match="No head has a ratio: all are NaN. Draw column='mean'"):
        plot.heads(effects)
    assert plot.heads(effects, column='mean').axes
