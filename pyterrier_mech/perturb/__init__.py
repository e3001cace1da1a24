"""Perturbations: small edits of a document or a query, and the stage that makes them.

``Perturb`` is the stage: it writes the edited text to ``text``, where the next ranker reads it, and the original to
``text_0``, where a patching stage looks for it. What it applies is any callable ``(query, text) -> str``: a lambda, a
function decorated with ``@perturbation``, one of the axioms (``TFC1`` … ``PROX``), which say whether the score should
rise, or a plain edit, which mostly does not. ``all_edits`` makes them all. Axioms ask a collection for its terms and
document frequencies through ``CollectionStatistics``; ``collection_statistics`` makes one from an index, a frame, an
iterable or a dataset.
"""

from pyterrier_mech.perturb._documents import DocumentStatistics
from pyterrier_mech.perturb._pisa import PisaStatistics
from pyterrier_mech.perturb._terrier import TerrierStatistics
from pyterrier_mech.perturb.axioms import LNC1, LNC2, TDC, TFC1, TFC2, TFLNC
from pyterrier_mech.perturb.base import Axiom, TextEdit
from pyterrier_mech.perturb.battery import all_edits
from pyterrier_mech.perturb.plain import (
    ChangeCase,
    RemovePunctuation,
    RemoveQueryTerm,
    RemoveStopWords,
    ReplaceQueryTerm,
    ShuffleSentences,
    ShuffleWords,
    Typos,
)
from pyterrier_mech.perturb.rearranged import PROX, TFC3
from pyterrier_mech.perturb.semantic import STMC1
from pyterrier_mech.perturb.stage import Perturb, Perturbation, perturbation
from pyterrier_mech.perturb.statistics import CollectionStatistics, collection_statistics, idf

__all__ = [
    'LNC1',
    'LNC2',
    'PROX',
    'STMC1',
    'TDC',
    'TFC1',
    'TFC2',
    'TFC3',
    'TFLNC',
    'Axiom',
    'ChangeCase',
    'CollectionStatistics',
    'DocumentStatistics',
    'Perturb',
    'Perturbation',
    'PisaStatistics',
    'RemovePunctuation',
    'RemoveQueryTerm',
    'RemoveStopWords',
    'ReplaceQueryTerm',
    'ShuffleSentences',
    'ShuffleWords',
    'TerrierStatistics',
    'TextEdit',
    'Typos',
    'all_edits',
    'collection_statistics',
    'idf',
    'perturbation',
]
