"""What every stage keeps: one table of stages, one check a habit. A new stage adds one line."""

import inspect
import pickle

import inside
import pandas as pd
import pyterrier as pt
import pytest
from stages import OF_MODELS, STAGES, WITH_UNITS, close, cross, new_columns, plain, reverse  # noqa: F401
from toys import minilm_path, toy_module

from pyterrier_mech import *  # noqa: F403
from pyterrier_mech import Circuit, PrunedReranker, Units
from pyterrier_mech.prune import Random
from pyterrier_mech.rankers import Ranker

pytestmark = pytest.mark.filterwarnings('ignore:.*cannot be patched', 'ignore:.*rows unchanged')

each = pytest.mark.parametrize('name', STAGES)
each_of_models = pytest.mark.parametrize('name', OF_MODELS)


# -- rows


@each
def test_one_row_in_one_row_out_and_nothing_else_changes(name, module):
    make, frame, keeps_ranking = STAGES[name]
    inp = frame().assign(extra=range(6), score=0.5, rank=7).sample(frac=1, random_state=5)
    inp.index = [3, 1, 4, 4, 5, 9]
    inp.attrs['note'] = 'kept'
    before, res = inp.copy(deep=True), make(module)(inp)
    pd.testing.assert_frame_equal(inp, before)
    assert inp.attrs == {'note': 'kept'} and res.attrs['note'] == 'kept'
    edited = {'Perturb': {'text'}, 'Perturb of queries': {'query'}}.get(name, set())
    written = edited if keeps_ranking else {'score', 'rank'}
    kept = [column for column in inp.columns if column not in written]
    pd.testing.assert_frame_equal(res[kept], inp[kept])
    assert list(res.index) == list(inp.index) and res.columns.is_unique
    assert (new_columns(res, inp) != []) == (keeps_ranking or name == 'PatchedReranker')
    if not keeps_ranking:
        for _, group in res.groupby('qid'):
            assert list(group.sort_values('score', ascending=False)['rank']) == list(range(len(group)))


@each
def test_zero_rows_give_the_same_columns(name, module):
    make, frame, _ = STAGES[name]
    stage = make(module)
    res, empty = stage(frame()), stage(frame().iloc[:0])
    assert list(empty.columns) == list(res.columns) and len(empty) == 0
    for column in new_columns(res, frame()):
        assert (empty[column].dtype.kind == 'f') == (res[column].dtype.kind == 'f'), column


@pytest.mark.parametrize('name', [name for name in OF_MODELS if name != 'PrunedReranker'])
def test_zero_rows_load_no_weights(name):
    make, frame, _ = STAGES[name]
    stage = make(minilm_path(), **({WITH_UNITS[name][0]: ['L0H0']} if name in WITH_UNITS else {}))
    stage(frame().iloc[:0])
    assert not inside.is_loaded(stage if isinstance(stage, Ranker) else stage.model)


@each
def test_duplicates_neighbours_order_and_batches_do_not_matter(name, module):
    make, frame, _ = STAGES[name]
    stage, inp = make(module), frame()
    res = stage(inp).drop(columns='rank', errors='ignore')
    mixed = inp.iloc[[5, 2, 2, 0, 4, 1, 3]].reset_index(drop=True)
    expected = res.iloc[[5, 2, 2, 0, 4, 1, 3]].reset_index(drop=True)
    close(stage(mixed).drop(columns='rank', errors='ignore'), expected)
    for row in (1, 4):
        close(stage(inp.iloc[[row]]).drop(columns='rank', errors='ignore'), res.iloc[[row]])
    if 'batch_tokens' in inspect.signature(type(stage)).parameters:
        for tokens in (1, 150):
            close(make(module, batch_tokens=tokens)(inp).drop(columns='rank', errors='ignore'), res)


@each
def test_a_cutoff_goes_before_stages_that_keep_the_ranking_alone(name, module):
    make, frame, keeps_ranking = STAGES[name]
    stage = make(module)
    assert hasattr(stage, 'fuse_rank_cutoff') == keeps_ranking
    if keeps_ranking:
        assert stage.fuse_rank_cutoff(2) == pt.RankCutoff(2) >> stage
        assert (stage % 2).compile()[1] == stage


# -- bad frames


@each
@pytest.mark.parametrize('value', [None, float('nan'), 3])
def test_null_texts_name_the_row(name, value, module):
    make, frame, _ = STAGES[name]
    stage = make(module)
    for column in [column for column in ('query', 'text', 'text_0') if column in frame()]:
        inp = frame().astype({column: object})
        inp.loc[2, column] = value
        with pytest.raises(ValueError, match=rf"1 of 6 rows .*{column!r} \(qid='0' docno='2'"):
            stage(inp)


@each
def test_missing_columns_say_what_to_put_before(name):
    make, frame, _ = STAGES[name]
    ways = {'query': 'topics', 'text': 'text_loader', 'text_0': r'Perturb\(\.\.\.\)'}
    # The model is not there, so nothing may be done before the check.
    stage = make('nowhere/at-all')
    for column in [column for column in ways if column in frame()]:
        for inp in (frame(), frame().iloc[:0]):
            with pytest.raises(pt.validate.InputValidationError, match=ways[column]):
                stage(inp.drop(columns=column))
    with pytest.raises(pt.validate.InputValidationError):
        stage(frame().drop(columns='docno'))


# -- values


@each
def test_equal_stages_are_equal_and_rebuilt_by_their_repr(name, module):
    make, _, _ = STAGES[name]
    for model in ('some/name', module):
        stage, same = make(model), make(model)
        if model is module and name == 'PrunedReranker':
            continue
        assert stage == same and hash(stage) == hash(same) and stage != object()
        for setting in ('verbose', 'batch_tokens'):
            if setting in inspect.signature(type(stage)).parameters:
                assert make(model, **{setting: 7}) == stage and hash(make(model, **{setting: 7})) == hash(stage)
        assert make(model, text_field='body') != stage
        if name in OF_MODELS:
            assert make('other/name') != stage and make(toy_module('bert', seed=1)[0]) != stage
    stage = make('some/name', text_field='body')
    if 'DataFrame' not in repr(stage):
        rebuilt = eval(repr(stage))
        assert rebuilt == stage and hash(rebuilt) == hash(stage) and repr(rebuilt) == repr(stage)


def test_no_two_stages_are_equal(module):
    stages = [make(module) for make, _, _ in STAGES.values()]
    assert len(set(stages)) == len(stages)


@each
def test_pickled_stages_give_the_same(name, module):
    make, frame, _ = STAGES[name]
    stage = make(module)
    expected = stage(frame())
    close(pickle.loads(pickle.dumps(stage))(frame()), expected, atol=1e-12)
    named = make('some/name')
    assert pickle.loads(pickle.dumps(named)) == named and len(pickle.dumps(named)) < 20_000


@each
def test_another_text_field(name, module):
    make, frame, _ = STAGES[name]
    renamed = {'text': 'body', 'text_0': 'body_0'}
    if 'DataFrame' in repr(make('some/name')):
        pytest.skip('the reference frame has the field too: see the tests of AblateHeads')
    settings = {'text_field': 'body'}
    if name == 'PrunedReranker':
        stage = PrunedReranker(cross(module), Random(), 0.3, recovery=(), multiple=8, **settings)
        stage.fit(plain().rename(columns=renamed))
    else:
        stage = make(module, **settings)
    expected = make(module)(frame()).rename(columns=renamed).replace({'edited': {'text': 'body'}})
    close(stage(frame().rename(columns=renamed)), expected)


# -- units


class HasUnits:
    def __init__(self, units):
        self.units = units


@pytest.mark.parametrize('form', ['tuples', 'Units', 'circuit', 'mapping', 'has units', 'iterator'])
@pytest.mark.parametrize('name', WITH_UNITS)
def test_names_tuples_units_and_circuits_are_taken_alike(name, form, module):
    make, frame, _ = STAGES[name]
    setting, with_neurons = WITH_UNITS[name]
    heads, neurons = ['L1H3', 'L0H1'], ['L0N5'] if with_neurons else []
    given = {
        'tuples': [(1, 3), (0, 1), *neurons],
        'Units': Units.of(heads + neurons),
        'circuit': Circuit.from_units(heads + neurons),
        'mapping': {'heads': heads, 'neurons': neurons},
        'has units': HasUnits(Units.of(heads + neurons)),
        'iterator': tuple(heads + neurons),
    }[form]
    plain_stage, stage = make(module, **{setting: heads + neurons}), make(module, **{setting: given})
    expected = plain_stage(frame())
    close(stage(frame()), expected)
    close(stage(frame()), expected)  # nothing was used up
    if name != 'PrunedReranker' and form != 'has units':
        assert stage == plain_stage and hash(stage) == hash(plain_stage)


@pytest.mark.parametrize('unit', ['L7H0', 'L0H4'])
@pytest.mark.parametrize('name', WITH_UNITS)
def test_a_unit_that_the_model_has_not_is_named(name, unit, module):
    make, frame, _ = STAGES[name]
    with pytest.raises(ValueError, match=f'{unit}: .* does not have it'):
        make(module, **{WITH_UNITS[name][0]: ['L0H0', unit]})(frame())


# -- PyTerrier's own battery


@each
def test_what_pyterrier_tests(name, module):
    case = pt.testing.transformer_test_class(lambda: STAGES[name][0](module))
    case.setUpClass()
    for method in [method for method in dir(case) if method.startswith('test_')]:
        outcome = case(method).run()
        assert outcome is not None and outcome.wasSuccessful(), outcome
    case.tearDownClass()


@each
def test_how_it_is_drawn(name, module):
    stage = STAGES[name][0](module)
    assert stage.subtransformers() == {}
    assert stage.schematic['help_url'] is None and len(stage.schematic['label']) <= 20
    assert stage.schematic['label'] == {'Perturb': 'Perturb TFC1', 'Perturb of queries': 'Perturb reverse'}.get(
        name, type(stage).__name__
    )
