"""Scores of decoders against sentence-transformers, and against plain Hugging Face one pair at a time."""

import json

import decoders
import numpy as np
import pytest
import torch
from decoders import DECODERS, DESCRIBED, TEMPLATE, encoded, module_of, ranker, tokenizer
from folders import same
from inside import KNOWN, inputs_of, known_for, max_length_of
from toys import PAIRS, frame_of, real_pairs, toy_module

from pyterrier_mech import BiEncoder, CausalReranker, CrossEncoder

pytestmark = pytest.mark.numeric
# Questions that end as Qwen's splitting joins with a line feed, nothing at all, special tokens as text, long ones.
QUERIES = [
    'how to store bread?',
    'why?!',
    'rust',
    '',
    'is {text} it? ',
    'a\n',
    '<|end|>',
    'ÉTÉ…',
    'dough ' * 90,
    'no?\n\n',
]
DOCUMENTS = [
    'Bread keeps best.',
    'x?',
    '\nYeast',
    '',
    '{query} ?\n',
    ' a ',
    'rust ' * 300,
    '漢字?',
    'b',
    'What?\n' * 90,
]
CHAT = '<|start|>judge\n<q>: {{ messages[0].content }}\n<d>: {{ messages[1].content }}<|end|>\n<|start|>answer\n\n\n'


def odd_pairs(long_queries=True):
    """100 pairs; sentence-transformers cuts the document after a long query down to nothing, and then the prompt."""
    queries = [query for query in QUERIES if long_queries or len(query) < 100]
    return [q for q in queries for _ in DOCUMENTS], DOCUMENTS * len(queries)


def by_ids(module, ids, words):
    """Logits of words behind some ids."""
    with torch.no_grad():
        return module(torch.tensor([ids])).logits[0, -1, words].tolist()


@pytest.mark.parametrize('family', DECODERS)
def test_a_template_of_pieces_is_tokenised_as_its_reference_does(family):
    """Prefix, middle and suffix tokenised apart, the middle cut: as the README of Qwen3-Reranker has it."""
    # Float64 is more than the eager attention of Hugging Face can take where padding alone is seen.
    dtype = torch.float64 if family in DESCRIBED else torch.float32
    model = ranker(family, max_length=96, dtype=dtype)
    queries, texts = odd_pairs(long_queries=False)
    prefix, middle, suffix = TEMPLATE
    room = 96 - len(encoded(prefix)) - len(encoded(suffix))
    yes, no = (encoded(word)[0] for word in decoders.WORDS)
    expected = []
    for query, text in zip(queries, texts):
        said = 'query: ' + query + '\ntext: ' + text
        a, b = by_ids(model.model, encoded(prefix) + encoded(said, room) + encoded(suffix), [yes, no])
        expected.append(a - b)
    for batch_tokens in (1, 100_000):
        model.batch_tokens = batch_tokens
        np.testing.assert_allclose(model.score(queries, texts), expected, atol=1e-5, rtol=0)


def test_parts_apart_and_a_single_word():
    """As bge-reranker-v2-gemma: what stands around the texts is tokenised apart, one logit is read."""
    template = ('<|start|>', 'A: {query}', '\n', 'B: {text}', '\n', 'Given A, is B?')
    model = ranker('gemma', template=template, words=('yes',), max_length=90)
    queries, texts = odd_pairs(long_queries=False)
    around = [encoded(part) for part in ('<|start|>', '\n', '\n', 'Given A, is B?')]
    expected = []
    for query, text in zip(queries, texts):
        ids = around[0] + encoded('A: ' + query) + around[1] + encoded('B: ' + text)
        ids = ids[: 90 - len(around[2]) - len(around[3])] + around[2] + around[3]
        expected += by_ids(model.model, ids, [encoded('yes')[0]])
    np.testing.assert_allclose(model.score(queries, texts), expected, atol=1e-10, rtol=0)


def test_of_a_long_query_three_quarters_stay_and_all_of_the_prompt():
    model = ranker(max_length=60)
    inputs = inputs_of(model, ['dough ' * 90, 'dough ' * 90, 'rust'], ['rust ' * 90, 'rust', 'rust ' * 90])
    for row in range(3):
        types = inputs.towers[0].types(row)
        counts = {kind: types.count(kind) for kind in ('query', 'prompt', 'doc_other')}
        room = 60 - counts['prompt']
        assert len(types) == 60 and counts['query'] == (room * 3 // 4, room - 1, 1)[row]
        ids = inputs.batch(0, [row]).tensors['input_ids'][0].tolist()
        assert tokenizer().decode(ids).endswith('<|end|>\nanswer:')


# -- against sentence-transformers


@pytest.fixture(scope='module')
def st():
    return pytest.importorskip('sentence_transformers', minversion='6')


def saved(tmp_path, family, kind, **settings):
    """A folder of Hugging Face, in float32, with a tokenizer as published ones have it."""
    module = module_of(family, kind, torch.float32, fresh=True, **settings)
    module.save_pretrained(tmp_path / 'plain')
    written = {'cross': tokenizer(begin=True), 'causal': tokenizer(), 'last': tokenizer(end=True)}[kind]
    written.save_pretrained(tmp_path / 'plain')
    return str(tmp_path / 'plain')


def logit_score(st, tmp_path, false=True, **settings):
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore

    folder = saved(tmp_path, 'qwen3', 'causal')
    (tmp_path / 'plain' / 'chat_template.jinja').write_text(CHAT)
    parts = [Transformer(folder, transformer_task='text-generation', max_seq_length=128)]
    parts.append(LogitScore(encoded('yes')[0], encoded('no')[0] if false else None))
    model = st.CrossEncoder(modules=parts, device='cpu', **settings)
    model.save_pretrained(str(tmp_path / 'st'), create_model_card=False)
    return model, str(tmp_path / 'st')


def theirs(model, queries, texts):
    return model.predict(list(zip(queries, texts, strict=True)), activation_fn=torch.nn.Identity(), batch_size=7)


@pytest.mark.parametrize('false', [True, False])
def test_a_logit_score_folder_scores_as_it_says(st, tmp_path, false):
    model, folder = logit_score(st, tmp_path, false)
    queries, texts = odd_pairs(long_queries=False)
    found = CausalReranker(folder, device='cpu')
    assert max_length_of(found) == 128
    same(found.score(queries, texts), theirs(model, queries, texts))
    other = ranker(template=('{query} {text}',), words=(3, 4))
    assert found != other and found == CausalReranker(folder, device='cpu')


def test_200_real_pairs(st, tmp_path):
    model, folder = logit_score(st, tmp_path)
    frame = real_pairs(200)
    queries = [query + '?' * (i % 3 == 0) for i, query in enumerate(frame['query'])]
    same(
        CausalReranker(folder, device='cpu').score(queries, frame['text']), theirs(model, queries, list(frame['text']))
    )


def test_the_prompt_of_a_folder_is_a_system_message(st, tmp_path):
    model, folder = logit_score(st, tmp_path, prompts={'task': 'Find bread.'}, default_prompt_name='task')
    chat = '{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}<|end|>\n{% endfor %}answer:'
    for path in ('st', 'plain'):
        (tmp_path / path / 'chat_template.jinja').write_text(chat)
    model = st.CrossEncoder(folder, device='cpu')
    queries, texts = odd_pairs(long_queries=False)
    same(CausalReranker(folder, device='cpu').score(queries[:40], texts[:40]), theirs(model, queries[:40], texts[:40]))


@pytest.mark.parametrize('family', ['llama', 'mistral', 'qwen2', 'qwen3', 'gemma', 'gemma2', 'phi3'])
def test_cross_encoders_read_the_last_token(st, tmp_path, family):
    folder = saved(tmp_path, family, 'cross')
    queries, texts = odd_pairs()
    found = CrossEncoder(folder, device='cpu', max_length=120, query_prefix='query: ', text_prefix='document: ')
    read, plain = tokenizer(begin=True), module_of(family, 'cross', torch.float32)
    expected = []
    for query, text in zip(queries, texts):
        sides = ['query: ' + query], ['document: ' + text]
        inputs = read(*sides, truncation=True, max_length=120, return_tensors='pt')
        with torch.no_grad():
            expected.append(plain(**inputs).logits[0, 0].item())
    same(found.score(queries, texts), expected)
    without = CrossEncoder(folder, device='cpu', max_length=120)
    same(without.score(queries, texts), theirs(st.CrossEncoder(folder, device='cpu', max_length=120), queries, texts))


def test_the_frame_of_one_string():
    """RankLLaMA as it is trained today: query and document in one string, which ends in EOS."""
    model = ranker('llama', 'cross', template='<|start|>query: {query} document: {text}<|end|>', max_length=80)
    queries, texts = odd_pairs(long_queries=False)
    expected = []
    for query, text in zip(queries, texts):
        ids = encoded(f'<|start|>query: {query} document: {text}', 79) + [2]
        with torch.no_grad():
            expected.append(model.model(torch.tensor([ids])).logits[0, 0].item())
    np.testing.assert_allclose(model.score(queries, texts), expected, atol=1e-10, rtol=0)


def test_padding_that_is_the_last_token_is_not_read():
    """Where padding and end are one token, Hugging Face reads the token before the end."""
    module = module_of('qwen3', 'cross', fresh=True)
    module.config.pad_token_id = 2
    model = CrossEncoder(module, tokenizer=tokenizer(), template='query: {query}\n{text}<|end|>')
    queries, texts = odd_pairs(long_queries=False)
    texts = [text[:300] for text in texts]
    padded = tokenizer()([f'query: {q}\n{t}<|end|>' for q, t in zip(queries, texts)], truncation=True, max_length=256)
    with torch.no_grad():
        expected = [module(torch.tensor([ids])).logits[0, 0].item() for ids in padded['input_ids']]
    short = [i for i, ids in enumerate(padded['input_ids']) if len(ids) < 256]
    np.testing.assert_allclose(model.score(queries, texts)[short], np.asarray(expected)[short], atol=1e-10, rtol=0)


@pytest.mark.parametrize('prompt', ['Instruct: find\nQuery: ', ''])
def test_bi_encoders_of_the_last_token(st, tmp_path, prompt):
    modules = pytest.importorskip('sentence_transformers.sentence_transformer.modules')
    folder = saved(tmp_path, 'qwen3', 'last')
    parts = [modules.Transformer(folder, max_seq_length=60), modules.Pooling(32, 'lasttoken'), modules.Normalize()]
    model = st.SentenceTransformer(modules=parts, device='cpu', prompts={'query': prompt, 'document': ''})
    model.save_pretrained(str(tmp_path / 'st'), create_model_card=False)
    queries, texts = odd_pairs()
    vectors = model.encode_query(queries, batch_size=7), model.encode_document(texts, batch_size=7)
    found = BiEncoder(str(tmp_path / 'st'), device='cpu')
    same(found.score(queries, texts), model.similarity_pairwise(*vectors).numpy())
    ids = inputs_of(found, ['rust'], ['bread']).batch(1, [0]).tensors['input_ids'][0].tolist()
    assert ids[-1] == 2, 'the end token is what is read'


def test_prompts_of_other_names_are_not_passed_by(st, tmp_path):
    modules = pytest.importorskip('sentence_transformers.sentence_transformer.modules')
    parts = [modules.Transformer(saved(tmp_path, 'qwen3', 'last')), modules.Pooling(32, 'lasttoken')]
    model = st.SentenceTransformer(modules=parts, device='cpu', prompts={'web_search_query': 'Instruct: '})
    model.save_pretrained(str(tmp_path / 'st'), create_model_card=False)
    with pytest.raises(ValueError, match='prompts .*web_search_query.* none is named "query"'):
        BiEncoder(str(tmp_path / 'st'), device='cpu').score(['rust'], ['bread'])
    found = BiEncoder(str(tmp_path / 'st'), device='cpu', query_prefix='Instruct: ')
    vectors = model.encode(['rust'], prompt_name='web_search_query'), model.encode(['bread'])
    same(found.score(['rust'], ['bread']), model.similarity_pairwise(*vectors).numpy())


# -- what is refused


@pytest.mark.parametrize(
    ('settings', 'error', 'message'),
    [
        ({'words': ('yes', 'yeast')}, ValueError, r"words must be single tokens of this model; 'yeast' is \["),
        ({'words': ('yes', 'yes')}, ValueError, 'words must be one word'),
        ({'words': 'yes'}, ValueError, 'words must be one word'),
        ({'words': (10_000,)}, ValueError, 'words must be single tokens'),
        ({'words': None}, ValueError, 'does not say what it answers: give words='),
        ({'template': None}, ValueError, 'does not say how it asks: give template=.*qwen3-reranker'),
        ({'template': '{query}'}, ValueError, r'template must have \{text\} once; got it 0 times'),
        ({'template': ('{query}{text}', '{text}')}, ValueError, r'template must have \{text\} once; got it 2 times'),
        ({'template': ('{query}', 5)}, TypeError, 'template must be a string'),
        ({'instruction': 'Find.'}, ValueError, r'the template has no \{instruction\}'),
        ({'template': '{instruction}{query}{text}'}, ValueError, 'give instruction='),
        ({'max_length': 9}, ValueError, 'max_length=9 has no room for query and text beside the prompt'),
    ],
)
def test_what_a_causal_re_ranker_must_know(settings, error, message):
    with pytest.raises(error, match=message):
        ranker(**settings).score(['rust'], ['bread'])


def test_modules_of_another_kind_are_refused(tmp_path):
    for kind, message in (('cross', 'no head for words'), ('last', 'no head for words')):
        with pytest.raises(ValueError, match=message):
            CausalReranker(module_of('qwen3', kind), tokenizer=tokenizer(), template=TEMPLATE, words=('yes',)).map  # noqa: B018
    with pytest.raises(ValueError, match='BertModel is no decoder; CausalReranker reads those of type .*qwen3'):
        CausalReranker(toy_module('bert', classifier=False)[0]).map  # noqa: B018
    with pytest.raises(ValueError, match='template is for decoders'):
        CrossEncoder(toy_module('bert')[0], tokenizer=toy_module('bert')[1], template=TEMPLATE).score(['a'], ['b'])
    with pytest.raises(ValueError, match='no head for classes: use CausalReranker'):
        CrossEncoder(saved(tmp_path, 'llama', 'causal'), device='cpu').score(['a'], ['b'])


def test_checkpoints_of_another_kind_are_refused(tmp_path):
    folder, said = saved(tmp_path, 'qwen3', 'cross'), {'template': TEMPLATE, 'words': ('yes',), 'device': 'cpu'}
    with pytest.raises(ValueError, match='is a Qwen3ForSequenceClassification.*use CrossEncoder'):
        CausalReranker(folder, **said).score(['a'], ['b'])
    with pytest.raises(ValueError, match='no head for classes: use CausalReranker'):
        CrossEncoder(logit_score(pytest.importorskip('sentence_transformers'), tmp_path)[1]).score(['a'], ['b'])
    config = tmp_path / 'plain' / 'config.json'
    own = {'auto_map': {'AutoModelForCausalLM': 'modeling.Mine'}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **own}))
    with pytest.raises(ValueError, match=r"brings code of its own \('modeling.Mine'\)"):
        CausalReranker(str(tmp_path / 'plain'), **said).score(['a'], ['b'])


def test_known_templates_are_found_by_name(tmp_path):
    folder = tmp_path / 'Qwen3-Reranker-0.6B'
    module = module_of('qwen3', 'causal', torch.float32)
    module.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match='max_length=100 has no room for query and text beside the prompt'):
        CausalReranker(str(folder), device='cpu', max_length=100).score(['rust'], ['bread'])
    yes, no = (encoded(word)[0] for word in ('yes', 'no'))
    for name, settings in ((str(folder), {}), (module, {'template': 'qwen3-reranker', 'tokenizer': tokenizer()})):
        task = {'instruction': 'Find bread.'}
        prefix, middle, suffix = KNOWN['qwen3-reranker'].template
        said = middle.replace('{instruction}', 'Find bread.').replace('{query}', 'rust?').replace('{text}', 'bread')
        a, b = by_ids(module, encoded(prefix) + encoded(said) + encoded(suffix), [yes, no])
        same(CausalReranker(name, **task, **settings).score(['rust?'], ['bread']), [a - b])
    assert known_for('mixedbread-ai/mxbai-rerank-large-v2') == 'mxbai-rerank-v2'
    assert known_for('BAAI/bge-reranker-v2-gemma') == 'bge-reranker-v2-gemma'
    assert known_for('BAAI/bge-reranker-v2-m3') is known_for('') is None


# -- the same whatever the way


def test_half_precision_reads_words_in_float32():
    module = module_of(dtype=torch.bfloat16, fresh=True)
    model = CausalReranker(module, tokenizer=tokenizer(), template=TEMPLATE, words=('yes', 'no'))
    scores = model.score(*PAIRS)
    assert scores.dtype == np.float32 and len(set(scores.tolist())) == len(scores)
    assert np.abs(scores - ranker(dtype=torch.float32).score(*PAIRS)).max() < 0.2


def test_empty_frames_need_no_weights():
    res = CausalReranker('nowhere/at-all')(frame_of(0).drop(columns=['score', 'rank']))
    assert list(res.columns) == ['qid', 'query', 'docno', 'text', 'score', 'rank'] and len(res) == 0


def test_a_hooked_head_is_obeyed():
    model = ranker(fresh=True)
    before = model.score(*PAIRS)
    handle = model.model.lm_head.register_forward_hook(lambda _, args, out: out * 2)
    np.testing.assert_allclose(model.score(*PAIRS), 2 * before, atol=1e-10)
    handle.remove()
    model.model.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match='whole language model module are not run here'):
        model.score(*PAIRS)
