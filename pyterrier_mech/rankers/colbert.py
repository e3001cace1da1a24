"""Late interaction: a vector for every token, and the best match of every query token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pyterrier_mech.anatomy.model import ModelMap
from pyterrier_mech.anatomy.readouts import TokenVectors
from pyterrier_mech.inputs.inputs import checked_texts
from pyterrier_mech.inputs.tokens import Fill, InputMaker
from pyterrier_mech.rankers.late_folders import StatedColBERT, stated_colbert
from pyterrier_mech.rankers.projected import ProjectedEncoder, load_projection
from pyterrier_mech.rankers.ranker import as_numpy
from pyterrier_mech.rankers.two_towers import TwoTowers


@dataclass(eq=False, repr=False)
class ColBERT(TwoTowers):
    """Re-ranks with MaxSim: the sum, over the tokens of the query, of the best match among the tokens of the text.

    **Input columns**: qid, query, docno, text. **Output columns**: the same with score and rank.

    How texts are read is stated by the files of Stanford's checkpoints (`artifact.metadata`), of PyLate and of a
    sentence-transformers `MultiVectorEncoder`, and is obeyed. A loaded module states nothing: then, what is not given
    is as in Stanford's implementation.

    Args:
        model: Hub name, local folder, or a loaded module with `base_model` and `linear`, such as `HF_ColBERT`; or
            `ProjectedEncoder(encoder, linear)` (used as it is, where it is).
        tokenizer: A tokenizer or its name; by default the model's own.
        query_length: Tokens of a query: all queries are cut to that many, and filled up where `expand`.
        expand: Whether queries are filled up with mask tokens, which are compared as all others.
        attend: Whether other tokens attend to these masks.
        skip_punctuation: Whether punctuation of texts is left out of the comparison.
        query_marker: Token behind the first special token of a query; '' for none.
        text_marker: The same for a text.
        text_field: Column that holds the text.
        max_length: Tokens of a text, special tokens included.
        batch_tokens: Tokens of one batch, padding included; by default what suits the device.
        device: 'cpu', 'cuda', …; by default CUDA where there is one.
        dtype: 'float32' (default, whatever the checkpoint was stored in), 'float64', 'bfloat16', 'float16', 'tf32'.
        verbose: Shows progress bars.

    Raises:
        FileNotFoundError: When first used, if there is no such model.
        ValueError: When first used, if the family is unknown, the model has no map to its vectors, or it states
            something that is not done here, such as similarity 'l2'.

    Source: Khattab, Zaharia, SIGIR 2020, arXiv 2004.12832.
    """

    one_vector = False
    stating = StatedColBERT

    _: KW_ONLY
    query_length: int | None = None
    expand: bool | None = None
    attend: bool | None = None
    skip_punctuation: bool | None = None
    query_marker: str | None = None
    text_marker: str | None = None

    def encode(self, field: str, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the vectors [tokens, d] of the tokens that are compared, for every text of a field."""
        with self.computing():
            read = as_numpy(self.vectors(field, checked_texts('texts', texts)))
        return [one[one[:, -1] > 0, :-1] for one in read]

    def read(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns MaxSim [...] of what was read out of queries and texts, [..., tokens, d + 1]."""
        best = self.similarities(vectors).amax(-1)
        counts = vectors[0][..., -1]
        if best.element_size() < 4:
            best, counts = best.float(), counts.float()
        total = (best * counts).sum(-1)
        return total / counts.sum(-1) if self.stated_.mean else total

    def similarities(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns the products [..., query tokens, text tokens], −∞ for tokens of a text that are not compared."""
        query, text = vectors
        products = query[..., :-1] @ text[..., :-1].transpose(-1, -2)
        return products.masked_fill(text[..., -1].unsqueeze(-2) == 0, -torch.inf)

    @property
    def readout(self) -> TokenVectors:
        """How a sequence becomes vectors."""
        module = self.map.module
        project = getattr(module, 'projection', None)
        return TokenVectors(module.linear if project is None else project, self.stated_.normalize)

    def maker_of(self, fields: Sequence[str]) -> InputMaker:
        """Returns what makes the sequences of a tower."""
        maker = self.maker  # that of texts
        if tuple(fields) != ('query',):
            return maker
        return self.cached('query maker', (id(maker), self.key()), lambda: self._query_maker(maker))

    def scored(self, fields: Sequence[str], ids: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        """Returns 1 where a token is compared [rows, tokens]."""
        if not set(fields) & set(self.stated_.skipped_in):
            return shown
        skipped = self.cached('skipped', (id(self.maker), self.key()), self._skipped)
        return shown * ~torch.isin(ids, torch.tensor(skipped, dtype=ids.dtype, device=ids.device))

    def _skipped(self) -> list[int]:
        tokenizer = self.maker.tokenizer
        found = {word: tokenizer.convert_tokens_to_ids(word) for word in self.stated_.skipped}
        return [token for word, token in found.items() if token is not None and self._known(word)]

    def _known(self, word: str) -> bool:
        return word in self.maker.tokenizer.get_vocab()

    # -- loading

    _read_stated = staticmethod(stated_colbert)

    @property
    def stated_(self) -> StatedColBERT:
        """How texts are read and scored."""
        return super().stated_  # type: ignore[return-value]

    def _stated(self) -> StatedColBERT:
        return (
            super()
            ._stated()
            .given(  # type: ignore[return-value]
                query_length=self.query_length,
                expand=self.expand,
                attend=self.attend,
                skip_punctuation=self.skip_punctuation,
                query_marker=self.query_marker,
                text_marker=self.text_marker,
            )
        )

    def _module(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        encoder = super()._module(dtype, device)
        projection = load_projection(self._name, self.stated_.dense)
        return ProjectedEncoder(encoder, projection.to(device=device, dtype=dtype)).eval()

    def _load(self) -> ModelMap:
        self.stated_  # noqa: B018 - refuses what is not done here before weights are loaded
        loaded = super()._load()
        module = loaded.module
        if loaded.base is module or not (hasattr(module, 'linear') or hasattr(module, 'projection')):
            raise ValueError(
                f'{type(module).__name__} has no map to the vectors that are compared: give a ColBERT checkpoint, or '
                'ProjectedEncoder(encoder, linear) with tokenizer='
            )
        return loaded

    def _make_inputs(self) -> InputMaker:
        maker = super()._make_inputs()
        maker.marker = self._marker(maker.tokenizer, self.stated_.text_marker)
        return maker

    def _query_maker(self, maker: InputMaker) -> InputMaker:
        stated, tokenizer = self.stated_, maker.tokenizer
        most = self._positions_of(self.map.module.config, tokenizer)
        longest, fill = stated.query_length or min(most, tokenizer.model_max_length), None
        if stated.expansion != 'none':
            token = stated.expansion_token or tokenizer.mask_token or tokenizer.eos_token
            length = stated.expanded
            longest = length if stated.expansion == 'fixed' else max(length, longest)
            fill = Fill(tokenizer.convert_tokens_to_ids(token), length, stated.attend)
        if not 1 <= longest <= most:
            raise ValueError(f'query_length must be between 1 and the {most} positions of the model; got {longest}')
        marker = self._marker(tokenizer, stated.query_marker)
        return InputMaker(tokenizer, longest, maker.uses_segments, marker, fill)

    @staticmethod
    def _marker(tokenizer: Any, marker: str) -> int | None:
        """Returns the id of a marker; with or without the space behind it, as PyLate has it."""
        if not marker:
            return None
        known = [token for token in (marker, marker.strip()) if token in tokenizer.get_vocab()]
        if not known:
            raise ValueError(
                f"the marker {marker!r} is no token of the tokenizer: give query_marker= and text_marker=, '' for none"
            )
        return tokenizer.convert_tokens_to_ids(known[0])
