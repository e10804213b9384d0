# mypy: allow-untyped-defs
"""The batch contract (backends/batch.py) in Triton, in float64; the formulas and their names stand there.

    sequence_sums      a program per row
    label_statistics   one program, which holds a batch of up to MAX_RESPONSES responses in its registers

Groups come in any order: each response knows the first one of its group and the next one after itself, and sums over
its group by following them. So a launch looks at B² pairs of ids once, and takes as many steps per sum as the largest
group has members.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopo_kernels.backends.batch import Labels, LabelValues
from mopo_kernels.backends.triton.robust import robust_bound

BLOCK_L = 1024
BLOCK_IDS = 8  # ids that all responses are compared with at a time
MAX_RESPONSES = 8192
MIN_BLOCK_B = 32  # in fewer places than a warp has lanes, Triton 3.6 lost a response from sums over four

NEUTRAL: tl.constexpr = tl.constexpr(0.5)  # an unlabelled response in a group that is labelled for others


# ------------------------------------------------------------------------------------------------------ sequence sums


@triton.jit
def sequence_sums_kernel(
    logp,  # [B, L]
    target,  # [B, L]
    sums,  # [B]
    counts,  # [B]
    logp_row_stride: tl.int64,
    target_row_stride: tl.int64,
    columns: tl.int64,
    ignore_index: tl.int64,
    BLOCK_L: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    total, counted = tl.zeros([BLOCK_L], tl.float64), tl.zeros([BLOCK_L], tl.int64)
    for first in range(0, columns, BLOCK_L):
        column = first + tl.arange(0, BLOCK_L)
        inside = column < columns
        block = tl.load(target + row * target_row_stride + column, mask=inside, other=0)
        counts_here = inside & (block != ignore_index)
        total += tl.load(logp + row * logp_row_stride + column, mask=counts_here, other=0).to(tl.float64)
        counted += counts_here.to(tl.int64)
    tl.store(sums + row, tl.sum(total, 0))
    tl.store(counts + row, tl.sum(counted, 0))


def sequence_sums(logp: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """One launch. Floor: B·L elements of logp and of target read."""
    rows, columns = logp.shape
    sums, counts = logp.new_empty(rows, dtype=torch.float64), target.new_empty(rows)
    if rows > 0:
        with torch.cuda.device_of(logp):
            sequence_sums_kernel[(rows,)](
                logp=logp,
                target=target,
                sums=sums,
                counts=counts,
                logp_row_stride=logp.stride(0),
                target_row_stride=target.stride(0),
                columns=columns,
                ignore_index=ignore_index,
                BLOCK_L=BLOCK_L,
                num_warps=4,
            )
    return sums, counts


# ------------------------------------------------------------------------------------------------------------- groups


@triton.jit
def groups_of(ids, response, responses, BLOCK_IDS: tl.constexpr):
    """Of each response's group: the first member, the one that follows the response, the size; and the largest size.

    The last member is followed by the first. Padding behind the responses is in groups of one.
    """
    own = tl.load(ids + response, mask=response < responses, other=0)
    first, following, size = response, response + responses, tl.zeros_like(response)
    for start in range(0, responses, BLOCK_IDS):
        other = start + tl.arange(0, BLOCK_IDS)
        theirs = tl.load(ids + other, mask=other < responses, other=0)
        other = other[:, None]
        same = (own == theirs[:, None]) & (other < responses) & (response < responses)
        behind = same & (other > response)
        first = tl.minimum(first, tl.min(tl.where(same, other, response), 0))
        following = tl.minimum(following, tl.min(tl.where(behind, other, following), 0))
        size += tl.sum(same.to(tl.int32), 0)
    following = tl.where(following < responses, following, first)
    return first, following, tl.maximum(size, 1), tl.max(size, 0)


@triton.jit
def group_sum(x, groups):
    first, following, size, largest_size = groups
    member, total = first, tl.zeros_like(x)
    for place in range(largest_size):
        total += tl.where(place < size, tl.gather(x, member, 0), 0)
        member = tl.gather(following, member, 0)
    return total


@triton.jit
def log_softmax(x, groups):
    first, following, _, largest_size = groups
    member, largest = first, x
    for _step in range(largest_size):  # more steps than a small group has members go round it again
        largest = tl.maximum(largest, tl.gather(x, member, 0))
        member = tl.gather(following, member, 0)
    x -= largest
    return x - tl.log(group_sum(tl.exp(x), groups))


@triton.jit
def labels_of(win_rate, objective, objectives, response, is_response, groups):
    """v_ik of one objective; whether it labels the response's group; how many labels are outside [0, 1]."""
    label = tl.load(win_rate + response * objectives + objective, mask=is_response, other=0).to(tl.float64)
    is_label = is_response & (label == label)
    is_labelled = group_sum(is_label.to(tl.int32), groups) > 0
    value = tl.where(is_labelled, tl.where(is_label, label, NEUTRAL), 0)
    return value, is_labelled, count((label < 0) | (label > 1))


@triton.jit
def count(condition):
    return tl.sum(condition.to(tl.int32), 0)


# --------------------------------------------------------------------------------------------------- label statistics


@triton.jit
def label_statistics_kernel(
    win_rate,  # [B, K], any of float32 and float64, like the other floats but values
    group,  # [B] int64
    multipliers,  # [K]
    lag_log_ratio,  # [B] or None
    slot,  # [B] int64
    values,  # LabelValues
    responses: tl.int32,
    objectives: tl.int64,
    tau: tl.float64,
    eps: tl.float64,
    primary: tl.int64,
    BLOCK_B: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
):
    response = tl.arange(0, BLOCK_B)
    is_response = response < responses
    groups = groups_of(group, response, responses, BLOCK_IDS)
    first, size = groups[0], groups[2]
    is_first = is_response & (first == response)
    num_groups = count(is_first).to(tl.float64)
    slots = tl.gather(tl.cumsum(is_first.to(tl.int32), 0) - 1, first, 0)
    lag = tl.zeros([BLOCK_B], tl.float64)
    if lag_log_ratio is not None:
        lag = tl.load(lag_log_ratio + response, mask=is_response, other=0).to(tl.float64)

    wrong = count((tl.abs(lag) < float("inf")) == 0) + count(is_response & (size < 2))
    score = tl.zeros([BLOCK_B], tl.float64)
    for objective in range(objectives):
        value, _, wrong_labels = labels_of(win_rate, objective, objectives, response, is_response, groups)
        multiplier = tl.load(multipliers + objective).to(tl.float64)
        is_right = (multiplier >= 0) & (multiplier < float("inf")) & ((objective != primary) | (multiplier == 1))
        wrong += wrong_labels + tl.where(is_right, 0, 1)
        score += multiplier * value
    score /= tau

    log_ref = log_softmax(lag, groups)
    log_weight = log_softmax(score + lag, groups)
    log_ratio = log_weight - log_ref
    weights = tl.where(is_response, tl.exp(log_weight), 0)
    mass = tl.sum(weights, 0)
    tl.store(values, tl.where(wrong == 0, 1.0, 0.0))
    tl.store(values + 1, num_groups)
    tl.store(values + 2, mass * mass / tl.sum(weights * weights, 0))
    tl.store(values + 3, tl.sum(weights * log_ratio, 0) / num_groups)
    per_response = values + 4 + response
    tl.store(per_response, size.to(tl.float64), mask=is_response)
    tl.store(per_response + responses, score, mask=is_response)
    tl.store(per_response + 2 * responses, weights, mask=is_response)
    tl.store(slot + response, slots.to(tl.int64), mask=is_response)

    per_objective = values + 4 + 3 * responses
    for objective in range(objectives):
        value, is_labelled, _ = labels_of(win_rate, objective, objectives, response, is_response, groups)
        labelled_groups = count(is_first & is_labelled).to(tl.float64)
        lower_bound = tl.full([], float("nan"), tl.float64)
        chi = lower_bound
        if labelled_groups > 0:
            masses = tl.where(is_response & is_labelled, tl.exp(log_ref), 0)
            lower_bound, chi = robust_bound(tl.exp(log_ratio) * value, masses, eps)
        tl.store(per_objective + objective, tl.sum(weights * value, 0) / labelled_groups)
        tl.store(per_objective + objectives + objective, lower_bound)
        tl.store(per_objective + 2 * objectives + objective, chi)


def label_statistics(labels: Labels) -> tuple[Tensor, Tensor]:
    """One launch. Floor: its latency; it compares B² pairs of ids and reads B·K labels twice."""
    responses, objectives = labels.win_rate.shape
    if responses > MAX_RESPONSES:
        raise ValueError(
            f"win_rate has {responses} responses, and the Triton kernel takes {MAX_RESPONSES}: split the batch, "
            "build the CUDA extension or pass backend='reference'"
        )
    slot = torch.empty_like(labels.group)
    values = labels.win_rate.new_empty(LabelValues.length(responses, objectives), dtype=torch.float64)
    block_b = max(MIN_BLOCK_B, triton.next_power_of_2(responses))
    with torch.cuda.device_of(labels.win_rate):
        label_statistics_kernel[(1,)](
            **labels._asdict(),
            slot=slot,
            values=values,
            responses=responses,
            objectives=objectives,
            BLOCK_B=block_b,
            BLOCK_IDS=BLOCK_IDS,
            num_warps=min(16, max(4, block_b // 32)),  # a response per thread, until 128 registers each are too many
            num_stages=1,
        )
    return slot, values
