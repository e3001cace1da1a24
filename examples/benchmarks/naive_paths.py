"""Path patching by its definition: a forward with all heads frozen but one, and one with a receiver replaced."""

from typing import Any

import numpy as np
import torch
from common import inputs_of


class Paths:
    """Hooks on the head outputs, queries, keys and values of an unmodified module, for one aligned pair."""

    def __init__(self, ranker, pair, device):
        """Runs both inputs and keeps what passes."""
        self.module, self.layers = ranker.map.module, ranker.map.layers
        self.base, source = inputs_of(pair, 'original', device), inputs_of(pair, 'perturbed', device)
        self.own, self.theirs = self.seen(self.base), self.seen(source)

    def part(self, site):
        """The module of a site, and whether it is its input."""
        kind, layer = site
        if kind == 'z':
            return self.layers[layer].attention_out, True
        return self.layers[layer].qkv_parts['qkv'.index(kind)], False

    @torch.no_grad()
    def run(self, edits, read=()):
        """The score with some sites edited, and what passes at others."""
        seen: dict[Any, torch.Tensor] = {}
        handles = []
        for site in {*edits, *read}:

            def act(x, site=site):
                x = edits[site](x) if site in edits else x
                seen[site] = x
                return x

            part, is_input = self.part(site)
            if is_input:
                handles.append(part.register_forward_pre_hook(lambda _, args, act=act: (act(args[0]), *args[1:])))
            else:
                handles.append(part.register_forward_hook(lambda _, args, output, act=act: act(output)))
        score = self.module(**self.inputs).logits[0, 0]
        for handle in handles:
            handle.remove()
        return score, seen

    def seen(self, inputs):
        """What passes at all sites."""
        self.inputs = inputs
        found = self.run({}, [(kind, layer) for kind in 'zqkv' for layer in range(len(self.layers))])[1]
        self.inputs = self.base
        return found

    def frozen(self, layer, head, read=()):
        """The score, and what is read, with every head as it is but for the sender."""
        columns = self.layers[layer].columns(head)
        edits = {('z', i): lambda x, i=i: self.own['z', i] for i in range(len(self.layers))}
        mixed = self.own['z', layer].clone()
        mixed[..., columns] = self.theirs['z', layer][..., columns]
        edits['z', layer] = lambda x: mixed
        return self.run(edits, read)

    def into(self, layer, head, site, receiver):
        """The score where one head reads what the sender tells it."""
        told = self.frozen(layer, head, [site])[1][site]
        columns = self.layers[site[1]].columns(receiver)

        def swap(x):
            x = x.clone()
            x[..., columns] = told[..., columns]
            return x

        return self.run({site: swap})[0]


def to_score(ranker, pair, device) -> np.ndarray:
    """Scores of the paths of all heads to the score."""
    paths = Paths(ranker, pair, device)
    heads = [(i, h) for i in range(ranker.n_layers) for h in range(ranker.n_heads(i))]
    return np.array([float(paths.frozen(*head)[0]) for head in heads])


def to_all(ranker, pair, device) -> np.ndarray:
    """Scores of the paths to the queries, keys and values of all heads above: input, receiver, sender."""
    paths = Paths(ranker, pair, device)
    heads = [(i, h) for i in range(ranker.n_layers) for h in range(ranker.n_heads(i))]
    return np.array(
        [
            float(paths.into(*sender, (kind, layer), receiver))
            for kind in 'qkv'
            for layer, receiver in heads
            for sender in heads
            if sender[0] < layer
        ]
    )
