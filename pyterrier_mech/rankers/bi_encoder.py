"""Bi-encoders: query and text in two sequences, the similarity of two vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from pyterrier_mech.anatomy.readouts import READOUTS, Readout
from pyterrier_mech.inputs.batching import in_batches
from pyterrier_mech.inputs.inputs import Inputs, checked_rows, checked_texts
from pyterrier_mech.rankers.ranker import Edits, Ranker, as_numpy

SIMILARITIES = ('cosine', 'dot')


@dataclass(eq=False, repr=False)
class BiEncoder(Ranker):
    """Re-ranks with the similarity of a query vector and a text vector.

    **Input columns**: qid, query, docno, text. **Output columns**: the same with score and rank.

    Pooling, similarity and prefixes are read from a sentence-transformers folder or repository where the model is
    one; otherwise pooling must be given.

    Args:
        model: Hub name, local folder, or a loaded module (used as it is, where it is).
        tokenizer: A tokenizer or its name; by default the model's own.
        pooling: 'cls' or 'mean' (over the tokens that are not padding).
        similarity: 'cosine' or 'dot'.
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

    towers = (('query',), ('text',))
    classifier = False

    _: KW_ONLY
    pooling: str | None = None
    similarity: str | None = None
    query_prefix: str | None = None
    text_prefix: str | None = None

    def score(self, queries: Sequence[str], texts: Sequence[str], *, edits: Edits | None = None) -> np.ndarray:
        """Returns the similarity of every pair, [pairs]: float32, or float64 for a float64 model."""
        if not len(queries) and not len(texts):
            return np.zeros(0, dtype=np.float32)
        values = checked_rows(queries, texts)
        with self.computing():
            return self.finite(as_numpy(self.read([self.vectors(field, values[field], edits) for field in values])))

    def encode(self, field: str, texts: Sequence[str]) -> np.ndarray:
        """Returns the pooled vectors [texts, d] of a field, 'query' or 'text', before any normalisation."""
        with self.computing():
            return as_numpy(self.vectors(field, checked_texts('texts', texts)))

    def vectors(self, field: str, texts: Sequence[str], edits: Edits | None = None) -> torch.Tensor:
        """As `encode`, on the device; equal texts are encoded once."""
        rows, distinct = pd.factorize(np.asarray(texts, dtype=object))
        inputs = Inputs.of_field(self, field, list(distinct))

        def step(batch: np.ndarray) -> torch.Tensor:
            return self.represent(inputs, 0, batch, edits=edits)

        done = list(
            in_batches(
                inputs.lengths,
                self.budget,
                step,
                verbose=self.verbose,
                desc=f'{type(self).__name__} {field}',
                unit='text',
            )
        )
        order = np.concatenate([batch for batch, _ in done])
        return torch.cat([values for _, values in done])[torch.from_numpy(np.argsort(order)[rows])]

    def prepared(self, field: str, text: str) -> str:
        """Returns what the tokenizer is given for a text of a field, prefix included."""
        return self.prefixes_[field] + text

    def read(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns the similarity [...] of query and text vectors [..., d]."""
        query, text = vectors
        if self.similarity_ == 'cosine':
            query, text = F.normalize(query, dim=-1), F.normalize(text, dim=-1)
        return (query * text).sum(-1)

    @property
    def _saved(self) -> dict[str, Any]:
        """What a sentence-transformers model says of itself; empty for other models."""
        modules = self._sidecar('modules.json')
        if modules is None:
            return {}
        saved = dict(self._sidecar('config_sentence_transformers.json') or {})
        for module in modules:
            kind = module['type'].rsplit('.', 1)[-1]
            if kind == 'Pooling':
                saved['pooling'] = _pooling_mode(self._sidecar(f'{module["path"]}/config.json') or {})
            elif kind not in ('Transformer', 'Normalize'):
                raise ValueError(
                    f'{self.model!r} has a {kind} module after the encoder, which BiEncoder does not apply: '
                    'its scores would be wrong. Use a model of Transformer, Pooling and Normalize alone.'
                )
        return saved

    @property
    def readout(self) -> Readout:
        """How a sequence becomes a vector."""
        return READOUTS[self.pooling_]

    @property
    def pooling_(self) -> str:
        """The pooling in use: as given, or as the model says."""
        mode = self.pooling if self.pooling is not None else self._saved.get('pooling')
        if mode not in READOUTS:
            raise ValueError(
                f'pooling must be one of {list(READOUTS)}; got {mode!r}'
                + ('; this model does not say how it was trained: give pooling=' if mode is None else '')
            )
        return mode

    @property
    def similarity_(self) -> str:
        """The similarity in use: as given, as the model says, or cosine."""
        name = self.similarity or self._saved.get('similarity_fn_name') or 'cosine'
        if name not in SIMILARITIES:
            raise ValueError(f'similarity={name!r} is none of {SIMILARITIES}')
        return name

    @property
    def prefixes_(self) -> dict[str, str]:
        """The prefixes in use, by field: as given, or as the model says."""
        prompts = self._saved.get('prompts') or {}
        query = self.query_prefix if self.query_prefix is not None else prompts.get('query')
        text = self.text_prefix if self.text_prefix is not None else prompts.get('document', prompts.get('passage'))
        return {'query': query or '', 'text': text or ''}


def _pooling_mode(config: dict[str, Any]) -> str:
    """Returns the pooling of a sentence-transformers Pooling module, in its newer or older notation."""
    if 'pooling_mode' in config:
        mode = config['pooling_mode']
        return mode if isinstance(mode, str) else '+'.join(mode)
    names = {'pooling_mode_cls_token': 'cls', 'pooling_mode_mean_tokens': 'mean'}
    modes = [names.get(key, key.removeprefix('pooling_mode_')) for key, on in config.items() if on is True]
    return '+'.join(mode for mode in modes if mode != 'include_prompt')
