"""Checkpoints of trainings that survive a kill."""

import pytest
import torch
from fits import FAST, close_weights, data, mixed, pruned, same_history, trained, trained_once
from toys import toy_cross_encoder

from pyterrier_mech import CrossEncoder
from pyterrier_mech.prune import Distillation, FineTuning

LONG = {**FAST, 'epochs': 4, 'validations': 2, 'patience': 9}
TRAIN, VALIDATION = data([0, 1, 2], range(5)), data([3], range(6))

each = pytest.mark.parametrize('kind', [Distillation, FineTuning])


class Killed(BaseException):
    pass


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
    expected, history = trained_once(kind(**LONG), TRAIN, VALIDATION)
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
    assert close_weights(found, expected) and same_history(again, history)
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
    assert deaths >= 2 and close_weights(found, expected) and same_history(again, history)


def test_killed_in_validation_and_between_two_writes(tmp_path, monkeypatch):
    expected, history = trained_once(Distillation(**LONG), TRAIN, VALIDATION)
    recovery = Distillation(**LONG, checkpoint=str(tmp_path / 'c'), checkpoint_every=3)
    score, calls = CrossEncoder.score, iter(range(100))

    def die(self, queries, texts):
        # Two calls for the teacher's scores, then one a validation.
        if next(calls) == 5:
            raise Killed
        return score(self, queries, texts)

    with monkeypatch.context() as patch:
        patch.setattr(CrossEncoder, 'score', die)
        with pytest.raises(Killed):
            trained(recovery, TRAIN, VALIDATION)
    found, again = trained(recovery, TRAIN, VALIDATION)
    assert close_weights(found, expected) and same_history(again, history)


def test_a_half_written_checkpoint_replaces_none(tmp_path, monkeypatch):
    expected, _ = trained_once(Distillation(**LONG), TRAIN, VALIDATION)
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
    assert close_weights(trained(recovery, TRAIN, VALIDATION)[0], expected)


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
    moved = left.rename(left.with_name('moved'))
    found, _ = trained(Distillation(**LONG, checkpoint=str(moved), checkpoint_every=5), mixed(TRAIN), VALIDATION)
    assert close_weights(found, trained_once(Distillation(**LONG), TRAIN, VALIDATION)[0]) and not moved.exists()


@pytest.mark.parametrize('content', [b'', b'notes of mine', b'PK\x03\x04 and no more', b'\x80\x02}q\x00.'])
def test_other_files_are_no_checkpoints(tmp_path, content):
    path = tmp_path / 'c'
    path.write_bytes(content)
    with pytest.raises(ValueError, match='checkpoint must be a file that training wrote, or none yet; got .*c'):
        trained(Distillation(**LONG, checkpoint=str(path)), TRAIN)
    assert path.read_bytes() == content
