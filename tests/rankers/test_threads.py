"""Two threads on one module give what one gives: a run has the module to itself."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from inside import Site, tf32
from toys import QUERIES, TEXTS, pairs, toy_bi_encoder, toy_cross_encoder, toy_module

from pyterrier_mech import AblatedReranker, AttributeHeads, BiEncoder, CrossEncoder, PatchHeads
from pyterrier_mech.prune import prune_units

ALL = [[range(4)] * 2, [range(48)] * 2]

pytestmark = pytest.mark.filterwarnings('ignore:.*cannot be patched')


def together(*calls, times=30):
    """Runs calls in four threads, again and again; returns the results of each."""
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(call) for _ in range(times) for call in calls]
        results = [future.result() for future in found]
    return [results[i :: len(calls)] for i in range(len(calls))]


@pytest.mark.parametrize('make', [toy_cross_encoder, lambda: toy_bi_encoder(pooling='cls')])
def test_scores_do_not_change_hands(make):
    model = make()
    calls = [lambda text=text: model.score(QUERIES[:1], [text]) for text in TEXTS]
    for alone, found in zip([call() for call in calls], together(*calls, times=60)):
        np.testing.assert_allclose(found, [alone] * len(found), atol=1e-12)


def test_plain_scores_beside_ablation_patching_and_gradients():
    model, frame = toy_cross_encoder(), pairs(4)
    calls = [
        lambda: model.score(QUERIES[:2], TEXTS[:2]),
        lambda: AblatedReranker(model, ['L0H0', 'L1H1', 'L1N3']).score(QUERIES[:2], TEXTS[:2]),
        lambda: PatchHeads(model)(frame).L1H0.to_numpy(),
        lambda: AttributeHeads(model)(frame).L1H0.to_numpy(),
    ]
    for alone, found in zip([call() for call in calls], together(*calls, times=10)):
        np.testing.assert_allclose(found, [alone] * len(found), atol=1e-12)


def test_rankers_that_share_a_module_share_its_lock():
    module, tokenizer = toy_module('bert')
    cross = CrossEncoder(module, tokenizer=tokenizer)
    bi = BiEncoder(module.base_model, tokenizer=tokenizer, pooling='cls')
    calls = [lambda: cross.score(QUERIES[:1], TEXTS[:1]), lambda: bi.encode('text', TEXTS[1:2])]
    for alone, found in zip([call() for call in calls], together(*calls, times=60)):
        np.testing.assert_allclose(found, [alone] * len(found), atol=1e-12)


def test_dropout_stays_off_and_the_mode_comes_back():
    module, tokenizer = toy_module('bert', fresh=True, hidden_dropout_prob=0.5)
    for part in module.modules():
        if hasattr(part, 'p'):
            part.p = 0.5
    model = CrossEncoder(module.train(), tokenizer=tokenizer)
    alone = model.score(QUERIES[:1], TEXTS[:1])
    (found,) = together(lambda: model.score(QUERIES[:1], TEXTS[:1]), times=100)
    np.testing.assert_allclose(found, [alone] * len(found), atol=1e-12)
    assert all(part.training for part in module.modules())


def test_a_lazy_ranker_loads_once(tmp_path, monkeypatch):
    from pyterrier_mech.rankers import loading

    module, tokenizer = toy_module('bert')
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loads, real = [], loading.load_module

    def counted(*args, **kwargs):
        loads.append(threading.get_ident())
        return real(*args, **kwargs)

    monkeypatch.setattr(loading, 'load_module', counted)
    model = CrossEncoder(str(tmp_path), device='cpu', dtype='float64')
    together(lambda: model.score(QUERIES[:1], TEXTS[:1]), times=8)
    assert len(loads) == 1


@pytest.mark.parametrize('work', [lambda model: model.map.why_not_plain(), lambda model: prune_units(model, *ALL)])
def test_hooks_of_a_run_in_another_thread_are_not_seen(work):
    model, inside, leave = toy_cross_encoder(), threading.Event(), threading.Event()

    def wait(tensor):
        inside.set()
        leave.wait(10)
        return tensor

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(model.score, QUERIES[:1], TEXTS[:1], edits={Site('resid_pre', 0): wait})
        inside.wait(10)
        threading.Timer(0.2, leave.set).start()
        found = work(model)
        running.result()
    assert found == '' or found.map.why_not_plain() == ''


def test_tf32_is_off_again_after_runs_that_overlap():
    before = torch.backends.cuda.matmul.allow_tf32
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(tf32(True))
        second.enter_context(tf32(True))
        first.close()
        assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 == before
