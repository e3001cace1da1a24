"""What is read out of the last hidden states: which tokens, and the vector, or the vectors, that they make.

A new way to make one vector is one class given to `READOUTS`. One that reads a single token says which by `at`: the
last layer then computes that token alone. `TokenVectors` and `VocabularyWeights` keep a vector for every token, whose
last entry says whether the token counts, so that what is read out of a tower is one tensor, there too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn


class Readout(Protocol):
    """From the last hidden states to one vector a sequence, or one a token."""

    def at(self, scored: torch.Tensor) -> torch.Tensor | int | None:
        """Returns the position of the only token that is read, for all rows or [rows]; None if several are.

        Args:
            scored: 1 where a token counts [rows, tokens].
        """

    def represent(self, hidden: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
        """Returns the vectors [..., d], or [..., tokens, d + 1].

        Args:
            hidden: Last hidden states [..., tokens, d].
            scored: 1 where a token counts [..., tokens].
        """


class FirstToken:
    """The first token, which is CLS in most encoders."""

    def at(self, scored: torch.Tensor) -> int:
        """Returns 0."""
        return 0

    def represent(self, hidden: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
        """Returns the first hidden state."""
        return hidden[..., 0, :]


class MeanTokens:
    """The mean over the tokens that count."""

    def at(self, scored: torch.Tensor) -> None:
        """Returns None: all tokens are read."""
        return None

    def represent(self, hidden: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
        """Returns the mean."""
        weight = scored.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(-2) / weight.sum(-2)


class LastToken:
    """The last token that counts."""

    def at(self, scored: torch.Tensor) -> torch.Tensor:
        """Returns its position in every row; 0 where no token counts."""
        return (scored * torch.arange(scored.shape[-1], device=scored.device)).argmax(-1)

    def represent(self, hidden: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
        """Returns its hidden state."""
        places = self.at(scored).expand(hidden.shape[:-2])[..., None, None]
        return hidden.gather(-2, places.expand(*hidden.shape[:-2], 1, hidden.shape[-1])).squeeze(-2)


class TokenVectors:
    """A vector for every token: its hidden state taken through some maps."""

    def __init__(self, project: Callable[[torch.Tensor], torch.Tensor], normalize: bool = True):
        """Keeps the maps, and whether vectors are brought to length 1."""
        self.project, self.normalize = project, normalize

    def at(self, scored: torch.Tensor) -> None:
        """Returns None: all tokens are read."""
        return None

    def represent(self, hidden: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
        """Returns the vectors, and last 1 where a token counts, [..., tokens, d + 1]."""
        vectors = self.project(hidden)
        return _flagged(F.normalize(vectors, dim=-1) if self.normalize else vectors, scored)


class VocabularyWeights:
    """A weight for every term of the vocabulary, from the logits of a masked language model at every token.

    What the last linear map reads is kept for every token; `weights` makes the weights of chosen terms from it, since
    terms that a query lacks have no part in a dot product with it.

    Source: Formal, Piwowarski, Clinchant, SIGIR 2021, arXiv 2107.05720 (sum); Formal et al. 2021, arXiv 2109.10086
    (max); Shen et al. 2025, arXiv 2504.14839 (two logarithms).
    """

    def __init__(
        self, features: Callable[[torch.Tensor], torch.Tensor], terms: nn.Module, pooling: str, logarithms: int
    ):
        """Keeps the parts.

        Args:
            features: From hidden states to what the last linear map reads.
            terms: The last linear map.
            pooling: 'max' or 'sum', over the tokens.
            logarithms: How often log(1 + x) is taken.
        """
        self.features, self.pooling, self.logarithms = features, pooling, logarithms
        self.terms: Any = terms

    def at(self, scored: torch.Tensor) -> None:
        """Returns None: all tokens are read."""
        return None

    def represent(self, hidden: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
        """Returns what the last linear map reads, and last 1 where a token counts, [..., tokens, d + 1]."""
        return _flagged(self.features(hidden), scored)

    def weights(self, read: torch.Tensor, chosen: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the weights of chosen terms, or of all, [..., terms], from what `represent` gives."""
        rows = read.reshape(-1, *read.shape[-2:])
        n_terms = self.terms.weight.shape[0] if chosen is None else len(chosen)
        size = max(1, _BLOCK // max(1, rows.shape[1] * n_terms))
        done = [self._pooled(rows[start : start + size], chosen) for start in range(0, len(rows), size)]
        return (torch.cat(done) if done else rows.new_zeros(0, n_terms)).view(*read.shape[:-2], n_terms)

    def _pooled(self, rows: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
        features, counts = rows[..., :-1], rows[..., -1:] > 0
        # A map of another type, or with hooks, is called as it is.
        if chosen is None or type(self.terms) is not nn.Linear or _touched(self.terms):
            logits = self.terms(features)
            logits = logits if chosen is None else logits[..., chosen]
        else:
            bias: Any = self.terms.bias
            logits = F.linear(features, self.terms.weight[chosen], None if bias is None else bias[chosen])
        if self.pooling == 'sum':
            return self._saturated(logits).where(counts, 0).sum(-2)
        return self._saturated(logits.masked_fill(~counts, -torch.inf).amax(-2))

    def _saturated(self, logits: torch.Tensor) -> torch.Tensor:
        values = logits.relu()
        for _ in range(self.logarithms):
            values = values.log1p()
        return values


# Numbers in one block of logits: 64 MiB in float32.
_BLOCK = 2**24

READOUTS: dict[str, Readout] = {'cls': FirstToken(), 'mean': MeanTokens(), 'last': LastToken()}


def _touched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or 'forward' in vars(module))


def _flagged(vectors: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    flags = scored.unsqueeze(-1).to(vectors.dtype).expand(*vectors.shape[:-1], 1)
    return torch.cat([vectors, flags], dim=-1)


def picked(x: torch.Tensor, at: torch.Tensor | int) -> torch.Tensor:
    """Returns one token a row [rows, 1, ...] of [rows, tokens, ...]."""
    if isinstance(at, int):
        return x[:, at : at + 1]
    return x[torch.arange(len(x), device=x.device), at].unsqueeze(1)
