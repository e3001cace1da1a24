"""Refuses modules and checkpoints whose scores would be wrong."""

from __future__ import annotations

from typing import Any

from pyterrier_mech.anatomy.families import family_of


def check_own_code(name: str, config: Any) -> None:
    """Checks that a family is known, and that a decoder has no code of its own.

    Encoders that were once loaded by own code are often the same in transformers today. Decoders of own code are
    often not: some attend to later tokens, some have a head for every layer.

    Raises:
        ValueError: If not.
    """
    own = [key for key in getattr(config, 'auto_map', None) or {} if key.startswith('AutoModel')]
    if family_of(config.model_type).causal and own:
        raise ValueError(
            f'{name!r} brings code of its own ({config.auto_map[own[0]]!r}), which is not run here, and without which '
            'its scores may be wrong: load the module yourself, if it is a plain one, and give model= and tokenizer='
        )


def check_unhooked(module: Any, head: str) -> None:
    """Checks that nothing acts on a whole module with a head, whose own forward is not called here.

    Raises:
        ValueError: If something does.
    """
    whole = vars(module)
    if whole['_forward_hooks'] or whole['_forward_pre_hooks'] or ('forward' in whole and '_hf_hook' not in whole):
        raise ValueError(
            f'hooks and forwards of the whole {head} module are not run here: put them on its base_model, or on the '
            'parts of its head'
        )
