"""The axiom of semantic matching: closeness in meaning, by vectors from outside of the ranker that is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from pyterrier_mech.perturb.base import CountedAxiom, checked_words
from pyterrier_mech.rankers import BiEncoder


@dataclass(frozen=True)
class STMC1(CountedAxiom):
    """STMC1: a term that is close in meaning to a query term raises the score, though the query does not have it.

    Of all words that are not in the query, the ``k`` with the highest cosine to any word of the query are added. The
    axiom compares a close term with a distant one: ``location='replace'`` puts it in the place of a drawn word, and
    ``LNC1`` adds a drawn word instead of the closest.

    The encoder should not be the ranker that is judged, nor share its weights: else the choice of the word knows what
    the ranker likes.

    Args:
        statistics: The collection, for its tokeniser, stemmer and stop words; ``None`` for the simple tokeniser. With a
            stemmer, other forms of query words are not added.
        k: Number of terms to add.
        encoder: Makes vectors of words; required. A ``BiEncoder``, or an object with ``encode(words)`` that returns an
            array ``[words, d]``, such as a SentenceTransformer.
        words: Words to choose from; ``None`` for the document's own words that are neither stop words nor in the query.
        seed: Unused for the term; of the place, where ``location`` draws one.
        location: ``'end'``, ``'start'``, ``'sentence'`` or ``'replace'``, see ``Axiom``.
    """

    encoder: Any = field(default=None, kw_only=True)
    words: Sequence[str] | None = field(default=None, kw_only=True)
    _vectors: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    citation: ClassVar[str] = (
        'Fang and Zhai: Semantic Term Matching in Axiomatic Approaches to Information Retrieval. SIGIR 2006.'
    )

    def __post_init__(self) -> None:
        """Checks the parameters, as ``Axiom`` does, and the encoder.

        Raises:
            TypeError: If the encoder cannot encode.
        """
        super().__post_init__()
        if isinstance(self.encoder, (type, str)) or not callable(getattr(self.encoder, 'encode', None)):
            raise TypeError(
                f'encoder={self.encoder!r}: STMC1 needs an object with encode(words) -> [words, d], such as '
                'BiEncoder(name) or SentenceTransformer(name).'
            )
        if self.words is not None:
            object.__setattr__(self, 'words', checked_words(self.words, 'the words of the document'))

    def terms(self, query: str, text: str) -> list[str]:
        """Returns the ``k`` words closest to a query word, the closest first."""
        pairs = self._pairs(text) if self.words is None else [(word, self._term(word)) for word in self.words]
        wanted = list(dict.fromkeys(word for word, _ in self._pairs(query)))
        others = list(dict.fromkeys(self._not_in_query(query, pairs)))
        if not wanted or not others:
            return []
        closeness = (self._encoded(others) @ self._encoded(wanted).T).max(axis=1)
        return [others[place] for place in np.argsort(-closeness, kind='stable')[: self.k]]

    def _encoded(self, words: list[str]) -> np.ndarray:
        """Returns vectors of length 1; a word is encoded once."""
        if new := [word for word in words if word not in self._vectors]:
            encoded = self.encoder.encode('text', new) if isinstance(self.encoder, BiEncoder) else None
            vectors = np.asarray(self.encoder.encode(new) if encoded is None else encoded, dtype=np.float64)
            if vectors.ndim != 2 or len(vectors) != len(new):
                raise ValueError(
                    f'{self.encoder!r} made an array of shape {vectors.shape} of {len(new)} words: encode(words) must '
                    'return one row for each word.'
                )
            sizes = np.linalg.norm(vectors, axis=1, keepdims=True)
            self._vectors.update(zip(new, vectors / np.where(sizes > 0, sizes, 1)))
        return np.stack([self._vectors[word] for word in words])

    def __getstate__(self) -> dict[str, Any]:
        """Pickles the settings; vectors are computed again."""
        return {**self.__dict__, '_vectors': {}}
