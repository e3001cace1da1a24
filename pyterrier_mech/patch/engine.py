"""Chooses how single heads are replaced: by the wavefront where all parts are as described, else by hooks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from pyterrier_mech.anatomy.model import ModelMap, Run, Values
from pyterrier_mech.anatomy.readouts import Readout
from pyterrier_mech.inputs.inputs import ORIGINAL, PERTURBED, Inputs
from pyterrier_mech.patch.hooked import Hooked
from pyterrier_mech.patch.suffix import resumed
from pyterrier_mech.patch.variants import Received, Variant, changing
from pyterrier_mech.patch.wavefront import Wavefront
from pyterrier_mech.units import HEADS, Site

_logger = logging.getLogger('pyterrier_mech')
_told: set[str] = set()


class Engine(Protocol):
    """Replaces sites, or heads of them, one at a time."""

    def recorded(self, kinds: Sequence[str]) -> list[str]:
        """Returns which kinds of sites both runs must have so that sites of some kinds can be replaced."""

    def vectors(self, base: Run, targets: Values, variants: Sequence[Variant], batch_tokens: int) -> torch.Tensor:
        """Returns the vectors [variants, pairs, d] of the base run with one thing at a time replaced.

        Args:
            base: A run by `traced`, with the sites of the variants.
            targets: For these sites, what to put there, broadcastable to [pairs, tokens, width].
            variants: What is replaced, sorted by layer.
            batch_tokens: Tokens of the variants that are in memory at a time, padding included.
        """

    def frozen(
        self, base: Run, targets: Values, senders: Sequence[Variant], read: Sequence[Site], batch_tokens: int
    ) -> Iterator[Received]:
        """Yields what senders change where no other head reacts: feed-forward blocks and norms do.

        Args:
            base: A run by `traced`, with all heads and attention outputs.
            targets: What the senders put there.
            senders: Heads, sorted by layer.
            read: Queries, keys or values that are read, sorted by layer.
            batch_tokens: Tokens in memory at a time, padding included.
        """


def patched(
    engine: Engine,
    model: ModelMap,
    base: Run,
    targets: Values,
    variants: Sequence[Variant],
    batch_tokens: int,
    plain: torch.Tensor,
) -> torch.Tensor:
    """As `Engine.vectors`; variants that change nothing take the vectors [pairs, d] of the base run, and no run."""
    active = changing(model, base, targets, variants)
    vectors = plain.expand(len(variants), *plain.shape)
    if active:
        vectors = vectors.clone()
        vectors[active] = engine.vectors(base, targets, [variants[i] for i in active], batch_tokens)
    return vectors


def engine_for(model: Any) -> Engine:
    """Returns an engine to keep for one call of a stage; says once where there is no fast one."""
    reason = model.map.why_not_plain()
    if not reason:
        return Wavefront(model.map, model.readout)
    if reason not in _told:
        _told.add(reason)
        _logger.info('no fast engine (%s); one full forward for each replacement', reason)
    return Hooked(model.map, model.readout)


def traced(
    model: ModelMap, inputs: Inputs, tower: int, rows: np.ndarray, side: str = ORIGINAL, kinds: Sequence[str] = (HEADS,)
) -> Run:
    """Runs one side of some rows and records what engines need: sites of some kinds, and what all layers are given."""
    return model.run(inputs.batch(tower, rows, side), record=_sites(model, kinds), contexts=True)


def traced_sides(
    model: ModelMap,
    inputs: Inputs,
    tower: int,
    rows: np.ndarray,
    kinds: Sequence[str] = (HEADS,),
    causal: Readout | None = None,
) -> tuple[Run, Run]:
    """As `traced`, both sides; returns the original and the perturbed run.

    Args:
        model: The map.
        inputs: Aligned pairs.
        tower: Which tower.
        rows: Which rows.
        kinds: Sites to record.
        causal: What is read of a causal model whose parts may be computed with; None for any other.
    """
    sides = [inputs.batch(tower, rows, side) for side in (ORIGINAL, PERTURBED)]
    record = _sites(model, kinds)
    if causal is not None and sides[0].tensors.keys() == sides[1].tensors.keys():
        original = model.run(sides[0], record=record, contexts=True)
        if (perturbed := resumed(model, causal, original, sides[1])) is not None:
            return original, perturbed
    if sides[0].tensors.keys() != sides[1].tensors.keys():
        # Only one side hides positions; the other keeps the numbers that the model gives by itself.
        original, perturbed = (model.run(side, record=record, contexts=True) for side in sides)
        return original, perturbed
    both = model.run(sides[0].joined(sides[1]), record=record, contexts=True)
    return both.rows(slice(0, len(rows))), both.rows(slice(len(rows), None))


def _sites(model: ModelMap, kinds: Sequence[str]) -> list[Site]:
    return [site for kind in dict.fromkeys(['resid_pre', *kinds]) for site in model.sites(kind)]
