"""The loop behind the recoveries that train: groups, early stopping, and checkpoints that survive a kill."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import toy_cross_encoder
from test_distillation import FAST, data, pruned, same, trained, weights

from pyterrier_mech.prune import Distillation, FineTuning
from pyterrier_mech.prune.data import FitData
from pyterrier_mech.prune.recovery.training import Schedule, groups, train

LONG = {**FAST, 'epochs': 4, 'validations': 2, 'patience': 9}
TRAIN, VALIDATION = data([0, 1, 2], range(5)), data([3], range(6))


class Killed(BaseException):
    pass


# -- groups


def rows_of(counts):
    rows = [(f'q{i}', 'query', f'd{j}', f'text {j}') for i, count in enumerate(counts) for j in range(count)]
    return FitData(pd.DataFrame(rows, columns=['qid', 'query', 'docno', 'text']))


@pytest.mark.parametrize('size', [2, 3, 4, 8])
def test_every_row_is_in_one_group_of_its_query(size):
    fit = rows_of([1, 2, 3, 4, 5, 9, 17, 1, 8])
    for epoch in range(3):
        made = groups(fit, size, 0, epoch)
        qids = fit.frame['qid']
        assert all(qids.iloc[group].nunique() == 1 for group in made)
        assert {len(group) for group in made} <= set(range(2, max(size, 3) + 1))
        expected = np.flatnonzero(qids.duplicated(keep=False))
        assert sorted(np.concatenate(made)) == expected.tolist()
        for _, sizes in pd.Series(list(map(len, made))).groupby([qids.iloc[group[0]] for group in made]):
            assert sizes.max() - sizes.min() <= 1


def named(fit, *args):
    return [[tuple(fit.frame.loc[fit.frame.index[i], ['qid', 'docno']]) for i in group] for group in groups(fit, *args)]


def test_groups_differ_by_epoch_and_seed_not_by_order():
    fit = rows_of([5, 9, 17, 1, 8])
    mixed = FitData(fit.frame.sample(frac=1, random_state=1))
    assert named(fit, 4, 0, 0) == named(mixed, 4, 0, 0)
    for other in ((4, 0, 1), (4, 1, 0)):
        assert named(fit, *other) != named(fit, 4, 0, 0)


# -- early stopping


def run(values, **settings):
    """Trains with a validation that says given values; returns the history, and the weights at each validation."""
    schedule = {**FAST, 'patience': 2, 'validations': 1, 'seed': 0, 'checkpoint': None, 'checkpoint_every': 1}
    student = pruned(toy_cross_encoder('bert'))
    seen, said = [], iter(values)

    def loss(rows, group):
        found = student.tokenizer(['a'] * len(rows), return_tensors='pt')
        return student.model(**found).logits.sum()

    def validate():
        assert not torch.is_grad_enabled()
        seen.append(weights(student))
        return next(said)

    history = train(student, data(), loss, validate, Schedule(**{**schedule, **settings}))
    return history, seen, weights(student)


@pytest.mark.parametrize(
    'values, patience, validated, best',
    [
        ([3, 1, 2, 1, 0, 0], 2, 4, 1),
        ([3, 1, 2, 0.5, 1, 1], 2, 6, 3),
        ([5, 4, 3, 2, 1, 0, -1], 1, 7, 6),
        ([1, 2, 0, 0, 0, 0], 1, 2, 0),
        ([1, float('nan'), 0.5, 2, float('nan'), 0], 2, 5, 2),
    ],
)
def test_the_best_validation_is_kept(values, patience, validated, best):
    history, seen, kept = run(values, epochs=6, patience=patience)
    np.testing.assert_array_equal(history['validation'], values[:validated])
    assert len(seen) == validated and history['step'].tolist() == [2 * i for i in range(validated)]
    assert same(kept, seen[best]) and not any(same(kept, other) for i, other in enumerate(seen) if i != best)


def test_too_large_steps_do_not_win():
    settings = {**FAST, 'epochs': 8, 'learning_rate': 0.05, 'patience': 3, 'hidden': 1.0}
    after, history = trained(Distillation(**settings), TRAIN, VALIDATION)
    worst, best = history['validation'].iloc[-1], history['validation'].min()
    assert worst > best and history['validation'].iloc[-4:].min() >= best
    assert len(history) < 8 and history['validation'].idxmin() == len(history) - 4
    last = trained(Distillation(**{**settings, 'patience': 100}), TRAIN)[0]
    assert not same(after, last)


@pytest.mark.parametrize('validations, steps', [(1, [0, 2, 4]), (2, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])])
def test_how_often_is_validated(validations, steps):
    assert run([1.0] * 5, validations=validations, patience=9)[0]['step'].tolist() == steps


# -- checkpoints

RECOVERIES = [Distillation, FineTuning]
each = pytest.mark.parametrize('kind', RECOVERIES)


def killed_at(call, monkeypatch):
    """Has the n-th step of the optimiser, counted over all runs, end the process."""
    step, count = torch.optim.AdamW.step, iter(range(1000))

    def die(self, *args, **kwargs):
        if next(count) == call:
            raise Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, 'step', die)


@each
@pytest.mark.parametrize('every, call', [(1, 5), (2, 7), (1, 10), (2, 1)])
def test_a_killed_run_goes_on(kind, every, call, tmp_path, monkeypatch):
    expected, history = trained(kind(**LONG), TRAIN, VALIDATION)
    path = tmp_path / 'not' / 'there' / 'progress.pt'
    recovery = kind(**LONG, checkpoint=str(path), checkpoint_every=every)
    with monkeypatch.context() as patch:
        killed_at(call, patch)
        with pytest.raises(Killed):
            trained(recovery, TRAIN, VALIDATION)
    assert path.exists() == (call >= every)
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, 'step', lambda *args: steps.append(1) or step(*args))
    found, again = trained(recovery, TRAIN, VALIDATION)
    assert same(found, expected) and again.equals(history)
    assert len(steps) == history['step'].iloc[-1] - call // every * every
    assert list(path.parent.iterdir()) == []


@each
def test_a_run_killed_again_and_again_stops_where_it_would_have(kind, tmp_path, monkeypatch):
    settings = {**LONG, 'learning_rate': 0.05, 'patience': 2, 'epochs': 8}
    expected, history = trained(kind(**settings), TRAIN, VALIDATION)
    assert len(history) < 16
    recovery, deaths = kind(**settings, checkpoint=str(tmp_path / 'c'), checkpoint_every=1), 0
    for _ in range(40):
        try:
            with monkeypatch.context() as patch:
                killed_at(1, patch)
                found, again = trained(recovery, TRAIN, VALIDATION)
            break
        except Killed:
            deaths += 1
    assert deaths >= 2 and same(found, expected) and again.equals(history)


def test_killed_in_validation_and_between_two_writes(tmp_path, monkeypatch):
    expected, history = trained(Distillation(**LONG), TRAIN, VALIDATION)
    recovery = Distillation(**LONG, checkpoint=str(tmp_path / 'c'), checkpoint_every=3)
    score, calls = type(toy_cross_encoder()).score, iter(range(100))

    def die(self, queries, texts):
        # Two calls for the teacher's scores, then one a validation.
        if next(calls) == 5:
            raise Killed
        return score(self, queries, texts)

    with monkeypatch.context() as patch:
        patch.setattr(type(toy_cross_encoder()), 'score', die)
        with pytest.raises(Killed):
            trained(recovery, TRAIN, VALIDATION)
    found, again = trained(recovery, TRAIN, VALIDATION)
    assert same(found, expected) and again.equals(history)


def test_a_half_written_checkpoint_replaces_none(tmp_path, monkeypatch):
    expected, _ = trained(Distillation(**LONG), TRAIN, VALIDATION)
    path = tmp_path / 'c'
    recovery = Distillation(**LONG, checkpoint=str(path), checkpoint_every=2)
    save, calls, good = torch.save, iter(range(100)), []

    def half(state, file):
        if next(calls) == 1:
            good.append(path.read_bytes())
            file.write(b'half of it')
            raise OSError('no space left')
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, 'save', half)
        with pytest.raises(OSError, match='no space'):
            trained(recovery, TRAIN, VALIDATION)
    assert path.read_bytes() == good[0] and list(tmp_path.iterdir()) == [path]
    assert same(trained(recovery, TRAIN, VALIDATION)[0], expected)


@pytest.fixture
def left(tmp_path, monkeypatch):
    """A checkpoint after two steps."""
    path = tmp_path / 'c'
    with monkeypatch.context() as patch:
        killed_at(3, patch)
        with pytest.raises(Killed):
            trained(Distillation(**LONG, checkpoint=str(path), checkpoint_every=2), TRAIN, VALIDATION)
    return path


@pytest.mark.parametrize(
    'settings, fit, validation',
    [
        ({'seed': 1}, TRAIN, VALIDATION),
        ({'hidden': 0.5}, TRAIN, VALIDATION),
        ({'patience': 8}, TRAIN, VALIDATION),
        ({}, data([0, 1, 2], range(4)), VALIDATION),
        ({}, TRAIN, data([3], range(5))),
        ({}, TRAIN, None),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(left, settings, fit, validation):
    content = left.read_bytes()
    with pytest.raises(ValueError, match=r'another run .* give another file, or delete it'):
        trained(Distillation(**{**LONG, **settings}, checkpoint=str(left)), fit, validation)
    assert left.read_bytes() == content


def test_a_checkpoint_of_another_model_is_refused(left):
    teacher = toy_cross_encoder('bert', max_length=20)
    with pytest.raises(ValueError, match='another run'):
        Distillation(**LONG, checkpoint=str(left)).recover(pruned(teacher), teacher, TRAIN, VALIDATION)


def test_where_and_how_often_is_written_may_change(left):
    mixed = FitData(TRAIN.frame.sample(frac=1, random_state=2).reset_index(drop=True), TRAIN.qrels)
    moved = left.rename(left.with_name('moved'))
    found, _ = trained(Distillation(**LONG, checkpoint=str(moved), checkpoint_every=5), mixed, VALIDATION)
    assert same(found, trained(Distillation(**LONG), TRAIN, VALIDATION)[0]) and not moved.exists()


@pytest.mark.parametrize('content', [b'', b'notes of mine', b'PK\x03\x04 and no more', b'\x80\x02}q\x00.'])
def test_other_files_are_no_checkpoints(tmp_path, content):
    path = tmp_path / 'c'
    path.write_bytes(content)
    with pytest.raises(ValueError, match='is no checkpoint'):
        trained(Distillation(**LONG, checkpoint=str(path)), TRAIN)
    assert path.read_bytes() == content


# -- what goes wrong, and what is shown


def broken(value, gradient):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.full((), value, dtype=x.dtype)

        @staticmethod
        def backward(ctx, out):
            return out.new_full((1,), gradient)

    return Broken.apply


@pytest.mark.parametrize('value, gradient', [(np.nan, 1.0), (np.inf, 1.0), (1.0, np.nan)])
def test_losses_that_are_not_finite(value, gradient):
    student = pruned(toy_cross_encoder('bert'))
    before = weights(student)
    schedule = Schedule(**FAST, patience=1, validations=1, seed=0, checkpoint=None, checkpoint_every=1)
    with pytest.raises(ValueError, match=r'at step 0 .* learning_rate smaller than 0.003'):
        train(student, data(), lambda *_: broken(value, gradient)(student.model.classifier.bias), None, schedule)
    assert same(weights(student), before) and all(p.grad is None for p in student.model.parameters())


@each
def test_progress_is_shown_if_the_ranker_is_verbose(kind, capsys):
    teacher = toy_cross_encoder('bert')
    student = pruned(teacher)
    kind(**FAST).recover(student, teacher, data())
    assert capsys.readouterr().err == ''
    student.verbose = True
    kind(**FAST).recover(student, teacher, data())
    assert f'{kind.__name__}: 100%' in capsys.readouterr().err
