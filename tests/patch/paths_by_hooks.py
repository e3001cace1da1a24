"""Queries, keys, values and attention weights by hooks on the unmodified module: shares no code with the package."""

import copy

import torch
from oracles import OUT_PROJECTIONS

PROJECTIONS = {
    'bert': lambda base: [
        [layer.attention.self.query, layer.attention.self.key, layer.attention.self.value]
        for layer in base.encoder.layer
    ],
    'distilbert': lambda base: [
        [layer.attention.q_lin, layer.attention.k_lin, layer.attention.v_lin] for layer in base.transformer.layer
    ],
    'modernbert': lambda base: [[layer.attn.Wqkv] * 3 for layer in base.layers],
}


def places(module):
    """{(kind, layer): (module, whether its input, first column)} of head outputs, queries, keys and values."""
    kind, base = module.config.model_type, module.base_model
    found = {('z', i): (part, True, 0) for i, part in enumerate(OUT_PROJECTIONS[kind](base))}
    width = module.config.hidden_size
    make = PROJECTIONS.get(kind, PROJECTIONS['bert'])
    for i, parts in enumerate(make(base)):
        for number, (name, part) in enumerate(zip('qkv', parts)):
            found[name, i] = part, False, number * width if parts[0] is parts[1] else 0
    return found


def columns(module, head):
    """Where a head stands."""
    width = module.config.hidden_size // module.config.num_attention_heads
    return slice(head * width, (head + 1) * width)


@torch.no_grad()
def run(module, inputs, changes=None, seen=None):
    """The output; `changes` {(kind, layer): function of [tokens, d]}; `seen` takes what passes, after the changes."""
    handles, width = [], module.config.hidden_size

    def act(tensor, site, start):
        part = tensor[0, :, start : start + width].clone()
        part = (changes or {}).get(site, lambda same: same)(part)
        if seen is not None:
            seen[site] = part.clone()
        tensor = tensor.clone()
        tensor[0, :, start : start + width] = part
        return tensor

    for site, (part, is_input, start) in places(module).items():
        if is_input:
            hook = lambda _, args, site=site: (act(args[0], site, 0), *args[1:])  # noqa: E731
            handles.append(part.register_forward_pre_hook(hook))
        else:
            hook = lambda _, args, out, site=site, start=start: act(out, site, start)  # noqa: E731
            handles.append(part.register_forward_hook(hook))
    output = module(**inputs)
    for handle in handles:
        handle.remove()
    return output


def put(at, values, positions=None):
    """A change: some columns, at some positions, take values."""

    def change(part):
        rows = slice(None) if positions is None else positions
        part[rows, at] = values[rows][:, at] if positions is not None else values[:, at]
        return part

    return change


def score(model, outputs):
    if len(model.towers) == 1:
        return outputs[0].logits[0, 0].item()
    a, b = (out.last_hidden_state[0].mean(0) for out in outputs)
    return torch.cosine_similarity(a, b, dim=0).item()


def site_effect(model, towers, kind, layer, head, positions_of=lambda tower: None, reverse=False):
    """Patched score - score, with q, k, v or z of a head taken from the other run at some positions."""
    module, before, after = model.model, [], []
    for tower in towers:
        base, source = tower.runs(reverse)
        seen = {}
        run(module, source, seen=seen)
        before.append(run(module, base))
        change = put(columns(module, head), seen[kind, layer], positions_of(tower))
        after.append(run(module, base, {(kind, layer): change}))
    return score(model, after) - score(model, before)


def pattern_effect(model, towers, layer, head, positions_of=lambda tower: None):
    """The same with attention weights: the module's own, by its eager attention, times its own values."""
    module, before, after = model.model, [], []
    for tower in towers:
        base, source = tower.runs()
        seen = {}
        before.append(run(module, base, seen=seen))
        eager = copy.deepcopy(module.base_model)
        eager.set_attn_implementation('eager')
        with torch.no_grad():
            weights = eager(**source, output_attentions=True).attentions[layer][0, head]
        at = columns(module, head)
        values = seen['z', layer].clone()
        values[:, at] = weights.to(values.dtype) @ seen['v', layer][:, at]
        after.append(run(module, base, {('z', layer): put(at, values, positions_of(tower))}))
    return score(model, after) - score(model, before)


def path_effects(model, towers, sender, receivers, reverse=False, part=1.0):
    """[patched score - score] of one sender (layer, head) to each receiver: None, or (kind, layer, head).

    With `part`, receivers read a part of the change alone.
    """
    module, bases, sent = model.model, [], []
    for tower in towers:
        base, source = tower.runs(reverse)
        own, theirs, told = {}, {}, {}
        bases.append((base, run(module, base, seen=own)))
        run(module, source, seen=theirs)
        frozen = {site: put(slice(None), values) for site, values in own.items() if site[0] == 'z'}
        layer, head = sender
        mixed = own['z', layer].clone()
        mixed[:, columns(module, head)] = theirs['z', layer][:, columns(module, head)]
        frozen['z', layer] = put(slice(None), mixed)
        output = run(module, base, frozen, told)
        sent.append((output, {site: own[site] + part * (values - own[site]) for site, values in told.items()}))
    start = score(model, [output for _, output in bases])
    effects = []
    for receiver in receivers:
        if receiver is None:
            outputs = [output for output, _ in sent]
        else:
            kind, layer, head = receiver
            outputs = [
                run(module, base, {(kind, layer): put(columns(module, head), told[kind, layer])})
                for (base, _), (_, told) in zip(bases, sent)
            ]
        effects.append(score(model, outputs) - start)
    return effects
