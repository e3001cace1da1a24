"""What stages produce, aggregated over many rows and saved as PyTerrier Artifacts."""

from pyterrier_mech.results.axiom_profile import AxiomProfile
from pyterrier_mech.results.circuit import Circuit
from pyterrier_mech.results.effects import Effects
from pyterrier_mech.results.head_effects import HeadEffects
from pyterrier_mech.results.layer_effects import LayerEffects
from pyterrier_mech.results.neuron_effects import NeuronEffects
from pyterrier_mech.results.path_effects import PathEffects

__all__ = ['AxiomProfile', 'Circuit', 'Effects', 'HeadEffects', 'LayerEffects', 'NeuronEffects', 'PathEffects']
