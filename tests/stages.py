"""Every stage, for the checks of `test_contract.py`: a new stage adds one line to `STAGES`."""

import tempfile
import weakref

import numpy as np
import torch
from decoders import TEMPLATE, WORDS, module_of, tokenizer
from late import masked_around, projected_around
from toys import frame_of, pairs, reference, wordpiece_tokenizer

from pyterrier_mech import (
    TFC1,
    AblatedReranker,
    AblateHeads,
    Activations,
    AttentionPatterns,
    AttentionShares,
    AttributeHeads,
    AttributeLayers,
    AttributeNeurons,
    AttributePaths,
    AttributeTokens,
    BiEncoder,
    CausalReranker,
    ColBERT,
    CrossEncoder,
    PatchedReranker,
    PatchHeads,
    PatchLayers,
    PatchParts,
    PatchPaths,
    Perturb,
    PrunedReranker,
    Resumable,
    Splade,
    perturbation,
)
from pyterrier_mech.prune import Random

UNITS = ['L0H1', 'L1H3', 'L0N5']
FOLDERS = tempfile.TemporaryDirectory()


def cross(model, **settings):
    return CrossEncoder(model, tokenizer=None if isinstance(model, str) else wordpiece_tokenizer(), **settings)


def bi(model, **settings):
    tokenizer = None if isinstance(model, str) else wordpiece_tokenizer()
    return BiEncoder(model, tokenizer=tokenizer, pooling='mean', **settings)


_decoders = weakref.WeakKeyDictionary()


def causal(model, **settings):
    """Around a decoder, one for each module that is given."""
    if not isinstance(model, str):
        model = _decoders.setdefault(model, module_of(fresh=True))
        settings['tokenizer'] = tokenizer()
    return CausalReranker(model, template=TEMPLATE, words=WORDS, **settings)


def late(model, **settings):
    if isinstance(model, str):
        return ColBERT(model, **settings)
    return ColBERT(
        projected_around(model), tokenizer=wordpiece_tokenizer(), **{'max_length': 60, 'query_length': 14, **settings}
    )


def sparse(model, **settings):
    tokenizer = None if isinstance(model, str) else wordpiece_tokenizer()
    return Splade(model if isinstance(model, str) else masked_around(model), tokenizer=tokenizer, **settings)


def pruned(model, **settings):
    """Fitted, if there is something to fit."""
    stage = PrunedReranker(cross(model), Random(), 0.3, **{'recovery': (), 'multiple': 8, **settings})
    if not isinstance(model, str):
        stage.fit(plain())
    return stage


def resumable(model, **settings):
    return Resumable(PatchHeads(cross(model), **settings), tempfile.mkdtemp(dir=FOLDERS.name), rows=4)


def attribute(method):
    return lambda model, **settings: AttributeHeads(cross(model), method, **settings)


@perturbation
def reverse(query, text):
    return ' '.join(reversed(query.split()))


def plain():
    return frame_of(6).drop(columns=['score', 'rank'])


def edited():
    return pairs(6)


# name: (what makes the stage from a module or a model's name, what makes its frame, whether it keeps the ranking)
STAGES = {
    'CrossEncoder': (cross, plain, False),
    'BiEncoder': (bi, plain, False),
    'CausalReranker': (causal, plain, False),
    'ColBERT': (late, plain, False),
    'Splade': (sparse, plain, False),
    'Perturb': (lambda model, **settings: Perturb(TFC1(), **settings), plain, True),
    'Perturb of queries': (lambda model, **settings: Perturb(reverse, field='query', **settings), plain, True),
    'PatchHeads': (lambda model, **settings: PatchHeads(cross(model), **settings), edited, True),
    'PatchHeads of a bi-encoder': (lambda model, **settings: PatchHeads(bi(model), **settings), edited, True),
    'PatchHeads of a decoder': (lambda model, **settings: PatchHeads(causal(model), **settings), edited, True),
    'PatchHeads of a ColBERT': (lambda model, **settings: PatchHeads(late(model), **settings), edited, True),
    'PatchHeads of a Splade': (lambda model, **settings: PatchHeads(sparse(model), **settings), edited, True),
    'PatchParts of a ColBERT': (
        lambda model, **settings: PatchParts(late(model), heads=['L0H1'], **settings), edited, True
    ),
    'PatchParts of a Splade': (lambda model, **settings: PatchParts(sparse(model), **settings), edited, True),
    'PatchLayers': (lambda model, **settings: PatchLayers(cross(model), **settings), edited, True),
    'PatchLayers by position': (
        lambda model, **settings: PatchLayers(bi(model), sites=['mlp_out'], by='position', **settings), edited, True
    ),
    'PatchHeads of keys by token type': (
        lambda model, heads=('L0H1', 'L1H2'), **settings: PatchHeads(
            cross(model), heads=heads, site='k', by='token_type', **settings
        ), edited, True
    ),
    'PatchPaths': (
        lambda model, **settings: PatchPaths(cross(model), ['score', 'L1H2.k'], **settings), edited, True
    ),
    'PatchPaths to all': (lambda model, **settings: PatchPaths(bi(model), 'all', **settings), edited, True),
    'AblateHeads': (lambda model, **settings: AblateHeads(cross(model), **settings), plain, True),
    'AblateHeads by means': (
        lambda model, **settings: AblateHeads(bi(model), 'mean', reference=reference(), **settings), plain, True
    ),
    'AblatedReranker': (
        lambda model, units=UNITS, **settings: AblatedReranker(cross(model), units, **settings), plain, False
    ),
    'AblatedReranker by resampling': (
        lambda model, units=UNITS, **settings: AblatedReranker(
            cross(model), units, value='resample', reference=reference(), **settings
        ), plain, False
    ),
    'PatchedReranker': (
        lambda model, units=UNITS, **settings: PatchedReranker(cross(model), units, **settings), edited, False
    ),
    'AttributeHeads by patching': (attribute('attribution_patching'), edited, True),
    'AttributeHeads by trapezoid': (attribute('trapezoid'), edited, True),
    'AttributeHeads by RelP': (attribute('relp'), edited, True),
    'AttributeHeads by gradient': (attribute('gradient'), plain, True),
    'AttributeHeads by integration': (attribute('integrated_gradients'), plain, True),
    'AttributeLayers': (lambda model, **settings: AttributeLayers(cross(model), **settings), edited, True),
    'AttributePaths': (lambda model, **settings: AttributePaths(bi(model), 'all', **settings), edited, True),
    'AttributeNeurons': (lambda model, **settings: AttributeNeurons(cross(model), **settings), plain, True),
    'AttributeTokens': (lambda model, **settings: AttributeTokens(bi(model), **settings), plain, True),
    'Activations': (
        lambda model, **settings: Activations(cross(model), ['heads', 'mlp_out.L1'], **settings), plain, True
    ),
    'Activations of types': (
        lambda model, **settings: Activations(bi(model), 'resid_pre', keep='token_type', **settings), plain, True
    ),
    'Activations of all tokens': (
        lambda model, **settings: Activations(cross(model), ['embeddings', 'resid_post.L1'], keep='all', **settings),
        plain,
        True,
    ),
    'AttentionShares': (lambda model, **settings: AttentionShares(cross(model), **settings), plain, True),
    'AttentionShares of a bi-encoder': (lambda model, **settings: AttentionShares(bi(model), **settings), plain, True),
    'AttentionPatterns': (
        lambda model, heads=UNITS[:2], **settings: AttentionPatterns(cross(model), heads, **settings), plain, True
    ),
    'PrunedReranker': (pruned, plain, False),
    'Resumable': (resumable, edited, True),
}  # fmt: skip
# The setting that names units, and whether neurons may be among them.
WITH_UNITS = {
    'PatchHeads': ('heads', False),
    'PatchPaths': ('senders', False),
    'AblateHeads': ('heads', False),
    'AblatedReranker': ('units', True),
    'PatchedReranker': ('units', True),
    'AttributeHeads by patching': ('heads', False),
    'AttributeHeads by gradient': ('heads', False),
    'AttentionPatterns': ('heads', False),
    'PrunedReranker': ('protect', True),
}
# These refuse a module with hooks: they compute with the parts of the layers, or keep results by its weights.
UNHOOKABLE = [
    'AttributeHeads by RelP', 'AttentionShares', 'AttentionShares of a bi-encoder', 'AttentionPatterns', 'Resumable'
]  # fmt: skip
# Not built around the module that is given.
DECODING = ['CausalReranker', 'PatchHeads of a decoder']
OF_MODELS = [name for name in STAGES if not name.startswith('Perturb')]


def modules_of(stage):
    """The modules that a stage has: of itself, of its model, and of the model that it made."""
    rankers = [stage, getattr(stage, 'model', None), getattr(stage, 'model_', None)]
    return [ranker.model for ranker in rankers if isinstance(getattr(ranker, 'model', None), torch.nn.Module)]


def new_columns(res, inp):
    return [column for column in res.columns if column not in inp.columns]


def close(res, expected, atol=1e-10):
    """Equal frames, up to rounding where something was computed."""
    assert list(res.columns) == list(expected.columns) and res.index.equals(expected.index)
    for column in expected.columns:
        for mine, theirs in zip(res[column], expected[column], strict=True):
            if isinstance(theirs, (float, np.ndarray)):
                np.testing.assert_allclose(mine, theirs, atol=atol, rtol=0, err_msg=column)
            else:
                assert mine == theirs, column
