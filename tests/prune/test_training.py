"""The loop behind the recoveries that train: groups, early stopping, and losses that are not finite."""

import numpy as np
import pandas as pd
import pytest
import torch
from fits import FAST, close_weights, data, pruned, trained
from inside import FitData, Schedule, groups, train
from toys import same_weights, toy_cross_encoder, weights

from pyterrier_mech.prune import Distillation, FineTuning

TRAIN, VALIDATION = data([0, 1, 2], range(5)), data([3], range(6))


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
    assert same_weights(kept, seen[best]) and not any(
        same_weights(kept, other) for i, other in enumerate(seen) if i != best
    )


def test_too_large_steps_do_not_win():
    settings = {**FAST, 'epochs': 8, 'learning_rate': 0.05, 'patience': 3, 'hidden': 1.0}
    after, history = trained(Distillation(**settings), TRAIN, VALIDATION)
    worst, best = history['validation'].iloc[-1], history['validation'].min()
    assert worst > best and history['validation'].iloc[-4:].min() >= best
    assert len(history) < 8 and history['validation'].idxmin() == len(history) - 4
    last = trained(Distillation(**{**settings, 'patience': 100}), TRAIN)[0]
    assert not close_weights(after, last, atol=1e-6)


@pytest.mark.parametrize('validations, steps', [(1, [0, 2, 4]), (2, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])])
def test_how_often_is_validated(validations, steps):
    assert run([1.0] * 5, validations=validations, patience=9)[0]['step'].tolist() == steps


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
    assert same_weights(weights(student), before) and all(p.grad is None for p in student.model.parameters())


@pytest.mark.parametrize('kind', [Distillation, FineTuning])
def test_progress_is_shown_if_the_ranker_is_verbose(kind, capsys):
    teacher = toy_cross_encoder('bert')
    student = pruned(teacher)
    kind(**FAST).recover(student, teacher, data())
    assert capsys.readouterr().err == ''
    student.verbose = True
    kind(**FAST).recover(student, teacher, data())
    assert f'{kind.__name__}: 100%' in capsys.readouterr().err
