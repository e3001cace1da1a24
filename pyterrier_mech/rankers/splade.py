"""Learned sparse rankers: a weight for every term of the vocabulary, from a masked language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from pyterrier_mech.anatomy.families import known_types
from pyterrier_mech.anatomy.model import ModelMap
from pyterrier_mech.anatomy.readouts import VocabularyWeights
from pyterrier_mech.inputs.inputs import checked_texts
from pyterrier_mech.rankers import loading
from pyterrier_mech.rankers.late_folders import ACTIVATIONS, POOLINGS, StatedSplade, stated_splade
from pyterrier_mech.rankers.ranker import as_numpy
from pyterrier_mech.rankers.two_towers import TwoTowers


@dataclass(eq=False, repr=False)
class Splade(TwoTowers):
    """Re-ranks with the dot product of two vectors over the vocabulary, which a masked language model makes.

    The weight of a term is log(1 + relu(logit)), the largest over the tokens of the text, special tokens included.
    Query and text have one encoder.

    **Input columns**: qid, query, docno, text. **Output columns**: the same with score and rank.

    Pooling, activation and prompts are read from a sentence-transformers `SparseEncoder` folder where the model is
    one. Of the vocabulary only terms are computed that the query has, since others have no part in the score: that is
    exact.

    Args:
        model: Hub name, local folder, or a loaded masked language model (used as it is, where it is).
        tokenizer: A tokenizer or its name; by default the model's own.
        pooling: 'max' or 'sum', over the tokens; by default as the model says, else 'max'.
        activation: 'relu', or 'log1p_relu', which takes the logarithm twice; by default as the model says, else 'relu'.
        query_prefix: Put before every query.
        text_prefix: Put before every text.
        text_field: Column that holds the text.
        max_length: Tokens of a sequence, special tokens included; by default the model's own maximum.
        batch_tokens: Tokens of one batch, padding included; by default what suits the device.
        device: 'cpu', 'cuda', …; by default CUDA where there is one.
        dtype: 'float32' (default, whatever the checkpoint was stored in), 'float64', 'bfloat16', 'float16', 'tf32'.
        verbose: Shows progress bars.

    Raises:
        FileNotFoundError: When first used, if there is no such model.
        ValueError: When first used, if the family is unknown or has no described head for masked tokens, the
            checkpoint lacks it, queries have an encoder of their own, or a setting is not known.
    """

    one_vector = False
    stating = StatedSplade

    _: KW_ONLY
    pooling: str | None = None
    activation: str | None = None
    query_prefix: str | None = None
    text_prefix: str | None = None

    def encode(self, field: str, texts: Sequence[str]) -> np.ndarray:
        """Returns the weights [texts, terms of the vocabulary] of a field, 'query' or 'text'."""
        with self.computing():
            return as_numpy(self.readout.weights(self.vectors(field, checked_texts('texts', texts))))

    def read(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns the dot products [...] of what was read out of queries and texts, [..., pairs, tokens, d + 1]."""
        shape = torch.broadcast_shapes(*(part.shape[:-2] for part in vectors))
        done = [(query * text).sum(-1) for query, text, _ in self.terms(vectors)]
        return torch.stack(done, dim=-1).expand(shape)

    def terms(self, vectors: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yields, pair by pair, the weights [..., terms] of query and text for the terms that the query has, and these.

        Args:
            vectors: What was read out of queries and texts, [..., pairs, tokens, d + 1].
        """
        readout = self.readout
        queries, texts = (_once(part) for part in vectors)
        found: tuple[torch.Tensor, torch.Tensor] | None = None
        for pair in range(max(queries.shape[-3], texts.shape[-3])):
            query, text = queries[..., pair, :, :], texts[..., pair, :, :]
            if found is None or not torch.equal(found[0], query):  # equal queries stand together
                found = query, self._raised(readout.weights(query))
            weights = found[1]
            chosen = (weights > 0).reshape(-1, weights.shape[-1]).any(0).nonzero().squeeze(-1)
            yield weights[..., chosen], self._raised(readout.weights(text, chosen)), chosen

    @staticmethod
    def _raised(weights: torch.Tensor) -> torch.Tensor:
        return weights.float() if weights.element_size() < 4 else weights

    @property
    def readout(self) -> VocabularyWeights:
        """How a sequence becomes weights of terms."""
        module, family = self.map.module, self.map.family
        assert family.vocabulary is not None  # `_load` has seen to it
        features, stated = partial(family.vocabulary, module), self.stated_
        return VocabularyWeights(
            features, module.get_output_embeddings(), str(stated.pooling), ACTIVATIONS[stated.activation]
        )

    _read_stated = staticmethod(stated_splade)

    @property
    def stated_(self) -> StatedSplade:
        """How texts are read and scored."""
        return super().stated_  # type: ignore[return-value]

    def _stated(self) -> StatedSplade:
        return (
            super()
            ._stated()
            .given(  # type: ignore[return-value]
                pooling=self.pooling,
                activation=self.activation,
                query_prompt=self.query_prefix,
                text_prompt=self.text_prefix,
            )
        )

    def _module(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        return loading.load_module(self._name, masked=True, dtype=dtype, device=device)

    def _load(self) -> ModelMap:
        self.stated_  # noqa: B018 - refuses what is not done here before weights are loaded
        loaded = super()._load()
        name, family = type(loaded.module).__name__, loaded.family
        if family.vocabulary is None:
            raise ValueError(
                f'the head for masked tokens of {loaded.base.config.model_type!r} is not described; it is of '
                f'{", ".join(known_types(lambda one: one.vocabulary is not None))}: describe it with vocabulary= by '
                'pyterrier_mech.rankers.register_family(Family(...))'
            )
        terms: Any = getattr(loaded.module, 'get_output_embeddings', lambda: None)()
        if loaded.base is loaded.module or terms is None:
            raise ValueError(f'{name} has no head for masked tokens: load AutoModelForMaskedLM, or use BiEncoder')
        return loaded


def _once(read: torch.Tensor) -> torch.Tensor:
    """Returns one of [variants, pairs, tokens, d + 1] where all variants are equal, as of a tower without an edit."""
    if read.dim() > 3 and len(read) > 1 and bool((read == read[:1]).all()):
        return read[:1]
    return read


__all__ = ['POOLINGS', 'Splade']
