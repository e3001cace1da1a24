"""Collection statistics: documents and PISA against counts made here, and the choice of the adapter."""

from __future__ import annotations

import math
import pickle
import shutil
from collections import Counter

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest

from pyterrier_mech.perturb import DocumentStatistics, PisaStatistics, collection_statistics, idf

DOCS = [
    {'docno': 'd1', 'text': 'The cats chase a cat; cats run.', 'title': 'Felines'},
    {'docno': 'd2', 'text': 'Running dogs and the U.S. president', 'title': 'Dogs'},
    {'docno': 'd3', 'text': 'A cat runs from the dog in 1999', 'title': 'Chase'},
]


class Collection:
    """The protocol and nothing else."""

    n_docs = 8

    def df(self, term):
        return {'cat': 2}.get(term, 0)

    def query_terms(self, text):
        return [(word, word) for word in text.split()]


class Half:
    n_docs = 8

    def df(self, term):
        return 0


class Corpus(pt.datasets.Dataset):
    def get_corpus_iter(self, *, verbose=True):
        assert verbose is False, 'no progress bar was asked for'
        return iter(DOCS)


class TestDispatch:
    def test_an_object_with_the_protocol_is_returned_as_it_is(self):
        source = Collection()
        assert collection_statistics(source) is source

    def test_idf(self):
        assert idf(Collection(), 'cat') == math.log(8 / 2)

    def test_idf_of_an_unseen_term_is_an_error_and_not_the_highest(self):
        with pytest.raises(ValueError, match="contains 'dog': skip terms whose df is 0"):
            idf(Collection(), 'dog')

    @pytest.mark.parametrize('source', [3, None, b'abc', {'docno': 'd1', 'text': 'cat'}, pt.RankCutoff(3), Half()])
    def test_an_unknown_source_names_its_type_and_what_is_accepted(self, source):
        with pytest.raises(TypeError, match=f'from {type(source).__name__} .*PisaIndex, a TerrierIndex or IndexRef'):
            collection_statistics(source)

    def test_a_path_without_an_index(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no index at '.*absent': give the folder"):
            collection_statistics(tmp_path / 'absent')


class TestDocuments:
    @pytest.mark.parametrize(
        'source',
        [
            pd.DataFrame(DOCS),
            DOCS,
            iter(DOCS),
            [doc['text'] for doc in DOCS],
            pd.Series([doc['text'] for doc in DOCS]),
            Corpus(),
        ],
        ids=['frame', 'dicts', 'iterator', 'strings', 'series', 'dataset'],
    )
    def test_each_document_counts_once_per_term(self, source):
        statistics = collection_statistics(source)
        assert isinstance(statistics, DocumentStatistics)
        assert statistics.n_docs == 3
        counts = {term: statistics.df(term) for term in ('cats', 'cat', 'the', 'Cats', '1999', 'horse')}
        assert counts == {'cats': 1, 'cat': 2, 'the': 3, 'Cats': 0, '1999': 1, 'horse': 0}

    def test_query_terms_are_lower_cased_runs_in_text_order_without_stop_words(self):
        terms = collection_statistics([]).query_terms("What is the U.S. President's Café-bar, cats cats?")
        assert [word for word, _ in terms] == ['u', 'president', 'café', 'bar', 'cats', 'cats']
        assert all(word == term for word, term in terms)

    def test_another_field(self):
        assert collection_statistics(DOCS, text_field='title').df('felines') == 1
        assert collection_statistics(pd.DataFrame(DOCS), text_field='title').df('cat') == 0

    def test_nothing_is_read_before_a_number_is_asked_for(self):
        def documents():
            read.append(True)
            yield 'cat'

        read: list[bool] = []
        statistics = collection_statistics(documents())
        assert statistics.query_terms('a cat') == [('cat', 'cat')]
        assert not read
        assert (statistics.df('cat'), statistics.n_docs, len(read)) == (1, 1, 1)

    @pytest.mark.parametrize(
        'source, error, message',
        [
            (pd.DataFrame({'docno': ['d1']}), ValueError, r"no column 'text', only \['docno'\].*text_field="),
            ([{'docno': 'd1', 'body': 'x'}], ValueError, r"document 0 has no field 'text', only \['docno', 'body'\]"),
            (['x', 3], TypeError, 'document 1 is 3'),
            (pd.DataFrame({'docno': ['d1'], 'text': [float('nan')]}), TypeError, 'document 0 is nan'),
        ],
    )
    def test_documents_without_text(self, source, error, message):
        with pytest.raises(error, match=message):
            collection_statistics(source).df('cat')

    def test_equality_and_pickle(self):
        frame = pd.DataFrame(DOCS)
        assert collection_statistics(frame) == collection_statistics(frame)
        assert hash(collection_statistics(frame)) == hash(collection_statistics(frame))
        assert collection_statistics(frame) != collection_statistics(frame.copy())
        assert collection_statistics(frame) != collection_statistics(frame, text_field='title')
        assert pickle.loads(pickle.dumps(collection_statistics(frame))).df('cat') == 2

    def test_repr_does_not_print_the_collection(self):
        assert repr(collection_statistics(pd.DataFrame(DOCS))) == (
            "DocumentStatistics(<frame of 3 documents>, text_field='text')"
        )


class TestPisa:
    @pytest.fixture(scope='class')
    def index(self, tmp_path_factory):
        pisa = pytest.importorskip('pyterrier_pisa')
        index = pisa.PisaIndex(tmp_path_factory.mktemp('pisa') / 'index', text_field='text')
        index.index(DOCS)
        return index

    def test_frequencies_are_those_of_the_documents_tokenised_by_the_index(self, index):
        expected = Counter(term for doc in DOCS for term in set(index.tokenize(doc['text'])))
        statistics = collection_statistics(index)
        assert isinstance(statistics, PisaStatistics)
        assert statistics.n_docs == 3
        assert expected['cat'] == 2 and expected['run'] == 3  # the stemmer has work to do
        assert {term: statistics.df(term) for term in expected} == expected
        assert statistics.df('cats') == 0

    def test_query_terms_pair_the_word_with_its_stem_and_drop_stop_words(self, index):
        terms = collection_statistics(index).query_terms('What are the Running cats of N.A.S.A.?')
        assert terms == [('running', 'run'), ('cats', 'cat'), ('nasa', 'nasa')]

    def test_stop_words_are_those_of_the_index_or_of_the_retriever(self, index):
        import pyterrier_pisa

        def words(statistics):
            return [word for word, _ in statistics.query_terms('the cat who runs')]

        assert words(collection_statistics(index)) == ['cat', 'who', 'runs']
        none = pyterrier_pisa.PisaIndex(index.path, stops='none')
        assert words(collection_statistics(none)) == ['the', 'cat', 'who', 'runs']
        own = pyterrier_pisa.PisaIndex(index.path, stops=['who'])
        assert words(collection_statistics(own)) == ['the', 'cat', 'runs']
        retriever = pyterrier_pisa.PisaRetrieve(index, 'bm25', stops='none')
        assert words(collection_statistics(retriever)) == ['the', 'cat', 'who', 'runs']

    def test_retriever_and_folder_lead_to_the_same_index(self, index):
        assert collection_statistics(index.bm25()).df('cat') == 2
        assert collection_statistics(str(index.path)) == collection_statistics(index)
        assert hash(collection_statistics(index.path)) == hash(collection_statistics(index))

    def test_stemmer_and_stop_words_make_a_difference(self, index):
        import pyterrier_pisa

        assert collection_statistics(index) != collection_statistics(pyterrier_pisa.PisaIndex(index.path, stops='none'))
        assert collection_statistics(index) != PisaStatistics(index, stops=['cat'])

    def test_pickle_leaves_the_counts_behind(self, index):
        statistics = collection_statistics(index)
        statistics.df('cat')
        copy = pickle.loads(pickle.dumps(statistics))
        assert set(vars(copy)) == {'index', 'stops'}
        assert copy == statistics and copy.df('cat') == 2

    def test_words_and_terms_that_cannot_be_paired_are_an_error(self, index, monkeypatch):
        monkeypatch.setattr(index, 'tokenize', lambda text: ['cat'])
        with pytest.raises(ValueError, match="makes 1 terms of the 2 words in 'two cats'"):
            collection_statistics(index).query_terms('two cats')

    def test_an_index_that_is_not_built(self, index, tmp_path):
        statistics = collection_statistics(type(index)(tmp_path / 'empty'))
        with pytest.raises(FileNotFoundError, match=r'has no inv.docs: index the documents'):
            statistics.df('cat')

    @pytest.mark.parametrize('damage', ['short', 'long', 'more terms'])
    def test_files_that_do_not_belong_together(self, index, tmp_path, damage):
        folder = tmp_path / 'index'
        shutil.copytree(index.path, folder)
        numbers = np.fromfile(folder / 'inv.docs', dtype=np.uint32)
        if damage == 'more terms':
            with (folder / 'fwd.terms').open('a') as terms:
                terms.write('zebra\n')
        else:
            (numbers[:-1] if damage == 'short' else np.append(numbers, numbers[:1])).tofile(folder / 'inv.docs')
        with pytest.raises(ValueError, match='inv.docs does not hold one list for every term of fwd.terms'):
            collection_statistics(type(index)(folder)).df('cat')
