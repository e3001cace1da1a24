"""The slow, plain way that everything else must equal: hooks on the unmodified module, one unpadded forward at a time.

It knows the module names of each family by itself, takes inputs from the tokenizer or as they are given, and shares no
code with the package.
"""

import copy
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

OUT_PROJECTIONS = {
    'bert': lambda base: [layer.attention.output.dense for layer in base.encoder.layer],
    'electra': lambda base: [layer.attention.output.dense for layer in base.encoder.layer],
    'roberta': lambda base: [layer.attention.output.dense for layer in base.encoder.layer],
    'distilbert': lambda base: [layer.attention.out_lin for layer in base.transformer.layer],
    'modernbert': lambda base: [layer.attn.Wo for layer in base.layers],
    'deberta-v2': lambda base: [layer.attention.output.dense for layer in base.encoder.layer],
    'mpnet': lambda base: [layer.attention.attn.o for layer in base.encoder.layer],
}
MLP_OUTS = {
    **dict.fromkeys(OUT_PROJECTIONS, lambda base: [layer.output.dense for layer in base.encoder.layer]),
    'distilbert': lambda base: [layer.ffn.lin2 for layer in base.transformer.layer],
    'modernbert': lambda base: [layer.mlp.Wo for layer in base.layers],
}

LAYERS = {
    'distilbert': lambda base: list(base.transformer.layer),
    'modernbert': lambda base: list(base.layers),
}


class Plain(NamedTuple):
    """A module and what it takes to score a row with it; a cross-encoder has no pooling."""

    module: Any
    tokenizer: Any = None
    pooling: str | None = None
    similarity: str = 'cosine'
    max_length: int = 76


def plain(model):
    """What a toy ranker was made of."""
    similarity = getattr(model, 'similarity', None) or 'cosine'
    pooling = getattr(model, 'pooling', None)
    return Plain(model.model, model.tokenizer, pooling, similarity, model.max_length or 76)


def projections(module):
    """{(kind, layer): the linear map that reads the heads or the neurons of a layer}."""
    kind, base = module.config.model_type, module.base_model
    return {
        **{('heads', i): part for i, part in enumerate(OUT_PROJECTIONS[kind](base))},
        **{('neurons', i): part for i, part in enumerate(MLP_OUTS[kind](base))},
    }


def block_places(module):
    """{(block, layer): (module, whether its input)}."""
    kind, base = module.config.model_type, module.base_model
    layers = LAYERS.get(kind, lambda base: list(base.encoder.layer))(base)
    return {
        **{('resid_pre', i): (layer, True) for i, layer in enumerate(layers)},
        **{('attn_out', i): (part, False) for i, part in enumerate(OUT_PROJECTIONS[kind](base))},
        **{('mlp_out', i): (part, False) for i, part in enumerate(MLP_OUTS[kind](base))},
    }


def head_columns(module, head):
    """Where a head stands in what the output projection reads."""
    width = module.config.hidden_size // module.config.num_attention_heads
    return slice(head * width, (head + 1) * width)


def head_sites(module):
    """(layer, head, columns) of every head that is there."""
    found = []
    for layer, projection in enumerate(OUT_PROJECTIONS[module.config.model_type](module.base_model)):
        width = head_columns(module, 0).stop
        found += [(layer, head, head_columns(module, head)) for head in range(projection.in_features // width)]
    return found


@torch.no_grad()
def activations(module, inputs):
    """{(kind, layer): what the projection reads} of one row, [tokens, width]."""
    seen = {}
    handles = [
        part.register_forward_pre_hook(lambda _, args, site=site: seen.update({site: args[0][0].clone()}))
        for site, part in projections(module).items()
    ]
    module(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def changed(module, inputs, changes):
    """The output with `changes` {(kind, layer): function from what the projection reads [tokens, width]}."""
    parts = projections(module)
    handles = [
        parts[site].register_forward_pre_hook(lambda _, args, change=change: (change(args[0][0].clone())[None],))
        for site, change in changes.items()
    ]
    output = module(**inputs)
    for handle in handles:
        handle.remove()
    return output


@torch.no_grad()
def score(model, towers, changes=()):
    """The score of a row from the inputs of its towers; `changes` has one `changes` of `changed` for every tower."""
    outputs = [changed(model.module, inputs, dict(edits)) for inputs, edits in zip(towers, changes or [{}] * 2)]
    if model.pooling is None:
        return outputs[0].logits[0, 0].item()
    hidden = [output.last_hidden_state[0] for output in outputs]
    a, b = (one[0] if model.pooling == 'cls' else one.mean(0) for one in hidden)
    return (a @ b if model.similarity == 'dot' else torch.cosine_similarity(a, b, dim=0)).item()


def put(columns, values):
    """A change: columns take these values [tokens, width], or 0."""

    def change(read):
        read[:, columns] = values[:, columns] if isinstance(values, torch.Tensor) else values
        return read

    return change


# -- patching: a row is, for every tower, the aligned inputs of the run that is patched and of the one it takes from


def patched(model, row, places):
    """The score with the columns `places` {(kind, layer): columns} of all towers taken from the other run."""
    edits = []
    for _, source in row:
        seen = activations(model.module, source)
        edits.append({site: put(columns, seen[site]) for site, columns in places.items()})
    return score(model, [base for base, _ in row], edits)


def patch_effects(model, row, heads=None):
    """{head: patched score - score} of a row, one full forward a head and tower; of some heads, or of all."""
    bases, start = [base for base, _ in row], score(model, [base for base, _ in row])
    seen = [activations(model.module, source) for _, source in row]
    effects = {}
    for layer, head, columns in head_sites(model.module):
        name = f'L{layer}H{head}'
        if heads is None or name in heads:
            edits = [{('heads', layer): put(columns, one['heads', layer])} for one in seen]
            effects[name] = score(model, bases, edits) - start
    return effects


# -- ablation


def towers_of(model, query, text):
    """The inputs and position types of every tower of one row, by the tokenizer's own encoding."""
    tokenizer = model.tokenizer
    words = set(tokenizer(query, add_special_tokens=False)['input_ids'])
    towers = []
    for texts in [(query, text)] if model.pooling is None else [(query,), (text,)]:
        # As lists: a lone empty second text would be taken for none.
        lists = [[text] for text in texts]
        encoded = tokenizer(*lists, truncation=True, max_length=model.max_length, return_tensors='pt')
        owners, ids = encoded.sequence_ids(0), encoded['input_ids'][0].tolist()
        is_query = 0 if texts[0] is query else None
        types = []
        for place, (owner, token) in enumerate(zip(owners, ids, strict=True)):
            special = 'sep' if place else 'cls'
            in_document = 'doc_match' if token in words else 'doc_other'
            types.append(special if owner is None else 'query' if owner == is_query else in_document)
        towers.append((dict(encoded), types))
    return towers


def zero_values(towers, site):
    return [0.0 for _ in towers]


def mean_values(model, frame):
    """Every position takes the mean of its type over a frame; of all positions, for types that the frame has not."""
    averages = []
    for tower in range(1 if model.pooling is None else 2):
        found = {}
        for row in frame.itertuples():
            inputs, types = towers_of(model, row.query, row.text)[tower]
            seen = activations(model.module, inputs)
            for place, kind in enumerate(types):
                found.setdefault(kind, []).append({site: values[place] for site, values in seen.items()})
        found['all'] = [one for every in list(found.values()) for one in every]
        average = {k: {s: torch.stack([one[s] for one in v]).mean(0) for s in v[0]} for k, v in found.items()}
        kinds = ('cls', 'sep', 'query', 'doc_match', 'doc_other')
        averages.append({kind: average.get(kind, average['all']) for kind in kinds})
    return lambda towers, site: [
        torch.stack([average[kind][site] for kind in types]) for (_, types), average in zip(towers, averages)
    ]


def other_values(model, query, text):
    """Position k of a type takes the other row's k-th of that type, modulo; stand-ins as documented."""
    others = [(types, activations(model.module, inputs)) for inputs, types in towers_of(model, query, text)]
    stands_in = {'doc_match': 'doc_other', 'doc_other': 'doc_match'}

    def values_of(towers, site):
        result = []
        for (_, types), (theirs, seen) in zip(towers, others, strict=True):
            count, values = {}, []
            for kind in types:
                places = [i for i, other in enumerate(theirs) if other == kind]
                places = places or [i for i, other in enumerate(theirs) if other == stands_in.get(kind)]
                places = places or list(range(len(theirs)))
                k = count[kind] = count.get(kind, -1) + 1
                values.append(seen[site][places[k % len(places)]])
            result.append(torch.stack(values))
        return result

    return values_of


def ablated(model, frame, values_of, places):
    """Scores with the columns `places` {(kind, layer): columns} replaced together."""
    result = []
    for row in frame.itertuples():
        towers = towers_of(model, row.query, row.text)
        values = {site: values_of(towers, site) for site in places}
        edits = [{site: put(at, values[site][i]) for site, at in places.items()} for i in range(len(towers))]
        result.append(score(model, [inputs for inputs, _ in towers], edits))
    return result


def ablation_effects(model, frame, values_of, heads=None):
    """Frame of ablated score - score, one forward a head and tower."""
    start = np.array(ablated(model, frame, values_of, {}))
    columns = {f'L{layer}H{head}': {('heads', layer): at} for layer, head, at in head_sites(model.module)}
    names = list(columns) if heads is None else heads
    return pd.DataFrame({name: ablated(model, frame, values_of, columns[name]) - start for name in names})


def zeroed(module, units):
    """A copy with the columns of units ((kind, layer, stack), number) zeroed in the maps that read them."""
    module = copy.deepcopy(module)
    parts = projections(module)
    with torch.no_grad():
        for (kind, layer, _), number in units:
            columns = head_columns(module, number) if kind == 'heads' else number
            parts[kind, layer].weight[:, columns] = 0
    return module


# -- gradients


def slope(function, step=1e-4):
    """Derivative at 0 by a difference of fourth order."""
    far, near = function(2 * step) - function(-2 * step), function(step) - function(-step)
    return (8 * near - far) / (12 * step)


def moved(values, columns):
    """A change that adds `values` [tokens, width] in some columns."""

    def change(read):
        read[:, columns] += values[:, columns]
        return read

    return change


def conductance(score_of, modules, kind, start, end, points):
    """Of the inputs or outputs of `modules`, [tokens, width] each, and the scores at the points, by a plain loop."""
    curve, scores = [], []
    for alpha in np.linspace(0, 1, points):
        found = []

        def first(output):
            return output if isinstance(output, torch.Tensor) else output[0]

        hook = (lambda m, a: found.append(a[0])) if kind == 'input' else (lambda m, a, out: found.append(first(out)))
        add = 'register_forward_pre_hook' if kind == 'input' else 'register_forward_hook'
        handles = [getattr(module, add)(hook) for module in modules]
        s = score_of(start + alpha * (end - start)).sum()
        curve.append(([a.detach()[0] for a in found], [g[0] for g in torch.autograd.grad(s, found)]))
        scores.append(s.item())
        for handle in handles:
            handle.remove()
    totals = []
    for layer in range(len(modules)):
        steps = [(b[layer] - a[layer]) * (g[layer] + h[layer]) / 2 for (a, g), (b, h) in zip(curve, curve[1:])]
        totals.append(sum(steps))
    return totals, scores
