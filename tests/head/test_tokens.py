"""token_logprob as torch sees it: opcheck, strides, and logits that the caller gives away."""

import pytest
import torch

from bench.memory import measure
from mopo_kernels import token_logprob
from mopo_kernels.backends.fold import Transform
from mopo_kernels.backends.native import cpu
from mopo_kernels.head.call import HeadCall, Outputs
from mopo_kernels.head.tokens import logits_logprob, logits_logprob_overwrite

pytestmark = pytest.mark.skipif(bool(cpu.UNAVAILABLE), reason=cpu.UNAVAILABLE)

H, V = 8, 300
CALL = HeadCall(Transform(0.5, 2.0, True), -100, "cpu").flat()


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def test_opcheck_of_token_logprob():
    (logits,) = tensors((4, 9))
    everything = HeadCall(Transform(0.5, 2.0, True), -100, "cpu", outputs=Outputs(True, True, True)).flat()
    for call in (CALL, everything):
        torch.library.opcheck(logits_logprob, (logits, torch.tensor([1, 2, -100, 3]), call, False))
    arguments = (
        torch.randn(2, 4).double(),
        logits.detach(),
        torch.tensor([1, 2, -100, 3]),
        torch.randn(4).double(),
        CALL,
    )
    torch.library.opcheck(logits_logprob_overwrite, arguments)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "view", [lambda x: x.t().contiguous().t(), lambda x: x[:1].expand(5, -1)], ids=["column-major", "one row"]
)
def test_logits_of_other_strides(view, dtype):
    logits = view(torch.randn(5, 7, dtype=dtype)).requires_grad_()
    target = torch.tensor([0, 6, -100, 4, 2])
    results = []
    for backend in ("cpu", "reference"):
        logp = token_logprob(logits, target, backend=backend)
        results.append([logp, *torch.autograd.grad(logp, logits, torch.arange(5.0, dtype=dtype))])
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


@pytest.mark.parametrize("overwrite", [False, True])
def test_logits_hold_the_gradient_of_lse_too_and_batched_gradients_leave_them_alone(overwrite):
    target = torch.tensor([0, 6, -100, 4, 2])
    results = []
    for backend in ("cpu", "reference"):
        (logits,) = tensors((5, 7))
        scaled = logits * 1.0
        options = {"softcap": 4.0, "backend": backend, "overwrite_logits": overwrite, "return_lse": True}
        logp, lse = token_logprob(scaled, target, **options)
        rows = torch.autograd.grad(logp + lse, scaled, torch.eye(5), is_grads_batched=True, retain_graph=True)[0]
        results.append([lse, rows, *torch.autograd.grad((logp + lse**2).sum(), logits)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_compiled_graph_overwrites_no_logits():
    hidden, weight = tensors((6, H), (V, H))
    target = torch.arange(6)

    def loss_of(hidden):
        return token_logprob(hidden @ weight.T, target, overwrite_logits=True).sum()

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(hidden), hidden)[0] for f in (compiled, loss_of)))
