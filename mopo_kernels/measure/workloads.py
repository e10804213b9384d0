"""The public ops on random inputs of a given size, each with the work that it cannot avoid: what is profiled and timed.

With N rows, hidden size H, vocabulary V and s bytes an element:

    op                      flops   bytes
    mopo_loss               6·N·H·V   2·(N + V)·H·s      hidden and weight read, both gradients written
    linear_logprob          6·N·H·V   2·(N + V)·H·s      its sum
    linear_logprob_rows     6·N·H·V   2·(N + V)·H·s      each row's, whose gradients nobody knows in the forward
    linear_logprob_sampled  2·N·H·V   2·(N + V)·H·s      its sum with gradients sampled at GRAD_SAMPLING
    mopo_loss_sampled       2·N·H·V   2·(N + V)·H·s      the same of mopo_loss
    linear_logprob_forward  2·N·H·V   (N + V)·H·s
    frozen_head             4·N·H·V   (2·N + V)·H·s      hidden's gradient alone
    token_logprob           0         N·V·s              logits read once
    token_logprob_backward  0         2·N·V·s            and their gradient written
    sequence_sums           0         12·N               log-probabilities and targets read
    label_statistics        0         of N responses: labels read, results written

and 12·N bytes of targets and log-probabilities more for the first nine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mopo_kernels import backends
from mopo_kernels.backends import reference
from mopo_kernels.backends.batch import Labels, LabelValues
from mopo_kernels.logprob import linear_logprob, token_logprob
from mopo_kernels.loss import mopo_loss
from mopo_kernels.measure.roofline import Run, Work
from mopo_kernels.objective import ops
from mopo_kernels.objective.target import label_statistics

TAU = 0.08
EPS = 0.01
OBJECTIVES = 4
GRAD_SAMPLING = 2.0**-6


class Sizes(NamedTuple):
    """Of one call."""

    rows: int
    hidden_size: int
    vocab: int
    dtype: torch.dtype
    device: torch.device


class Workload(NamedTuple):
    """The work that a call cannot avoid, random inputs for it, and a function that makes the call, to be repeated."""

    op: str  # its name in backends.PREFERENCE
    work: Callable[[Sizes], Work]
    inputs: Callable[[Sizes], tuple[Tensor, ...]]
    bind: Callable[..., Run]  # (backend, *inputs)


@contextmanager
def ranged(name: str) -> Iterator[None]:
    """A range of this name in torch.profiler's trace and, on a GPU, in Nsight's (NVTX)."""
    with ExitStack() as ranges:
        ranges.enter_context(torch.profiler.record_function(name))
        if torch.cuda.is_available():
            ranges.enter_context(torch.cuda.nvtx.range(name))
        yield


def in_range(name: str, call: Run) -> Run:
    def run() -> None:
        with ranged(name):
            call()

    return run


def forward_and_backward(forward: Callable[[], Tensor], *leaves: Tensor) -> Run:
    """Both passes of a loss; gradients of the leaves that need one are dropped again."""

    def run() -> None:
        with ranged("forward"):
            loss = forward()
        with ranged("backward"):
            loss.backward()
        for leaf in leaves:
            leaf.grad = None

    return run


# ------------------------------------------------------------------------------------------------------- LM heads


def _products(count: int, hidden_reads: int, weight_reads: int) -> Callable[[Sizes], Work]:
    """`count` matrix products, and so many times hidden's and weight's bytes."""

    def work(sizes: Sizes) -> Work:
        n, h, v = sizes.rows, sizes.hidden_size, sizes.vocab
        elements = (hidden_reads * n + weight_reads * v) * h
        return Work(2.0 * count * n * h * v, elements * sizes.dtype.itemsize + 12.0 * n)

    return work


def head_inputs(sizes: Sizes) -> tuple[Tensor, ...]:
    """hidden[N, H], weight[V, H] and target[N], with logits of deviation 1."""
    n, h, v, dtype, device = sizes
    hidden = torch.randn(n, h, device=device, dtype=dtype)
    weight = torch.randn(v, h, device=device, dtype=dtype).div_(h**0.5)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(v, (n,), device=device)


def _clone_step(
    backend: str | None, hidden: Tensor, weight: Tensor, target: Tensor, grad_sampling: float | None = None
) -> Run:
    """A group of two responses that tie, so that every row counts."""
    if len(target) % 2 != 0:
        raise ValueError(f"mopo_loss needs an even number of rows, two responses of as many tokens; got {len(target)}")
    device = hidden.device
    labels = (torch.full((2, 1), 0.5, device=device), torch.zeros(2, dtype=torch.int64, device=device))
    multipliers = torch.ones(1, device=device)

    def forward() -> Tensor:
        pair = hidden.unflatten(0, (2, -1)), weight, target.unflatten(0, (2, -1))
        return mopo_loss(*pair, *labels, multipliers, tau=TAU, backend=backend, grad_sampling=grad_sampling).loss

    return forward_and_backward(forward, hidden, weight)


def _both_passes(reduction: Literal["none", "sum"], grad_sampling: float | None = None) -> Callable[..., Run]:
    def bind(backend: str | None, *inputs: Tensor) -> Run:
        def forward() -> Tensor:
            return linear_logprob(*inputs, reduction=reduction, grad_sampling=grad_sampling, backend=backend).sum()

        return forward_and_backward(forward, *inputs[:2])

    return bind


def _linear_logprob_forward(backend: str | None, *inputs: Tensor) -> Run:
    detached = [x.detach() for x in inputs]
    return in_range("forward", lambda: linear_logprob(*detached, backend=backend))


def _frozen_head(backend: str | None, hidden: Tensor, weight: Tensor, target: Tensor) -> Run:
    return _both_passes("none")(backend, hidden, weight.detach(), target)


# ------------------------------------------------------------------------------------------------- what has no head


def _logit_bytes(times: int) -> Callable[[Sizes], Work]:
    return lambda sizes: Work(0.0, (times * sizes.vocab * sizes.dtype.itemsize + 12.0) * sizes.rows)


def _logits(sizes: Sizes) -> tuple[Tensor, ...]:
    """logits[N, V] and target[N]."""
    n, _, v, dtype, device = sizes
    return torch.randn(n, v, device=device, dtype=dtype).requires_grad_(), torch.randint(v, (n,), device=device)


def _token_logprob(backend: str | None, logits: Tensor, target: Tensor) -> Run:
    return in_range("forward", lambda: token_logprob(logits.detach(), target, backend=backend))


def _token_logprob_backward(backend: str | None, logits: Tensor, target: Tensor) -> Run:
    return backward_alone(token_logprob(logits, target, backend=backend), logits)


def backward_alone(logp: Tensor, logits: Tensor) -> Run:
    """The backward of a graph that is kept, under an upstream gradient of ones."""
    upstream = torch.ones_like(logp)
    return in_range("backward", lambda: torch.autograd.grad(logp, logits, upstream, retain_graph=True))


def _token_rows(sizes: Sizes) -> tuple[Tensor, ...]:
    """logp[B, L] and target[B, L], B · L = N."""
    batch = math.gcd(sizes.rows, 64)
    logp = torch.randn(batch, sizes.rows // batch, device=sizes.device)
    return logp, torch.ones_like(logp, dtype=torch.int64)


def _sequence_sums(backend: str | None, logp: Tensor, target: Tensor) -> Run:
    name = backends.choose("sequence_sums", logp.device.type, backend).backend
    if name == "reference":
        return lambda: reference.sequence_sums(logp, target, -100)
    return lambda: ops.sequence_sums(logp, target, -100, name)


def _responses(sizes: Sizes) -> tuple[Tensor, ...]:
    """win_rate[N, K], group[N] and multipliers[K]; each group has two responses, the last one maybe three."""
    n, device = sizes.rows, sizes.device
    if n < 2:
        raise ValueError(f"label_statistics needs at least two responses; got rows={n}")
    group = (torch.arange(n, device=device) // 2).clamp(max=n // 2 - 1)
    return torch.rand(n, OBJECTIVES, device=device), group, torch.ones(OBJECTIVES, device=device)


def labels_of(win_rate: Tensor, group: Tensor, multipliers: Tensor) -> Labels:
    """The batch contract's argument for the inputs of label_statistics."""
    return Labels(win_rate, group, multipliers, lag_log_ratio=None, tau=TAU, eps=EPS, primary=0)


def _label_statistics(backend: str | None, *inputs: Tensor) -> Run:
    return lambda: label_statistics(*inputs, tau=TAU, eps=EPS, backend=backend)


def _label_bytes(sizes: Sizes) -> Work:
    """Win rates and ids read, statistics and slots written."""
    read = (4 * OBJECTIVES + 8) * sizes.rows
    return Work(0.0, read + 8.0 * (LabelValues.length(sizes.rows, OBJECTIVES) + sizes.rows))


WORKLOADS = {
    "mopo_loss": Workload("linear_logprob", _products(3, 2, 2), head_inputs, _clone_step),
    "linear_logprob": Workload("linear_logprob", _products(3, 2, 2), head_inputs, _both_passes("sum")),
    "linear_logprob_rows": Workload("linear_logprob", _products(3, 2, 2), head_inputs, _both_passes("none")),
    "linear_logprob_sampled": Workload(
        "linear_logprob", _products(1, 2, 2), head_inputs, _both_passes("sum", GRAD_SAMPLING)
    ),
    "mopo_loss_sampled": Workload(
        "linear_logprob", _products(1, 2, 2), head_inputs, partial(_clone_step, grad_sampling=GRAD_SAMPLING)
    ),
    "linear_logprob_forward": Workload("linear_logprob", _products(1, 1, 1), head_inputs, _linear_logprob_forward),
    "frozen_head": Workload("linear_logprob", _products(2, 2, 1), head_inputs, _frozen_head),
    "token_logprob": Workload("token_logprob", _logit_bytes(1), _logits, _token_logprob),
    "token_logprob_backward": Workload("token_logprob", _logit_bytes(2), _logits, _token_logprob_backward),
    "sequence_sums": Workload("sequence_sums", lambda sizes: Work(0.0, 12.0 * sizes.rows), _token_rows, _sequence_sums),
    "label_statistics": Workload("label_statistics", _label_bytes, _responses, _label_statistics),
}
