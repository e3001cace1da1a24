"""How the attention mass of every head is spread: over flows between query, document and special tokens.

`AttentionShares` is the stage. Its flows divide the mass; parts of a flow say how much of it goes to the same word
elsewhere, or to which separator; and where there is an edit, further flows start or end at what was put in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch

from pyterrier_mech.circuits.attention import ALIGNED, aligned_column, check_plain, in_parts, inputs_of, versions_of
from pyterrier_mech.frames import with_columns
from pyterrier_mech.inputs.alignment import LITERATURE, MASK_FILLER, PROMPT
from pyterrier_mech.inputs.batching import in_batches
from pyterrier_mech.inputs.inputs import ORIGINAL, PERTURBED, Inputs
from pyterrier_mech.patch.engine import traced
from pyterrier_mech.provenance import noted
from pyterrier_mech.rankers.ranker import as_numpy
from pyterrier_mech.stage import Keeping, ModelStage
from pyterrier_mech.units import HEADS, Site

WORD_FLOWS = ('query_to_query', 'document_to_document', 'query_to_document', 'document_to_query')
FLOWS = (*WORD_FLOWS, 'to_cls', 'to_sep', 'special_to_words')
SHARE, EXPECTED, REPEATED = 'attention.', 'expected.', 'repeated'
MODEL = 'attention_model'
"""Column that says which ranker was looked into, so that rows of two are not put together."""

_SAME = ('same_word', 'same_piece')
_SIDES = {'query': 'query', 'text': 'document'}
_GROUPS = ('query', 'document', 'cls', 'sep_first', 'sep_last')
_INJECTED = 'injected'


@dataclass(eq=False, repr=False)
class AttentionShares(Keeping, ModelStage):
    """Where every attention head looks: the shares of its attention mass between kinds of tokens.

    Each token of a row spreads a mass of one over all tokens. The seven flows divide the mass of all of them: from and
    to query words, from and to document words, from any token to the first (CLS), from any token to separators, and
    from these special tokens to words. So the shares of a head sum to one.

    **Input columns**: qid, query, docno, text; where `Perturb` stands before it, also the other version.

    **Output columns**: the same and for each flow `attention.{flow}`, an array [layers, heads] a row (NaN where a layer
    has fewer heads than the widest), and `expected.{flow}`, the share that attention spread evenly over all tokens
    would have. Flows: `query_to_query`, `document_to_document`, `query_to_document`, `document_to_query`, `to_cls`,
    `to_sep`, `special_to_words`. `attention_model` says which ranker it was: `head_roles` refuses a mixture. The
    ranking is kept.

    *Parts of flows*, in the same two columns: `{flow}.same_word` is what a flow between words gives to the same word
    at another place, and `{flow}.same_piece` what it gives to the same word piece, in whichever other word;
    `to_sep.first` are all separators but the last, which is `to_sep.last`. `repeated` is the share of the tokens whose
    word stands elsewhere too: these can give mass to it. Words are whole, in lower case, without punctuation.

    *What an edit has put in.* Where the frame has two versions of a text, the perturbed one is read, and further flows
    are shares of the mass of their own source: `injected_to_{type}` divides the mass of the tokens that the edit put
    in, and `{type}_to_injected` is what another type of token gives to them. Types are those of the literature:
    `query_same` and `doc_same` (the word that was put in, elsewhere in the query or in the document), `query_other`,
    `doc_query` (another query word in the document), `doc_other`, `cls`, `sep_first`, `sep_last`. They are NaN where a
    row has no such token, or where the versions cannot be aligned; `attention_aligned` says why.

    The tokens of a prompt around query and document count as separators, all of them as `to_sep.first`.

    A bi-encoder reads query and document apart. Each sequence has shares of its own, which sum to one, and names say
    which: `attention.text.document_to_document`, `attention.query.to_cls`, `repeated.text`.

    Args:
        model: A ranker of a described family (BERT, ELECTRA, RoBERTa, DistilBERT, ModernBERT).
        batch_tokens: Tokens of one batch; by default as the model has it. Attention weights are made for so many rows
            at a time that they take no more memory than a layer's input, or for one row.
        text_field: Column of the text; by default as the model has it.
        verbose: Shows a progress bar; by default as the model has it.

    Raises:
        ValueError: If the family's attention is not described.
    """

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Measures the shares of every row."""
        self.check()
        versions = versions_of(inp, self, self.text)
        edited = len(versions) > 1
        if not len(inp):
            return with_columns(inp, self._empty(edited))
        check_plain(self.model)
        inputs = Inputs.plain(self.model, *versions[-1].values(), types=True)
        pairs = inputs_of(self.model, versions, MASK_FILLER) if edited else None
        columns: dict[str, Any] = {}
        for tower in range(len(inputs.towers)):
            columns |= self._measured(_Everything(inputs, tower))
            if pairs is not None:
                columns |= self._measured(_Edits(pairs, tower))
        columns[MODEL] = np.full(len(inp), noted(self.model), dtype=object)
        return with_columns(inp, columns | ({} if pairs is None else aligned_column(pairs)))

    def _empty(self, edited: bool) -> dict[str, Any]:
        columns: dict[str, Any] = {}
        for fields in self.model.towers:
            tower = tower_name(self.model, fields)
            for flows in [part_flows(fields), edit_flows(fields)] if edited else [part_flows(fields)]:
                columns |= {named(SHARE + flow, tower): np.zeros(0, dtype=object) for flow in flows}
                columns |= {named(EXPECTED + flow, tower): np.zeros(0) for flow in flows}
                columns |= {named(REPEATED, tower): np.zeros(0)} if 'to_cls' in flows else {}
        empty = np.zeros(0, dtype=object)
        return columns | {MODEL: empty} | ({ALIGNED: empty} if edited else {})

    def _measured(self, layout: _Layout) -> dict[str, Any]:
        """Returns the columns of one tower."""
        model, inputs, rows = self.model, layout.inputs, layout.rows
        counts = list(model.counts(HEADS).values())
        shape = (len(inputs), len(counts), max(counts, default=0))
        found = {flow: np.full(shape, np.nan, dtype=model.float_type) for flow in layout.flows}

        def step(batch: np.ndarray) -> np.ndarray:
            run = traced(model.map, inputs, layout.tower, rows[batch], layout.side, kinds=())
            places = [torch.from_numpy(part) for part in _padded(layout, rows[batch], run.batch.shape[1])]
            members, same = (part.to(model.map.device) for part in places)
            masses = np.full((len(batch), *shape[1:], 1 + same.shape[1], *2 * members.shape[1:2]), np.nan)
            for i, (layer, context) in enumerate(zip(model.map.layers, run.contexts, strict=True)):
                for some, weights in in_parts(layer, run.values[Site('resid_pre', i)], context):
                    values = as_numpy(_masses(weights, members[some], same[some]))
                    masses[some, i, : counts[i]] = values
            return masses

        lengths = inputs.towers[layout.tower].lengths[rows]
        with model.computing():
            for batch, masses in in_batches(lengths, self.budget, step, verbose=self.shows, desc='AttentionShares'):
                for flow, values in layout.shares(masses, rows[batch]).items():
                    found[flow][rows[batch]] = values
        tower = tower_name(model, model.towers[layout.tower])
        columns: dict[str, Any] = {named(SHARE + flow, tower): list(values) for flow, values in found.items()}
        return columns | {named(name, tower): values for name, values in layout.scalars().items()}


class _Layout(Protocol):
    """What stands where in the rows of one tower, and the flows between.

    Attributes:
        inputs: The inputs.
        tower: Which tower.
        side: Which version of the text.
        rows: The rows that are read.
        flows: Names of the flows.
    """

    inputs: Inputs
    tower: int
    side: str
    rows: np.ndarray
    flows: list[str]

    def places(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns which positions belong to each group [groups, tokens], and parts of the pairs of positions.

        The parts are [parts, tokens, tokens].
        """

    def shares(self, masses: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Returns each flow [rows, ...] from masses [rows, ..., all and parts, source groups, target groups]."""

    def scalars(self) -> dict[str, np.ndarray]:
        """Returns the columns of numbers."""


class _Everything:
    """The flows that divide the whole mass, and their parts."""

    side = ORIGINAL

    def __init__(self, inputs: Inputs, tower: int):
        """Takes all rows."""
        self.inputs, self.tower, self.rows = inputs, tower, np.arange(len(inputs))
        self.fields = inputs.model.towers[tower]
        self.flows = part_flows(self.fields)
        self.lengths = inputs.towers[tower].lengths

    def places(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Groups are query, document, CLS and separators; parts are same words and same pieces."""
        tower = self.inputs.towers[self.tower]
        kinds = np.asarray([_group(_plain(kind)) for kind in tower.types(row, inserted=False, scheme='literature')])
        known: Any = tower.words  # made with the types
        words = np.asarray(known.of(tower, row), dtype=object)
        owners, _ = pd.factorize(pd.Series(known.instances(tower, row), dtype=object))
        apart = (owners[:, None] != owners) & (words != '')[:, None] & (words != '')
        pieces = tower.ids(row)
        same = np.stack([apart & (words[:, None] == words), apart & (pieces[:, None] == pieces)])
        return np.stack([kinds == group for group in _GROUPS]), same

    def shares(self, masses: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Shares of the mass of all tokens."""
        whole = masses / self.lengths[rows].reshape(-1, *[1] * (masses.ndim - 1))
        words, special = [0, 1], [2, 3, 4]
        flows = {}
        for flow in word_flows(self.fields):
            source, target = (_GROUPS.index(group) for group in flow.split('_to_'))
            flows[flow] = whole[..., 0, source, target]
            for part, name in enumerate(_SAME, 1):
                flows[f'{flow}.{name}'] = whole[..., part, source, target]
        to = whole[..., 0, :, :].sum(-2)
        flows |= {'to_cls': to[..., 2], 'to_sep': to[..., 3] + to[..., 4]}
        flows |= {'to_sep.first': to[..., 3], 'to_sep.last': to[..., 4]}
        flows['special_to_words'] = whole[..., 0, special, :][..., words].sum((-1, -2))
        return {flow: flows[flow] for flow in self.flows}

    def scalars(self) -> dict[str, np.ndarray]:
        """The same of even attention, and how many tokens stand elsewhere too."""
        repeated = np.asarray([self.places(row)[1][0].any(-1).mean() for row in self.rows.tolist()])
        return {**_even(self), REPEATED: repeated}


class _Edits:
    """The flows from and to what an edit has put in."""

    side = PERTURBED

    def __init__(self, pairs: Inputs, tower: int):
        """Takes the rows that could be aligned."""
        self.inputs, self.tower, self.rows = pairs, tower, pairs.good
        fields = pairs.model.towers[tower]
        self.flows, self.groups = edit_flows(fields), _edit_groups(fields)

    def places(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Groups are types of tokens; there are no parts."""
        tower = self.inputs.towers[self.tower]
        kinds = np.asarray([_plain(kind) for kind in tower.types(row, scheme='literature')], dtype=object)
        kinds[tower.changed(row)] = _INJECTED
        _, shown, _ = tower.arrays(np.asarray([row]), PERTURBED)
        kinds[shown[0] == 0] = ''
        return np.stack([kinds == group for group in self.groups]), np.zeros((0, len(kinds), len(kinds)), dtype=bool)

    def shares(self, masses: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Shares of the mass of the source; NaN where there is no source or no target."""
        counts = np.stack([self.places(row)[0].sum(-1) for row in rows]).astype(float)
        counts[counts == 0] = np.nan
        flows = {}
        for flow in self.flows:
            source, target = (self.groups.index(group) for group in flow.split('_to_'))
            of_source, there = counts[:, source], counts[:, target] / counts[:, target]
            flows[flow] = masses[..., 0, source, target] * (there / of_source).reshape(-1, *[1] * (masses.ndim - 4))
        return flows

    def scalars(self) -> dict[str, np.ndarray]:
        """The same of even attention."""
        return _even(self)


def _even(layout: _Layout) -> dict[str, np.ndarray]:
    """Returns the shares of even attention of all rows, NaN where a row is not read."""
    found = {EXPECTED + flow: np.full(len(layout.inputs), np.nan) for flow in layout.flows}
    for row in layout.rows.tolist():
        members, same = (torch.from_numpy(part)[None] for part in layout.places(row))
        length = members.shape[-1]
        weights = torch.full((1, 1, length, length), 1 / int(members.sum()), dtype=torch.float64)
        masses = _masses(weights, members, same).numpy()
        for flow, value in layout.shares(masses, np.asarray([row])).items():
            found[EXPECTED + flow][row] = value.item()
    return found


def _masses(weights: torch.Tensor, members: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """Returns the attention mass from group to group [rows, heads, all and parts, groups, groups].

    Args:
        weights: [rows, heads, tokens, tokens].
        members: Which positions belong to each group [rows, groups, tokens].
        same: Parts of the pairs of positions [rows, parts, tokens, tokens].
    """
    of = members[:, None].to(weights.dtype)
    parts = [weights, *(weights * same[:, part, None] for part in range(same.shape[1]))]
    return torch.stack([of @ part @ of.transpose(-1, -2) for part in parts], dim=2)


def _padded(layout: _Layout, rows: np.ndarray, width: int) -> list[np.ndarray]:
    """Returns the places of some rows, one after the other, with False at padding."""
    found = [layout.places(row) for row in rows]
    members = np.zeros((len(rows), len(found[0][0]), width), dtype=bool)
    same = np.zeros((len(rows), len(found[0][1]), width, width), dtype=bool)
    for i, (of_row, parts) in enumerate(found):
        length = of_row.shape[-1]
        members[i, :, :length], same[i, :, :length, :length] = of_row, parts
    return [members, same]


# -- names


def tower_name(model: Any, fields: Sequence[str]) -> str | None:
    """Returns what names of columns call a tower; None where there is one alone."""
    return fields[0] if len(model.towers) > 1 else None


def named(name: str, tower: str | None) -> str:
    """Returns the name of a column of a tower: 'attention.to_cls', 'attention.text.to_cls', 'repeated.text'."""
    first, *rest = name.split('.', 1)
    return '.'.join([first, *([tower] if tower else []), *rest])


def word_flows(fields: Sequence[str]) -> list[str]:
    """Returns the flows between words of a sequence that has some fields."""
    there = [_SIDES[field] for field in fields]
    return [flow for flow in WORD_FLOWS if set(flow.split('_to_')) <= set(there)]


def part_flows(fields: Sequence[str]) -> list[str]:
    """Returns the flows that divide the mass of a sequence, then their parts."""
    words = word_flows(fields)
    parts = [f'{flow}.{part}' for flow in words for part in _SAME]
    return [*words, *(flow for flow in FLOWS if flow not in WORD_FLOWS), *parts, 'to_sep.first', 'to_sep.last']


def edit_flows(fields: Sequence[str]) -> list[str]:
    """Returns the flows from and to what an edit has put into a sequence."""
    groups = _edit_groups(fields)
    return [f'{_INJECTED}_to_{group}' for group in groups] + [f'{group}_to_{_INJECTED}' for group in groups[1:]]


def _edit_groups(fields: Sequence[str]) -> list[str]:
    absent = [start for field, start in (('query', 'query_'), ('text', 'doc_')) if field not in fields]
    kinds = [kind for kind in LITERATURE if kind != 'inserted' and not kind.startswith(tuple(absent))]
    return [_INJECTED, *kinds]


def _plain(kind: str) -> str:
    """Returns a type; what stands around texts in a prompt counts as a separator."""
    return 'sep_first' if kind == PROMPT else kind


def _group(kind: str) -> str:
    return 'query' if kind.startswith('query') else 'document' if kind.startswith('doc') else kind
