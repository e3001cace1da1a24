"""Path patching: how much of a head's effect goes straight to another head, or to the score, as a pipeline stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyterrier_mech.anatomy.model import Run
from pyterrier_mech.columns import PATHS, SCORE, SENDERS
from pyterrier_mech.frames import Fields, two_versions, with_columns
from pyterrier_mech.inputs.inputs import Inputs
from pyterrier_mech.patch.engine import Engine, patched
from pyterrier_mech.patch.pairs import no_pairs, pair_columns, started
from pyterrier_mech.patch.patching import Patching
from pyterrier_mech.patch.variants import PROJECTIONS, Variant, changing, variants_of
from pyterrier_mech.rankers.ranker import as_numpy
from pyterrier_mech.stage import units
from pyterrier_mech.units import HEADS, Site, Unit, Units, parse

ALL = 'all'

Path = tuple[Unit, Unit | None]
"""Sender and receiver; None is the score."""


@dataclass(eq=False, repr=False)
class PatchPaths(Patching):
    """How much of each head's effect goes straight to the score, or into another head: exact path patching.

    First the ranker reads the original pair with every head's output held as it is, but for one, the sender, which
    gives what it gives for the perturbed pair. Feed-forward blocks and norms go on as they must. What the receiver
    reads then is what the sender tells it, through no other head. Where the receiver is the score, its change is the
    effect. Where it is a head, the ranker reads the original pair once more, with only the queries, the keys or the
    values of that head replaced by these, and the effect is how far that moves the score.

    **Input columns**: qid, query, docno, text and the other version that `Perturb` wrote: text_0, query_0, or both.

    **Output columns**: the same and `score_original`, `score_perturbed`, `patchable` as `PatchHeads` writes them;
    `analysis`, which says how the effects were made; and the effects, in raw logits: one float column a path,
    `L0H4>score`, `L1H1>L2H9.k`, for every sender below the receiver. With `receivers='all'` one array [senders] a
    receiver, `paths.score`, `paths.L2H9.k` (NaN where the sender is not below the receiver), and `path_senders`, the
    names of the senders in their order. The ranking is kept.

    A bi-encoder's heads are patched in both towers together.

    Args:
        model: A ranker.
        receivers: 'score'; a list of receivers, `['score', 'L2H9.q', 'L2H9.k', 'L2H9.v']`; or 'all', the score and the
            queries, keys and values of every head.
        senders: The heads that send, as `Units.of` accepts them; by default all.
        direction: 'perturbed_to_original' (as above), or 'original_to_perturbed': the perturbed pair is read, the
            sender gives what it gives for the original, and effects are patched score − score_perturbed.
        effect: 'difference', or 'normalized': divided by the whole score change in the patching direction.
        filler: Token that stands where one side has none; see `PatchHeads`.
        batch_tokens: Tokens in memory at a time, over all patched variants; by default as the model has it.
        text_field: Column of the text; by default as the model has it.
        verbose: Shows a progress bar; by default as the model has it.

    Raises:
        TypeError: If the model is not a ranker.
        ValueError: If a setting is not known, a head does not exist, or no sender is below a receiver, before any work;
            if queries, keys and values of the family are not described; if a score is not finite.

    Source: Wang, Variengien, Conmy, Shlegeris, Steinhardt 2022, arXiv 2211.00593, appendix B; in cross-encoders Lu,
    Chen, Eickhoff, EMNLP 2025, arXiv 2502.04645.
    """

    receivers: str | Sequence[str] = SCORE
    _: KW_ONLY
    senders: Any = units([HEADS], default=None)

    def check(self) -> None:
        """Checks the settings, before any work."""
        super().check()
        self._named()

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Patches every path for every pair of a frame."""
        self.check()
        versions = two_versions(inp, self, self.text)
        paths = self._paths()
        names = [path_name(*path) for path in paths]
        columns = self._patch(versions, paths, names) if len(inp) else no_pairs(names)
        if self.receivers == ALL:
            columns = self._joined(columns, paths, len(inp))
        return with_columns(inp, columns, self._analysis([name for name in columns if '>' in name or '.' in name]))

    # -- which paths

    def _named(self) -> list[Unit | None]:
        """Returns the receivers that are named, None for the score."""
        if self.receivers == ALL:
            return []
        given = [self.receivers] if isinstance(self.receivers, str) else list(self.receivers)
        found = [None if name == SCORE else parse(name) for name in given]
        for name, unit in zip(given, found, strict=True):
            if unit is not None and unit.site.kind not in PROJECTIONS:
                raise ValueError(
                    f"a receiver is 'score' or what a head reads, such as 'L2H9.q', 'L2H9.k' or 'L2H9.v'; got {name!r}"
                )
        if not given or len(set(found)) < len(found):
            raise ValueError(f"receivers must be 'score', 'all', or a list of different receivers; got {given!r}")
        return found

    def _receivers(self) -> list[Unit | None]:
        """Returns all receivers, the score first, then by layer."""
        named = self._named()
        if self.receivers == ALL:
            lowest = min((unit.site.layer for unit in self.chosen('senders')), default=0)
            inside = [unit for unit in sorted(Units.all(self.model, PROJECTIONS)) if unit.site.layer > lowest]
            named = [None, *inside]
        else:
            Units(unit for unit in named if unit is not None).check(self.model)
        return sorted(named, key=_place)

    def _paths(self) -> list[Path]:
        senders = self.chosen('senders')
        paths = []
        for receiver in self._receivers():
            below = [unit for unit in senders if receiver is None or unit.site.layer < receiver.site.layer]
            if not below and receiver is not None:
                raise ValueError(f'no sender stands below {receiver.name}: give senders of earlier layers')
            paths += [(unit, receiver) for unit in below]
        return paths

    def _joined(self, columns: dict[str, Any], paths: Sequence[Path], n_rows: int) -> dict[str, Any]:
        """From a column a path to an array a receiver."""
        senders = self.chosen('senders')
        place = {unit: i for i, unit in enumerate(senders)}
        arrays: dict[str, np.ndarray] = {}
        for path in paths:
            values = np.asarray(columns.pop(path_name(*path)))
            array = arrays.setdefault(
                PATHS + receiver_name(path[1]), np.full((n_rows, len(senders)), np.nan, dtype=values.dtype)
            )
            array[:, place[path[0]]] = values
        names = [unit.name for unit in senders]
        lists = {SENDERS: pd.Series([names] * n_rows, dtype=object).to_numpy()}
        return columns | {name: _cells(array) for name, array in arrays.items()} | lists

    # -- runs

    def _patch(self, versions: tuple[Fields, Fields], paths: Sequence[Path], names: Sequence[str]) -> dict[str, Any]:
        inputs = Inputs.pairs(self.model, *versions, self.filler)
        table = started(self.model, inputs, versions, len(paths))
        number = {path: 2 + i for i, path in enumerate(paths)}

        def step(engine: Engine, rows: np.ndarray) -> np.ndarray:
            vectors = [self._tower(engine, inputs, tower, rows, number) for tower in range(len(inputs.towers))]
            return as_numpy(self.model.read(vectors))

        heads = len(self.chosen('senders'))
        for rows, scores in self._swept(inputs, np.full(len(inputs), heads), step):
            table[:, rows] = self.model.finite(scores)
        table[2:] = self._effects(table)
        return pair_columns(table, inputs.problems, names)

    def _tower(
        self, engine: Engine, inputs: Inputs, tower: int, rows: np.ndarray, number: dict[Path, int]
    ) -> torch.Tensor:
        """Returns the vectors [original, perturbed, paths…] x pairs x d of one tower."""
        senders = variants_of(self.chosen('senders'))
        receivers = [receiver for receiver in self._receivers() if receiver is not None]
        both, (base, source) = self._frozen_sides(engine, inputs, tower, rows)
        plain = self._ordered(both)[0]
        vectors = torch.cat([both, plain.expand(len(number), *plain.shape)])
        active = [senders[i] for i in changing(self.model.map, base, source.values, senders)]
        if not active:
            return vectors
        tokens = self.budget.tokens
        for some, site, values in engine.frozen(base, source.values, active, self._read(), tokens):
            sent = [Unit(variant.site, variant.unit or 0) for variant in some]
            if site is None:
                places = [number.get((unit, None)) for unit in sent]
                if places and places[0] is not None:
                    vectors[places] = values
                continue
            to = [unit for unit in receivers if unit.site == site]
            variants = list(self._replacing(values, to))
            places = [number[unit, receiver] for unit in sent for receiver in to]
            vectors[places] = patched(engine, self.model.map, base, {}, variants, tokens, plain)
        return vectors

    def _read(self) -> list[Site]:
        """Returns the sites that receivers read, from the first layer."""
        sites = {unit.site for unit in self._receivers() if unit is not None}
        return sorted(sites, key=lambda site: (site.layer, site.kind))

    def _frozen_sides(
        self, engine: Engine, inputs: Inputs, tower: int, rows: np.ndarray
    ) -> tuple[torch.Tensor, tuple[Run, Run]]:
        kinds = [HEADS, 'attn_out', *{site.kind for site in self._read()}]
        return self._both(engine, inputs, tower, rows, [Site(kind, 0) for kind in kinds])

    def _replacing(self, values: torch.Tensor, receivers: Sequence[Unit]) -> Iterator[Variant]:
        layers = self.model.map.layers
        for value in values:
            for receiver in receivers:
                columns = layers[receiver.site.layer].columns(receiver.index)
                yield Variant(receiver.site, receiver.index, value=value[..., columns])


def _place(receiver: Unit | None) -> tuple[int, ...]:
    """Where a receiver stands among the columns: the score first, then by input, so that notes stay short."""
    return () if receiver is None else (PROJECTIONS.index(receiver.site.kind), receiver.site.layer, receiver.index)


def receiver_name(receiver: Unit | None) -> str:
    """Returns 'score', or the name of what a head reads."""
    return SCORE if receiver is None else receiver.name


def path_name(sender: Unit, receiver: Unit | None) -> str:
    """Returns the name of a path: 'L0H4>score', 'L1H1>L2H9.k'."""
    return f'{sender.name}>{receiver_name(receiver)}'


def _cells(array: np.ndarray) -> np.ndarray:
    cells = np.empty(len(array), dtype=object)
    cells[:] = list(array)
    return cells
