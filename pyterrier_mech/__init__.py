"""Mechanistic interpretability of neural rankers as PyTerrier pipeline stages.

Every analysis takes a PyTerrier frame and returns one:
`bm25 % 10 >> text >> Perturb(TDC(index)) >> PatchHeads(model)`.
"""

from pyterrier_mech import measures, plot, prune, stats
from pyterrier_mech.attribute import (
    Activations,
    AttributeHeads,
    AttributeLayers,
    AttributeNeurons,
    AttributePaths,
    AttributeTokens,
)
from pyterrier_mech.circuits import AttentionShares, discover_circuit, faithfulness, head_roles
from pyterrier_mech.durable import Distributed, Resumable
from pyterrier_mech.patch import AblatedReranker, AblateHeads, PatchedReranker, PatchHeads, PatchLayers, PatchPaths
from pyterrier_mech.perturb import LNC1, TDC, TFC1, TFC2, Perturb, perturbation
from pyterrier_mech.prune import PrunedReranker
from pyterrier_mech.rankers import BiEncoder, CrossEncoder
from pyterrier_mech.results import Circuit, HeadEffects, NeuronEffects
from pyterrier_mech.units import Units

__version__ = '0.1.0'
__all__ = [
    # rankers, and with an intervention
    'AblatedReranker',
    'BiEncoder',
    'CrossEncoder',
    'PatchedReranker',
    'PrunedReranker',
    # edits
    'LNC1',
    'Perturb',
    'TDC',
    'TFC1',
    'TFC2',
    'perturbation',
    # analyses
    'AblateHeads',
    'Activations',
    'AttentionShares',
    'AttributeHeads',
    'AttributeLayers',
    'AttributeNeurons',
    'AttributePaths',
    'AttributeTokens',
    'PatchHeads',
    'PatchLayers',
    'PatchPaths',
    # results
    'Circuit',
    'HeadEffects',
    'NeuronEffects',
    'Units',
    'discover_circuit',
    'faithfulness',
    'head_roles',
    # long runs
    'Distributed',
    'Resumable',
    # rooms
    'measures',
    'plot',
    'prune',
    'stats',
]
