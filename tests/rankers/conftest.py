"""Folders to load rankers from, unchanged and as copies that a test may change.

`folders` is imported in the fixtures: it skips where sentence-transformers is missing.
"""

import shutil
from pathlib import Path

import pytest
from transformers import AutoModel, AutoModelForSequenceClassification


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """Folders of Hugging Face alone: an encoder, and one with a head."""
    from folders import made, words

    folders = []
    for auto in (AutoModel, AutoModelForSequenceClassification):
        folders.append(tmp_path_factory.mktemp('plain'))
        made(auto, num_labels=1).save_pretrained(folders[-1])
        words().save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope='module')
def saved(plain, tmp_path_factory):
    """Folders of a bi-encoder and a cross-encoder, as sentence-transformers saves them."""
    from folders import saved_bi, st

    model, folder = st.CrossEncoder(str(plain[1]), device='cpu'), tmp_path_factory.mktemp('saved')
    model.save_pretrained(str(folder), create_model_card=False)
    return saved_bi(plain, tmp_path_factory.mktemp('saved')), folder


@pytest.fixture
def bi(saved, tmp_path):
    return Path(shutil.copytree(saved[0], tmp_path / 'bi'))


@pytest.fixture
def cross(saved, tmp_path):
    return Path(shutil.copytree(saved[1], tmp_path / 'cross'))
