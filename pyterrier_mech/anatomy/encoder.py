"""A view on a Hugging Face encoder: its layers, heads and neurons, and runs that record what passes through.

Nothing here copies or changes the module. The module's own forward runs with hooks for the length of a `with` block;
`Layer` reads the weights where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import GELUActivation

from pyterrier_mech.anatomy.families import Family, family_of


@dataclass
class Context:
    """What a layer is given beside its input.

    Attributes:
        mask: Attention mask as the Hugging Face layer gets it (boolean or additive, broadcastable to
            [rows, heads, tokens, tokens]), or None.
        rotary: Cosines and sines of rotary positions [rows or 1, tokens, head width], or None.
    """

    mask: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None

    def rows(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> Context:
        """Returns the context with `pick` applied to everything that has one entry a row."""

        def of(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if tensor.shape[0] == 1 else pick(tensor)

        return Context(
            None if self.mask is None else of(self.mask),
            None if self.rotary is None else (of(self.rotary[0]), of(self.rotary[1])),
        )


class Layer:
    """One layer of an encoder. Shapes: x [rows, tokens, d]; z, the joined head outputs, [rows, tokens, heads·d_h]."""

    def __init__(self, module: nn.Module, family: Family):
        """Looks the parts up by the names in `family`."""

        def part(path: str) -> Any:
            return attrgetter(path)(module)

        self.module = module
        self.family = family
        self.attention_out: nn.Linear = part(family.attention_out)
        self.mlp_out: nn.Linear = part(family.mlp_out)
        self.head_dim: int = part(family.head_dim)
        self.n_heads = self.attention_out.in_features // self.head_dim
        self.n_neurons = self.mlp_out.in_features
        if family.described:
            self.qkv_parts = [part(path) for path in family.qkv]
            self.norm_attention, self.norm_mlp = part(family.norm_attention), part(family.norm_mlp)
            self.mlp_in, self.activation = part(family.mlp_in), part(family.activation)

    def columns(self, head: int) -> slice:
        """Returns where a head's output stands in z."""
        return slice(head * self.head_dim, (head + 1) * self.head_dim)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """From [rows, tokens, heads·d_h] to [rows, heads, tokens, d_h]."""
        return x.view(*x.shape[:-1], self.n_heads, self.head_dim).transpose(-3, -2)

    def attention_input(self, x: torch.Tensor) -> torch.Tensor:
        """What the query, key and value projections read."""
        return self.norm_attention(x) if self.family.norm_first else x

    def projections(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, each [rows, heads, tokens, d_h], before rotary positions."""
        if len(self.qkv_parts) == 1:
            q, k, v = self.qkv_parts[0](h).chunk(3, dim=-1)
        else:
            q, k, v = (part(h) for part in self.qkv_parts)
        return self.split(q), self.split(k), self.split(v)

    def z(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """Head outputs, joined."""
        if not self.n_heads:
            return x.new_zeros(*x.shape[:-1], 0)
        q, k, v = self.projections(self.attention_input(x))
        if context.rotary is not None:
            q, k = rotate(q, *context.rotary), rotate(k, *context.rotary)
        return attend(q, k, v, context.mask).transpose(1, 2).reshape(*x.shape[:-1], -1)

    def z_first(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """Head outputs of the first token alone, [rows, 1, heads·d_h].

        One query needs no keys and values of their own: its products with the keys are products of the inputs with
        the query taken through the key weights, and the weighted sum of values is the weighted sum of inputs taken
        through the value weights. Rotary positions stand between the two, so there keys are made.
        """
        if not self.n_heads:
            return x.new_zeros(x.shape[0], 1, 0)
        mask = None if context.mask is None else context.mask[..., :1, :]
        h = self.attention_input(x)
        if context.rotary is not None or len(self.qkv_parts) == 1:
            q, k, v = self.projections(h)
            q = q[..., :1, :]
            if context.rotary is not None:
                cos, sin = context.rotary
                q, k = rotate(q, cos[:, :1], sin[:, :1]), rotate(k, cos, sin)
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return z.transpose(1, 2).reshape(x.shape[0], 1, -1)
        query, key, value = self.qkv_parts
        q = query(h[:, 0]).view(-1, self.n_heads, self.head_dim)
        to_inputs = torch.einsum('rhe,hed->rhd', q, key.weight.view(self.n_heads, self.head_dim, -1))
        scores = to_inputs @ h.transpose(-2, -1) * self.head_dim**-0.5
        if mask is not None:
            mask = mask.squeeze(-2)
            scores = (
                scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
            )
        weighted = torch.softmax(scores, dim=-1) @ h
        z = torch.einsum('rhd,hed->rhe', weighted, value.weight.view(self.n_heads, self.head_dim, -1))
        return (z.reshape(x.shape[0], -1) + value.bias).unsqueeze(1)

    def mlp(self, a: torch.Tensor) -> torch.Tensor:
        """The feed-forward block without its norm and residual sum."""
        hidden = self.mlp_in(a)
        if self.family.gated:
            hidden, gate = hidden.chunk(2, dim=-1)
            return self.mlp_out(self.activation(hidden) * gate)
        return self.mlp_out(activate(self.activation, hidden))

    def after_attention(self, x: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """The layer's output from its input and the attention output; any rows of tokens.

        Without gradients `attention` is overwritten.
        """
        if self.family.norm_first:
            a = _add(attention, x)
            return _add(self.mlp(self.norm_mlp(a)), a)
        a = self.norm_attention(_add(attention, x))
        return self.norm_mlp(_add(self.mlp(a), a))


# Below this many tokens, many small products are faster than the fused kernel on a CPU.
_FUSED_FROM = 256


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Scaled dot-product attention of [rows, heads, tokens, d_h], by what is fastest on the device."""
    rows, heads, tokens, width = q.shape
    if q.device.type != 'cpu' or tokens >= _FUSED_FROM:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    q, k, v = (part.reshape(rows * heads, tokens, width) for part in (q, k, v))
    scores = torch.baddbmm(q.new_empty(()).expand(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=width**-0.5)
    if mask is not None:
        shaped = scores.view(rows, heads, tokens, tokens)
        if mask.dtype == torch.bool:
            scores = shaped.masked_fill(~mask, torch.finfo(scores.dtype).min).flatten(0, 1)
        else:
            scores = (shaped + mask).flatten(0, 1)
    return torch.bmm(torch.softmax(scores, dim=-1), v).view(rows, heads, tokens, width)


def activate(activation: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Applies an activation function; GELU overwrites its input where no gradients are kept."""
    if isinstance(activation, GELUActivation) and not torch.is_grad_enabled():
        return torch.ops.aten.gelu_(hidden)
    return activation(hidden)


def _add(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return out + x if torch.is_grad_enabled() else out.add_(x)


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Returns one vector a sequence.

    Args:
        hidden: [..., tokens, d].
        mask: [..., tokens], 1 where there is a token.
        pooling: 'cls' (the first token) or 'mean' (over the tokens).
    """
    if pooling == 'cls':
        return hidden[..., 0, :]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(-2) / weights.sum(-2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Applies rotary positions to [rows, heads, tokens, d_h], in float32 as Hugging Face does."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (wide * cos.unsqueeze(1) + turned * sin.unsqueeze(1)).to(x.dtype)


@dataclass
class Trace:
    """What a forward run recorded.

    Attributes:
        x: Input of each layer [rows, tokens, d].
        z: Joined head outputs of each layer [rows, tokens, heads·d_h].
        contexts: What else each layer was given.
        hidden: Output of the encoder after its last norm [rows, tokens, d].
    """

    x: list[torch.Tensor] = field(default_factory=list)
    z: list[torch.Tensor] = field(default_factory=list)
    contexts: list[Context] = field(default_factory=list)
    hidden: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def rows(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> Trace:
        """Returns the trace of some rows: `pick` of everything that has one entry a row."""
        return Trace(
            [pick(x) for x in self.x],
            [pick(z) for z in self.z],
            [context.rows(pick) for context in self.contexts],
            pick(self.hidden),
        )


class _LastLayerReached(Exception):  # noqa: N818 - it is a signal, not an error
    pass


class Encoder:
    """The encoder inside a Hugging Face module."""

    def __init__(self, module: Any):
        """Finds the parts of `module`.

        Raises:
            ValueError: If the model's family is unknown.
        """
        self.module = module
        self.base = module.base_model
        self.family = family_of(self.base.config.model_type)
        self.layers = [Layer(layer, self.family) for layer in attrgetter(self.family.layers)(self.base)]

    @property
    def first_position(self) -> int:
        """The number of the first position."""
        return first_position(self.base.config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Applies the norm after the last layer, where the family has one."""
        return attrgetter(self.family.final_norm)(self.base)(hidden) if self.family.final_norm else hidden

    def run(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the last hidden states [rows, tokens, d] of the base model's own forward."""
        return self.base(**inputs).last_hidden_state

    def trace(self, inputs: dict[str, torch.Tensor]) -> Trace:
        """Runs the base model's own forward and records every layer's input, head outputs and context."""
        trace = Trace()
        with ExitStack() as hooks:
            for layer in self.layers:
                hooks.enter_context(hooked(layer.module, pre=_record_input(trace)))
                hooks.enter_context(hooked(layer.attention_out, pre=lambda _, args, kwargs: trace.z.append(args[0])))
            trace.hidden = self.run(inputs)
        return trace

    def until_last_layer(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Context]:
        """Runs the base model's own forward up to the last layer; returns that layer's input and context."""
        trace = Trace()
        record = _record_input(trace)

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            record(module, args, kwargs)
            raise _LastLayerReached

        with hooked(self.layers[-1].module, pre=stop):
            try:
                self.run(inputs)
            except _LastLayerReached:
                pass
        return trace.x[0], trace.contexts[0]

    def pooled(self, inputs: dict[str, torch.Tensor], pooling: str) -> torch.Tensor:
        """Returns one vector a sequence [rows, d]; 'cls' computes the first token alone in the last layer."""
        if pooling != 'cls' or not self.family.described:
            return pool(self.run(inputs), inputs['attention_mask'], pooling)
        x, context = self.until_last_layer(inputs)
        last = self.layers[-1]
        out = last.after_attention(x[:, :1], last.attention_out(last.z_first(x, context)))
        return self.final_norm(out)[:, 0]


def first_position(config: Any) -> int:
    """Returns the number that a model of this configuration gives to its first position."""
    return config.pad_token_id + 1 if family_of(config.model_type).positions_after_padding else 0


def _record_input(trace: Trace) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get('attention_mask', args[1] if len(args) > 1 else None)
        trace.x.append(args[0] if args else kwargs['hidden_states'])
        trace.contexts.append(Context(mask, kwargs.get('position_embeddings')))

    return record


@contextmanager
def hooked(
    module: nn.Module, *, pre: Callable[..., Any] | None = None, post: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Adds forward hooks for the length of the block; they are gone after an exception too.

    Args:
        module: Where.
        pre: From (module, args, kwargs) to None or (args, kwargs), before the forward.
        post: From (module, args, output) to None or another output, after it.
    """
    handles = []
    try:
        if pre is not None:
            handles.append(module.register_forward_pre_hook(pre, with_kwargs=True))
        if post is not None:
            handles.append(module.register_forward_hook(post))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Runs the block without dropout and leaves every submodule in the mode that it was in."""
    training = [part for part in module.modules() if part.training]
    try:
        module.eval()
        yield
    finally:
        for part in training:
            part.training = True
