"""Patching and ablation of ColBERT and Splade against hooks on the unmodified modules, with inputs made by hand."""

import late
import numpy as np
import oracles
import pandas as pd
import pytest
import torch
from toys import QUERIES, TEXTS, effects_of

from pyterrier_mech import AblatedReranker, AblateHeads, PatchedReranker, PatchHeads, PatchLayers

pytestmark = pytest.mark.numeric

# query, text_0, what comes before it, what comes after it
ROWS = [
    (QUERIES[0], TEXTS[0], '', ' bread'),
    (QUERIES[1], TEXTS[1], 'dough rust ', ''),
    (QUERIES[2], TEXTS[2], '', ' winter, theracort!'),
    (QUERIES[3], TEXTS[3], '', ' bread'),
]
FAMILIES = ['bert', 'distilbert', 'roberta', 'modernbert', 'deberta-v2']
MASKED = ['bert', 'distilbert', 'electra', 'roberta', 'modernbert', 'mpnet']


def frame(field='text'):
    rows = [
        {
            'qid': str(i),
            'docno': str(i),
            'query': query,
            'text': text,
            f'{field}_0': {'query': query, 'text': text}[field],
        }
        for i, (query, text, _, _) in enumerate(ROWS)
    ]
    edited = [before + row[field] + after for row, (_, _, before, after) in zip(rows, ROWS, strict=True)]
    return pd.DataFrame(rows).assign(**{field: edited, 'edited': field})


def sides(model, row, tower, edited, filler):
    """For the original and the perturbed input of a tower: what the module takes, and which tokens are compared."""
    words, (query, text, before, after) = model.tokenizer, row
    plain = {'query': query, 'text': text}[tower]

    def ids(part):
        return words(part, add_special_tokens=False)['input_ids']

    left, right = (len(ids(before)), len(ids(after))) if edited == tower else (0, 0)
    body = ids(before + plain + after) if edited == tower else ids(plain)
    filled = words.pad_token_id if filler == 'mask' else ids(' a')[0]
    first, last = words.cls_token_id, words.sep_token_id
    marker = words.convert_tokens_to_ids('[unused0]' if tower == 'query' else '[unused1]')
    colbert = type(model).__name__ == 'ColBERT'
    start = [first, marker] if colbert and model.query_marker is None else [first]
    made = []
    for perturbed in (False, True):
        middle = len(body) - left - right
        kept = body if perturbed else [filled] * left + body[left : left + middle] + [filled] * right
        hidden = [] if perturbed or filler != 'mask' else [*range(left), *range(left + middle, len(body))]
        tokens = [*start, *kept, last]
        shown = torch.ones(len(tokens), dtype=torch.long)
        shown[[len(start) + place for place in hidden]] = 0
        attended, fill = shown.clone(), max(0, 16 - int(shown.sum())) if colbert and tower == 'query' else 0
        tokens += [words.mask_token_id] * fill
        shown = torch.cat([shown, torch.ones(fill, dtype=torch.long)])
        attended = torch.cat([attended, torch.zeros(fill, dtype=torch.long)])
        inputs = {'input_ids': torch.tensor([tokens]), 'attention_mask': attended[None]}
        if filler == 'mask':  # numbered without a gap; what is hidden has position 0
            inputs['position_ids'] = (shown.cumsum(0) * shown - 1).clamp(min=0)[None]
        compared = shown.bool()
        if colbert and tower == 'text':
            marks = [words.convert_tokens_to_ids(mark) for mark in '.,!-']
            compared &= ~torch.isin(torch.tensor(tokens), torch.tensor(marks))
        made.append((inputs, compared))
    longest = max(inputs['input_ids'].shape[1] for inputs, _ in made)
    return [(padded(inputs, longest), cut_to(compared, longest)) for inputs, compared in made]


def padded(inputs, longest):
    """With hidden positions behind: where a shorter side has fewer masks."""
    return {name: torch.nn.functional.pad(value, (0, longest - value.shape[1])) for name, value in inputs.items()}


def cut_to(compared, longest):
    return torch.nn.functional.pad(compared, (0, longest - len(compared)))


@torch.no_grad()
def score(model, towers, compared, edits=None):
    """MaxSim or the dot product of one row."""
    colbert = type(model).__name__ == 'ColBERT'
    module = model.model.base_model if colbert else model.model
    outputs = [oracles.changed(module, inputs, edit) for inputs, edit in zip(towers, edits or [{}, {}], strict=True)]
    if colbert:
        q, d = (
            torch.nn.functional.normalize(model.model.projection(out.last_hidden_state[0]), dim=-1) for out in outputs
        )
        return (q[compared[0]] @ d[compared[1]].T).max(1).values.sum().item()
    q, d = (torch.log1p(torch.relu(out.logits[0][there])) for out, there in zip(outputs, compared, strict=True))
    return (q.sum(0) @ d.sum(0) if model.pooling == 'sum' else q.max(0).values @ d.max(0).values).item()


def by_hooks(model, edited, filler='a', reverse=False):
    """Effects [rows, heads]: one full forward of both towers a head."""
    module = model.model.base_model if type(model).__name__ == 'ColBERT' else model.model
    effects = []
    for row in ROWS:
        pairs = [sides(model, row, tower, edited, filler) for tower in ('query', 'text')]
        bases, sources = zip(*[pair[::-1] if reverse else pair for pair in pairs])
        towers, compared = zip(*bases)
        start, seen = score(model, towers, compared), [oracles.activations(module, inputs) for inputs, _ in sources]
        of_row = []
        for layer, _, columns in oracles.head_sites(module):
            edits = [{('heads', layer): oracles.put(columns, one['heads', layer])} for one in seen]
            of_row.append(score(model, towers, compared, edits) - start)
        effects.append(of_row)
    assert np.abs(effects).max() > 1e-3
    return np.asarray(effects)


@pytest.mark.parametrize('family', FAMILIES)
def test_heads_of_colbert_equal_hooks(family):
    model, expected = late.toy_colbert(family), by_hooks(late.toy_colbert(family), 'text')
    for batch_tokens in (1, 100_000):
        res = PatchHeads(model, batch_tokens=batch_tokens)(frame())
        np.testing.assert_allclose(effects_of(res), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize('family', MASKED)
def test_heads_of_splade_equal_hooks(family):
    model, expected = late.toy_splade(family), by_hooks(late.toy_splade(family), 'text')
    for batch_tokens in (1, 100_000):
        res = PatchHeads(model, batch_tokens=batch_tokens)(frame())
        np.testing.assert_allclose(effects_of(res), expected, atol=1e-10, rtol=1e-12)


@pytest.mark.parametrize('make', [late.toy_colbert, late.toy_splade])
@pytest.mark.parametrize('edited', ['text', 'query'])
@pytest.mark.parametrize('filler', ['a', 'mask'])
@pytest.mark.parametrize('reverse', [False, True])
def test_directions_fields_and_fillers_equal_hooks(make, edited, filler, reverse):
    expected = by_hooks(make(), edited, filler, reverse)
    direction = 'original_to_perturbed' if reverse else 'perturbed_to_original'
    res = PatchHeads(make(), filler=filler, direction=direction)(frame(edited))
    assert (res['patchable'] == 'yes').all()
    np.testing.assert_allclose(effects_of(res), expected, atol=1e-10, rtol=1e-12)


@pytest.mark.parametrize('make', [late.toy_colbert, late.toy_splade])
@pytest.mark.parametrize('edited', ['text', 'query'])
def test_hidden_fillers_leave_the_plain_scores(make, edited):
    res, model = PatchHeads(make(), filler='mask')(frame(edited)), make()
    original = frame(edited).assign(**{edited: frame(edited)[f'{edited}_0']})
    for side, rows in (('original', original), ('perturbed', frame(edited))):
        np.testing.assert_allclose(
            res[f'score_{side}'], model.score(rows['query'], rows['text']), atol=1e-10, rtol=1e-12
        )


def test_the_sum_over_tokens_equals_hooks():
    expected = by_hooks(late.toy_splade(pooling='sum'), 'text')
    res = PatchHeads(late.toy_splade(pooling='sum'))(frame())
    # Effects are differences of scores near 600,000 here, so rounding shows at 1e-9.
    largest = np.abs(res[['score_original', 'score_perturbed']].to_numpy()).max()
    np.testing.assert_allclose(effects_of(res), expected, atol=1e-13 * largest, rtol=1e-12)


@pytest.mark.parametrize('make', [late.toy_colbert, late.toy_splade])
@pytest.mark.parametrize('edited', ['text', 'query'])
def test_layers_by_position_agree_with_types(make, edited):
    model, rows = make(), frame(edited)
    typed = PatchLayers(model, sites=['resid_pre'])(rows)
    single = PatchLayers(model, sites=['resid_pre'], by='position')(rows)
    for i in range(len(rows)):
        kinds = single['position_types'].iloc[i]
        assert len(single['resid_pre.L1'].iloc[i]) == len(kinds) == len(single['position_tokens'].iloc[i])
        assert kinds.count('cls') == (4 if make is late.toy_colbert else 2)
        for kind in {one for one in kinds if kinds.count(one) == 1}:
            alone = single['resid_pre.L1'].iloc[i][kinds.index(kind)]
            np.testing.assert_allclose(typed[f'resid_pre.L1.{kind}'].iloc[i], alone, atol=1e-10, rtol=1e-12)


@pytest.mark.parametrize('make', [late.toy_colbert, late.toy_splade])
def test_rerankers_with_an_intervention_agree_with_the_effects(make):
    model, rows = make(), frame()
    effects = PatchHeads(model)(rows)
    patched = PatchedReranker(model, ['L1H2'])(rows).sort_values('qid')
    np.testing.assert_allclose(patched['score'], effects['score_original'] + effects['L1H2'], atol=1e-10, rtol=1e-12)
    ablated = AblateHeads(model)(rows)
    np.testing.assert_allclose(ablated['score_plain'], model.score(rows['query'], rows['text']), atol=1e-10, rtol=1e-12)
    without = AblatedReranker(model, ['L0H1'])(rows).sort_values('qid')
    np.testing.assert_allclose(without['score'], ablated['score_plain'] + ablated['L0H1'], atol=1e-10, rtol=1e-12)
    for value in ('mean', 'resample'):
        one = AblateHeads(model, value, reference=rows)(rows)
        many = AblatedReranker(model, ['L0H1'], value=value, reference=rows)(rows).sort_values('qid')
        np.testing.assert_allclose(many['score'], one['score_plain'] + one['L0H1'], atol=1e-10, rtol=1e-12)
