"""Causal re-rankers: a language model reads query and text within a question, and its next word answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import nn

from pyterrier_mech.anatomy.families import known_types
from pyterrier_mech.anatomy.model import ModelMap
from pyterrier_mech.anatomy.readouts import READOUTS, Readout
from pyterrier_mech.inputs.prompts import Prompt, PromptMaker
from pyterrier_mech.rankers import loading
from pyterrier_mech.rankers.causal_folders import stated_causal
from pyterrier_mech.rankers.checks import check_unhooked
from pyterrier_mech.rankers.folders import Stated
from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.rankers.templates import KNOWN, known_for

_INSTRUCTION = '{instruction}'
# What some families multiply logits by, which is not done here.
_SCALES = ('logit_scale', 'logits_scaling', 'lm_head_multiplier')


@dataclass(eq=False, repr=False)
class CausalReranker(Ranker):
    """Re-ranks with a language model that answers whether a text is relevant: Qwen3-Reranker and others.

    **Input columns**: qid, query, docno, text. **Output columns**: the same with score and rank.

    The score is a difference of two logits at the last position, or one logit, raw. Of a long pair the text is cut, and
    a query that takes more than three quarters of the room beside the prompt; never the prompt.

    Args:
        model: Hub name, local folder, or a loaded module (used as it is, where it is).
        tokenizer: A tokenizer or its name; by default the model's own.
        template: The prompt, with `{query}` and `{text}` in it: one string, which is tokenised whole, or several, which
            are tokenised apart and joined. Special tokens must be written out. Or the name of a known one:
            'qwen3-reranker', 'mxbai-rerank-v2', 'bge-reranker-v2-gemma'. By default what the folder states in the files
            of sentence-transformers, or the known one that the model has its name from.
        words: (a, b) for logit a − logit b, or (a,) for logit a: words that are single tokens, or token ids. By default
            those of the folder or of the known template.
        instruction: What stands in the place of `{instruction}` in the template; by default as the model was trained.
        text_field: Column that holds the text.
        max_length: Tokens of a sequence, prompt included; by default the model's own maximum.
        batch_tokens: Tokens of one batch, padding included; by default what suits the device.
        device: 'cpu', 'cuda', …; by default CUDA where there is one.
        dtype: 'float32' (default, whatever the checkpoint was stored in), 'float64', 'bfloat16', 'float16', 'tf32'.
        verbose: Shows progress bars.

    Raises:
        FileNotFoundError: When first used, if there is no such model.
        ValueError: When first used, if the family is unknown or no decoder, the checkpoint has no head or code of its
            own, there is no template, a word is not a single token, or the prompt leaves no room.
    """

    towers = (('query', 'text'),)
    classifier = False

    _: KW_ONLY
    template: str | Sequence[str] | None = None
    words: Sequence[str | int] | None = None
    instruction: str | None = None

    _read_stated = staticmethod(stated_causal)

    @property
    def prompted(self) -> bool:
        """Query and text are read within a prompt."""
        return True

    def prepared(self, field: str, text: str) -> str:
        """Returns a text as it is: what stands before it is in the template."""
        return text

    @property
    def readout(self) -> Readout:
        """What the head reads."""
        return READOUTS['last']

    def read(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns the scores [...] of vectors [..., d]: of all logits, only those of the words are computed.

        Raises:
            ValueError: If something acts on the whole module, whose own forward is not called here, or it scales its
                logits in a way that is not known.
        """
        module, ids = self.map.module, self.word_ids
        check_unhooked(module, 'language model')
        head, vector = module.get_output_embeddings(), vectors[0]
        if type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks:
            # In half precision a step of a logit is large: two rows cost nothing in float32.
            wide = torch.promote_types(vector.dtype, torch.float32)
            bias = None if head.bias is None else head.bias[ids].to(wide)
            logits = nn.functional.linear(vector.to(wide), head.weight[ids].to(wide), bias)
        else:
            logits = head(vector)[..., ids]
        if cap := getattr(module.config, 'final_logit_softcapping', None):
            logits = torch.tanh(logits / cap) * cap
        return logits[..., 0] - logits[..., 1] if len(ids) == 2 else logits[..., 0]

    @property
    def word_ids(self) -> list[int]:
        """The ids of the words whose logits are read."""
        key = (self._weights_key, self.tokenizer, self.stated_.words)
        return self.cached('word_ids', key, self._look_words_up)

    def _look_words_up(self) -> list[int]:
        words, tokenizer = self.stated_.words, self.maker.tokenizer
        if len(words) not in (1, 2) or len(set(words)) < len(words):
            raise ValueError(f"words must be one word, ('Yes',), or two different ones, ('yes', 'no'); got {words!r}")
        found: list[int] = []
        for word in words:
            ids = [word] if isinstance(word, int) else tokenizer(word, add_special_tokens=False)['input_ids']
            if len(ids) != 1 or not 0 <= ids[0] < self.map.module.config.vocab_size:
                tokens = tokenizer.convert_ids_to_tokens(ids) if isinstance(word, str) else 'none'
                raise ValueError(
                    f'words must be single tokens of this model; {word!r} is {tokens}: mind capitals and spaces'
                )
            found += ids
        return found

    def _stated(self) -> Stated:
        stated = super()._stated()
        named = self.template if self.template in KNOWN else None if stated.template else known_for(self._name)
        known = KNOWN[str(named)] if named else None
        template = self.template if named is None and self.template is not None else None
        pieces = Prompt.of(template).pieces if template is not None else known.template if known else stated.template
        words = self.words if self.words is not None else stated.words or (known.words if known else ())
        if isinstance(words, str):
            raise ValueError(f"words must be one word, ('Yes',), or two different ones, ('yes', 'no'); got {words!r}")
        if not pieces or not len(words):
            missing = 'how it asks: give template=' if not pieces else 'what it answers: give words='
            raise ValueError(
                f'{self!r} does not say {missing}, or the name of a known template, one of {sorted(KNOWN)}'
            )
        instruction = self.instruction if self.instruction is not None else known.instruction if known else None
        if any(_INSTRUCTION in piece for piece in pieces):
            if instruction is None:
                raise ValueError('the template has {instruction} in it: give instruction=')
            pieces = tuple(piece.replace(_INSTRUCTION, instruction) for piece in pieces)
        elif self.instruction is not None and self._carried is None:
            raise ValueError('instruction= is given, but the template has no {instruction} in it')
        return replace(stated, template=pieces, words=tuple(words))

    def _maker(self, tokenizer: Any, longest: int) -> PromptMaker:
        return PromptMaker(tokenizer, longest, Prompt.of(self.stated_.template))

    def _module(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        return loading.load_module(self._name, causal=True, dtype=dtype, device=device)

    def _load(self) -> ModelMap:
        loaded = super()._load()
        kind, config = type(loaded.module).__name__, loaded.module.config
        if not loaded.family.causal:
            known = ', '.join(known_types(lambda family: family.causal))
            raise ValueError(f'{kind} is no decoder; CausalReranker reads those of type {known}: use CrossEncoder')
        if loaded.base is loaded.module or loaded.module.get_output_embeddings() is None:
            raise ValueError(f'{kind} has no head for words: load AutoModelForCausalLM, or use CrossEncoder')
        if scales := [name for name in _SCALES if getattr(config, name, None) not in (None, 1, 1.0)]:
            raise ValueError(f'{kind} scales its logits by {scales[0]}, which is not done here')
        return loaded
