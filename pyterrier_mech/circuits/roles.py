"""Where attention heads look, and the role that follows.

`AttentionShares` measures, for every row and head, how the attention mass is spread over the flows between query,
document and special tokens; `head_roles` adds rows up and names a role for each head. Attention weights are made from
the model's own queries and keys, so that the model runs as it was loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyterrier_mech.anatomy.layers import Context, Layer
from pyterrier_mech.frames import texts_of, with_columns
from pyterrier_mech.inputs.alignment import PROMPT, TYPES
from pyterrier_mech.inputs.batching import in_batches
from pyterrier_mech.inputs.inputs import Inputs
from pyterrier_mech.patch.engine import traced
from pyterrier_mech.rankers.ranker import as_numpy
from pyterrier_mech.stage import Keeping, ModelStage
from pyterrier_mech.units import HEADS, Site, head

_WORDS = ('query_to_query', 'document_to_document', 'query_to_document', 'document_to_query')
FLOWS = (*_WORDS, 'to_cls', 'to_sep', 'special_to_words')
ROLES = ('query-focused', 'document-focused', 'matching', 'special-token', 'mixed')
SHARE, EXPECTED, ODDS = 'attention.', 'expected.', 'odds.'

_CLS, _QUERY, _SEP, _DOCUMENT = range(4)
_GROUP_OF = {'cls': _CLS, 'query': _QUERY, 'sep': _SEP, 'doc_match': _DOCUMENT, 'doc_other': _DOCUMENT, PROMPT: _SEP}
# Which words look above expectation where: any other set of flows has no name.
_ROLE_OF = {
    frozenset({'query_to_query'}): 'query-focused',
    frozenset({'query_to_query', 'document_to_query'}): 'query-focused',
    frozenset({'document_to_document'}): 'document-focused',
    frozenset({'document_to_document', 'query_to_document'}): 'document-focused',
    frozenset({'query_to_document'}): 'matching',
    frozenset({'document_to_query'}): 'matching',
    frozenset({'query_to_document', 'document_to_query'}): 'matching',
}


@dataclass(eq=False, repr=False)
class AttentionShares(Keeping, ModelStage):
    """Where every attention head looks: the shares of its attention mass between kinds of tokens.

    Each token of a row spreads a mass of one over all tokens. The seven flows divide the mass of all of them: from and
    to query words, from and to document words, from any token to the first (CLS), from any token to separators, and
    from these special tokens to words. So the shares of a head sum to one.

    **Input columns**: qid, query, docno, text.

    **Output columns**: the same and for each flow `attention.{flow}`, an array [layers, heads] a row (NaN where a layer
    has fewer heads than the widest), and `expected.{flow}`, the share that attention spread evenly over all tokens
    would have. Flows: `query_to_query`, `document_to_document`, `query_to_document`, `document_to_query`, `to_cls`,
    `to_sep`, `special_to_words`. The ranking is kept.

    Args:
        model: A cross-encoder of a described family (BERT, ELECTRA, RoBERTa, DistilBERT, ModernBERT).
        batch_tokens: Tokens of one batch; by default as the model has it. Attention weights are made for so many rows
            at a time that they take no more memory than a layer's input, or for one row.
        text_field: Column of the text; by default as the model has it.
        verbose: Shows a progress bar; by default as the model has it.

    Raises:
        ValueError: If the model reads query and text apart, or its family's attention is not described.
    """

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Measures the shares of every row."""
        self.check()
        if len(self.model.towers) > 1:
            raise ValueError(
                f'{self.model!r} reads query and text apart, so none looks at the other: AttentionShares needs a '
                'ranker that reads them together, such as CrossEncoder'
            )
        fields = texts_of(inp, self, self.text)
        if not len(inp):
            shares = {SHARE + flow: np.zeros(0, dtype=object) for flow in FLOWS}
            return with_columns(inp, {**shares, **{EXPECTED + flow: np.zeros(0) for flow in FLOWS}})
        inputs = Inputs.plain(self.model, *fields.values(), types=True)
        return with_columns(inp, {**self._shares(inputs), **_expected(inputs)})

    def _shares(self, inputs: Inputs) -> dict[str, list[np.ndarray]]:
        model = self.model
        check_plain(model)
        counts = list(model.counts(HEADS).values())
        shape = (len(FLOWS), len(inputs), len(counts), max(counts, default=0))
        values = np.full(shape, np.nan, dtype=model.float_type)

        def step(rows: np.ndarray) -> list[np.ndarray]:
            groups = torch.from_numpy(_groups(inputs, rows)).to(model.map.device)
            run = traced(model.map, inputs, 0, rows)
            x = [run.values[Site('resid_pre', i)] for i in range(len(counts))]
            layers = zip(model.map.layers, x, run.contexts, strict=True)
            return [_flows(as_numpy(_masses(layer, x, context, groups))) for layer, x, context in layers]

        with model.computing():
            batches = in_batches(inputs.lengths, self.budget, step, verbose=self.shows, desc='AttentionShares')
            for rows, layers in batches:
                for layer, flows in enumerate(layers):
                    values[:, rows, layer, : flows.shape[2]] = flows / inputs.lengths[rows][:, None]
        return {SHARE + flow: list(value) for flow, value in zip(FLOWS, values, strict=True)}


def check_plain(model: Any) -> None:
    """Checks that attention weights can be made from the queries and keys of a ranker.

    Raises:
        ValueError: If not.
    """
    if reason := model.map.why_not_plain():
        raise ValueError(
            f'attention weights are made from the parts of the layers, but of {model!r} {reason}: describe the family '
            'with qkv= by pyterrier_mech.rankers.register_family(Family(...)) if it is plain attention; merge adapters '
            'and remove hooks'
        )


def _masses(layer: Layer, x: torch.Tensor, context: Context, groups: torch.Tensor) -> torch.Tensor:
    """Returns the attention mass from group to group, [rows, heads, groups, groups]."""
    n_rows, n_tokens, d = x.shape
    if not layer.n_heads:
        return x.new_zeros(n_rows, 0, 4, 4)
    member = torch.stack([groups == group for group in range(4)], dim=1)
    size = max(1, n_rows * d // (layer.n_heads * n_tokens))
    parts = []
    for start in range(0, n_rows, size):
        rows = slice(start, start + size)
        weights = layer.pattern(x[rows], context.rows(lambda tensor, rows=rows: tensor[rows]))  # type: ignore[misc]
        of = member[rows, None].to(weights.dtype)
        parts.append(of @ weights @ of.transpose(-1, -2))
    return torch.cat(parts)


def _flows(masses: np.ndarray) -> np.ndarray:
    """From masses [rows, heads, groups, groups] to [flows, rows, heads]."""
    words, special = [_QUERY, _DOCUMENT], [_CLS, _SEP]
    sources, targets = [*words, *words], [*words, *reversed(words)]
    between_words = [masses[..., source, target] for source, target in zip(sources, targets, strict=True)]
    to_special = [masses[..., group].sum(-1) for group in special]
    return np.stack([*between_words, *to_special, masses[..., special, :][..., words].sum((-1, -2))])


def _groups(inputs: Inputs, rows: np.ndarray) -> np.ndarray:
    """Returns the group of every position [rows, tokens], -1 for padding."""
    of_type = np.asarray([*(_GROUP_OF.get(kind, -1) for kind in (*TYPES, PROMPT)), -1])
    return of_type[inputs.types(0, rows, inserted=False)]


def _expected(inputs: Inputs) -> dict[str, np.ndarray]:
    groups = [_groups(inputs, np.asarray([row]))[0] for row in range(len(inputs.lengths))]
    counts = np.stack([np.bincount(row[row >= 0], minlength=4) for row in groups]) / inputs.lengths[:, None]
    flows = _flows((counts[:, :, None] * counts[:, None, :])[:, None])[..., 0]
    return {EXPECTED + flow: values for flow, values in zip(FLOWS, flows, strict=True)}


def head_roles(frame: pd.DataFrame, *, odds: float = 2.0, special: float = 0.5) -> pd.DataFrame:
    """Names the role of every head from where it looks, over all rows of a frame.

    Shares are means over rows. A head that gives the share `special` or more of its mass to CLS and separators is
    'special-token'. Of any other, what query words give to words is divided into query and document, and so is what
    document words give; a flow is above expectation where its odds are `odds` times those of attention spread evenly.

    - 'query-focused': query to query is above, and document to query may be;
    - 'document-focused': document to document is above, and query to document may be;
    - 'matching': query to document, document to query, or both;
    - 'mixed': none of these, or both stay on their own side.

    **Input columns**: qid and what `AttentionShares` writes.

    **Output columns**: one row a head: `layer`, `head`, `name`, `role`, `above` (the flows above expectation),
    `attention.{flow}` and `expected.{flow}` (mean shares), `odds.{flow}` for the four flows between words (ratio of the
    odds to those expected, from sums over rows; NaN without such mass), `n` (rows), `n_queries`, and the thresholds
    `odds_threshold` and `special_threshold`.

    Args:
        frame: The frame of an `AttentionShares` stage.
        odds: How many times the expected odds are above expectation.
        special: The share of mass on special tokens that makes the role.

    Raises:
        ValueError: If a threshold is out of range, a column is missing, or there are no rows.
    """
    if not odds >= 1:
        raise ValueError(f'odds must be 1 or more, or flows below expectation would count as above it; got {odds!r}')
    if not 0 < special <= 1:
        raise ValueError(f'special must be a share above 0 and up to 1, e.g. 0.5; got {special!r}')
    missing = [column for flow in FLOWS for column in (SHARE + flow, EXPECTED + flow) if column not in frame.columns]
    if missing or not len(frame):
        what = f'The frame has no {missing[0]!r}' if missing else 'The frame has no rows'
        raise ValueError(f'{what}: pass what AttentionShares(model) returned for at least one pair.')
    shares = {flow: np.mean([np.asarray(value) for value in frame[SHARE + flow]], axis=0) for flow in FLOWS}
    expected = {flow: float(frame[EXPECTED + flow].mean()) for flow in FLOWS}
    ratios = _odds_ratios(shares, expected)
    counts = {'n': len(frame), 'n_queries': frame['qid'].nunique()}
    thresholds = {'odds_threshold': float(odds), 'special_threshold': float(special)}
    rows = []
    for layer, number in np.argwhere(~np.isnan(shares['to_cls'])).tolist():
        above = [flow for flow in _WORDS if ratios[flow][layer, number] >= odds]
        to_special = shares['to_cls'][layer, number] + shares['to_sep'][layer, number]
        role = 'special-token' if to_special >= special else _ROLE_OF.get(frozenset(above), 'mixed')
        row: dict[str, Any] = {'layer': layer, 'head': number, 'name': head(layer, number).name, 'role': role}
        row |= {'above': ' '.join(above), **{SHARE + flow: shares[flow][layer, number] for flow in FLOWS}}
        row |= {EXPECTED + flow: expected[flow] for flow in FLOWS}
        rows.append(row | {ODDS + flow: ratios[flow][layer, number] for flow in _WORDS} | counts | thresholds)
    return pd.DataFrame(rows)


def _odds_ratios(shares: dict[str, np.ndarray], expected: dict[str, float]) -> dict[str, np.ndarray]:
    """Returns [layers, heads] for the four flows between words."""
    ratios = {}
    with np.errstate(divide='ignore', invalid='ignore'):
        for source in ('query', 'document'):
            to_query, to_document = f'{source}_to_query', f'{source}_to_document'
            found = shares[to_query] / shares[to_document]
            even = np.float64(expected[to_query]) / np.float64(expected[to_document])
            ratios[to_query], ratios[to_document] = found / even, even / found
    return ratios
