"""The bundled collection is sound."""

import pandas as pd
import pyterrier as pt
import pytest
from toys import minilm_path, toy_cross_encoder

from pyterrier_mech import TFC1, BiEncoder, PatchHeads, Perturb
from pyterrier_mech.lab import LabDataset, LabProvider


@pytest.fixture(scope='module')
def lab():
    return LabDataset()


def test_it_is_a_dataset_of_pyterrier():
    assert isinstance(pt.get_dataset('mech:lab'), LabDataset)
    assert LabProvider().list_dataset_names() == ['lab']
    with pytest.raises(KeyError, match="no dataset 'mech:other'"):
        LabProvider().get_dataset('other')


def test_size_and_grades(lab):
    topics, qrels = lab.get_topics(), lab.get_qrels()
    assert len(lab.texts) >= 200 and len(topics) == 40
    assert set(qrels.label) == {0, 1, 2, 3}
    assert (qrels[qrels.label == 3].groupby('qid').size().reindex(topics.qid) >= 1).all()


def test_nothing_stands_twice_or_nowhere(lab):
    topics, qrels = lab.get_topics(), lab.get_qrels()
    docs = list(lab.get_corpus_iter(verbose=False))
    assert len({doc['docno'] for doc in docs}) == len({doc['text'] for doc in docs}) == len(docs)
    assert topics.qid.is_unique and topics['query'].is_unique
    assert not qrels.duplicated(['qid', 'docno']).any()
    assert set(qrels.docno) <= set(lab.texts) and set(qrels.qid) == set(topics.qid)


def test_text_loader(lab):
    inp = pd.DataFrame({'qid': ['q01', 'q01'], 'docno': ['lab002', 'lab001'], 'score': [2.0, 1.0]})
    res = (lab.text_loader())(inp)
    assert list(res.text) == [lab.texts['lab002'], lab.texts['lab001']] and list(res.score) == [2.0, 1.0]
    with pytest.raises(KeyError, match="no document 'x1'"):
        lab.text_loader()(inp.assign(docno='x1'))
    with pytest.raises(ValueError, match="'title'"):
        lab.text_loader('title')


def test_texts_are_a_stage_that_can_be_drawn(lab):
    stage = lab.text_loader()
    assert stage.fuse_rank_cutoff(3) == pt.RankCutoff(3) >> stage
    case = pt.testing.transformer_test_class(lab.text_loader)
    case.setUpClass()
    for method in ('test_inspect_io', 'test_schematic'):
        outcome = case(method).run()
        assert outcome is not None and outcome.wasSuccessful(), outcome
    case.tearDownClass()
    drawn = pt.schematic.draw(stage >> Perturb(TFC1()) >> PatchHeads(toy_cross_encoder('bert')))
    assert all(label in drawn for label in ('Lab texts', 'Perturb', 'PatchHeads'))


def test_everything_that_both_rankers_find_first_is_judged(lab, tmp_path):
    """And BM25 is not perfect on it, and MiniLM re-ranking helps."""
    pisa = pytest.importorskip('pyterrier_pisa')
    index = pisa.PisaIndex(str(tmp_path / 'lab'), text_field='text')
    index.index(lab.get_corpus_iter(verbose=False))
    bm25 = index.bm25()
    topics, qrels = lab.get_topics(), lab.get_qrels()
    everything = topics.merge(pd.DataFrame({'docno': list(lab.texts)}), how='cross')
    model = BiEncoder(minilm_path(), device='cpu')
    judged = set(zip(qrels.qid, qrels.docno, strict=True))
    for first in ((bm25 % 20)(topics), (model % 20)(lab.text_loader()(everything))):
        assert set(zip(first.qid, first.docno, strict=True)) <= judged
    systems = [bm25, bm25 % 50 >> lab.text_loader() >> model]
    table = pt.Experiment(systems, topics, qrels, ['ndcg_cut_10'])
    lexical, reranked = table['ndcg_cut_10']
    assert 0.5 < lexical < 0.8 and reranked > lexical + 0.05
