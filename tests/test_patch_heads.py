"""PatchHeads against hooks on the unmodified module, one full forward a head."""

import logging
import os

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import DESCRIBED, FAMILIES, QUERIES, TEXTS, assets, minilm_path, toy_bi_encoder, toy_cross_encoder
from oracle import head_outputs, patched_outputs
from transformers import AutoModelForSequenceClassification

from pyterrier_mech import BiEncoder, CrossEncoder, HeadEffects, PatchHeads
from pyterrier_mech.inputs.alignment import Aligner
from pyterrier_mech.patch.engine import engine_for

EDITS = [
    lambda text: f'{text} bread',
    lambda text: f'dough rust {text}',
    lambda text: text.replace('the ', 'the bread '),
    lambda text: text.replace('a ', 'dough '),
]


def pairs():
    """16 pairs of different lengths; the edits append, prepend, insert and replace; some change nothing."""
    rows = [(q, t) for q in QUERIES for t in TEXTS]
    edited = [EDITS[(i + i // 4) % 4](t) for i, (_, t) in enumerate(rows)]
    return pd.DataFrame(
        {
            'qid': [str(i // 4) for i in range(16)],
            'query': [q for q, _ in rows],
            'docno': [str(i) for i in range(16)],
            'score': 1.0,
            'rank': [i % 4 for i in range(16)],
            'text': edited,
            'text_0': [t for _, t in rows],
        }
    )


def heads_of(frame):
    return [column for column in frame.columns if column.startswith('L')]


def inputs(model, alignment, side):
    """One side of an aligned pair as model inputs, without padding."""
    ids = torch.tensor(getattr(alignment, side))[None]
    result = {'input_ids': ids, 'attention_mask': torch.tensor(getattr(alignment, f'{side}_mask'))[None]}
    if 'token_type_ids' in model.loaded.maker.tokenizer.model_input_names:
        result['token_type_ids'] = torch.tensor(alignment.segments)[None]
    return result


def oracle(model, res, module, head_dim, *, reverse=False, filler='a'):
    """Frame of effects by one unpadded full forward a head; NaN where the stage says that a pair is not patchable."""
    aligner = Aligner(model.loaded.maker, filler)
    rows = []
    for row in res.itertuples():
        if row.patchable != 'yes':
            rows.append(dict.fromkeys(heads_of(res), np.nan))
            continue
        ids = [
            model.tokenize(f, [t]).row(0) for f, t in [('query', row.query), ('text', row.text_0), ('text', row.text)]
        ]
        alignment = aligner.align([ids[0], ids[1]], [ids[0], ids[2]])
        base, source = (inputs(model, alignment, side) for side in ('original', 'perturbed'))
        if reverse:
            base, source = source, base
        patched = patched_outputs(module, base, source, head_dim, lambda out: out.logits[0, 0].item())
        with torch.no_grad():
            start = module(**base).logits[0, 0].item()
        rows.append({f'L{layer}H{head}': score - start for (layer, head), score in patched.items()})
    return pd.DataFrame(rows)[heads_of(res)]


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('batch_tokens', [1, 300, 100_000])
@pytest.mark.filterwarnings('ignore:.*cannot be patched')
def test_equals_the_oracle_in_every_family(family, batch_tokens):
    model = toy_cross_encoder(family)
    res = PatchHeads(model, batch_tokens=batch_tokens)(pairs())
    expected = oracle(model, res, model.model, 8)
    assert expected.abs().max().max() > 1e-3
    np.testing.assert_allclose(res[heads_of(res)], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize('family', ['bert', 'modernbert', 'mpnet'])
@pytest.mark.filterwarnings('ignore:.*cannot be patched')
def test_the_other_direction_equals_the_oracle(family):
    model = toy_cross_encoder(family)
    res = PatchHeads(model, direction='original_to_perturbed')(pairs())
    np.testing.assert_allclose(res[heads_of(res)], oracle(model, res, model.model, 8, reverse=True), atol=1e-10, rtol=0)


@pytest.mark.parametrize('family', DESCRIBED)
@pytest.mark.parametrize('pooling', ['cls', 'mean'])
@pytest.mark.filterwarnings('ignore:.*cannot be patched')
def test_bi_encoder_equals_the_oracle(family, pooling):
    model = toy_bi_encoder(family, pooling)
    res = PatchHeads(model)(pairs())
    aligner = Aligner(model.loaded.maker)

    def pooled(out):
        return out.last_hidden_state[0, 0] if pooling == 'cls' else out.last_hidden_state[0].mean(0)

    checked = 0
    for row in res[res.patchable == 'yes'].itertuples():
        query = torch.tensor(model.encode('query', [row.query])[0])
        alignment = aligner.align(
            *([model.tokenize('text', [text]).row(0)] for text in (row.text_0, row.text)), ['text']
        )
        base, source = (inputs(model, alignment, side) for side in ('original', 'perturbed'))

        def read(out, query=query):
            return torch.cosine_similarity(query, pooled(out), dim=0).item()

        with torch.no_grad():
            start = read(model.model(**base))
        for (layer, head), score in patched_outputs(model.model, base, source, 8, read).items():
            assert getattr(row, f'L{layer}H{head}') == pytest.approx(score - start, abs=1e-10)
            checked += 1
    assert checked > 80


def test_an_edited_query_is_patched_in_both_kinds_of_ranker():
    frame = pairs().assign(text=lambda f: f['text_0'], query_0=lambda f: f['query'])
    frame = frame.assign(query=frame['query'] + ' rust').drop(columns='text_0')
    cross = toy_cross_encoder('bert')
    res = PatchHeads(cross)(frame)
    swapped = res.rename(columns={'query': 'query', 'query_0': 'query_0'})
    assert (res.patchable == 'yes').all() and swapped[heads_of(res)].abs().max().max() > 1e-3
    row = res.iloc[5]
    ids = {name: cross.tokenize('text', [row[name]]).row(0) for name in ('query_0', 'query', 'text')}
    alignment = Aligner(cross.loaded.maker).align([ids['query_0'], ids['text']], [ids['query'], ids['text']])
    base, source = (inputs(cross, alignment, side) for side in ('original', 'perturbed'))
    patched = patched_outputs(cross.model, base, source, 8, lambda out: out.logits[0, 0].item())
    assert row['L1H2'] == pytest.approx(patched[1, 2] - row.score_original, abs=1e-10)

    bi = toy_bi_encoder('bert')
    both = PatchHeads(bi)(frame.assign(text_0=frame['text'], text=frame['text'] + ' dough'))
    assert (both.patchable == 'yes').all()
    one = both.iloc[3]
    vectors = []
    for field in ('query', 'text'):
        aligner = Aligner(bi.loaded.maker)
        alignment = aligner.align(
            *([bi.tokenize(field, [one[name]]).row(0)] for name in (f'{field}_0', field)), [field]
        )
        base, source = (inputs(bi, alignment, side) for side in ('original', 'perturbed'))
        vectors.append(patched_outputs(bi.model, base, source, 8, lambda out: out.last_hidden_state[0].mean(0))[0, 1])
    patched_score = torch.cosine_similarity(*vectors, dim=0).item()
    assert one['L0H1'] == pytest.approx(patched_score - one.score_original, abs=1e-10)


@pytest.mark.filterwarnings('ignore:.*cannot be patched')
def test_mask_filler_reads_the_plain_texts():
    model = toy_cross_encoder('roberta')
    frame = pairs()
    res = PatchHeads(model, filler='mask')(frame)
    for column, text in (('score_original', 'text_0'), ('score_perturbed', 'text')):
        np.testing.assert_allclose(res[column], model.score(list(frame['query']), list(frame[text])), atol=1e-12)
    bert = toy_cross_encoder('bert')
    res = PatchHeads(bert, filler='mask', batch_tokens=10_000)(frame)
    np.testing.assert_allclose(
        res['score_original'], bert.score(list(frame['query']), list(frame['text_0'])), atol=1e-12
    )
    alone = PatchHeads(bert, filler='mask')(frame.iloc[4:5])
    np.testing.assert_allclose(alone[heads_of(res)], res[heads_of(res)].iloc[4:5], atol=1e-12)


def test_layers_with_different_numbers_of_heads():
    """A layer that lost a head is a smaller linear layer; the oracle runs on the same module."""
    model = toy_cross_encoder('bert')
    keep = torch.arange(8, 32)
    attention = model.model.bert.encoder.layer[0].attention
    with torch.no_grad():
        for name in ('query', 'key', 'value'):
            linear = getattr(attention.self, name)
            linear.weight, linear.bias = (torch.nn.Parameter(p[keep]) for p in (linear.weight, linear.bias))
            linear.out_features = 24
        attention.output.dense.weight = torch.nn.Parameter(attention.output.dense.weight[:, keep])
        attention.output.dense.in_features = 24
    res = PatchHeads(model)(pairs().iloc[:1])
    assert heads_of(res) == ['L0H0', 'L0H1', 'L0H2', 'L1H0', 'L1H1', 'L1H2', 'L1H3']
    np.testing.assert_allclose(res[heads_of(res)], oracle(model, res, model.model, 8), atol=1e-10)


# -- identities


def test_identical_texts_have_no_effect_anywhere():
    model = toy_cross_encoder('bert')
    stage = PatchHeads(model)
    ids = model.tokenize('text', TEXTS)
    same = [Aligner(model.loaded.maker).align([ids.row(0), ids.row(i)], [ids.row(0), ids.row(i)]) for i in range(4)]
    forced = [type(a)(**{**a.__dict__, 'problem': ''}) for a in same]
    with model.computing():
        vectors = stage._vectors(engine_for(model), forced, [(0, 1), (1, 3)], 10_000)
    assert torch.allclose(vectors, vectors[:1].expand_as(vectors), atol=1e-13)


def test_patching_all_heads_of_the_first_layer_and_the_embeddings_is_the_other_run():
    """All head outputs of layer 0 swapped at once, plus the layer's input: the whole reaction, in one number."""
    model = toy_cross_encoder('bert')
    res = PatchHeads(model)(pairs().iloc[:1])
    row = res.iloc[0]
    ids = [model.tokenize('text', [text]).row(0) for text in (row['query'], row.text_0, row.text)]
    alignment = Aligner(model.loaded.maker).align([ids[0], ids[1]], [ids[0], ids[2]])
    base, source = (inputs(model, alignment, side) for side in ('original', 'perturbed'))
    z = head_outputs(model.model, source)
    layer = model.model.bert.encoder.layer[0]
    embedded = model.model.bert.embeddings(source['input_ids'], source['token_type_ids'])
    handles = [
        layer.register_forward_pre_hook(lambda _, args: (embedded, *args[1:])),
        layer.attention.output.dense.register_forward_pre_hook(lambda _, args: (z[0],)),
    ]
    with torch.no_grad():
        assert model.model(**base).logits.item() == pytest.approx(row.score_perturbed, abs=1e-12)
    for handle in handles:
        handle.remove()


@pytest.mark.filterwarnings('ignore:.*cannot be patched')
def test_row_order_batches_and_neighbours_do_not_matter():
    model = toy_cross_encoder('bert')
    res = PatchHeads(model)(pairs())
    shuffled = PatchHeads(model, batch_tokens=500)(pairs().sample(frac=1, random_state=3)).sort_index()
    np.testing.assert_allclose(shuffled[heads_of(res)], res[heads_of(res)], atol=1e-12)
    single = pd.concat([PatchHeads(model)(pairs().iloc[i : i + 1]) for i in range(16)])
    np.testing.assert_allclose(single[heads_of(res)], res[heads_of(res)], atol=1e-12)


def test_a_subset_of_heads_gives_the_same_numbers():
    model = toy_cross_encoder('distilbert')
    frame = pairs().iloc[:4]
    every = PatchHeads(model)(frame)
    some = PatchHeads(model, heads=['L1H3', (0, 2)])(frame)
    assert heads_of(some) == ['L0H2', 'L1H3']
    np.testing.assert_allclose(some[heads_of(some)], every[heads_of(some)], atol=1e-13)
    assert heads_of(PatchHeads(model, heads=[])(frame)) == []


def test_normalised_effects_divide_by_the_change_in_the_direction_of_patching():
    model, frame = toy_cross_encoder('bert'), pairs().iloc[:4]
    for direction, sign in (('perturbed_to_original', 1), ('original_to_perturbed', -1)):
        plain = PatchHeads(model, direction=direction)(frame)
        shares = PatchHeads(model, direction=direction, effect='normalized')(frame)
        change = sign * (plain.score_perturbed - plain.score_original)
        np.testing.assert_allclose(shares[heads_of(plain)], plain[heads_of(plain)].div(change, axis=0), atol=1e-12)


# -- the frame


@pytest.mark.filterwarnings('ignore:.*cannot be patched')
def test_one_row_in_one_row_out_and_nothing_else_changes():
    model = toy_cross_encoder('bert')
    inp = pairs().sample(frac=1, random_state=5).assign(extra='kept')
    kept = inp.copy()
    res = PatchHeads(model)(inp)
    pd.testing.assert_frame_equal(inp, kept)
    pd.testing.assert_frame_equal(res[list(inp.columns)], inp)
    new = [column for column in res.columns if column not in inp.columns]
    assert new == ['score_original', 'score_perturbed', 'patchable'] + [f'L{i}H{h}' for i in (0, 1) for h in range(4)]


def test_unpatchable_rows_stay_marked_and_counted():
    model = toy_cross_encoder('bert', max_length=24)
    frame = pairs().iloc[:4].copy()
    long = 'rust ' * 40
    frame['text_0'] = ['same text', long, 'rust keeps', 'rust']
    frame['text'] = ['same text', long + 'bread', 'bread dough winter', 'rust bread']
    with pytest.warns(UserWarning, match=r'3 of 4 pairs cannot be patched \(.*nothing changed: 1'):
        res = PatchHeads(model)(frame)
    assert list(res.patchable) == ['nothing changed', 'edit truncated away', 'no alignment', 'yes']
    assert res[heads_of(res)].iloc[:3].isna().all(axis=None) and res[heads_of(res)].iloc[3].notna().all()
    queries = list(frame['query'])
    np.testing.assert_allclose(res.score_original[:3], model.score(queries, list(frame.text_0))[:3], atol=1e-12)
    np.testing.assert_allclose(res.score_perturbed[:3], model.score(queries, list(frame.text))[:3], atol=1e-12)


def test_zero_rows_give_the_columns():
    res = PatchHeads(toy_cross_encoder('bert'))(pairs().iloc[:0])
    assert len(res) == 0 and list(res.columns)[-8:] == [f'L{i}H{h}' for i in (0, 1) for h in range(4)]
    assert res['L0H0'].dtype.kind == 'f'


def test_duplicate_rows_are_kept():
    frame = pairs().iloc[[0, 0, 1]]
    res = PatchHeads(toy_cross_encoder('bert'))(frame)
    assert list(res.docno) == ['0', '0', '1']
    np.testing.assert_allclose(res[heads_of(res)].iloc[0], res[heads_of(res)].iloc[1], atol=1e-13)


def test_a_missing_original_says_what_to_put_before():
    with pytest.raises(KeyError, match=r'Perturb\(\.\.\.\)'):
        PatchHeads(toy_cross_encoder('bert'))(pairs().drop(columns='text_0'))


@pytest.mark.parametrize('column', ['text', 'text_0'])
def test_null_texts_are_an_error_that_names_the_row(column):
    frame = pairs()
    frame.loc[2, column] = None
    with pytest.raises(ValueError, match=f"no string in column '{column}' \\(qid='0' docno='2'"):
        PatchHeads(toy_cross_encoder('bert'))(frame)


def test_empty_texts_can_be_patched():
    frame = pairs().iloc[:2].assign(text_0=['', 'rust'], text=['bread', ''])
    res = PatchHeads(toy_cross_encoder('bert'))(frame)
    assert list(res.patchable) == ['yes', 'yes'] and res[heads_of(res)].abs().to_numpy().max() > 1e-4


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'direction': 'up'}, "direction='up' is none of"),
        ({'effect': 'ratio'}, "effect='ratio' is none of"),
        ({'heads': ['L7H0']}, 'has no head 0 in layer 7'),
        ({'heads': ['head 3']}, 'does not name a head'),
    ],
)
def test_unknown_settings_name_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        PatchHeads(toy_cross_encoder('bert'), **settings)(pairs())


def test_hooks_are_gone_after_an_exception_and_the_model_is_as_before():
    model = toy_cross_encoder('bert')
    before = model.score(QUERIES, TEXTS)
    handle = model.model.bert.encoder.layer[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError('boom')))
    with pytest.raises(KeyError, match='boom'):
        PatchHeads(model)(pairs())
    handle.remove()
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.model.modules())
    np.testing.assert_array_equal(model.score(QUERIES, TEXTS), before)


def test_out_of_memory_halves_the_budget_and_changes_no_number(monkeypatch):
    from pyterrier_mech.patch import wavefront

    model = toy_cross_encoder('bert', batch_tokens=5000)
    frame = pairs().iloc[:4]
    expected = PatchHeads(model)(frame)
    real = wavefront._go_on

    def limited(layer, states, *args):
        if states.shape[0] * states.shape[1] * states.shape[2] > 60:
            raise torch.OutOfMemoryError('device memory is full')
        return real(layer, states, *args)

    monkeypatch.setattr(wavefront, '_go_on', limited)
    res = PatchHeads(model)(frame)
    assert model.loaded.budget.tokens < 200
    np.testing.assert_allclose(res[heads_of(res)], expected[heads_of(res)], atol=1e-12)


def test_families_without_a_fast_engine_say_so_once(caplog):
    from pyterrier_mech.patch import engine

    engine._told.clear()
    model = toy_cross_encoder('mpnet')
    with caplog.at_level(logging.INFO, logger='pyterrier_mech'):
        PatchHeads(model)(pairs().iloc[:2])
        PatchHeads(model)(pairs().iloc[:2])
    assert caplog.text.count('mpnet: no fast engine') == 1


def test_effects_say_how_they_were_made():
    model, frame = toy_cross_encoder('bert'), pairs().iloc[:4].assign(qid=list('abcd'))
    frames = {d: PatchHeads(model, direction=d)(frame) for d in ('perturbed_to_original', 'original_to_perturbed')}
    for direction, res in frames.items():
        change = (res.score_perturbed - res.score_original).sum() * (1 if direction.startswith('p') else -1)
        ratios = HeadEffects.from_frame(res).to_frame().set_index('name')['ratio']
        np.testing.assert_allclose(ratios['L0H2'], res['L0H2'].sum() / change)
    with pytest.raises(ValueError, match='ratios already'):
        HeadEffects.from_frame(PatchHeads(model, effect='normalized')(frame))


def test_equality_and_repr():
    model = BiEncoder(minilm_path())
    assert PatchHeads(model) == PatchHeads(model, verbose=True, batch_tokens=7) != PatchHeads(model, filler='mask')
    stage = PatchHeads(model, heads=('L0H1',), direction='original_to_perturbed')
    assert eval(repr(stage)) == stage and hash(eval(repr(stage))) == hash(stage)


# -- the real cross-encoder on real pairs


def real_pairs(folder, count):
    topics = pd.read_csv(folder / 'dl' / 'topics.tsv', sep='\t', dtype=str)
    docs = pd.read_json(folder / 'dl' / 'docs.jsonl.gz', lines=True, dtype={'docno': str})
    drawn = pd.read_csv(folder / 'dl' / 'pairs_TDC.tsv', sep='\t', dtype=str).sample(count, random_state=0)
    frame = drawn.merge(topics, on='qid').merge(docs, on='docno')
    return frame.assign(text_0=frame['text'], text=frame['text'] + ' ' + frame['added'])


@pytest.fixture
def _all_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures('_all_cores')
def test_real_cross_encoder_equals_the_oracle_on_fifty_real_pairs():
    """To 1e-5; where the oracle in float32 is itself further from float64 than that, by no more than it is."""
    path = str(assets() / 'models' / 'ce-minilm-l6')
    model, frame = CrossEncoder(path, device='cpu'), real_pairs(assets(), 50)
    res = PatchHeads(model, batch_tokens=20_000)(frame)
    module = AutoModelForSequenceClassification.from_pretrained(path).eval()
    assert (res.patchable == 'yes').all() and len(heads_of(res)) == 72
    expected = oracle(model, res, module, 32)
    assert expected.abs().max().max() > 0.1
    difference = (res[heads_of(res)] - expected).abs()
    beyond = (difference > 1e-5).any(axis=1)
    assert beyond.sum() <= 2
    if beyond.any():
        precise = PatchHeads(CrossEncoder(path, device='cpu', dtype='float64'))(frame[beyond])[heads_of(res)]
        assert (difference[beyond] <= 1e-5 + (expected[beyond] - precise).abs()).all(axis=None)


def test_real_cross_encoder_equals_the_oracle_in_float64():
    path = str(assets() / 'models' / 'ce-minilm-l6')
    model = CrossEncoder(path, device='cpu', dtype='float64')
    res = PatchHeads(model)(real_pairs(assets(), 3))
    module = AutoModelForSequenceClassification.from_pretrained(path).double().eval()
    np.testing.assert_allclose(res[heads_of(res)], oracle(model, res, module, 32), atol=1e-10, rtol=0)
