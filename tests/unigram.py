"""A tokenizer like those of sentencepiece: words are what stands between spaces, punctuation included."""

import functools

from toys import QUERIES, TEXTS
from transformers import PreTrainedTokenizerFast


@functools.cache
def unigram_tokenizer():
    """Trained on the toy texts, framed as RoBERTa does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=['<s>', '<pad>', '</s>', '<unk>'], unk_token='<unk>', show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS + QUERIES, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(('</s>', 2), ('<s>', 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token='<s>', cls_token='<s>', eos_token='</s>', sep_token='</s>',
        pad_token='<pad>', unk_token='<unk>', model_input_names=['input_ids', 'attention_mask'], model_max_length=80,
    )  # fmt: skip
