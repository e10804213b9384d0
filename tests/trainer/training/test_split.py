"""What can be read of weights that ZeRO-3 has split, against a double of its gathering (DeepSpeed is optional)."""

from contextlib import contextmanager

import pytest
import torch
from tiny import make_tiny_model

from mopo_trainer.training import split
from mopo_trainer.training.fit import vocabulary
from mopo_trainer.training.split import gathered_passes, parameter_count, whole, whole_shape


@pytest.fixture
def model(tokenizer, monkeypatch):
    """Every weight is empty unless it is gathered, by one context at a time."""
    model = make_tiny_model(tokenizer)
    values = {}
    for i, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape = i, parameter.shape
        values[i], parameter.data = parameter.data, torch.empty(0)

    @contextmanager
    def gathered(*parameters):
        assert all(p.numel() == 0 for p in parameters)
        for p in parameters:
            p.data = values[p.ds_id]
        yield
        for p in parameters:
            p.data = torch.empty(0)

    monkeypatch.setattr(split, "_gathered", gathered)
    return model


def test_shapes_counts_and_values_are_the_whole_models(model, tokenizer):
    expected = make_tiny_model(tokenizer)
    assert parameter_count(model) == parameter_count(expected) == expected.num_parameters(exclude_embeddings=True)
    assert vocabulary(model) == vocabulary(expected)
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert whole_shape(found) == wanted.shape
        torch.testing.assert_close(whole(found), wanted.detach(), rtol=0, atol=0)


def test_a_model_runs_before_training_one_module_whole_at_a_time(model, tokenizer):
    ids = torch.arange(5)[None]
    with torch.no_grad():
        expected = make_tiny_model(tokenizer)(ids).logits
        with gathered_passes(model):
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
            with pytest.raises(IndexError):
                model(torch.tensor([[10**6]]))
    assert all(p.numel() == 0 for p in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
