"""All criteria: rules that say how much every head and neuron of a ranker is worth keeping."""

from pyterrier_mech.prune.criteria.basic import Magnitude, Random
from pyterrier_mech.prune.criteria.causal import Conductance, Patching
from pyterrier_mech.prune.criteria.gradient import Fisher, Taylor
from pyterrier_mech.prune.criteria.sma import SMA
from pyterrier_mech.prune.criteria.trained import L0, Movement

__all__ = ['L0', 'SMA', 'Conductance', 'Fisher', 'Magnitude', 'Movement', 'Patching', 'Random', 'Taylor']
