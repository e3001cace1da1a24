"""An encoder with the maps that a late-interaction model has behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pyterrier_mech.rankers import loading
from pyterrier_mech.rankers.folders import read

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid)
}


class ProjectedEncoder(nn.Module):
    """A Hugging Face encoder and what takes its hidden states to the vectors that are compared.

    Args:
        encoder: A Hugging Face encoder without a head.
        projection: From hidden states [..., d] to vectors, e.g. `nn.Linear(768, 128, bias=False)`.
    """

    def __init__(self, encoder: nn.Module, projection: nn.Module):
        """Keeps both as they are."""
        super().__init__()
        self.base_model = encoder
        self.projection = projection

    @property
    def config(self) -> Any:
        """The encoder's configuration."""
        return self.base_model.config

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.base_model.parameters()).dtype


class _Dense(nn.Module):
    """A linear map with an activation function and, where wanted, its input added."""

    def __init__(self, settings: dict[str, Any], activation: nn.Module):
        super().__init__()
        d_in, d_out = settings['in_features'], settings['out_features']
        self.linear, self.activation = nn.Linear(d_in, d_out, bias=settings.get('bias', True)), activation
        if settings.get('use_residual'):
            self.residual = nn.Identity() if d_in == d_out else nn.Linear(d_in, d_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.activation(self.linear(x))
        return out + self.residual(x) if hasattr(self, 'residual') else out


def load_projection(name: str, folders: Sequence[str]) -> nn.Module:
    """Loads the maps of some folders of a model; in the model's own folder, '', it is Stanford's `linear.weight`.

    Raises:
        ValueError: If an activation function is not known, or weights do not fit.
    """
    return nn.Sequential(*[_dense(name, folder) for folder in folders])


def _dense(name: str, folder: str) -> nn.Module:
    state = loading.load_tensors(name, folder, '' if folder else 'linear.')
    if not folder:
        d_out, d_in = state['linear.weight'].shape
        settings: dict[str, Any] = {'in_features': d_in, 'out_features': d_out, 'bias': 'linear.bias' in state}
    else:
        settings = read(name, f'{folder}/config.json', dict) or {}
    path = settings.get('activation_function', 'Identity' if not folder else 'torch.nn.modules.activation.Tanh')
    kind = path.rpartition('.')[2]
    if kind not in _ACTIVATIONS or not (path == kind or path.startswith('torch.nn.')):
        raise ValueError(
            f'activation_function of {folder!r} of {name!r} must be one of {list(_ACTIVATIONS)}; got {path!r}: use '
            'such a model, or give ProjectedEncoder(encoder, projection) with tokenizer='
        )
    dense = _Dense(settings, _ACTIVATIONS[kind]())
    try:
        dense.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f'the weights in {folder!r} of {name!r} do not fit their config.json: {error}') from error
    return dense
