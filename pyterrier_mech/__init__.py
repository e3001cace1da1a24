"""Mechanistic interpretability of neural rankers as PyTerrier pipeline stages.

Every analysis takes a PyTerrier frame and returns one:
`bm25 % 10 >> text >> Perturb(TDC(index)) >> PatchHeads(model)`.
"""

from pyterrier_mech import plot
from pyterrier_mech.attribute import AttributeHeads, AttributeNeurons, AttributeTokens
from pyterrier_mech.circuits import AttentionShares, discover_circuit, faithfulness, head_roles
from pyterrier_mech.patch import AblatedReranker, AblateHeads, PatchedReranker, PatchHeads, Units
from pyterrier_mech.perturb import LNC1, TDC, TFC1, TFC2, Perturb, perturbation
from pyterrier_mech.prune import (
    L0,
    SMA,
    Conductance,
    Distillation,
    FineTuning,
    Fisher,
    Magnitude,
    Movement,
    Patching,
    Plan,
    PrunedReranker,
    Random,
    Rescaling,
    Taylor,
    efficiency,
)
from pyterrier_mech.rankers import BiEncoder, CrossEncoder
from pyterrier_mech.results import Circuit, HeadEffects, NeuronEffects

__version__ = '0.1.0'
__all__ = [
    'efficiency',
    'Taylor',
    'Rescaling',
    'Random',
    'PrunedReranker',
    'Plan',
    'Patching',
    'Movement',
    'Magnitude',
    'Fisher',
    'FineTuning',
    'Distillation',
    'Conductance',
    'SMA',
    'L0',
    'LNC1',
    'TDC',
    'TFC1',
    'TFC2',
    'AblateHeads',
    'AblatedReranker',
    'AttentionShares',
    'AttributeHeads',
    'AttributeNeurons',
    'AttributeTokens',
    'BiEncoder',
    'Circuit',
    'CrossEncoder',
    'HeadEffects',
    'NeuronEffects',
    'PatchHeads',
    'PatchedReranker',
    'Perturb',
    'Units',
    'discover_circuit',
    'faithfulness',
    'head_roles',
    'perturbation',
    'plot',
]
