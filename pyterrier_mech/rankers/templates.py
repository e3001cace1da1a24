"""How known causal re-rankers ask their question: the prompt around query and text, and the words that are compared."""

from __future__ import annotations

from typing import NamedTuple


class Known(NamedTuple):
    """What a published re-ranker was trained with.

    Attributes:
        template: Pieces that are tokenised apart; `{instruction}` stands where the task is said.
        words: Whose logits are read: the first minus the second, or one.
        instruction: The task, where a user gives none.
    """

    template: tuple[str, ...]
    words: tuple[str, ...]
    instruction: str = ''


KNOWN = {
    # Source: QwenLM/Qwen3-Embedding, README.md.
    'qwen3-reranker': Known(
        (
            '<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct '
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
            '<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {text}',
            '<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n',
        ),
        ('yes', 'no'),
        'Given a web search query, retrieve relevant passages that answer the query',
    ),
    # Source: FlagOpen/FlagEmbedding, FlagEmbedding/inference/reranker/decoder_only/base.py.
    'bge-reranker-v2-gemma': Known(
        (
            '<bos>',
            'A: {query}',
            '\n',
            'B: {text}',
            '\n',
            'Given a query A and a passage B, determine whether the passage contains an answer to the query by '
            "providing a prediction of either 'Yes' or 'No'.",
        ),
        ('Yes',),
    ),
    # Source: mixedbread-ai/mxbai-rerank, mxbai_rerank/mxbai_rerank_v2.py.
    'mxbai-rerank-v2': Known(
        (
            '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n'
            '<|im_start|>user\n',
            'query: {query}',
            '\n',
            'document: {text}',
            '\n',
            'You are a search relevance expert who evaluates how well documents match search queries. For each '
            'query-document pair, carefully analyze the semantic relationship between them, then provide your binary '
            'relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:',
            '<|im_end|>\n<|im_start|>assistant\n',
        ),
        ('1', '0'),
    ),
}


def known_for(name: str) -> str | None:
    """Returns the known re-ranker that the name of a model says it is, or None."""
    last = name.rstrip('/').rpartition('/')[2].lower()
    if last.startswith('mxbai-rerank-') and last.endswith('-v2'):
        return 'mxbai-rerank-v2'
    return next((known for known in KNOWN if last.startswith(known)), None)
