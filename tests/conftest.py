"""Fixtures and hooks for all tests: no network, one thread a process, and shared toys that stay as they are."""

import os
import socket

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('PT_TEST_TRANSFORMER_REPORTS', '0')

import pytest
import torch
from toys import SHARED, forget_shared_toys, toy_module

if 'OMP_NUM_THREADS' not in os.environ:
    torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError('the network was opened')

    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'create_connection', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


def _fingerprint(module):
    """Whether weights were written to, replaced, frozen or given gradients, hooks left, or the mode changed."""
    parts = [(part.training, len(part._forward_hooks), len(part._forward_pre_hooks)) for part in module.modules()]
    tensors = [(p.data_ptr(), p._version, p.requires_grad, p.grad is None) for p in module.parameters()]
    return parts, tensors


@pytest.fixture(autouse=True)
def _shared_toys_stay_as_they_are():
    """A test that changes a toy asks for a fresh copy, and the package changes none."""
    before = [(module, _fingerprint(module)) for module in SHARED]
    yield
    changed = [type(module).__name__ for module, fingerprint in before if _fingerprint(module) != fingerprint]
    if changed:
        forget_shared_toys()
    assert not changed, f'a shared {changed[0]} was changed: ask for toy_...(fresh=True)'


@pytest.fixture
def module():
    """A toy BERT that the test may change."""
    return toy_module('bert', fresh=True)[0]
