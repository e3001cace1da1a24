"""How a perturbation is called: by the names of its arguments, so that swapped arguments are found and not used."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

QUERY_NAMES = frozenset({'q', 'query', 'queries', 'query_text', 'question', 'topic'})
TEXT_NAMES = frozenset(
    {'body', 'd', 'doc', 'doc_text', 'document', 'documents', 'p', 'passage', 'passages', 't', 'text', 'texts'}
)

Edit = Callable[[str, str], str]


def as_edit(function: Callable[..., Any], field: str = 'text') -> Edit:
    """Returns a perturbation as a callable ``(query, text)``.

    Args:
        function: A callable with two arguments, (query, text) in this order, or with one. Further arguments must have a
            default. One argument gets the query where it is named like a query, the text where it is named like a text,
            and else what is edited.
        field: What is edited, 'query' or 'text'.

    Raises:
        TypeError: If the first of two arguments is named like a text, or the second like a query: other libraries call
            ``(text, query)``, and such a function would do something else here. Also if it takes no argument, or must
            have more than two.
    """
    names = _names(function)
    if names is None:
        return function
    (required, optional), shown = names, _shown(function)
    if len(required) == 1 and not (optional and _kind(optional[0])):
        given = _kind(required[0]) or field
        return (lambda query, text: function(query)) if given == 'query' else (lambda query, text: function(text))
    first_two = [*required, *optional][:2]
    if len(required) > 2 or len(first_two) < 2:
        raise TypeError(f'{shown} takes {len(required)} arguments: give a callable (query, text) -> str, or (text).')
    if _kind(first_two[0]) == 'text' or _kind(first_two[1]) == 'query':
        raise TypeError(
            f'{shown} has the arguments ({", ".join(first_two)}), but is called with the query first and the text '
            'second: exchange them, or wrap it in lambda query, text: f(text, query).'
        )
    return function


def _names(function: Callable[..., Any]) -> tuple[list[str], list[str]] | None:
    """Returns the positional arguments without and with a default, None where they are any or unknown."""
    try:
        arguments = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    positional = [one for one in arguments if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2 and any(one.kind is one.VAR_POSITIONAL for one in arguments):
        return None
    return (
        [one.name for one in positional if one.default is one.empty],
        [one.name for one in positional if one.default is not one.empty],
    )


def _kind(name: str) -> str:
    name = name.lower().strip('_')
    return 'query' if name in QUERY_NAMES else 'text' if name in TEXT_NAMES else ''


def _shown(function: Callable[..., Any]) -> str:
    return f'perturbation={getattr(function, "__name__", type(function).__name__)}'
