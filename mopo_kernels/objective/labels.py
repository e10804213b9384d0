"""Win rates from what people label: pairs, or comparisons among the responses of a prompt.

`win_rate[B, K]` holds, per objective, the estimated probability that a response beats its prompt's other responses; NaN
is "nobody labelled it".
"""

import math

import torch
from torch import Tensor

from mopo_kernels.checks import check_probabilities


def win_rate_from_pairs(
    preference: Tensor,  # [P, K] probability that the first response beats the second; NaN = unlabelled
) -> Tensor:  # [2P, K]
    """Win rates of P pairs laid out [first..., second...]: v = P for the first response, 1 - P for the second.

    Raises ValueError for a preference outside [0, 1] or not of shape [P, K].
    """
    check_probabilities("preference", preference)
    return torch.cat([preference, 1 - preference])


def win_rate_from_comparisons(
    first: Tensor,  # [C] int64, responses 0 .. num_responses - 1
    second: Tensor,  # [C] int64
    preference: Tensor,  # [C, K] probability that `first` beats `second`; NaN = unlabelled
    num_responses: int,
) -> Tensor:  # [num_responses, K]
    """Win rates from comparisons: v_ik is the mean of P_k(i beats j) over the opponents j that i was compared with.

    A response without a comparison for objective k is NaN there. A pair may stand in several rows (one per objective,
    say) as long as no objective labels it twice. Raises ValueError for that, for a response compared with itself, for
    an index out of range, and for a preference outside [0, 1].
    """
    check_probabilities("preference", preference)
    _check_comparisons(first, second, preference, num_responses)
    labelled = ~preference.isnan()
    wins = torch.where(labelled, preference, 0)
    losses = torch.where(labelled, 1 - preference, 0)
    total = (
        preference.new_zeros(num_responses, preference.shape[1]).index_add(0, first, wins).index_add(0, second, losses)
    )
    count = torch.zeros_like(total).index_add(0, torch.cat([first, second]), labelled.to(total.dtype).repeat(2, 1))
    return torch.where(count > 0, total / count.clamp(min=1), math.nan)


def _check_comparisons(first: Tensor, second: Tensor, preference: Tensor, num_responses: int) -> None:
    shape = (preference.shape[0],)
    if first.shape != shape or second.shape != shape:
        raise ValueError(
            f"first and second must have one index for each of preference's {shape[0]} rows; "
            f"got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    if torch.compiler.is_compiling() or shape[0] == 0:
        return
    for name, index in (("first", first), ("second", second)):
        if not ((index >= 0) & (index < num_responses)).all():
            raise ValueError(f"{name} must hold responses 0 .. {num_responses - 1}; got {index.min()} .. {index.max()}")
    if (first == second).any():
        row = int((first == second).nonzero()[0])
        raise ValueError(f"comparison {row} compares response {first[row]} with itself: drop it")
    pair = torch.minimum(first, second) * num_responses + torch.maximum(first, second)
    for objective in range(preference.shape[1]):
        pairs, labels = pair[~preference[:, objective].isnan()].unique(return_counts=True)
        if (labels > 1).any():
            low, high = divmod(int(pairs[labels > 1][0]), num_responses)
            raise ValueError(
                f"responses {low} and {high} are compared twice for objective {objective}: average their labels first"
            )
