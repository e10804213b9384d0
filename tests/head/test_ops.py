"""The operators as torch sees them: opcheck, torch.compile without graph breaks, autocast, one differentiation."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from mopo_kernels import linear_logprob, mopo_loss, token_logprob, win_rate_from_pairs
from mopo_kernels.backends.fold import Transform
from mopo_kernels.backends.native import cpu
from mopo_kernels.head import plan
from mopo_kernels.head.call import NOTHING_ELSE, HeadCall, Outputs
from mopo_kernels.head.ops import head_logprob
from mopo_kernels.head.policy import linear_policy_loss
from mopo_kernels.objective.steps import STEPS, StepTarget

pytestmark = pytest.mark.skipif(bool(cpu.UNAVAILABLE), reason=cpu.UNAVAILABLE)

S, L, H, V = 6, 5, 8, 300
CALL = HeadCall(Transform(0.5, 2.0, True), -100, "cpu", 2**20, (True, True, True)).flat()
REF_LOGP = -torch.arange(float(S))


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def targets():
    target = torch.randint(0, V, (S, L), generator=torch.Generator().manual_seed(1))
    target[:, 0] = -100
    return target


@pytest.mark.parametrize("outputs", [NOTHING_ELSE, Outputs(True, True, True)])
@pytest.mark.parametrize("save", ["logits", "nothing", "grad_hidden"])
def test_opcheck_of_linear_logprob(save, outputs):
    hidden, weight, bias = tensors((S * L, H), (V, H), (V,))
    target = targets().flatten()
    if save == "logits":
        target = target.clamp(min=0)  # rows that do not count leave the last rows of the logits unwritten
    if save == "grad_hidden":
        weight, bias = weight.detach(), None
    call = replace(HeadCall.unflat(CALL), outputs=outputs).flat()
    torch.library.opcheck(head_logprob, (hidden, weight, bias, target, call, save))


@pytest.mark.parametrize("policy_step", STEPS)
def test_opcheck_of_the_fused_loss(policy_step):
    hidden, weight, bias = tensors((S, L, H), (V, H), (V,))
    numbers = (torch.rand(S).double(), torch.rand(S).double(), torch.tensor(3.0).double())
    labels = StepTarget(torch.arange(3).repeat(2), torch.full((S,), 2.0).double(), *numbers).packed()
    arguments = (hidden, weight, bias, targets(), labels, policy_step, CALL)
    torch.library.opcheck(linear_policy_loss, arguments, rtol=1e-4, atol=1e-4)  # the loss cancels over a group


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, H)
        self.layer = nn.Linear(H, H)
        self.head = nn.Linear(H, V, bias=False)

    def loss(self, ids, target, policy_step):
        if policy_step == "log-probs":
            return linear_logprob(self.hidden(ids), self.head.weight, target).sum()
        if policy_step == "z-loss":
            more = {"return_lse": True, "return_entropy": True, "return_hit": True}
            logp, lse, entropy, hit = linear_logprob(self.hidden(ids), self.head.weight, target, **more)
            return (logp + lse**2).sum() + entropy.sum() + hit.sum()
        labels = (win_rate_from_pairs(torch.tensor([[0.2], [0.9], [1.0]])), torch.arange(3).repeat(2), torch.ones(1))
        options = {"tau": 0.3, "eps": 0.05, "policy_step": policy_step, "ref_logp": REF_LOGP}
        return mopo_loss(self.hidden(ids), self.head.weight, target, *labels, **options).loss

    def hidden(self, ids):
        return torch.tanh(self.layer(self.embedding(ids)))


@pytest.mark.parametrize("policy_step", ["clone", "contrast", "regress", "log-probs", "z-loss"])
def test_a_model_with_the_loss_compiles_without_graph_breaks(policy_step):
    torch.manual_seed(0)
    model, target = Model(), targets()
    ids = torch.randint(0, V, (S, L))
    results = []
    for loss_of in (model.loss, torch.compile(model.loss, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = loss_of(ids, target, policy_step)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(*results)


def test_autocast_decides_the_dtype_of_the_products():
    hidden, weight = tensors((S * L, H), (V, H))
    target = targets().flatten()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = linear_logprob(hidden, weight, target)
    expected = linear_logprob(hidden.bfloat16(), weight.bfloat16(), target)
    assert logp.dtype == torch.float32
    assert torch.equal(logp, expected)
    assert [g.dtype for g in torch.autograd.grad(logp.sum(), (hidden, weight))] == [torch.float32, torch.float32]


def test_autocast_leaves_the_products_alone(monkeypatch):
    """Panels are float32 so that sums are not of 16 bits: autocast, which would cast them back, is off in there."""
    monkeypatch.setattr(plan.native, "multiplies", lambda dtype: dtype != torch.bfloat16)
    hidden, weight = tensors((S * L, H), (V, H))
    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            inputs = (hidden, weight) if enabled else (hidden.bfloat16(), weight.bfloat16())
            options = {"reduction": "sum", "workspace_bytes": 2**14}  # several blocks
            loss = linear_logprob(*inputs, targets().flatten().clamp(min=0), **options)
            results.append(torch.autograd.grad(loss, (hidden, weight)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_opcheck_of_column_major_tensors():
    """Fake kernels say what strides results have; torch.compile relies on it."""
    hidden, weight = (torch.randn(H, n).t().requires_grad_() for n in (S * L, V))
    target = targets().flatten().clamp(min=0)
    for save in ("logits", "nothing"):
        torch.library.opcheck(head_logprob, (hidden, weight, None, target, CALL, save))
    labels = StepTarget.packed_one(1.0, hidden.device)
    call = HeadCall(Transform(0.5, 2.0, True), -100, "cpu", 2**20, (True, True, False)).flat()
    torch.library.opcheck(linear_policy_loss, (hidden[None], weight, None, target[None], labels, "clone", call))


@pytest.mark.parametrize("what", ["linear", "frozen head", "token", "token, overwritten", "loss"])
def test_a_second_differentiation_is_refused_with_advice(what):
    hidden, weight = tensors((S, L, H), (V, H))
    if what == "frozen head":
        weight = weight.detach()
    if what.startswith("token"):
        value = token_logprob(hidden @ weight.T, targets(), overwrite_logits="overwritten" in what).sum()
    elif what == "loss":
        labels = (win_rate_from_pairs(torch.full((3, 1), 0.7)), torch.arange(3).repeat(2), torch.ones(1))
        value = mopo_loss(hidden, weight, targets(), *labels, tau=0.1).loss
    else:
        value = linear_logprob(hidden, weight, targets()).sum()
    with pytest.raises(RuntimeError, match=r"differentiable once.*reference"):
        torch.autograd.grad(torch.autograd.grad(value, hidden, create_graph=True)[0].sum(), hidden)


def test_backward_twice_gives_the_same_gradients_and_scales_them():
    hidden, weight = tensors((S, L, H), (V, H))
    labels = (win_rate_from_pairs(torch.full((3, 1), 0.7)), torch.arange(3).repeat(2), torch.ones(1))
    loss = mopo_loss(hidden, weight, targets(), *labels, tau=0.1).loss
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    first = [g.clone() for g in first]
    tripled = torch.autograd.grad(loss, (hidden, weight), torch.tensor(3.0), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(list(again), first, rtol=0, atol=0)
    torch.testing.assert_close(list(tripled), [3 * g for g in first])


def test_a_frozen_heads_rows_are_scaled_each_by_its_own_gradient():
    hidden, weight = tensors((S, L, H), (V, H))
    upstream = torch.linspace(-1, 2, S * L).view(S, L)
    results = []
    for backend in ("cpu", "reference"):
        logp = linear_logprob(hidden, weight.detach(), targets(), backend=backend)
        results.append(torch.autograd.grad(logp, hidden, upstream)[0])
    torch.testing.assert_close(*results, rtol=2e-5, atol=1e-6)
