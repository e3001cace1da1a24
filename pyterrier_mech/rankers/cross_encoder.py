"""Cross-encoders: query and text in one sequence, one logit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from operator import attrgetter

import torch

from pyterrier_mech.anatomy.model import ModelMap
from pyterrier_mech.anatomy.readouts import READOUTS, Readout
from pyterrier_mech.rankers.folders import stated_cross_encoder
from pyterrier_mech.rankers.ranker import Ranker


@dataclass(eq=False, repr=False)
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

    _: KW_ONLY
    label: int | None = None

    _read_stated = staticmethod(stated_cross_encoder)

    @property
    def readout(self) -> Readout:
        """What the classification head reads."""
        pooling = self.map.family.pooling
        return READOUTS[pooling if '.' not in pooling else attrgetter(pooling)(self.map.module)]

    def read(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns the relevance logits [...] of vectors [..., d].

        Raises:
            ValueError: If something acts on the whole module, whose own forward is not called here.
        """
        whole = vars(self.map.module)
        if whole['_forward_hooks'] or whole['_forward_pre_hooks'] or ('forward' in whole and '_hf_hook' not in whole):
            raise ValueError(
                'hooks and forwards of the whole classification module are not run here: put them on its base_model, '
                'or on the parts of its head'
            )
        return self.map.family.classify(self.map.module, vectors[0])[..., self._relevance]

    @property
    def _relevance(self) -> int:
        n_labels = self.map.module.config.num_labels
        if self.label is None and n_labels > 1:
            raise ValueError(f'{self!r} has {n_labels} labels: say which logit is the relevance, e.g. label=1')
        label = self.label or 0
        if not isinstance(label, int) or not 0 <= label < n_labels:
            raise ValueError(f'label must be a number from 0 to {n_labels - 1} for {self!r}; got {label!r}')
        return label

    def _load(self) -> ModelMap:
        loaded = super()._load()
        if not hasattr(loaded.module.config, 'num_labels') or loaded.base is loaded.module:
            name = type(loaded.module).__name__
            raise ValueError(
                f'{name} has no classification head: load AutoModelForSequenceClassification, or BiEncoder'
            )
        return loaded
