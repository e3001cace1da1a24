"""Trains a small causal re-ranker from scratch on the train topics of a folder, with a cross-encoder as its teacher.

python examples/train_causal.py FOLDER --teacher MODEL --out my-causal

FOLDER has topics.tsv (qid, query, split), docs.jsonl.gz (docno, text), qrels.tsv (qid, docno, label) and any number of
pairs_*.tsv (qid, docno), whose rows are what a first stage found. The student has the architecture of Qwen3: its last
position gives the logits of yes and no, and their difference learns the differences of the teacher's scores within a
query. It is saved as a folder that `CausalReranker(out, template=TEMPLATE, words=WORDS)` loads.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from pyterrier_mech import CausalReranker, CrossEncoder
from pyterrier_mech.inputs.inputs import Inputs

TEMPLATE = ('<|im_start|>', 'Query: {query}\nText: {text}', '<|im_end|>\n<|im_start|>')
WORDS = (' yes', ' no')
SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
SPLIT = r'[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer that splits as Qwen's does."""
    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), 'isolated'),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    whole.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    whole.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, eos_token=SPECIAL[2], pad_token=SPECIAL[0], model_max_length=256
    )


def make_student(tokenizer: PreTrainedTokenizerFast, layers: int, width: int, seed: int) -> AutoModelForCausalLM:
    """Returns a decoder with random weights."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        head_dim=32,
        intermediate_size=3 * width,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=1,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def read_rows(folder: Path) -> pd.DataFrame:
    """Returns qid, query, docno and text of all judged and edited pairs of the topics."""
    topics = pd.read_csv(folder / 'topics.tsv', sep='\t', dtype=str)
    docs = pd.read_json(folder / 'docs.jsonl.gz', lines=True, dtype={'docno': str})
    files = [folder / 'qrels.tsv', *sorted(folder.glob('pairs_*.tsv'))]
    pairs = pd.concat([pd.read_csv(file, sep='\t', dtype=str)[['qid', 'docno']] for file in files])
    return pairs.drop_duplicates().merge(topics, on='qid').merge(docs, on='docno')


def with_spans(rows: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """Adds queries that are words of passages, each with its passage and three others: the teacher scores these too."""
    rng, texts = np.random.default_rng(seed), rows['text'].drop_duplicates().tolist()
    more = []
    for number, i in enumerate(rng.permutation(len(texts))[:count]):
        words = texts[i].split()
        length = int(rng.integers(2, 8))
        start = int(rng.integers(0, max(1, len(words) - length)))
        query = ' '.join(words[start : start + length]).lower().strip('.,;:')
        others = [texts[j] for j in rng.integers(0, len(texts), 3)]
        more += [(f'span{number}', query, text) for text in [texts[i], *others]]
    return pd.concat([rows, pd.DataFrame(more, columns=['qid', 'query', 'text'])], ignore_index=True)


def lists_of(rows: pd.DataFrame, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Returns the rows of random lists of one query each."""
    groups = [rng.permutation(rows_of) for rows_of in rows.groupby('qid').indices.values()]
    lists = [part for group in groups for part in np.split(group, range(size, len(group), size)) if len(part) > 1]
    return [lists[i] for i in rng.permutation(len(lists))]


def train(student: CausalReranker, rows: pd.DataFrame, teacher: np.ndarray, minutes: float, rate: float) -> None:
    """Fits differences of scores within lists until the time is over."""
    module, rng = student.map.module, np.random.default_rng(0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.01)
    inputs = Inputs.plain(student, rows['query'].tolist(), rows['text'].tolist())
    wanted = torch.tensor((teacher - teacher.mean()) / teacher.std(), dtype=torch.float32)
    begin, step, losses = time.monotonic(), 0, []
    while (spent := (time.monotonic() - begin) / 60) < minutes:
        for part in lists_of(rows, 16, rng):
            spent = (time.monotonic() - begin) / 60
            if spent >= minutes:
                break
            for group in optimizer.param_groups:
                group['lr'] = rate * min(1, step / 100) * max(0.02, 1 - spent / minutes)
            with student.computing(gradients=True):
                scores = student.run(inputs, part)
            target = wanted[part]
            loss = ((scores - scores.mean() - target + target.mean()) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            step, losses = step + 1, [*losses[-199:], loss.item()]
            if step % 200 == 0:
                print(f'{spent:5.1f} minutes, step {step}: loss {np.mean(losses):.4f}', flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Reads the arguments, trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('folder', type=Path)
    parser.add_argument('--teacher', required=True)
    parser.add_argument('--out', type=Path, default=Path('my-causal'))
    parser.add_argument('--split', default='train', help='topics of this value in the column split, where there is one')
    parser.add_argument('--spans', type=int, default=3000, help='queries made of words of passages')
    parser.add_argument('--minutes', type=float, default=25)
    parser.add_argument('--layers', type=int, default=4)
    parser.add_argument('--width', type=int, default=256)
    parser.add_argument('--vocabulary', type=int, default=8000)
    parser.add_argument('--rate', type=float, default=1e-3)
    parser.add_argument('--seed', type=int, default=0)
    given = parser.parse_args(arguments)

    rows = read_rows(given.folder)
    if 'split' in rows:
        rows = rows[rows['split'] == given.split].reset_index(drop=True)
    rows = with_spans(rows, given.spans, given.seed)
    print(f'{len(rows)} pairs of {rows["qid"].nunique()} queries', flush=True)
    teacher = CrossEncoder(given.teacher).score(rows['query'], rows['text'])
    print('scored by the teacher', flush=True)
    said = ['Query: Text: yes no'] * 50
    tokenizer = make_tokenizer([*rows['text'].unique(), *rows['query'].unique(), *said], given.vocabulary)
    module = make_student(tokenizer, given.layers, given.width, given.seed)
    student = CausalReranker(module, tokenizer=tokenizer, template=TEMPLATE, words=WORDS)
    train(student, rows, teacher, given.minutes, given.rate)
    module.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    agreement = pd.Series(student.score(rows['query'][:500], rows['text'][:500])).corr(pd.Series(teacher[:500]))
    print(f'saved in {given.out}; Pearson with the teacher on 500 pairs of its training: {agreement:.3f}')


if __name__ == '__main__':
    main()
