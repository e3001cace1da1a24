"""What the stages share that patch one thing at a time: sites or heads, everywhere, by kind of token or by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from pyterrier_mech.anatomy.model import Run
from pyterrier_mech.frames import Fields, two_versions, with_columns
from pyterrier_mech.inputs.alignment import SCHEMES, types_of
from pyterrier_mech.inputs.inputs import PERTURBED, Inputs
from pyterrier_mech.patch.engine import Engine, patched
from pyterrier_mech.patch.pairs import no_pairs, pair_columns, started
from pyterrier_mech.patch.patching import Patching
from pyterrier_mech.patch.variants import Variant
from pyterrier_mech.rankers.ranker import as_numpy
from pyterrier_mech.stage import choice
from pyterrier_mech.units import Site, Unit

BY = ('token_type', 'position', None)
TOKENS, POSITION_TYPES = 'position_tokens', 'position_types'


class Part(NamedTuple):
    """What one effect is of: a site or one head of it, at all positions or at those of a type."""

    site: Site
    unit: int | None = None
    type: str = ''

    @property
    def name(self) -> str:
        """Its column: 'resid_pre.L3.inserted', 'L2H9'."""
        whole = self.site.name if self.unit is None else Unit(self.site, self.unit).name
        return f'{whole}.{self.type}' if self.type else whole


@dataclass(eq=False, repr=False)
class Sweep(Patching):
    """Base of the stages that patch sites, or heads, one at a time."""

    _: KW_ONLY
    by: str | None = choice(BY)
    types: str = choice(tuple(SCHEMES))

    def _places(self) -> list[Part]:
        """Returns what is patched, without types, in the order of the columns."""
        raise NotImplementedError

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Patches every pair of a frame."""
        self.check()
        versions = two_versions(inp, self, self.text)
        parts = self._parts()
        names = [part.name for part in parts]
        if len(inp):
            columns = (self._by_position if self.by == 'position' else self._jointly)(versions, parts)
        elif self.by == 'position':
            empty = {name: np.zeros(0, dtype=object) for name in [*names, TOKENS, POSITION_TYPES]}
            columns = no_pairs([]) | empty
        else:
            columns = no_pairs(names)
        # Numbers that run on stand together, so that the note is short.
        listed = [part.name for part in sorted(parts, key=lambda part: part.type)]
        return with_columns(inp, columns, self._analysis(listed, positions=str(self.by), types=self.types))

    def _parts(self) -> list[Part]:
        types = types_of(self.model, self.types) if self.by == 'token_type' else ('',)
        return [place._replace(type=kind) for place in self._places() for kind in types]

    # -- types, or everything

    def _jointly(self, versions: tuple[Fields, Fields], parts: Sequence[Part]) -> dict[str, Any]:
        inputs = Inputs.pairs(self.model, *versions, self.filler)
        table = started(self.model, inputs, versions, len(parts))

        def variants(tower: int, rows: np.ndarray) -> list[Variant]:
            if self.by is None:
                return [Variant(site, unit) for site, unit, _ in parts]
            types = torch.from_numpy(inputs.types(tower, rows, scheme=self.types)).to(self.model.map.device)
            where = {kind: types == place for place, kind in enumerate(types_of(self.model, self.types))}
            return [Variant(site, unit, where[kind]) for site, unit, kind in parts]

        def step(engine: Engine, rows: np.ndarray) -> np.ndarray:
            vectors = []
            for tower in range(len(inputs.towers)):
                both, runs = self._sides(engine, inputs, tower, rows, parts)
                vectors.append(torch.cat([both, self._patched(engine, both, runs, variants(tower, rows))]))
            return as_numpy(self.model.read(vectors))

        for rows, scores in self._swept(inputs, np.full(len(inputs), len(parts)), step):
            table[:, rows] = self.model.finite(scores)
        table[2:] = self._effects(table)
        if self.by == 'token_type':
            for row, kinds in enumerate(self._types(inputs)):
                table[2:, row][[part.type not in kinds for part in parts]] = np.nan
        return pair_columns(table, inputs.problems, [part.name for part in parts])

    # -- one position at a time

    def _by_position(self, versions: tuple[Fields, Fields], parts: Sequence[Part]) -> dict[str, Any]:
        model = self.model
        inputs = Inputs.pairs(model, *versions, self.filler)
        table = started(model, inputs, versions, 0)
        missing = [np.full((len(parts), length), np.nan, dtype=table.dtype) for length in inputs.lengths]
        effects = dict(enumerate(missing))

        def step(engine: Engine, rows: np.ndarray) -> list[np.ndarray]:
            seen = [self._sides(engine, inputs, tower, rows, parts) for tower in range(len(inputs.towers))]
            plain = [both for both, _ in seen]
            found = [model.finite(as_numpy(model.read(plain)))]
            for tower, (both, runs) in enumerate(seen):
                n_tokens = runs[0].batch.shape[1]
                where = torch.eye(n_tokens, dtype=torch.bool, device=both.device)[:, None].expand(-1, len(rows), -1)
                vectors, scores = [self._ordered(one)[0] for one in plain], []
                # Many vectors a sequence are not kept for all parts at a time.
                size = len(parts) if model.one_vector else 1
                for start in range(0, len(parts), size):
                    some = parts[start : start + size]
                    variants = [Variant(site, unit, one) for site, unit, _ in some for one in where]
                    vectors[tower] = self._patched(engine, both, runs, variants)
                    scores.append(as_numpy(model.read(vectors)))
                of_tower = model.finite(np.concatenate(scores))
                found.append(of_tower.reshape(len(parts), n_tokens, len(rows)))
            return found

        for rows, (scores, *towers) in self._swept(inputs, len(parts) * inputs.lengths, step):
            table[:, rows] = scores
            for i, row in enumerate(rows):
                lengths = [tower.lengths[row] for tower in inputs.towers]
                whole = np.concatenate([of[:, :n, i] for of, n in zip(towers, lengths, strict=True)], axis=1)
                both = np.broadcast_to(table[:2, row, None, None], (2, *whole.shape))
                effects[int(row)] = self._effects(np.concatenate([both, whole[None]]))[0]
        columns = {part.name: [effects[row][i] for row in effects] for i, part in enumerate(parts)}
        return pair_columns(table, inputs.problems, []) | columns | self._positions(inputs)

    def _positions(self, inputs: Inputs) -> dict[str, Any]:
        tokens = []
        for row in range(len(inputs)):
            ids = np.concatenate([tower.arrays(np.asarray([row]), PERTURBED)[0][0] for tower in inputs.towers])
            tokens.append(self.model.maker.tokenizer.convert_ids_to_tokens(ids.tolist()))
        return {TOKENS: tokens, POSITION_TYPES: self._types(inputs)}

    def _types(self, inputs: Inputs) -> list[list[str]]:
        """Returns the types of all positions of every row, over all towers."""
        rows = range(len(inputs))
        return [[kind for tower in inputs.towers for kind in tower.types(row, scheme=self.types)] for row in rows]

    # -- runs

    def _sides(
        self, engine: Engine, inputs: Inputs, tower: int, rows: np.ndarray, parts: Sequence[Part]
    ) -> tuple[torch.Tensor, tuple[Run, Run]]:
        return self._both(engine, inputs, tower, rows, list(dict.fromkeys(part.site for part in parts)))

    def _patched(
        self, engine: Engine, both: torch.Tensor, runs: Sequence[Run], variants: Sequence[Variant]
    ) -> torch.Tensor:
        """Returns the vectors of variants in the order in which they are given."""
        base, source = runs
        order = sorted(range(len(variants)), key=lambda i: (variants[i].site.layer, variants[i].site.kind))
        plain, back = self._ordered(both)[0], np.argsort(order)
        some = [variants[i] for i in order]
        return patched(engine, self.model.map, base, source.values, some, self.budget.tokens, plain)[back]
