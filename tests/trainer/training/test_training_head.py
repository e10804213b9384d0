"""The fused head as a pass of its module: what ZeRO-3 asks for, against a double of its hooks (DeepSpeed is optional).

The double keeps to what DeepSpeed 0.19.8 does in `runtime/zero/parameter_offload.py`: a weight is empty but from its
module's forward pre-hook to its forward hook, and from a backward function on the module's outputs to one on its
inputs. The real thing runs in test_distributed.py where it is installed.
"""

import pytest
import torch
from tiny import make_tiny_model

from mopo_kernels import linear_logprob
from mopo_trainer.training.head import as_head_pass


class Zero3Double:
    """Takes the weight of a module away outside its passes."""

    def __init__(self, module):
        self.module, self.whole = module, module.weight.data
        module.weight.ds_id, self.gathered = 0, []
        self.release()
        module.register_forward_pre_hook(self.before)
        module.register_forward_hook(self.after)

    def release(self):
        self.module.weight.data = self.whole.new_empty(0)

    def gather(self, phase):
        self.module.weight.data = self.whole
        self.gathered.append(phase)

    def before(self, module, inputs):
        self.gather("forward")
        return tuple(_Backward.apply(x, self.release) for x in inputs)

    def after(self, module, inputs, output):
        self.release()
        return _Backward.apply(output, lambda: self.gather("backward"))


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, action):
        ctx.action = action
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.action()
        return grad, None


@pytest.fixture
def model(tokenizer):
    model = make_tiny_model(tokenizer)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def logp(model, hidden):
    target = torch.arange(len(hidden))
    return as_head_pass(model, lambda x: linear_logprob(x, model.lm_head.weight, target).sum(), hidden)


def test_a_weight_that_is_taken_away_is_there_for_both_passes(model):
    hidden = torch.randn(5, model.config.hidden_size, requires_grad=True)
    value = logp(model, hidden)
    expected = torch.autograd.grad(value, (hidden, model.lm_head.weight))
    zero = Zero3Double(model.lm_head)
    found = logp(model, hidden)
    found.backward()
    assert zero.gathered == ["forward", "backward"]
    assert model.lm_head.weight.numel() == 0
    assert found == value
    torch.testing.assert_close((hidden.grad, model.lm_head.weight.grad), expected, rtol=0, atol=0)


def test_the_head_keeps_its_own_forward(model):
    Zero3Double(model.lm_head)
    hidden = torch.randn(2, model.config.hidden_size)
    own = model.lm_head(hidden)
    with pytest.raises(RuntimeError, match="stop"):
        as_head_pass(model, lambda x: raise_stop(), hidden)
    logp(model, hidden)
    torch.testing.assert_close(model.lm_head(hidden), own, rtol=0, atol=0)


def test_a_forward_that_the_head_was_given_stays(model):
    """Accelerate's hooks put one into the instance."""
    Zero3Double(model.lm_head)
    model.lm_head.forward = lambda hidden: hidden.new_full((1,), 7.0)
    hidden = torch.randn(2, model.config.hidden_size)
    logp(model, hidden)
    assert model.lm_head(hidden) == 7


def raise_stop():
    raise RuntimeError("stop")


def test_a_weight_read_elsewhere_is_an_error(model):
    Zero3Double(model.lm_head)
    hidden = torch.randn(2, model.config.hidden_size)
    with pytest.raises(ValueError, match="ZeRO-3 has taken the weight away"):
        linear_logprob(hidden, model.lm_head.weight, torch.arange(2))
