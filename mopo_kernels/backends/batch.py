"""The batch contract: what a training step computes over B responses besides the LM head.

    sequence_sums      sums_b = Σ logp_bl over the positions l that count, counts_b = how many they are
    label_statistics   all that labels and multipliers alone say of a batch: target weights and estimates

For the n responses of a group, labels v_ik (0 in a group that objective k does not label; 1/2 where it labels others),
multipliers λ and lag ratios ω (1 where none are given), with G groups and G_k groups labelled for k:

    s_i = Σ_k λ_k v_ik        r = softmax_group(log ω)        w = softmax_group(s/τ + log ω)
    win_rates     Σ w_i v_ik / G_k
    lower_bounds  max_χ −χ log E[exp(−w_i v_ik / (r_i χ))] − χ eps, E = Σ r_i(·) / G_k over the groups labelled for k;
                  χ = ∞ at eps = 0 and 0 where the KL ball reaches the smallest value; all NaN where G_k = 0
    ess           (Σ w)² / Σ w²
    kl            1/G Σ w_i (log w_i − log r_i)
    valid         1, or 0 where a value is one that `label_statistics` refuses: a win rate outside [0, 1], a group of
                  one response, a multiplier that is negative or not finite, one that is not 1 at the primary, or a lag
                  ratio that is not finite

Arithmetic and sums are float64, in an order that depends on shapes only. Every backend of the
two has these functions.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Labels(NamedTuple):
    """What `label_statistics` takes. Tensors are contiguous; floats are float32 or float64, each for itself."""

    win_rate: Tensor  # [B, K] in [0, 1], NaN = unlabelled
    group: Tensor  # [B] int64, any ids
    multipliers: Tensor  # [K]
    lag_log_ratio: Tensor | None  # [B]
    tau: float
    eps: float
    primary: int


class LabelValues(NamedTuple):
    """What `label_statistics` computes, float64; in a buffer the fields stand one after the other."""

    valid: Tensor  # []
    num_groups: Tensor  # []
    ess: Tensor  # []
    kl: Tensor  # []
    size: Tensor  # [B] n of each response's group
    score: Tensor  # [B] s_i / τ
    weights: Tensor  # [B] w_i
    win_rates: Tensor  # [K]
    lower_bounds: Tensor  # [K]
    chi: Tensor  # [K]

    @staticmethod
    def length(responses: int, objectives: int) -> int:
        return 4 + 3 * responses + 3 * objectives

    @classmethod
    def unpack(cls, buffer: Tensor, responses: int, objectives: int) -> LabelValues:
        """Views of a buffer."""
        scalars, *tensors = buffer.split([4, *(responses,) * 3, *(objectives,) * 3])
        return cls(*scalars.unbind(), *tensors)


class Batch(Protocol):
    """A backend of what is done over the batch."""

    def sequence_sums(
        self,
        logp: Tensor,  # [B, L] float32 or float64; rows anywhere apart, the elements of one side by side
        target: Tensor,  # [B, L] int64, likewise
        ignore_index: int,  # positions of this target do not count: whatever logp holds there
    ) -> tuple[Tensor, Tensor]: ...  # sums[B] float64, counts[B] int64

    def label_statistics(
        self, labels: Labels
    ) -> tuple[Tensor, Tensor]: ...  # slot[B] int64: groups numbered 0 … G − 1 in any order; LabelValues' buffer
