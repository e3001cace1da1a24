"""What every stage leaves behind, and what cannot disturb it: hooks, weights, random states, threads, full memory."""

import random
import sys
import threading
from contextlib import contextmanager

import inside
import numpy as np
import pytest
import torch
from stages import DECODING, OF_MODELS, STAGES, UNHOOKABLE, bi, close, modules_of
from toys import same_weights, weights

from pyterrier_mech import AblatedReranker
from pyterrier_mech.rankers import Ranker

pytestmark = pytest.mark.filterwarnings('ignore:.*cannot be patched', 'ignore:.*rows unchanged')

each = pytest.mark.parametrize('name', STAGES)
each_of_models = pytest.mark.parametrize('name', OF_MODELS)
each_hookable = pytest.mark.parametrize('name', [name for name in OF_MODELS if name not in [*UNHOOKABLE, *DECODING]])


def state_of(stage):
    """All of a stage's modules that must not change: (training, hooks), (frozen, gradients) and weights."""
    found = []
    for module in modules_of(stage):
        hooks = [(part.training, len(part._forward_hooks), len(part._forward_pre_hooks)) for part in module.modules()]
        hooks += [(len(part._backward_hooks), len(part._backward_pre_hooks)) for part in module.modules()]
        found.append((hooks, [(p.requires_grad, p.grad is None) for p in module.parameters()], weights(module)))
    return found


def unchanged(stage, before):
    for (hooks, flags, values), (old_hooks, old_flags, old_values) in zip(state_of(stage), before, strict=True):
        assert hooks == old_hooks and flags == old_flags and same_weights(values, old_values)


@each_of_models
def test_the_model_is_left_as_it_was(name, module):
    make, frame, _ = STAGES[name]
    expected = make(module)(frame())
    module.train()
    module.bert.encoder.layer[1].eval()
    module.bert.encoder.layer[0].attention.self.query.weight.requires_grad_(False)
    stage = make(module)
    before = state_of(stage)
    close(stage(frame()), expected)
    unchanged(stage, before)


@contextmanager
def called(module, function):
    """Calls a function in the middle of every forward of the first layer."""
    handle = module.base_model.encoder.layer[0].intermediate.dense.register_forward_pre_hook(lambda *_: function())
    try:
        yield
    finally:
        handle.remove()


@each_hookable
@pytest.mark.parametrize('error', [KeyError('boom'), KeyboardInterrupt('boom')], ids=lambda error: type(error).__name__)
def test_nothing_is_left_after_an_interruption(name, error, module):
    make, frame, _ = STAGES[name]
    stage = make(module)
    before = state_of(stage)
    for when in (1, 2):
        count = iter(range(1, 1000))

        def stop(count=count, when=when):
            if next(count) == when:
                raise error

        with called(modules_of(stage)[-1], stop):
            try:
                stage(frame())
                assert when > 1, 'the forward was not interrupted'
            except type(error) as raised:
                assert raised is error or 'boom' in str(raised)
        unchanged(stage, before)
    assert torch.is_grad_enabled()
    close(stage(frame()), make(module)(frame()))


@each
def test_global_state_is_left_alone_and_does_not_matter(name, module):
    make, frame, _ = STAGES[name]
    expected = make(module)(frame())

    def state():
        numpy = np.random.get_state()[1].tolist()
        flags = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
        return random.getstate(), numpy, torch.get_rng_state().tolist(), flags, torch.get_num_threads()

    for grad, dtype in ((True, torch.float32), (False, torch.float64)):
        torch.set_default_dtype(dtype)
        try:
            with torch.set_grad_enabled(grad):
                before, res = state(), make(module)(frame())
                assert state() == before
        finally:
            torch.set_default_dtype(torch.float32)
        close(res, expected)
        assert torch.is_grad_enabled()


@each_hookable
def test_two_threads_on_one_model_give_what_one_gives(name, module):
    """One runs the stage, the other an intervention; each waits in its first forward for the other."""
    make, frame, _ = STAGES[name]
    stage = make(module)
    runs = [stage, AblatedReranker(bi(modules_of(stage)[-1]), ['L0H0'])]
    expected = [run(frame()) for run in runs]
    before = state_of(stage)
    meeting, waited, found = threading.Barrier(2), threading.local(), [None, None]

    def meet():
        # Where a lock keeps the other out, one goes on alone.
        if not getattr(waited, 'yes', False):
            waited.yes = True
            try:
                meeting.wait(0.3)
            except threading.BrokenBarrierError:
                pass

    def work(number):
        try:
            found[number] = runs[number](frame())
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with called(modules_of(stage)[-1], meet):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    for res, one in zip(found, expected, strict=True):
        if isinstance(res, BaseException):
            raise res
        close(res, one)
    unchanged(stage, before)


@each_hookable
def test_out_of_memory_halves_the_budget_and_changes_no_number(name, module):
    make, frame, _ = STAGES[name]
    stage = make(module)
    expected = stage(frame())
    ranker = stage if isinstance(stage, Ranker) else getattr(stage, 'model_', stage.model)
    budget, limit, refused = inside.budget_of(ranker), 70, []

    def full(_, args):
        tokens = args[0].shape[:-1].numel()
        if tokens > limit:
            refused.append(tokens)
            raise torch.OutOfMemoryError('device memory is full')

    layers = modules_of(stage)[-1].base_model.encoder.layer
    handles = [layer.intermediate.dense.register_forward_pre_hook(full) for layer in layers]
    res = stage(frame())
    for handle in handles:
        handle.remove()
    assert refused, 'there was no need to halve anything'
    assert inside.budget_of(ranker) <= budget // 2, 'the smaller budget is not remembered'
    close(res, expected)
