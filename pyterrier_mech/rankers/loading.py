"""Loads weights and tokenizers, and refuses what would give a wrong number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import cached_file

from pyterrier_mech.anatomy.families import family_of
from pyterrier_mech.anatomy.resizing import keep_units

DTYPES = {
    'float32': torch.float32,
    'float64': torch.float64,
    'bfloat16': torch.bfloat16,
    'float16': torch.float16,
    'tf32': torch.float32,
}


PRUNED = 'pruned.json'
WEIGHTS = 'model.safetensors'
Counts = tuple[list[int], list[int]]

_BUFFERS: dict[str, Callable[[torch.Size], torch.Tensor]] = {
    'position_ids': lambda shape: torch.arange(shape[-1]).expand(shape),
    'token_type_ids': lambda shape: torch.zeros(shape, dtype=torch.long),
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


def load_config(name: str) -> Any:
    """Loads a model's configuration.

    Raises:
        FileNotFoundError: If there is no such folder and no such model on the hub.
    """
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        if Path(name).is_dir() and (Path(name) / 'config.json').exists():
            raise
        raise FileNotFoundError(
            f'no model at {name!r}: there is no folder of that name with a config.json, and the hub has no such '
            'model or cannot be reached. Give the path of a saved Hugging Face model, or a hub name.'
        ) from error


def load_module(name: str, *, classifier: bool, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Loads an encoder, with its classification head if asked for, in evaluation mode.

    A folder or repository with a file `PRUNED` is loaded at its own smaller sizes.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If the family is unknown, or weights are missing: a head with random weights is never returned.
    """
    config = load_config(name)
    family_of(config.model_type)
    auto = AutoModelForSequenceClassification if classifier else AutoModel
    counts = kept_counts(name)
    if counts is not None:
        return _load_pruned(name, auto, config, counts, dtype).to(device).eval()
    module, info = auto.from_pretrained(name, dtype=dtype, output_loading_info=True)
    # A pooler that the checkpoint lacks is read by no bi-encoder.
    missing = [key for key in info['missing_keys'] if classifier or 'pooler' not in key]
    if missing:
        raise ValueError(
            f'the checkpoint {name!r} has no weights for {", ".join(sorted(missing))}, so they would be random. '
            + ('It is no cross-encoder: use BiEncoder, or a fine-tuned checkpoint.' if classifier else '')
        )
    return module.to(device).eval()


def kept_counts(name: str) -> Counts | None:
    """Returns the number of heads and of neurons of every layer of a pruned model, or None for another.

    Raises:
        ValueError: If its file `PRUNED` does not say them.
    """
    saved = load_json(name, PRUNED)
    if saved is None:
        return None
    counts: dict[str, Any] = saved if isinstance(saved, dict) else {}
    heads: Any = counts.get('heads')
    neurons: Any = counts.get('neurons')
    if not (_are_counts(heads) and _are_counts(neurons)):
        raise ValueError(
            f"{PRUNED} of {name!r} has no lists of whole numbers, one a layer, under 'heads' and 'neurons': "
            'save the pruned ranker again'
        )
    return heads, neurons


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
    found = [f'{how} {", ".join(keys[:3])} ({len(keys)} in all)' for how, keys in wrong.items() if keys]
    if found:
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
    """Loads the tokenizer that belongs to a model."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if not getattr(tokenizer, 'is_fast', False):
        raise ValueError(f'the tokenizer of {name!r} has no fast version, which is needed to tell its parts apart')
    return tokenizer


def load_json(name: str, file: str) -> Any:
    """Returns a JSON file of a model folder or hub repository, or None where there is none."""
    try:
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except OSError:
        path = None
    return None if path is None else json.loads(Path(path).read_text(encoding='utf-8'))
