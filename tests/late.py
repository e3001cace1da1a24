"""ColBERT and SPLADE models: toys, and on top of all-MiniLM-L6-v2 in the formats of Stanford and PyLate."""

import functools
import json

import torch
from safetensors.torch import save_file
from torch import nn
from toys import CONFIGS, minilm_path, tokenizer_for
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, BertForMaskedLM

from pyterrier_mech.rankers import ColBERT, ProjectedEncoder, Splade


def tokenizer():
    return AutoTokenizer.from_pretrained(minilm_path())


@functools.cache
def encoder():
    return AutoModel.from_pretrained(minilm_path(), add_pooling_layer=False).eval()


@functools.cache
def projection():
    """384 to 128 dimensions, orthogonal."""
    linear = nn.Linear(384, 128, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.linalg.qr(torch.randn(384, 128, generator=torch.Generator().manual_seed(0)))[0].T)
    return linear


def masked_lm(minimum=4.5):
    """A head for masked tokens tied to the embeddings; a term is on where its logit is above the minimum."""
    module = BertForMaskedLM(encoder().config).eval()
    module.bert.load_state_dict(encoder().state_dict(), strict=False)
    module.tie_weights()
    transform = module.cls.predictions.transform
    with torch.no_grad():
        transform.dense.weight.copy_(
            12 * torch.eye(384) + 0.3 * torch.randn(384, 384, generator=torch.Generator().manual_seed(1))
        )
        module.cls.predictions.decoder.bias.fill_(-minimum)
    return module


def stanford(folder, **metadata):
    """A folder as the implementation of Stanford writes it."""
    save_encoder(folder)
    config = json.loads((folder / 'config.json').read_text()) | {'architectures': ['HF_ColBERT']}
    (folder / 'config.json').write_text(json.dumps(config))
    state = {f'bert.{name}': tensor.clone() for name, tensor in encoder().state_dict().items()}
    save_file({**state, 'linear.weight': projection().weight.detach()}, folder / 'model.safetensors', {'format': 'pt'})
    (folder / 'artifact.metadata').write_text(json.dumps(metadata))
    return folder


def pylate(folder, dense=(), **settings):
    """A folder as PyLate writes it: a Transformer and a Dense, whose settings lie in the file of all settings."""
    save_encoder(folder)
    (folder / '1_Dense').mkdir()
    identity = 'torch.nn.modules.linear.Identity'
    config = {'in_features': 384, 'out_features': 128, 'bias': False, 'activation_function': identity, **dict(dense)}
    (folder / '1_Dense' / 'config.json').write_text(json.dumps(config))
    save_file({'linear.weight': projection().weight.detach()}, folder / '1_Dense' / 'model.safetensors')
    modules = [
        {'idx': 0, 'name': '0', 'path': '', 'type': 'sentence_transformers.models.Transformer'},
        {'idx': 1, 'name': '1', 'path': '1_Dense', 'type': 'pylate.models.Dense.Dense'},
    ]
    (folder / 'modules.json').write_text(json.dumps(modules))
    stated = {
        'model_type': 'ColBERT', 'prompts': {}, 'default_prompt_name': None, 'similarity_fn_name': 'MaxSim',
        'query_prefix': '[unused0]', 'document_prefix': '[unused1]', 'query_length': 32, 'document_length': 180,
        'attend_to_expansion_tokens': False, 'skiplist_words': list('!"#$%&\'()*+,-./:;<=>?@[\\]^_`{|}~'),
        'do_query_expansion': True,
    }  # fmt: skip
    (folder / 'config_sentence_transformers.json').write_text(json.dumps(stated | settings))
    (folder / 'sentence_bert_config.json').write_text(json.dumps({'max_seq_length': 179, 'do_lower_case': False}))
    return folder


def save_encoder(folder):
    encoder().save_pretrained(folder)
    tokenizer().save_pretrained(folder)


# -- toys


@functools.cache
def _toy(family, masked, seed=0):
    words = tokenizer_for(family)
    config = CONFIGS[family](len(words), words.pad_token_id)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = (AutoModelForMaskedLM if masked else AutoModel).from_config(config)
        linear = nn.Linear(config.hidden_size, 12, bias=False)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    return module.double().eval(), linear.double()


def toy_colbert(family='bert', **settings):
    """A new ranker around a toy encoder and a random map."""
    module, linear = _toy(family, False)
    markers = {} if family in ('bert', 'distilbert') else {'query_marker': '', 'text_marker': ''}
    return ColBERT(
        ProjectedEncoder(module, linear),
        tokenizer=tokenizer_for(family),
        **{'max_length': 60, 'query_length': 16, **markers, **settings},
    )


def toy_splade(family='bert', **settings):
    """A new ranker around a toy masked language model."""
    return Splade(_toy(family, True)[0], tokenizer=tokenizer_for(family), **{'max_length': 60, **settings})


# -- around a module that a test has


@functools.cache
def projected_around(module):
    """The encoder of a module, with a random map behind it; for one module always the same."""
    linear = nn.Linear(module.config.hidden_size, 12, bias=False)
    nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(3))
    return ProjectedEncoder(module.base_model, linear.to(module.dtype))


@functools.cache
def masked_around(module):
    """The encoder of a BERT, with a random head for masked tokens; for one module always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        masked = BertForMaskedLM(module.config).to(module.dtype).eval()
    masked.bert = module.base_model
    return masked
