"""What is read out of the last hidden states: which tokens, and the vector that they make.

A new way is one class given to `READOUTS`. One that reads a single token says which by `at`: the last layer then
computes that token alone.
"""

from __future__ import annotations

from typing import Protocol

import torch


class Readout(Protocol):
    """From the last hidden states to one vector a sequence."""

    def at(self, scored: torch.Tensor) -> torch.Tensor | int | None:
        """Returns the position of the only token that is read, for all rows or [rows]; None if several are.

        Args:
            scored: 1 where a token counts [rows, tokens].
        """

    def represent(self, hidden: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
        """Returns the vectors [..., d].

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


READOUTS: dict[str, Readout] = {'cls': FirstToken(), 'mean': MeanTokens(), 'last': LastToken()}


def picked(x: torch.Tensor, at: torch.Tensor | int) -> torch.Tensor:
    """Returns one token a row [rows, 1, ...] of [rows, tokens, ...]."""
    if isinstance(at, int):
        return x[:, at : at + 1]
    return x[torch.arange(len(x), device=x.device), at].unsqueeze(1)
