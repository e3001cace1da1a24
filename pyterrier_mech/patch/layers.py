"""Activation patching of whole blocks, by kind of token, by position or everywhere, as a pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyterrier_mech.anatomy.model import Run
from pyterrier_mech.frames import Fields, two_versions, with_columns
from pyterrier_mech.inputs.alignment import TYPES
from pyterrier_mech.inputs.batching import in_batches
from pyterrier_mech.inputs.inputs import PERTURBED, Inputs
from pyterrier_mech.patch.engine import Engine, engine_for, patched
from pyterrier_mech.patch.pairs import no_pairs, pair_columns, started
from pyterrier_mech.patch.patching import DIRECTIONS, Patching
from pyterrier_mech.patch.wavefront import Variant
from pyterrier_mech.rankers.ranker import as_numpy
from pyterrier_mech.stage import choice
from pyterrier_mech.units import Site

BLOCKS = ('resid_pre', 'attn_out', 'mlp_out')
# What the engines need beside the sites that are patched.
_KINDS = ('attn_out', 'mlp_out', 'resid_post')
TOKENS, POSITION_TYPES = 'position_tokens', 'position_types'

_Part = tuple[Site, str]


@dataclass(eq=False, repr=False)
class PatchLayers(Patching):
    """Where in the text, and in which block, the reaction of a ranker to an edit is carried: exact activation patching.

    The ranker reads the original pair with the output of one block replaced by what the block gives for the perturbed
    pair, at some positions. The blocks of a layer are `resid_pre` (the residual stream before the layer), `attn_out`
    and `mlp_out` (the outputs of the two linear maps that write into the stream, before the residual sum and before any
    norm). The effect is how far that moves the score.

    **Input columns**: qid, query, docno, text and the other version that `Perturb` wrote: text_0, query_0, or both.

    **Output columns**: the same and `score_original`, `score_perturbed`, `patchable` as `PatchHeads` writes them;
    `analysis`, which says how the effects were made; and the effects, in raw logits:

    - `by='token_type'`: one float column `resid_pre.L0.cls`, …, `mlp_out.L5.inserted` a block and type of token: all
      positions of the type are patched together. NaN where a row has no such token. Types: `cls`, `query`, `sep`,
      `doc_match` (a token of the text that occurs in the query), `doc_other`, `inserted`;
    - `by='position'`: one array [positions] `resid_pre.L0`, …, `mlp_out.L5` a block, one position patched at a time;
      and `position_tokens` (of the perturbed pair) and `position_types`, lists [positions]. The positions of a
      bi-encoder's query come first;
    - `by=None`: one float column `attn_out.L0`, …, `mlp_out.L5` a block, all positions patched together. The whole
      residual stream would carry the whole change, so it is left out.

    The ranking is kept.

    Args:
        model: A ranker.
        sites: Which blocks.
        by: How positions are put together, as above.
        direction: 'perturbed_to_original' (as above), or 'original_to_perturbed': the perturbed pair is read with a
            block of the original, and effects are patched score − score_perturbed.
        effect: 'difference', or 'normalized': divided by the whole score change in the patching direction.
        filler: Token that stands where one side has none; see `PatchHeads`.
        batch_tokens: Tokens in memory at a time, over all patched variants; by default as the model has it.
        text_field: Column of the text; by default as the model has it.
        verbose: Shows a progress bar; by default as the model has it.

    Raises:
        TypeError: If the model is not a ranker.
        ValueError: If a setting is not known, before any work; if a score is not finite.

    Source: Chen, Merullo, Eickhoff, SIGIR 2024, arXiv 2405.02503, who patch one position at a time.
    """

    _: KW_ONLY
    sites: Sequence[str] = BLOCKS
    by: str | None = choice(['token_type', 'position', None])

    def check(self) -> None:
        """Checks the settings, before any work."""
        super().check()
        unknown = [site for site in self.sites if site not in BLOCKS]
        if isinstance(self.sites, str) or unknown or not len(self.sites):
            raise ValueError(f'sites must be a list of some of {BLOCKS}; got {self.sites!r}')
        if self.by is None and not set(self.sites) - {'resid_pre'}:
            raise ValueError("by=None needs 'attn_out' or 'mlp_out': all of 'resid_pre' is the whole change by itself")

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Patches every pair of a frame."""
        self.check()
        versions = two_versions(inp, self, self.text)
        names = [_name(part) for part in sorted(self._parts(), key=self._place)]
        if len(inp):
            columns = (self._by_position if self.by == 'position' else self._jointly)(versions, names)
        else:
            columns = no_pairs(names)
            if self.by == 'position':
                columns |= {name: np.zeros(0, dtype=object) for name in [*names, TOKENS, POSITION_TYPES]}
        listed = sorted(names, key=lambda name: name.rpartition('.')[2] if self.by == 'token_type' else '')
        return with_columns(inp, columns, self._analysis(listed, positions=str(self.by)))

    def _parts(self) -> list[_Part]:
        """Returns what is patched, in the order of the layers: sites, and the types of their positions ('' for all)."""
        kinds = [kind for kind in BLOCKS if kind in self.sites and (self.by is not None or kind != 'resid_pre')]
        types = TYPES if self.by == 'token_type' else ('',)
        layers = range(self.model.n_layers)
        return [(Site(kind, layer), kind_of) for layer in layers for kind in kinds for kind_of in types]

    def _place(self, part: _Part) -> tuple[int, ...]:
        site, kind_of = part
        return BLOCKS.index(site.kind), site.layer, TYPES.index(kind_of) if kind_of else 0

    # -- types, or everything

    def _jointly(self, versions: tuple[Fields, Fields], names: Sequence[str]) -> dict[str, Any]:
        model, parts = self.model, self._parts()
        inputs = Inputs.pairs(model, *versions, self.filler)
        table = started(model, inputs, versions, len(parts))

        def variants(tower: int, rows: np.ndarray) -> list[Variant]:
            if self.by is None:
                return [Variant(site) for site, _ in parts]
            types = torch.from_numpy(inputs.types(tower, rows)).to(model.map.device)
            where = {kind: types == TYPES.index(kind) for kind in TYPES}
            return [Variant(site, where=where[kind]) for site, kind in parts]

        def step(engine: Engine, rows: np.ndarray) -> np.ndarray:
            vectors = []
            for tower in range(len(inputs.towers)):
                both, runs = self._both(inputs, tower, rows, _KINDS)
                vectors.append(torch.cat([both, self._patched(engine, both, runs, variants(tower, rows))]))
            return as_numpy(model.read(vectors))

        for rows, scores in self._swept(inputs, np.full(len(inputs), len(parts)), step):
            table[:, rows] = scores
        table[2:] = self._effects(table)
        if self.by == 'token_type':
            there = [{kind for tower in inputs.towers for kind in tower.types(row)} for row in range(len(inputs))]
            for row, kinds in enumerate(there):
                table[2:, row][[kind not in kinds for _, kind in parts]] = np.nan
        order = sorted(range(len(parts)), key=lambda i: self._place(parts[i]))
        return pair_columns(np.concatenate([table[:2], table[2:][order]]), inputs.problems, names)

    # -- one position at a time

    def _by_position(self, versions: tuple[Fields, Fields], names: Sequence[str]) -> dict[str, Any]:
        model, parts = self.model, self._parts()
        inputs = Inputs.pairs(model, *versions, self.filler)
        table = started(model, inputs, versions, 0)
        missing = [np.full((len(parts), length), np.nan, dtype=table.dtype) for length in inputs.lengths]
        effects = dict(enumerate(missing))

        def step(engine: Engine, rows: np.ndarray) -> list[np.ndarray]:
            seen = [self._both(inputs, tower, rows, _KINDS) for tower in range(len(inputs.towers))]
            plain = [both for both, _ in seen]
            found = [as_numpy(model.read(plain))]
            for tower, (both, runs) in enumerate(seen):
                n_tokens = runs[0].batch.shape[1]
                where = torch.eye(n_tokens, dtype=torch.bool, device=both.device)[:, None].expand(-1, len(rows), -1)
                variants = [Variant(site, where=one) for site, _ in parts for one in where]
                vectors = [one[0] if self.direction == DIRECTIONS[0] else one[1] for one in plain]
                vectors[tower] = self._patched(engine, both, runs, variants)
                found.append(as_numpy(model.read(vectors)).reshape(len(parts), n_tokens, len(rows)))
            return found

        for rows, (scores, *towers) in self._swept(inputs, len(parts) * inputs.lengths, step):
            table[:, rows] = scores
            for i, row in enumerate(rows):
                lengths = [tower.lengths[row] for tower in inputs.towers]
                whole = np.concatenate([of[:, :n, i] for of, n in zip(towers, lengths, strict=True)], axis=1)
                both = np.broadcast_to(table[:2, row, None, None], (2, *whole.shape))
                effects[int(row)] = self._effects(np.concatenate([both, whole[None]]))[0]
        order = sorted(range(len(parts)), key=lambda i: self._place(parts[i]))
        columns = {name: [effects[row][i] for row in effects] for name, i in zip(names, order, strict=True)}
        return pair_columns(table, inputs.problems, []) | columns | self._positions(inputs)

    def _positions(self, inputs: Inputs) -> dict[str, Any]:
        tokens, types = [], []
        for row in range(len(inputs)):
            ids = np.concatenate([tower.arrays(np.asarray([row]), PERTURBED)[0][0] for tower in inputs.towers])
            tokens.append(self.model.maker.tokenizer.convert_ids_to_tokens(ids.tolist()))
            types.append([kind for tower in inputs.towers for kind in tower.types(row)])
        return {TOKENS: tokens, POSITION_TYPES: types}

    # -- runs

    def _patched(
        self, engine: Engine, both: torch.Tensor, runs: Sequence[Run], variants: Sequence[Variant]
    ) -> torch.Tensor:
        base, source = runs
        plain = both[0] if self.direction == DIRECTIONS[0] else both[1]
        return patched(engine, base, source.values, variants, self.budget.tokens, plain)

    def _swept(self, inputs: Inputs, counts: np.ndarray, step: Any) -> list[tuple[np.ndarray, Any]]:
        """Returns what `step` makes of the good rows, with their numbers."""
        tokens, budget = inputs.lengths[inputs.good], self.budget
        if not len(tokens):
            return []
        with self.model.computing():
            engine = engine_for(self.model)
            return [
                (inputs.good[batch], result)
                for batch, result in in_batches(
                    tokens * (2 + counts[inputs.good]),
                    budget,
                    lambda batch: step(engine, inputs.good[batch]),
                    smallest=2 * tokens,
                    verbose=self.shows,
                    desc='PatchLayers',
                )
            ]


def _name(part: _Part) -> str:
    site, kind_of = part
    return f'{site.name}.{kind_of}' if kind_of else site.name
