"""The batch contract: what a training step computes over B responses besides the LM head.

    sequence_sums   sums_b = Σ logp_bl over the positions l that count, counts_b = how many they are
    objective       everything that `mopo_objective` returns, and ∂loss/∂logp, in one pass

For the n responses of a group, labels v_ik (0 in a group that objective k does not label; 1/2 where it labels others),
multipliers λ and lag ratios ω (1 where none are given), with G groups and G_k groups labelled for k:

    s_i = Σ_k λ_k v_ik        r = softmax_group(log ω)
    w   = softmax_group(s/τ + log ω), or r · exp(s/τ − 1) with normalize = "none"
    clone     loss = −1/G Σ_kept w_i logp_i               gradient = −w/G, 0 where not kept
    contrast  loss = −1/G Σ w_i log softmax_group(h)_i    gradient = (Σ_group w · softmax_group(h) − w)/G
    regress   loss = 1/G Σ 2/(n − 1) e_i²                 gradient = 4/((n − 1) G) e
              with h = logp − ref_logp;  e = h − (n − 1)/n · s/τ, less its mean over the group
    win_rates     Σ w_i v_ik / G_k
    lower_bounds  max_χ −χ log E[exp(−w_i v_ik / (r_i χ))] − χ eps, E = Σ r_i(·) / G_k over the groups labelled for k;
                  χ = ∞ at eps = 0 and 0 where the KL ball reaches the smallest value; all NaN where G_k = 0
    ess           (Σ w)² / Σ w²
    kl            1/G Σ w_i (log w_i − log r_i)
    dropped_mass  1/G Σ w_i over what is not kept
    valid         1, or 0 where a value is one that `mopo_objective` refuses: a win rate outside [0, 1], a group of one
                  response, a multiplier that is negative or not finite, one that is not 1 at the primary, a lag ratio
                  that is not finite, or a kept response's logp or ref_logp that is not

Arithmetic and sums are float64, in an order that depends on shapes only. Every backend of the two is a module with
these functions.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class ObjectiveValues(NamedTuple):
    """What `objective` computes; in a buffer the fields stand one after the other."""

    loss: Tensor  # []
    ess: Tensor  # []
    kl: Tensor  # []
    dropped_mass: Tensor  # []
    valid: Tensor  # []
    gradient: Tensor  # [B] ∂loss/∂logp
    weights: Tensor  # [B]
    win_rates: Tensor  # [K]
    lower_bounds: Tensor  # [K]
    chi: Tensor  # [K]

    @staticmethod
    def size(responses: int, objectives: int) -> int:
        return 5 + 2 * responses + 3 * objectives

    @classmethod
    def unpack(cls, buffer: Tensor, responses: int, objectives: int) -> ObjectiveValues:
        """Views of a buffer."""
        sizes = [5, responses, responses, objectives, objectives, objectives]
        scalars, *tensors = buffer.split(sizes)
        return cls(*scalars.unbind(), *tensors)


class Batch(Protocol):
    """A backend module for what is done over the batch."""

    def sequence_sums(
        self,
        logp: Tensor,  # [B, L] float32 or float64; rows anywhere apart, the elements of one side by side
        target: Tensor,  # [B, L] int64, likewise
        ignore_index: int,  # positions of this target do not count: whatever logp holds there
    ) -> tuple[Tensor, Tensor]: ...  # sums[B] float64, counts[B] int64

    def objective(
        self,
        logp: Tensor,  # [B], as all tensors here contiguous, and float32 or float64 each
        win_rate: Tensor,  # [B, K], NaN = unlabelled
        group: Tensor,  # [B] int64, any ids
        multipliers: Tensor,  # [K]
        ref_logp: Tensor | None,  # [B]; given for contrast and regress
        lag_log_ratio: Tensor | None,  # [B]
        kept: Tensor | None,  # [B] bool; the logp of other responses may be anything
        *,
        tau: float,
        eps: float,
        policy_step: str,  # "clone", "contrast" or "regress"
        normalize: str,  # "group" or "none"
        primary: int,
    ) -> Tensor: ...  # [ObjectiveValues.size(B, K)] float64
