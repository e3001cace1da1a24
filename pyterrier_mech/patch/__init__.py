"""Exact causal interventions: patching and ablation as stages, and the engines that run them.

`PatchHeads` and `AblateHeads` give the effect of every head; `PatchedReranker` and `AblatedReranker` re-rank with an
intervention on chosen `Units`, so that it can be evaluated.
"""

from pyterrier_mech.patch.ablate import AblateHeads
from pyterrier_mech.patch.heads import PatchHeads
from pyterrier_mech.patch.layers import PatchLayers
from pyterrier_mech.patch.parts import PatchParts
from pyterrier_mech.patch.paths import PatchPaths
from pyterrier_mech.patch.rerankers import AblatedReranker, PatchedReranker

__all__ = ['AblateHeads', 'AblatedReranker', 'PatchHeads', 'PatchLayers', 'PatchParts', 'PatchPaths', 'PatchedReranker']
