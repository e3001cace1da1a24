"""Files of pruning that are torn, old, of another model, or made to fill the memory."""

import json
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from toys import QUERIES, TEXTS, toy_cross_encoder, training_frame

from pyterrier_mech import CrossEncoder, PrunedReranker
from pyterrier_mech.prune import Plan, Random, UnitScores, latency_costs, make_plan, prune_units

FRAME = training_frame()


def saved(folder, **settings):
    stage = PrunedReranker(toy_cross_encoder(), Random(), multiple=8, recovery=(), **settings)
    stage.fit(FRAME)
    return stage.save(folder)


@pytest.mark.parametrize('field', ['of_heads', 'of_neurons'])
def test_counts_that_no_model_has_are_refused(field):
    plan = json.loads(Plan.removing(toy_cross_encoder(), ['L0H1']).to_json())
    plan[field][0] = 5_000_000
    with pytest.raises(ValueError, match=r'what Plan.to_json\(\) returned'):
        Plan.from_json(json.dumps(plan))


def test_the_plan_of_another_ranker_is_refused(tmp_path):
    saved(tmp_path / 'small', sparsity=0.3)
    saved(tmp_path / 'smaller', sparsity=0.7)
    (tmp_path / 'small' / 'plan.json').write_text((tmp_path / 'smaller' / 'plan.json').read_text())
    with pytest.raises(ValueError, match=r"plan.json' is damaged"):
        PrunedReranker.load(tmp_path / 'small')


def test_settings_that_would_read_other_files_are_not_taken(tmp_path):
    stage = saved(tmp_path / 'small')
    meta = json.loads((tmp_path / 'small' / 'pt_meta.json').read_text())
    meta['summary']['settings'] |= {'tokenizer': str(tmp_path / 'elsewhere'), 'model': 'another'}
    (tmp_path / 'small' / 'pt_meta.json').write_text(json.dumps(meta))
    loaded = PrunedReranker.load(tmp_path / 'small')
    assert loaded.model_.tokenizer is None
    np.testing.assert_allclose(loaded(FRAME)['score'], stage(FRAME)['score'], atol=1e-12)


@pytest.mark.parametrize('lost', ['ranker', 'settings', 'qids', 'history'])
def test_a_summary_without_its_parts_names_the_file(tmp_path, lost):
    saved(tmp_path / 'small')
    file = tmp_path / 'small' / 'pt_meta.json'
    meta = json.loads(file.read_text())
    del meta['summary'][lost]
    file.write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"pt_meta.json' is damaged"):
        PrunedReranker.load(tmp_path / 'small')


# -- tables of time


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """The file of a table that was measured, and how often something was scored."""
    monkeypatch.setenv('PYTERRIER_HOME', str(tmp_path))
    scored = []

    def score(self, queries, texts):
        scored.append(len(queries))
        return np.zeros(len(queries))

    monkeypatch.setattr(CrossEncoder, 'score', score)
    frame = pd.DataFrame({'query': QUERIES, 'text': TEXTS})

    def again():
        before = len(scored)
        latency_costs(toy_cross_encoder(), frame, repeats=1)
        return len(scored) > before

    assert again() and not again()
    (file,) = [path for path in Path(tmp_path).rglob('*') if path.is_file()]
    return file, again


@pytest.mark.parametrize('text', ['', '{"fixed": [0.', '[]', '{"fixed": [0.1]}'])
def test_a_torn_table_is_measured_again(measured, text):
    file, again = measured
    file.write_text(text)
    assert again() and not again() and json.loads(file.read_text())['fixed']
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize('days, anew', [(29, False), (31, True), (-2, True)])
def test_a_table_is_valid_for_thirty_days(measured, days, anew):
    file, again = measured
    table = json.loads(file.read_text())
    assert table['measured'] == date.today().isoformat()
    file.write_text(json.dumps({**table, 'measured': (date.today() - timedelta(days=days)).isoformat()}))
    assert again() == anew


# -- nothing to prune


def test_a_ranker_without_any_unit_has_no_plan():
    nothing = prune_units(toy_cross_encoder(), [[], []], [[], []])
    with pytest.raises(ValueError, match='no heads and no neurons left: there is nothing to prune'):
        make_plan(nothing, UnitScores([np.zeros(0)] * 2, [np.zeros(0)] * 2), 0.5)
    with pytest.raises(ValueError, match='nothing to prune'):
        PrunedReranker(nothing, Random()).fit(FRAME)
