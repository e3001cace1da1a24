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
from pyterrier_mech.circuits import (
    AttentionPatterns,
    AttentionShares,
    compare_roles,
    discover_circuit,
    faithfulness,
    head_roles,
    head_shares,
)
from pyterrier_mech.durable import Distributed, Resumable
from pyterrier_mech.patch import (
    AblatedReranker,
    AblateHeads,
    PatchedReranker,
    PatchHeads,
    PatchLayers,
    PatchParts,
    PatchPaths,
)
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
from pyterrier_mech.rankers import BiEncoder, CausalReranker, ColBERT, CrossEncoder, Splade
from pyterrier_mech.results import AxiomProfile, Circuit, HeadEffects, LayerEffects, NeuronEffects, PathEffects
from pyterrier_mech.tables import read_frame, write_frame
from pyterrier_mech.units import Units

__version__ = '0.1.0'
__all__ = [
    # rankers, and with an intervention
    'AblatedReranker',
    'BiEncoder',
    'CausalReranker',
    'ColBERT',
    'CrossEncoder',
    'PatchedReranker',
    'PrunedReranker',
    'Splade',
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
    'AttentionPatterns',
    'AttentionShares',
    'AttributeHeads',
    'AttributeLayers',
    'AttributeNeurons',
    'AttributePaths',
    'AttributeTokens',
    'PatchHeads',
    'PatchLayers',
    'PatchParts',
    'PatchPaths',
    # results
    'AxiomProfile',
    'Circuit',
    'HeadEffects',
    'LayerEffects',
    'NeuronEffects',
    'PathEffects',
    'Units',
    'compare_roles',
    'discover_circuit',
    'faithfulness',
    'head_roles',
    'head_shares',
    'read_frame',
    'write_frame',
    # long runs
    'Distributed',
    'Resumable',
    # rooms
    'measures',
    'plot',
    'prune',
    'stats',
]
