"""What folders of ColBERT and SPLADE models state, in the files of Stanford, PyLate and sentence-transformers.

As in `folders`: a statement is applied as its library applies it, or refused with a ValueError; none is ignored.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pyterrier_mech.rankers.folders import (
    MODULES,
    PACKAGE,
    TRANSFORMER,
    Stated,
    kinds_of,
    positive,
    prompts_of,
    read,
    settings_of,
    transformer_of,
)

STANFORD = 'HF_ColBERT'
EXPANSIONS = ('fixed', 'min', 'none')
POOLINGS = ('max', 'sum')
ACTIVATIONS = {'relu': 1, 'log1p_relu': 2}
"""How often log(1 + x) is taken."""

_METADATA = 'artifact.metadata'
_PYLATE = 'pylate.'
_LENGTHS = ('query_length', 'document_length', 'query_expansion')


@dataclass(frozen=True)
class StatedColBERT(Stated):
    """How texts become many vectors each, and these a score. The defaults are those of Stanford's implementation.

    Attributes:
        query_marker: Token put behind the first special token of a query; '' for none.
        text_marker: The same for a text.
        query_length: Tokens of a query, special ones included; None as for texts.
        expansion: 'fixed': every query has `expanded` tokens, cut or filled up; 'min': at least so many; 'none'.
        expanded: That number.
        expansion_token: What fills queries up; None is the mask token.
        attend: Whether other tokens attend to these.
        skipped: Tokens of texts that are not compared.
        skipped_in: Fields in which they are skipped.
        mean: Whether the score is divided by the number of query tokens.
        dense: Folders of the maps after the encoder.
    """

    normalize: bool = True
    max_length: int | None = 220
    query_marker: str = '[unused0]'
    text_marker: str = '[unused1]'
    query_length: int | None = None
    expansion: str = 'fixed'
    expanded: int = 32
    expansion_token: str | None = None
    attend: bool = False
    skipped: tuple[str, ...] = tuple(string.punctuation)
    skipped_in: tuple[str, ...] = ('text',)
    mean: bool = False
    dense: tuple[str, ...] = ()

    def given(self, **settings: Any) -> Stated:
        """Returns these with a user's own settings, where not None.

        Raises:
            ValueError: If a length is no length, or a prompt is meant for nothing.
        """
        own = {name: value for name, value in settings.items() if value is not None}
        if 'query_length' in own:
            own['expanded'] = own['query_length'] = positive('these settings', own, 'query_length')
        if 'expand' in own:
            filled = self.expansion if self.expansion != 'none' else 'fixed'
            own['expansion'] = filled if own.pop('expand') else 'none'
        if 'skip_punctuation' in own:
            own['skipped'] = tuple(string.punctuation) if own.pop('skip_punctuation') else ()
        chosen = replace(self, **own)
        if chosen.expansion == 'none' and 'query_length' not in own and self.expansion == 'fixed':
            chosen = replace(chosen, query_length=self.expanded)
        return chosen


@dataclass(frozen=True)
class StatedSplade(Stated):
    """How texts become weights of terms.

    Attributes:
        pooling: 'max' or 'sum'.
        activation: 'relu': log(1 + relu(x)); 'log1p_relu': the logarithm taken twice.
    """

    pooling: str | None = 'max'
    activation: str = 'relu'

    def given(self, **settings: Any) -> Stated:
        """Returns these with a user's own settings, where not None.

        Raises:
            ValueError: If a setting is not known, or a prompt is not used.
        """
        chosen = replace(self, **{name: value for name, value in settings.items() if value is not None})
        if chosen.pooling not in POOLINGS:
            raise ValueError(f'pooling must be one of {POOLINGS}; got {chosen.pooling!r}')
        if chosen.activation not in ACTIVATIONS:
            raise ValueError(f'activation must be one of {list(ACTIVATIONS)}; got {chosen.activation!r}')
        self.check_prompts(settings)
        return chosen


def stated_colbert(name: str) -> StatedColBERT:
    """Returns what the folder or repository of a ColBERT model states.

    Raises:
        ValueError: If it states something that ColBERT does not do, or is no ColBERT model.
    """
    modules = read(name, MODULES, list)
    if modules is None:
        return _stanford(name)
    settings = settings_of(name, 'MultiVectorEncoder', 'ColBERT')
    kinds, paths = kinds_of(name, modules, (PACKAGE, _PYLATE)), [module['path'] for module in modules]
    pylate = settings.get('model_type') == 'ColBERT'
    if kinds[0] != 'Transformer' or set(kinds[1:]) - {'Dense', 'MultiVectorMask', 'Normalize'}:
        raise ValueError(
            f'{name!r} is made of {", ".join(kinds)}; ColBERT must have Transformer, Dense, MultiVectorMask and '
            'Normalize alone, or its scores would be wrong. Use such a model'
        )
    base = transformer_of(name, 'feature-extraction', _LENGTHS)
    own = _pylate_lengths(settings) | (next(filter(None, (read(name, file, dict) for file in TRANSFORMER)), {}))
    prompts = prompts_of(name, settings, ('query', 'document'))
    markers = {role: settings.get(f'{role}_prefix') or '' for role in prompts}
    masks = [
        read(name, f'{path}/config.json', dict) or {}
        for kind, path in zip(kinds, paths, strict=True)
        if kind == 'MultiVectorMask'
    ]
    if pylate:
        words = settings.get('skiplist_words')
        masks = [{'skiplist_words': list(string.punctuation) if words is None else words}]
    stated = StatedColBERT(
        query_prompt=prompts['query'].removeprefix(markers['query']),
        text_prompt=prompts['document'].removeprefix(markers['document']),
        normalize='Normalize' in kinds or pylate,
        lower_case=base.lower_case,
        max_length=positive(name, own, 'document_length') or base.max_length,
        query_marker=markers['query'],
        text_marker=markers['document'],
        query_length=positive(name, own, 'query_length') or base.max_length,
        skipped=(),
        mean=settings.get('similarity_fn_name') == 'meanmaxsim',
        dense=tuple(path for kind, path in zip(kinds, paths, strict=True) if kind == 'Dense'),
    )
    _check_tokenwise(name, kinds, paths, pylate)
    return _masked(name, replace(stated, **_expansion(name, own.get('query_expansion'))), masks)


def stated_splade(name: str) -> StatedSplade:
    """Returns what the folder or repository of a SPLADE model states.

    Raises:
        ValueError: If it states something that Splade does not do.
    """
    modules = read(name, MODULES, list)
    if modules is None:
        return StatedSplade(**_shared(transformer_of(name, 'fill-mask')))
    settings, kinds = settings_of(name, 'SparseEncoder'), kinds_of_sparse(name, modules)
    if kinds != ['Transformer', 'SpladePooling']:
        raise ValueError(
            f'{name!r} is made of {", ".join(kinds)}; Splade must have Transformer and SpladePooling alone, or its '
            'scores would be wrong. Use such a model'
        )
    pooling = read(name, f'{modules[1]["path"]}/config.json', dict) or {}
    similarity = settings.get('similarity_fn_name') or 'dot'
    if similarity != 'dot' or settings.get('max_active_dims') is not None:
        raise ValueError(
            f'{name!r} states similarity {similarity!r} and max_active_dims={settings.get("max_active_dims")}; Splade '
            "must have 'dot' and all terms. Use such a model, or load module and tokenizer yourself"
        )
    prompts = prompts_of(name, settings, ('query', 'document'))
    return StatedSplade(
        **_shared(transformer_of(name, 'fill-mask'))
        | {'query_prompt': prompts['query'], 'text_prompt': prompts['document']},
        unused_prompt='' if prompts['document'] else prompts.get('passage') or prompts.get('corpus') or '',
        pooling=pooling.get('pooling_strategy', 'max'),
        activation=pooling.get('activation_function', 'relu'),
    )


def kinds_of_sparse(name: str, modules: list[Any]) -> list[str]:
    """As `kinds_of`; says what to do with two encoders.

    Raises:
        ValueError: If queries and texts have encoders of their own.
    """
    if any(str(module['type']).endswith('.Router') for module in modules):
        raise ValueError(
            f'{name!r} has one encoder for queries and another for texts, and the heads of Splade are those of one '
            'encoder: use a model with one, such as splade-v3. What the encoder of texts alone does to its own '
            'weights is analysed by giving its folder, document_0_Transformer, as the model of both'
        )
    return kinds_of(name, modules)


def _stanford(name: str) -> StatedColBERT:
    config = read(name, 'config.json', dict) or {}
    if STANFORD not in (config.get('architectures') or []):
        raise ValueError(
            f'{name!r} is no ColBERT model: neither has it {MODULES}, nor does its config.json name {STANFORD}. Give a '
            'ColBERT checkpoint, or ProjectedEncoder(encoder, linear) with tokenizer='
        )
    metadata = read(name, _METADATA, dict) or {}
    if (similarity := metadata.get('similarity') or 'cosine') != 'cosine':
        raise ValueError(
            f"similarity of {name!r} must be 'cosine'; {_METADATA} states {similarity!r}: use such a model"
        )
    plain = StatedColBERT()
    return StatedColBERT(
        max_length=positive(name, metadata, 'doc_maxlen') or plain.max_length,
        expanded=positive(name, metadata, 'query_maxlen') or plain.expanded,
        query_marker=metadata.get('query_token_id') or plain.query_marker,
        text_marker=metadata.get('doc_token_id') or plain.text_marker,
        attend=bool(metadata.get('attend_to_mask_tokens')),
        skipped=plain.skipped if metadata.get('mask_punctuation', True) else (),
        dense=('',),
    )


def _pylate_lengths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns PyLate's settings by the names of sentence-transformers."""
    marks = ('query_prefix', 'document_prefix', 'do_query_expansion', 'attend_to_expansion_tokens', 'skiplist_words')
    found = {key: settings[key] for key in _LENGTHS if settings.get(key) is not None}
    if 'query_expansion' in settings or not any(key in settings for key in (*marks, *_LENGTHS)):
        return found
    if settings.get('do_query_expansion') is not False:
        length, attend = found.pop('query_length', None) or 32, bool(settings.get('attend_to_expansion_tokens'))
        found['query_expansion'] = {'strategy': 'fixed', 'attend': attend, 'length': length}
    return found


def _expansion(name: str, stated: Mapping[str, Any] | None) -> dict[str, Any]:
    if stated is None:
        return {'expansion': 'none'}
    strategy, length = stated.get('strategy'), positive(name, stated, 'length')
    if strategy not in EXPANSIONS or length is None or set(stated) - {'strategy', 'length', 'attend', 'token'}:
        raise ValueError(
            f"query_expansion of {name!r} must have a strategy, 'fixed' or 'min', and a length, and may have 'attend' "
            f'and a token; got {dict(stated)!r}'
        )
    token = {'expansion_token': stated.get('token'), 'attend': bool(stated.get('attend'))}
    return {'expansion': strategy, 'expanded': length, **token}


def _masked(name: str, stated: StatedColBERT, masks: list[dict[str, Any]]) -> StatedColBERT:
    if len(masks) > 1 or (not masks and stated.expansion != 'none'):
        raise ValueError(
            f'{name!r} has {len(masks)} modules MultiVectorMask, where queries that are filled up need one, which says '
            'that what fills them is compared: save the model with one'
        )
    settings = masks[0] if masks else {}
    tasks = settings.get('skiplist_tasks') or ['document']
    tasks = [tasks] if isinstance(tasks, str) else tasks
    if settings.get('keep_only_token_ids') or set(tasks) - {'query', 'document'}:
        raise ValueError(f'MultiVectorMask of {name!r} states {settings}, which is for images and is not applied here')
    fields = tuple('query' if task == 'query' else 'text' for task in tasks)
    return replace(stated, skipped=tuple(settings.get('skiplist_words') or ()), skipped_in=fields)


def _check_tokenwise(name: str, kinds: list[str], paths: list[str], pylate: bool) -> None:
    for kind, path in zip(kinds, paths, strict=True):
        if kind not in ('Dense', 'Normalize'):
            continue
        settings = read(name, f'{path}/config.json', dict) or {}
        default = 'token_embeddings' if pylate and kind == 'Dense' else 'sentence_embedding'
        source = settings.get('module_input_name', default)
        if source != 'token_embeddings' or (settings.get('module_output_name') or source) != source:
            raise ValueError(f'{kind} of {name!r} must work on token_embeddings; got {source!r}: use such a model')
    if 'Normalize' in kinds and 'Dense' in kinds[kinds.index('Normalize') :]:
        raise ValueError(f'{name!r} has a Dense behind Normalize, which is not done here: use a model without')


def _shared(stated: Stated) -> dict[str, Any]:
    return {'lower_case': stated.lower_case, 'max_length': stated.max_length}
