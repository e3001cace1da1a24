"""PatchPaths against hooks on the unmodified module: every head frozen but the sender, then the receiver replaced."""

import numpy as np
import paths_by_hooks as oracle
import pytest
from inside import module_of, sides, tokenizer_of
from inside_patching import everything_told
from toys import (
    DESCRIBED,
    pairs,
    real_cross_encoder,
    real_pairs,
    toy_bi_encoder,
    toy_cross_encoder,
    unpatchable_pairs,
)

from pyterrier_mech import AttributePaths, CrossEncoder, PatchHeads, PatchPaths, PathEffects

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings('ignore:.*cannot be patched')]
RECEIVERS = ['score', 'L1H2.q', 'L1H2.k', 'L1H2.v', 'L1H0.v']


def unit(name):
    return None if name == 'score' else (name[-1], int(name[1]), int(name[3]))


def check(model, frame, res, receivers, reverse=False, atol=1e-10, count=2):
    rows = [(row, i) for i, row in enumerate(frame.itertuples()) if res.patchable.iloc[i] == 'yes'][:count]
    senders = sorted({name.partition('>')[0] for name in res if '>' in name})
    for row, i in rows:
        for sender in senders:
            below = [name for name in receivers if name == 'score' or int(sender[1]) < int(name[1])]
            place = int(sender[1]), int(sender[3:])
            wanted = oracle.path_effects(model, sides(model, row), place, [unit(n) for n in below], reverse)
            found = [res[f'{sender}>{name}'].iloc[i] for name in below]
            np.testing.assert_allclose(found, wanted, atol=atol, rtol=0)


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('family', DESCRIBED)
def test_equals_hooks(family, reverse):
    model, frame = toy_cross_encoder(family), pairs(5)
    direction = 'original_to_perturbed' if reverse else 'perturbed_to_original'
    res = PatchPaths(model, RECEIVERS, direction=direction, batch_tokens=300)(frame)
    assert res[[name for name in res if '>' in name]].abs().max().min() > 1e-8
    check(model, frame, res, RECEIVERS, reverse)


def test_both_towers_together():
    model, frame = toy_bi_encoder(), pairs(6)
    frame = frame.assign(query_0=frame['query'], query=frame['query'] + ' rust', edited='query text')
    check(model, frame, PatchPaths(model, RECEIVERS, senders=['L0H0', 'L0H3'])(frame), RECEIVERS)


@pytest.mark.parametrize('family', ['bert', 'mpnet'])
def test_where_shortcuts_are_not_allowed(family):
    model, frame = toy_cross_encoder(family, fresh=True), pairs(4)
    model.model.base_model.encoder.layer[1].output.register_forward_hook(lambda _, args, out: out * 1.1)
    receivers = RECEIVERS if family == 'bert' else ['score']
    if family == 'bert':
        check(model, frame, PatchPaths(model, receivers, batch_tokens=200)(frame), receivers)
        return
    # The last layer's heads reach the score on no other path than their own.
    paths, heads = PatchPaths(model)(frame), PatchHeads(model)(frame)
    for name in [name for name in heads if name.startswith('L1H')]:
        np.testing.assert_allclose(paths[f'{name}>score'], heads[name], atol=1e-10)


@pytest.mark.parametrize('make', [toy_cross_encoder, toy_bi_encoder])
@pytest.mark.parametrize('family', DESCRIBED)
def test_the_last_layer_has_no_other_path(make, family):
    model, frame = make(family), pairs(6)
    paths, heads = PatchPaths(model)(frame), PatchHeads(model)(frame)
    last = model.n_layers - 1
    for head in range(model.n_heads(last)):
        np.testing.assert_allclose(paths[f'L{last}H{head}>score'], heads[f'L{last}H{head}'], atol=1e-10)
    assert (paths['L0H1>score'] - heads['L0H1']).abs().max() > 1e-4


@pytest.mark.parametrize('make', [toy_cross_encoder, toy_bi_encoder])
@pytest.mark.parametrize('family', DESCRIBED)
def test_all_paths_together_are_the_head(make, family):
    model, frame = make(family), pairs(6)
    name = f'L{model.n_layers - 2}H1'
    heads = PatchHeads(model, heads=[name])(frame)
    scores, good = everything_told(model, frame, name)
    np.testing.assert_allclose(scores - heads['score_original'].to_numpy()[good], heads[name][good], atol=1e-10)


def test_all_paths_are_the_same_numbers():
    model, frame = toy_cross_encoder('bert'), pairs(5)
    every = PatchPaths(model, 'all', batch_tokens=900)(frame)
    named = PatchPaths(model, RECEIVERS)(frame)
    senders = every.path_senders[0]
    assert senders == sorted(f'L{i}H{h}' for i in range(2) for h in range(4))
    for receiver in RECEIVERS:
        cells = np.stack(every[f'paths.{receiver}'])
        for i, sender in enumerate(senders):
            if f'{sender}>{receiver}' in named:
                np.testing.assert_allclose(cells[:, i], named[f'{sender}>{receiver}'], atol=1e-12)
            else:
                assert np.isnan(cells[:, i]).all()
    assert len([name for name in every if name.startswith('paths.')]) == 1 + 3 * 4


@pytest.mark.parametrize('make', [toy_cross_encoder, toy_bi_encoder])
def test_estimates_are_first_order(make):
    """Paths to the score are exact; the estimate of a receiver is the derivative along what it is told."""
    model, frame = make('bert'), pairs(5)
    exact, estimate = PatchPaths(model, RECEIVERS)(frame), AttributePaths(model, RECEIVERS)(frame)
    names = [name for name in exact if '>' in name]
    for name in names:
        if name.endswith('score'):
            np.testing.assert_allclose(estimate[name], exact[name], atol=1e-10)
    heads = [name for name in names if not name.endswith('score')]
    a, b = (res[heads].to_numpy(dtype=float).ravel() for res in (estimate, exact))
    assert np.corrcoef(a[~np.isnan(a)], b[~np.isnan(b)])[0, 1] > 0.9
    # By hooks: the same derivative, from a thousandth of the way to what the sender tells.
    row = next(row for row, ok in zip(frame.itertuples(), exact.patchable) if ok == 'yes')
    wanted = oracle.path_effects(model, sides(model, row), (0, 1), [unit('L1H2.k'), unit('L1H0.v')], part=1e-4)
    found = estimate.loc[row.Index, ['L0H1>L1H2.k', 'L0H1>L1H0.v']].to_numpy(dtype=float)
    np.testing.assert_allclose(found, np.array(wanted) / 1e-4, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize('make', [toy_cross_encoder, toy_bi_encoder])
def test_estimates_of_paths_to_the_score_alone(make):
    model, frame = make('bert'), pairs(5)
    exact, estimate = PatchPaths(model)(frame), AttributePaths(model)(frame)
    names = [name for name in exact if '>' in name]
    np.testing.assert_allclose(estimate[names], exact[names], atol=1e-10)
    effects = [PathEffects.from_frame(res, n_resamples=10).to_frame() for res in (exact, estimate)]
    np.testing.assert_allclose(effects[1]['ratio'], effects[0]['ratio'], atol=1e-10)


@pytest.mark.real
def test_the_real_ranker():
    frame = real_pairs(2)
    model = CrossEncoder(module_of(real_cross_encoder()), tokenizer=tokenizer_of(real_cross_encoder()))
    res = PatchPaths(model, ['score', 'L2H9.k'], senders=['L1H1', 'L0H4'])(frame)
    for i, row in enumerate(frame.itertuples()):
        for sender in ((1, 1), (0, 4)):
            wanted = oracle.path_effects(model, sides(model, row), sender, [None, ('k', 2, 9)])
            name = f'L{sender[0]}H{sender[1]}'
            found = [res[f'{name}>score'][i], res[f'{name}>L2H9.k'][i]]
            np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=0)


def test_rows_that_cannot_be_patched():
    model = toy_cross_encoder('bert', max_length=24)
    res = PatchPaths(model, 'all')(unpatchable_pairs())
    assert [bool(np.isnan(cell).all()) for cell in res['paths.score']] == [True, True, True, False]
    assert PatchPaths(model)(unpatchable_pairs())['L0H1>score'].isna().tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ('settings', 'said'),
    [
        ({'receivers': 'L2H9'}, "a receiver is 'score' or what a head reads"),
        ({'receivers': []}, 'a list of different receivers'),
        ({'receivers': ['L1H0.q', 'L1H0.q']}, 'a list of different receivers'),
        ({'receivers': ['L7H0.q']}, 'does not have it'),
        ({'receivers': ['L1H0.pattern']}, "a receiver is 'score'"),
        ({'receivers': ['L0H0.q']}, 'no sender stands below L0H0.q'),
        ({'senders': ['L0H9']}, 'does not have it'),
        ({'senders': ['L0N2']}, 'heads'),
    ],
)
def test_what_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        PatchPaths(toy_cross_encoder('bert'), **settings)(pairs(2))
