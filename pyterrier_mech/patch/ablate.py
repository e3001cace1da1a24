"""Ablation of attention heads, one at a time, as a pipeline stage; and what all ablating stages share."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt
import torch

from pyterrier_mech.columns import head_name
from pyterrier_mech.frames import require, strings, with_columns
from pyterrier_mech.inputs.batching import Budget, in_batches
from pyterrier_mech.patch.engine import Engine, engine_for
from pyterrier_mech.patch.interventions import PlainInputs, Replacement, check_value
from pyterrier_mech.patch.pairs import float_type
from pyterrier_mech.patch.runs import run_side
from pyterrier_mech.rankers.ranker import Ranker, as_numpy
from pyterrier_mech.units import Unit, Units

# Settings that change how fast, not what comes out.
_NEUTRAL = ('batch_tokens', 'verbose')
_SETS_OF_UNITS = ('heads', 'units')


class Intervention(pt.Transformer):
    """Base of the stages that intervene on chosen units: how they are compared and shown."""

    model: Ranker
    text_field: str | None
    _replacement: Replacement | None = None

    @property
    def _text(self) -> str:
        return self.text_field if self.text_field is not None else self.model.text_field

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def _identity(self) -> tuple[Any, ...]:
        return tuple((name, self._key(name, value)) for name, value in self._settings().items() if name not in _NEUTRAL)

    def _key(self, name: str, value: Any) -> Any:
        """Returns a setting as a value that equals and hashes by what it says."""
        if name in _SETS_OF_UNITS and value is not None:
            return Units.of(value)
        if isinstance(value, pd.DataFrame):
            texts = value.reindex(columns=['query', self._text]).astype(str)
            return tuple(texts.itertuples(index=False, name=None))
        return value if isinstance(value, (str, int, float, type(None), Ranker)) else id(value)

    def __eq__(self, other: object) -> bool:
        """Equal stages give equal columns."""
        return type(self) is type(other) and self._identity() == other._identity()  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        """Fits `__eq__`."""
        return hash((type(self), self._identity()))

    def __repr__(self) -> str:
        """Rebuilds the stage, where it has no reference frame."""
        parameters = inspect.signature(type(self)).parameters
        shown = []
        for name, value in self._settings().items():
            default = parameters[name].default
            if isinstance(value, pd.DataFrame):
                shown.append(f'{name}=<DataFrame of {len(value)} rows>')
            elif default is inspect.Parameter.empty:
                shown.append(repr(value))
            elif name not in _NEUTRAL and not (isinstance(value, (str, int, type(None))) and value == default):
                shown.append(f'{name}={value!r}')
        return f'{type(self).__name__}({", ".join(shown)})'

    def __getstate__(self) -> dict[str, Any]:
        """Pickles without reference values, which stand on a device; a worker computes them again."""
        return self.__dict__ | {'_replacement': None}

    def subtransformers(self) -> dict[str, pt.Transformer]:
        """Shows no parts in a drawn pipeline."""
        return {}

    @property
    def schematic(self) -> dict[str, Any]:
        """How PyTerrier draws the stage."""
        return {'label': type(self).__name__, 'help_url': None}


class AblateHeads(Intervention):
    """How much each attention head carries of a score: the score without what the head says, one head at a time.

    **Input columns**: qid, query, docno, text.

    **Output columns**: the same and `score_original` (the ranker's score), and one float column a head,
    `L{layer}H{head}`: ablated score − score_original, in raw logits. The ranking is kept.

    A bi-encoder's head is ablated in both towers, of which each has its own reference values.

    Args:
        model: A ranker.
        value: What stands in the place of the head's output: 'zero'; 'mean', over all positions of the reference of
            the same type (cls, query, sep, doc_match, doc_other); 'resample', the head's output for another row of
            the reference. See `Replacement`.
        reference: Frame with query and text columns, for 'mean' and 'resample': usually rows of other queries.
        heads: The heads to ablate, as names ('L3H7') or (layer, head), or `Units`; by default all.
        seed: Of the draw of the other row, which is a function of seed, query and text.
        batch_tokens: Tokens in memory at a time, over all ablated variants; by default as the model has it.
        text_field: Column of the text, here and in the reference; by default as the model has it.
        verbose: Shows a progress bar; by default as the model has it.

    Raises:
        TypeError: If the reference is no frame.
        ValueError: If a setting is not known, a head does not exist, or the reference is missing, empty or has rows
            without text, before any work.

    Source: Michel, Levy, Neubig, NeurIPS 2019 (zero); Wang et al. 2022, arXiv 2211.00593 (mean); Chan et al. 2022
    (resample).
    """

    def __init__(
        self,
        model: Ranker,
        value: str = 'zero',
        *,
        reference: pd.DataFrame | None = None,
        heads: Any = None,
        seed: int = 0,
        batch_tokens: int | None = None,
        text_field: str | None = None,
        verbose: bool | None = None,
    ):
        """Stores the settings; reference values are computed when first needed."""
        super().__init__()
        self.model = model
        self.value = value
        self.reference = reference
        self.heads = heads
        self.seed = seed
        self.batch_tokens = batch_tokens
        self.text_field = text_field
        self.verbose = verbose

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Ablates every head for every row of a frame."""
        check_value(self.value, self.reference, self._text)
        require(inp, self, ['query', self._text])
        heads = self._heads()
        queries, texts = strings(inp, 'query', self), strings(inp, self._text, self)
        if len(inp):
            scores = self._ablate(PlainInputs.of(self.model, queries, texts), heads)
        else:
            scores = np.zeros((1 + len(heads), 0), dtype=np.float32)
        effects = {head_name(*head): scores[1 + i] - scores[0] for i, head in enumerate(heads)}
        return with_columns(inp, {'score_original': scores[0], **effects})

    def fuse_rank_cutoff(self, k: int) -> pt.Transformer:
        """Cuts before ablating: the ranking is the same."""
        return pt.RankCutoff(k) >> self

    def _heads(self) -> list[Unit]:
        counts = self.model.head_counts
        if self.heads is None:
            return [(layer, head) for layer, count in enumerate(counts) for head in range(count)]
        chosen = Units.of(self.heads).check(self.model)
        if chosen.neurons:
            raise ValueError(f'heads={self.heads!r} names neurons; AblatedReranker ablates those, all at once')
        return sorted(chosen.heads)

    def _ablate(self, inputs: PlainInputs, heads: list[Unit]) -> np.ndarray:
        """Returns the scores [original, heads…] x rows."""
        model, engine = self.model, engine_for(self.model)
        budget = model.loaded.budget if self.batch_tokens is None else Budget(self.batch_tokens)
        scores: np.ndarray = np.empty((1 + len(heads), len(inputs.texts[0])), dtype=float_type(model))
        verbose = model.verbose if self.verbose is None else self.verbose
        with model.computing():
            if self._replacement is None:
                self._replacement = self._values_for(heads)
            others = self._replacement.lengths(inputs)

            def step(rows: np.ndarray) -> np.ndarray:
                towers = range(len(model.towers))
                return as_numpy(
                    model.read([self._vectors(engine, inputs, i, rows, heads, budget.tokens) for i in towers])
                )

            lengths, smallest = inputs.lengths * (1 + len(heads)) + others, inputs.lengths + others
            for rows, values in in_batches(
                lengths, budget, step, smallest=smallest, verbose=verbose, desc='AblateHeads'
            ):
                scores[:, rows] = values
        return scores

    def _values_for(self, heads: list[Unit]) -> Replacement:
        # The engines read a layer's head outputs joined, so a layer is replaced as a whole or not at all.
        layers = {layer for layer, _ in heads}
        joined = Units(frozenset((layer, head) for layer in layers for head in range(self.model.n_heads(layer))))
        return Replacement(self.model, joined, self.value, self.reference, self.seed, self._text)

    def _vectors(
        self, engine: Engine, inputs: PlainInputs, tower: int, rows: np.ndarray, heads: list[Unit], batch_tokens: int
    ) -> torch.Tensor:
        """Returns the vectors of one tower [original, heads…] x rows x d."""
        encoder, pooling = self.model.encoder, self.model.pooling_
        pairs = [inputs.towers[tower][row] for row in rows]
        base = run_side(encoder, pairs, 'original', self.model.loaded.maker.uses_segments)
        original = base.pooled(pooling)[None]
        if not heads or self._replacement is None:
            return original
        values, touched = self._replacement.values(inputs, tower, rows), {layer for layer, _ in heads}
        targets = [values(('heads', i)).to(z.dtype) if i in touched else z for i, z in enumerate(base.trace.z)]
        return torch.cat([original, engine.vectors(base, targets, heads, batch_tokens)])
