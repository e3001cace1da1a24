"""What a run over a folder gives: what the stage gives, from any mixture of stored and missing rows."""

import warnings
from pathlib import Path

import inside
import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from stages import OF_MODELS, STAGES, bi, close, cross, pruned
from toys import frame_of, pairs, toy_cross_encoder, toy_module, unpatchable_pairs

from pyterrier_mech import (
    AblatedReranker,
    Activations,
    AttributeHeads,
    AttributeLayers,
    AttributeNeurons,
    PatchHeads,
    PatchLayers,
    Perturb,
    Resumable,
)

pytestmark = pytest.mark.filterwarnings('ignore:.*cannot be patched', 'ignore:.*rows unchanged')

ROWWISE = [name for name in OF_MODELS if name not in ('PrunedReranker', 'Resumable')]


def files(folder):
    return sorted(file.name for file in Path(folder).glob('*.parquet'))


def equal(res, expected):
    """Equal to the bit, types and arrays included."""
    pd.testing.assert_frame_equal(res, expected, check_exact=True)
    assert res.attrs == expected.attrs


@pytest.mark.parametrize('name', ROWWISE)
def test_a_folder_gives_what_the_stage_gives(name, module, tmp_path, monkeypatch):
    make, frame, _ = STAGES[name]
    inp = frame().assign(extra=range(6), score=0.5, rank=7).iloc[[4, 2, 2, 0, 5, 1, 3]]
    inp.index = [3, 1, 4, 4, 5, 9, 2]
    inp.attrs['note'] = 'kept'
    expected = make(module)(inp)
    stage = Resumable(make(module), tmp_path, rows=2)
    res = stage(inp)
    close(res, expected)
    assert res.dtypes.equals(expected.dtypes) and res.attrs == expected.attrs
    monkeypatch.setattr(inside.resumable, 'computed', None)
    equal(stage(inp), res)
    # Other qids, docnos and settings of speed are no reason to compute anew.
    other = inp.assign(docno=list('abcdefg'), qid='q').drop(columns='extra')
    again = Resumable(make(module, batch_tokens=100), tmp_path)(other)
    new = [column for column in res.columns if column not in (*inp.columns, 'rank')]
    equal(again[new], res[new])


def test_units_are_whole_queries_and_longer_queries_are_cut(tmp_path):
    stage = Resumable(toy_cross_encoder(), tmp_path, rows=6)
    stage(frame_of(16))
    assert len(files(tmp_path)) == 4
    stage = Resumable(toy_cross_encoder(seed=1), tmp_path, rows=3)
    stage(frame_of(16))
    assert len(files(tmp_path)) == 4 + 8


def test_another_cutoff_finds_its_rows(tmp_path, monkeypatch):
    inp, stage = pairs(16), Resumable(PatchHeads(toy_cross_encoder()), tmp_path, rows=5)
    small = stage(inp[inp['rank'] < 2])
    computed, asked = inside.resumable.computed, []
    monkeypatch.setattr(inside.resumable, 'computed', lambda of, unit: asked.append(len(unit)) or computed(of, unit))
    whole = stage(inp)
    assert sum(asked) == 8
    equal(whole[whole['rank'] < 2], small)
    equal(stage(inp.iloc[::-1]), whole.iloc[::-1])
    assert sum(asked) == 8


def test_rows_of_equal_texts_are_computed_once(tmp_path, monkeypatch):
    inp = pd.concat([frame_of(3), frame_of(2).assign(qid='other'), frame_of(2)])
    computed, asked = inside.resumable.computed, []
    monkeypatch.setattr(inside.resumable, 'computed', lambda of, unit: asked.append(len(unit)) or computed(of, unit))
    stage = Resumable(toy_cross_encoder(), tmp_path, rows=2)
    close(stage(inp), toy_cross_encoder()(inp))
    assert sum(asked) == 3 and stage.status(inp).done == 7


def test_status_counts_rows(tmp_path):
    inp, stage = frame_of(16), Resumable(toy_cross_encoder(), tmp_path, rows=4)
    before = stage.status(inp)
    assert (before.done, before.missing, before.units) == (0, 16, 4) and np.isnan(before.seconds_left)
    stage(inp.iloc[:4])
    half = stage.status(pd.concat([inp, inp.iloc[8:10]]))
    assert (half.done, half.missing, half.units) == (4, 14, 3) and 0 < half.seconds_left < 60
    assert stage.work(inp) == stage.status(inp)
    assert stage.status(inp).missing == 0 == stage.status(inp).seconds_left
    assert stage.status(inp.iloc[:0]).units == 0


def test_shards_share_the_work(tmp_path):
    inp, stages = frame_of(16), [Resumable(toy_cross_encoder(), tmp_path, rows=4) for _ in range(3)]
    assert [stage.work(inp, (i, 3)).missing for i, stage in enumerate(stages)] == [8, 4, 0]
    equal(stages[0](inp), Resumable(toy_cross_encoder(), tmp_path / 'alone', rows=4)(inp))
    assert len(files(tmp_path)) == 4
    with pytest.raises(ValueError, match=r'got \(3, 3\)'):
        stages[0].work(inp, (3, 3))


def test_compact_and_clear_leave_others_alone(tmp_path, monkeypatch):
    inp, stage = pairs(16), Resumable(PatchLayers(toy_cross_encoder(), by='position'), tmp_path, rows=3)
    other = Resumable(toy_cross_encoder(), tmp_path, rows=3)
    res, scored = stage(inp), other(inp)
    assert stage.compact() == 1 and stage.compact() == 1
    monkeypatch.setattr(inside.resumable, 'computed', None)
    equal(stage(inp), res)
    stage.clear()
    equal(other(inp), scored)
    assert stage.status(inp).done == 0 and other.status(inp).missing == 0


def test_the_progress_bar_starts_with_what_is_done(tmp_path, capsys):
    stage = Resumable(toy_cross_encoder(verbose=True), tmp_path, rows=4)
    stage(frame_of(8))
    capsys.readouterr()
    stage(frame_of(12))
    shown = capsys.readouterr().err
    assert '8/12' in shown and '12/12' in shown and shown.count('CrossEncoder:') == shown.count('row')
    quiet = Resumable(toy_cross_encoder(verbose=True, seed=1), tmp_path, rows=4, verbose=False)
    quiet(frame_of(12))
    assert capsys.readouterr().err == '' and quiet.model.verbose


def test_one_warning_a_frame(tmp_path):
    inp = pd.concat([unpatchable_pairs()] * 2).assign(qid=list('abcdefgh'))
    stage = PatchHeads(toy_cross_encoder(max_length=24))
    for run in (stage, Resumable(stage, tmp_path, rows=1), Resumable(stage, tmp_path, rows=1)):
        with pytest.warns(UserWarning) as record:
            run(inp)
        assert [str(one.message).split(' (')[0] for one in record] == ['6 of 8 pairs cannot be patched']
    lines = AttributeNeurons(toy_cross_encoder(), tolerance=1e-9, max_points=9)
    for run in (lines, Resumable(lines, tmp_path, rows=2)):
        with pytest.warns(UserWarning, match='6 of 6 rows have a completeness error') as record:
            run(frame_of(6))
        assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Resumable(stage, tmp_path)(inp[(inp['text'] == 'rust bread')])


def test_the_notes_of_two_analyses_are_joined_as_the_stage_joins_them(tmp_path):
    model, inp = toy_cross_encoder(), pairs(6)
    first, second = PatchHeads(model, heads=['L0H0']), PatchHeads(model, heads=['L0H1', 'L1H2'])
    expected = second(first(inp))
    Resumable(second, tmp_path)(inp)
    assert expected['analysis'].tolist() == Resumable(second, tmp_path)(first(inp))['analysis'].tolist()
    assert 'L0H0-1 L1H2' in expected['analysis'][0]


def test_an_edited_query_and_an_edited_text_are_told_apart(tmp_path):
    edit = Perturb(lambda query, text: f'{query} bread', field='query')
    inp = frame_of(4)
    stage = PatchHeads(toy_cross_encoder())
    for frame in (edit(inp), inp.assign(text_0=inp['query'])):
        close(Resumable(stage, tmp_path)(frame), stage(frame))
    assert len(files(tmp_path)) == 2


def test_memory_that_ran_out_before_changes_no_batch(tmp_path, monkeypatch):
    model, inp = toy_cross_encoder(batch_tokens=4000), frame_of(16)
    stage = Resumable(model, tmp_path, rows=4)
    model.budget.lower(1)
    batches, run = [], type(model).run

    def counted(self, inputs, rows, **settings):
        batches.append(len(rows))
        return run(self, inputs, rows, **settings)

    monkeypatch.setattr(type(model), 'run', counted)
    stage(inp)
    assert batches == [4] * 4


# -- what is refused


def listwise(frame):
    return frame


@pytest.mark.parametrize(
    'make, reason',
    [
        (lambda: pt.apply.generic(listwise), 'not a stage of pyterrier_mech that runs a ranker'),
        (lambda: toy_cross_encoder() >> toy_cross_encoder(), 'put it before or after'),
        (lambda: Perturb(lambda query, text: text), 'not a stage of pyterrier_mech'),
        (lambda: pruned(toy_module('bert')[0]), 'its model_'),
        (lambda: AttributeHeads(toy_cross_encoder(), verify=2), 'verify=2 chooses columns by the sum'),
        (lambda: AttributeLayers(toy_cross_encoder(), verify=1), 'verify=1'),
        (lambda: Own(toy_cross_encoder()), 'rowwise = True'),
        (lambda: 'a name', 'str is not a stage'),
    ],
)
def test_what_is_not_row_by_row_is_refused(make, reason, tmp_path):
    with pytest.raises(TypeError, match=reason):
        Resumable(make(), tmp_path)


class Own(PatchHeads):
    pass


class Told(Own):
    rowwise = True


def test_a_stage_of_ones_own_may_say_that_it_is_row_by_row(tmp_path):
    close(Resumable(Told(toy_cross_encoder()), tmp_path)(pairs(4)), Told(toy_cross_encoder())(pairs(4)))


def test_what_no_key_can_hold_is_refused(tmp_path, module):
    with pytest.raises(TypeError, match='baseline= of AttributeNeurons must be made of text'):
        Resumable(AttributeNeurons(toy_cross_encoder(), baseline=lambda ids: ids), tmp_path)(frame_of(2))
    handle = module.bert.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match='has hooks'):
        Resumable(cross(module), tmp_path)(frame_of(2))
    handle.remove()
    Resumable(cross(module), tmp_path)(frame_of(2))
    for rows in (0, 2.5):
        with pytest.raises(ValueError, match='rows must be a number'):
            Resumable(cross(module), tmp_path, rows=rows)


# -- what is another result


def change(parameter, value):
    with torch.no_grad():
        parameter.view(-1)[0] += value


@pytest.mark.parametrize(
    'other',
    [
        lambda module: change(module.bert.encoder.layer[1].output.dense.bias, 0.5),
        lambda module: change(module.bert.encoder.layer[1].output.dense.bias.data, 0.5),
        lambda module: module.bert.embeddings.LayerNorm.__setattr__('eps', 0.1),
    ],
)
def test_changed_weights_are_never_served(other, module, tmp_path):
    stage, inp = PatchHeads(cross(module)), pairs(4)
    before = Resumable(stage, tmp_path)(inp)
    other(module)
    after = Resumable(stage, tmp_path)(inp)
    close(after, stage(inp))
    assert not np.allclose(after['L0H0'], before['L0H0']) and len(files(tmp_path)) == 2


def test_other_settings_have_other_files(tmp_path):
    module, model = toy_module('bert')[0], toy_cross_encoder()
    one, other = frame_of(4).iloc[:3], frame_of(4).iloc[2:]
    stages = [
        PatchHeads(model),
        PatchHeads(model, heads=['L0H0']),
        PatchHeads(model, direction='original_to_perturbed'),
        PatchHeads(model, filler=None),
        PatchHeads(toy_cross_encoder(max_length=12)),
        PatchHeads(bi(module.base_model)),
        PatchLayers(model),
        PatchLayers(model, sites=['mlp_out', 'attn_out']),
        model,
        toy_cross_encoder(target='probability'),
        toy_cross_encoder(dtype=torch.float32),
        bi(module.base_model),
        bi(module.base_model, query_prefix='query: '),
        AblatedReranker(model, ['L0H0'], value='resample', reference=one),
        AblatedReranker(model, ['L0H0'], value='resample', reference=other),
        AblatedReranker(model, ['L0H0'], value='resample', reference=other, seed=1),
        Activations(model, 'heads'),
        AttributeNeurons(model),
        AttributeNeurons(model, baseline='all'),
        AttributeNeurons(model, points=9.0),
    ]
    assert len({inside.stage_digest(stage) for stage in stages}) == len(stages)


def test_what_makes_no_difference_has_the_same_digest():
    model, copied = toy_cross_encoder(), toy_cross_encoder(fresh=True, batch_tokens=7, verbose=True)
    copied.maker.tokenizer('a', padding='max_length', max_length=7, truncation=True)
    for one, other in [
        (model, copied),
        (PatchHeads(model, heads=['L0H1', 'L0H0']), PatchHeads(copied, heads=[(0, 0), (0, 1)], text_field='body')),
        (PatchLayers(model, sites=('mlp_out',)), PatchLayers(copied, sites=['mlp_out'], verbose=True)),
    ]:
        assert inside.stage_digest(one) == inside.stage_digest(other)


def test_a_setting_that_is_changed_later_is_obeyed(tmp_path):
    inp, stage = pairs(4), Resumable(PatchHeads(toy_cross_encoder(), heads=['L0H0']), tmp_path)
    stage(inp)
    stage.stage.heads = ['L1H1']
    close(stage(inp), PatchHeads(toy_cross_encoder(), heads=['L1H1'])(inp))
    stage.folder = tmp_path / 'other'
    stage(inp)
    assert len(files(tmp_path)) == 2 and len(files(tmp_path / 'other')) == 1
