"""Rankers written to a folder at their own sizes, to be loaded by name without the checkpoint that they came from."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from pyterrier_mech.anatomy.resizing import check_resizable
from pyterrier_mech.rankers.bi_encoder import BiEncoder
from pyterrier_mech.rankers.loading import PRUNED, WEIGHTS
from pyterrier_mech.rankers.ranker import Ranker


def save_ranker(model: Ranker, folder: str | Path) -> Path:
    """Writes a pruned ranker to a folder, from which `CrossEncoder(folder)` or `BiEncoder(folder)` loads it.

    The files are those of a Hugging Face model (configuration of the unpruned model, small tensors, tokenizer),
    `pruned.json` with the number of heads and of neurons of every layer, the maximum length and, for a bi-encoder,
    pooling, similarity and prefixes in the files of sentence-transformers. The same files on the hub are loaded by
    the repository's name. The remaining settings, such as `label` and `dtype`, are given when loading.

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
        raise TypeError(f'{model!r} is no ranker that could be saved: give a CrossEncoder or BiEncoder')
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f'{str(folder)!r} is not empty: give a new folder, or remove it')
    encoder = model.encoder
    check_resizable(encoder.base.config.model_type)
    module = encoder.module if model.classifier else encoder.base
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(module.config)
    config.architectures = [type(module).__name__]
    config.dtype = module.dtype
    config.save_pretrained(folder)
    model.loaded.maker.tokenizer.save_pretrained(folder)
    state = {name: part.detach().cpu().contiguous() for name, part in module.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={'format': 'pt'})
    _write(folder / 'sentence_bert_config.json', {'max_seq_length': model.loaded.maker.max_length})
    if isinstance(model, BiEncoder):
        _write_sentence_transformers(model, folder)
    counts = {
        'heads': [layer.n_heads for layer in encoder.layers],
        'neurons': [layer.n_neurons for layer in encoder.layers],
    }
    _write(folder / PRUNED, counts)
    return folder


def _write_sentence_transformers(model: BiEncoder, folder: Path) -> None:
    parts = [('', 'Transformer'), ('1_Pooling', 'Pooling')]
    modules = [
        {'idx': i, 'name': str(i), 'path': path, 'type': f'sentence_transformers.models.{kind}'}
        for i, (path, kind) in enumerate(parts)
    ]
    pooling = {
        'word_embedding_dimension': model.encoder.base.config.hidden_size,
        'pooling_mode_cls_token': model.pooling_ == 'cls',
        'pooling_mode_mean_tokens': model.pooling_ == 'mean',
    }
    prefixes = model.prefixes_
    settings = {
        'prompts': {'query': prefixes['query'], 'document': prefixes['text']},
        'default_prompt_name': None,
        'similarity_fn_name': model.similarity_,
    }
    _write(folder / 'modules.json', modules)
    (folder / '1_Pooling').mkdir()
    _write(folder / '1_Pooling' / 'config.json', pooling)
    _write(folder / 'config_sentence_transformers.json', settings)


def _write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + '\n', encoding='utf-8')
