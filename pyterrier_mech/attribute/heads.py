"""Attribution of attention heads by gradients, as a pipeline stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import pearsonr, spearmanr

from pyterrier_mech.anatomy.model import Values
from pyterrier_mech.attribute.gradients import with_gradients, without_gradients
from pyterrier_mech.attribute.lines import Baseline, Line, check_baseline, lines
from pyterrier_mech.attribute.path import Rule, integrate, not_finite
from pyterrier_mech.attribute.points import GRAPH
from pyterrier_mech.attribute.relp import linearised
from pyterrier_mech.frames import row_names, texts_of, two_versions, with_columns
from pyterrier_mech.inputs.batching import collected
from pyterrier_mech.inputs.inputs import ORIGINAL, PERTURBED, Inputs
from pyterrier_mech.patch.engine import traced
from pyterrier_mech.patch.heads import PatchHeads
from pyterrier_mech.patch.pairs import PATCHABLE, no_pairs, pair_columns, started
from pyterrier_mech.patch.patching import DIRECTIONS
from pyterrier_mech.provenance import Analysis, noted
from pyterrier_mech.rankers.ranker import as_numpy
from pyterrier_mech.stage import Keeping, ModelStage, choice, units
from pyterrier_mech.units import HEADS, Unit

PAIRED = ('attribution_patching', 'trapezoid', 'relp')
SINGLE = ('gradient', 'integrated_gradients')
EXACT = '.exact'
ERROR = 'completeness_error.heads'
Tensors = list[torch.Tensor]


@dataclass(eq=False, repr=False)
class AttributeHeads(Keeping, ModelStage):
    """How much each attention head carries, by gradients: an estimate of `PatchHeads`, or a share of the score itself.

    z is the output of a head, z′ what it gives for the perturbed pair, s the score; products are summed over all
    positions and the width of the head. With a second text:

    - 'attribution_patching': (z′ − z) · ∂s/∂z at the original pair, the first-order estimate of the patched score;
    - 'trapezoid': the same with the average of the gradients at both pairs;
    - 'relp': the same with the scale of every LayerNorm, the ratio of output and input of every activation and the
      attention probabilities held constant (a gate and what it multiplies get half the gradient each); the
      classification head, or the similarity, keeps its gradient.

    All three are first-order estimates, poor where the score is flat: a head that lifts a pair off the floor of a
    saturated score is underestimated, and averages over pairs inherit that. `verify` says by how much.

    Without one:

    - 'gradient': z · ∂s/∂z;
    - 'integrated_gradients': ∫ ∂s/∂z · dz along the line of word embeddings from a baseline, as `AttributeNeurons`.

    **Input columns**: qid, query, docno, text, and with a second text what `Perturb` wrote: text_0, query_0, or both.

    **Output columns**: the same and one float column a head, `L{layer}H{head}`, in raw logits; and `analysis`, which
    says how they were made. With a second text also `score_original`, `score_perturbed` and `patchable`, as
    `PatchHeads` writes them; otherwise `score_plain`, and for integrated gradients `completeness_error.heads`. With
    `verify`, `L{layer}H{head}.exact` for the heads that were patched too. The ranking is kept.

    Args:
        model: A ranker.
        method: One of the above.
        heads: The heads, as `Units.of` accepts them: names ('L3H7'), (layer, head), `Units`, a circuit; by default
            all.
        direction: 'perturbed_to_original', or 'original_to_perturbed': the effect of the original's heads in the
            perturbed pair. With a second text only.
        filler: Token that stands where one side has none; see `PatchHeads`.
        baseline: Where integrated gradients begin; see `AttributeNeurons`.
        points: Points of their grid, both ends included.
        verify: How many heads are patched exactly as well: those with the largest sum of absolute effects over
            the frame. See `agreement`.
        batch_tokens: Tokens of one batch, each counted four times for the memory of its graph; by default as the model
            has it.
        text_field: Column of the text; by default as the model has it.
        verbose: Shows a progress bar; by default as the model has it.

    Raises:
        TypeError: If the model is not a ranker.
        ValueError: If a setting is not known, a head does not exist, the method does not fit the model, or a gradient
            is not finite.

    Source: attribution patching: Syed, Rager, Conmy 2023, arXiv 2310.10348; RelP: arXiv 2508.21258.
    """

    method: str = choice([*PAIRED, *SINGLE])
    _: KW_ONLY
    heads: Any = units([HEADS], default=None)
    direction: str = choice(DIRECTIONS)
    filler: str | None = 'a'
    baseline: Baseline = 'query'
    points: int = 17
    verify: int = 0

    def check(self) -> None:
        """Checks the settings, before any work."""
        super().check()
        if self.points < 2:
            raise ValueError(f'points must be 2 or more, for a grid has two ends; got {self.points}')
        check_verify(self.verify, self.method not in SINGLE, f'method={self.method!r}')
        check_baseline(self.baseline)

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Attributes the score, or its change, of every row."""
        self.check()
        if self.method in PAIRED:
            return self._verified(self._paired(inp))
        texts_of(inp, self, self.text)
        heads = self.chosen('heads')
        columns = (self._gradient if self.method == 'gradient' else self._integrated)(inp, heads)
        settings = {'baseline': str(self.baseline)} if self.method != 'gradient' else {}
        return with_columns(inp, columns, self._analysis(heads, settings))

    def _analysis(self, heads: list[Unit], settings: dict[str, Any]) -> Analysis:
        settings = {'method': self.method, **settings, 'model': noted(self.model)}
        return Analysis('AttributeHeads', settings, [unit.name for unit in heads])

    # -- with a second text

    def _paired(self, inp: pd.DataFrame) -> pd.DataFrame:
        versions = two_versions(inp, self, self.text)
        heads = self.chosen('heads')
        names = [unit.name for unit in heads]
        analysis = self._analysis(heads, {'direction': self.direction, 'effect': 'difference', 'filler': self.filler})
        if not len(inp):
            return with_columns(inp, no_pairs(names), analysis)
        inputs = Inputs.pairs(self.model, *versions, self.filler)
        table = started(self.model, inputs, versions, len(heads))
        if len(inputs.good):
            values = self._run(
                inputs.lengths[inputs.good], lambda rows: self._effects(inputs, inputs.good[rows], heads)
            )
            self._check_finite(inp, values, inputs.good)
            table[:, inputs.good] = values
        return with_columns(inp, pair_columns(table, inputs.problems, names), analysis)

    def _effects(self, inputs: Inputs, rows: np.ndarray, heads: list[Unit]) -> np.ndarray:
        """Returns [original score, perturbed score, heads…] x pairs."""
        base, source = (ORIGINAL, PERTURBED)[:: 1 if self.direction == DIRECTIONS[0] else -1]
        score, z, gradients = self._with_gradients(inputs, rows, base, self.method == 'relp')
        if self.method == 'trapezoid':
            other, target, more = self._with_gradients(inputs, rows, source)
            gradients = [(g + h) / 2 for g, h in zip(gradients, more, strict=True)]
        else:
            with self.model.computing():
                other, target = self._without_gradients(inputs, rows, source)
        products = [(b - a) * g for a, b, g in zip(z, target, gradients, strict=True)]
        scores = [score, other] if base == ORIGINAL else [other, score]
        return as_numpy(torch.stack([*scores, *self._by_head(products, heads)]))

    def _verified(self, res: pd.DataFrame) -> pd.DataFrame:
        """Adds the exact effects of the strongest heads."""
        if not self.verify:
            return res
        heads = self.chosen('heads')
        chosen = sorted(heads[i] for i in strongest(res, [unit.name for unit in heads], self.verify))
        shared = {
            name: getattr(self, name) for name in ('direction', 'filler', 'batch_tokens', 'text_field', 'verbose')
        }
        good = (res['patchable'] == PATCHABLE).to_numpy()
        values = np.full((len(res), len(chosen)), np.nan, dtype=self.model.float_type if len(res) else 'float32')
        if good.any():
            exact = PatchHeads(self.model, heads=chosen, **shared).transform(res[good])
            values[good] = exact[[unit.name for unit in chosen]].to_numpy()
        return res.assign(**{unit.name + EXACT: values[:, i] for i, unit in enumerate(chosen)})

    # -- without one

    def _gradient(self, inp: pd.DataFrame, heads: list[Unit]) -> dict[str, Any]:
        if not len(inp):
            return _no_scores(heads)
        inputs = Inputs.plain(self.model, *texts_of(inp, self, self.text).values())

        def step(rows: np.ndarray) -> np.ndarray:
            score, z, gradients = self._with_gradients(inputs, rows, ORIGINAL)
            products = [a * g for a, g in zip(z, gradients, strict=True)]
            return as_numpy(torch.stack([score, *self._by_head(products, heads)]))

        table = self._run(inputs.lengths, step)
        self._check_finite(inp, table, np.arange(len(inp)))
        return _scores(table, heads)

    def _integrated(self, inp: pd.DataFrame, heads: list[Unit]) -> dict[str, Any]:
        if not len(inp):
            return _no_scores(heads) | {ERROR: np.zeros(0, dtype=np.float32)}
        model = self.model
        table = np.empty((1 + len(heads), len(inp)), dtype=model.float_type)
        errors = np.zeros(len(inp), dtype=model.float_type)

        def reduce(line: Line, layers: Tensors) -> np.ndarray:
            values = self._by_head([layer[None] for layer in layers], heads)
            return as_numpy(torch.stack(values)[:, 0]) if values else np.zeros(0)  # a pruned model may have no heads

        for result in integrate(
            model,
            lines(model, texts_of(inp, self, self.text), self.baseline, row_names(inp)),
            site=HEADS,
            rule=Rule('trapezoid', self.points, np.inf, self.points),
            reduce=reduce,
            budget=self.budget,
            verbose=self.shows,
            desc='AttributeHeads',
        ):
            table[0, result.row], table[1:, result.row] = result.score, result.value
            errors[result.row] = result.error
        return _scores(table, heads) | {ERROR: errors}

    # -- runs

    def _run(self, tokens: np.ndarray, step: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Returns what `step` makes of all rows, with gradients."""
        with self.model.computing(gradients=True):
            return collected(GRAPH * tokens, self.budget, step, verbose=self.shows, desc='AttributeHeads')

    def _with_gradients(
        self, inputs: Inputs, rows: np.ndarray, side: str, relp: bool = False
    ) -> tuple[torch.Tensor, Tensors, Tensors]:
        """Returns the scores [pairs], and z and ∂s/∂z of every tower and layer [pairs, tokens, heads·d_h]."""
        model = self.model
        if not relp:
            scores, z, gradients = with_gradients(model, inputs, rows, side, model.map.sites(HEADS))
            return scores, _listed(z), _listed(gradients)
        vectors, outputs = [], []
        for tower in range(len(inputs.towers)):
            with model.computing():
                run = traced(model.map, inputs, tower, rows, side)
            hidden, z_of_tower = linearised(model.map, run)
            vectors.append(model.readout.represent(hidden, run.batch.scored))
            outputs.extend(z_of_tower)
        scores = model.read(vectors)
        found = torch.autograd.grad(scores.sum(), outputs)
        return scores.detach(), [value.detach() for value in outputs], list(found)

    def _without_gradients(self, inputs: Inputs, rows: np.ndarray, side: str) -> tuple[torch.Tensor, Tensors]:
        """Returns the scores [pairs] and z of every tower and layer."""
        scores, z = without_gradients(self.model, inputs, rows, side, self.model.map.sites(HEADS))
        return scores, _listed(z)

    def _by_head(self, products: Tensors, heads: list[Unit]) -> Tensors:
        """Sums [pairs, tokens, heads·d_h] of every tower and layer to one [pairs] a head."""
        layers = self.model.map.layers
        sums = [layer.float().sum(1) if layer.element_size() < 4 else layer.sum(1) for layer in products]
        by_layer = [torch.stack(sums[i :: len(layers)]).sum(0) for i in range(len(layers))]
        return [by_layer[site.layer][:, layers[site.layer].columns(number)].sum(1) for site, number in heads]

    def _check_finite(self, inp: pd.DataFrame, table: np.ndarray, rows: np.ndarray) -> None:
        bad = rows[~np.isfinite(table).all(axis=0)]
        if len(bad):
            raise not_finite([row_names(inp)[row] for row in bad], self.model)


def _listed(towers: Sequence[Values]) -> Tensors:
    return [value for tower in towers for value in tower.values()]


def check_verify(verify: int, possible: bool, setting: str) -> None:
    """Checks the number of columns that are patched exactly as well.

    Raises:
        ValueError: If it is negative, or there are no such columns.
    """
    if verify < 0 or (verify and not possible):
        raise ValueError(
            f'verify must be 0 or more, and 0 where a column is not the estimate of one patched score; got '
            f'verify={verify} with {setting}'
        )


def strongest(frame: pd.DataFrame, names: Sequence[str], k: int) -> list[int]:
    """Returns which k columns have the largest sum of absolute values."""
    strength = np.nansum(np.abs(frame[list(names)].to_numpy(dtype=np.float64)), axis=0)
    return np.argsort(-strength, kind='stable')[:k].tolist()


def agreement(frame: pd.DataFrame) -> dict[str, float]:
    """Compares the estimates of a frame with the exact effects that `verify` added, over all its rows and such heads.

    Returns:
        `n` (pairs of numbers), `pearson`, `spearman` (NaN below two or where one side is constant) and `max_error`,
        the largest difference, in raw logits.

    Raises:
        ValueError: If the frame has no exact effects.
    """
    names = [name.removesuffix(EXACT) for name in frame.columns if isinstance(name, str) and name.endswith(EXACT)]
    if not names:
        raise ValueError(
            f'no column ends in {EXACT!r}: give AttributeHeads(model, verify=10), or another stage that estimates,'
        )
    estimate = frame[names].to_numpy(dtype=np.float64).ravel()
    exact = frame[[name + EXACT for name in names]].to_numpy(dtype=np.float64).ravel()
    there = np.isfinite(estimate) & np.isfinite(exact)
    estimate, exact = estimate[there], exact[there]
    result = {'n': float(len(exact)), 'pearson': np.nan, 'spearman': np.nan, 'max_error': np.nan}
    if len(exact):
        result['max_error'] = float(np.abs(estimate - exact).max())
    if len(exact) > 1 and np.ptp(estimate) > 0 and np.ptp(exact) > 0:
        result['pearson'] = float(pearsonr(estimate, exact).statistic)
        result['spearman'] = float(spearmanr(estimate, exact).statistic)
    return result


def _scores(table: np.ndarray, heads: list[Unit]) -> dict[str, Any]:
    return {'score_plain': table[0], **{unit.name: table[1 + i] for i, unit in enumerate(heads)}}


def _no_scores(heads: list[Unit]) -> dict[str, Any]:
    return _scores(np.zeros((1 + len(heads), 0), dtype=np.float32), heads)
