"""Loads weights and tokenizers, and refuses what would give a wrong number."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import normalizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import cached_file

from pyterrier_mech.anatomy.families import family_of, known_types
from pyterrier_mech.anatomy.resizing import keep_units
from pyterrier_mech.rankers.checks import check_own_code
from pyterrier_mech.units import KINDS

DTYPES = {name: getattr(torch, name) for name in ('float32', 'float64', 'bfloat16', 'float16')} | {
    'tf32': torch.float32
}


_OTHER_RANKER = {
    False: 'It is no cross-encoder: use BiEncoder, or a fine-tuned checkpoint.',
    True: 'It has no head for classes: use CausalReranker for a score from words, BiEncoder for vectors, or a '
    'fine-tuned checkpoint.',
}
ADAPTER = 'adapter_config.json'
PRUNED = 'pruned.json'
WEIGHTS, _OLD_WEIGHTS = 'model.safetensors', 'pytorch_model.bin'
Counts = tuple[list[int], list[int]]

_BUFFERS: dict[str, Callable[[torch.Size], torch.Tensor]] = {
    'position_ids': lambda shape: torch.arange(shape[-1]).expand(shape),
    'token_type_ids': lambda shape: torch.zeros(shape, dtype=torch.long),
}

# What to give in the place of an object around a Hugging Face module, by the name of its class.
_INSTEAD = {
    'PeftModel': 'model.merge_and_unload(), or model.get_base_model()',
    'DataParallel': 'model.module',
    'DistributedDataParallel': 'model.module',
    'OptimizedModule': 'the module before torch.compile, model._orig_mod',
    'BaseModel': 'its folder or name, or model.transformers_model with tokenizer=model.tokenizer and its settings',
}


def dtype_of(name: str | None) -> torch.dtype:
    """Returns the torch type of a dtype setting; None is float32.

    Raises:
        ValueError: If the name is not one of `DTYPES`.
    """
    if name is None:
        return torch.float32
    if name not in DTYPES:
        raise ValueError(f'dtype={name!r} is none of {", ".join(map(repr, DTYPES))}')
    return DTYPES[name]


def device_of(name: str | None) -> torch.device:
    """Returns the device of a setting; None is CUDA where there is one, else the CPU."""
    return torch.device(name if name is not None else 'cuda' if torch.cuda.is_available() else 'cpu')


def check_module(module: Any) -> None:
    """Checks that a loaded module is a Hugging Face encoder as it was made.

    Raises:
        TypeError: If it is something else, or something around one.
        ValueError: If it is quantised, compiled in place or a decoder.
    """
    names = {kind.__name__ for kind in type(module).__mro__}
    for name in names & _INSTEAD.keys():
        raise TypeError(f'model must be a Hugging Face module; got a {type(module).__name__}: give {_INSTEAD[name]}')
    if not (isinstance(module, nn.Module) and hasattr(module, 'config') and hasattr(module, 'base_model')):
        raise TypeError(f'model must be a hub name, a folder or a Hugging Face module; got a {type(module).__name__}')
    kinds = {type(part).__module__ for part in (*module.modules(), *module.parameters())}
    whole = all(part.is_floating_point() for part in module.parameters())
    if getattr(module, 'is_quantized', False) or not whole or any('quant' in kind for kind in kinds):
        raise ValueError('model must not be quantised: load it without a quantization_config, with dtype= if need be')
    if any(part._compiled_call_impl is not None for part in module.modules()):
        raise ValueError('model must not be compiled, since hooks would be skipped: load it again without compile()')
    if getattr(module.config, 'is_decoder', False):
        raise ValueError('model must be an encoder; its configuration says is_decoder=True: load it with False')


def load_config(name: str) -> Any:
    """Loads a model's configuration.

    Raises:
        FileNotFoundError: If there is no such folder and no such model on the hub.
        ValueError: If there is an adapter to another model.
    """
    if (adapter := load_json(name, ADAPTER)) is not None:
        raise ValueError(
            f'{name!r} holds an adapter of {adapter.get("base_model_name_or_path")!r} ({ADAPTER}): load it with peft, '
            'call merge_and_unload() and save_pretrained(folder), and give that folder or the merged module'
        )
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        if Path(name).is_dir() and (Path(name) / 'config.json').exists():
            raise
        raise FileNotFoundError(
            f'no model at {name!r}: there is no folder of that name with a config.json, and the hub has no such '
            'model or cannot be reached. Give the path of a saved Hugging Face model, or a hub name.'
        ) from error


def load_module(
    name: str,
    *,
    classifier: bool = False,
    causal: bool = False,
    masked: bool = False,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """Loads a model in evaluation mode, with its head for classes, next words or masked tokens where asked for.

    A folder or repository with a file `PRUNED` is loaded at its own smaller sizes.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If the family is unknown, or weights are missing or left over: a head with random weights, or
            layers fewer than the checkpoint has, are never returned.
    """
    config = load_config(name)
    check_own_code(name, config)
    heads = [AutoModelForSequenceClassification] * classifier + [AutoModelForCausalLM] * causal
    auto: Any = [*heads, *[AutoModelForMaskedLM] * masked, AutoModel][0]
    made = [kind for kind in config.architectures or [] if kind.endswith('ForSequenceClassification')]
    if causal and made:
        raise ValueError(f'{name!r} is a {made[0]}, which has a score for a class and none for words: use CrossEncoder')
    if (counts := kept_counts(name)) is not None:
        return _load_pruned(name, auto, config, counts, dtype).to(device).eval()
    loaded: Any = auto.from_pretrained(name, dtype=dtype, output_loading_info=True)
    module, info = loaded
    # A pooler that the checkpoint lacks is read by no bi-encoder.
    if missing := [key for key in info['missing_keys'] if auto is not AutoModel or 'pooler' not in key]:
        raise ValueError(
            f'the checkpoint {name!r} has no weights for {", ".join(sorted(missing))}, so they would be random. '
            + (_OTHER_RANKER[family_of(config.model_type).causal] if classifier else '')
            + ('It is no masked language model: use BiEncoder, or a fine-tuned checkpoint.' if masked else '')
        )
    if unused := sorted(key for key in info['unexpected_keys'] if _has_place(key, module)):
        raise ValueError(
            f'the checkpoint {name!r} has {len(unused)} weights that a {type(module).__name__} of its config.json does '
            f'not use, among them {", ".join(unused[:3])}: mend the configuration, e.g. its number of layers'
        )
    check_module(module)
    return module.to(device).eval()


def _has_place(key: str, module: Any) -> bool:
    """Whether a weight is of a part that the module has; a pooler is read by no bi-encoder."""
    part, _, rest = key.removeprefix(f'{module.base_model_prefix}.').partition('.')
    parts = {name for whole in (module, module.base_model) for name, _ in whole.named_children()} - {'pooler'}
    return part in parts and rest.rpartition('.')[2] not in (*_BUFFERS, 'inv_freq')


def kept_counts(name: str) -> Counts | None:
    """Returns the number of heads and of neurons of every layer of a pruned model, or None for another.

    Raises:
        ValueError: If its file `PRUNED` does not say them, or says more than the unpruned model has.
    """
    saved = load_json(name, PRUNED)
    if saved is None:
        return None
    found: list[Any] = [saved.get(kind) if isinstance(saved, dict) else None for kind in KINDS]
    if not all(map(_are_counts, found)):
        raise ValueError(
            f"{PRUNED} of {name!r} has no lists of whole numbers, one a layer, under 'heads' and 'neurons': "
            'save the pruned ranker again'
        )
    config = load_config(name)
    most = (config.num_attention_heads, getattr(config, 'intermediate_size', None) or config.hidden_dim)
    if any(len(part) != config.num_hidden_layers for part in found) or any(
        count > limit for part, limit in zip(found, most, strict=True) for count in part
    ):
        raise ValueError(
            f'{PRUNED} of {name!r} must have {config.num_hidden_layers} layers of at most {most[0]} heads and '
            f'{most[1]} neurons, as its config.json says; it has other numbers: save the pruned ranker again'
        )
    return found[0], found[1]


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _load_pruned(name: str, auto: Any, config: Any, counts: Counts, dtype: torch.dtype) -> nn.Module:
    path = cached_file(name, WEIGHTS, _raise_exceptions_for_missing_entries=False)
    if path is None:
        raise FileNotFoundError(f'the pruned model {name!r} has no {WEIGHTS}: save it again')
    state = {key: part.to(dtype) if part.is_floating_point() else part for key, part in load_file(path).items()}
    # Nothing is allocated, and no random number drawn, for weights that come from the file.
    with torch.device('meta'):
        module = auto.from_config(config, dtype=dtype)
    module.name_or_path = name
    kept = [[range(count) for count in part] for part in counts]
    try:
        keep_units(module, *kept)
    except ValueError as error:
        raise ValueError(f'{PRUNED} of {name!r} does not fit its config.json: {error}') from error
    if auto is AutoModel and not any('pooler' in key for key in state):
        module.pooler = None  # no bi-encoder reads it
    _check_fit(name, module, state)
    module.load_state_dict(state, strict=True, assign=True)
    _fill_buffers(module)
    return module


def _check_fit(name: str, module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    expected = module.state_dict()
    wrong = {
        'lacks': sorted(expected.keys() - state.keys()),
        'has, unexpectedly,': sorted(state.keys() - expected.keys()),
        'has in another size': [
            f'{key} {list(state[key].shape)} for {list(part.shape)}'
            for key, part in expected.items()
            if key in state and state[key].shape != part.shape
        ],
    }
    if found := [f'{how} {", ".join(keys[:3])} ({len(keys)} in all)' for how, keys in wrong.items() if keys]:
        raise ValueError(
            f'{WEIGHTS} of {name!r} does not fit a {type(module).__name__} of the sizes in {PRUNED}: it '
            f'{"; it ".join(found)}. Load it with the class that saved it (CrossEncoder or BiEncoder), or save it again'
        )


def _fill_buffers(module: nn.Module) -> None:
    """Gives the buffers that no checkpoint holds their values, as the modules' constructors do."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if not buffer.is_meta:
                continue
            if name not in _BUFFERS:
                raise ValueError(f'{type(part).__name__} has a buffer {name!r} that pruned checkpoints do not hold')
            setattr(part, name, _BUFFERS[name](buffer.shape))


def load_tokenizer(name: str) -> Any:
    """Loads the tokenizer that belongs to a model; `check_tokenizer` says whether it fits.

    Raises:
        ValueError: If there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f'no tokenizer could be loaded from {name!r}: give tokenizer=') from error


def check_tokenizer(tokenizer: Any, config: Any, name: str, *, pairs: bool = False) -> None:
    """Checks that a tokenizer cuts, pads and numbers texts as a model is used here.

    Args:
        tokenizer: A loaded one.
        config: The model's configuration.
        name: Where the tokenizer is from, for the message.
        pairs: Whether query and text are read in one sequence.

    Raises:
        TypeError: If it is no tokenizer of transformers.
        ValueError: If it does not fit.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f'tokenizer must be a name, a folder or a loaded tokenizer; got a {type(tokenizer).__name__}')
    if not tokenizer.is_fast:
        raise ValueError(f'the tokenizer of {name!r} has no fast version, which is needed to tell its parts apart')
    vocabulary = tokenizer.get_vocab()
    if vocabulary.keys() <= set(tokenizer.all_special_tokens):
        raise ValueError(
            f'the tokenizer of {name!r} knows {len(vocabulary)} special tokens and no words, as transformers makes one '
            'for a folder without tokenizer files: give tokenizer=, or save the tokenizer in the folder'
        )
    last, rows = max(vocabulary.values()), config.vocab_size
    if last >= rows:
        raise ValueError(
            f'the tokenizer of {name!r} has ids up to {last}, the model embeddings for ids up to {rows - 1}: give the '
            "model's own tokenizer, or call resize_token_embeddings before training"
        )
    # To a decoder it is the same at which side rows are filled up, which is always done at the right here.
    causal = config.model_type in known_types(lambda family: family.causal)
    for side in ('truncation_side',) if causal else ('truncation_side', 'padding_side'):
        if getattr(tokenizer, side) != 'right':
            raise ValueError(
                f"{side} of the tokenizer of {name!r} must be 'right'; got {getattr(tokenizer, side)!r}. If that is "
                f"what you want, set tokenizer.{side} = 'right' and give tokenizer="
            )
    if pairs and uses_segments(tokenizer, config):
        segments = max(tokenizer('a', 'a')['token_type_ids'])
        if segments >= config.type_vocab_size:
            raise ValueError(
                f'the tokenizer of {name!r} gives segment ids up to {segments}, the model has '
                f"{config.type_vocab_size} (type_vocab_size): give the model's own tokenizer"
            )


def uses_segments(tokenizer: Any, config: Any) -> bool:
    """Whether segment ids are given to the model: Hugging Face ignores them where it has no embeddings for them."""
    return 'token_type_ids' in tokenizer.model_input_names and bool(getattr(config, 'type_vocab_size', 0))


def in_lower_case(tokenizer: Any) -> Any:
    """Returns a copy of a tokenizer that lower-cases first, as sentence-transformers does for `do_lower_case`."""
    tokenizer = copy.deepcopy(tokenizer)
    backend = tokenizer.backend_tokenizer
    old: Any = backend.normalizer
    parts = [] if old is None else list(old) if type(old).__name__ == 'Sequence' else [old]
    if not any(isinstance(part, normalizers.Lowercase) for part in parts):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *parts])
    return tokenizer


def load_tensors(name: str, folder: str = '', only: str = '') -> dict[str, torch.Tensor]:
    """Returns the weights that lie in a folder of a model, or in the model's own; those whose name begins with `only`.

    Raises:
        FileNotFoundError: If there are none.
    """
    prefix = f'{folder}/' if folder else ''
    if (index := load_json(name, f'{prefix}{WEIGHTS}.index.json')) is not None:
        parts = sorted({part for key, part in index['weight_map'].items() if key.startswith(only)})
    else:
        parts = [WEIGHTS, _OLD_WEIGHTS]
    state: dict[str, torch.Tensor] = {}
    for part in parts:
        path = cached_file(name, prefix + part, _raise_exceptions_for_missing_entries=False)
        if path is None or (part == _OLD_WEIGHTS and state):
            continue
        state |= torch.load(path, weights_only=True, map_location='cpu') if part == _OLD_WEIGHTS else load_file(path)
    if not state:
        raise FileNotFoundError(f'the model {name!r} has no weights in {prefix + WEIGHTS}: save it again')
    return {key: tensor for key, tensor in state.items() if key.startswith(only)}


def load_json(name: str, file: str) -> Any:
    """Returns a JSON file of a model folder or hub repository, or None where there is none.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except OSError:
        path = None
    try:
        return None if path is None else json.loads(Path(path).read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{file} of {name!r} must hold JSON: {error}') from error
