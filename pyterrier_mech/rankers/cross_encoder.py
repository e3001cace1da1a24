"""Cross-encoders: query and text in one sequence, one logit."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import nn

from pyterrier_mech.inputs.batching import in_batches
from pyterrier_mech.rankers.ranker import Loaded, Ranker, as_numpy


class CrossEncoder(Ranker):
    """Re-ranks with a Hugging Face sequence classification model (BERT, ELECTRA, RoBERTa, DistilBERT, ModernBERT).

    **Input columns**: qid, query, docno, text. **Output columns**: the same with score and rank.

    Scores are raw logits. Texts are truncated as the tokenizer truncates pairs.

    Args:
        model: Hub name, local folder, or a loaded module (used as it is, where it is).
        tokenizer: A tokenizer or its name; by default the model's own.
        label: Which logit is the relevance, for models with more than one.
        text_field: Column that holds the text.
        max_length: Tokens of a pair, special tokens included; by default the model's own maximum.
        batch_tokens: Tokens of one batch, padding included; by default what suits the device.
        device: 'cpu', 'cuda', …; by default CUDA where there is one.
        dtype: 'float32' (default, whatever the checkpoint was stored in), 'float64', 'bfloat16', 'float16', 'tf32'.
        verbose: Shows progress bars.

    Raises:
        FileNotFoundError: When first used, if there is no such model.
        ValueError: When first used, if the family is unknown, the checkpoint has no classification head, or the
            model has several labels and none was chosen.
    """

    towers = (('query', 'text'),)
    classifier = True

    def __init__(
        self,
        model: str | nn.Module,
        *,
        tokenizer: Any = None,
        label: int | None = None,
        text_field: str = 'text',
        max_length: int | None = None,
        batch_tokens: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        verbose: bool = False,
    ):
        """Stores the settings; weights are loaded when first needed."""
        super().__init__(
            model,
            tokenizer=tokenizer,
            text_field=text_field,
            max_length=max_length,
            batch_tokens=batch_tokens,
            device=device,
            dtype=dtype,
            verbose=verbose,
        )
        self.label = label

    def score(self, queries: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        """Returns the logit of every pair as float32 (float64 for a float64 model), [pairs]."""
        if not len(queries):
            return np.zeros(0, dtype=np.float32)
        maker, budget = self.loaded.maker, self.loaded.budget
        parts = self.cut([self.tokenize('query', queries), self.tokenize('text', texts)])
        lengths = parts[0].lengths + parts[1].lengths + maker.template(2).n_special

        def step(rows: np.ndarray) -> np.ndarray:
            inputs = maker.batch([part.take(rows) for part in parts], self.encoder.device)
            return as_numpy(self.read([self.encoder.pooled(inputs, self.pooling_)]))

        scores: np.ndarray | None = None
        with self.computing():
            for rows, values in in_batches(lengths, budget, step, verbose=self.verbose, desc=type(self).__name__):
                scores = np.empty(len(queries), dtype=values.dtype) if scores is None else scores
                scores[rows] = values
        return scores  # type: ignore[return-value]

    @property
    def pooling_(self) -> str:
        """What the classification head reads: 'cls' or 'mean'."""
        pooling = self.encoder.family.pooling
        return pooling if '.' not in pooling else attrgetter(pooling)(self.encoder.module)

    def read(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns the relevance logits [...] of pooled vectors [..., d]."""
        return self.encoder.family.classify(self.encoder.module, vectors[0])[..., self._label]

    @property
    def _label(self) -> int:
        n_labels = self.encoder.module.config.num_labels
        if self.label is None and n_labels > 1:
            raise ValueError(f'{self!r} has {n_labels} labels: say which logit is the relevance, e.g. label=1')
        label = self.label or 0
        if not 0 <= label < n_labels:
            raise ValueError(f'label={label} is none of the {n_labels} labels of {self!r}')
        return label

    def _load(self) -> Loaded:
        loaded = super()._load()
        if not hasattr(loaded.encoder.module.config, 'num_labels') or loaded.encoder.base is loaded.encoder.module:
            name = type(loaded.encoder.module).__name__
            raise ValueError(
                f'{name} has no classification head: load AutoModelForSequenceClassification, or BiEncoder'
            )
        return loaded
