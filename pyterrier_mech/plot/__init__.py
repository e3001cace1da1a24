"""Matplotlib figures of results. They need ``pip install 'pyterrier-mech[plot]'``, and touch no global style."""

from pyterrier_mech.plot.attention import attention
from pyterrier_mech.plot.circuit import circuit
from pyterrier_mech.plot.faithfulness import faithfulness
from pyterrier_mech.plot.heads import heads
from pyterrier_mech.plot.layers import layers
from pyterrier_mech.plot.neurons import neurons
from pyterrier_mech.plot.overlaps import overlaps
from pyterrier_mech.plot.paths import paths
from pyterrier_mech.plot.pruning import importance, retention
from pyterrier_mech.plot.scores import scores
from pyterrier_mech.plot.tokens import tokens

__all__ = [
    'attention',
    'circuit',
    'faithfulness',
    'heads',
    'importance',
    'layers',
    'neurons',
    'overlaps',
    'paths',
    'retention',
    'scores',
    'tokens',
]
