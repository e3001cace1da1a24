"""What every neural ranker here is: a re-ranking stage, and the handle through which its inside is reached."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyterrier as pt
import torch

from pyterrier_mech.anatomy.model import Edit, ModelMap, first_position
from pyterrier_mech.anatomy.readouts import Readout
from pyterrier_mech.frames import Fields, texts_of
from pyterrier_mech.inputs.batching import Budget, collected, default_budget
from pyterrier_mech.inputs.inputs import ORIGINAL, Inputs
from pyterrier_mech.inputs.tokens import InputMaker, Ragged
from pyterrier_mech.inputs.words import Words
from pyterrier_mech.provenance import with_seen
from pyterrier_mech.rankers import loading
from pyterrier_mech.rankers.aligned import aligned
from pyterrier_mech.rankers.folders import Stated
from pyterrier_mech.rankers.modes import evaluating, tf32
from pyterrier_mech.stage import Stage
from pyterrier_mech.units import HEADS, NEURONS, Site

Edits = Mapping[Site, Edit]


@dataclass(eq=False, repr=False)
class Ranker(Stage):
    """Base of the rankers.

    Attributes:
        towers: The fields that are encoded together, tower by tower.
        classifier: Whether the module has a classification head.
        one_vector: Whether a sequence is read out as one vector; else as one a token.
        stating: What holds what a folder states.
    """

    towers: ClassVar[tuple[tuple[str, ...], ...]]
    classifier: ClassVar[bool]
    one_vector: ClassVar[bool] = True
    stating: ClassVar[type[Stated]] = Stated

    model: Any
    _: KW_ONLY
    tokenizer: Any = None
    text_field: str = 'text'
    max_length: int | None = None
    batch_tokens: int | None = None
    device: str | None = None
    dtype: str | None = None
    verbose: bool = False
    _carried: Stated | None = field(default=None, init=False)

    def key(self) -> tuple[Any, ...]:
        """Returns everything that the result depends on."""
        return (*super().key(), self._carried)

    # -- the stage

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Scores and ranks the rows of a result frame."""
        self.check()
        values = texts_of(inp, self, self.text_field)
        res = pt.model.add_ranks(inp.assign(score=self.score(values['query'], values['text'])))
        return with_seen(res, self.seen) if len(inp) else res

    def score(self, queries: Sequence[str], texts: Sequence[str], *, edits: Edits | None = None) -> np.ndarray:
        """Returns one raw score for every query and text, [pairs]: float32, or float64 for a float64 model.

        Args:
            queries: A list, Series or array of strings.
            texts: The same, one a query.
            edits: What stands in the place of some sites of the model.

        Raises:
            TypeError: If queries or texts are not lists of strings.
            ValueError: If they differ in number, or a score is not finite.
        """
        if not len(queries) and not len(texts):
            return np.zeros(0, dtype=np.float32)
        return self.score_inputs(Inputs.plain(self, queries, texts), edits)

    def score_inputs(self, inputs: Inputs, edits: Edits | None = None) -> np.ndarray:
        """Returns the scores [rows] of inputs, with some sites edited."""

        def step(rows: np.ndarray) -> np.ndarray:
            return as_numpy(self.run(inputs, rows, edits=edits))

        with self.computing():
            scores = collected(inputs.lengths, self.budget, step, verbose=self.verbose, desc=type(self).__name__)
        return self.finite(scores)

    def align(self, frame: pd.DataFrame, *, filler: str | None = 'a') -> pd.DataFrame:
        """Returns how the two versions of every row stand side by side when they are patched, one row a position.

        Args:
            frame: What `Perturb` gave: qid, docno, query, text and text_0, query_0, or both.
            filler: As in `PatchHeads`.

        Returns:
            qid, docno, `position`, `original` and `perturbed` (tokens), `change` ('same', 'replaced', 'inserted',
            'deleted'), `type` and `patchable` ('yes', or why not). Where there is no alignment, only the original
            stands there. The index is that of the frame. The positions of a bi-encoder's query come first, as in the
            arrays of `PatchLayers`.
        """
        return aligned(self, frame, filler)

    # -- the handle

    @property
    def map(self) -> ModelMap:
        """The map of the model's layers, heads and neurons; loads the weights once."""
        return self.cached('map', self._weights_key, self._load)

    @property
    def maker(self) -> InputMaker:
        """The tokenizer and the maximum length."""
        key = (self._weights_key, self.tokenizer, self.max_length)
        return self.cached('maker', key, self._make_inputs)

    @property
    def budget(self) -> Budget:
        """Tokens of one batch; remembered when memory runs out."""
        key = (self._weights_key, self.batch_tokens)
        return self.cached('budget', key, lambda: default_budget(self.batch_tokens, self.map.device))

    def budget_of(self, batch_tokens: int | None) -> Budget:
        """Returns the budget of a stage that runs this ranker."""
        return self.budget if batch_tokens is None else Budget(batch_tokens)

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.counts(HEADS))

    def n_heads(self, layer: int) -> int:
        """Number of attention heads in a layer."""
        return self.counts(HEADS)[Site(HEADS, layer)]

    def n_neurons(self, layer: int) -> int:
        """Number of neurons in the feed-forward block of a layer."""
        return self.counts(NEURONS)[Site(NEURONS, layer)]

    @property
    def head_counts(self) -> list[int]:
        """Number of attention heads of every layer."""
        return list(self.counts(HEADS).values())

    def counts(self, kind: str) -> dict[Site, int]:
        """Returns how many heads (also where the kind is inside heads) or 'neurons' every layer has.

        Heads are read off the configuration while no weights are loaded.
        """
        if kind != NEURONS and self._by_name and 'map' not in self.__dict__.get('_kept', ({}, {}))[1]:
            config, kept = loading.load_config(self._name), loading.kept_counts(self._name)
            heads = config.num_attention_heads
            if kind in ('k', 'v'):
                heads = getattr(config, 'num_key_value_heads', None) or heads
            counts = kept[0] if kept is not None else [heads] * config.num_hidden_layers
            return {Site(kind, layer): count for layer, count in enumerate(counts)}
        return self.map.counts(kind)

    @property
    def float_type(self) -> np.dtype[Any]:
        """The NumPy type of scores and effects: float64 for a float64 model, else float32."""
        return np.dtype('float64' if self.map.dtype == torch.float64 else 'float32')

    @property
    def seen(self) -> Sequence[str]:
        """Queries that the weights have been fitted on, as far as the model says."""
        return list(getattr(self.map.module.config, 'fitted_on', None) or [])

    @property
    @abstractmethod
    def readout(self) -> Readout:
        """What is read out of the last hidden states."""

    @abstractmethod
    def read(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns scores [...] from what was read out of every tower, [..., d] or more; shapes are broadcast."""

    @property
    def prompted(self) -> bool:
        """Whether query and text are read within a prompt, whose positions are of a type of their own."""
        return False

    def parts(self, values: Fields, fields: Sequence[str]) -> list[tuple[str, Ragged]]:
        """Returns field ('query', 'text', or '' for a part of a prompt) and ids of what a tower reads, part by part."""
        return self.maker_of(fields).parts(self._prepared(values, fields))

    def words_of(self, values: Fields) -> dict[str, list[Words]]:
        """Returns the words of all texts as this ranker reads them, token by token."""
        prompts = {field: self.prepared(field, '') for field in values}
        return self.maker.words(self._prepared(values, tuple(values)), prompts)

    def prepared(self, field: str, text: str) -> str:
        """Returns what the tokenizer is given for a text of a field: the prompt before it, where there is one."""
        return self.stated_.prompt(field) + text

    def _prepared(self, values: Fields, fields: Sequence[str]) -> Fields:
        return {field: [self.prepared(field, text) for text in values[field]] for field in fields}

    def maker_of(self, fields: Sequence[str]) -> InputMaker:
        """Returns what makes the sequences of the tower that reads some fields."""
        return self.maker

    def scored(self, fields: Sequence[str], ids: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        """Returns 1 where a token counts when a tower is read out, from 1 where there is one; all [rows, tokens]."""
        if len(self.towers) == 1:
            return shown
        unscored = self.stated_.unscored(self.maker.tokenizer, fields[0], self.maker.max_length)
        return shown * (shown.cumsum(1) > unscored)

    # -- runs

    def run(
        self, inputs: Inputs, rows: np.ndarray, *, side: str = ORIGINAL, edits: Edits | Sequence[Edits] | None = None
    ) -> torch.Tensor:
        """Returns the scores [rows] of some rows, with their graph where gradients are on.

        Args:
            inputs: What this ranker, or one that reads the same, made.
            rows: Which rows.
            side: 'original' or 'perturbed'.
            edits: What stands in the place of sites, for all towers or for each.
        """
        per_tower = edits if isinstance(edits, Sequence) else [edits] * len(self.towers)
        return self.read([self.represent(inputs, i, rows, side, per_tower[i]) for i in range(len(self.towers))])

    def represent(
        self, inputs: Inputs, tower: int, rows: np.ndarray, side: str = ORIGINAL, edits: Edits | None = None
    ) -> torch.Tensor:
        """Returns what is read out of one tower, [rows, d] or more."""
        return self.map.represent(inputs.batch(tower, rows, side), self.readout, edits=edits)[0]

    @contextmanager
    def computing(self, *, gradients: bool = False) -> Iterator[None]:
        """Runs the block alone on the module, in evaluation mode, in the weights' own precision.

        Gradients are off unless asked for, TF32 unless chosen; what the caller has set (inference mode, autocast) does
        not reach in, and is as it was afterwards.
        """
        model = self.map
        with ExitStack() as stack:
            stack.enter_context(model.lock())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.autocast(model.device.type, enabled=False))
            stack.enter_context(torch.set_grad_enabled(gradients))
            stack.enter_context(evaluating(model.module))
            stack.enter_context(tf32(self.dtype == 'tf32'))
            yield

    def finite(self, scores: np.ndarray) -> np.ndarray:
        """Returns scores if they are all finite.

        Raises:
            ValueError: If not.
        """
        if bad := int((~np.isfinite(scores)).sum()):
            raise ValueError(
                f'{bad} of {scores.size} scores are not finite: {self!r} has weights that are NaN or infinite, or its '
                "half precision overflows; use dtype='float32'"
            )
        return scores

    # -- loading

    @property
    def _name(self) -> str:
        """Hub name or folder of the model; where it is a loaded module, what that remembers."""
        if self._by_name:
            return str(self.model)
        return getattr(getattr(self.model, 'config', None), '_name_or_path', '')

    @property
    def _weights_key(self) -> tuple[Any, ...]:
        return self.model, self.dtype, self.device

    @property
    def _by_name(self) -> bool:
        return isinstance(self.model, (str, Path))

    @property
    def stated_(self) -> Stated:
        """How texts are read and scored: as given, or as the files beside the weights state."""
        return self.cached('stated', self.key(), self._stated)

    def _stated(self) -> Stated:
        if self._carried is not None:
            return self._carried
        return self._read_stated(self._name) if self._by_name else self.stating()

    @staticmethod
    @abstractmethod
    def _read_stated(name: str) -> Stated:
        """Returns what a folder or repository states."""

    def around(self, module: Any) -> Ranker:
        """Returns a ranker with another module, which reads texts and scores them as this one does."""
        other = copy.copy(self)
        other._carried = replace(self.stated_, lower_case=False)  # the tokenizer does it
        other.model, other.tokenizer, other.max_length = module, self.maker.tokenizer, self.maker.max_length
        other.device, other.dtype = None, self.dtype if self.dtype == 'tf32' else None
        return other

    def _load(self) -> ModelMap:
        if self._by_name:
            dtype, device = loading.dtype_of(self.dtype), loading.device_of(self.device)
            # Weights that are made in inference mode have no gradients for ever after.
            with torch.inference_mode(False):
                return ModelMap(self._module(dtype, device))
        loading.check_module(self.model)
        # TF32 is a way to compute, not a type that the module would have to be converted to.
        if self.device is not None or self.dtype not in (None, 'tf32'):
            raise ValueError(
                f'device={self.device!r} and dtype={self.dtype!r} are for models loaded by name; '
                'a loaded module is used as it is: move or convert it before'
            )
        return ModelMap(self.model)

    def _module(self, dtype: torch.dtype, device: torch.device) -> Any:
        """Returns the module of a model that is given by name."""
        return loading.load_module(self._name, classifier=self.classifier, dtype=dtype, device=device)

    def _make_inputs(self) -> InputMaker:
        config = self.map.module.config  # a folder that is not there is noticed here
        tokenizer = self.tokenizer if self.tokenizer is not None else self._name
        if not tokenizer and isinstance(tokenizer, str):
            raise ValueError('this module does not know where it was loaded from: give its tokenizer=')
        if isinstance(tokenizer, (str, Path)):
            tokenizer = loading.load_tokenizer(str(tokenizer))
        loading.check_tokenizer(tokenizer, config, self._name, pairs=len(self.towers) == 1)
        if self.stated_.lower_case:
            tokenizer = loading.in_lower_case(tokenizer)
        return self._maker(tokenizer, self._longest(config, tokenizer))

    def _maker(self, tokenizer: Any, longest: int) -> InputMaker:
        return InputMaker(tokenizer, longest, loading.uses_segments(tokenizer, self.map.module.config))

    def _longest(self, config: Any, tokenizer: Any) -> int:
        positions = self._positions_of(config, tokenizer)
        if self.max_length is None:
            return int(min(positions, self.stated_.max_length or tokenizer.model_max_length))
        if not 1 <= self.max_length <= positions:
            raise ValueError(
                f'max_length must be between 1 and the {positions} positions of the model; got {self.max_length}'
            )
        return self.max_length

    @staticmethod
    def _positions_of(config: Any, tokenizer: Any) -> int:
        """Returns how many tokens a sequence can have."""
        positions = getattr(config, 'max_position_embeddings', None) or tokenizer.model_max_length
        return int(positions - first_position(config))


def as_numpy(values: torch.Tensor) -> np.ndarray:
    """Returns values on the CPU, half precision raised to float32."""
    values = values.detach()
    return (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).cpu().numpy()
