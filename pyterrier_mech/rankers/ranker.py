"""What every neural ranker here is: a re-ranking stage, and the handle through which its inside is reached."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyterrier as pt
import torch
from torch import nn

from pyterrier_mech.anatomy.encoder import Encoder, evaluating, first_position
from pyterrier_mech.frames import require, strings
from pyterrier_mech.inputs.batching import Budget, default_budget
from pyterrier_mech.inputs.tokens import InputMaker, Ragged
from pyterrier_mech.rankers.loading import (
    device_of,
    dtype_of,
    kept_counts,
    load_config,
    load_json,
    load_module,
    load_tokenizer,
)

# Settings that change how fast or where, not what comes out.
_NEUTRAL = ('batch_tokens', 'device', 'verbose')


@dataclass
class Loaded:
    """What a ranker holds once its weights are in memory."""

    encoder: Encoder
    maker: InputMaker
    budget: Budget


class Ranker(pt.Transformer):
    """Base of the rankers.

    Attributes:
        towers: The fields that are encoded together, tower by tower.
        classifier: Whether the module has a classification head.
    """

    towers: ClassVar[tuple[tuple[str, ...], ...]]
    classifier: ClassVar[bool]

    def __init__(
        self,
        model: str | nn.Module,
        *,
        tokenizer: Any = None,
        text_field: str = 'text',
        max_length: int | None = None,
        batch_tokens: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        verbose: bool = False,
    ):
        """Stores the settings; weights are loaded when first needed."""
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.text_field = text_field
        self.max_length = max_length
        self.batch_tokens = batch_tokens
        self.device = device
        self.dtype = dtype
        self.verbose = verbose
        self._loaded: Loaded | None = None

    # -- the stage

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Scores and ranks the rows of a result frame."""
        require(inp, self, ['query', self.text_field])
        scores = self.score(strings(inp, 'query', self), strings(inp, self.text_field, self))
        return pt.model.add_ranks(inp.assign(score=scores))

    @abstractmethod
    def score(self, queries: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        """Returns one raw score for every query and text."""

    # -- the handle

    @property
    def loaded(self) -> Loaded:
        """Weights, tokenizer and batch budget; loads them once."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    @property
    def encoder(self) -> Encoder:
        """The view on the module's layers, heads and neurons."""
        return self.loaded.encoder

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.head_counts)

    def n_heads(self, layer: int) -> int:
        """Number of attention heads in a layer."""
        return self.head_counts[layer]

    def n_neurons(self, layer: int) -> int:
        """Number of neurons in the feed-forward block of a layer."""
        return self.encoder.layers[layer].n_neurons

    @property
    def head_counts(self) -> list[int]:
        """Number of heads of every layer; read off the configuration while no weights are loaded."""
        if self._loaded is None and isinstance(self.model, str):
            config, kept = load_config(self.model), kept_counts(self.model)
            if kept is not None:
                return kept[0]
            return [config.num_attention_heads] * config.num_hidden_layers
        return [layer.n_heads for layer in self.encoder.layers]

    @property
    @abstractmethod
    def pooling_(self) -> str:
        """How a sequence becomes the vector that is read: 'cls' or 'mean'."""

    @abstractmethod
    def read(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns scores [...] from the pooled vectors [..., d] of every tower; shapes are broadcast."""

    def tokenize(self, field: str, texts: Sequence[str]) -> Ragged:
        """Returns the ids of the texts of a field ('query' or 'text') as this ranker reads them."""
        return self.loaded.maker.tokenize(texts)

    def cut(self, parts: Sequence[Ragged]) -> list[Ragged]:
        """Truncates the parts of a tower as the tokenizer would."""
        kept = self.loaded.maker.kept([part.lengths for part in parts])
        return [Ragged(part.flat, part.starts, lengths) for part, lengths in zip(parts, kept, strict=True)]

    @contextmanager
    def computing(self, *, gradients: bool = False) -> Iterator[None]:
        """Runs the block in evaluation mode, without gradients unless asked for, with TF32 only if chosen."""
        with evaluating(self.encoder.module), torch.set_grad_enabled(gradients), _tf32(self.dtype == 'tf32'):
            yield

    # -- loading

    def _load(self) -> Loaded:
        if isinstance(self.model, str):
            device = device_of(self.device)
            module = load_module(self.model, classifier=self.classifier, dtype=dtype_of(self.dtype), device=device)
        else:
            module, device = self.model, next(self.model.parameters()).device
            # TF32 is a way to compute, not a type that the module would have to be converted to.
            if self.device is not None or self.dtype not in (None, 'tf32'):
                raise ValueError(
                    f'device={self.device!r} and dtype={self.dtype!r} are for models loaded by name; '
                    'a loaded module is used as it is: move or convert it before'
                )
        encoder = Encoder(module)
        name = self.model if isinstance(self.model, str) else getattr(module.config, '_name_or_path', '')
        tokenizer = self.tokenizer if self.tokenizer is not None else name
        if not tokenizer:
            raise ValueError('this module does not know where it was loaded from: give its tokenizer=')
        if isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer)
        maker = InputMaker(tokenizer, self._longest(module.config, tokenizer))
        return Loaded(encoder, maker, default_budget(self.batch_tokens, device))

    def _longest(self, config: Any, tokenizer: Any) -> int:
        positions = getattr(config, 'max_position_embeddings', None) or tokenizer.model_max_length
        positions -= first_position(config)
        if self.max_length is None:
            saved = (self._sidecar('sentence_bert_config.json') or {}).get('max_seq_length')
            return int(min(positions, tokenizer.model_max_length, saved or positions))
        if not 1 <= self.max_length <= positions:
            raise ValueError(
                f'max_length={self.max_length} is not between 1 and the {positions} positions of the model'
            )
        return self.max_length

    def _sidecar(self, file: str) -> Any:
        """Returns a JSON file that was saved beside the model, if there is one."""
        return load_json(self.model, file) if isinstance(self.model, str) else None

    # -- how stages are compared, shown and sent to workers

    def _settings(self) -> dict[str, Any]:
        names = inspect.signature(type(self)).parameters
        return {name: getattr(self, name) for name in names}

    def _identity(self) -> tuple[Any, ...]:
        def key(value: Any) -> Any:
            return value if isinstance(value, (str, int, float, type(None))) else id(value)

        return tuple((name, key(value)) for name, value in self._settings().items() if name not in _NEUTRAL)

    def __eq__(self, other: object) -> bool:
        """Two rankers are equal if they give the same scores: same class, weights and result-changing settings."""
        return type(self) is type(other) and self._identity() == other._identity()  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        """Fits `__eq__`."""
        return hash((type(self), self._identity()))

    def __repr__(self) -> str:
        """Rebuilds the ranker, where its model is a name."""
        model = repr(self.model) if isinstance(self.model, str) else f'<{type(self.model).__name__}>'
        defaults = inspect.signature(type(self)).parameters
        options = [
            f'{name}={value!r}' if isinstance(value, (str, int, float)) else f'{name}=<{type(value).__name__}>'
            for name, value in self._settings().items()
            if name != 'model' and value is not defaults[name].default and value != defaults[name].default
        ]
        return f'{type(self).__name__}({", ".join([model, *options])})'

    def __getstate__(self) -> dict[str, Any]:
        """Pickles a ranker that was made by name without its weights; a worker loads them again."""
        state = dict(self.__dict__)
        if isinstance(self.model, str):
            state['_loaded'] = None
        return state

    def subtransformers(self) -> dict[str, pt.Transformer]:
        """Shows no parts in a drawn pipeline."""
        return {}

    @property
    def schematic(self) -> dict[str, Any]:
        """How PyTerrier draws the stage."""
        return {'label': type(self).__name__, 'help_url': None}


def as_numpy(values: torch.Tensor) -> np.ndarray:
    """Returns values on the CPU, half precision raised to float32."""
    values = values.detach()
    return (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).cpu().numpy()


@contextmanager
def _tf32(on: bool) -> Iterator[None]:
    if not on:
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
