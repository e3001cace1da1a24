"""Small decoders, rankers around them, and the plain way by hooks, which takes inputs alone from the package."""

import copy
import functools

import numpy as np
import torch
from inside import sides
from toys import QUERIES, SHARED, TEXTS
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from pyterrier_mech import BiEncoder, CausalReranker, CrossEncoder

_SIZES = {'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 4, 'intermediate_size': 48}
_COMMON = {**_SIZES, 'num_key_value_heads': 2, 'initializer_range': 0.2, 'max_position_embeddings': 256}
_WIDE = {**_COMMON, 'head_dim': 16}  # all heads together are wider than the model
# In float64 the eager attention of Hugging Face gives NaN for a padding token whose window has padding alone.
CONFIGS = {
    'llama': lambda **ids: LlamaConfig(**_COMMON, **ids),
    'mistral': lambda **ids: MistralConfig(sliding_window=7, **_WIDE, **ids),
    'qwen2': lambda **ids: Qwen2Config(**_COMMON, **ids),
    'qwen3': lambda **ids: Qwen3Config(**_WIDE, tie_word_embeddings=True, **ids),
    'gemma': lambda **ids: GemmaConfig(**{**_WIDE, 'num_key_value_heads': 1}, **ids),
    'gemma2': lambda **ids: Gemma2Config(
        query_pre_attn_scalar=8, sliding_window=60, final_logit_softcapping=2.0, **_WIDE, **ids
    ),
    'gemma3_text': lambda **ids: Gemma3TextConfig(query_pre_attn_scalar=8, sliding_window=60, **_WIDE, **ids),
    'phi3': lambda **ids: Phi3Config(**_COMMON, **ids),
}
DESCRIBED = ['llama', 'mistral', 'qwen2', 'qwen3', 'gemma']
BY_HOOKS = ['gemma2', 'gemma3_text', 'phi3']
DECODERS = [*DESCRIBED, *BY_HOOKS]
KINDS = ['cross', 'causal', 'last']
TEMPLATE = ('<|start|>judge\n', 'query: {query}\ntext: {text}', '<|end|>\nanswer:')
WORDS = ('yes', 'no')
SEVERAL = ['<pad>', '<|start|>', '<|end|>', '<unk>']


@functools.cache
def tokenizer(begin=False, end=False):
    """A byte-level tokenizer that splits as Qwen's does, so that a question mark joins a line feed behind it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    whole = Tokenizer(models.BPE())
    split = Regex(r'[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+')
    whole.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, 'isolated'), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    whole.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SEVERAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    said = ['yes no query: text: judge answer a a a\n', 'is it? yes?\n no?\n what?\n'] * 20
    whole.train_from_iterator([*TEXTS, *QUERIES, *said], trainer)
    if begin or end:
        first, last = '<|start|> ' * begin, ' <|end|>' * end
        whole.post_processor = processors.TemplateProcessing(
            single=f'{first}$A{last}',
            pair=f'{first}$A {first}$B{last}',
            special_tokens=[('<|start|>', 1), ('<|end|>', 2)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=whole,
        pad_token='<pad>',
        unk_token='<unk>',
        eos_token='<|end|>',
        bos_token='<|start|>',
        model_input_names=['input_ids', 'attention_mask'],
        model_max_length=256,
        padding_side='left',
    )


def encoded(text, cut=None):
    return tokenizer()(text, add_special_tokens=False)['input_ids'][:cut]


_AUTO = {'cross': AutoModelForSequenceClassification, 'causal': AutoModelForCausalLM, 'last': AutoModel}


@functools.cache
def _module(family, kind, dtype, **settings):
    ids = {'vocab_size': len(tokenizer()), 'pad_token_id': 0, 'bos_token_id': 1, 'eos_token_id': 2}
    config = CONFIGS[family](**ids)
    for name, value in {'num_labels': 1, **settings}.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = _AUTO[kind].from_config(config)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
            # As in checkpoints; a vector of zeros is a point where an RMSNorm jumps.
            module.get_input_embeddings().weight[0] = 0.2 * torch.randn(config.hidden_size)
    SHARED.append(module.to(dtype).eval())
    return module


def module_of(family='qwen3', kind='causal', dtype=torch.float64, fresh=False, **settings):
    """A small random decoder with the head of its kind."""
    module = _module(family, kind, dtype, **settings)
    return copy.deepcopy(module) if fresh else module


def ranker(family='qwen3', kind='causal', *, fresh=False, dtype=torch.float64, **settings):
    """A ranker of one of `KINDS` around it."""
    module = module_of(family, kind, dtype, fresh)
    if kind == 'causal':
        return CausalReranker(module, tokenizer=tokenizer(), **{'template': TEMPLATE, 'words': WORDS, **settings})
    if kind == 'cross':
        return CrossEncoder(module, tokenizer=tokenizer(begin=True), **settings)
    return BiEncoder(module, tokenizer=tokenizer(end=True), pooling='last', **settings)


# -- the plain way


def places(module):
    """{(kind, layer): (module, whether its input)}."""
    found = {}
    for i, layer in enumerate(module.base_model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        found |= {('heads', i): (attention.o_proj, True), ('neurons', i): (mlp.down_proj, True)}
        found |= {('attn_out', i): (attention.o_proj, False), ('mlp_out', i): (mlp.down_proj, False)}
        found['resid_pre', i] = layer, True
        if hasattr(attention, 'q_proj'):
            found |= {(kind, i): (getattr(attention, f'{kind}_proj'), False) for kind in 'qkv'}
    return found


def columns(module, head):
    """Where a head, or a key-value head, stands."""
    width = module.base_model.layers[0].self_attn.head_dim
    return slice(head * width, (head + 1) * width)


@torch.no_grad()
def run(module, inputs, changes=None, seen=None):
    """The output; `changes` {(kind, layer): function of [tokens, width]}; `seen` takes what passes, after them."""
    handles = []

    def act(tensor, site):
        part = (changes or {}).get(site, lambda same: same)(tensor[0].clone())
        if seen is not None:
            seen[site] = part.clone()
        return part[None]

    for site, (part, is_input) in places(module).items():
        if is_input:
            hook = lambda _, args, site=site: (act(args[0], site), *args[1:])  # noqa: E731
            handles.append(part.register_forward_pre_hook(hook))
        else:
            handles.append(part.register_forward_hook(lambda _, args, out, site=site: act(out, site)))
    output = module(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return output


def whole(inputs):
    """The inputs of a side, with positions numbered without the hidden ones."""
    mask = inputs['attention_mask']
    return {**inputs, 'position_ids': (mask.cumsum(1) * mask - 1).clamp(min=0)} if mask.min() == 0 else dict(inputs)


def score(model, towers, changes=()):
    """The score of a row from the inputs of its towers, each changed."""
    towers = [whole(inputs) for inputs in towers]
    outputs = [run(model.model, inputs, edits) for inputs, edits in zip(towers, changes or [None] * 2)]
    last = [int(inputs['attention_mask'][0].nonzero().max()) for inputs in towers]
    if isinstance(model, CrossEncoder):
        return outputs[0].logits[0, 0].item()
    if isinstance(model, CausalReranker):
        logits = outputs[0].logits[0, last[0]]
        ids = [tokenizer()(word)['input_ids'][0] for word in WORDS]
        return (logits[ids[0]] - logits[ids[1]]).item()
    a, b = (out.last_hidden_state[0, at] for out, at in zip(outputs, last))
    return torch.cosine_similarity(a, b, dim=0).item()


def put(at, values, positions=None):
    """A change: some columns, at some positions, take values."""
    rows = slice(None) if positions is None else positions

    def change(part):
        part[rows, at] = values[rows][:, at]
        return part

    return change


def both(model, row, filler='a', reverse=False):
    """For every tower the inputs of the run that is patched, and what passes in the one that it takes from."""
    towers = [side.runs(reverse) for side in sides(model, row, filler)]
    seen = []
    for _, source in towers:
        seen.append({})
        run(model.model, whole(source), seen=seen[-1])
    return [base for base, _ in towers], seen


def effect(model, row, site, at=slice(None), positions=None, filler='a', reverse=False):
    """Patched score - score, where columns of a site of all towers take the values of the other run."""
    bases, seen = both(model, row, filler, reverse)
    edits = [{site: put(at, one[site], positions)} for one in seen]
    return score(model, bases, edits) - score(model, bases)


def head_effects(model, row, **options):
    """[heads] of a row."""
    layers, heads = range(len(model.model.base_model.layers)), range(4)
    return np.array(
        [effect(model, row, ('heads', i), columns(model.model, h), **options) for i in layers for h in heads]
    )


def of_type(model, row, towers, site, kind):
    """The effect of all positions of a type, in all towers; NaN where there is none."""
    at = [[place for place, name in enumerate(tower.types) if name == kind] for tower in towers]
    if not any(at):
        return np.nan
    bases, seen = both(model, row)
    edits = [{site: put(slice(None), one[site], some)} for one, some in zip(seen, at)]
    return score(model, bases, edits) - score(model, bases)


def pattern_effect(model, row, layer, head):
    """Where a head looks as it does in the other run; of an eager model."""
    bases, _ = both(model, row)
    edits = []
    for side in sides(model, row):
        base, source = side.runs()
        seen = {}
        run(model.model, whole(base), seen=seen)
        with torch.no_grad():
            pattern = model.model.base_model(**whole(source), output_attentions=True).attentions[layer][0, head]
        shared = 2  # heads that read one value
        values = pattern.double() @ seen['v', layer][:, columns(model.model, head // shared)]
        mixed = seen['heads', layer].clone()
        mixed[:, columns(model.model, head)] = values
        edits.append({('heads', layer): put(columns(model.model, head), mixed)})
    return score(model, bases, edits) - score(model, bases)


def path_effect(model, row, sender, receiver, reverse=False):
    """What a sender tells a receiver through no other head, and what that does to the score."""
    bases, seen = both(model, row, reverse=reverse)
    layer, at = int(sender[1]), columns(model.model, int(sender[3]))
    told, edits = [], []
    for base, source in zip(bases, seen):
        held = {}
        run(model.model, whole(base), seen=held)
        frozen = {site: put(slice(None), values) for site, values in held.items() if site[0] == 'heads'}
        mixed = held['heads', layer].clone()
        mixed[:, at] = source['heads', layer][:, at]
        edits.append({**frozen, ('heads', layer): put(slice(None), mixed)})
        told.append({})
        run(model.model, whole(base), edits[-1], told[-1])
    start = score(model, bases)
    if receiver == 'score':
        return score(model, bases, edits) - start
    site = receiver[-1], int(receiver[1])
    back = [{site: put(columns(model.model, int(receiver[3])), one[site])} for one in told]
    return score(model, bases, back) - start
