"""All that the tests take from the inside of the package: what is not public is reached here and nowhere else."""

import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pyterrier_mech import PatchHeads
from pyterrier_mech.anatomy import families
from pyterrier_mech.anatomy.edits import columns_of, zeros
from pyterrier_mech.anatomy.families import Family, register_family  # noqa: F401
from pyterrier_mech.anatomy.families import _classify_bert as classify_bert  # noqa: F401
from pyterrier_mech.anatomy.layers import Layer  # noqa: F401
from pyterrier_mech.anatomy.readouts import READOUTS  # noqa: F401
from pyterrier_mech.anatomy.resizing import keep_units  # noqa: F401
from pyterrier_mech.anatomy.sites import PLACES, Place  # noqa: F401
from pyterrier_mech.attribute.relp import linearised
from pyterrier_mech.attribute.tokens import merged  # noqa: F401
from pyterrier_mech.circuits.shares import FLOWS  # noqa: F401
from pyterrier_mech.durable import distributed, resumable  # noqa: F401
from pyterrier_mech.durable.digests import stage_digest  # noqa: F401
from pyterrier_mech.durable.rows import Rows  # noqa: F401
from pyterrier_mech.durable.store import Store  # noqa: F401
from pyterrier_mech.durable.workers import ENGINES, Worker, WorkerError  # noqa: F401
from pyterrier_mech.evaluation import comparison
from pyterrier_mech.evaluation.bootstrap import ratio_of_sums, vanishes  # noqa: F401
from pyterrier_mech.evaluation.comparison import _paired_t as paired_t  # noqa: F401
from pyterrier_mech.evaluation.efficiency import count_flops, encoder_parameters, parameters, weight_mb  # noqa: F401
from pyterrier_mech.frames import two_versions, with_columns  # noqa: F401
from pyterrier_mech.inputs.alignment import (  # noqa: F401
    FILLER,
    LITERATURE,
    SCHEMES,
    TRUNCATED,
    UNALIGNED,
    UNCHANGED,
    Aligner,
)
from pyterrier_mech.inputs.batching import Budget, in_batches  # noqa: F401
from pyterrier_mech.inputs.inputs import AlignedTower, Inputs, _problem
from pyterrier_mech.inputs.tokens import InputMaker, Ragged  # noqa: F401
from pyterrier_mech.inputs.words import words_of  # noqa: F401
from pyterrier_mech.patch import engine
from pyterrier_mech.patch.engine import engine_for, traced
from pyterrier_mech.patch.variants import variants_of
from pyterrier_mech.perturb._documents import plain_words  # noqa: F401
from pyterrier_mech.perturb._words import word_spans  # noqa: F401
from pyterrier_mech.provenance import ANALYSIS, FITTED_ON, Analysis  # noqa: F401
from pyterrier_mech.prune.criteria.gates import gating, unit_gradients
from pyterrier_mech.prune.criteria.trained import _expected as expected_cost  # noqa: F401
from pyterrier_mech.prune.criteria.trained import _gate as gate  # noqa: F401
from pyterrier_mech.prune.criteria.trained import _turn as turn  # noqa: F401
from pyterrier_mech.prune.data import (  # noqa: F401
    FitData,
    fit_data,
    sample,  # noqa: F401
)
from pyterrier_mech.prune.plans import latency
from pyterrier_mech.prune.plans.costs import Costs, flop_costs, parameter_costs  # noqa: F401
from pyterrier_mech.prune.plans.latency import corrected  # noqa: F401
from pyterrier_mech.prune.plans.planning import check_budget  # noqa: F401
from pyterrier_mech.prune.protocol import check_step as check_needs  # noqa: F401
from pyterrier_mech.prune.recovery.distillation import margin_error, with_negatives  # noqa: F401
from pyterrier_mech.prune.recovery.training import Schedule, batches, groups, train  # noqa: F401
from pyterrier_mech.rankers import folders, loading
from pyterrier_mech.rankers.folders import Stated  # noqa: F401
from pyterrier_mech.rankers.modes import tf32  # noqa: F401
from pyterrier_mech.rankers.saving import save_ranker  # noqa: F401
from pyterrier_mech.rankers.templates import KNOWN, known_for  # noqa: F401
from pyterrier_mech.saving import read_meta, write_atomic  # noqa: F401
from pyterrier_mech.units import Site, Units  # noqa: F401

alignment_module = sys.modules['pyterrier_mech.inputs.alignment']
# By its full name: the package may export the function under the name of the module.
evaluation_efficiency = sys.modules['pyterrier_mech.evaluation.efficiency']


# -- rankers


def tokenizer_of(model):
    return model.maker.tokenizer


def max_length_of(model):
    return model.maker.max_length


def module_of(model):
    return model.map.module


def layers_of(model):
    """The modules of the layers."""
    return [layer.module for layer in model.map.layers]


@contextmanager
def described_as(model_type, **changes):
    """Describes a family otherwise for the length of a `with` block."""
    family = families._FAMILIES[model_type]
    register_family(replace(family, **changes))
    try:
        yield
    finally:
        register_family(family)


def load_names_as(monkeypatch, toys):
    """Has names that are no folder loaded by the functions of `toys`; what is registered meanwhile is forgotten."""
    for function, toy in toys.items():
        room = folders if hasattr(folders, function) else loading

        def load(name, *args, real=getattr(room, function), toy=toy, **settings):
            return (real if Path(name).is_dir() else toy)(name, *args, **settings)

        monkeypatch.setattr(room, function, load)
    monkeypatch.setattr(families, '_FAMILIES', dict(families._FAMILIES))


def budget_of(model):
    """Tokens of a batch."""
    return model.budget.tokens


def is_loaded(model):
    """Whether the weights are in memory; loads nothing."""
    return model.kept('map', model._weights_key)


# -- pairs


class Side(NamedTuple):
    """One tower of a pair."""

    original: dict
    perturbed: dict
    types: tuple
    problem: str

    def runs(self, reverse=False):
        """The inputs of the run that is patched and of the one that it takes from."""
        return (self.perturbed, self.original) if reverse else (self.original, self.perturbed)


def sides(model, row, filler='a'):
    """For every tower, the two aligned inputs of a row as the plain module takes them, without padding.

    Args:
        model: A ranker.
        row: A mapping or a named tuple with query, text, and text_0, query_0 or both.
        filler: As `PatchHeads` takes it.
    """
    row = row._asdict() if hasattr(row, '_asdict') else dict(row)
    versions = [{field: row.get(f'{field}_0', row[field]) for field in ('query', 'text')}, row]
    values = [{field: [version[field]] for field in ('query', 'text')} for version in versions]
    query = next(ids.row(0) for tower in model.towers for name, ids in model.parts(values[1], tower) if name == 'query')
    found = []
    for tower in model.towers:
        parts = [model.parts(one, tower) for one in values]
        ids = ([part.row(0) for _, part in side] for side in parts)
        aligner = Aligner(model.maker_of(tower), filler)
        one = aligner.align(*ids, [name for name, _ in parts[0]], query=query)
        found.append(Side(_inputs(model, one, 'original'), _inputs(model, one, 'perturbed'), one.types, one.problem))
    return found


def _inputs(model, alignment, side):
    ids = torch.tensor(getattr(alignment, side))[None]
    inputs = {'input_ids': ids, 'attention_mask': torch.tensor(getattr(alignment, f'{side}_mask'))[None]}
    if model.maker.uses_segments:
        inputs['token_type_ids'] = torch.tensor(alignment.segments)[None]
    return inputs


def problem_of(towers):
    """Why a row cannot be patched, from the sides of its towers, or ''."""
    return _problem([tower.problem for tower in towers])


# -- patching


def forced_effects(model, texts, heads):
    """Changes of the pooled vectors where every pair of a text with itself is patched as if it had been edited."""
    ids = model.maker.tokenize(texts)
    aligner = Aligner(model.maker)
    same = [aligner.align([ids.row(0), ids.row(i)], [ids.row(0), ids.row(i)]) for i in range(len(texts))]
    forced = [replace(one, problem='') for one in same]
    inputs = Inputs(model, [AlignedTower(forced, model.towers[0], model.maker.pad_id)], [''] * len(texts))
    units = sorted(Units.of(heads))
    with model.computing():
        engine, rows = engine_for(model), np.arange(len(texts))
        both, (base, source) = PatchHeads(model)._both(engine, inputs, 0, rows, [unit.site for unit in units])
        vectors = engine.vectors(base, source.values, variants_of(units), 10_000)
    return (torch.cat([both, vectors]) - both[:1]).numpy()


def why_not_plain(model):
    return model.map.why_not_plain()


def inputs_of(model, queries, texts):
    return Inputs.plain(model, queries, texts, types=True)


def forget_what_was_told():
    """Has what is said once a process be said again."""
    engine._told.clear()


# -- attribution


def linearised_values(model, texts):
    """(by RelP's forward, by the model's) of the last hidden states and of every layer's heads, padding left out."""
    inputs = Inputs.of_field(model, 'text', texts)
    with model.computing():
        run = traced(model.map, inputs, 0, np.arange(len(texts)))
    with model.computing(gradients=True):
        hidden, z = linearised(model.map, run)
    there = run.batch.tensors['attention_mask'].bool()
    heads = [run.values[site] for site in model.map.sites('heads')]
    return [(mine[there], theirs[there]) for mine, theirs in zip([hidden, *z], [run.hidden, *heads], strict=True)]


# -- circuits


def attention_weights(model, inputs):
    """The attention weights [rows, heads, tokens, tokens] of every layer."""
    from pyterrier_mech.anatomy.model import Batch

    batch = Batch(dict(inputs), inputs['attention_mask'])
    with model.computing():
        run = model.map.run(batch, record=model.map.sites('resid_pre'), contexts=True)
        layers = zip(model.map.layers, run.values.values(), run.contexts, strict=True)
        return [layer.pattern(x, context) for layer, x, context in layers]


def ablation_types(model, frame):
    """(fields, row, the types of its positions as `faithfulness` counts them, what was inserted marked), row by row."""
    inputs = Inputs.pairs(model, *two_versions(frame, PatchHeads(model), 'text'), 'a')
    for tower, fields in zip(inputs.towers, model.towers, strict=True):
        for row in range(len(frame)):
            yield fields, row, tower.types(row, inserted=False), tower.types(row)


# -- evaluation


def never_evaluate(monkeypatch, refuse):
    """Has `refuse` called where `compare` begins to work."""
    monkeypatch.setattr(comparison.reading, 'values_of_queries', refuse)


def replace_clock(monkeypatch, now, score):
    """Has `efficiency` read another clock, and call `score` with a ranker where it would score and count."""
    monkeypatch.setattr(evaluation_efficiency, 'perf_counter', now)
    monkeypatch.setattr(evaluation_efficiency._Pass, 'score', lambda run: score(run.ranker))
    monkeypatch.setattr(evaluation_efficiency, 'count_flops', lambda call: call() or 1)


# -- pruning


def neuron_gradients(model, data):
    """Derivatives of every row's score by a factor on every neuron, layer by layer [rows, neurons]."""
    found = [np.empty((len(data.frame), model.n_neurons(layer))) for layer in range(model.n_layers)]
    for batch in unit_gradients(model, data):
        for layer, values in zip(found, batch.neurons, strict=True):
            layer[batch.rows] = values
    return found


def gated_scores(model, data, heads, neurons):
    """Scores with a factor on every head and neuron."""
    inputs = Inputs.plain(model, data.queries, data.texts)
    with model.computing():
        return model.run(inputs, np.arange(len(data.frame)), edits=gating(model, [*heads, *neurons])).numpy()


def scores_with_gradients(model, data):
    """Scores of all rows, with a graph."""
    inputs = Inputs.plain(model, data.queries, data.texts)
    with model.computing(gradients=True):
        return model.run(inputs, np.arange(len(data.frame)))


def replace_latency_clock(monkeypatch, now):
    """Has tables of times read another clock."""
    monkeypatch.setattr(latency.time, 'perf_counter', now)


def paths_of_pruned(model, pruned, units, texts):
    """(found, expected) of every way through the encoder of a pruned ranker; expected is the silenced model's."""
    inputs = Inputs.plain(model, *texts)
    batch = inputs.batch(0, np.arange(len(texts[0])))
    real, sites = batch.tensors['attention_mask'].bool(), model.map.sites
    edits = zeros(columns_of(model.map, Units.of(units)))
    with pruned.computing(), model.computing():
        record = [*sites('resid_pre'), *sites('heads')]
        expected = model.map.run(batch, edits=edits)
        run = model.map.run(batch, record=record, contexts=True, edits=edits)
        yield pruned.map.run(batch).hidden[real], expected.hidden[real]
        yield pruned.map.represent(batch, READOUTS['cls'])[0], expected.hidden[:, 0]
        for index, (layer, context) in enumerate(zip(pruned.map.layers, run.contexts, strict=True)):
            x, z = run.values[Site('resid_pre', index)], run.values[Site('heads', index)]
            columns = [model.map.layers[index].columns(head) for head in kept_heads(model, units, index)]
            left = torch.cat([z[..., :0], *(z[..., part] for part in columns)], -1)
            yield layer.z(x, context)[real], left[real]
            yield layer.z_at(x, context, 0), left[:, :1]


def kept_heads(model, units, index):
    gone = {unit.index for unit in Units.of(units) if unit.site == Site('heads', index)}
    return [head for head in range(model.n_heads(index)) if head not in gone]
