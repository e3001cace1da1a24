"""All edits at once."""

from __future__ import annotations

from typing import Any

from pyterrier_mech.perturb import plain
from pyterrier_mech.perturb.axioms import LNC1, LNC2, TDC, TFC1, TFC2, TFLNC
from pyterrier_mech.perturb.base import TextEdit
from pyterrier_mech.perturb.rearranged import PROX, TFC3
from pyterrier_mech.perturb.semantic import STMC1
from pyterrier_mech.perturb.statistics import collection_statistics


def all_edits(statistics: Any = None, *, encoder: Any = None, synonyms: Any = None, seed: int = 0) -> list[TextEdit]:
    """Returns every axiom and plain edit that can be made of what is given, with its default settings.

    Args:
        statistics: Anything that ``collection_statistics`` takes; without it there is no ``TDC``.
        encoder: Makes vectors of words, see ``STMC1``; without it there is no ``STMC1``.
        synonyms: Lists of synonyms, see ``ReplaceQueryTerm``; without them there is no ``ReplaceQueryTerm``.
        seed: Random seed of all.
    """
    source = None if statistics is None else collection_statistics(statistics)
    edits: list[TextEdit] = [
        TFC1(source, seed=seed),
        TFC1(source, seed=seed, location='replace'),
        TFC2(source, seed=seed),
        TFC3(source, seed=seed),
        *([] if source is None else [TDC(source, seed=seed)]),
        LNC1(source, seed=seed),
        LNC2(seed=seed),
        TFLNC(source, seed=seed),
        *([] if encoder is None else [STMC1(source, encoder=encoder, seed=seed)]),
        *([] if encoder is None else [STMC1(source, encoder=encoder, seed=seed, location='replace')]),
        PROX(source, seed=seed),
        PROX(source, direction='apart', seed=seed),
        plain.RemoveQueryTerm(source, seed=seed),
        *([] if synonyms is None else [plain.ReplaceQueryTerm(source, synonyms=synonyms, seed=seed)]),
        plain.ChangeCase(seed=seed),
        plain.RemovePunctuation(seed=seed),
        plain.RemoveStopWords(source, seed=seed),
        plain.ShuffleSentences(seed=seed),
        plain.ShuffleWords(seed=seed),
        plain.Typos(seed=seed),
    ]
    return edits
