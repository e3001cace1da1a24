"""The attention of chosen heads, row by row, as matrices.

Attention weights are made from the model's own queries and keys, so that the model runs as it was loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyterrier_mech.anatomy.layers import Context, Layer
from pyterrier_mech.frames import EDITED, Fields, texts_of, two_versions, with_columns
from pyterrier_mech.inputs.alignment import SCHEMES
from pyterrier_mech.inputs.batching import in_batches
from pyterrier_mech.inputs.inputs import ORIGINAL, PERTURBED, Inputs
from pyterrier_mech.patch.engine import traced
from pyterrier_mech.patch.pairs import PATCHABLE, reasons
from pyterrier_mech.rankers.ranker import as_numpy
from pyterrier_mech.stage import Keeping, ModelStage, choice, units
from pyterrier_mech.units import HEADS, Site, Unit

ALIGNED = 'attention_aligned'
"""Column that says 'yes', or why the two versions of a row cannot be aligned."""

_MATRIX, _TOKENS, _TYPES = 'attention', 'attention_tokens', 'attention_types'


@dataclass(eq=False, repr=False)
class AttentionPatterns(Keeping, ModelStage):
    """The attention matrix of chosen heads, for every row.

    **Input columns**: qid, query, docno, text; where `Perturb` stands before it, also the other version.

    **Output columns**: the same and for each head `attention.L2H9`, an array [tokens, tokens] a row, in float32: how
    the token of a row of the matrix divides its attention over all tokens, so every row sums to one; `attention_tokens`
    and `attention_types`, lists [tokens]. Where the frame has two versions of a text, both are read as `PatchHeads`
    reads them, aligned: these columns are of the text as it is, the perturbed one; `attention_0.L2H9` and
    `attention_tokens_0` are of the original; `attention_types` are of both; and `attention_aligned` is 'yes', or says
    why the versions cannot be aligned: then the matrices are NaN. A bi-encoder reads two sequences, so the names say
    which: `attention.query.L2H9`, `attention_tokens.query`, `attention.text.L2H9`. The ranking is kept.

    A position that `filler='mask'` hides neither gets nor gives attention: its row and column are 0.

    Args:
        model: A ranker of a described family (BERT, ELECTRA, RoBERTa, DistilBERT, ModernBERT).
        heads: The heads, as `Units.of` accepts them: names ('L2H9'), (layer, head), `Units`, a circuit. Each is a
            matrix a row, which takes memory: name a few.
        tower: 'query' or 'text', to read one sequence of a bi-encoder alone.
        types: The types of `attention_types`: 'basic' or 'literature'; see `PatchLayers`.
        filler: Token that stands where one version has none; see `PatchHeads`.
        batch_tokens: Tokens of one batch; by default as the model has it.
        text_field: Column of the text; by default as the model has it.
        verbose: Shows a progress bar; by default as the model has it.

    Raises:
        TypeError: If the model is not a ranker.
        ValueError: If a setting is not known, a head does not exist, or the family's attention is not described.
    """

    heads: Any = units([HEADS])
    _: KW_ONLY
    tower: str | None = choice([None, 'query', 'text'])
    types: str = choice(list(SCHEMES))
    filler: str | None = 'a'

    def check(self) -> None:
        """Checks the settings, before any work."""
        super().check()
        if self.tower is not None and (self.tower,) not in self.model.towers:
            raise ValueError(
                f'tower={self.tower!r} is for a bi-encoder; {self.model!r} reads query and text in one sequence: '
                'leave tower out'
            )

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Makes the matrices of every row."""
        self.check()
        versions = versions_of(inp, self, self.text)
        heads = self.chosen('heads')
        if not len(inp):
            names = [name for tower in self._towers() for name in self._names(tower, heads, len(versions) > 1)]
            empty = [*names, *([ALIGNED] if len(versions) > 1 else [])]
            return with_columns(inp, {name: np.zeros(0, dtype=object) for name in empty})
        check_plain(self.model)
        inputs = inputs_of(self.model, versions, self.filler)
        columns: dict[str, Any] = {}
        for tower in self._towers():
            columns |= self._of_tower(inputs, tower, heads, len(versions) > 1)
        return with_columns(inp, columns | (aligned_column(inputs) if len(versions) > 1 else {}))

    def _towers(self) -> list[int]:
        towers = self.model.towers
        return [tower for tower in range(len(towers)) if self.tower is None or towers[tower] == (self.tower,)]

    def _names(self, tower: int, heads: list[Unit], two: bool) -> list[str]:
        """Returns the columns of one tower."""
        names = [f'{_MATRIX}{side}.{unit.name}' for side in (['', '_0'] if two else ['']) for unit in heads]
        return [self._named(name, tower) for name in [*names, _TOKENS, *([f'{_TOKENS}_0'] if two else []), _TYPES]]

    def _named(self, name: str, tower: int) -> str:
        first, *rest = name.split('.')
        return '.'.join([first, *([self.model.towers[tower][0]] if len(self.model.towers) > 1 else []), *rest])

    def _of_tower(self, inputs: Inputs, tower: int, heads: list[Unit], two: bool) -> dict[str, list[Any]]:
        sides = [PERTURBED, ORIGINAL] if two else [ORIGINAL]
        matrices = [self._matrices(inputs, tower, side, heads) for side in sides]
        tokens = [_tokens(inputs, tower, side) for side in sides]
        types = [list(inputs.towers[tower].types(row, scheme=self.types)) for row in range(len(inputs))]
        cells: list[list[Any]] = [*[of_head for of_side in matrices for of_head in of_side], *tokens, types]
        return dict(zip(self._names(tower, heads, two), cells, strict=True))

    def _matrices(self, inputs: Inputs, tower: int, side: str, heads: list[Unit]) -> list[list[np.ndarray]]:
        """Returns for each head the matrix of every row."""
        model, lengths = self.model, inputs.towers[tower].lengths
        dtype = model.float_type
        found = [[np.full((length, length), np.nan, dtype=dtype) for length in lengths] for _ in heads]
        by_layer = {layer: [i for i, unit in enumerate(heads) if unit.site.layer == layer] for layer in _layers(heads)}

        def step(batch: np.ndarray) -> None:
            rows = inputs.good[batch]
            run = traced(model.map, inputs, tower, rows, side, kinds=())
            shown = run.batch.tensors['attention_mask'].bool()
            for layer, members in by_layer.items():
                x, context = run.values[Site('resid_pre', layer)], run.contexts[layer]
                for part, weights in in_parts(model.map.layers[layer], x, context):
                    weights = weights * shown[part][:, None, :, None]
                    values = as_numpy(weights[:, [heads[i].index for i in members]])
                    for row, of_row in zip(rows[part], values, strict=True):
                        for i, matrix in zip(members, of_row, strict=True):
                            found[i][row] = matrix[: lengths[row], : lengths[row]].copy()

        with model.computing():
            batches = in_batches(lengths[inputs.good], self.budget, step, verbose=self.shows, desc='AttentionPatterns')
            for _ in batches:
                pass
        return found


def _layers(heads: list[Unit]) -> list[int]:
    return sorted({unit.site.layer for unit in heads})


def _tokens(inputs: Inputs, tower: int, side: str) -> list[list[str]]:
    convert, of_tower = inputs.model.maker.tokenizer.convert_ids_to_tokens, inputs.towers[tower]
    ids = [of_tower.arrays(np.asarray([row]), side)[0][0] for row in range(len(inputs))]
    return [convert(row.tolist()) for row in ids]


def versions_of(inp: pd.DataFrame, stage: Any, text: str) -> list[Fields]:
    """Returns query and text of every row: of the original and the perturbed version where an edit made two, else one.

    Raises:
        pt.validate.InputValidationError: If a column is missing.
        ValueError: If a text is null, or it is unclear what was edited.
    """
    if EDITED in inp.columns or f'{text}_0' in inp.columns:
        return list(two_versions(inp, stage, text))
    return [texts_of(inp, stage, text)]


def inputs_of(model: Any, versions: list[Fields], filler: str | None) -> Inputs:
    """Returns the inputs of one version, or of two aligned ones; a warning counts rows that cannot be aligned."""
    if len(versions) == 1:
        return Inputs.plain(model, *versions[0].values(), types=True)
    inputs = Inputs.pairs(model, versions[0], versions[1], filler)
    if len(inputs.rest):
        warnings.warn(
            f'{len(inputs.rest)} of {len(inputs)} pairs cannot be aligned ({reasons(inputs)}); '
            f'see the {ALIGNED} column',
            stacklevel=4,
        )
    return inputs


def aligned_column(inputs: Inputs) -> dict[str, np.ndarray]:
    """Returns the column that says which rows could be aligned."""
    return {ALIGNED: np.asarray([problem or PATCHABLE for problem in inputs.problems], dtype=object)}


def check_plain(model: Any) -> None:
    """Checks that attention weights can be made from the queries and keys of a ranker.

    Raises:
        ValueError: If not.
    """
    if reason := model.map.why_not_plain():
        raise ValueError(
            f'attention weights are made from the parts of the layers, but of {model!r} {reason}: describe the family '
            'with qkv= by pyterrier_mech.rankers.register_family(Family(...)) if it is plain attention; merge adapters '
            'and remove hooks'
        )


def in_parts(layer: Layer, x: torch.Tensor, context: Context) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields some rows of a layer's input and their attention weights [rows, heads, tokens, tokens].

    So many rows at a time that their weights take no more memory than the layer's input, or one row.
    """
    n_rows, n_tokens, d = x.shape
    if not layer.n_heads:
        yield slice(0, n_rows), x.new_zeros(n_rows, 0, n_tokens, n_tokens)
        return
    size = max(1, n_rows * d // (layer.n_heads * n_tokens))
    for start in range(0, n_rows, size):
        rows = slice(start, start + size)
        yield rows, layer.pattern(x[rows], context.rows(lambda tensor, rows=rows: tensor[rows]))  # type: ignore[misc]
