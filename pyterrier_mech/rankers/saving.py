"""Rankers written to a folder at their own sizes, to be loaded by name without the checkpoint that they came from."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from safetensors.torch import save_file

from pyterrier_mech.anatomy.resizing import check_resizable
from pyterrier_mech.rankers.loading import PRUNED, WEIGHTS
from pyterrier_mech.rankers.ranker import Ranker


def save_ranker(model: Ranker, folder: str | Path) -> Path:
    """Writes a pruned ranker to a folder, from which `CrossEncoder(folder)` or `BiEncoder(folder)` loads it.

    The files are those of a Hugging Face model (configuration of the unpruned model, small tensors, tokenizer),
    `pruned.json` with the number of heads and of neurons of every layer and, in the files of sentence-transformers,
    what `Stated` holds: maximum length, prompts, pooling, similarity and more. The same files on the hub are loaded
    by the repository's name. The remaining settings, such as `label`, `target` and `dtype`, are given when loading.

    Args:
        model: A ranker of a family whose units can be removed, pruned or not.
        folder: A new or empty folder.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder has files in it.
        TypeError: If the model is no ranker.
        ValueError: If units of the model's family cannot be removed.
    """
    if not isinstance(model, Ranker):
        raise TypeError(f'model must be a CrossEncoder or BiEncoder; got {model!r}')
    if not model.one_vector:
        raise ValueError(
            f'a {type(model).__name__} is not saved to a folder: save its module and tokenizer by save_pretrained, and '
            'give them as model= and tokenizer='
        )
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f'{str(folder)!r} is not empty: give a new folder, or remove it')
    layers = model.map.layers
    check_resizable(model.map.base.config.model_type)
    module = model.map.module if model.classifier else model.map.base
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(module.config)
    config.architectures = [type(module).__name__]
    config.dtype = module.dtype
    config.save_pretrained(folder)
    model.maker.tokenizer.save_pretrained(folder)
    state = {name: part.detach().cpu().contiguous() for name, part in module.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={'format': 'pt'})
    width = None if model.classifier else module.config.hidden_size
    counts = {'heads': [layer.n_heads for layer in layers], 'neurons': [layer.n_neurons for layer in layers]}
    for name, values in {**model.stated_.files(model.maker.max_length, width), PRUNED: counts}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(values, indent=2) + '\n', encoding='utf-8')
    return folder
