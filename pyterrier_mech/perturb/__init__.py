"""Perturbations: small edits of a document or a query, and the stage that makes them.

``Perturb`` is the stage: it writes the edited text to ``text``, where the next ranker reads it, and the original to
``text_0``, where a patching stage looks for it. What it applies is any callable ``(query, text) -> str``: a lambda, a
function decorated with ``@perturbation``, or one of the axioms (``TFC1``, ``TFC2``, ``TDC``, ``LNC1``), which say
whether the score should rise. Axioms ask a collection for its terms and document frequencies through
``CollectionStatistics``; ``collection_statistics`` makes one from an index, a frame, an iterable or a dataset.
"""

from pyterrier_mech.perturb._documents import DocumentStatistics
from pyterrier_mech.perturb._pisa import PisaStatistics
from pyterrier_mech.perturb._terrier import TerrierStatistics
from pyterrier_mech.perturb.axioms import LNC1, TDC, TFC1, TFC2, Axiom
from pyterrier_mech.perturb.stage import Perturb, Perturbation, perturbation
from pyterrier_mech.perturb.statistics import CollectionStatistics, collection_statistics, idf

__all__ = [
    'LNC1',
    'TDC',
    'TFC1',
    'TFC2',
    'Axiom',
    'CollectionStatistics',
    'DocumentStatistics',
    'Perturb',
    'Perturbation',
    'PisaStatistics',
    'TerrierStatistics',
    'collection_statistics',
    'idf',
    'perturbation',
]
