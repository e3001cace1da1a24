"""From effects to a circuit: where heads look and the role that follows, discovery, and how faithful a circuit is.

`AttentionPatterns`, `AttentionShares` and `head_roles` say where heads look; `discover_circuit` takes the strongest
units out of `HeadEffects` and `NeuronEffects`; `faithfulness` measures, on other queries, how much of the effect the
circuit carries.
"""

from pyterrier_mech.circuits.attention import AttentionPatterns
from pyterrier_mech.circuits.discovery import discover_circuit
from pyterrier_mech.circuits.faithfulness import faithfulness
from pyterrier_mech.circuits.roles import compare_roles, head_roles, head_shares
from pyterrier_mech.circuits.shares import AttentionShares
from pyterrier_mech.results.circuit import Circuit

__all__ = [
    'AttentionPatterns',
    'AttentionShares',
    'Circuit',
    'compare_roles',
    'discover_circuit',
    'faithfulness',
    'head_roles',
    'head_shares',
]
