"""The operators as torch sees them: opcheck, torch.compile without graph breaks, autocast, one differentiation."""

import pytest
import torch
from memory import measure
from torch import nn

from mopo_kernels import linear_logprob, mopo_loss, token_logprob, win_rate_from_pairs
from mopo_kernels.backends import cpu
from mopo_kernels.head_ops import linear_logprob as linear_op
from mopo_kernels.policy_ops import linear_policy_loss
from mopo_kernels.token_ops import token_logprob as token_op
from mopo_kernels.token_ops import token_logprob_overwrite

pytestmark = pytest.mark.skipif(bool(cpu.UNAVAILABLE), reason=cpu.UNAVAILABLE)

S, L, H, V = 6, 5, 8, 300
SCALES = [0.5, 2.0, 1.0]
REF_LOGP = -torch.arange(float(S))


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def targets():
    target = torch.randint(0, V, (S, L), generator=torch.Generator().manual_seed(1))
    target[:, 0] = -100
    return target


@pytest.mark.parametrize("save", ["logits", "nothing", "grad_hidden"])
def test_opcheck_of_linear_logprob(save):
    hidden, weight, bias = tensors((S * L, H), (V, H), (V,))
    target = targets().flatten()
    if save == "logits":
        target = target.clamp(min=0)  # rows that do not count leave the last rows of the logits unwritten
    if save == "grad_hidden":
        weight, bias = weight.detach(), None
    torch.library.opcheck(linear_op, (hidden, weight, bias, target, SCALES, -100, None, 2**20, save, "cpu"))


def test_opcheck_of_token_logprob():
    (logits,) = tensors((4, 9))
    torch.library.opcheck(token_op, (logits, torch.tensor([1, 2, -100, 3]), SCALES, -100, False, "cpu"))
    arguments = (torch.randn(4), logits.detach(), torch.tensor([1, 2, -100, 3]), torch.randn(4).double(), SCALES)
    torch.library.opcheck(token_logprob_overwrite, (*arguments, -100, "cpu"))


@pytest.mark.parametrize("policy_step", ["clone", "contrast", "regress"])
def test_opcheck_of_the_fused_loss(policy_step):
    hidden, weight, bias = tensors((S, L, H), (V, H), (V,))
    labels = (torch.arange(3).repeat(2), torch.rand(S).double(), torch.rand(S).double(), torch.tensor(3.0).double())
    options = (policy_step, False, [True, True, True], SCALES, -100, None, 2**20, "cpu", False)
    arguments = (hidden, weight, bias, targets(), *labels, *options)
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
        labels = (win_rate_from_pairs(torch.tensor([[0.2], [0.9], [1.0]])), torch.arange(3).repeat(2), torch.ones(1))
        options = {"tau": 0.3, "eps": 0.05, "policy_step": policy_step, "ref_logp": REF_LOGP}
        return mopo_loss(self.hidden(ids), self.head.weight, target, *labels, **options).loss

    def hidden(self, ids):
        return torch.tanh(self.layer(self.embedding(ids)))


@pytest.mark.parametrize("policy_step", ["clone", "contrast", "regress", "log-probs"])
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
    monkeypatch.setattr(cpu, "WIDENED", frozenset({torch.bfloat16}))
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
        arguments = (hidden, weight, None, target, SCALES, -100, None, 2**20, save, "cpu")
        torch.library.opcheck(linear_op, arguments)
    ones = torch.ones(1, dtype=torch.float64)
    labels = (torch.zeros(1, dtype=torch.int64), ones, ones, ones[0])
    options = ("clone", False, [True, True, False], SCALES, -100, None, 2**20, "cpu", False)
    torch.library.opcheck(linear_policy_loss, (hidden[None], weight, None, target[None], *labels, *options))


@pytest.mark.parametrize("what", ["linear", "frozen head", "token", "loss"])
def test_a_second_differentiation_is_refused_with_advice(what):
    hidden, weight = tensors((S, L, H), (V, H))
    if what == "frozen head":
        weight = weight.detach()
    if what == "token":
        value = token_logprob(hidden @ weight.T, targets()).sum()
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


def test_logits_changed_in_place_after_the_forward_are_an_error_not_a_wrong_gradient():
    (logits,) = tensors((3, 7))
    scaled = logits * 1.0
    logp = token_logprob(scaled, torch.tensor([1, 2, 3]))
    scaled.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


def test_token_logprob_leaves_the_logits_alone_and_reads_strided_rows():
    wide = torch.randn(5, 40)
    logits = wide[:, 3:20].detach().requires_grad_()
    target = torch.tensor([0, 16, -100, 4, 9])
    results = []
    for backend in ("cpu", "reference"):
        logp = token_logprob(logits, target, softcap=4.0, backend=backend)
        results.append([logp, *torch.autograd.grad(logp, logits, torch.arange(5.0))])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [slice(None), slice(1, None, 2)], ids=["contiguous", "every other row"])
def test_given_away_logits_hold_their_gradient_after_the_backward(rows):
    (hidden, weight) = tensors((6, H), (V, H))
    target = torch.tensor([0, V - 1, -100, 4, 9, 2])[rows]
    results = []
    for overwrite in (False, True):
        logits = hidden @ weight.T
        kept = logits.detach().clone()
        logp = token_logprob(logits[rows], target, softcap=4.0, overwrite_logits=overwrite)
        gradients = torch.autograd.grad(logp, (hidden, weight), torch.arange(1.0, 1 + len(target)))
        results.append([logp, *gradients])
        assert torch.equal(logits, kept) != overwrite
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_overwriting_allocates_no_second_tensor_of_logits():
    logits = torch.randn(64, 4096).requires_grad_()
    target = torch.zeros(64, dtype=torch.int64)
    largest = []
    for overwrite in (False, True):
        loss = token_logprob(logits, target, overwrite_logits=overwrite).sum()
        largest.append(measure(lambda loss=loss: torch.autograd.grad(loss, logits))[1])
    assert largest[0] == 64 * 4096 * 4
    assert largest[1] < largest[0] / 64


def test_overwriting_what_another_operator_saved_is_an_error_not_a_wrong_gradient():
    (logits,) = tensors((3, 7))
    saved = logits.tanh()
    logp = token_logprob(saved, torch.tensor([1, 2, 3]), overwrite_logits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()
    twice = token_logprob(logits * 1, torch.tensor([1, 2, 3]), overwrite_logits=True).sum()
    twice.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        twice.backward()


def test_a_compiled_graph_overwrites_no_logits():
    hidden, weight = tensors((6, H), (V, H))
    target = torch.arange(6)

    def loss_of(hidden):
        return token_logprob(hidden @ weight.T, target, overwrite_logits=True).sum()

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(hidden), hidden)[0] for f in (compiled, loss_of)))
