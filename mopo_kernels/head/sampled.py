"""linear_logprob with sampled gradients as torch sees it: one product forms the logits, 2·N·H·V flops in all.

Log-probabilities are exact. While a block of rows has its logits, each row of the softmax is rounded at random to a few
entries q whose expectation it is (backends/fold.py), and the entries wait for the backward, whose upstream gradients c
by logp and l by lse only scale them:

    ∂(Σ c · logp + Σ l · lse)/∂logit = c · onehot(target) · dz/dlogit + (l − c) · q · dz/dlogit     in expectation

so that of its products with weight and hidden only gathers and scatters remain. The entries take N · capacity · 8 bytes
(`Samples.capacity`, 1/grad_sampling + 3), whatever V is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopo_kernels import backends
from mopo_kernels.backends.fold import GRID, Samples
from mopo_kernels.backends.memory import new_empty
from mopo_kernels.backends.reference import RowValues
from mopo_kernels.checks import check_result
from mopo_kernels.head.call import HeadCall, HeadInputs
from mopo_kernels.head.engines import tile_engine
from mopo_kernels.head.ops import (
    Present,
    fake_gradients,
    no_values,
    present,
    refuse_double_backward,
    returned,
    row_values,
    upstream_of,
)
from mopo_kernels.head.plan import accumulate_dtype, plan_for
from mopo_kernels.head.rows import rows_that_count, split
from mopo_kernels.head.shard import add_up, gather, group_of


def run_sampled_logprob(inputs: HeadInputs, call: HeadCall) -> RowValues:
    """What `reference.head_rows` computes, with gradients of `call.grad_sampling`: one random number a row."""
    uniform = torch.rand(inputs.target.shape, dtype=torch.float64, device=inputs.target.device)
    if call.shard is not None:
        uniform = gather(uniform, group_of(call.shard.group))[0]
    return RowValues(*sampled_logprob(*inputs, uniform, call.flat())[:4])


@torch.library.custom_op("mopo_kernels::sampled_logprob", mutates_args=())
def sampled_logprob(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    target: Tensor,  # [N]
    uniform: Tensor,  # [N] float64 in [0, 1)
    call: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp, lse, entropy and hit as from `head_logprob`; columns, values and counts of the samples; slope[N] float64.

    Values are those of q · dz/dlogit, the slope is dz/dlogit at the target; rows that do not count have neither.
    """
    inputs, options = HeadInputs(hidden, weight, bias, target.contiguous()), HeadCall.unflat(call)
    options = options.on(options.backend)  # of the engine's own gradients none is formed
    rows = rows_that_count(inputs.target, options.ignore_index)
    plan = plan_for(inputs, rows, options, "fused")
    blocks = split(rows, plan.row_block)
    engine = tile_engine(inputs, options, plan, rows, blocks=blocks)
    running = (uniform / GRID).floor() * GRID
    values, samples = no_values(target, options.outputs), _no_samples(inputs, options)
    slope = torch.zeros_like(running)
    for block in blocks:
        statistics = engine.statistics(block)
        for whole, part in zip(values, row_values(statistics, options.outputs), strict=True):
            if len(whole) > 0:
                whole[block] = part
        slope[block] = options.transform.slope(statistics.chosen)
        drawn = Samples(*(x[block] for x in samples))
        engine.sample(block, statistics.lse, running[block], drawn)
        if isinstance(block, Tensor):  # of a slice these are the rows themselves
            for whole, part in zip(samples, drawn, strict=True):
                whole[block] = part
    check_result(values.logp, is_split=options.shard is not None, hidden=hidden, weight=weight, bias=bias)
    return *returned(values, accumulate_dtype(weight.dtype)), *samples, slope


@sampled_logprob.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, uniform: Tensor, call: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = HeadCall.unflat(call)
    rows = returned(no_values(target, options.outputs), accumulate_dtype(weight.dtype))
    return *rows, *_no_samples(HeadInputs(hidden, weight, bias, target), options), torch.empty_like(uniform)


def _no_samples(inputs: HeadInputs, call: HeadCall) -> Samples:
    assert call.grad_sampling is not None
    (vocab, _), dtype = inputs.weight.shape, accumulate_dtype(inputs.weight.dtype)
    return Samples.start(len(inputs.target), vocab, call.grad_sampling, dtype, inputs.weight.device)


@torch.library.custom_op("mopo_kernels::sampled_gradients", mutates_args=())
def sampled_gradients(
    columns: Tensor,  # [N, capacity] int32
    values: Tensor,  # [N, capacity]
    counts: Tensor,  # [N] int32
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    call: list[float],
) -> Present:
    """Gradients of a loss whose derivative by the logits is these samples."""
    options, samples = HeadCall.unflat(call), Samples(columns, values.contiguous(), counts)
    fold = backends.fold(options.backend)
    needs_hidden, needs_weight, needs_bias = options.needs
    grad_hidden = grad_weight = grad_bias = None
    if needs_hidden:
        # A split head's sum goes on over the processes, whose parts cancel: rounded to 16 bits they would not.
        sum_dtype = hidden.dtype if options.shard is None else values.dtype
        grad_hidden = new_empty(hidden, hidden.shape, sum_dtype)
        fold.sample_hidden(samples, _row_major(weight), grad_hidden)
        if options.shard is not None:
            grad_hidden = add_up(grad_hidden, group_of(options.shard.group)).to(hidden.dtype)
    if needs_weight:
        grad_weight = new_empty(weight, weight.shape, weight.dtype)
        fold.sample_weight(samples, _row_major(hidden), grad_weight)
    if needs_bias and bias is not None:
        total = torch.zeros(bias.shape, dtype=values.dtype, device=values.device)
        places = columns.clamp(min=0).flatten().long()
        grad_bias = total.index_add_(0, places, values.flatten()).to(bias.dtype)
    return present((grad_hidden, grad_weight, grad_bias), weight)


@sampled_gradients.register_fake
def _(
    columns: Tensor,
    values: Tensor,
    counts: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    call: list[float],
) -> Present:
    return fake_gradients(HeadInputs(hidden, weight, bias, counts), call)


def _row_major(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, _, ctx.call = inputs
    _, _, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, target, *others[2:])


def _backward(ctx: Any, grad_logp: Tensor | None, grad_lse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, target, columns, values, counts, slope = ctx.saved_tensors
    if grad_logp is None and grad_lse is None:
        return (None,) * 6
    of_logp, *of_lse = upstream_of(grad_logp, grad_lse).double()
    scale = (of_lse[0] if of_lse else 0) - of_logp
    call = HeadCall.unflat(ctx.call)
    if call.shard is not None:
        target = call.shard.local(target, weight.shape[0])
    at_target = torch.where(columns == target.unsqueeze(-1), (of_logp * slope).unsqueeze(-1), 0)
    scaled = values * scale.unsqueeze(-1) + at_target
    scaled = torch.where(columns >= 0, scaled, 0).to(values.dtype)  # NaN upstream of a row that does not count is none
    needs = ctx.needs_input_grad[:3]
    gradients = sampled_gradients(columns, scaled, counts, hidden, weight, bias, call.on(call.backend, needs).flat())
    return *(x if need else None for x, need in zip(gradients, needs, strict=True)), None, None, None


sampled_logprob.register_autograd(_backward, setup_context=_save)
refuse_double_backward(sampled_gradients, "leave grad_sampling out and use backend='reference'")
