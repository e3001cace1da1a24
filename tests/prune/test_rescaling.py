"""Least squares after surgery, against ridge regression on what hooks on the plain modules record."""

import numpy as np
import pytest
import torch
from fits import KEPT_HEADS as HEADS
from fits import KEPT_NEURONS as NEURONS
from fits import data, mixed
from toys import RESIZABLE, same_weights, toy_bi_encoder, toy_cross_encoder, weights

from pyterrier_mech.prune import Rescaling, prune_units

pytestmark = pytest.mark.numeric

NONE_LEFT = ([[], [1, 3]], [list(range(20)), []])


def parts(model):
    """For each sublayer in order, its output projection and the norm behind it, by the names of the family."""
    base = model.model.base_model
    if model.model.config.model_type == 'distilbert':
        layers = base.transformer.layer
        return [p for x in layers for p in ((x.attention.out_lin, x.sa_layer_norm), (x.ffn.lin2, x.output_layer_norm))]
    layers = base.encoder.layer
    return [
        pair
        for x in layers
        for pair in ((x.attention.output.dense, x.attention.output.LayerNorm), (x.output.dense, x.output.LayerNorm))
    ]


def record(model, batches):
    """For each sublayer, (inputs of the projection, its output, what the norm reads) of every batch, by hooks."""
    seen, handles = [], []
    for linear, norm in parts(model):
        found = {'a': [], 'out': [], 'sum': []}
        seen.append(found)
        handles += [
            linear.register_forward_hook(
                lambda _, args, out, f=found: f['a'].append(args[0].clone()) or f['out'].append(out.clone())
            ),
            norm.register_forward_pre_hook(lambda _, args, f=found: f['sum'].append(args[0].clone()) or None),
        ]
    with torch.no_grad():
        for batch in batches:
            model.model.base_model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def encoded(model, fit):
    """Padded batches by the tokenizer's own encoding, one a tower."""
    options = {'padding': True, 'return_tensors': 'pt'}
    if not hasattr(model, 'pooling'):
        return [model.tokenizer(fit.queries, fit.texts, **options)]
    return [model.tokenizer(texts, **options) for texts in (fit.queries, fit.texts)]


def by_numpy(cut, student, teacher, fit, ridge, first_only):
    """For each sublayer, the weight and bias that ridge regression gives, as a stacked least-squares problem."""
    batches = encoded(teacher, fit)
    ours, theirs = record(student, batches), record(teacher, batches)
    solved = []
    for number, (linear, _) in enumerate(parts(cut)):
        masks = [batch['attention_mask'].bool() for batch in batches]
        if first_only and number >= len(ours) - 2:
            masks = [mask & (torch.arange(mask.shape[1]) == 0) for mask in masks]
        a = torch.cat([x[m] for x, m in zip(ours[number]['a'], masks)]).numpy()
        a = np.hstack([a, np.ones((len(a), 1))])
        missing = [
            (t - (s - o))[m]
            for t, s, o, m in zip(theirs[number]['sum'], ours[number]['sum'], ours[number]['out'], masks)
        ]
        old = np.vstack([linear.weight.detach().numpy().T, linear.bias.detach().numpy()[None]])
        root = np.sqrt(ridge * (a**2).sum(0).mean())
        left = np.vstack([a, root * np.eye(a.shape[1])])
        right = np.vstack([torch.cat(missing).numpy(), root * old])
        solved.append(np.linalg.lstsq(left, right, rcond=None)[0])
    return solved


def assert_fitted(teacher, heads, neurons, first_only, ridge=1e-3):
    cut, student = prune_units(teacher, heads, neurons), prune_units(teacher, heads, neurons)
    before = weights(teacher)
    assert Rescaling(ridge=ridge).recover(student, teacher, data()) is None
    expected = by_numpy(cut, student, teacher, data(), ridge, first_only)
    fitted = set()
    for (linear, _), (old, _), solution in zip(parts(student), parts(cut), expected, strict=True):
        np.testing.assert_allclose(linear.weight.detach().numpy().T, solution[:-1], rtol=0, atol=1e-8)
        np.testing.assert_allclose(linear.bias.detach().numpy(), solution[-1], rtol=0, atol=1e-8)
        assert (linear.bias - old.bias).abs().max() > 1e-6
        fitted |= {id(linear.weight), id(linear.bias)}
    plain = dict(cut.model.named_parameters())
    for name, parameter in student.model.named_parameters():
        assert id(parameter) in fitted or torch.equal(parameter, plain[name]), name
    assert same_weights(weights(teacher), before)


@pytest.mark.parametrize('family', RESIZABLE)
def test_cross_encoders_are_fitted_as_numpy_does(family):
    assert_fitted(toy_cross_encoder(family), HEADS, NEURONS, True)


@pytest.mark.parametrize('pooling', ['cls', 'mean'])
def test_bi_encoders_are_fitted_on_both_towers(pooling):
    assert_fitted(toy_bi_encoder('bert', pooling), HEADS, NEURONS, pooling == 'cls')


@pytest.mark.parametrize('family', ['bert', 'distilbert'])
def test_layers_without_units_get_their_bias_fitted(family):
    assert_fitted(toy_cross_encoder(family), *NONE_LEFT, True)


@pytest.mark.parametrize('make', [toy_cross_encoder, toy_bi_encoder])
def test_nothing_pruned_nothing_changed(make):
    teacher = make('bert')
    student = prune_units(teacher, [range(4)] * 2, [range(48)] * 2)
    Rescaling().recover(student, teacher, data())
    for name, tensor in student.model.state_dict().items():
        torch.testing.assert_close(tensor, teacher.model.state_dict()[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize('make', [toy_cross_encoder, toy_bi_encoder])
def test_copies_of_kept_units_are_not_missed(make):
    teacher = make('bert', fresh=True)
    with torch.no_grad():
        for layer in teacher.model.base_model.encoder.layer:
            for part in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
                part.weight[8:16], part.bias[8:16] = part.weight[:8].clone(), part.bias[:8].clone()
            part = layer.intermediate.dense
            part.weight[24:], part.bias[24:] = part.weight[:24].clone(), part.bias[:24].clone()
    student = prune_units(teacher, [[0, 2, 3]] * 2, [range(24)] * 2)
    expected = teacher.score(data().queries, data().texts)
    assert np.abs(student.score(data().queries, data().texts) - expected).max() > 1e-3
    Rescaling(ridge=1e-13).recover(student, teacher, data())
    np.testing.assert_allclose(student.score(data().queries, data().texts), expected, rtol=0, atol=1e-6)


def test_repairs_what_pruning_broke():
    teacher = toy_cross_encoder('bert')
    student = prune_units(teacher, HEADS, NEURONS)
    expected = teacher.score(data().queries, data().texts)
    before = np.square(student.score(data().queries, data().texts) - expected).mean()
    Rescaling().recover(student, teacher, data())
    assert np.square(student.score(data().queries, data().texts) - expected).mean() < 0.05 * before


def fitted(fit, batch_tokens=None, **settings):
    teacher = toy_cross_encoder('bert', batch_tokens=batch_tokens)
    student = prune_units(teacher, HEADS, NEURONS)
    Rescaling(**settings).recover(student, teacher, fit)
    return torch.cat([linear.weight.detach().flatten() for linear, _ in parts(student)])


@pytest.mark.parametrize('max_pairs', [512, 6])
def test_order_and_batches_do_not_matter(max_pairs):
    expected = fitted(data(), max_pairs=max_pairs)
    for other in (fitted(mixed(data()), max_pairs=max_pairs), fitted(data(), batch_tokens=70, max_pairs=max_pairs)):
        torch.testing.assert_close(other, expected, rtol=0, atol=1e-8)


def test_the_draw_is_by_seed_and_limited():
    assert not torch.allclose(fitted(data(), max_pairs=6), fitted(data(), max_pairs=6, seed=1))
    assert not torch.allclose(fitted(data(), max_pairs=6), fitted(data()))


def test_modes_gradients_and_random_state_stay():
    teacher = toy_cross_encoder('bert', fresh=True)
    student = prune_units(teacher, HEADS, NEURONS)
    teacher.model.train()
    student.model.bert.train()
    state = torch.get_rng_state()
    Rescaling().recover(student, teacher, data())
    assert torch.equal(torch.get_rng_state(), state)
    assert teacher.model.training and student.model.bert.training and not student.model.training
    assert all(p.requires_grad and p.grad is None for p in [*teacher.model.parameters(), *student.model.parameters()])
    # Dropout was off.
    found = torch.cat([linear.weight.detach().flatten() for linear, _ in parts(student)])
    torch.testing.assert_close(found, fitted(data()), rtol=0, atol=1e-8)


def test_progress_bar_only_if_the_ranker_is_verbose(capsys):
    fitted(data())
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize(
    'name, value, wanted',
    [('max_pairs', 0, '1 or more'), ('max_pairs', -1, '1 or more')]
    + [('ridge', value, 'above 0') for value in (0.0, float('nan'))],
)
def test_settings_out_of_range(name, value, wanted):
    teacher = toy_cross_encoder('bert')
    with pytest.raises(ValueError, match=f'{name} must be {wanted}; got {name}={value}'):
        Rescaling(**{name: value}).recover(prune_units(teacher, HEADS, NEURONS), teacher, data())


def test_families_that_cannot_be_cut():
    model = toy_cross_encoder('modernbert')
    with pytest.raises(ValueError, match='modernbert'):
        Rescaling().recover(model, model, data())
