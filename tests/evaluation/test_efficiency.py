import inside
import numpy as np
import pandas as pd
import pytest
import torch
from inside import budget_of, count_flops, encoder_parameters, module_of, parameters, tokenizer_of, weight_mb
from toys import (
    DESCRIBED,
    FAMILIES,
    QUERIES,
    TEXTS,
    same_weights,
    toy_bi_encoder,
    toy_cross_encoder,
    toy_module,
    training_frame,
    weights,
)

from pyterrier_mech import CrossEncoder
from pyterrier_mech.stats import efficiency

D, HEADS, FF, LAYERS = 32, 4, 48, 2


@pytest.fixture
def frame():
    return training_frame()


def n_tokens(model, query, text):
    return len(tokenizer_of(model)(query, text)['input_ids'])


def cross_encoder_flops(t, ff=FF):
    """A BERT of two layers on one sequence of t tokens; the last layer computes its first token alone."""
    full = 2 * 4 * t * D * D + 2 * 2 * t * t * D + 2 * 2 * t * D * ff
    # query, query through the key weights, products with t inputs, their sum, the value weights, the output
    last = 2 * D * D + 2 * D * D + 2 * HEADS * t * D + 2 * HEADS * t * D + 2 * D * D + 2 * D * D + 2 * 2 * D * ff
    return full + last + 2 * D * D + 2 * D


def test_parameters_by_hand():
    model = toy_cross_encoder('bert')
    layer = 4 * (D * D + D) + (D * FF + FF) + (FF * D + D) + 2 * 2 * D
    vocabulary = len(tokenizer_of(model))
    embeddings = (vocabulary + 80 + 2) * D + 2 * D
    total = embeddings + LAYERS * layer + (D * D + D) + (D + 1)
    assert encoder_parameters(model) == LAYERS * layer
    assert parameters(model) == total
    buffers = sum(b.numel() * b.element_size() for b in module_of(model).buffers())
    assert buffers
    assert weight_mb(model) == pytest.approx((total * 8 + buffers) / 2**20)
    assert weight_mb(toy_cross_encoder('bert', dtype=torch.float32)) < weight_mb(model)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_flops_by_hand(frame, dtype):
    model = toy_cross_encoder('bert', dtype=dtype)
    for query, text in zip(QUERIES, TEXTS, strict=True):
        counted = count_flops(lambda q=query, t=text: model.score([q], [t]))
        assert counted == cross_encoder_flops(n_tokens(model, query, text))
    alone = efficiency(model, frame, batch_sizes=[1], repeats=1)
    lengths = [n_tokens(model, query, text) for query, text in zip(frame['query'], frame['text'], strict=True)]
    assert alone['flops'].tolist() == pytest.approx([np.mean([cross_encoder_flops(t) for t in lengths])], rel=1e-12)


def test_flops_of_batches_count_padding(frame):
    model = toy_cross_encoder('bert')
    table = efficiency(model, frame, batch_sizes=[1, 5, 16, 1000, None], repeats=1)
    lengths = [n_tokens(model, query, text) for query, text in zip(frame['query'], frame['text'], strict=True)]
    longest = sorted(lengths, reverse=True)
    for size, flops in zip([1, 5, 16, 16, 16], table['flops'], strict=True):
        padded = [longest[i // size * size] for i in range(16)]
        assert flops == pytest.approx(np.mean([cross_encoder_flops(t) for t in padded]), rel=1e-12)
    assert table['batch_size'].tolist() == [1, 5, 16, 1000, pd.NA]


def test_flops_of_bi_encoder(frame):
    model = toy_bi_encoder('bert', 'mean')

    def tower(text):
        t = n_tokens(model, text, None)
        pooler = 2 * D * D  # Hugging Face's own forward runs it, needed or not
        return LAYERS * (2 * 4 * t * D * D + 2 * 2 * t * t * D + 2 * 2 * t * D * FF) + pooler

    table = efficiency(model, frame, batch_sizes=[1], repeats=1)
    by_hand = [tower(query) + tower(text) for query, text in zip(frame['query'], frame['text'], strict=True)]
    assert table['flops'].tolist() == pytest.approx([np.mean(by_hand)], rel=1e-12)


def test_own_batches_use_the_rankers_budget(frame):
    one_by_one = toy_cross_encoder('bert', batch_tokens=1)
    table = efficiency(one_by_one, frame, batch_sizes=[1, None, 16], repeats=1)
    assert table.at[1, 'flops'] == table.at[0, 'flops'] < table.at[2, 'flops']
    assert budget_of(one_by_one) == 1


@pytest.mark.parametrize('make', [toy_cross_encoder, toy_bi_encoder])
def test_ratios_with_itself(frame, make):
    model = make('bert')
    table = efficiency(model, frame, baseline=model, batch_sizes=[4, None], repeats=3)
    assert table['ranker'].tolist() == ['baseline', 'model'] * 2
    ratios = ['speedup', 'speedup_low', 'speedup_high', 'flops_ratio', 'parameters_ratio', 'memory_ratio']
    theirs, ours = table[table['ranker'] == 'baseline'], table[table['ranker'] == 'model']
    assert theirs[ratios].isna().all(axis=None)
    assert (ours[ratios[3:]] == 1).all(axis=None)
    assert (ours['speedup_low'] <= ours['speedup']).all() and (ours['speedup'] <= ours['speedup_high']).all()
    assert np.isfinite(table['ms']).all() and (table['ms'] > 0).all() and (ours['speedup_low'] > 0).all()
    assert table['peak_mb'].isna().all()


def test_ratios_with_a_smaller_one(frame):
    wide, narrow = toy_cross_encoder('bert'), toy_cross_encoder('bert', intermediate_size=16)
    row = efficiency(narrow, frame, baseline=wide, batch_sizes=[1], repeats=2).iloc[1]
    lengths = [n_tokens(wide, query, text) for query, text in zip(frame['query'], frame['text'], strict=True)]
    by_hand = sum(cross_encoder_flops(t, 16) for t in lengths) / sum(map(cross_encoder_flops, lengths))
    assert row['flops_ratio'] == pytest.approx(by_hand, rel=1e-12)
    assert row['parameters_ratio'] == parameters(narrow) / parameters(wide) < 1
    assert row['memory_ratio'] == weight_mb(narrow) / weight_mb(wide) < 1


class Clock:
    """Time passes only while a ranker scores: as much as it is told."""

    def __init__(self, monkeypatch, costs):
        self.now = 0.0
        inside.replace_clock(monkeypatch, lambda: self.now, lambda ranker: self.spend(costs[ranker.label]))

    def spend(self, seconds):
        self.now += seconds.pop(0)


def test_times_are_medians_of_rounds(frame, monkeypatch):
    wide, narrow = toy_cross_encoder('bert', label=0), toy_cross_encoder('bert')
    # The first two of each are the count and the warm-up.
    Clock(monkeypatch, {0: [99.0, 99.0, 4.0, 6.0, 100.0], None: [99.0, 99.0, 2.0, 1.0, 40.0]})
    table = efficiency(narrow, frame, baseline=wide, batch_sizes=[None], repeats=3)
    assert table['ms'].tolist() == [6.0 * 1000 / 16, 2.0 * 1000 / 16]
    assert table.loc[1, ['speedup', 'speedup_low', 'speedup_high']].tolist() == [2.5, 2.0, 6.0]


@pytest.mark.parametrize('family', FAMILIES)
def test_model_is_left_as_it_was(frame, family):
    model = toy_cross_encoder(family, fresh=True)
    inner, budget = module_of(model), budget_of(model)
    inner.train()
    before, state = weights(inner), dict(model.__dict__)
    expected = model.score(frame['query'].tolist(), frame['text'].tolist())
    copied = frame.copy()
    table = efficiency(model, frame.iloc[:3], batch_sizes=[2], repeats=1)
    assert (table['flops'] > 0).all()
    assert all(part.training for part in inner.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in inner.modules())
    assert dict(model.__dict__) == state and budget_of(model) == budget
    assert same_weights(weights(inner), before)
    np.testing.assert_allclose(model.score(frame['query'].tolist(), frame['text'].tolist()), expected, atol=1e-12)
    pd.testing.assert_frame_equal(frame, copied)


@pytest.mark.parametrize('family', DESCRIBED)
def test_encoder_parameters_are_those_of_the_layers(family):
    model = toy_cross_encoder(family)
    names = [name for name, _ in module_of(model).named_parameters()]
    in_layers = [name for name in names if any(f'.{part}.' in name for part in ('layer', 'layers'))]
    sizes = dict(module_of(model).named_parameters())
    assert encoder_parameters(model) == sum(sizes[name].numel() for name in in_layers) > 0


class Fitted:
    def __init__(self, model, model_):
        self.model, self.model_ = model, model_


def test_fitted_stage_brings_both_sides(frame):
    wide, narrow = toy_cross_encoder('bert'), toy_cross_encoder('bert', intermediate_size=16)
    table = efficiency(Fitted(wide, narrow), frame, batch_sizes=[8], repeats=1)
    assert table['parameters'].tolist() == [parameters(wide), parameters(narrow)]
    other = toy_cross_encoder('bert', intermediate_size=32)
    table = efficiency(Fitted(wide, narrow), frame, baseline=other, batch_sizes=[8], repeats=1)
    assert table['parameters'].tolist() == [parameters(other), parameters(narrow)]
    assert efficiency(Fitted(None, narrow), frame, batch_sizes=[8], repeats=1)['ranker'].tolist() == ['model']


def test_batch_that_does_not_fit_has_no_time(frame):
    class Small(CrossEncoder):
        """Has no memory for more than two rows."""

        def read(self, vectors):
            if len(vectors[0]) > 2:
                raise torch.OutOfMemoryError('no memory.')
            return super().read(vectors)

    inner, tokenizer = toy_module('bert')
    model = Small(inner, tokenizer=tokenizer)
    table = efficiency(model, frame, baseline=model, batch_sizes=[2, 8], repeats=1)
    assert table['ms'].notna().tolist() == [True, True, False, False]
    assert table['speedup'].notna().tolist() == [False, True, False, False]
    assert budget_of(model) == 4096


@pytest.mark.parametrize(
    'change, message',
    [
        ({'frame': pd.DataFrame({'qid': [], 'query': [], 'docno': [], 'text': []})}, 'has no rows'),
        ({'frame': pd.DataFrame({'qid': ['1'], 'query': ['a'], 'docno': ['d']})}, "has no 'text'.*bm25"),
        (
            {'frame': pd.DataFrame({'qid': ['1'], 'query': ['a'], 'docno': ['d'], 'text': [None]})},
            'no string in column',
        ),
        ({'repeats': 0}, 'repeats=0'),
        ({'batch_sizes': [4, 0]}, r'batch_sizes=\[4, 0\]'),
        ({'batch_sizes': []}, r'batch_sizes=\[\]'),
    ],
)
def test_errors(frame, change, message, monkeypatch):
    model = toy_cross_encoder('bert')
    monkeypatch.setattr(type(model), 'score', None)
    with pytest.raises(ValueError, match=message):
        efficiency(model, **{'frame': frame, **change})


def test_what_is_no_ranker(frame):
    model = toy_cross_encoder('bert')
    with pytest.raises(TypeError, match='model must be .*PrunedReranker after fit; got model='):
        efficiency(Fitted(model, None), frame)
    with pytest.raises(TypeError, match="baseline must be .*; got baseline='x'"):
        efficiency(model, frame, baseline='x')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no CUDA device')
def test_peak_memory_on_cuda(frame):
    inner, tokenizer = toy_module('bert', dtype=torch.float32, fresh=True)
    model = CrossEncoder(inner.cuda(), tokenizer=tokenizer)
    table = efficiency(model, frame, baseline=model, batch_sizes=[1, 16], repeats=1)
    assert (table['peak_mb'] > table['weight_mb']).all()
    assert table.at[2, 'peak_mb'] > table.at[0, 'peak_mb']
    with pytest.raises(ValueError, match='different devices'):
        efficiency(model, frame, baseline=toy_cross_encoder('bert'))
