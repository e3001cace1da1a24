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
from pyterrier_mech.patch import AblatedReranker, AblateHeads, PatchedReranker, PatchHeads, PatchLayers, PatchPaths
from pyterrier_mech.perturb import (
    LNC1,
    LNC2,
    PROX,
    STMC1,
    TDC,
    TFC1,
    TFC2,
    TFC3,
    TFLNC,
    Perturb,
    all_edits,
    perturbation,
)
from pyterrier_mech.prune import PrunedReranker
from pyterrier_mech.rankers import BiEncoder, CausalReranker, CrossEncoder
from pyterrier_mech.results import AxiomProfile, Circuit, HeadEffects, NeuronEffects
from pyterrier_mech.units import Units

__version__ = '0.1.0'
__all__ = [
    # rankers, and with an intervention
    'AblatedReranker',
    'BiEncoder',
    'CausalReranker',
    'CrossEncoder',
    'PatchedReranker',
    'PrunedReranker',
    # edits
    'LNC1',
    'LNC2',
    'PROX',
    'Perturb',
    'STMC1',
    'TDC',
    'TFC1',
    'TFC2',
    'TFC3',
    'TFLNC',
    'all_edits',
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
    'AxiomProfile',
    'Circuit',
    'HeadEffects',
    'NeuronEffects',
    'Units',
    'discover_circuit',
    'faithfulness',
    'head_roles',
    # rooms
    'measures',
    'plot',
    'prune',
    'stats',
]
