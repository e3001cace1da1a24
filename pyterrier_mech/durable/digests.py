"""What a result depends on, as a digest that is the same in every process and on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyterrier_mech.anatomy.plain import why_not_own
from pyterrier_mech.draws import digest
from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.stage import Stage
from pyterrier_mech.units import Units

# Raised whenever a stage of the same settings would give other numbers than before, or files have another form.
FORMAT = 1

# Settings without a part in the numbers, and those whose effect is looked up in the loaded ranker.
_NEUTRAL = ('batch_tokens', 'verbose', 'text_field')
_LOOKED_UP = ('model', 'tokenizer', 'max_length', 'device', 'dtype')
# Entries of a configuration that say where a module is from, not what it does.
_ORIGIN = ('_name_or_path', 'transformers_version', 'architectures', 'dtype', 'torch_dtype', 'fitted_on')


def ranker_of(stage: Any) -> Any:
    """Returns the ranker that a stage runs, which may be the stage itself."""
    return stage if isinstance(stage, Ranker) else stage.model


def stage_digest(stage: Any) -> str:
    """Returns the digest, 64 digits, of what the numbers of a stage depend on beside the texts of a row.

    These are its class and settings, the bytes of all weights, the configuration, the tokenizer, how texts are read,
    the type of numbers, and the type of device. Names, paths and batch sizes are not among them. The weights are loaded
    and read at each call: nothing cheaper is sure to notice every change.

    Raises:
        TypeError: If a setting is an object that only this process knows, such as a function.
        ValueError: If the module has hooks or parts of other packages, which no digest can see into.
    """
    ranker = ranker_of(stage)
    parts = [FORMAT, _name_of(stage), _settings(stage), _name_of(ranker), _settings(ranker), _reading(ranker)]
    return digest(*parts, _weights(ranker.map.module)).hex()


def row_digest(texts: Sequence[str]) -> bytes:
    """Returns the digest, 16 bytes, of the texts of a row."""
    return digest(*texts)[:16]


def _name_of(stage: Any) -> str:
    # What is '__main__' here has this name in a process that was spawned.
    return f'{type(stage).__module__}.{type(stage).__qualname__}'.replace('__mp_main__', '__main__')


def _settings(stage: Stage) -> list[Any]:
    """Returns the settings that change numbers, as plain values."""
    found = []
    for one in fields(stage):  # type: ignore[arg-type]
        value = getattr(stage, one.name, None)
        if not one.init or one.name in (*_NEUTRAL, *_LOOKED_UP):
            continue
        if 'units' in one.metadata and value is not None:
            value = [unit.name for unit in sorted(Units.of(value))]
        elif isinstance(value, pd.DataFrame):
            # Of a reference frame only queries and texts are read.
            value = value[['query', stage.text]].to_numpy(dtype=object)  # type: ignore[attr-defined]
        found.append((one.name, _plain(value, f'{one.name}= of {type(stage).__name__}')))
    return found


def _plain(value: Any, what: str) -> Any:
    """Returns a value as something whose `repr` says all of it, and nothing else."""
    if value is None or type(value) in (str, bool, int, float, bytes):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item(), what)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.ndarray):
        cells = hashlib.sha256(value.tobytes()).hexdigest() if value.dtype != object else _plain(value.tolist(), what)
        return 'array', value.dtype.str, value.shape, cells
    if isinstance(value, (list, tuple)):
        return [_plain(part, what) for part in value]
    if isinstance(value, Mapping):
        return 'map', sorted((repr(key), _plain(part, what)) for key, part in value.items())
    if isinstance(value, (set, frozenset)):
        return 'set', sorted(repr(_plain(part, what)) for part in value)
    raise TypeError(
        f'{what} must be made of text, numbers, lists and arrays, or its results cannot be told from those of another '
        f'setting in another process; got {value!r}'
    )


def _reading(ranker: Any) -> list[Any]:
    """Returns how a ranker reads texts and with which precision it computes."""
    maker, stated = ranker.maker, ranker.stated_
    tokenizer = maker.tokenizer
    # Before these stands what a call has padded or truncated to, which changes nothing here.
    whole = tokenizer.backend_tokenizer.to_str()
    rules = whole[whole.index('"added_tokens"') :]
    return [
        hashlib.sha256(rules.encode()).digest(),
        sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
        (maker.max_length, maker.uses_segments, maker.pad_id),
        [(one.name, _plain(getattr(stated, one.name), 'the files beside the weights')) for one in fields(stated)],
        (str(ranker.map.dtype), ranker.dtype == 'tf32', ranker.map.device.type),
    ]


def _weights(module: Any) -> bytes:
    """Returns the digest of everything that a module computes with.

    Raises:
        ValueError: If there is more to it than that.
    """
    if reason := why_not_own(module):
        raise ValueError(
            f'results of this module cannot be stored, since {reason}: what that does cannot be told from weights, so '
            'that results of another model might be served. Remove the hooks, or merge the adapters and save the model'
        )
    config = {name: value for name, value in module.config.to_dict().items() if name not in _ORIGIN}
    found = hashlib.sha256(json.dumps([config, str(module)], sort_keys=True, default=repr).encode())
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        found.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.digest()
