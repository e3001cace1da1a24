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
from pyterrier_mech.anatomy.families import register_family
from pyterrier_mech.anatomy.resizing import keep_units  # noqa: F401
from pyterrier_mech.attribute.relp import linearised
from pyterrier_mech.attribute.tokens import merged  # noqa: F401
from pyterrier_mech.circuits import ablation, roles
from pyterrier_mech.circuits.roles import FLOWS  # noqa: F401
from pyterrier_mech.columns import FITTED_ON, PATCHING, head_columns, head_name, parse_head  # noqa: F401
from pyterrier_mech.evaluation import stats as evaluation_stats
from pyterrier_mech.evaluation.efficiency import count_flops, encoder_parameters, parameters, weight_mb  # noqa: F401
from pyterrier_mech.evaluation.stats import _paired_t as paired_t  # noqa: F401
from pyterrier_mech.frames import with_columns  # noqa: F401
from pyterrier_mech.inputs.alignment import FILLER, TRUNCATED, UNALIGNED, UNCHANGED, Aligner  # noqa: F401
from pyterrier_mech.inputs.batching import Budget, in_batches  # noqa: F401
from pyterrier_mech.inputs.tokens import InputMaker, Ragged  # noqa: F401
from pyterrier_mech.patch import engine
from pyterrier_mech.patch.engine import engine_for
from pyterrier_mech.patch.interventions import PlainInputs, columns_of, replaced, zeros
from pyterrier_mech.patch.pairs import Pairs, _problem, two_versions
from pyterrier_mech.prune.criteria import check_needs, sample  # noqa: F401
from pyterrier_mech.prune.criteria.gates import gated, score_rows, unit_gradients
from pyterrier_mech.prune.criteria.trained import _expected as expected_cost  # noqa: F401
from pyterrier_mech.prune.criteria.trained import _gate as gate  # noqa: F401
from pyterrier_mech.prune.criteria.trained import _turn as turn  # noqa: F401
from pyterrier_mech.prune.data import FitData, fit_data  # noqa: F401
from pyterrier_mech.prune.plans import latency
from pyterrier_mech.prune.plans.costs import Costs, flop_costs, parameter_costs  # noqa: F401
from pyterrier_mech.prune.plans.latency import corrected  # noqa: F401
from pyterrier_mech.prune.plans.planning import check_budget  # noqa: F401
from pyterrier_mech.prune.recovery.distillation import margin_error, with_negatives  # noqa: F401
from pyterrier_mech.prune.recovery.training import Schedule, batches, groups, train  # noqa: F401
from pyterrier_mech.rankers import ranker
from pyterrier_mech.rankers.saving import save_ranker  # noqa: F401

# By its full name: the package may export the function under the name of the module.
evaluation_efficiency = sys.modules['pyterrier_mech.evaluation.efficiency']


# -- rankers


def tokenizer_of(model):
    return model.loaded.maker.tokenizer


def max_length_of(model):
    return model.loaded.maker.max_length


def module_of(model):
    return model.encoder.module


def layers_of(model):
    """The modules of the layers."""
    return [layer.module for layer in model.encoder.layers]


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

        def load(name, *args, real=getattr(ranker, function), toy=toy, **settings):
            return (real if Path(name).is_dir() else toy)(name, *args, **settings)

        monkeypatch.setattr(ranker, function, load)
    monkeypatch.setattr(families, '_FAMILIES', dict(families._FAMILIES))


def budget_of(model):
    """Tokens of a batch."""
    return model.loaded.budget.tokens


def is_loaded(model):
    """Whether the weights are in memory; loads nothing."""
    return model._loaded is not None


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
    ids = [
        {field: model.tokenize(field, [version[field]]).row(0) for field in ('query', 'text')} for version in versions
    ]
    aligner, found = Aligner(model.loaded.maker, filler), []
    for tower in model.towers:
        one = aligner.align(*([part[field] for field in tower] for part in ids), tower, query=ids[1]['query'])
        found.append(Side(_inputs(model, one, 'original'), _inputs(model, one, 'perturbed'), one.types, one.problem))
    return found


def _inputs(model, alignment, side):
    ids = torch.tensor(getattr(alignment, side))[None]
    inputs = {'input_ids': ids, 'attention_mask': torch.tensor(getattr(alignment, f'{side}_mask'))[None]}
    if 'token_type_ids' in tokenizer_of(model).model_input_names:
        inputs['token_type_ids'] = torch.tensor(alignment.segments)[None]
    return inputs


def problem_of(towers):
    """Why a row cannot be patched, from the sides of its towers, or ''."""
    return _problem([tower.problem for tower in towers])


# -- patching


def forced_effects(model, texts, heads):
    """Changes of the pooled vectors where every pair of a text with itself is patched as if it had been edited."""
    ids = model.tokenize('text', texts)
    aligner = Aligner(model.loaded.maker)
    same = [aligner.align([ids.row(0), ids.row(i)], [ids.row(0), ids.row(i)]) for i in range(len(texts))]
    forced = [type(one)(**{**one.__dict__, 'problem': ''}) for one in same]
    with model.computing():
        vectors = PatchHeads(model)._vectors(engine_for(model), forced, heads, 10_000)
    return (vectors - vectors[:1]).numpy()


def forget_what_was_told():
    """Has what is said once a process be said again."""
    engine._told.clear()


# -- attribution


def linearised_values(model, texts):
    """(by RelP's forward, by the model's) of the last hidden states and of every layer's heads, padding left out."""
    batch = model.loaded.maker.batch([model.tokenize('text', texts)], torch.device('cpu'))
    with model.computing():
        trace = model.encoder.trace(batch)
    with model.computing(gradients=True):
        hidden, z = linearised(model.encoder, trace)
    there = batch['attention_mask'].bool()
    return [(mine[there], theirs[there]) for mine, theirs in zip([hidden, *z], [trace.hidden, *trace.z], strict=True)]


# -- circuits


def attention_weights(model, inputs):
    """The attention weights [rows, heads, tokens, tokens] of every layer."""
    with model.computing():
        trace = model.encoder.trace(inputs)
        return [
            roles.attention_weights(*one) for one in zip(model.encoder.layers, trace.x, trace.contexts, strict=True)
        ]


def ablation_sides(model, frame):
    """(fields, row, the pair, its original and its perturbed input as `faithfulness` ablates them), row by row."""
    pairs = Pairs(model, *two_versions(frame, PatchHeads(model), 'text'), 'a')
    original, perturbed = ablation.sides(pairs)
    for tower, fields in enumerate(model.towers):
        for row, (a, b) in enumerate(zip(original.towers[tower], perturbed.towers[tower], strict=True)):
            yield fields, row, pairs.towers[tower][row], a, b


# -- evaluation


def never_evaluate(monkeypatch, refuse):
    """Has `refuse` called where `compare` begins to work."""
    monkeypatch.setattr(evaluation_stats, 'values_of_queries', refuse)


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
    inputs = PlainInputs.of(model, data.queries, data.texts)
    with model.computing(), gated(model.encoder, heads, neurons):
        return score_rows(model, inputs, np.arange(len(data.frame))).numpy()


def scores_with_gradients(model, data):
    """Scores of all rows, with a graph."""
    inputs = PlainInputs.of(model, data.queries, data.texts)
    with model.computing(gradients=True):
        return score_rows(model, inputs, np.arange(len(data.frame)))


def replace_latency_clock(monkeypatch, now):
    """Has tables of times read another clock."""
    monkeypatch.setattr(latency.time, 'perf_counter', now)


def paths_of_pruned(model, pruned, units, texts):
    """(found, expected) of every way through the encoder of a pruned ranker; expected is the silenced model's."""
    encoder = pruned.encoder
    ids = [model.tokenize(field, part) for field, part in zip(('query', 'text'), texts, strict=True)]
    inputs = model.loaded.maker.batch(ids, model.encoder.device)
    real = inputs['attention_mask'].bool()
    with pruned.computing(), replaced(model.encoder, columns_of(model.encoder, units), zeros(model.encoder)):
        expected, trace = model.encoder.run(inputs), encoder.trace(inputs)
        yield trace.hidden[real], expected[real]
        yield encoder.run(inputs)[real], expected[real]
        yield encoder.pooled(inputs, 'cls'), expected[:, 0]
        yield encoder.until_last_layer(inputs)[0][real], trace.x[-1][real]
        for layer, x, z, context in zip(encoder.layers, trace.x, trace.z, trace.contexts, strict=True):
            yield layer.z(x, context)[real], z[real]
            yield layer.z_first(x, context), z[:, :1]
