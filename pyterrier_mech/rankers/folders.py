"""What a model folder or hub repository states beside its weights, in the files of sentence-transformers.

A statement is applied as sentence-transformers (6 and later) applies it, or refused with a ValueError; none is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from pyterrier_mech.anatomy.readouts import READOUTS
from pyterrier_mech.rankers.loading import load_json

SIMILARITIES = ('cosine', 'dot')

MODULES, SETTINGS = 'modules.json', 'config_sentence_transformers.json'
# The first is the one in use today; sentence-transformers falls back on the others, each written for one family.
TRANSFORMER = (
    'sentence_bert_config.json',
    *(f'sentence_{family}_config.json' for family in ('roberta', 'distilbert', 'camembert', 'xlm-roberta')),
)
_TASKS = {
    'feature-extraction': 'last_hidden_state',
    'sequence-classification': 'logits',
    'text-generation': 'logits',
    'fill-mask': 'logits',
}
_FORMATS = ('flat', 'structured')
# Read here, or given by the task.
_KNOWN = ('max_seq_length', 'do_lower_case', 'transformer_task', 'modality_config', 'module_output_name')
# Arguments of the constructors stand in groups of their own, by a newer or older name.
_GROUPS = tuple(
    f'{part}_{kind}' for part in ('model', 'tokenizer', 'processor', 'config') for kind in ('args', 'kwargs')
)
_LENGTH = 'model_max_length'
# Without a part in the scores.
_NEUTRAL = ('unpad_inputs', 'attn_implementation', 'dtype', 'torch_dtype', 'add_pooling_layer', 'trust_remote_code')
LOGITS = 'LogitScore'
PACKAGE = 'sentence_transformers.'
_RANKERS = {
    'SentenceTransformer': 'BiEncoder',
    'CrossEncoder': 'CrossEncoder or CausalReranker',
    'SparseEncoder': 'Splade',
    'MultiVectorEncoder': 'ColBERT',
    'ColBERT': 'ColBERT',
}
_OLD_POOLINGS = {'pooling_mode_cls_token': 'cls', 'pooling_mode_mean_tokens': 'mean', 'pooling_mode_lasttoken': 'last'}


@dataclass(frozen=True)
class Stated:
    """How texts become sequences, sequences vectors and vectors a score.

    Attributes:
        query_prompt: Put before every query.
        text_prompt: Put before every text.
        pooling: How a sequence becomes a vector; None where nothing is said.
        include_prompt: Whether the mean is over the prompt's tokens, too.
        normalize: Whether vectors are brought to length 1 before anything else.
        truncate_dim: How many dimensions of a vector are kept; None is all.
        similarity: How two vectors become a score.
        lower_case: Whether texts are lower-cased before they are tokenised.
        max_length: Tokens of a sequence, special tokens included; None where only tokenizer and model say it.
        unused_prompt: A prompt for passages that sentence-transformers does not use.
        unused_query_prompts: Prompts of other names, where none is for queries.
        template: The prompt around query and text, in pieces; empty where none is stated.
        words: Whose logits a causal re-ranker compares: words, or token ids.
    """

    query_prompt: str = ''
    text_prompt: str = ''
    pooling: str | None = None
    include_prompt: bool = True
    normalize: bool = False
    truncate_dim: int | None = None
    similarity: str = 'cosine'
    lower_case: bool = False
    max_length: int | None = None
    unused_prompt: str = ''
    unused_query_prompts: tuple[str, ...] = ()
    template: tuple[str, ...] = ()
    words: tuple[str | int, ...] = ()

    def given(self, **settings: Any) -> Stated:
        """Returns these with a user's own settings, where not None, and checks that all can be applied.

        Raises:
            ValueError: If a setting is not one that can be applied, or nothing says the pooling.
        """
        chosen = replace(self, **{name: value for name, value in settings.items() if value is not None})
        if chosen.pooling not in READOUTS:
            raise ValueError(
                f'pooling must be one of {list(READOUTS)}; got {chosen.pooling!r}'
                + ('. This model does not say how it was trained: give pooling=' if chosen.pooling is None else '')
            )
        if chosen.similarity not in SIMILARITIES:
            raise ValueError(f'similarity must be one of {SIMILARITIES}; got {chosen.similarity!r}')
        self.check_prompts(settings)
        # Encoders with prompts for tasks are trained with one for queries too; decoders are not always.
        if chosen.pooling == 'last' and self.unused_query_prompts and settings.get('query_prompt') is None:
            raise ValueError(
                f'the model has prompts {self.unused_query_prompts}, of which none is named "query", so that '
                'sentence-transformers puts none before queries unless it is told: say which you mean with '
                "query_prefix='…' or query_prefix=''"
            )
        if not chosen.include_prompt and chosen.pooling == 'cls' and (chosen.query_prompt or chosen.text_prompt):
            raise ValueError(
                "include_prompt=False with pooling='cls' makes the first token after the prompt the vector, which "
                "BiEncoder does not do: use a model with pooling='mean', or give query_prefix='' and text_prefix=''"
            )
        return chosen

    def check_prompts(self, settings: Mapping[str, Any]) -> None:
        """Checks that a prompt that is not used is not meant.

        Raises:
            ValueError: If a user has not said so.
        """
        if self.unused_prompt and settings.get('text_prompt') is None:
            raise ValueError(
                f'the model has a prompt {self.unused_prompt!r} for passages but none for documents, so that '
                'sentence-transformers puts none before texts: say which you mean with '
                f"text_prefix={self.unused_prompt!r} or text_prefix=''"
            )

    def prompt(self, field: str) -> str:
        """Returns what is put before a field, 'query' or 'text'."""
        return {'query': self.query_prompt, 'text': self.text_prompt}[field]

    def unscored(self, tokenizer: Any, field: str, max_length: int) -> int:
        """Returns how many leading positions of a sequence the mean leaves out: first special token and prompt."""
        prompt = self.prompt(field)
        if self.include_prompt or not prompt:
            return 0
        ids = tokenizer(prompt)['input_ids']
        return min(len(ids), max_length) - (ids[-1] in tokenizer.all_special_ids)

    def finish(self, vectors: torch.Tensor) -> torch.Tensor:
        """Returns pooled vectors [..., d] as they are multiplied: the score is the sum of the products."""
        if self.normalize:
            vectors = F.normalize(vectors, dim=-1)
        vectors = vectors[..., : self.truncate_dim]
        return F.normalize(vectors, dim=-1) if self.similarity == 'cosine' else vectors

    def files(self, max_length: int, width: int | None) -> dict[str, Any]:
        """Returns the contents of the JSON files that state the same, by path.

        Args:
            max_length: Tokens of a sequence that are read.
            width: Dimensions of a vector for a bi-encoder; None for a cross-encoder.
        """
        kinds = ['Transformer'] if width is None else ['Transformer', 'Pooling'] + ['Normalize'] * self.normalize
        modules = [
            {'idx': i, 'name': str(i), 'path': f'{i}_{kind}' if i else '', 'type': f'{PACKAGE}models.{kind}'}
            for i, kind in enumerate(kinds)
        ]
        transformer: dict[str, Any] = {'max_seq_length': max_length, 'do_lower_case': self.lower_case}
        files: dict[str, Any] = {MODULES: modules, TRANSFORMER[0]: transformer}
        if width is None:
            transformer['transformer_task'] = 'sequence-classification'
            prompts = {'query': self.query_prompt}
            files[SETTINGS] = {'model_type': 'CrossEncoder', 'prompts': prompts, 'default_prompt_name': 'query'}
            return files
        prompts = {'query': self.query_prompt, 'document': self.text_prompt}
        scoring = {'similarity_fn_name': self.similarity, 'truncate_dim': self.truncate_dim}
        files[SETTINGS] = {'prompts': prompts, 'default_prompt_name': None, **scoring}
        files['1_Pooling/config.json'] = {
            'word_embedding_dimension': width,
            **{key: self.pooling == pooling for key, pooling in _OLD_POOLINGS.items()},
            'include_prompt': self.include_prompt,
        }
        return files


def stated_bi_encoder(name: str) -> Stated:
    """Returns what a bi-encoder's folder or repository states; `Stated.given` checks the parts a user can replace.

    Raises:
        ValueError: If it states something that BiEncoder does not do.
    """
    modules = read(name, MODULES, list)
    if modules is None:
        return transformer_of(name, 'feature-extraction')
    settings, kinds = settings_of(name, 'SentenceTransformer'), kinds_of(name, modules)
    if kinds[:2] != ['Transformer', 'Pooling'] or set(kinds[2:]) - {'Normalize'}:
        raise ValueError(
            f'{name!r} is made of {", ".join(kinds)}; BiEncoder must have Transformer, Pooling and Normalize alone, or '
            'its scores would be wrong. Use such a model'
        )
    prompts = prompts_of(name, settings, ('query', 'document'))
    pooling = read(name, f'{modules[1]["path"]}/config.json', dict) or {}
    return replace(
        transformer_of(name, 'feature-extraction'),
        query_prompt=prompts['query'],
        text_prompt=prompts['document'],
        unused_query_prompts=() if prompts['query'] else _other_prompts(prompts, settings),
        unused_prompt='' if prompts['document'] else prompts.get('passage') or prompts.get('corpus') or '',
        pooling=_pooling(pooling),
        include_prompt=pooling.get('include_prompt', True),
        normalize='Normalize' in kinds,
        truncate_dim=positive(name, settings, 'truncate_dim'),
        similarity=settings.get('similarity_fn_name') or 'cosine',
    )


def stated_cross_encoder(name: str) -> Stated:
    """Returns what a cross-encoder's folder or repository states.

    Raises:
        ValueError: If it states something that CrossEncoder does not do.
    """
    modules = read(name, MODULES, list)
    if modules is None:
        return transformer_of(name, 'sequence-classification')
    settings, kinds = settings_of(name, 'CrossEncoder'), kinds_of(name, modules)
    if kinds != ['Transformer']:
        way = 'Use CausalReranker' if kinds == ['Transformer', LOGITS] else 'Use such a model'
        raise ValueError(f'{name!r} is made of {", ".join(kinds)}; CrossEncoder must have a Transformer alone. {way}')
    prompt = prompts_of(name, settings)[settings.get('default_prompt_name') or '']
    return replace(transformer_of(name, 'sequence-classification'), query_prompt=prompt)


def _other_prompts(prompts: Mapping[str, str], settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of prompts that may be meant for queries."""
    known = ('query', 'document', 'passage', 'corpus')
    named = tuple(role for role, prompt in prompts.items() if prompt and role not in known)
    return () if settings.get('default_prompt_name') else named


def transformer_of(name: str, task: str, known: tuple[str, ...] = ()) -> Stated:
    """Returns what the file of the first module states, beside settings that the caller knows and reads itself.

    Raises:
        ValueError: If it states something that is not done here.
    """
    config: dict[str, Any] = next(filter(None, (read(name, file, dict) for file in TRANSFORMER)), {})
    text = {'method': 'forward', 'method_output_name': _TASKS[task]}
    expected: list[dict[str, Any]] = [{'text': text}]
    if task == 'text-generation':
        expected += [{'text': text, 'message': {**text, 'format': kind}} for kind in _FORMATS]
    if config.get('transformer_task', task) != task or config.get('modality_config', expected[0]) not in expected:
        raise ValueError(
            f'{TRANSFORMER[0]} of {name!r} must state the task {task!r} with text alone; got '
            f'{config.get("transformer_task")!r}, {config.get("modality_config")!r}'
        )
    arguments = {key: value for group in _GROUPS for key, value in (config.get(group) or {}).items()}
    unread = {
        key: value for key, value in config.items() if value and key not in (*_KNOWN, *known, *_NEUTRAL, *_GROUPS)
    }
    unread |= {key: value for key, value in arguments.items() if key not in (_LENGTH, *_NEUTRAL)}
    if unread:
        raise ValueError(
            f'{TRANSFORMER[0]} of {name!r} states {unread}, which is not applied here, so that scores would be wrong: '
            'use a model without, or load module and tokenizer yourself and give model= and tokenizer='
        )
    longest = positive(name, arguments, _LENGTH) or positive(name, config, 'max_seq_length')
    return Stated(lower_case=bool(config.get('do_lower_case')), max_length=longest)


def kinds_of(name: str, modules: list[Any], packages: tuple[str, ...] = (PACKAGE,)) -> list[str]:
    """Returns the class names of the modules that a model is made of.

    Raises:
        ValueError: If one has code of its own, or the weights do not lie in the root.
    """
    for module in modules:
        if not str(module['type']).startswith(packages):
            raise ValueError(f'{name!r} has a module of its own code, {module["type"]!r}, which is not run here')
    if modules and modules[0]['path']:
        raise ValueError(f'the weights of {name!r} must lie in its root; got the folder {modules[0]["path"]!r}')
    return [module['type'].rsplit('.', 1)[-1] for module in modules]


def settings_of(name: str, *expected: str) -> Mapping[str, Any]:
    """Returns the settings of a model that was saved as one of the expected classes.

    Raises:
        ValueError: If it was saved as another.
    """
    settings = read(name, SETTINGS, dict) or {}
    kind = settings.get('model_type', 'SentenceTransformer')
    if kind not in expected:
        raise ValueError(
            f'{name!r} was saved as a {kind}, not as a {" or ".join(expected)}: '
            + (f'use {_RANKERS[kind]}' if kind in _RANKERS else 'its scores are made in another way')
            + '. To use its weights all the same, load module and tokenizer yourself and give model= and tokenizer='
        )
    return settings


def prompts_of(name: str, settings: Mapping[str, Any], roles: tuple[str, ...] = ('',)) -> dict[str, str]:
    """Returns the prompts by name, '' for roles without one."""
    saved = settings.get('prompts') or {}
    prompts = dict.fromkeys(roles, '') | {role: prompt or '' for role, prompt in saved.items()}
    default = settings.get('default_prompt_name')
    if default is not None and default not in prompts:
        raise ValueError(f'default_prompt_name of {name!r} must be one of {list(prompts)}; got {default!r}')
    return prompts


def _pooling(config: Mapping[str, Any]) -> str:
    modes = config.get('pooling_mode')
    if modes is None:
        on = [key for key, value in config.items() if key.startswith('pooling_mode_') and value]
        modes = [_OLD_POOLINGS.get(key, key) for key in on] or 'mean'
    if modes in ('lasttoken', ['lasttoken']):
        return 'last'
    return modes if isinstance(modes, str) else '+'.join(modes)


def positive(name: str, settings: Mapping[str, Any], key: str) -> int | None:
    """Returns a setting that must be a whole number from 1, where it is given."""
    value = settings.get(key)
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f'{key} of {name!r} must be a whole number from 1; got {value!r}')
    return value


def read(name: str, file: str, kind: type) -> Any:
    """Returns a JSON file of a model that must hold a list or a dict, or None."""
    values = load_json(name, file)
    if values is not None and not isinstance(values, kind):
        raise ValueError(f'{file} of {name!r} must hold a {kind.__name__}; got a {type(values).__name__}')
    return values
