"""AttributeTokens against captum, a loop over the points, and the change of the score."""

import inside
import numpy as np
import pytest
import torch
from toys import FAMILIES, QUERIES, TEXTS, frame_of, real_cross_encoder, toy_bi_encoder, toy_cross_encoder
from unigram import unigram_tokenizer

from pyterrier_mech import AttributeTokens, BiEncoder, CrossEncoder

pytestmark = pytest.mark.numeric

EXACT = {'tolerance': 1e-4, 'max_points': 1025}


def masked(model, texts, moves):
    """Ids, the ids of the baseline and the other inputs, by the tokenizer's own encoding."""
    encoded = model.tokenizer(*[[text] for text in texts], return_tensors='pt')
    owners = np.array([-1 if owner is None else owner for owner in encoded.sequence_ids(0)])
    given = dict(encoded)
    ids = given.pop('input_ids')
    return ids, torch.where(torch.tensor(np.isin(owners, moves))[None], model.tokenizer.pad_token_id, ids), given


def by_hand(score, start, end, points):
    """Trapezoid of the gradient along the line, times the line, for every token."""
    gradients = []
    for alpha in np.linspace(0, 1, points):
        point = (start + alpha * (end - start)).requires_grad_()
        gradients.append(torch.autograd.grad(score(point).sum(), point)[0])
    mean = sum((g + h) / 2 for g, h in zip(gradients, gradients[1:])) / (points - 1)
    return ((end - start) * mean).sum(-1)[0].detach().numpy()


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('baseline', ['all', 'query'])
def test_words_are_sums_of_integrated_gradients(family, baseline):
    model = toy_cross_encoder(family)
    row = AttributeTokens(model, baseline=baseline, points=5, tolerance=1e9)(frame_of(2)).iloc[1]
    ids, start, given = masked(model, [row['query'], row.text], [0, 1] if baseline == 'all' else [0])
    embed = model.model.base_model.get_input_embeddings()
    effects = by_hand(
        lambda point: model.model(inputs_embeds=point, **given).logits, embed(start).detach(), embed(ids).detach(), 5
    )
    encoded = model.tokenizer([row['query']], [row.text])
    words = list(zip(encoded.sequence_ids(0), encoded.word_ids(0)))
    starts = [i for i, word in enumerate(words) if i == 0 or word[0] is None or word != words[i - 1]]
    tolerance = 1e-6 if family == 'modernbert' else 1e-12
    np.testing.assert_allclose(row.token_effects, np.add.reduceat(effects, starts), atol=tolerance)


@pytest.mark.parametrize('family', ['bert', 'deberta-v2'])
def test_the_left_rule_with_many_steps_is_captums_integrated_gradients(family):
    captum = pytest.importorskip('captum.attr')
    model = toy_cross_encoder(family)
    row = AttributeTokens(model, **EXACT)(frame_of(1)).iloc[0]
    ids, start, given = masked(model, [row['query'], row.text], [0, 1])
    embed = model.model.base_model.get_input_embeddings()

    def forward(point):
        return model.model(
            inputs_embeds=point, **{name: value.expand(len(point), -1) for name, value in given.items()}
        ).logits[:, 0]

    effects = captum.IntegratedGradients(forward).attribute(
        embed(ids).detach(), baselines=embed(start).detach(), n_steps=60
    )
    assert len(row.tokens) == ids.shape[1]
    np.testing.assert_allclose(row.token_effects, effects.sum(-1)[0].detach(), atol=1e-5)


@pytest.mark.parametrize('family', FAMILIES)
def test_effects_sum_to_the_change_of_the_score(family):
    model = toy_cross_encoder(family)
    # The ReLU in DistilBERT's head gives gradients that jump.
    tolerance = 5e-3 if family == 'distilbert' else 1e-4
    res = AttributeTokens(model, tolerance=tolerance, max_points=1025)(frame_of(4))
    assert (res['completeness_error.tokens'] <= tolerance).all()
    for row in res.itertuples():
        _, start, given = masked(model, [row.query, row.text], [0, 1])
        # Padding ids would move RoBERTa's positions: embeddings leave them as they are.
        embedded = model.model.base_model.get_input_embeddings()(start)
        with torch.no_grad():
            baseline = model.model(inputs_embeds=embedded, **given).logits.item()
        change = model.score([row.query], [row.text])[0] - baseline
        assert abs(change) > 1e-3
        assert row.token_effects.sum() == pytest.approx(change, rel=20 * tolerance)
        assert len(row.tokens) == len(row.token_effects)


@pytest.mark.parametrize('baseline', ['all', 'query'])
@pytest.mark.parametrize('pooling', ['cls', 'mean'])
def test_bi_encoder_moves_one_tower(baseline, pooling):
    model = toy_bi_encoder('bert', pooling)
    row = AttributeTokens(model, baseline=baseline, **EXACT)(frame_of(2)).iloc[1]
    moving, staying = ('query', 'text') if baseline == 'query' else ('text', 'query')
    words = [token for token in row.tokens if token not in ('[CLS]', '[SEP]')]
    assert ' '.join(words) == row[moving].replace(',', ' ,').replace('.', ' .')
    other = torch.tensor(model.encode(staying, [row[staying]])[0])
    ids, start, given = masked(model, [row[moving]], [0])
    with torch.no_grad():
        hidden = model.model(input_ids=start, **given).last_hidden_state[0]
    vector = hidden[0] if pooling == 'cls' else hidden.mean(0)
    change = model.score([row['query']], [row.text])[0] - torch.cosine_similarity(vector, other, dim=0).item()
    assert row.token_effects.sum() == pytest.approx(change, rel=2e-3) and abs(change) > 1e-3


def test_wordpieces_are_merged():
    model = toy_cross_encoder('bert')
    rows = frame_of(1).assign(query='Why unbelievably?', text='Microorganisms, naïve & 東京.')
    row = AttributeTokens(model, tolerance=1e9)(rows).iloc[0]
    assert row.tokens[:5] == ['[CLS]', 'Why', 'unbelievably', '?', '[SEP]']
    assert row.tokens[5:] == ['Microorganisms', ',', 'naïve', '&', '東', '京', '.', '[SEP]']
    assert len(model.tokenizer('Why unbelievably?')['input_ids']) > 5
    assert list(row.token_effects[[0, 4, -1]]) == [0, 0, 0] and (np.abs(row.token_effects[1:4]) > 0).all()


def test_byte_level_pieces_are_merged():
    model = toy_cross_encoder('roberta')
    rows = frame_of(1).assign(query='naïve bread', text='Zyx keeps — fresh')
    row = AttributeTokens(model, tolerance=1e9)(rows).iloc[0]
    assert row.tokens == ['<s>', 'naïve', 'bread', '</s>', '</s>', 'Zyx', 'keeps', '—', 'fresh', '</s>']


def test_sentencepiece_pieces_are_merged():
    fast = unigram_tokenizer()
    module = toy_cross_encoder('roberta').model
    model = CrossEncoder(module, tokenizer=fast)
    row = AttributeTokens(model, tolerance=1e9)(frame_of(1)).iloc[0]
    words = [word for word in row.tokens if word not in ('<s>', '</s>')]
    assert words == (QUERIES[0] + ' ' + TEXTS[0]).split()
    assert len(fast(QUERIES[0], TEXTS[0])['input_ids']) > len(row.tokens)


def test_truncated_texts_and_prefixes():
    model = toy_cross_encoder('bert', max_length=12)
    row = AttributeTokens(model, tolerance=1e9)(frame_of(2)).iloc[1]
    assert row.tokens == ['[CLS]', 'how', 'to', 'store', 'bread', '[SEP]', 'A', 'slow', 'rise', 'in', 'the', '[SEP]']
    cut = AttributeTokens(toy_cross_encoder('bert', max_length=9), tolerance=1e9)(
        frame_of(1).assign(query='a', text='bread unbelievably')
    ).iloc[0]
    assert cut.tokens[:4] == ['[CLS]', 'a', '[SEP]', 'bread'] and 'unbelievably'.startswith(cut.tokens[4])
    bi = toy_bi_encoder('bert')
    prefixed = BiEncoder(bi.model, tokenizer=bi.tokenizer, pooling='mean', query_prefix='query: ')
    row = AttributeTokens(prefixed, baseline='query', tolerance=1e9)(frame_of(1)).iloc[0]
    assert row.tokens == ['[CLS]', 'query', ':', 'how', 'to', 'store', 'bread', '[SEP]']


def test_special_tokens_inside_a_text_are_words_of_their_own():
    model = toy_cross_encoder('bert')
    words, starts = inside.merged(model, {'query': 'a [SEP] b', 'text': ''}, 6)
    assert words == ['[CLS]', 'a', '[SEP]', 'b', '[SEP]', '[SEP]'] and starts == list(range(6))
    with pytest.raises(ValueError, match='gives 6 tokens for an input of 7'):
        inside.merged(model, {'query': 'a [SEP] b', 'text': ''}, 7)


def test_no_point_is_computed_twice():
    model = toy_cross_encoder('bert', fresh=True)
    passed = []
    handle = model.model.bert.encoder.layer[0].register_forward_pre_hook(lambda _, args: passed.append(len(args[0])))
    res = AttributeTokens(model, points=3, tolerance=1e-3)(frame_of(1))
    used = sum(passed)
    assert used in (5, 9, 17, 33, 65)
    again = AttributeTokens(model, points=used, max_points=used)(frame_of(1))
    assert sum(passed) == 2 * used
    handle.remove()
    np.testing.assert_allclose(again.token_effects[0], res.token_effects[0], atol=1e-12)


@pytest.mark.parametrize('family', ['roberta', 'modernbert'])
def test_row_order_batches_and_neighbours_do_not_matter(family):
    model = toy_cross_encoder(family)
    res = AttributeTokens(model, tolerance=0.005)(frame_of(4))
    for tokens in (1, 500, 100_000):
        other = AttributeTokens(model, tolerance=0.005, batch_tokens=tokens)(frame_of(4).sample(frac=1, random_state=3))
        for mine, theirs in zip(other.sort_index().token_effects, res.token_effects):
            np.testing.assert_allclose(mine, theirs, atol=1e-6 if family == 'modernbert' else 1e-12)
        assert list(other.sort_index().tokens) == list(res.tokens)


def test_rows_above_the_tolerance_are_counted_once():
    stage = AttributeTokens(toy_cross_encoder('bert'), points=3, tolerance=1e-9, max_points=5)
    with pytest.warns(UserWarning, match='4 of 4 rows have a completeness error above') as caught:
        stage(frame_of(4))
    assert len(caught) == 1


def test_columns():
    inp = frame_of(2)
    res = AttributeTokens(toy_cross_encoder('bert', dtype=torch.float32))(inp)
    assert list(res.columns) == [*inp.columns, 'tokens', 'token_effects', 'completeness_error.tokens']
    assert res.token_effects.iloc[0].dtype == np.float32 and isinstance(res.tokens.iloc[0], list)


def test_equality_and_repr_by_settings():
    model = CrossEncoder('some/name')
    stages = [AttributeTokens(model), AttributeTokens(model, baseline='query', points=17)]
    assert stages[0] != stages[1]
    for stage in stages:
        assert eval(repr(stage)) == stage and hash(eval(repr(stage))) == hash(stage)


def test_empty_texts():
    rows = frame_of(3).assign(query=['', 'bread', ''], text=['bread', '', ''])
    res = AttributeTokens(toy_cross_encoder('bert'))(rows)
    assert list(map(len, res.tokens)) == [4, 4, 3]
    assert res['completeness_error.tokens'][2] < 1e-12 and np.abs(res.token_effects[2]).max() < 1e-12
    bi = AttributeTokens(toy_bi_encoder('bert'))(rows)
    assert list(bi.tokens) == [['[CLS]', 'bread', '[SEP]'], ['[CLS]', '[SEP]'], ['[CLS]', '[SEP]']]


def test_gradients_that_are_not_finite_name_the_row():
    model = toy_cross_encoder('bert', fresh=True)
    with torch.no_grad():
        model.model.bert.embeddings.word_embeddings.weight[model.tokenizer.convert_tokens_to_ids('paint')] = torch.nan
    with pytest.raises(ValueError, match="not finite \\(qid='0' docno='2'"):
        AttributeTokens(model)(frame_of(4))


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'baseline': 'zero'}, "baseline must be one of .*got (baseline=)?'zero'"),
        ({'baseline': lambda ids: ids[1:]}, r"qid='0' docno='0': the baseline has shape \(16,\)"),
        ({'rule': 'right'}, "rule must be one of .*got (rule=)?'right'"),
        ({'points': 1}, 'points must be 2 or more'),
    ],
)
def test_unknown_settings_name_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        AttributeTokens(toy_cross_encoder('bert'), **settings)(frame_of(4))


@pytest.mark.real
def test_real_cross_encoder():
    model = real_cross_encoder()
    rows = frame_of(1).assign(query='what is a cat', text='The cat is a small domesticated carnivorous mammal.')
    row = AttributeTokens(model)(rows).iloc[0]
    assert row['completeness_error.tokens'] <= 0.05
    assert row.tokens[:6] == ['[CLS]', 'what', 'is', 'a', 'cat', '[SEP]']
    assert 'cat' in [row.tokens[i] for i in np.argsort(-row.token_effects)[:2]]
