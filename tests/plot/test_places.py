"""Figures of places in the text and of paths: what stands in which cell, and what cannot be drawn."""

import numpy as np
import pandas as pd
import pytest
from inside import Analysis

from pyterrier_mech import Circuit, LayerEffects, PathEffects, plot
from pyterrier_mech.prune import UnitScores

matplotlib = pytest.importorskip('matplotlib')

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import FancyArrowPatch  # noqa: E402

SETTINGS = {'direction': 'perturbed_to_original', 'effect': 'difference'}
PAIRS = pd.DataFrame({'qid': list('abc'), 'docno': 'd', 'score_original': 1.0, 'score_perturbed': 3.0})


def noted(columns, by='PatchLayers'):
    frame = PAIRS.assign(**{name: 2 * value for name, value in columns.items()})
    return frame.assign(analysis=str(Analysis(by, SETTINGS, list(columns))))


BLOCKS = {
    'resid_pre.L0.cls': 0.1, 'resid_pre.L1.cls': 0.2, 'resid_pre.L0.$x$': 0.8, 'resid_pre.L1.$x$': -0.4,
    'mlp_out.L0.cls': 0.0, 'mlp_out.L1.cls': 0.3, 'mlp_out.L1.$x$': 0.5,
}  # fmt: skip
PATHS = {
    'L0H0>score': 0.4, 'L0H2>score': 0.1, 'L1H1>score': -0.2, 'L0H0>L1H1.k': 0.3, 'L0H0>L1H1.q': 0.1,
    'L0H2>L2H0.v': 0.2, 'L1H1>L2H0.v': -0.1,
}  # fmt: skip


def position_row(**changes):
    tokens = ['[CLS]', 'rust', '[SEP]', 'iron', 'and', '$5', '[SEP]']
    kinds = ['cls', 'query', 'sep', 'doc_other', 'doc_other', 'inserted', 'sep']
    row = {'position_tokens': tokens, 'position_types': kinds}
    row |= {'resid_pre.L0': np.asarray([0, 1, 0, 0, 0, -4, 0]), 'resid_pre.L1': np.asarray([3, 2, 0, 0, 0, 0, 0.5])}
    row |= {'attn_out.L0': np.zeros(7), 'attn_out.L1': np.ones(7) / 10}
    return pd.Series({**row, **changes})


def attention_row():
    first, second = np.full((4, 4), 0.05), np.full((4, 4), 0.05)
    first[1, 2], second[3, 1] = 0.9, 0.8
    tokens = {'attention_tokens_0': ['[CLS]', 'a', 'b', 'c'], 'attention_tokens': ['[CLS]', 'a', 'b', '$d$']}
    return {'attention.L2H9': second, 'attention_0.L2H9': first, **tokens}


def matrix(ax):
    return np.ma.filled(ax.collections[0].get_array(), np.nan)


def ticks(ax, side='x'):
    return [label.get_text() for label in getattr(ax, f'get_{side}ticklabels')()]


def unit_scores():
    return UnitScores([np.asarray([1.0, 2.0]), np.asarray([3.0])], [np.arange(5.0), np.arange(8.0)])


PANELS = {
    'layers': lambda **options: plot.layers(noted(BLOCKS), **options),
    'layers of a row': lambda **options: plot.layers(position_row(), **options),
    'attention': lambda **options: plot.attention(attention_row(), 'L2H9', **options),
    'importance': lambda **options: plot.importance(unit_scores(), **options),
}


@pytest.mark.parametrize('name', PANELS)
def test_figures_of_panels_go_into_a_part_of_a_figure_with_literal_texts(name):
    whole = Figure(figsize=(12, 6), layout='constrained')
    left, right = whole.subfigures(1, 2)
    assert PANELS[name](figure=right, title='$5 or $6') is whole
    assert right.axes and not left.axes
    FigureCanvasAgg(whole).draw()
    assert right._suptitle.get_text() == '$5 or $6' and not right._suptitle.get_parse_math()
    labels = [label for axes in right.axes for label in axes.get_xticklabels() if '$' in label.get_text()]
    assert not any(label.get_parse_math() for label in labels)


@pytest.mark.parametrize('name', PANELS)
def test_nothing_is_clipped(name):
    figure = PANELS[name](title='TDC')
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = figure.get_window_extent().size
    for axes in figure.axes:
        box = axes.get_tightbbox(canvas.get_renderer())
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1


def test_panels_are_sites_with_common_colours():
    first, second, bar = plot.layers(LayerEffects.from_frame(noted(BLOCKS))).axes
    np.testing.assert_allclose(matrix(first), [[0.1, 0.8], [0.2, -0.4]])
    np.testing.assert_allclose(matrix(second), [[0.0, np.nan], [0.3, 0.5]])
    assert first.collections[0].get_clim() == second.collections[0].get_clim() == pytest.approx((-0.8, 0.8))
    assert (first.get_title(), second.get_title()) == ('residual stream', 'feed-forward')
    assert ticks(first) == ['cls', '$x$'] and ticks(first, 'y') == ['0', '1'] and first.yaxis_inverted()
    assert 'share of the score change' in bar.get_ylabel()
    heads = noted({'L0H3.query': 0.5, 'L2H1.query': 0.2}, 'PatchHeads')
    assert ticks(plot.layers(heads).axes[0], 'y') == ['L0H3', 'L2H1']


def test_what_is_drawn_of_one_row():
    first, second, bar = plot.layers(position_row(), n_tokens=4).axes
    np.testing.assert_allclose(matrix(first), [[0, 1, -4, 0], [3, 2, 0, 0.5]])
    assert ticks(second) == ['[CLS]', 'rust', '$5', '[SEP]'] and second.get_xlabel().startswith('4 of 7 positions')
    assert second.get_xticklabels()[2].get_fontweight() == 'bold'
    assert [line.get_xdata()[0] for line in second.lines] == [2]  # where tokens are left out
    assert [text.get_text() for text in first.texts] == ['query', 'text']
    assert bar.get_ylabel() == 'score change (logits)'
    assert len(plot.layers(dict(position_row())).axes) == 3
    note = str(Analysis('PatchLayers', {'effect': 'normalized'}, ['resid_pre.L0']))
    assert plot.layers(position_row(analysis=note)).axes[-1].get_ylabel() == 'share of the score change'


def test_errors_of_layers():
    with pytest.raises(ValueError, match="no 'position_tokens', 'position_types': give one that PatchLayers"):
        plot.layers(noted(BLOCKS).iloc[0])
    with pytest.raises(ValueError, match='no arrays with one effect for each'):
        plot.layers(position_row(**{'attn_out.L0': np.zeros(3)}))
    with pytest.raises(ValueError, match='All effects of the row are NaN or 0'):
        plot.layers(
            position_row(**{f'{s}.L{i}': np.full(7, np.nan) for s in ('resid_pre', 'attn_out') for i in (0, 1)})
        )
    with pytest.raises(ValueError, match="column must be one of .*got column='n'"):
        plot.layers(noted(BLOCKS), column='n')


def test_attention_of_both_versions():
    first, second, _ = plot.attention(attention_row(), 'L2H9', n_tokens=3).axes
    np.testing.assert_allclose(matrix(first), [[0.05, 0.9, 0.05], [0.05] * 3, [0.05] * 3])
    np.testing.assert_allclose(matrix(second), [[0.05] * 3, [0.05] * 3, [0.8, 0.05, 0.05]])
    assert first.collections[0].get_clim() == second.collections[0].get_clim() == (0, 0.9)
    assert ticks(first) == ['a', 'b', 'c'] and ticks(second, 'y') == ['a', 'b', '$d$']
    assert [label.get_fontweight() for label in second.get_xticklabels()] == ['normal', 'normal', 'bold']
    assert (first.get_title(), second.get_title()) == ('original', 'perturbed')
    one = {name: value for name, value in attention_row().items() if '_0' not in name}
    assert len(plot.attention(pd.DataFrame([one]), 'L2H9').axes) == 2


def test_attention_of_one_sequence_of_a_bi_encoder():
    row = {
        f'{name}.text' if 'tokens' in name else name.replace('.', '.text.'): v for name, v in attention_row().items()
    }
    assert len(plot.attention(row, 'text.L2H9').axes) == 3
    with pytest.raises(ValueError, match="no attention of L2H9.*name the sequence too: 'text.L2H9'"):
        plot.attention(row, 'L2H9')


def test_errors_of_attention():
    with pytest.raises(ValueError, match='no attention of L1H1: give one that AttentionPatterns'):
        plot.attention(attention_row(), 'L1H1')
    with pytest.raises(ValueError, match=r'attention.L2H9 of shape .2, 2. does not fit 4 tokens'):
        plot.attention({**attention_row(), 'attention.L2H9': np.zeros((2, 2))}, 'L2H9')
    with pytest.raises(ValueError, match='All attention of L2H9 is NaN in this row: look at its column attention_al'):
        plot.attention({**attention_row(), 'attention.L2H9': np.full((4, 4), np.nan)}, 'L2H9')
    with pytest.raises(ValueError, match='A frame of 2 rows is not one row'):
        plot.attention(pd.DataFrame([attention_row()] * 2), 'L2H9')


def test_paths_to_one_receiver_and_to_several():
    effects = PathEffects.from_frame(noted(PATHS, 'PatchPaths'))
    grid = plot.paths(effects, receiver='score').axes[0]
    np.testing.assert_allclose(matrix(grid), [[0.4, np.nan, 0.1], [np.nan, -0.2, np.nan]])
    assert grid.get_title() == 'to the score'
    several = plot.paths(effects).axes[0]
    assert ticks(several) == ['L0H0', 'L0H2', 'L1H1'] and ticks(several, 'y') == ['L1H1.k', 'L1H1.q', 'L2H0.v']
    np.testing.assert_allclose(matrix(several), [[0.3, *[np.nan] * 2], [0.1, *[np.nan] * 2], [np.nan, 0.2, -0.1]])
    few = plot.paths(effects, n_senders=1, n_receivers=2).axes[0]
    assert ticks(few) == ['L0H0'] and ticks(few, 'y') == ['L1H1.k', 'L2H0.v']
    only = plot.paths(noted({'L0H1>score': 0.5}, 'PatchPaths')).axes[0]
    assert matrix(only).shape == (1, 2)
    with pytest.raises(ValueError, match='receiver must be one of'):
        plot.paths(effects, receiver='L2H0')


def test_arrows_of_a_circuit():
    heads = pd.DataFrame({'name': ['L0H0', 'L1H1'], 'effect': [0.5, 0.2]})
    edges = {'L0H0>L1H1.q': 0.3, 'L0H0>L1H1.k': 0.1, 'L1H1>score': -0.6}
    table = pd.DataFrame({'name': list(edges), 'effect': list(edges.values())})
    axes = plot.circuit(Circuit.of_tables(heads, edges=table), head_counts=[2, 2]).axes[0]
    arrows = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
    assert [to_hex(arrow.get_edgecolor()) for arrow in arrows] == ['#2166ac', '#b2182b']
    assert [round(arrow.get_linewidth(), 6) for arrow in arrows] == [1.5, 2.5]
    assert {text.get_text() for text in axes.texts} == {'k q', 'score'}
    one = plot.circuit(Circuit.of_tables(heads, edges=table), head_counts=[2, 2], n_edges=0).axes[0]
    assert not one.texts and not one.patches


# -- scores, overlaps, pruning


def test_points_of_scores():
    frame = pd.DataFrame(
        {'qid': ['a', 'a', 'b', 'c'], 'score_original': [0, 1, 1, 1.0], 'score_perturbed': [1, 0, 1, np.nan]}
    )
    axes = plot.scores(frame).axes[0]
    assert [c.get_offsets().tolist() for c in axes.collections] == [[[0, 1]], [[1, 0]], [[1, 1]]]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ['up: 1 pairs', 'down: 1 pairs', 'equal: 1 pairs']
    by_query = plot.scores(frame.assign(score_perturbed=[2, 2, 0, 5.0]), by='query').axes[0]
    np.testing.assert_allclose(by_query.lines[1].get_ydata(), [-1, 1.5, 4])
    for message, call in {
        "by must be one of .*got by='x'": lambda: plot.scores(frame, by='x'),
        "no 'score_original'": lambda: plot.scores(frame.drop(columns='score_original')),
        'None of the 0 rows has both': lambda: plot.scores(frame.iloc[:0]),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_lines_of_retention():
    rows = [('A', 0.5, 0.8), ('A', 0.1, 1.0), ('B', 0.5, 0.7)]
    table = pd.DataFrame(rows, columns=['criterion', 'sparsity', 'retention'])
    table = table.assign(retention_low=0.5, retention_high=1.1, measure='nDCG@10')
    axes = plot.retention(table, by='criterion').axes[0]
    assert [line.get_ydata().tolist() for line in axes.lines[:2]] == [[1.0, 0.8], [0.7]]
    assert axes.get_ylabel() == 'share of nDCG@10 kept' and ticks(axes) == ['0.1', '0.5']
    with pytest.raises(ValueError, match='Several rows have sparsity=0.5'):
        plot.retention(table)
    with pytest.raises(ValueError, match="has no 'sparsity': give stats.compare"):
        plot.retention(table.drop(columns='sparsity'), by='criterion')
    with pytest.raises(ValueError, match='has no rows'):
        plot.retention(table.iloc[:0])
    many = pd.concat([table[table['criterion'] == 'B'].assign(criterion=str(i)) for i in range(9)])
    with pytest.raises(ValueError, match='9 values, and 7 lines'):
        plot.retention(many, by='criterion')


def test_boxes_of_importance():
    heads, neurons = plot.importance(unit_scores()).axes
    assert (heads.get_title(), neurons.get_title()) == ('heads', 'neurons')
    assert heads.collections[0].get_offsets().tolist() == [[0, 1], [0, 2], [1, 3]]
    medians = [line.get_ydata()[0] for line in neurons.lines if line.get_linewidth() == 1.5]
    assert medians == [2.0, 3.5]
    frame = unit_scores().to_frame()
    assert len(plot.importance(frame[frame['kind'] == 'head']).axes) == 1
    with pytest.raises(ValueError, match="no 'score'"):
        plot.importance(frame.drop(columns='score'))
