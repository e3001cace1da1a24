"""Activations against hooks on the unmodified module, one unpadded forward a row."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
from oracles import block_places, plain, projections, towers_of
from toys import FAMILIES, TEXTS, frame_of, pairs, real_cross_encoder, toy_bi_encoder, toy_cross_encoder, toy_module

from pyterrier_mech import Activations, BiEncoder, CrossEncoder, PatchHeads, PatchLayers
from pyterrier_mech.units import Site, head, sites_of, unit_columns

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings('ignore:.*cannot be patched')]

KINDS = ('heads', 'neurons', 'resid_pre', 'attn_out', 'mlp_out')
KEEPS = ('mean', 'sum', 'read', 'token_type', 'all')


@torch.no_grad()
def by_hooks(module, inputs):
    """{site: its tensor [tokens, width]} of one row."""
    seen, handles = {}, []
    places = {**block_places(module), **{site: (part, True) for site, part in projections(module).items()}}
    for (kind, layer), (part, is_input) in places.items():
        name = f'{kind}.L{layer}'
        if is_input:
            hook = lambda _, args, name=name: seen.update({name: args[0][0].numpy().copy()})  # noqa: E731
            handles.append(part.register_forward_pre_hook(hook))
        else:
            hook = lambda _, args, out, name=name: seen.update({name: out[0].numpy().copy()})  # noqa: E731
            handles.append(part.register_forward_hook(hook))
    seen['out'] = module(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def reduced(values, keep, kinds, pooling):
    """{end of the column: what is kept} of one site's tensor."""
    if keep == 'token_type':
        where = {kind: [i for i, one in enumerate(kinds) if one == kind] for kind in
                 ('cls', 'query', 'sep', 'doc_match', 'doc_other')}  # fmt: skip
        none = np.full(values.shape[1], np.nan)
        return {f'.{kind}': values[rows].mean(0) if rows else none for kind, rows in where.items()}
    mean = values.mean(0)
    return {
        '': {'mean': mean, 'sum': values.sum(0), 'read': mean if pooling == 'mean' else values[0], 'all': values}[keep]
    }


@pytest.mark.parametrize('make', [toy_cross_encoder, toy_bi_encoder])
@pytest.mark.parametrize('family', FAMILIES)
def test_every_site_and_way_to_keep_in_every_family(make, family):
    model, frame = make(family), frame_of(16).iloc[[1, 6, 11]]
    is_bi = make is toy_bi_encoder
    pooling = 'mean' if is_bi or family == 'modernbert' else 'cls'
    results = {keep: Activations(model, KINDS, keep=keep)(frame) for keep in KEEPS}
    compared = 0
    for i, row in enumerate(frame.itertuples()):
        for tower, (inputs, kinds) in enumerate(towers_of(plain(model), row.query, row.text)):
            start = f'activation.{("query.", "text.")[tower] if is_bi else ""}'
            tokens = model.tokenizer.convert_ids_to_tokens(inputs['input_ids'][0].tolist())
            assert results['all'][f'{start}tokens'].iloc[i] == tokens
            assert results['all'][f'{start}types'].iloc[i] == kinds
            seen = by_hooks(model.model, inputs)
            seen.pop('out')
            for keep, res in results.items():
                for name, values in seen.items():
                    for end, expected in reduced(values, keep, kinds, pooling).items():
                        found = res[f'{start}{name}{end}'].iloc[i]
                        np.testing.assert_allclose(found, expected, atol=1e-10, rtol=0)
                        compared += 1
    assert compared == 3 * (1 + is_bi) * len(KINDS) * model.n_layers * 9


def test_residual_stream_after_the_last_layer_and_embeddings():
    model, frame = toy_cross_encoder(fresh=True), frame_of(2)
    res = Activations(model, ['resid_post', 'embeddings'], keep='all')(frame)
    added = [name for name in res if name.startswith('activation.')]
    assert added == [
        f'activation.{name}' for name in ('resid_post.L0', 'resid_post.L1', 'embeddings.L0', 'tokens', 'types')
    ]
    for row in res.itertuples():
        inputs = model.tokenizer(row.query, row.text, return_tensors='pt')
        with torch.no_grad():
            hidden = model.model.base_model(**inputs, output_hidden_states=True).hidden_states
            words = model.model.get_input_embeddings()(inputs['input_ids'])
        found = res.loc[row.Index]
        for layer in (0, 1):
            np.testing.assert_allclose(found[f'activation.resid_post.L{layer}'], hidden[layer + 1][0], atol=1e-10)
        np.testing.assert_allclose(found['activation.embeddings.L0'], words[0], atol=1e-12)


def test_what_is_read_of_the_last_layer_is_the_vector_of_a_bi_encoder():
    for pooling in ('mean', 'cls'):
        model, frame = toy_bi_encoder(pooling=pooling), frame_of(5)
        res = Activations(model, 'resid_post.L1', keep='read')(frame)
        for field in ('query', 'text'):
            found = np.stack(res[f'activation.{field}.resid_post.L1'].tolist())
            np.testing.assert_allclose(found, model.encode(field, frame[field]), atol=1e-10)


def test_prompts_that_are_not_read_out_are_not_kept_as_read():
    module, tokenizer = toy_module('bert', classifier=False)
    model = BiEncoder(module, tokenizer=tokenizer, pooling='mean', query_prefix='dough rise: ')
    res = Activations(model, 'resid_post.L1', keep='read')(frame_of(2))
    found = np.stack(res['activation.query.resid_post.L1'].tolist())
    np.testing.assert_allclose(found, model.encode('query', frame_of(2)['query']), atol=1e-10)


def test_after_an_edit_the_text_as_it_is_now_is_read():
    model, frame = toy_cross_encoder(), pairs(4)
    now = Activations(model, 'mlp_out.L0')
    plainly = now(frame.drop(columns='text_0'))
    before = now(frame.drop(columns='text_0').assign(text=frame['text_0']))
    for name, expected in (('text', plainly), ('text_0', before)):
        found = Activations(model, 'mlp_out.L0', text_field=name)(frame)['activation.mlp_out.L0']
        np.testing.assert_allclose(np.stack(found), np.stack(expected['activation.mlp_out.L0']), atol=1e-12)


def test_columns_do_not_meet_those_of_other_stages():
    model, frame = toy_cross_encoder(), pairs(3)
    effects = (PatchHeads(model) >> PatchLayers(model, by='position'))(frame)
    res = Activations(model, ['heads', 'resid_pre', 'neurons'], keep='token_type')(effects)
    assert unit_columns(res) == unit_columns(effects) and not unit_columns(res, 'neurons')
    pd.testing.assert_frame_equal(res[effects.columns], effects)


def test_half_precision_is_summed_in_float32():
    module, tokenizer = toy_module('bert', dtype=torch.bfloat16)
    frame = frame_of(2).assign(text=' '.join(TEXTS))
    model = CrossEncoder(module, tokenizer=tokenizer)
    every, mean = (Activations(model, 'resid_pre.L1', keep=keep)(frame) for keep in ('all', 'mean'))
    for whole, found in zip(every['activation.resid_pre.L1'], mean['activation.resid_pre.L1']):
        assert whole.dtype == found.dtype == np.float32
        np.testing.assert_allclose(found, whole.mean(0), atol=1e-6)


@pytest.mark.parametrize(('query', 'text'), [('rust', ''), ('', 'rust'), ('', ''), ('a', 'b')])
def test_the_shortest_texts(query, text):
    frame = frame_of(2)
    frame.loc[0, ['query', 'text']] = [query, text]
    for model in (toy_cross_encoder(), toy_bi_encoder()):
        for keep in KEEPS:
            res = Activations(model, ['heads'], keep=keep)(frame)
            alone = Activations(model, ['heads'], keep=keep)(frame.iloc[:1])
            for name in [name for name in res if '.heads.' in name]:
                np.testing.assert_allclose(res[name].iloc[0], alone[name].iloc[0], atol=1e-10)


def test_memory_is_that_of_what_is_kept():
    model, frame = toy_cross_encoder(batch_tokens=200), frame_of(16)
    frame = frame.loc[np.repeat(frame.index, 8)].reset_index(drop=True)
    stage = Activations(model, ['resid_pre', 'mlp_out', 'neurons'])
    stage(frame.iloc[:4])
    tracemalloc.start()
    stage(frame)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    width = 2 * (32 + 32 + 48)
    tokens = sum(map(len, Activations(model, 'mlp_out.L0', keep='all')(frame)['activation.tokens']))
    assert most < 8 * len(frame) * width * 4 < 8 * tokens * width / 3


@pytest.mark.parametrize(
    ('settings', 'error', 'message'),
    [
        ({'sites': 'z'}, ValueError, "sites must name kinds, of .*'resid_pre'.* or single ones, .*; got 'z'"),
        ({'sites': ['heads', 'L0H1']}, ValueError, "got 'L0H1'"),
        ({'sites': ['heads', head(0, 1)]}, ValueError, 'got Unit'),
        ({'sites': 'resid_pre.L2'}, ValueError, r"resid_pre.L2: there is no such site; there are \['resid_pre.L0', "),
        ({'sites': 'resid_pre.L01'}, ValueError, "got 'resid_pre.L01'"),
        ({'sites': 'enc.resid_pre.L0'}, ValueError, "got 'enc.resid_pre.L0'"),
        ({'sites': 3}, TypeError, 'sites must be a list of names, .*; got 3'),
        ({'sites': 'heads', 'keep': 'cls'}, ValueError, "keep must be one of .*got keep='cls'"),
    ],
)
def test_bad_settings(settings, error, message):
    for frame in (frame_of(2), frame_of(2).iloc[:0]):
        with pytest.raises(error, match=message):
            Activations(toy_cross_encoder(), **settings)(frame)


def test_names_of_sites():
    there = {'mlp_out': [Site('mlp_out', 0), Site('mlp_out', 1)], 'k': [Site('k', 0, 'cross')]}
    for sites in there.values():
        assert [sites_of(site.name, there) for site in sites] == [[site] for site in sites]
    assert sites_of(['mlp_out.L1', 'mlp_out', Site('k', 0, 'cross')], there) == [
        Site('mlp_out', 1), Site('mlp_out', 0), Site('k', 0, 'cross')
    ]  # fmt: skip
    assert sites_of([], there) == []


@pytest.mark.real
def test_real_cross_encoder():
    model = real_cross_encoder()
    res = Activations(model, ['heads.L2', 'resid_pre.L5'], keep='all')(frame_of(2))
    seen = by_hooks(model.map.module, model.maker.tokenizer(res['query'][0], res['text'][0], return_tensors='pt'))
    for name in ('heads.L2', 'resid_pre.L5'):
        np.testing.assert_allclose(res[f'activation.{name}'][0], seen[name], atol=1e-5)
