"""Document frequencies looked up in the lexicon of a Terrier index."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import pyterrier as pt

from pyterrier_mech.perturb._documents import Keyed


def terrier_index(source: Any) -> pt.terrier.TerrierIndex:  # noqa: ANN401 - a Java object
    """Returns a Java ``Index`` or ``IndexRef`` as a ``TerrierIndex``, by its folder where it has one.

    A folder, unlike a Java object, can be compared and pickled.
    """
    reference = source.getIndexRef() if isinstance(source, pt.terrier.J.Index) else source
    path = Path(reference.toString())
    folder = path.parent if path.name == 'data.properties' else path
    if (folder / 'data.properties').exists():
        return pt.terrier.TerrierIndex(folder)
    return pt.terrier.TerrierIndex.coerce(source)


class TerrierStatistics(Keyed):
    """Statistics of a Terrier index, with the tokeniser and the term pipeline that its properties record.

    Words that the term pipeline drops are its stop words. Java starts when the first number is asked for. Two objects
    are equal if their indexes lie in the same folder; an index in memory equals only itself.

    Args:
        index: The index.
        tokeniser: Name of a Terrier tokeniser; ``None`` for the one that the index records. Terrier 5.11 records
            none: then it is ``'english'``, which is what ``pt.terrier.Retriever`` takes.
    """

    def __init__(self, index: pt.terrier.TerrierIndex, tokeniser: str | None = None) -> None:
        self.index = index
        self.tokeniser = tokeniser

    @property
    def n_docs(self) -> int:
        """Number of documents in the index."""
        return int(self._java_index.getCollectionStatistics().getNumberOfDocuments())

    def df(self, term: str) -> int:
        """Returns the number of documents that contain the index term ``term``, 0 for one that is not in the index."""
        entry = self._lexicon.getLexiconEntry(term)
        return 0 if entry is None else int(entry.getDocumentFrequency())

    def query_terms(self, text: str) -> list[tuple[str, str]]:
        """Returns (word, index term) for every word of ``text`` that the term pipeline of the index keeps."""
        pairs = ((str(word), self._term(str(word))) for word in self._java_tokeniser.getTokens(text))
        return [(word, term) for word, term in pairs if term]

    def _term(self, word: str) -> str | None:
        term: str | None = word
        for stage in self._pipeline:
            term = stage.pipelineTerm(term)
            if term is None:
                return None
        return term

    @cached_property
    def _java_index(self) -> Any:  # noqa: ANN401 - a Java object
        return self.index.index_obj()

    @cached_property
    def _lexicon(self) -> Any:  # noqa: ANN401
        return self._java_index.getLexicon()

    @cached_property
    def _java_tokeniser(self) -> Any:  # noqa: ANN401
        name = self.tokeniser or self._property('tokeniser', 'english')
        return pt.terrier.TerrierTokeniser.java_tokeniser(pt.terrier.TerrierTokeniser._to_obj(name))

    @cached_property
    def _pipeline(self) -> list[Any]:
        # One accessor per stage: Java's variable argument list takes only one name from Python.
        accessor = pt.java.autoclass('org.terrier.terms.BaseTermPipelineAccessor')
        names = map(str.strip, self._property('termpipelines', '').split(','))
        stages = [accessor(name) for name in names if name]
        for stage in stages:
            stage.setIndex(self._java_index)
        return stages

    def _property(self, name: str, default: str) -> str:
        # An index in memory has no properties: like Terrier's retrieval, fall back on the set-up of the process.
        # Casting it all the same would end the process, so the class is asked first.
        if 'org.terrier.structures.PropertiesIndex' in _java_classes(self._java_index):
            properties = pt.java.cast('org.terrier.structures.PropertiesIndex', self._java_index)
            return str(properties.getIndexProperty(name, default))
        return str(pt.terrier.J.ApplicationSetup.getProperty(name, default))

    def _key(self) -> tuple[object, ...]:
        path = self.index.path
        return TerrierStatistics, path.resolve() if isinstance(path, Path) else id(self.index), self.tokeniser

    def __getstate__(self) -> dict[str, Any]:
        index = self.index
        if isinstance(index.path, Path):
            # A loaded index holds Java objects; its path is enough to open it again.
            index = pt.terrier.TerrierIndex(index.path, memory=index.memory)
        return {'index': index, 'tokeniser': self.tokeniser}

    def __repr__(self) -> str:
        tokeniser = '' if self.tokeniser is None else f', tokeniser={self.tokeniser!r}'
        return f'TerrierStatistics({self.index!r}{tokeniser})'


def _java_classes(thing: Any) -> list[str]:  # noqa: ANN401 - a Java object
    names, java_class = [], thing.getClass()
    while java_class is not None:
        names.append(java_class.getName())
        java_class = java_class.getSuperclass()
    return names
