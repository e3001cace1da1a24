"""Cross-encoders: query and text in one sequence, one logit, or what is made of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from operator import attrgetter
from typing import Any

import torch

from pyterrier_mech.anatomy.model import ModelMap
from pyterrier_mech.anatomy.readouts import READOUTS, Readout
from pyterrier_mech.inputs.prompts import Prompt, PromptMaker
from pyterrier_mech.inputs.tokens import InputMaker
from pyterrier_mech.rankers.checks import check_unhooked
from pyterrier_mech.rankers.folders import Stated, stated_cross_encoder
from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.stage import choice


@dataclass(eq=False, repr=False)
class CrossEncoder(Ranker):
    """Re-ranks with a Hugging Face sequence classification model: BERT, ModernBERT and others, or a decoder.

    **Input columns**: qid, query, docno, text. **Output columns**: the same with score and rank.

    Scores are raw logits, unless another `target` is chosen: everything that measures the score measures that, in its
    unit. Texts are truncated as the tokenizer truncates pairs. A decoder is read at its last token that is not the
    padding token of its configuration.

    Args:
        model: Hub name, local folder, or a loaded module (used as it is, where it is).
        tokenizer: A tokenizer or its name; by default the model's own.
        label: Which logit is the relevance, for models with more than one; or two labels (a, b), whose score is
            logit a − logit b: the log-odds of a, where no other label counts.
        target: What the score is: 'logit', or 'probability': the sigmoid of the only logit, or the share that soft-max
            over all labels gives to `label`. Near 0 and 1 probabilities of different logits may round to one number.
        query_prefix: Put before every query, e.g. 'query: '; by default as the model's folder states.
        text_prefix: Put before every text.
        template: For a decoder that reads both within a prompt: as of `CausalReranker`. Special tokens that the
            tokenizer adds are then not added.
        text_field: Column that holds the text.
        max_length: Tokens of a pair, special tokens included; by default the model's own maximum.
        batch_tokens: Tokens of one batch, padding included; by default what suits the device.
        device: 'cpu', 'cuda', …; by default CUDA where there is one.
        dtype: 'float32' (default, whatever the checkpoint was stored in), 'float64', 'bfloat16', 'float16', 'tf32'.
        verbose: Shows progress bars.

    Raises:
        FileNotFoundError: When first used, if there is no such model.
        ValueError: When first used, if the family is unknown, the checkpoint has no classification head, or the
            model has several labels and none was chosen, or label or target do not fit the model or each other.
    """

    towers = (('query', 'text'),)
    classifier = True

    _: KW_ONLY
    label: int | Sequence[int] | None = None
    target: str = choice(['logit', 'probability'])
    query_prefix: str | None = None
    text_prefix: str | None = None
    template: str | Sequence[str] | None = None

    _read_stated = staticmethod(stated_cross_encoder)

    @property
    def prompted(self) -> bool:
        """Whether query and text are read within a prompt."""
        return self.template is not None

    def prepared(self, field: str, text: str) -> str:
        """Returns what the tokenizer is given for a text of a field."""
        return text if self.prompted else super().prepared(field, text)

    def scored(self, fields: Sequence[str], ids: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        """Returns 1 where a token may be read out: of a decoder, as Hugging Face does, by its id."""
        pad = self.map.module.config.pad_token_id
        return shown if pad is None or not self.map.family.causal else shown * (ids != pad)

    def _stated(self) -> Stated:
        stated = super()._stated()
        query = stated.query_prompt if self.query_prefix is None else self.query_prefix
        text = stated.text_prompt if self.text_prefix is None else self.text_prefix
        return replace(stated, query_prompt=query, text_prompt=text)

    def _maker(self, tokenizer: Any, longest: int) -> InputMaker:
        if self.template is None:
            return super()._maker(tokenizer, longest)
        if not self.map.family.causal:
            raise ValueError(
                f'template is for decoders; {self.map.base.config.model_type!r} reads query and text as two parts: use '
                'query_prefix= and text_prefix='
            )
        if self.query_prefix is not None or self.text_prefix is not None:
            raise ValueError('give template=, or query_prefix= and text_prefix=, not both')
        return PromptMaker(tokenizer, longest, Prompt.of(self.template))

    @property
    def readout(self) -> Readout:
        """What the classification head reads."""
        pooling = self.map.family.pooling
        return READOUTS[pooling if '.' not in pooling else attrgetter(pooling)(self.map.module)]

    def read(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns the scores [...] of vectors [..., d], in the unit that `target` says.

        Raises:
            ValueError: If label or target do not fit, or something acts on the whole module, whose own forward is not
                called here.
        """
        check_unhooked(self.map.module, 'classification')
        chosen = self._chosen_labels()
        logits = self.map.family.classify(self.map.module, vectors[0])
        if self.target == 'logit' and len(chosen) == 1:
            return logits[..., chosen[0]]
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()  # what follows would lose most of the little precision
        if len(chosen) == 2:
            return logits[..., chosen[0]] - logits[..., chosen[1]]
        one = logits.shape[-1] == 1
        return logits[..., 0].sigmoid() if one else logits.softmax(-1)[..., chosen[0]]

    def _chosen_labels(self) -> list[int]:
        """Returns the label whose logit is the score, or the two whose difference is."""
        self.check()
        n_labels = self.map.module.config.num_labels
        if self.label is None and n_labels > 1:
            raise ValueError(f'{self!r} has {n_labels} labels: say which logit is the relevance, e.g. label=1')
        several = isinstance(self.label, (tuple, list))
        labels: list[Any] = list(self.label) if several else [0 if self.label is None else self.label]  # type: ignore[arg-type]
        for label in labels:
            if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < n_labels:
                raise ValueError(f'label must be a number from 0 to {n_labels - 1} for {self!r}; got {label!r}')
        if several and (len(labels) != 2 or labels[0] == labels[1]):
            raise ValueError(f'label must be one number, or two different ones (a, b) for a − b; got {self.label!r}')
        if len(labels) == 2 and self.target != 'logit':
            raise ValueError(
                f'label={self.label!r} is a difference of logits, which has no probability: use '
                f"label={labels[0]} with target='probability', or target='logit'"
            )
        return labels

    def _load(self) -> ModelMap:
        loaded = super()._load()
        if not hasattr(loaded.module.config, 'num_labels') or loaded.base is loaded.module:
            name = type(loaded.module).__name__
            raise ValueError(
                f'{name} has no classification head: load AutoModelForSequenceClassification, or BiEncoder'
            )
        return loaded
