"""Activation patching of attention heads, as a pipeline stage."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from pyterrier_mech.patch.sweep import BY, Part, Sweep
from pyterrier_mech.stage import choice, units
from pyterrier_mech.units import HEADS, INSIDE


@dataclass(eq=False, repr=False)
class PatchHeads(Sweep):
    """How much each attention head carries the reaction of a ranker to an edit: exact activation patching.

    The ranker reads the original pair with the output of one head, at every position, replaced by what the head gives
    for the perturbed pair. The head's effect is how far that moves the score. `site` replaces what is inside the head
    instead, and `by` patches a part of the positions at a time.

    **Input columns**: qid, query, docno, text and the other version that `Perturb` wrote: text_0, query_0, or both.

    **Output columns**: the same and `score_original`, `score_perturbed` (raw logits of the aligned inputs),
    `patchable` ('yes', or why the pair cannot be patched: then its effects are NaN), one float column a head,
    `L{layer}H{head}`: patched score − score_original, in raw logits; and `analysis`, which says how they were made. The
    ranking is kept. With other settings the names go on: `L2H9.k` are the keys of a head, `L2H9.inserted` its output at
    the inserted tokens, `L2H9.k.inserted` both. With `by='token_type'` and `by='position'` columns are as `PatchLayers`
    has them: NaN where a row has no such token; arrays [positions], beside `position_tokens` and `position_types`.

    Both inputs have the same length, position by position: see `Aligner`. So `score_original` is the score of the
    original with filler tokens where the perturbed text has more.

    Args:
        model: A ranker.
        heads: The heads to patch, as `Units.of` accepts them: names ('L3H7'), (layer, head), `Units`, a circuit; by
            default all.
        site: 'z', the output of the head; 'q', 'k' or 'v', its queries, keys or values, as the linear maps give them
            (before rotary positions and norms); 'pattern', its attention weights, where a position is the one that
            looks. Where heads share keys and values, `L2H1.k` is key-value head 1 of the layer, of all its heads.
        by: None, all positions together; 'token_type', all of a kind of token together, as in `PatchLayers`;
            'position', one at a time. These take a run for every kind or position: choose some `heads`.
        types: 'basic' or 'literature'; see `PatchLayers`.
        direction: 'perturbed_to_original' (as above), or 'original_to_perturbed': the perturbed pair is read with a
            head of the original, and a column holds patched score − score_perturbed.
        effect: 'difference', or 'normalized': divided by the whole score change in the patching direction; NaN where
            there is none. For one row only: `HeadEffects` wants differences.
        filler: Token that stands where one side has none; 'mask' hides these positions from attention instead, so that
            `score_original` is the score of the plain text, unless one of the texts is truncated; None marks pairs of
            unequal length as not patchable.
        batch_tokens: Tokens in memory at a time, over all patched variants; by default as the model has it. Peak
            memory grows with this number and with the layers times the tokens of one batch of pairs.
        text_field: Column of the text; by default as the model has it.
        verbose: Shows a progress bar; by default as the model has it.

    Raises:
        TypeError: If the model is not a ranker.
        ValueError: If a setting is not known or a head does not exist, before any work; if a score is not finite; if
            the family's queries, keys and values are not described; or if 'pattern' is wanted of a module with hooks or
            adapters.

    Source: Chen, Merullo, Eickhoff, SIGIR 2024, arXiv 2405.02503; Vig et al., NeurIPS 2020.
    """

    _: KW_ONLY
    heads: Any = units([HEADS], default=None)
    site: str = choice(['z', *INSIDE])
    by: str | None = choice(BY, default=None)

    def _places(self) -> list[Part]:
        kind = HEADS if self.site == 'z' else self.site
        counts, heads = self.model.counts(kind), self.model.counts(HEADS)
        if all(counts[site._replace(kind=kind)] == count for site, count in heads.items()):
            return [Part(site._replace(kind=kind), number) for site, number in self.chosen('heads')]
        if self.heads is not None:
            raise ValueError(
                f'heads of {self.model!r} share their keys and values, so site={self.site!r} cannot be patched for '
                'some heads alone: leave heads=None, which patches every key-value head'
            )
        return [Part(site, number) for site, count in counts.items() for number in range(count)]
