"""A fast path runs only where the parts are exactly what it knows: adapted, hooked and replaced modules are obeyed."""

import copy

import numpy as np
import oracles
import pytest
import torch
from inside import sides, why_not_plain
from torch import nn
from toys import DESCRIBED, PAIRS, TEXTS, pairs, toy_module

from pyterrier_mech import AttentionShares, AttributeHeads, BiEncoder, CrossEncoder, PatchHeads
from pyterrier_mech.prune import Magnitude

peft = pytest.importorskip('peft')
pytestmark = pytest.mark.filterwarnings('ignore:.*cannot be patched', 'ignore::UserWarning:peft')

TARGETS = {
    'bert': {'q': 'query', 'k': 'key', 'v': 'value', 'out': 'attention.output.dense', 'mlp': 'intermediate.dense'},
    'distilbert': {'q': 'q_lin', 'k': 'k_lin', 'v': 'v_lin', 'out': 'out_lin', 'mlp': 'lin1'},
    'modernbert': {'q': 'Wqkv', 'out': 'attn.Wo', 'mlp': 'Wi'},
}
TARGETS |= dict.fromkeys(['electra', 'roberta'], TARGETS['bert'])


def adapted(family, part, classifier=True):
    """A toy whose `part` of every layer is wrapped by a LoRA with random weights."""
    module, tokenizer = toy_module(family, fresh=True, classifier=classifier)
    config = peft.LoraConfig(r=4, target_modules=[TARGETS[family][part]], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return peft.get_peft_model(module, config).get_base_model().double().eval(), tokenizer


def plain_scores(module, tokenizer):
    with torch.no_grad():
        return [
            module(**tokenizer(q, t, truncation=True, max_length=76, return_tensors='pt')).logits[0, 0].item()
            for q, t in zip(*PAIRS)
        ]


def hooked(kind):
    """Ways to change what a part of a layer does without changing its weights."""

    def double(_, args, output):
        return output * 1.3 if isinstance(output, torch.Tensor) else (output[0] * 1.3, *output[1:])

    def apply(module):
        attention = module.bert.encoder.layer[-1].attention
        if kind == 'hook on keys':
            attention.self.key.register_forward_hook(double)
        elif kind == 'hook on values of the first layer':
            module.bert.encoder.layer[0].attention.self.value.register_forward_hook(double)
        elif kind == 'hook on attention':
            attention.self.register_forward_hook(double)
        elif kind == 'pre-hook on the norm':
            attention.output.LayerNorm.register_forward_pre_hook(lambda _, args: (args[0].roll(1, -1),))
        elif kind == 'hook on the encoder':
            module.bert.encoder.layer[-1].register_forward_hook(double)
        elif kind == 'own forward':
            forward = attention.self.value.forward
            attention.self.value.forward = lambda x: forward(x) * 1.3
        elif kind == 'parametrised':
            nn.utils.parametrizations.orthogonal(attention.self.key)
        elif kind == 'another class':
            attention.self.value.__class__ = type('Louder', (nn.Linear,), {'forward': louder})
        elif kind == 'another norm':
            attention.output.LayerNorm.__class__ = type('Norm', (nn.LayerNorm,), {'forward': quieter})
        elif kind == 'another scale':
            attention.self.scaling = 0.9

    return apply


def louder(self, x):
    return nn.functional.linear(x, self.weight, self.bias) * 1.3


def quieter(self, x):
    return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps) * 0.8


KINDS = [
    'hook on keys',
    'hook on values of the first layer',
    'hook on attention',
    'pre-hook on the norm',
    'hook on the encoder',
    'own forward',
    'parametrised',
    'another class',
    'another norm',
    'another scale',
]


def check_patching(model, module, tokenizer, head_dim=8):
    """Effects equal hooks on the module itself."""
    frame = pairs(6)
    res = PatchHeads(model, heads=['L0H1', 'L1H2'])(frame)
    plain = oracles.Plain(module, tokenizer)
    for row, found in zip(frame.itertuples(), res.itertuples()):
        if found.patchable == 'yes':
            expected = oracles.patch_effects(plain, [side.runs() for side in sides(model, row)], ['L0H1', 'L1H2'])
            np.testing.assert_allclose([found.L0H1, found.L1H2], list(expected.values()), atol=1e-10, rtol=0)


@pytest.mark.parametrize('part', ['q', 'k', 'v', 'out', 'mlp'])
@pytest.mark.parametrize('family', DESCRIBED)
def test_adapted_modules_are_scored_with_their_adapters(family, part):
    if part not in TARGETS[family]:
        pytest.skip('queries, keys and values are one map')
    module, tokenizer = adapted(family, part)
    model = CrossEncoder(module, tokenizer=tokenizer)
    expected = plain_scores(module, tokenizer)
    assert np.abs(np.subtract(expected, plain_scores(*toy_module(family)))).max() > 1e-4
    np.testing.assert_allclose(model.score(*PAIRS), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize('part', ['v', 'out', 'mlp'])
def test_adapted_modules_are_patched_with_their_adapters(part):
    module, tokenizer = adapted('bert', part)
    check_patching(CrossEncoder(module, tokenizer=tokenizer), module, tokenizer)


def test_adapted_bi_encoders():
    module, tokenizer = adapted('bert', 'v', classifier=False)
    found = BiEncoder(module, tokenizer=tokenizer, pooling='cls').encode('text', PAIRS[1])
    with torch.no_grad():
        expected = [module(**tokenizer(t, return_tensors='pt')).last_hidden_state[0, 0].numpy() for t in PAIRS[1]]
    np.testing.assert_allclose(found, expected, atol=1e-10, rtol=0)


def test_an_adapter_that_is_added_after_the_first_use():
    module, tokenizer = toy_module('bert', fresh=True)
    model = CrossEncoder(module, tokenizer=tokenizer)
    before = model.score(*PAIRS)
    config = peft.LoraConfig(r=4, target_modules=['query', 'value'], init_lora_weights=False)
    peft.get_peft_model(module, config).double().eval()
    expected = plain_scores(module, tokenizer)
    assert np.abs(before - expected).max() > 1e-4
    np.testing.assert_allclose(model.score(*PAIRS), expected, atol=1e-10, rtol=0)
    check_patching(model, module, tokenizer)


@pytest.mark.parametrize('kind', KINDS)
def test_what_acts_inside_a_layer_is_obeyed(kind):
    module, tokenizer = toy_module('bert', fresh=True)
    model = CrossEncoder(module, tokenizer=tokenizer)
    before = model.score(*PAIRS)
    hooked(kind)(module)
    assert why_not_plain(model)
    expected = plain_scores(module, tokenizer)
    assert np.abs(before - expected).max() > 1e-6
    np.testing.assert_allclose(model.score(*PAIRS), expected, atol=1e-10, rtol=0)
    check_patching(model, module, tokenizer)


def test_plain_modules_take_the_fast_path():
    for family in DESCRIBED:
        module, tokenizer = toy_module(family)
        assert why_not_plain(CrossEncoder(module, tokenizer=tokenizer)) == ''


@pytest.mark.parametrize('family', DESCRIBED)
def test_what_transformers_leaves_in_a_module_that_was_asked_for_attentions_changes_nothing(family):
    module, tokenizer = toy_module(family, fresh=True)
    model = CrossEncoder(module, tokenizer=tokenizer)
    module(**tokenizer(TEXTS[0], return_tensors='pt'), output_attentions=True, output_hidden_states=True)
    assert any(part._forward_hooks for part in module.modules())
    assert why_not_plain(model) == ''
    np.testing.assert_allclose(model.score(*PAIRS), plain_scores(module, tokenizer), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    'work',
    [
        lambda model: AttributeHeads(model, 'relp')(pairs(2)),
        lambda model: AttentionShares(model)(pairs(2)),
        lambda model: Magnitude().scores(model),
    ],
    ids=['relp', 'attention', 'magnitude'],
)
def test_what_needs_the_parts_themselves_refuses(work):
    module, tokenizer = adapted('bert', 'v')
    with pytest.raises(ValueError, match='peft'):
        work(CrossEncoder(module, tokenizer=tokenizer))


def test_a_wrapped_model_says_what_to_give():
    module, tokenizer = toy_module('bert', fresh=True)
    wrapped = peft.get_peft_model(module, peft.LoraConfig(r=4, target_modules=['query']))
    with pytest.raises(TypeError, match='merge_and_unload'):
        CrossEncoder(wrapped, tokenizer=tokenizer).score(*PAIRS)


def test_a_custom_attention_kernel_is_obeyed():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def doubled(*args, **kwargs):
        out, weights = sdpa_attention_forward(*args, **kwargs)
        return out * 2, weights

    AttentionInterface.register('doubled', doubled)
    AttentionMaskInterface.register('doubled', sdpa_mask)
    module, tokenizer = toy_module('bert', fresh=True)
    model = CrossEncoder(module, tokenizer=tokenizer)
    before = model.score(*PAIRS)
    module.config._attn_implementation = 'doubled'
    expected = plain_scores(module, tokenizer)
    assert np.abs(before - expected).max() > 1e-4
    np.testing.assert_allclose(model.score(*PAIRS), expected, atol=1e-10, rtol=0)


def test_a_hook_on_the_whole_classification_module_is_refused():
    module, tokenizer = toy_module('bert', fresh=True)
    module.register_forward_hook(lambda _, args, output: output)
    with pytest.raises(ValueError, match='of the whole classification module are not run here'):
        CrossEncoder(module, tokenizer=tokenizer).score(*PAIRS)


def test_counting_operations_counts_those_of_the_fast_path():
    from torch.utils.flop_counter import FlopCounterMode

    model = CrossEncoder(*toy_module('bert')[:1], tokenizer=toy_module('bert')[1])
    with FlopCounterMode(display=False) as counted:
        assert why_not_plain(model) == ''
        model.score(*PAIRS)
    slow = copy.deepcopy(model.model)
    slow.bert.register_forward_pre_hook(lambda *_: None)
    with FlopCounterMode(display=False) as whole:
        CrossEncoder(slow, tokenizer=model.tokenizer).score(*PAIRS)
    assert counted.get_total_flops() < 0.8 * whole.get_total_flops()


def test_global_hooks_are_obeyed():
    module, tokenizer = toy_module('bert', fresh=True)
    model = CrossEncoder(module, tokenizer=tokenizer)
    value = module.bert.encoder.layer[-1].attention.self.value
    handle = nn.modules.module.register_module_forward_hook(
        lambda part, args, output: output * 2 if part is value else None
    )
    try:
        np.testing.assert_allclose(model.score(*PAIRS), plain_scores(module, tokenizer), atol=1e-10, rtol=0)
    finally:
        handle.remove()
