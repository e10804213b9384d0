"""The robust bound: the smallest mean over a KL ball around a sample, and the distribution that attains it.

    LB  = max_{chi > 0} -chi log E[exp(-values / chi)] - chi eps
    q  ~ ref_weights exp(-values / chi),  KL(q || ref_weights) = eps at the maximum

Source: Agnihotri et al., Multi-Objective Preference Optimization, arXiv 2505.10892, the KL-ball bound and Algorithm 1.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mopo_kernels.checks import check_eps

CHI_TOLERANCE = 1e-10  # of sqrt(eps), relative; the bound's own error is of second order in it
MAX_ROOT_STEPS = 200  # a dozen in practice; doubling and bisection alone need fewer than this


def robust_bound(
    values: Tensor,  # [..., M]
    ref_weights: Tensor,  # [..., M] >= 0, summing to 1 over the last dimension
    eps: float,
) -> tuple[Tensor, Tensor]:  # [...], [...]
    """The smallest mean of `values` over the KL ball of radius eps around `ref_weights`, and its temperature chi.

        LB = min {E_q[values] : KL(q || ref_weights) <= eps} = max_{chi > 0} -chi log E[exp(-values / chi)] - chi eps

    chi is inf at eps = 0 (the plain mean) and 0 where the ball reaches the smallest value. The bound is differentiable
    (once) in both tensors; chi is not.

    The paper's eps = 0.15 is wide: on hard-labelled pairs it costs 0.27 of a win rate of 0.5 at rho = 1, while the
    ratchet's beta = 0.9995 leaves a slack of 2.5e-4, so thresholds are violated from the start. `auto_eps` finds the
    radius that matches the ratchet.

    Raises ValueError for eps < 0 and for weights that are not a distribution. Source: paper, the KL-ball lower bound.
    """
    check_eps(eps)
    _check_distribution(values, ref_weights)
    bound, chi = bound_and_chi(values.double(), ref_weights.double(), float(eps))
    return bound.to(values.dtype), chi.to(values.dtype)


def bound_and_chi(values: Tensor, ref_weights: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`robust_bound` of validated float64 tensors."""
    if eps == 0:
        mean = (values * ref_weights).sum(-1)
        return mean, torch.full_like(mean, math.inf)
    chi = torch.ops.mopo_kernels.solve_chi(values.detach(), ref_weights.detach(), eps)
    lowest = support_min(values, ref_weights)
    bound = bound_at(values, ref_weights, torch.where(chi > 0, chi, 1), eps)
    return torch.where(chi > 0, bound, lowest), chi


def bound_at(values: Tensor, ref_weights: Tensor, chi: Tensor, eps: float) -> Tensor:
    """-chi log E[exp(-values / chi)] - chi eps, a lower bound at any chi[...] > 0."""
    lowest = support_min(values, ref_weights)
    excess = (values - lowest[..., None]).clamp(min=0)
    log_mean = (ref_weights * (-excess / chi[..., None]).exp()).sum(-1).log()
    return lowest - chi * (log_mean + eps)


def tilt(values: Tensor, ref_weights: Tensor, inverse_chi: Tensor) -> tuple[Tensor, Tensor]:
    """The tilted distribution q ~ ref_weights exp(-values / chi): q[..., M] and KL(q || ref_weights)[...]."""
    lowest = support_min(values, ref_weights)
    exponent = -inverse_chi[..., None] * (values - lowest[..., None]).clamp(min=0)
    unnormalised = ref_weights * exponent.exp()
    mass = unnormalised.sum(-1)
    q = unnormalised / mass[..., None]
    return q, (q * exponent).sum(-1) - mass.log()


def _solve_chi(values: Tensor, ref_weights: Tensor, eps: float) -> Tensor:
    """chi[...] with KL(q_chi || ref_weights) = eps, or 0 where no tilt is that far.

    KL grows with t = 1/chi from 0 to -log(mass of the smallest value), and sqrt(KL) is nearly linear in t at first.
    """
    lowest = support_min(values, ref_weights)[..., None]
    excess = torch.where(ref_weights > 0, values - lowest, 0)
    scale = excess.amax(-1)
    excess /= torch.where(scale > 0, scale, 1)[..., None]
    reaches_lowest = (scale == 0) | (torch.where(excess == 0, ref_weights, 0).sum(-1).log() >= -eps)

    def excess_radius(t: Tensor) -> tuple[Tensor, Tensor]:
        tilted = (excess * -t[..., None]).exp_().mul_(ref_weights)  # in place: there may be millions of values
        mass = tilted.sum(-1)
        mean = tilted.mul_(excess).sum(-1) / mass
        variance = torch.linalg.vecdot(tilted, excess) / mass - mean**2
        root = (-t * mean - mass.log()).clamp(min=0).sqrt()
        return root - math.sqrt(eps), t * variance / (2 * root)

    _, variance = mean_and_variance(excess, ref_weights)
    start = (2 * eps / variance.clamp(min=1e-30)).sqrt()
    t = increasing_root(excess_radius, start, tolerance=CHI_TOLERANCE * max(math.sqrt(eps), 1e-5), skip=reaches_lowest)
    return torch.where(reaches_lowest, 0, scale / t)


# An op, so that torch.compile need not unroll an iteration whose length depends on data.
_library = torch.library.Library("mopo_kernels", "FRAGMENT")
_library.define("solve_chi(Tensor values, Tensor ref_weights, float eps) -> Tensor")
_library.impl("solve_chi", _solve_chi, "CompositeExplicitAutograd")


@torch.library.register_fake("mopo_kernels::solve_chi", lib=_library)
def _(values: Tensor, ref_weights: Tensor, eps: float) -> Tensor:
    return values.new_empty(values.shape[:-1])


def increasing_root(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],  # t[...] > 0 to value[...] and slope[...]
    start: Tensor,  # [...]
    *,
    tolerance: float,
    skip: Tensor,  # [...] bool, where there is no root to find
) -> Tensor:  # [...]
    """Roots on (0, inf) of increasing functions: Newton, and doubling or bisection where a step leaves the bracket."""
    t, low, high, done = start, torch.zeros_like(start), torch.full_like(start, math.inf), skip
    for _ in range(MAX_ROOT_STEPS):
        value, slope = function(t)
        low, high = torch.where(value < 0, t, low), torch.where(value < 0, high, t)
        done = done | (value.abs() <= tolerance) | (high - low <= 1e-15 * low)
        if done.all():
            break
        newton = t - value / slope
        middle = torch.where(high.isinf(), 2 * t, (low + high) / 2)
        t = torch.where(done, t, torch.where((newton > low) & (newton < high), newton, middle))
    return t


def mean_and_variance(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Of values[..., M] under weights[..., M] that sum to 1."""
    mean = (weights * values).sum(-1)
    return mean, (weights * (values - mean[..., None]) ** 2).sum(-1)


def support_min(values: Tensor, ref_weights: Tensor) -> Tensor:
    return torch.where(ref_weights > 0, values, math.inf).amin(-1)


def _check_distribution(values: Tensor, ref_weights: Tensor) -> None:
    if values.shape != ref_weights.shape or values.dim() == 0 or not values.is_floating_point():
        raise ValueError(
            f"values and ref_weights must be floating-point tensors of one shape [..., M]; "
            f"got {tuple(values.shape)} and {tuple(ref_weights.shape)}"
        )
    if torch.compiler.is_compiling():
        return
    if not values.isfinite().all():
        raise ValueError("values must be finite")
    total = ref_weights.double().sum(-1)
    if (ref_weights < 0).any() or not torch.allclose(total, torch.ones_like(total), atol=1e-3):
        raise ValueError("ref_weights must be >= 0 and sum to 1 over the last dimension: divide them by their sum")
