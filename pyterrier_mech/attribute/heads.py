"""Attribution of attention heads by gradients, as a pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import pearsonr, spearmanr

from pyterrier_mech.anatomy.encoder import pool
from pyterrier_mech.attribute.lines import Baseline, Line, check_baseline
from pyterrier_mech.attribute.path import Rule, integrate, not_finite
from pyterrier_mech.attribute.points import GRAPH, embedding
from pyterrier_mech.attribute.relp import linearised
from pyterrier_mech.attribute.stage import Attribution, row_names
from pyterrier_mech.columns import head_name
from pyterrier_mech.frames import with_columns
from pyterrier_mech.inputs.alignment import Aligner, Alignment
from pyterrier_mech.inputs.batching import in_batches
from pyterrier_mech.patch.heads import PatchHeads
from pyterrier_mech.patch.pairs import (
    DIRECTIONS,
    PATCHABLE,
    Pairs,
    chosen_heads,
    float_type,
    no_pairs,
    noted,
    two_versions,
)
from pyterrier_mech.patch.runs import Head, run_side, side_inputs
from pyterrier_mech.rankers.ranker import Ranker, as_numpy

PAIRED = ('attribution_patching', 'trapezoid', 'relp')
SINGLE = ('gradient', 'integrated_gradients')
EXACT = '.exact'
Tensors = list[torch.Tensor]


class AttributeHeads(Attribution):
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

    **Output columns**: the same and one float column a head, `L{layer}H{head}`, in raw logits. With a second text also
    `score_original`, `score_perturbed` and `patchable`, as `PatchHeads` writes them; otherwise `score_original`, and
    for integrated gradients `completeness_error`. With `verify`, `L{layer}H{head}.exact` for the heads that were
    patched too. The ranking is kept.

    Args:
        model: A ranker.
        method: One of the above.
        heads: The heads, as names ('L3H7') or (layer, head); by default all.
        direction: 'perturbed_to_original', or 'original_to_perturbed': the effect of the original's heads in the
            perturbed pair. With a second text only.
        filler: Token that stands where one side has none; see `PatchHeads`.
        baseline: Where integrated gradients begin; see `AttributeNeurons`.
        steps: Their intervals.
        verify: How many heads are patched exactly as well: those with the largest sum of absolute effects over
            the frame. See `agreement`.
        batch_tokens: Tokens of one batch, each counted four times for the memory of its graph; by default as the model
            has it.
        text_field: Column of the text; by default as the model has it.
        verbose: Shows a progress bar; by default as the model has it.

    Raises:
        ValueError: If a setting is not known, a head does not exist, the method does not fit the family, or a gradient
            is not finite.

    Source: attribution patching: Syed, Rager, Conmy 2023, arXiv 2310.10348; RelP: arXiv 2508.21258.
    """

    def __init__(
        self,
        model: Ranker,
        method: str = 'attribution_patching',
        *,
        heads: Sequence[str | Head] | None = None,
        direction: str = 'perturbed_to_original',
        filler: str | None = 'a',
        baseline: Baseline = 'query',
        steps: int = 16,
        verify: int = 0,
        batch_tokens: int | None = None,
        text_field: str | None = None,
        verbose: bool | None = None,
    ):
        """Stores the settings."""
        super().__init__()
        self.model = model
        self.method = method
        self.heads = heads
        self.direction = direction
        self.filler = filler
        self.baseline = baseline
        self.steps = steps
        self.verify = verify
        self.batch_tokens = batch_tokens
        self.text_field = text_field
        self.verbose = verbose

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Attributes the score, or its change, of every row."""
        self._check_settings()
        if self.method in PAIRED:
            return self._verified(self._paired(inp))
        self._fields(inp)
        heads = chosen_heads(self.model, self.heads)
        return with_columns(inp, (self._gradient if self.method == 'gradient' else self._integrated)(inp, heads))

    def _check_settings(self) -> None:
        if self.method not in PAIRED + SINGLE:
            raise ValueError(f'method={self.method!r} is none of {PAIRED + SINGLE}')
        if self.direction not in DIRECTIONS:
            raise ValueError(f'direction={self.direction!r} is none of {DIRECTIONS}')
        if self.steps < 1:
            raise ValueError(f'steps={self.steps} leaves nothing to sum; use 1 or more')
        if self.verify < 0 or (self.verify and self.method in SINGLE):
            raise ValueError(
                f'verify={self.verify} with method={self.method!r}: only {PAIRED} estimate what patching measures, '
                'and the number of heads is 0 or more'
            )
        check_baseline(self.baseline)

    # -- with a second text

    def _paired(self, inp: pd.DataFrame) -> pd.DataFrame:
        original, perturbed = two_versions(inp, self, self._text)
        heads = chosen_heads(self.model, self.heads)
        names = [head_name(*head) for head in heads]
        if not len(inp):
            return with_columns(inp, no_pairs(names))
        pairs = Pairs(self.model, original, perturbed, self.filler)
        table = pairs.table(len(heads))

        def step(batch: np.ndarray) -> np.ndarray:
            return self._effects(pairs.picked(batch), heads)

        for rows, values in self._run(pairs.tokens(), step):
            table[:, pairs.good[rows]] = values
        self._check_finite(inp, table[:, pairs.good], pairs.good)
        columns = pairs.columns(table) | dict(zip(names, table[2:], strict=True))
        return noted(with_columns(inp, columns), self.direction)

    def _effects(self, towers: list[list[Alignment]], heads: list[Head]) -> np.ndarray:
        """Returns [original score, perturbed score, heads…] x pairs."""
        base, source = ('original', 'perturbed')[:: 1 if self.direction == DIRECTIONS[0] else -1]
        score, z, gradients = self._with_gradients(towers, base, self.method == 'relp')
        if self.method == 'trapezoid':
            other, target, more = self._with_gradients(towers, source)
            gradients = [(g + h) / 2 for g, h in zip(gradients, more, strict=True)]
        else:
            with self.model.computing():
                other, target = self._without_gradients(towers, source)
        products = [(b - a) * g for a, b, g in zip(z, target, gradients, strict=True)]
        scores = [score, other] if base == 'original' else [other, score]
        return as_numpy(torch.stack([*scores, *self._by_head(products, heads)]))

    def _verified(self, res: pd.DataFrame) -> pd.DataFrame:
        """Adds the exact effects of the strongest heads."""
        if not self.verify:
            return res
        heads = chosen_heads(self.model, self.heads)
        strength = np.nansum(np.abs(res[[head_name(*head) for head in heads]].to_numpy(dtype=np.float64)), axis=0)
        chosen = sorted(heads[i] for i in np.argsort(-strength, kind='stable')[: self.verify])
        names = [head_name(*head) for head in chosen]
        exact = PatchHeads(
            self.model,
            heads=chosen,
            direction=self.direction,
            filler=self.filler,
            batch_tokens=self.batch_tokens,
            text_field=self.text_field,
            verbose=self.verbose,
        )
        good = (res['patchable'] == PATCHABLE).to_numpy()
        values = np.full((len(res), len(chosen)), np.nan, dtype=float_type(self.model) if len(res) else 'float32')
        if good.any():
            values[good] = exact.transform(res[good])[names].to_numpy()
        return res.assign(**{name + EXACT: values[:, i] for i, name in enumerate(names)})

    # -- without one

    def _gradient(self, inp: pd.DataFrame, heads: list[Head]) -> dict[str, Any]:
        if not len(inp):
            return _no_scores(heads)
        model, (queries, texts) = self.model, self._fields(inp)
        aligner = Aligner(model.loaded.maker, None)
        ids = {'query': model.tokenize('query', queries), 'text': model.tokenize('text', texts)}
        towers = [[[ids[f].row(i) for f in fields] for i in range(len(inp))] for fields in model.towers]
        inputs = [
            [aligner.align(parts, parts, fields) for parts in tower]
            for fields, tower in zip(model.towers, towers, strict=True)
        ]
        table = np.empty((1 + len(heads), len(inp)), dtype=float_type(model))

        def step(batch: np.ndarray) -> np.ndarray:
            score, z, gradients = self._with_gradients([[tower[row] for row in batch] for tower in inputs], 'original')
            products = [a * g for a, g in zip(z, gradients, strict=True)]
            return as_numpy(torch.stack([score, *self._by_head(products, heads)]))

        for rows, values in self._run(np.sum([list(map(len, tower)) for tower in inputs], axis=0), step):
            table[:, rows] = values
        self._check_finite(inp, table, np.arange(len(inp)))
        return _scores(table, heads)

    def _integrated(self, inp: pd.DataFrame, heads: list[Head]) -> dict[str, Any]:
        if not len(inp):
            return _no_scores(heads) | {'completeness_error': np.zeros(0, dtype=np.float32)}
        table = np.empty((1 + len(heads), len(inp)), dtype=float_type(self.model))
        errors = np.zeros(len(inp), dtype=float_type(self.model))

        def reduce(line: Line, layers: Tensors) -> np.ndarray:
            values = self._by_head([layer[None] for layer in layers], heads)
            return as_numpy(torch.stack(values)[:, 0]) if values else np.zeros(0)  # a pruned model may have no heads

        for result in integrate(
            self.model,
            self._lines(inp, self.baseline),
            site='heads',
            rule=Rule('trapezoid', self.steps + 1, np.inf, self.steps + 1),
            reduce=reduce,
            budget=self._budget(),
            verbose=self._verbose,
            desc='AttributeHeads',
        ):
            table[0, result.row], table[1:, result.row] = result.score, result.value
            errors[result.row] = result.error
        return _scores(table, heads) | {'completeness_error': errors}

    # -- runs

    def _run(self, tokens: np.ndarray, step: Any) -> Any:
        """Yields rows and what `step` makes of them, with gradients."""
        with self.model.computing(gradients=True):
            yield from in_batches(GRAPH * tokens, self._budget(), step, verbose=self._verbose, desc='AttributeHeads')

    def _with_gradients(
        self, towers: list[list[Alignment]], side: str, relp: bool = False
    ) -> tuple[torch.Tensor, Tensors, Tensors]:
        """Returns the scores [pairs], and z and ∂s/∂z of every tower and layer [pairs, tokens, heads·d_h]."""
        model, encoder = self.model, self.model.encoder
        vectors, outputs = [], []
        for tower in towers:
            inputs = side_inputs(encoder, tower, side, model.loaded.maker.uses_segments)
            if relp:
                with model.computing():
                    trace = encoder.trace(inputs)
                hidden, z = linearised(encoder, trace)
            else:
                with embedding(encoder):
                    trace = encoder.trace(inputs)
                hidden, z = trace.hidden, trace.z
            vectors.append(pool(hidden, inputs['attention_mask'], model.pooling_))
            outputs.extend(z)
        scores = model.read(vectors)
        gradients = torch.autograd.grad(scores.sum(), outputs)
        return scores.detach(), [z.detach() for z in outputs], list(gradients)

    def _without_gradients(self, towers: list[list[Alignment]], side: str) -> tuple[torch.Tensor, Tensors]:
        """Returns the scores [pairs] and z of every tower and layer."""
        model = self.model
        runs = [run_side(model.encoder, tower, side, model.loaded.maker.uses_segments) for tower in towers]
        return model.read([run.pooled(model.pooling_) for run in runs]), [z for run in runs for z in run.trace.z]

    def _by_head(self, products: Tensors, heads: list[Head]) -> Tensors:
        """Sums [pairs, tokens, heads·d_h] of every tower and layer to one [pairs] a head."""
        layers = self.model.encoder.layers
        sums = [layer.float().sum(1) if layer.element_size() < 4 else layer.sum(1) for layer in products]
        by_layer = [torch.stack(sums[i :: len(layers)]).sum(0) for i in range(len(layers))]
        return [by_layer[layer][:, layers[layer].columns(head)].sum(1) for layer, head in heads]

    def _check_finite(self, inp: pd.DataFrame, table: np.ndarray, rows: np.ndarray) -> None:
        bad = rows[~np.isfinite(table).all(axis=0)]
        if len(bad):
            raise not_finite([row_names(inp)[row] for row in bad], self.model)


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
        raise ValueError(f'no column ends in {EXACT!r}: give AttributeHeads(model, verify=10) or another number')
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


def _scores(table: np.ndarray, heads: list[Head]) -> dict[str, Any]:
    return {'score_original': table[0], **{head_name(*head): table[1 + i] for i, head in enumerate(heads)}}


def _no_scores(heads: list[Head]) -> dict[str, Any]:
    return _scores(np.zeros((1 + len(heads), 0), dtype=np.float32), heads)
