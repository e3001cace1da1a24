"""Neural rankers as re-ranking stages, and as handles on what is inside them.

`CrossEncoder`, `CausalReranker`, `BiEncoder`, `ColBERT` and `Splade` score with the Hugging Face module as it is;
`Ranker.map` is the map of its sites. A model family that is not known yet is one `Family` given to `register_family`.
"""

from pyterrier_mech.anatomy.families import Family, register_family
from pyterrier_mech.rankers.bi_encoder import BiEncoder
from pyterrier_mech.rankers.causal import CausalReranker
from pyterrier_mech.rankers.colbert import ColBERT
from pyterrier_mech.rankers.cross_encoder import CrossEncoder
from pyterrier_mech.rankers.projected import ProjectedEncoder
from pyterrier_mech.rankers.ranker import Ranker
from pyterrier_mech.rankers.splade import Splade

__all__ = [
    'BiEncoder',
    'CausalReranker',
    'ColBERT',
    'CrossEncoder',
    'Family',
    'ProjectedEncoder',
    'Ranker',
    'Splade',
    'register_family',
]
