"""AblatedReranker and PatchedReranker against hooks on the unmodified module, one unpadded row at a time."""

import pickle

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from conftest import FAMILIES, QUERIES, TEXTS, minilm_path, toy_cross_encoder
from test_ablate import (
    activations,
    bi,
    cross,
    mean_values,
    means,
    other_values,
    projections,
    reference,
    rows,
    score,
    towers_of,
    zeros,
)
from test_patch_heads import inputs, pairs

from pyterrier_mech import BiEncoder, CrossEncoder, PatchHeads
from pyterrier_mech.inputs.alignment import Aligner
from pyterrier_mech.patch import AblatedReranker, AblateHeads, PatchedReranker, Units

UNITS = ['L0H1', 'L1H0', 'L1H3', 'L0N3', 'L0N40', 'L1N7']
PLACES = {
    ('heads', 0): [*range(8, 16)],
    ('heads', 1): [*range(8), *range(24, 32)],
    ('neurons', 0): [3, 40],
    ('neurons', 1): [7],
}


def expected_scores(model, frame, values_of):
    """Scores with all of `UNITS` replaced together; `values_of` (towers, site) gives the values of a site."""
    result = []
    for row in frame.itertuples():
        towers = towers_of(model, row.query, row.text)
        result.append(score(model, towers, {site: (at, values_of(towers, site)) for site, at in PLACES.items()}))
    return result


def cases(model):
    averages, others = means(model, reference()), towers_of(model, *reference().iloc[1])
    return {
        'zero': (None, zeros(model)),
        'mean': (reference(), lambda towers, site: mean_values(towers, averages, site)),
        'resample': (reference().iloc[1:2], lambda towers, site: other_values(model, towers, others, site)),
    }


@pytest.mark.parametrize('family', FAMILIES)
def test_ablated_scores_equal_the_oracle_in_every_family(family):
    model, frame = cross(family), rows().iloc[::2]
    before = model.score(list(frame['query']), list(frame['text']))
    for value, (given, values_of) in cases(model).items():
        res = AblatedReranker(model, UNITS, value=value, reference=given)(frame)
        assert np.abs(res.score - before).max() > 1e-3
        np.testing.assert_allclose(res.score, expected_scores(model, frame, values_of), atol=1e-10, rtol=0)


@pytest.mark.parametrize('family', ['bert', 'distilbert', 'modernbert', 'deberta-v2'])
@pytest.mark.parametrize('pooling', ['cls', 'mean'])
def test_ablated_scores_of_a_bi_encoder_equal_the_oracle(family, pooling):
    model, frame = bi(family, pooling), rows().iloc[::2]
    for value, (given, values_of) in cases(model).items():
        res = AblatedReranker(model, UNITS, value=value, reference=given)(frame)
        np.testing.assert_allclose(res.score, expected_scores(model, frame, values_of), atol=1e-10, rtol=0)


@pytest.mark.parametrize('family', FAMILIES)
def test_zero_equals_zeroing_the_weights(family):
    model, frame = toy_cross_encoder(family), rows()
    res = AblatedReranker(model, UNITS)(frame)
    kept = {name: value.clone() for name, value in model.model.state_dict().items()}
    with torch.no_grad():
        for site, columns in PLACES.items():
            projections(model.model)[site].weight[:, columns] = 0
    expected = model.score(list(frame['query']), list(frame['text']))
    model.model.load_state_dict(kept)
    np.testing.assert_allclose(res.score, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize('value', ['zero', 'mean', 'resample'])
@pytest.mark.parametrize('make', [cross, bi])
def test_one_head_equals_ablate_heads(value, make):
    model, frame = make('bert'), rows()
    effects = AblateHeads(model, value, reference=reference(), seed=2)(frame)
    res = AblatedReranker(model, ['L1H2'], value=value, reference=reference(), seed=2)(frame)
    np.testing.assert_allclose(res.score, effects.score_original + effects['L1H2'], atol=1e-12)


@pytest.mark.parametrize('value', ['zero', 'mean', 'resample'])
def test_ablating_nothing_is_the_model(value):
    model = cross('roberta')
    res = AblatedReranker(model, [], value=value, reference=reference())(rows())
    pd.testing.assert_frame_equal(res, model(rows()))


def test_a_row_resampled_from_itself_keeps_its_score():
    model, frame = cross('bert'), rows().iloc[3:4]
    res = AblatedReranker(model, Units.all(model), value='resample', reference=frame)(frame)
    np.testing.assert_allclose(res.score, model(frame).score, atol=1e-12)


def test_everything_zeroed_leaves_the_first_token_which_is_the_same_in_every_text():
    model = cross('distilbert')
    assert model(rows()).score.std() > 1e-3
    assert AblatedReranker(model, Units.all(model))(rows()).score.std() < 1e-12


@pytest.mark.parametrize('value', ['mean', 'resample'])
@pytest.mark.parametrize('make', [cross, bi])
def test_row_order_batches_and_neighbours_do_not_matter(value, make):
    frame = rows()
    expected = AblatedReranker(make('bert'), UNITS, value=value, reference=reference())(frame).score
    small = AblatedReranker(make('bert', batch_tokens=40), UNITS, value=value, reference=reference().iloc[::-1])
    shuffled = small(frame.sample(frac=1, random_state=3)).sort_index()
    np.testing.assert_allclose(shuffled.score, expected, atol=1e-12)
    single = [small(frame.iloc[i : i + 1]).score.iloc[0] for i in range(8)]
    np.testing.assert_allclose(single, expected, atol=1e-12)


def test_scores_are_ranked_and_the_seed_decides_the_draw():
    model, inp = cross('bert'), rows().assign(extra='kept')
    stages = [AblatedReranker(model, UNITS, value='resample', reference=reference(), seed=seed) for seed in (0, 0, 1)]
    kept, results = inp.copy(), [stage(inp) for stage in stages]
    pd.testing.assert_frame_equal(inp, kept)
    pd.testing.assert_frame_equal(results[0], results[1])
    assert np.abs(results[0].score - results[2].score).max() > 1e-6
    res = results[0]
    pd.testing.assert_frame_equal(
        res[['qid', 'query', 'docno', 'text', 'extra']], inp[['qid', 'query', 'docno', 'text', 'extra']]
    )
    for _, group in res.groupby('qid'):
        assert list(group.sort_values('score', ascending=False)['rank']) == [0, 1, 2, 3]
    np.testing.assert_array_equal(stages[0].score(list(inp['query']), list(inp['text'])), res.score)


def test_float32_models_give_float32():
    model, double = toy_cross_encoder('bert', dtype=torch.float32), cross('bert')
    for value in ('zero', 'mean', 'resample'):
        res = AblatedReranker(model, UNITS, value=value, reference=reference())(rows())
        assert res.score.dtype == np.float32
        exact = AblatedReranker(double, UNITS, value=value, reference=reference())(rows())
        np.testing.assert_allclose(res.score, exact.score, atol=1e-5)


def test_a_circuit_is_taken_by_its_units():
    class Circuit:
        units = Units.of(UNITS)

    model = cross('bert')
    pd.testing.assert_frame_equal(AblatedReranker(model, Circuit())(rows()), AblatedReranker(model, UNITS)(rows()))


@pytest.mark.parametrize(
    ('units', 'settings', 'kind', 'message'),
    [
        (['L0N48'], {}, ValueError, r'L0N48: .* has no neuron 48 in layer 0; it has \[48, 48\]'),
        (['L2H0'], {}, ValueError, 'has no head 0 in layer 2'),
        (['head'], {}, ValueError, "'head' does not name a head or a neuron"),
        (3, {}, TypeError, '3 names no heads and neurons'),
        ([], {'value': 'median'}, ValueError, "value='median' is none of"),
        ([], {'value': 'mean'}, ValueError, "value='mean' needs rows"),
        ([], {'value': 'mean', 'reference': 'all'}, TypeError, 'reference=str is no frame'),
        ([], {'value': 'resample', 'reference': reference().iloc[:0]}, ValueError, 'has no rows'),
    ],
)
def test_bad_input_of_the_ablated_reranker(units, settings, kind, message):
    stage = AblatedReranker(cross('bert'), units, **settings)
    with pytest.raises(kind, match=message):
        stage(rows())
    with pytest.raises(kind, match=message):
        stage.score(['rust'], ['bread'])


# -- patching


def patched_score(model, row, columns_of_site):
    """Both towers with the sites' columns taken from the perturbed run, by plain hooks."""
    aligner = Aligner(model.loaded.maker)
    bases, values = [], {site: (columns, []) for site, columns in columns_of_site.items()}
    query = model.tokenize('query', [row.query]).row(0)
    for fields in model.towers:
        versions = [{'query': row.query, 'text': text} for text in (row.text_0, row.text)]
        ids = [[model.tokenize(field, [version[field]]).row(0) for field in fields] for version in versions]
        alignment = aligner.align(*ids, fields, query=query)
        base, source = (inputs(model, alignment, side) for side in ('original', 'perturbed'))
        bases.append((base, None))
        seen = activations(model.model, source)
        for site in values:
            values[site][1].append(seen[site])
    return score(model, bases, values)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.filterwarnings('ignore:.*cannot be patched')
def test_patched_scores_equal_the_oracle_in_every_family(family):
    model = toy_cross_encoder(family, batch_tokens=300)
    res, plain = PatchedReranker(model, UNITS)(pairs()), PatchHeads(model, heads=[])(pairs())
    expected = [patched_score(model, row, PLACES) for row in res[res.patchable == 'yes'].itertuples()]
    np.testing.assert_allclose(res.score[res.patchable == 'yes'], expected, atol=1e-10, rtol=0)
    assert list(res.patchable) == list(plain.patchable) and (res.patchable == 'yes').sum() > 10
    rest = res.patchable != 'yes'
    np.testing.assert_allclose(res.score[rest], plain.score_original[rest], atol=1e-12)


@pytest.mark.parametrize('pooling', ['cls', 'mean'])
@pytest.mark.filterwarnings('ignore:.*cannot be patched')
def test_patched_scores_of_a_bi_encoder_equal_the_oracle(pooling):
    model = bi('bert', pooling)
    res = PatchedReranker(model, UNITS)(pairs())
    good = res[res.patchable == 'yes']
    expected = [patched_score(model, row, PLACES) for row in good.itertuples()]
    assert len(good) > 10
    np.testing.assert_allclose(good.score, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize('filler', ['a', 'mask'])
@pytest.mark.parametrize('make', [cross, bi])
@pytest.mark.filterwarnings('ignore:.*cannot be patched')
def test_no_head_and_one_head_equal_patch_heads(filler, make):
    model = make('bert')
    effects = PatchHeads(model, filler=filler)(pairs())
    none, one = (PatchedReranker(model, heads, filler=filler)(pairs()) for heads in ([], [(1, 2)]))
    np.testing.assert_allclose(none.score, effects.score_original, atol=1e-12)
    expected = effects.score_original + effects['L1H2'].fillna(0)
    np.testing.assert_allclose(one.score, expected, atol=1e-12)


def test_patching_all_neurons_and_heads_leaves_the_embeddings_alone():
    """The residual stream still begins with the original's tokens: not the perturbed score, but close to neither."""
    model, frame = cross('bert'), pairs().iloc[:1]
    plain = PatchHeads(model, heads=[])(frame).iloc[0]
    row = PatchedReranker(model, Units.all(model))(frame).iloc[0]
    everywhere = {(kind, layer): slice(None) for kind in ('heads', 'neurons') for layer in (0, 1)}
    assert row.score == pytest.approx(patched_score(model, row, everywhere), abs=1e-10)
    assert abs(row.score - plain.score_original) > 1e-6


def test_unpatchable_rows_keep_the_score_of_the_original_and_are_counted_once():
    model, frame = toy_cross_encoder('bert', max_length=24), pairs().iloc[:4].copy()
    long = 'rust ' * 40
    frame['text_0'] = ['same text', long, 'rust keeps', 'rust']
    frame['text'] = ['same text', long + 'bread', 'bread dough winter', 'rust bread']
    with pytest.warns(UserWarning, match=r'3 of 4 pairs cannot be patched \(.*nothing changed: 1') as warned:
        res = PatchedReranker(model, ['L0H0'])(frame)
    assert len([warning for warning in warned if warning.category is UserWarning]) == 1
    assert list(res.patchable) == ['nothing changed', 'edit truncated away', 'no alignment', 'yes']
    expected = model.score(list(frame['query']), list(frame.text_0))
    np.testing.assert_allclose(res.score[:3], expected[:3], atol=1e-12)


@pytest.mark.filterwarnings('ignore:.*cannot be patched')
def test_an_edited_query_and_the_frame():
    model, inp = cross('bert'), pairs().assign(extra='kept').rename(columns={'text_0': 'gone'})
    inp = inp.assign(query_0=inp['query'], query=inp['query'] + ' rust')
    kept, res = inp.copy(), PatchedReranker(model, ['L1H2'])(inp)
    pd.testing.assert_frame_equal(inp, kept)
    same = [column for column in inp.columns if column not in ('score', 'rank')]
    pd.testing.assert_frame_equal(res[same], inp[same])
    assert set(res.columns) - set(inp.columns) == {'patchable'} and (res.patchable == 'yes').all()
    effects = PatchHeads(model, heads=['L1H2'])(inp)
    np.testing.assert_allclose(res.score, effects.score_original + effects['L1H2'], atol=1e-12)
    assert sorted(res[res.qid == '0']['rank']) == [0, 1, 2, 3]


def test_bad_input_of_the_patched_reranker():
    model = cross('bert')
    with pytest.raises(KeyError, match=r'Perturb\(\.\.\.\)'):
        PatchedReranker(model, [])(rows())
    with pytest.raises(ValueError, match='has no head 9 in layer 0'):
        PatchedReranker(model, ['L0H9'])(pairs())
    with pytest.raises(ValueError, match='use a single token'):
        PatchedReranker(model, [], filler='two words')(pairs())
    with pytest.raises(ValueError, match="no string in column 'text_0' \\(qid='0' docno='2'"):
        PatchedReranker(model, [])(pairs().assign(text_0=lambda f: f['text_0'].where(f.docno != '2', None)))


# -- both


def stages():
    model = BiEncoder(minilm_path())
    return [
        AblatedReranker(model, ['L0H1', (2, 3), 'L1N9']),
        AblatedReranker(model, Units.of(['L0H1']), value='resample', reference=reference(), seed=4),
        AblatedReranker(model, ['L0H1'], value='resample', reference=reference()),
        AblatedReranker(model, ['L0H1'], value='mean', reference=reference()),
        PatchedReranker(model, ['L0H1']),
        PatchedReranker(model, ['L0H2'], filler='mask'),
        PatchedReranker(model, ['L0H2'], filler=None, text_field='body'),
    ]


def test_equality_and_repr():
    assert len(set(stages())) == len(stages()) and stages() == stages()
    model = BiEncoder(minilm_path())
    assert stages()[0] == AblatedReranker(model, ['L1N9', 'L2H3', 'L0H1']) != PatchedReranker(model, ['L0H1'])
    for stage in (stages()[0], *stages()[4:]):
        assert eval(repr(stage)) == stage and hash(eval(repr(stage))) == hash(stage)
    assert '<DataFrame of 5 rows>' in repr(stages()[1]) and 'seed=4' in repr(stages()[1])


@pytest.mark.parametrize('stage', stages(), ids=repr)
def test_label_parts_and_cutoff(stage):
    assert stage.schematic == {'label': type(stage).__name__, 'help_url': None} and len(stage.schematic['label']) <= 20
    assert stage.subtransformers() == {} and not hasattr(stage, 'fuse_rank_cutoff')


def test_zero_rows_give_the_columns_without_loading_weights():
    model = CrossEncoder(minilm_path())
    frames = [rows().iloc[:0], pairs().iloc[:0]]
    for stage, frame in zip([AblatedReranker(model, UNITS), PatchedReranker(model, UNITS)], frames):
        res = stage(frame)
        assert len(res) == 0 and {'score', 'rank'} <= set(res.columns) and res['score'].dtype.kind == 'f'
    assert 'patchable' in res.columns and model._loaded is None


@pytest.mark.filterwarnings('ignore:.*cannot be patched')
def test_hooks_are_gone_after_an_exception_and_the_model_is_as_before():
    model = cross('bert')
    before = model.score(QUERIES, TEXTS)
    handle = model.model.bert.encoder.layer[0].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError('boom')))
    for value in ('zero', 'mean', 'resample'):
        with pytest.raises(KeyError, match='boom'):
            AblatedReranker(model, UNITS, value=value, reference=reference())(rows())
    with pytest.raises(KeyError, match='boom'):
        PatchedReranker(model, UNITS)(pairs())
    handle.remove()
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.model.modules())
    np.testing.assert_array_equal(model.score(QUERIES, TEXTS), before)


def test_pickles_without_reference_values():
    stage = AblatedReranker(cross('bert'), UNITS, value='mean', reference=reference())
    res = stage(rows())
    copy = pickle.loads(pickle.dumps(stage))
    assert stage._replacement is not None and copy._replacement is None
    pd.testing.assert_frame_equal(copy(rows()), res)


def test_an_experiment_compares_interventions():
    model, frame = cross('bert'), rows()
    topics = frame[['qid', 'query']].drop_duplicates()
    qrels = pd.DataFrame({'qid': ['0', '1'], 'docno': ['3', '4'], 'label': 1})
    systems = [model, AblatedReranker(model, []), AblatedReranker(model, Units.of([f'L1H{i}' for i in range(4)]))]
    systems = [pt.Transformer.from_df(frame) >> system for system in systems]
    res = pt.Experiment(systems, topics, qrels, ['recip_rank'], names=['model', 'nothing', 'heads'], plan='tree')
    assert res.recip_rank[0] == res.recip_rank[1]


class TestAblatedReranker(pt.testing.transformer_test_class(lambda: AblatedReranker(cross('bert'), UNITS))):
    pass


class TestPatchedReranker(pt.testing.transformer_test_class(lambda: PatchedReranker(bi('bert'), UNITS))):
    pass
