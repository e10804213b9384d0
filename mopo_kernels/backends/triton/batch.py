# mypy: allow-untyped-defs
"""The batch contract (batch.py) in Triton, in float64; the formulas and their names stand there.

    sequence_sums   a program per row
    objective       one program, which holds a batch of up to MAX_RESPONSES responses in its registers

Groups come in any order: each response knows the first one of its group and the next one after itself, and sums over
its group by following them. So a launch looks at B² pairs of ids once, and takes as many steps per sum as the largest
group has members.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopo_kernels.backends.batch import ObjectiveValues
from mopo_kernels.backends.configuration import Configuration, recorded

BLOCK_L = 1024
BLOCK_IDS = 8  # ids that all responses are compared with at a time
MAX_RESPONSES = 8192

NEUTRAL: tl.constexpr = tl.constexpr(0.5)  # an unlabelled response in a group that is labelled for others
CHI_TOLERANCE: tl.constexpr = tl.constexpr(1e-10)  # of √eps, relative; the bound's own error is of second order in it
MAX_ROOT_STEPS: tl.constexpr = tl.constexpr(200)  # a dozen in practice; doubling and bisection need fewer than this


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
    total, count = tl.zeros([BLOCK_L], tl.float64), tl.zeros([BLOCK_L], tl.int64)
    for first in range(0, columns, BLOCK_L):
        column = first + tl.arange(0, BLOCK_L)
        inside = column < columns
        block = tl.load(target + row * target_row_stride + column, mask=inside, other=0)
        counts_here = inside & (block != ignore_index)
        total += tl.load(logp + row * logp_row_stride + column, mask=counts_here, other=0).to(tl.float64)
        count += counts_here.to(tl.int64)
    tl.store(sums + row, tl.sum(total, 0))
    tl.store(counts + row, tl.sum(count, 0))


def sequence_sums(logp: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    rows, columns = logp.shape
    sums, counts = logp.new_empty(rows, dtype=torch.float64), target.new_empty(rows)
    if rows > 0:
        strides = logp.stride(0), target.stride(0)
        with torch.cuda.device_of(logp):
            sequence_sums_kernel[(rows,)](
                logp, target, sums, counts, *strides, columns, ignore_index, BLOCK_L=BLOCK_L, num_warps=4
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
def group_max(x, groups):
    first, following, size, largest_size = groups
    member, largest = first, tl.full(x.shape, float("-inf"), x.dtype)
    for place in range(largest_size):
        largest = tl.maximum(largest, tl.where(place < size, tl.gather(x, member, 0), float("-inf")))
        member = tl.gather(following, member, 0)
    return largest


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
    x -= group_max(x, groups)
    return x - tl.log(group_sum(tl.exp(x), groups))


# ---------------------------------------------------------------------------------------------------------- estimates


@triton.jit
def labels_of(win_rate, objective, objectives, response, is_response, groups):
    """v_ik of one objective; whether it labels the response's group; how many labels are outside [0, 1]."""
    label = tl.load(win_rate + response * objectives + objective, mask=is_response, other=0).to(tl.float64)
    is_label = label == label
    is_labelled = group_max(is_label.to(tl.float64), groups) > 0
    value = tl.where(is_labelled, tl.where(is_label, label, NEUTRAL), 0)
    return value, is_labelled, count((label < 0) | (label > 1))


@triton.jit
def count(condition):
    return tl.sum(condition.to(tl.int32), 0)


@triton.jit
def robust_bound(values, masses, eps):
    """The smallest mean of `values` over the KL ball of radius eps around masses / Σ masses, and its temperature χ.

    With t = scale / χ, KL grows from 0 to −log(mass of the smallest value), and √KL is nearly linear in t at first:
    Newton on it, and doubling or bisection where a step leaves the bracket (robust.py has the same iteration).
    """
    mass = tl.sum(masses, 0)
    masses /= mass
    lowest = tl.min(tl.where(masses > 0, values, float("inf")), 0)
    excess = tl.where(masses > 0, values - lowest, 0)
    scale = tl.max(excess, 0)
    excess /= tl.where(scale > 0, scale, 1)
    smallest_mass = tl.sum(tl.where(excess == 0, masses, 0), 0)
    lower_bound, chi = lowest, tl.zeros_like(lowest)
    if eps == 0:
        lower_bound, chi = tl.sum(masses * values, 0), chi + float("inf")
    elif (scale > 0) & (tl.log(smallest_mass) < -eps):
        mean = tl.sum(masses * excess, 0)
        variance = tl.sum(masses * (excess - mean) * (excess - mean), 0)
        radius = tl.sqrt(tl.full([], eps, tl.float64))
        tolerance = CHI_TOLERANCE * tl.maximum(radius, 1e-5)
        low, high = tl.zeros_like(scale), tl.full([], float("inf"), tl.float64)
        t = tl.sqrt(2 * eps / tl.maximum(variance, 1e-30))
        steps = 0
        searching = scale > 0
        while searching:
            tilted = masses * tl.exp(-t * excess)
            tilted_mass = tl.sum(tilted, 0)
            tilted_mean = tl.sum(tilted * excess, 0) / tilted_mass
            tilted_square = tl.sum(tilted * excess * excess, 0) / tilted_mass
            log_mass = tl.log(tilted_mass)
            lower_bound, chi = lowest - scale / t * (log_mass + eps), scale / t

            root = tl.sqrt(tl.maximum(-t * tilted_mean - log_mass, 0))
            error = root - radius
            low, high = tl.where(error < 0, t, low), tl.where(error < 0, high, t)
            slope = t * (tilted_square - tilted_mean * tilted_mean) / (2 * root)
            newton = t - error / slope
            halfway = tl.where(high == float("inf"), 2 * t, (low + high) / 2)
            t = tl.where((low < newton) & (newton < high), newton, halfway)
            steps += 1
            searching = (tl.abs(error) > tolerance) & (high - low > 1e-15 * low) & (steps < MAX_ROOT_STEPS)
    return lower_bound, chi


# ---------------------------------------------------------------------------------------------------------- objective


@triton.jit
def load_float64(x, response, mask):
    """Zeros where there is no such argument."""
    if x is None:
        values = tl.zeros(response.shape, tl.float64)
    else:
        values = tl.load(x + response, mask=mask, other=0).to(tl.float64)
    return values


@triton.jit
def count_infinite(x):
    """And NaN."""
    return count((tl.abs(x) < float("inf")) == 0)


@triton.jit
def objective_kernel(
    logp,  # [B], any of float32 and float64, like all here but group, kept and values
    win_rate,  # [B, K]
    group,  # [B] int64
    multipliers,  # [K]
    ref_logp,  # [B] or None
    lag_log_ratio,  # [B] or None
    kept,  # [B] bool or None
    values,  # ObjectiveValues
    responses: tl.int32,
    objectives: tl.int64,
    tau: tl.float64,
    eps: tl.float64,
    primary: tl.int64,
    POLICY_STEP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
):
    response = tl.arange(0, BLOCK_B)
    is_response = response < responses
    is_kept = is_response
    if kept is not None:
        is_kept &= tl.load(kept + response, mask=is_response, other=0) != 0
    logp = load_float64(logp, response, is_kept)
    ref_logp = load_float64(ref_logp, response, is_kept)
    lag = load_float64(lag_log_ratio, response, is_response)
    groups = groups_of(group, response, responses, BLOCK_IDS)
    size = groups[2].to(tl.float64)
    is_first = is_response & (groups[0] == response)
    group_count = count(is_first).to(tl.float64)

    # Values that mopo_objective refuses, and the scores.
    wrong = count_infinite(logp) + count_infinite(ref_logp) + count_infinite(lag) + count(is_response & (size < 2))
    score = tl.zeros([BLOCK_B], tl.float64)
    for objective in range(objectives):
        value, _, wrong_labels = labels_of(win_rate, objective, objectives, response, is_response, groups)
        multiplier = tl.load(multipliers + objective).to(tl.float64)
        is_right = (multiplier >= 0) & (multiplier < float("inf")) & ((objective != primary) | (multiplier == 1))
        wrong += wrong_labels + tl.where(is_right, 0, 1)
        score += multiplier * value
    score /= tau

    log_ref = log_softmax(lag, groups)
    log_weight = log_softmax(score + lag, groups) if NORMALIZE else log_ref + score - 1
    weights = tl.where(is_response, tl.exp(log_weight), 0)
    mass = tl.sum(weights, 0)
    ess = mass * mass / tl.sum(weights * weights, 0)
    kl = tl.sum(weights * (log_weight - log_ref), 0) / group_count

    dropped_mass = tl.zeros_like(mass)
    if POLICY_STEP == "clone":
        loss = -weights * tl.where(is_kept, logp, 0)
        gradient = tl.where(is_kept, -weights, 0)
        dropped_mass = tl.sum(tl.where(is_kept, 0, weights), 0) / group_count
    elif POLICY_STEP == "contrast":
        log_policy = log_softmax(logp - ref_logp, groups)
        loss = -weights * log_policy
        gradient = group_sum(weights, groups) * tl.exp(log_policy) - weights
    else:
        error = logp - ref_logp - (size - 1) / size * score
        error -= group_sum(error, groups) / size
        # The mean over the n(n − 1)/2 pairs of squared differences is 2/(n − 1) times the sum of squared deviations.
        pairs = tl.where(is_response, 2 / (size - 1), 0)
        loss = pairs * error * error
        gradient = 2 * pairs * error
    tl.store(values, tl.sum(loss, 0) / group_count)
    tl.store(values + 1, ess)
    tl.store(values + 2, kl)
    tl.store(values + 3, dropped_mass)
    tl.store(values + 4, tl.where(wrong == 0, 1.0, 0.0))
    tl.store(values + 5 + response, gradient / group_count, mask=is_response)
    tl.store(values + 5 + responses + response, weights, mask=is_response)

    estimates = values + 5 + 2 * responses
    for objective in range(objectives):
        value, is_labelled, _ = labels_of(win_rate, objective, objectives, response, is_response, groups)
        labelled_count = count(is_first & is_labelled).to(tl.float64)
        lower_bound = tl.full([], float("nan"), tl.float64)
        chi = lower_bound
        if labelled_count > 0:
            masses = tl.where(is_response & is_labelled, tl.exp(log_ref), 0)
            lower_bound, chi = robust_bound(tl.exp(log_weight - log_ref) * value, masses, eps)
        tl.store(estimates + objective, tl.sum(weights * value, 0) / labelled_count)
        tl.store(estimates + objectives + objective, lower_bound)
        tl.store(estimates + 2 * objectives + objective, chi)


def objective(
    logp: Tensor,
    win_rate: Tensor,
    group: Tensor,
    multipliers: Tensor,
    ref_logp: Tensor | None,
    lag_log_ratio: Tensor | None,
    kept: Tensor | None,
    *,
    tau: float,
    eps: float,
    policy_step: str,
    normalize: str,
    primary: int,
) -> Tensor:
    responses, objectives = win_rate.shape
    if responses > MAX_RESPONSES:
        raise ValueError(
            f"win_rate has {responses} responses, and the Triton kernel takes {MAX_RESPONSES}: split the batch, "
            "build the CUDA extension or pass backend='reference'"
        )
    values = win_rate.new_empty(ObjectiveValues.size(responses, objectives), dtype=torch.float64)
    block_b = triton.next_power_of_2(responses)
    with torch.cuda.device_of(win_rate):
        objective_kernel[(1,)](
            *(logp, win_rate, group, multipliers, ref_logp, lag_log_ratio, kept, values),
            *(responses, objectives, tau, eps, primary),
            POLICY_STEP=policy_step,
            NORMALIZE=normalize == "group",
            BLOCK_B=block_b,
            BLOCK_IDS=BLOCK_IDS,
            **_options(block_b),
        )
    return values


def _options(block_b: int) -> dict[str, int]:
    """A response per thread as long as threads have room for what is known of it: 128 registers."""
    return {"num_warps": min(16, max(4, block_b // 32)), "num_stages": 1}


def configurations() -> list[Configuration]:
    """Those of both dtypes, all policy steps with all optional arguments and without, and sizes up to the largest."""
    with recorded() as found, torch.device("meta"):
        for dtype in (torch.float32, torch.float64):
            sequence_sums(torch.empty(8, 1024, dtype=dtype), torch.empty(8, 1024, dtype=torch.int64), -100)
        sizes, steps = (2, 64, 1024, MAX_RESPONSES), ("clone", "contrast", "regress")
        for size, step, normalize in itertools.product(sizes, steps, ("group", "none")):
            floats, ids = torch.empty(size), torch.empty(size, dtype=torch.int64)
            for with_options in (False, True):
                ref_logp = floats if with_options or step != "clone" else None
                lag, kept = (floats, torch.empty(size, dtype=torch.bool)) if with_options else (None, None)
                tensors = (floats, torch.empty(size, 3), ids, torch.empty(3), ref_logp, lag, kept)
                objective(*tensors, tau=0.1, eps=0.1, policy_step=step, normalize=normalize, primary=0)
    return found
