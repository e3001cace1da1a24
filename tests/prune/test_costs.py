"""Costs against counted operations and parameters."""

import pytest
from inside import count_flops, encoder_parameters, flop_costs, parameter_costs, tokenizer_of
from toys import QUERIES, RESIZABLE, TEXTS, toy_bi_encoder, toy_cross_encoder

from pyterrier_mech.prune import prune_units

KEPT = [([[0, 2], [1]], [[3, 9], list(range(40))]), ([[], [0, 1, 2]], [list(range(48)), []]), ([[], []], [[], []])]


@pytest.mark.parametrize('family', RESIZABLE)
def test_flops_are_those_that_scoring_executes(family):
    model = toy_cross_encoder(family)
    for query, text in zip(QUERIES[:2], TEXTS[:2], strict=True):
        tokens = len(tokenizer_of(model)(query, text)['input_ids'])
        costs = flop_costs(model, tokens)
        whole = count_flops(lambda q=query, t=text: model.score([q], [t]))
        # What is left is the pooler or the dense layer of the classifier, and its one logit.
        extra = whole - costs.whole
        assert extra in (2 * 32 * 32 + 2 * 32, 2 * 32 + (2 * 16 * 32 * tokens) + 2 * 32 * 32)
        for heads, neurons in KEPT:
            pruned = prune_units(model, heads, neurons)
            counted = count_flops(lambda p=pruned, q=query, t=text: p.score([q], [t]))
            assert whole - counted == costs.whole - costs.total(list(map(len, heads)), list(map(len, neurons)))


def test_flops_of_a_ranker_that_pools_all_tokens():
    model = toy_bi_encoder('bert', pooling='mean')
    text = TEXTS[0]
    costs = flop_costs(model, len(tokenizer_of(model)(text)['input_ids']))
    whole = count_flops(lambda: model.score([text], [text]))
    assert costs.heads[0][-1] == costs.heads[1][-1] > 0
    for heads, neurons in KEPT:
        pruned = prune_units(model, heads, neurons)
        counted = count_flops(lambda p=pruned: p.score([text], [text]))
        assert whole - counted == 2 * (costs.whole - costs.total(list(map(len, heads)), list(map(len, neurons))))


@pytest.mark.parametrize('family', RESIZABLE)
def test_parameters_are_those_that_modules_have(family):
    model = toy_cross_encoder(family)
    costs = parameter_costs(model)
    assert costs.whole == encoder_parameters(model)
    for heads, neurons in KEPT:
        counted = encoder_parameters(prune_units(model, heads, neurons))
        assert counted == costs.total(list(map(len, heads)), list(map(len, neurons)))
    assert parameter_costs(prune_units(model, *KEPT[0])).whole == encoder_parameters(prune_units(model, *KEPT[0]))
