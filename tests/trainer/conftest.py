"""Trainer tests need no download: their tokenizer, model and rows are made in memory."""

import pytest
from tiny import make_pairs, make_tiny_model, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def tiny_model(tokenizer):
    return make_tiny_model(tokenizer)


@pytest.fixture
def pairs():
    return make_pairs()
