"""Whether a module is exactly what its family describes, so that its parts may be computed with directly.

An adapter answers `.weight` with the weight that it adapts, and a hook acts only when its module is called. So where a
part is of another type, or anything has a hook or a forward of its own, the module's own forward runs instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_modules

from pyterrier_mech.anatomy.families import Family
from pyterrier_mech.anatomy.layers import Layer

_NORMS = (nn.LayerNorm, nn.Identity)
_KERNELS = ('eager', 'sdpa', None)
_HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
# Transformers leaves hooks in a module that was once asked for its attentions or hidden states: they only look on.
_RECORDER = 'transformers.utils.output_capturing'
_GLOBAL_HOOKS = ('_global_forward_hooks', '_global_forward_pre_hooks')


def why_not_plain(module: Any, family: Family, layers: Sequence[Layer]) -> str:
    """Returns why the parts of the layers must not be computed with directly, or ''."""
    if family.unlike:
        return f'a layer of {module.config.model_type!r} {family.unlike}'
    if not family.described:
        return f'the attention of {module.config.model_type!r} is not described'
    if family.causal and getattr(module.config, 'is_causal', True) is False:
        return 'tokens see later ones (is_causal is False)'
    if getattr(module.config, '_attn_implementation', None) not in _KERNELS:
        return f'attention runs by {module.config._attn_implementation!r}'
    if reason := why_not_own(module):
        return reason
    for number, layer in enumerate(layers):
        for part in layer.linear_parts:
            if type(part) is not nn.Linear:
                return f'layer {number} has a {type(part).__name__} where a Linear was expected'
        for part in (layer.part('norm_attention'), layer.part('norm_mlp')):
            # The norms of decoders are classes of each family; like LayerNorm they see one token at a time.
            if type(part) not in _NORMS and not (family.causal and type(part).__name__.endswith('RMSNorm')):
                return f'layer {number} has a {type(part).__name__} where a norm was expected'
        if hasattr(layer.module, 'crossattention'):
            return f'layer {number} attends to another sequence'
        if getattr(_attention(layer), 'is_causal', family.causal) != family.causal:
            return f'layer {number} is {"not " * family.causal}causal'
        scaling = getattr(_attention(layer), 'scaling', None)
        if scaling is not None and scaling != layer.head_dim**-0.5:
            return f'layer {number} scales its attention by {scaling}'
    return ''


def why_not_own(module: Any) -> str:
    """Returns why a module may give something else than its classes and weights say, or ''."""
    # Those of torch itself, as of its counter of operations, look on and change nothing.
    hooks = [hook for name in _GLOBAL_HOOKS for hook in getattr(torch_modules, name, {}).values()]
    if any(not str(getattr(hook, '__module__', '')).startswith('torch.') for hook in hooks):
        return 'there are global hooks on modules'
    known = {'torch', 'transformers', 'pyterrier_mech', _root(module.base_model.__class__)}
    for part in module.modules():
        if reason := _touched(part, known):
            return f'a {type(part).__name__} {reason}'
    return ''


def _attention(layer: Layer) -> Any:
    path = layer.family.qkv[0].rpartition('.')[0]
    return attrgetter(path)(layer.module) if path else layer.module


def _touched(part: nn.Module, known: set[str]) -> str:
    state = part.__dict__
    hooks = [hook for name in _HOOKS for hook in (state.get(name) or {}).values()]
    if any(getattr(hook, '__module__', None) != _RECORDER for hook in hooks):
        return 'has hooks'
    if 'forward' in state:
        return 'has a forward of its own'
    if state.get('_compiled_call_impl') is not None:
        return 'is compiled'
    return '' if _root(part.__class__) in known else f'is of {type(part).__module__}'


def _root(kind: type) -> str:
    return kind.__module__.partition('.')[0]
