"""The tensors inside a ranker, row by row, as a pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyterrier_mech.anatomy.model import EMBEDDINGS, Batch, Edit
from pyterrier_mech.anatomy.sites import PLACES
from pyterrier_mech.attribute.neurons import plain_types
from pyterrier_mech.frames import texts_of, with_columns
from pyterrier_mech.inputs.alignment import PROMPT
from pyterrier_mech.inputs.alignment import TYPES as ALL_TYPES
from pyterrier_mech.inputs.batching import in_batches
from pyterrier_mech.inputs.inputs import Inputs
from pyterrier_mech.rankers.ranker import as_numpy
from pyterrier_mech.stage import Keeping, ModelStage, choice
from pyterrier_mech.units import Site, sites_of


@dataclass(eq=False, repr=False)
class Activations(Keeping, ModelStage):
    """What passes through the sites of a ranker while it reads a text.

    A site is a tensor [tokens, width] of a layer: `resid_pre` and `resid_post` (the residual stream before and after
    the layer), `attn_out` and `mlp_out` (what its two blocks add to the stream, before the sum and any norm), `heads`
    (the outputs of all heads, joined: what the attention output projection reads), `neurons` (what the last linear map
    of the feed-forward block reads); `embeddings.L0` are the word embeddings. Batches are run one by one, and only what
    is kept stays in memory.

    **Input columns**: qid, query, docno, text. After `Perturb`, `text` is the edited one: that is read. For the
    original, give `text_field='text_0'`.

    **Output columns**: the same and, for each site, `activation.{site}`, as in `activation.resid_pre.L3`: an array
    [width] a row (float32, or float64 for a float64 model). With `keep='token_type'` one a type of token, as in
    `activation.resid_pre.L3.doc_match`, NaN where a row has no such token. With `keep='all'` an array [tokens, width],
    and `activation.tokens` and `activation.types`, lists [tokens]. A bi-encoder's towers have columns of their own,
    `activation.query.resid_pre.L3` and `activation.text.resid_pre.L3`. The ranking is kept.

    Args:
        model: A ranker.
        sites: Names of kinds ('resid_pre': every layer) and of single sites ('resid_pre.L3'), one or a list.
        keep: 'mean' or 'sum' over all tokens, special ones included; 'read': what the ranker would read out there:
            the first token, or the mean over the tokens that count; 'token_type': means over the tokens of a type (cls,
            query, sep, doc_match, doc_other); 'all': every token. Then a frame takes 4 bytes times rows, tokens and
            width a site.
        batch_tokens: Tokens of one batch, padding included; by default as the model has it.
        text_field: Column of the text; by default as the model has it.
        verbose: Shows a progress bar; by default as the model has it.

    Raises:
        TypeError: If the model is not a ranker.
        ValueError: If a setting is not known, or the model does not have a site, before any work.
    """

    sites: Any
    _: KW_ONLY
    keep: str = choice(['mean', 'sum', 'read', 'token_type', 'all'])

    def check(self) -> None:
        """Checks the settings, before any work."""
        super().check()
        if self.keep == 'read' and not self.model.one_vector:
            raise ValueError(f"keep='read' needs one vector a sequence, and {self.model!r} reads all: use keep='all'")

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Reads every row of a frame."""
        self.check()
        fields = texts_of(inp, self, self.text)
        layers = range(self.model.n_layers)
        there = {kind: [Site(kind, layer) for layer in layers] for kind in PLACES}
        sites = sites_of(self.sites, {**there, EMBEDDINGS.kind: [EMBEDDINGS]})
        starts = [f'activation.{"query" if "query" in tower else "text"}.' for tower in self.model.towers]
        starts = starts if len(starts) > 1 else ['activation.']
        inputs = Inputs.plain(self.model, *fields.values(), types=True) if len(inp) else None
        columns: dict[str, Any] = {}
        for tower, start in enumerate(starts):
            columns |= self._read(inputs, tower, start, sites)
        return with_columns(inp, columns)

    def _read(self, inputs: Inputs | None, tower: int, start: str, sites: Sequence[Site]) -> dict[str, Any]:
        """Returns the columns of a tower; of no inputs, those of a frame without rows."""
        ends = [f'.{kind}' for kind in plain_types(self.model)] if self.keep == 'token_type' else ['']
        n_rows = 0 if inputs is None else len(inputs)
        columns = {f'{start}{site.name}{end}': np.empty(n_rows, dtype=object) for site in sites for end in ends}
        if self.keep == 'all':
            columns |= {f'{start}{name}': np.empty(n_rows, dtype=object) for name in ('tokens', 'types')}
        if inputs is None:
            return columns
        sequences, map_ = inputs.towers[tower], self.model.map

        def step(rows: np.ndarray) -> dict[Site, torch.Tensor]:
            batch = inputs.batch(tower, rows)
            return map_.run(batch, record=dict.fromkeys(sites, self._kept(inputs, tower, rows, batch))).values

        with self.model.computing():
            shown: dict[str, Any] = {'verbose': self.shows, 'desc': 'Activations'}
            for rows, values in in_batches(sequences.lengths, self.budget, step, **shown):
                for site, kept in values.items():
                    for end, of_end in zip(ends, as_numpy(kept), strict=True):
                        for row, value in zip(rows, of_end, strict=True):
                            # A copy, or one row would keep its whole batch.
                            whole = value[: sequences.lengths[row]] if self.keep == 'all' else value
                            columns[f'{start}{site.name}{end}'][row] = whole.copy()
        if self.keep == 'all':
            for row in range(n_rows):
                ids = sequences.ids(row).tolist()
                columns[f'{start}tokens'][row] = self.model.maker.tokenizer.convert_ids_to_tokens(ids)
                columns[f'{start}types'][row] = list(sequences.types(row))
        return columns

    def _kept(self, inputs: Inputs, tower: int, rows: np.ndarray, batch: Batch) -> Edit:
        """Returns what makes [columns of a site, rows, …] of a site's tensor [rows, tokens, width]."""
        if self.keep == 'all':
            return lambda tensor: tensor.detach()[None]
        if self.keep == 'read':
            return lambda tensor: self.model.readout.represent(_raised(tensor), batch.scored)[None]
        where = batch.tensors['attention_mask'][None].bool()
        if self.keep == 'token_type':
            types = torch.from_numpy(inputs.types(tower, rows)).to(where.device)
            where = torch.stack([types == (*ALL_TYPES, PROMPT).index(kind) for kind in plain_types(self.model)])

        def reduced(tensor: torch.Tensor) -> torch.Tensor:
            tensor = _raised(tensor)
            sums = torch.einsum('krt,rtw->krw', where.to(tensor.dtype), tensor)
            return sums if self.keep == 'sum' else sums / where.sum(-1, keepdim=True)  # 0 / 0 is NaN

        return reduced


def _raised(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor in which sums keep their precision."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
