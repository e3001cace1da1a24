"""Bi-encoders: query and text in two sequences, the similarity of two vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch

from pyterrier_mech.anatomy.readouts import READOUTS, Readout
from pyterrier_mech.inputs.inputs import checked_texts
from pyterrier_mech.rankers.folders import Stated, stated_bi_encoder
from pyterrier_mech.rankers.ranker import as_numpy
from pyterrier_mech.rankers.two_towers import TwoTowers


@dataclass(eq=False, repr=False)
class BiEncoder(TwoTowers):
    """Re-ranks with the similarity of a query vector and a text vector.

    **Input columns**: qid, query, docno, text. **Output columns**: the same with score and rank.

    Pooling, similarity and prefixes are read from a sentence-transformers folder or repository where the model is
    one; otherwise pooling must be given.

    Args:
        model: Hub name, local folder, or a loaded module (used as it is, where it is).
        tokenizer: A tokenizer or its name; by default the model's own.
        pooling: 'cls', 'mean' (over the tokens that are not padding) or 'last' (the last of these, as in decoders).
        similarity: 'cosine' or 'dot'.
        normalize: Whether vectors are brought to length 1 first; by default as the model says, else not.
        query_prefix: Put before every query, e.g. 'query: '.
        text_prefix: Put before every text.
        text_field: Column that holds the text.
        max_length: Tokens of a sequence, special tokens included; by default the model's own maximum.
        batch_tokens: Tokens of one batch, padding included; by default what suits the device.
        device: 'cpu', 'cuda', …; by default CUDA where there is one.
        dtype: 'float32' (default, whatever the checkpoint was stored in), 'float64', 'bfloat16', 'float16', 'tf32'.
        verbose: Shows progress bars.

    Raises:
        FileNotFoundError: When first used, if there is no such model.
        ValueError: When first used, if the family is unknown, or pooling or similarity are not known or not given.
    """

    _: KW_ONLY
    pooling: str | None = None
    similarity: str | None = None
    normalize: bool | None = None
    query_prefix: str | None = None
    text_prefix: str | None = None

    def encode(self, field: str, texts: Sequence[str]) -> np.ndarray:
        """Returns the pooled vectors [texts, d] of a field, 'query' or 'text', before any normalisation."""
        with self.computing():
            return as_numpy(self.vectors(field, checked_texts('texts', texts)))

    def read(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns the similarity [...] of query and text vectors [..., d]."""
        query, text = (self.stated_.finish(part) for part in vectors)
        return (query * text).sum(-1)

    @property
    def readout(self) -> Readout:
        """How a sequence becomes a vector."""
        return READOUTS[str(self.stated_.pooling)]

    _read_stated = staticmethod(stated_bi_encoder)

    def _stated(self) -> Stated:
        prompts = {'query_prompt': self.query_prefix, 'text_prompt': self.text_prefix}
        stated = super()._stated()
        return stated.given(pooling=self.pooling, similarity=self.similarity, normalize=self.normalize, **prompts)
