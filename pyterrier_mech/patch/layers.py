"""Activation patching of whole blocks, by kind of token, by position or everywhere, as a pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from pyterrier_mech.patch.sweep import Part, Sweep
from pyterrier_mech.units import Site

BLOCKS = ('resid_pre', 'attn_out', 'mlp_out')


@dataclass(eq=False, repr=False)
class PatchLayers(Sweep):
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
        types: 'basic', the types above; or 'literature', finer ones by whole words: `cls`, `query_same` and `doc_same`
            (the words that the edit has put in, where they stand in the query and elsewhere in the text),
            `query_other`, `doc_query` (other query words in the text), `doc_other`, `inserted`, `sep_first` and
            `sep_last`. A joint patch of a coarse type is another number than the sum of the finer ones.
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

    def check(self) -> None:
        """Checks the settings, before any work."""
        super().check()
        unknown = [site for site in self.sites if site not in BLOCKS]
        if isinstance(self.sites, str) or unknown or not len(self.sites):
            raise ValueError(f'sites must be a list of some of {BLOCKS}; got {self.sites!r}')
        if self.by is None and not set(self.sites) - {'resid_pre'}:
            raise ValueError("by=None needs 'attn_out' or 'mlp_out': all of 'resid_pre' is the whole change by itself")

    def _places(self) -> list[Part]:
        kinds = [kind for kind in BLOCKS if kind in self.sites and (self.by is not None or kind != 'resid_pre')]
        return [Part(Site(kind, layer)) for kind in kinds for layer in range(self.model.n_layers)]
