"""Where layers, heads and neurons live in each Hugging Face family: the one table that knows module names.

A new family is one `Family` given to `register_family`. With the names down to `mlp_out` every analysis works by
hooks; with the remaining ones the fast engines apply too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Family:
    """Names of the parts of one model family. Paths are dotted attribute names.

    Attributes:
        model_types: The `config.model_type` values that this description fits.
        layers: Path of the layer list, from the base model.
        attention_out: Path of the attention output projection, from a layer. Its input is the concatenation of the
            head outputs.
        head_dim: Path of the width of one head, from a layer.
        mlp_out: Path of the last linear map of the feed-forward block, from a layer. Its input are the neurons.
        classify: From (classification module, pooled vectors [..., d]) to logits [..., labels].
        vocabulary: From (masked language model, hidden states [..., d]) to what its last linear map reads.
        pooling: How the classifier reads the sequence: 'cls', 'mean' or 'last'; a dotted config path if the config says
            it.
        causal: Whether a token sees itself and earlier tokens alone.
        qkv: Paths of the query, key and value projections; a single path where they are fused.
        qk_norms: Paths of the norms of each head's queries and keys, from a layer, where there are some.
        norm_attention: Path of the norm after (post-norm) or before (pre-norm) attention.
        norm_mlp: Path of the norm after (post-norm) or before (pre-norm) the feed-forward block.
        mlp_in: Path of the first linear map of the feed-forward block.
        activation: Path of the activation function.
        gated: Whether the feed-forward block is gated. The first linear map then gives activation inputs and gates, in
            this order, unless the gates have a map of their own.
        mlp_gate: Path of that map.
        norm_first: Whether the layers are pre-norm.
        rotary_float32: Whether rotary positions are applied in float32, whatever the type of the weights.
        final_norm: Path of the norm after the last layer, from the base model, if there is one.
        positions_after_padding: Whether position numbers start behind the padding token's id.
        unlike: What a layer does that the fast engines do not, in words; everything then works by hooks.
    """

    model_types: tuple[str, ...]
    layers: str
    attention_out: str
    head_dim: str
    mlp_out: str
    classify: Callable[[Any, torch.Tensor], torch.Tensor]
    vocabulary: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    pooling: str = 'cls'
    causal: bool = False
    qkv: tuple[str, ...] = ()
    qk_norms: tuple[str, ...] = ()
    norm_attention: str = ''
    norm_mlp: str = ''
    mlp_in: str = ''
    activation: str = ''
    gated: bool = False
    mlp_gate: str = ''
    norm_first: bool = False
    rotary_float32: bool = False
    final_norm: str = ''
    positions_after_padding: bool = False
    unlike: str = ''

    @property
    def described(self) -> bool:
        """Whether the fast engines have all the names that they need."""
        return bool(self.qkv) and not self.unlike


def _through(pooled: torch.Tensor, *parts: Any) -> torch.Tensor:
    """Takes vectors [..., d] through modules that read the first token of sequences."""
    vectors = pooled.reshape(-1, 1, pooled.shape[-1])
    for part in parts:
        vectors = part(vectors)
    return vectors.reshape(*pooled.shape[:-1], -1)


def _classify_bert(module: Any, pooled: torch.Tensor) -> torch.Tensor:
    return _through(pooled, module.base_model.pooler, module.classifier)


def _classify_deberta(module: Any, pooled: torch.Tensor) -> torch.Tensor:
    return _through(pooled, module.pooler, module.classifier)


def _classify_head(module: Any, pooled: torch.Tensor) -> torch.Tensor:
    return _through(pooled, module.classifier)


def _classify_distilbert(module: Any, pooled: torch.Tensor) -> torch.Tensor:
    return module.classifier(F.relu(module.pre_classifier(pooled)))


def _classify_modernbert(module: Any, pooled: torch.Tensor) -> torch.Tensor:
    return module.classifier(module.head(pooled))


def _classify_last(module: Any, pooled: torch.Tensor) -> torch.Tensor:
    return module.score(pooled)


def _vocabulary_bert(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    return module.cls.predictions.transform(hidden)


def _vocabulary_electra(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    return module.generator_predictions(hidden)


def _vocabulary_lm_head(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    return module.lm_head.layer_norm(F.gelu(module.lm_head.dense(hidden)))


def _vocabulary_distilbert(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    return module.vocab_layer_norm(module.activation(module.vocab_transform(hidden)))


def _vocabulary_modernbert(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    return module.head(hidden)


_BERT_NAMES = {
    'layers': 'encoder.layer',
    'attention_out': 'attention.output.dense',
    'head_dim': 'attention.self.attention_head_size',
    'mlp_out': 'output.dense',
    'qkv': ('attention.self.query', 'attention.self.key', 'attention.self.value'),
    'norm_attention': 'attention.output.LayerNorm',
    'norm_mlp': 'output.LayerNorm',
    'mlp_in': 'intermediate.dense',
    'activation': 'intermediate.intermediate_act_fn',
}

_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Makes a model family known; replaces an earlier description of the same `config.model_type`."""
    _FAMILIES.update(dict.fromkeys(family.model_types, family))


def family_of(model_type: str) -> Family:
    """Returns the description of a `config.model_type`.

    Raises:
        ValueError: If the family is unknown; the message names the known ones and `register_family`.
    """
    if model_type not in _FAMILIES:
        raise ValueError(
            f'models of type {model_type!r} are unknown here; known are {", ".join(sorted(_FAMILIES))}. '
            'Describe another with pyterrier_mech.rankers.register_family(Family(...)).'
        )
    return _FAMILIES[model_type]


def known_types(fits: Callable[[Family], bool]) -> list[str]:
    """Returns the `config.model_type` values whose description fits."""
    return sorted(name for name, family in _FAMILIES.items() if fits(family))


register_family(
    Family(('bert',), classify=_classify_bert, vocabulary=_vocabulary_bert, **_BERT_NAMES)  # type: ignore[arg-type]
)
register_family(
    Family(
        ('electra',),
        classify=_classify_head,
        vocabulary=_vocabulary_electra,
        **_BERT_NAMES,  # type: ignore[arg-type]
    )
)
register_family(
    Family(
        ('roberta', 'xlm-roberta', 'camembert'),
        classify=_classify_head,
        vocabulary=_vocabulary_lm_head,
        positions_after_padding=True,
        **_BERT_NAMES,  # type: ignore[arg-type]
    )
)
register_family(
    Family(
        ('distilbert',),
        classify=_classify_distilbert,
        vocabulary=_vocabulary_distilbert,
        layers='transformer.layer',
        attention_out='attention.out_lin',
        head_dim='attention.attention_head_size',
        mlp_out='ffn.lin2',
        qkv=('attention.q_lin', 'attention.k_lin', 'attention.v_lin'),
        norm_attention='sa_layer_norm',
        norm_mlp='output_layer_norm',
        mlp_in='ffn.lin1',
        activation='ffn.activation',
    )
)
register_family(
    Family(
        ('modernbert',),
        classify=_classify_modernbert,
        vocabulary=_vocabulary_modernbert,
        pooling='config.classifier_pooling',
        layers='layers',
        attention_out='attn.Wo',
        head_dim='attn.head_dim',
        mlp_out='mlp.Wo',
        qkv=('attn.Wqkv',),
        norm_attention='attn_norm',
        norm_mlp='mlp_norm',
        mlp_in='mlp.Wi',
        activation='mlp.act',
        gated=True,
        norm_first=True,
        rotary_float32=True,
        final_norm='final_norm',
    )
)
# Relative positions enter the attention scores of these: heads and neurons are where BERT has them, the fast
# engines' own attention does not apply.
register_family(
    Family(
        ('deberta-v2',),
        classify=_classify_deberta,
        layers='encoder.layer',
        attention_out='attention.output.dense',
        head_dim='attention.self.attention_head_size',
        mlp_out='output.dense',
    )
)
register_family(
    Family(
        ('mpnet',),
        classify=_classify_head,
        vocabulary=_vocabulary_lm_head,
        positions_after_padding=True,
        layers='encoder.layer',
        attention_out='attention.attn.o',
        head_dim='attention.attn.attention_head_size',
        mlp_out='output.dense',
    )
)

# Decoders. The classifier and the pooled token are those of Hugging Face's `GenericForSequenceClassification`.
_DECODER: dict[str, Any] = {
    'classify': _classify_last,
    'pooling': 'last',
    'causal': True,
    'layers': 'layers',
    'attention_out': 'self_attn.o_proj',
    'head_dim': 'self_attn.head_dim',
    'mlp_out': 'mlp.down_proj',
}
_DECODER_NAMES: dict[str, Any] = {
    **_DECODER,
    'qkv': ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'),
    'norm_attention': 'input_layernorm',
    'norm_mlp': 'post_attention_layernorm',
    'mlp_in': 'mlp.gate_proj',
    'activation': 'mlp.act_fn',
    'gated': True,
    'mlp_gate': 'mlp.up_proj',
    'norm_first': True,
    'final_norm': 'norm',
}
_QK_NORMS = ('self_attn.q_norm', 'self_attn.k_norm')
register_family(Family(('llama', 'mistral', 'qwen2', 'gemma'), **_DECODER_NAMES))
register_family(Family(('qwen3',), qk_norms=_QK_NORMS, **_DECODER_NAMES))
register_family(Family(('gemma2', 'gemma3_text'), unlike='norms what its blocks give', **_DECODER_NAMES))
# Queries, keys and values come from one map, in unequal shares.
register_family(Family(('phi3',), **_DECODER))
