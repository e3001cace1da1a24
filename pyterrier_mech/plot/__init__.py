"""Matplotlib figures of results. They need ``pip install 'pyterrier-mech[plot]'``, and touch no global style."""

from pyterrier_mech.plot.circuit import circuit
from pyterrier_mech.plot.faithfulness import faithfulness
from pyterrier_mech.plot.heads import heads
from pyterrier_mech.plot.neurons import neurons
from pyterrier_mech.plot.tokens import tokens

__all__ = ['circuit', 'faithfulness', 'heads', 'neurons', 'tokens']
