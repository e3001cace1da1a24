"""What folders of causal re-rankers state, in the files of sentence-transformers.

As in `folders`: a statement is applied as its library applies it, or refused with a ValueError; none is ignored.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyterrier_mech.rankers import loading
from pyterrier_mech.rankers.folders import (
    LOGITS,
    MODULES,
    TRANSFORMER,
    Stated,
    kinds_of,
    prompts_of,
    read,
    settings_of,
    transformer_of,
)


def stated_causal(name: str) -> Stated:
    """Returns what a causal re-ranker's folder or repository states.

    Raises:
        ValueError: If it states something that CausalReranker does not do.
    """
    modules = read(name, MODULES, list)
    if modules is None:
        return transformer_of(name, 'text-generation')
    settings, kinds = settings_of(name, 'CrossEncoder'), kinds_of(name, modules)
    if kinds != ['Transformer', LOGITS]:
        raise ValueError(
            f'{name!r} is made of {", ".join(kinds)}; CausalReranker must have Transformer and {LOGITS}. '
            + ('Use CrossEncoder' if kinds == ['Transformer'] else 'Use such a model')
        )
    score = read(name, f'{modules[1]["path"]}/config.json', dict) or {}
    ids = tuple(score[key] for key in ('true_token_id', 'false_token_id') if score.get(key) is not None)
    if not ids or score.get('module_input_name', 'causal_logits') != 'causal_logits':
        raise ValueError(f'{LOGITS} of {name!r} must name the token whose logit is read; got {score!r}')
    system = prompts_of(name, settings)[settings.get('default_prompt_name') or '']
    return replace(transformer_of(name, 'text-generation'), words=ids, template=_chat(name, system))


def _chat(name: str, system: str) -> tuple[str, ...]:
    """Returns the chat template around a query and a document; () where the tokenizer has none."""
    tokenizer = loading.load_tokenizer(name)
    if not tokenizer.chat_template:
        return ()
    config: dict[str, Any] = read(name, TRANSFORMER[0], dict) or {}
    flat = config.get('modality_config', {}).get('message', {}).get('format', 'flat') == 'flat'
    # With spaces around, since a template may strip what it is given.
    places = {'query': ' \ue000 ', 'document': ' \ue001 '}
    said = {'system': system, **places} if system else places
    messages = [
        {'role': role, 'content': text if flat else [{'type': 'text', 'text': text}]} for role, text in said.items()
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if any(whole.count(place) != 1 for place in places.values()):
        raise ValueError(
            f'the chat template of {name!r} does not give query and document once each and as they are: give template='
        )
    return (whole.replace(places['query'], '{query}').replace(places['document'], '{text}'),)
