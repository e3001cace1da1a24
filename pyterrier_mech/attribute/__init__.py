"""Gradient attributions: which heads, neurons and tokens a score comes from, without one run a unit; and activations.

`AttributeHeads` estimates what `PatchHeads` measures, or needs no second text. `AttributeNeurons` and
`AttributeTokens` integrate along the line of word embeddings from a baseline to the input: `lines` draws it, `path`
walks it, adding points until the sum of the attributions is the change of the score. `Activations` gives the tensors
themselves.
"""

from pyterrier_mech.attribute.activations import Activations
from pyterrier_mech.attribute.heads import AttributeHeads, agreement
from pyterrier_mech.attribute.layers import AttributeLayers
from pyterrier_mech.attribute.neurons import AttributeNeurons
from pyterrier_mech.attribute.paths import AttributePaths
from pyterrier_mech.attribute.tokens import AttributeTokens

__all__ = [
    'Activations',
    'AttributeHeads',
    'AttributeLayers',
    'AttributeNeurons',
    'AttributePaths',
    'AttributeTokens',
    'agreement',
]
