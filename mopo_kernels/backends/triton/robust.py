# mypy: allow-untyped-defs
"""The robust bound of one objective in one program: the iteration of objective/robust.py, in float64."""

from __future__ import annotations

import triton
import triton.language as tl

CHI_TOLERANCE: tl.constexpr = tl.constexpr(1e-10)  # of √eps, relative; the bound's own error is of second order in it
MAX_ROOT_STEPS: tl.constexpr = tl.constexpr(200)  # a dozen in practice; doubling and bisection need fewer than this


@triton.jit
def robust_bound(values, masses, eps):
    """The smallest mean of `values` over the KL ball of radius eps around masses / Σ masses, and its temperature χ.

    With t = scale / χ, KL grows from 0 to −log(mass of the smallest value), and √KL is nearly linear in t at first:
    Newton on it, and doubling or bisection where a step leaves the bracket.
    """
    mass = tl.sum(masses, 0)
    masses /= mass
    lowest = tl.min(tl.where(masses > 0, values, float("inf")), 0)
    # Where `values` is a product, values - lowest is a fused multiply-add on a GPU, and not 0 for the lowest.
    is_higher = (masses > 0) & (values > lowest)
    excess = tl.where(is_higher, values - lowest, 0)
    scale = tl.max(excess, 0)
    excess /= tl.where(scale > 0, scale, 1)
    smallest_mass = tl.sum(tl.where(is_higher, 0, masses), 0)
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
            derivative = t * (tilted_square - tilted_mean * tilted_mean) / (2 * root)
            newton = t - error / derivative
            halfway = tl.where(high == float("inf"), 2 * t, (low + high) / 2)
            t = tl.where((low < newton) & (newton < high), newton, halfway)
            steps += 1
            searching = (tl.abs(error) > tolerance) & (high - low > 1e-15 * low) & (steps < MAX_ROOT_STEPS)
    return lower_bound, chi
